"""A tokenizer folder as one immutable object: text -> ids -> text, exactly as transformers 4 had it.

Two libraries stand behind it: `tokenizers` for a folder with tokenizer.json or BERT's vocab.txt, sentencepiece for LLaMA's
tokenizer.model (which comes first where both are there, as it did in the original systems). `tokenizer_config.json`,
`special_tokens_map.json`, `added_tokens.json`, `generation_config.json` and `config.json` are read where present. Added
tokens become special tokens, in the order given, as `add_special_tokens` of transformers makes them; those that the folder
holds already keep their ids.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from jaxmed.data.json_tokenizer import JsonBackend, read_tokenizer
from jaxmed.data.sentencepiece_tokenizer import SentencePieceBackend, is_for_sentencepiece
from jaxmed.data.tokenizer_files import content, read_json, write_json, write_listed
from jaxmed.errors import UserError

IMAGE_TOKEN = "<image>"
IMAGE_ID = -200
IGNORE = -100

_CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def clean_up(text: str) -> str:
    """Join punctuation and English contractions to the word before, literally and in this order.

    transformers 4 did this on decoding; transformers 5 ignores the switch for BPE tokenizers.
    """
    for mark in _CLEAN_UP:
        text = text.replace(mark, mark.strip())
    return text


def has_tokenizer(folder: str) -> bool:
    """Whether the folder holds a file that `Tokenizer.from_folder` reads."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("tokenizer.json", "tokenizer.model", "vocab.txt"))


