"""BERTScore's F1 with a BERT or RoBERTa of a folder on this machine: no rescaling, no weights by rarity.

The tokens of both texts become hidden states of one layer, of length 1; every token takes its best cosine among the other
text's tokens. [CLS] and [SEP] may be somebody's best, but are not counted themselves. The figure means nothing without the
encoder's name, its layer and its weights: `facts` has them.

Axis letters: B texts, T tokens, D width.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmed.checkpoint.hf_io import base_fingerprint, open_folder, read_json
from jaxmed.checkpoint.load import read_params
from jaxmed.checkpoint.tower_config import text_encoder_config
from jaxmed.checkpoint.tower_tables import text_encoder_rows
from jaxmed.config import MeshConfig, TextEncoderConfig
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import UserError
from jaxmed.models.text_encoder import TextEncoder
from jaxmed.sharding import Rules, make_mesh

BERTSCORE = "bertscore"
LAYERS = {("bert", 12): 9, ("bert", 24): 18, ("roberta", 12): 10, ("roberta", 24): 17}
"""The layer that the published BERTScore takes, by family and number of layers; of others the last"""
_ROBERTA_OFFSET = 2  # its positions count from the padding's id on
_ROWS, _SHORTEST = 32, 32


class _Encoder(nnx.Module):
    """Gives the text encoder the path that the table has for it."""

    def __init__(self, config: TextEncoderConfig):
        self.text = TextEncoder(config, jax.random.key(0))


class BertScore:
    """A scorer (jaxmed.evaluate.text); texts are read once."""

    name = BERTSCORE

    def __init__(self, folder: str, layer: int = 0):
        """`layer`: after how many blocks (0: as published)."""
        where = os.path.join(folder, "config.json")
        config = read_json(where) if os.path.exists(where) else {}
        self._family = config.get("model_type", "")
        if self._family not in ("bert", "roberta"):
            raise UserError(f"{folder}: holds no BERT or RoBERTa (config.json with that model_type); give one with --bertscore")
        found = text_encoder_config(config | {"model_type": "bert"}, where, None).config
        self.layer = layer or LAYERS.get((self._family, found.layers), found.layers)
        if not 1 <= self.layer <= found.layers:
            raise UserError(f"--bertscore-layer is {layer}; the encoder of {folder} has 1 to {found.layers}")
        self.tokenizer = Tokenizer.from_folder(folder)
        self.facts = {"encoder": folder, "hash": base_fingerprint(folder)[:12], "layer": self.layer}
        self._mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        self._config, params = self._read(folder, replace(found, layers=self.layer))
        self._run = jax.jit(self._hidden)
        self._params = params
        self._vectors: dict[str, np.ndarray] = {}

    def _read(self, folder: str, config: TextEncoderConfig) -> tuple[TextEncoderConfig, Any]:
        """The encoder's config and its parameters, without the blocks that are not needed."""
        tensors = open_folder(folder)
        prefix = f"{self._family}." if any(name.startswith(f"{self._family}.") for name in tensors.names()) else ""
        rows = text_encoder_rows(config, prefix)
        with jax.set_mesh(self._mesh):
            self._graphdef, state = nnx.split(jax.eval_shape(lambda: _Encoder(config)))
            sharding = Rules().sharding(self._mesh)
            place = {"dtype": jnp.float32, "sharding": sharding}
            wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, **place), nnx.to_pure_dict(state))
            params = read_params(rows, [tensors], wanted, False, lambda name: "not needed for BERTScore")
            if self._family == "roberta":
                params["text"]["positions"] = params["text"]["positions"][_ROBERTA_OFFSET:]
                config = replace(config, positions=config.positions - _ROBERTA_OFFSET)
                self._graphdef = nnx.split(jax.eval_shape(lambda: _Encoder(config)))[0]
        return config, params

    def _hidden(self, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """ids, mask [B, T] -> [B, T, D] float32, every token of length 1"""
        hidden = nnx.merge(self._graphdef, params).text(ids, mask, Rules(), jnp.float32)
        return hidden / jnp.linalg.norm(hidden, axis=-1, keepdims=True)

    def ids(self, text: str) -> list[int]:
        """RoBERTa's first word is read as any other, with a space before it."""
        text = text.strip()
        return self.tokenizer.encode(f" {text}" if self._family == "roberta" else text, max_length=self._config.positions)

    def prepare(self, texts: Iterable[str]) -> None:
        """Hidden states of these texts, shortest first; those of others are forgotten."""
        wanted = dict.fromkeys(texts)
        self._vectors = {text: vectors for text, vectors in self._vectors.items() if text in wanted}
        new = {text: self.ids(text) for text in wanted if text.strip() and text not in self._vectors}
        order = sorted(new, key=lambda text: len(new[text]))
        for start in range(0, len(order), _ROWS):
            group = order[start : start + _ROWS]
            longest = len(new[group[-1]])
            length = min(max(_SHORTEST, 1 << (longest - 1).bit_length()), self._config.positions)
            ids, mask = np.zeros((_ROWS, length), np.int32), np.zeros((_ROWS, length), np.int32)
            for row, text in enumerate(group):
                ids[row, : len(new[text])], mask[row, : len(new[text])] = new[text], 1
            with jax.set_mesh(self._mesh):
                hidden = np.asarray(self._run(self._params, ids, mask))
            for row, text in enumerate(group):
                self._vectors[text] = hidden[row, : len(new[text])]

    def __call__(self, answer: str, reference: str) -> float:
        if not answer.strip() or not reference.strip():
            return 0.0
        if answer not in self._vectors or reference not in self._vectors:
            self.prepare((answer, reference))
        cosines = self._vectors[answer] @ self._vectors[reference].T
        ours, theirs = cosines.max(1)[1:-1], cosines.max(0)[1:-1]
        if not len(ours) or not len(theirs):
            return 0.0
        precision, recall = float(ours.mean()), float(theirs.mean())
        return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
