"""Towers alone, and M3D-CLIP: what `jaxmed.load` returns for folders without a language model.

Axis letters: M images, N tokens of an image, C features of a token, L blocks, P width of the shared space, T text, W width of
the text encoder.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmed.checkpoint.encoder_folders import EncoderFolder, open_encoder
from jaxmed.checkpoint.load import named_arrays
from jaxmed.config import MeshConfig
from jaxmed.data.inputs import read_input
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import UserError
from jaxmed.evaluate.retrieval import PLACES, retrieval
from jaxmed.models.contrastive import Contrast, Contrastive
from jaxmed.sharding import Rules, make_mesh
from jaxmed.vlm_model import ImageInput, Result

_RETRIEVED = 8
"""Pairs a row of the mesh that are looked at together in a retrieval"""


class TowerModel:
    """An image tower: CLIP, SigLIP, DINO or ViT3D weights by themselves."""

    def __init__(self, folder: EncoderFolder, mesh: Mesh | None, dtype: str):
        self.folder, self.visual = folder, folder.visual
        self.mesh = mesh or make_mesh(MeshConfig(), jax.local_devices())
        self.rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self.rules = folder.rules(self.mesh)
        self.dtype = jnp.dtype(dtype)
        self._compiled: dict[Any, Callable[..., Any]] = {}

    @functools.cached_property
    def _weights(self) -> tuple[nnx.GraphDef, Any]:
        """Structure, and a nested dict of arrays on the mesh."""
        with jax.set_mesh(self.mesh):
            return self.folder.place(self.mesh, self.dtype)

    def apply(self, compute: Callable[[nnx.Module, Rules], Any], *inputs: np.ndarray) -> Any:
        """`compute(model, rules, *inputs)`, compiled once a function and shape; inputs [M, ...], M is padded."""
        graphdef, params = self._weights

        def run(params: Any, *inputs: jax.Array) -> Any:
            return compute(nnx.merge(graphdef, params), self.rules, *inputs)

        with jax.set_mesh(self.mesh):
            compiled = self._compiled.setdefault(compute, jax.jit(run))
            return jax.device_get(compiled(params, *(self._rows(x) for x in inputs)))

    def _rows(self, x: np.ndarray) -> jax.Array:
        """Rows padded to what the mesh divides, and placed."""
        padded = np.zeros((-(-len(x) // self.rows) * self.rows, *x.shape[1:]), x.dtype)
        padded[: len(x)] = x
        return jax.device_put(padded, self.rules.sharding(self.mesh, "batch", *[None] * (x.ndim - 1)))

    def preprocess(self, image: ImageInput) -> np.ndarray:
        """A file, or an array as such a file holds it -> the tower's input: [H, W, 3] or [D, H, W, 1] float32."""
        return read_input(image if isinstance(image, np.ndarray) else os.fspath(image), self.visual).values

    def tower_features(self, images: Sequence[ImageInput], hidden: bool = False) -> Any:
        """[N, C] float32 an image; with `hidden` a pair of that list and a list of [L, N', C] an image: every block's output,
        all tokens, before selection and the final norm."""
        inputs = np.stack([self.preprocess(image) for image in images]) if len(images) else None
        if inputs is None:
            return ([], []) if hidden else []
        found = [np.asarray(f, np.float32) for f in self.apply(_features, inputs)[: len(images)]]
        if not hidden:
            return found
        blocks = np.asarray(self.apply(_hidden, inputs), np.float32)
        return found, [blocks[:, i] for i in range(len(images))]

    def image_features(self, images: Sequence[ImageInput], hidden: bool = False) -> Any:
        """The same: a tower alone has no projection."""
        return self.tower_features(images, hidden)


def _features(model: Any, rules: Rules, x: jax.Array) -> jax.Array:
    return model.tower(x.astype(model.tower.patch.weight.dtype), rules)


def _hidden(model: Any, rules: Rules, x: jax.Array) -> jax.Array:
    return jnp.stack(model.tower.hidden_states(x.astype(model.tower.patch.weight.dtype), rules))