def read_end_ids(folder: str) -> tuple[int, ...]:
    """End ids that a model folder states: generation_config.json's, else config.json's, else ()."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(os.path.join(folder, name)).get("eos_token_id")
        if value is not None:
            return tuple(int(i) for i in value) if isinstance(value, list) else (int(value),)
    return ()


class Tokenizer:
    """Immutable after construction; safe to share between threads."""

    def __init__(
        self,
        raw: tokenizers.Tokenizer | SentencePieceBackend,
        config: dict[str, Any] | None = None,
        end_ids: Sequence[int] = (),
        added_tokens: Sequence[str] = (),
    ):
        """`raw` is taken over (it grows by `added_tokens`; one of sentencepiece holds them already). `config`: the keys of
        tokenizer_config.json that count: `bos_token`, `eos_token`, `pad_token`, `clean_up_tokenization_spaces`, `legacy`."""
        backend = raw if isinstance(raw, SentencePieceBackend) else JsonBackend(raw, config or {}, added_tokens)
        self._backend = backend
        self._config = backend.config | (config or {})
        self.size: int = backend.size
        self.base_size: int = _base_size(backend, added_tokens)
        self.prefix: tuple[int, ...] = backend.prefix
        self.suffix: tuple[int, ...] = backend.suffix
        named = {name: self.token_id(content(self._config.get(f"{name}_token"))) for name in ("bos", "eos", "pad")}
        self.bos_id: int | None = self.prefix[0] if named["bos"] is None and self.prefix else named["bos"]
        self.eos_ids: tuple[int, ...] = tuple(end_ids) or (() if named["eos"] is None else (named["eos"],))
        self.pad_id: int = named["pad"] if named["pad"] is not None else (self.eos_ids or (0,))[0]
        # Which way of joining rounds a sentencepiece vocabulary has; None where the notion does not exist.
        legacy = self._config.get("legacy")
        is_llama = str(self._config.get("tokenizer_class", "")).startswith("Llama")
        self.legacy: bool | None = legacy if isinstance(legacy, bool) else (True if is_llama else None)

    @classmethod
    def from_folder(cls, path: str, added_tokens: tuple[str, ...] = (), pad_token: str = "") -> "Tokenizer":
        """`pad_token`: one of the tokens that is to be the padding, else what the folder says."""
        if not os.path.isdir(path):
            raise UserError(
                f"{path}: no such folder; give the one that holds tokenizer.json, tokenizer.model or vocab.txt "
                "(--model.tokenizer or --model.base)"
            )
        if not has_tokenizer(path):
            raise UserError(f"{path}: has no tokenizer.json, tokenizer.model or vocab.txt; copy the one of the model there")
        pad = {"pad_token": pad_token} if pad_token else {}
        if is_for_sentencepiece(path):
            return cls(SentencePieceBackend(path, added_tokens, pad_token), pad, read_end_ids(path), added_tokens)
        raw, config = read_tokenizer(path)
        return cls(raw, config | pad, read_end_ids(path), added_tokens)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Added tokens that have a role of their own; `[SEG]` of M3D is an ordinary one."""
        return tuple(spec.content for spec in self._backend.added.values() if spec.special)

    def encode(self, text: str, special: bool = True, max_length: int = 0) -> list[int]:
        """Ids of `text`; with `special` between what the tokenizer puts around it (a BOS, as a rule). `max_length`: the text
        is cut on the right so that there are as many ids at most, those around it included (0: it is not)."""
        ids = self._backend.encode(text)
        around = len(self.prefix) + len(self.suffix) if special else 0
        if max_length:
            ids = ids[: max(max_length - around, 0)]
        return [*self.prefix, *ids, *self.suffix] if special else ids

    def encode_batch(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [B, T] int32, mask [B, T] bool) with T = `max_length`: cut on the right, filled with the padding."""
        ids = np.full((len(texts), max_length), self.pad_id, np.int32)
        mask = np.zeros((len(texts), max_length), bool)
        for row, text in enumerate(texts):
            found = self.encode(text, max_length=max_length)
            ids[row, : len(found)] = found
            mask[row, : len(found)] = True
        return ids, mask

    def decode(self, ids: Iterable[int], keep_special: bool = True, whole_bytes: bool = False) -> str:
        """Text of `ids`, cleaned up if the folder says so (where it says nothing: tokenizer.json yes, sentencepiece no),
        not stripped. `whole_bytes`: broken UTF-8 as transformers' fast tokenizer shows it (tokenizer.json's always does)."""
        text = self._backend.decode([int(i) for i in ids], keep_special, whole_bytes)
        return clean_up(text) if self._config["clean_up_tokenization_spaces"] else text

    def token_id(self, token: str) -> int | None:
        return self._backend.token_id(token) if token else None

    def piece(self, token: int) -> str:
        """One id for display: its text, or the vocabulary's own spelling where it is no whole character."""
        if token == IMAGE_ID:
            return IMAGE_TOKEN
        spelling = self._backend.spelling(token) or f"<{token}>"
        text = self._backend.decode([token], True)
        if "\ufffd" in text or not text:
            return spelling
        return f" {text}" if spelling.startswith("\u2581") and not text.startswith(" ") else text

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all that turns text into ids and back (added tokens too): a saved copy has the same."""
        config = {name: self._config.get(name) for name in ("clean_up_tokenization_spaces", "legacy")}
        state = [self._backend.state(), config]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str) -> None:
        """Write a folder that transformers and `from_folder` read back to the same ids. Other keys of an existing
        generation_config.json are left as they are."""
        os.makedirs(folder, exist_ok=True)
        self._backend.save(folder)
        names = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None), "pad_token": None}
        named = {name: content(self._config.get(name)) or self._name(token) for name, token in names.items()}
        named = {name: token for name, token in named.items() if token}
        listed = {"added_tokens_decoder": write_listed(self._backend.added)}
        write_json(os.path.join(folder, "tokenizer_config.json"), self._config | named | listed)
        write_json(os.path.join(folder, "special_tokens_map.json"), named)
        path = os.path.join(folder, "generation_config.json")
        write_json(path, read_json(path) | {"eos_token_id": list(self.eos_ids)})

    def _name(self, token: int | None) -> str:
        return "" if token is None else self._backend.spelling(token) or ""


def _base_size(backend: JsonBackend | SentencePieceBackend, added: Sequence[str]) -> int:
    """Rows before the added tokens: those of them that stand last in the vocabulary are cut off."""
    size = backend.size
    ids = {backend.token_id(token) for token in added}
    while size - 1 in ids:
        size -= 1
    return size