class ContrastiveModel(TowerModel):
    """M3D-CLIP: volumes and reports as unit vectors of one space."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder.tokenizer)

    def image_features(self, images: Sequence[ImageInput], hidden: bool = False, tokens: bool = False) -> Any:
        """[P] float32 of length 1 an image, from the class token; with `tokens` [N, P], every token, the class token first.

        With `hidden` a pair of that list and of every block's output (see `tower_features`, which is before the projection).
        """
        if hidden:
            return self.image_features(images, tokens=tokens), self.tower_features(images, hidden=True)[1]
        inputs = np.stack([self.preprocess(image) for image in images])
        found = np.asarray(self.apply(_encode_image, inputs))[: len(images)]
        return list(found if tokens else found[:, 0])

    def text_features(self, texts: Sequence[str], tokens: bool = False, max_length: int = 0, hidden: bool = False) -> Any:
        """[P] float32 of length 1 a text, from [CLS]; with `tokens` [T, P], padding included. A text is cut at `max_length`
        tokens (0: the position table's), special tokens counted.

        With `hidden` a pair of that list and of every block's output of the text encoder, [L, T, W] a text."""
        ids, mask = self.text_ids(texts, max_length)
        found = np.asarray(self.apply(_encode_text, ids, mask))[: len(texts)]
        features = list(found if tokens else found[:, 0])
        if not hidden:
            return features
        blocks = np.asarray(self.apply(_text_blocks, ids, mask), np.float32)
        return features, [blocks[:, i] for i in range(len(texts))]

    def text_hidden(self, texts: Sequence[str], max_length: int = 0) -> list[np.ndarray]:
        """What the text encoder gives, before the projection: [T, W] float32 a text, padding included."""
        found = self.apply(_text_hidden, *self.text_ids(texts, max_length))
        return list(np.asarray(found, np.float32)[: len(texts)])

    def text_ids(self, texts: Sequence[str], max_length: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask (1 text, 0 padding), both [texts, max_length] int32."""
        return self.tokenizer.encode_batch(list(texts), max_length or self.folder.text.positions)

    def states_of_ids(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids and mask [M, T] as `text_ids` gives them -> what the text encoder gives [M, T, W], and every token's vector
        [M, T, P], both float32."""
        found = (self.apply(compute, ids, mask) for compute in (_text_hidden, _encode_text))
        hidden, vectors = (np.asarray(x, np.float32)[: len(ids)] for x in found)
        return hidden, vectors

    @property
    def scale(self) -> float:
        """What cosines are multiplied by."""
        raw = float(self._weights[1]["logit_scale"])
        return math.exp(raw) if self.folder.exp_scale else raw

    def similarity(self, images: Sequence[ImageInput], texts: Sequence[str]) -> np.ndarray:
        """Cosines [images, texts] float32."""
        return np.stack(self.image_features(images)) @ np.stack(self.text_features(texts)).T

    def retrieval(
        self, images: Sequence[ImageInput], texts: Sequence[str], ks: Sequence[int] = PLACES, identity: bool = False
    ) -> Result:
        """Who finds its partner among the first k, image i and text i being a pair: `i2t_r1` (of images that look for their
        text), `t2i_r1`, ..., and `ranking_i2t`, `ranking_t2i` [pairs, pairs], the nearest first. `identity`: a text with the
        same words is as good as the image's own."""
        if len(images) != len(texts):
            raise UserError(f"{len(images)} images for {len(texts)} texts; give pairs")
        step = _RETRIEVED * self.rows
        starts = range(0, len(images), step)
        vectors = (
            np.concatenate([np.stack(read(items[start : start + step])) for start in starts])
            for read, items in ((self.image_features, list(images)), (self.text_features, list(texts)))
        )
        found = retrieval(*vectors, ks, texts if identity else ())
        return Result(found.recalls, ranking_i2t=found.ranking_i2t, ranking_t2i=found.ranking_t2i)

    def loss(self, images: Sequence[ImageInput], texts: Sequence[str], gradients: bool = False, max_length: int = 0) -> Result:
        """Symmetric contrastive loss of the pairs as one batch: `loss`, `pairs`, and with `gradients` {upstream's tensor name:
        float32 array} of every parameter. Without dropout."""
        if len(images) != len(texts):
            raise UserError(f"{len(images)} images for {len(texts)} texts; give pairs")
        if len(images) % self.rows:
            raise UserError(f"{len(images)} pairs do not divide over the mesh's {self.rows} rows; give a multiple")
        graphdef, params = self._weights
        pixels = self._rows(np.stack([self.preprocess(image) for image in images]))
        ids, mask = (self._rows(x) for x in self.text_ids(texts, max_length))

        def compute(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params)
            image = model.encode_image(pixels.astype(self.dtype), self.rules)[:, 0]
            text = model.encode_text(ids, mask, self.rules, self.dtype)[:, 0]
            there = jnp.ones(image.shape[:1], bool, out_sharding=self.rules.spec("batch"))
            return jnp.mean(model.losses(image, text, there, Contrast(0, self.folder.exp_scale), self.rules)[0])

        with jax.set_mesh(self.mesh):
            if not gradients:
                return Result(loss=float(jax.jit(compute)(params)), pairs=len(images))
            value, grads = jax.jit(jax.value_and_grad(compute))(params)
            return Result(loss=float(value), pairs=len(images), gradients=named_arrays(grads, self.folder.sources.rows))


def _encode_image(model: Contrastive, rules: Rules, x: jax.Array) -> jax.Array:
    return model.encode_image(x.astype(model.tower.patch.weight.dtype), rules)


def _encode_text(model: Contrastive, rules: Rules, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return model.encode_text(ids, mask, rules, model.text.words.dtype)


def _text_hidden(model: Contrastive, rules: Rules, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return model.text(ids, mask, rules, model.text.words.dtype)


def _text_blocks(model: Contrastive, rules: Rules, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return model.text.hidden_states(ids, mask, rules, model.text.words.dtype)


def encoder_model(folder: str, mesh: Mesh | None, dtype: str, overrides: Mapping[str, Any]) -> TowerModel:
    """The model of a folder that holds encoders alone."""
    found = open_encoder(folder, overrides)
    kind = ContrastiveModel if found.contrastive else TowerModel
    return kind(found, mesh, dtype)
