"""tokenizer.model by the sentencepiece library: the ids and texts of LLaMA's slow tokenizer in transformers 4.

The vocabularies of Llama 2, Mistral, Phi-3 and TinyLlama come this way. Added tokens are cut out of a text first, the
longest at each place, with the blanks that their flags claim; sentencepiece sees what lies between. `legacy` decides how:

- true: each piece by itself, so each gets the blank that the model puts before a text;
- false: that blank is off, one is set before the whole text, and pieces after a token begin as they are.

Decoding joins the texts between added tokens by blanks whatever `spaces_between_special_tokens` says: that tokenizer never
read the switch. Tokens that have no role (bos, eos, ..., additional) are no special tokens to it and are never left out.
"""

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import sentencepiece
from tokenizers import AddedToken

from jaxmed.data.tokenizer_files import ORDINARY, added_token, content, new_tokens, read_json, read_listed, write_listed
from jaxmed.errors import UserError

_BLANK = "\u2581"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULTS = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": True,
    "legacy": True,
    "clean_up_tokenization_spaces": False,
}
# A serialised ModelProto with normalizer_spec.add_dummy_prefix = false; messages appended to one another are merged.
_WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def is_for_sentencepiece(folder: str) -> bool:
    """Whether the original read this folder's tokenizer.model: LLaMA's slow tokenizer goes by it even where a
    tokenizer.json lies beside it. (A tokenizer.model of tiktoken, as Llama 3 has it, is none.)"""
    path = os.path.join(folder, "tokenizer.model")
    if not os.path.isfile(path):
        return False
    name = read_json(os.path.join(folder, "tokenizer_config.json")).get("tokenizer_class") or "LlamaTokenizer"
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        return name.removesuffix("Fast") == "LlamaTokenizer" and _opens(path)
    if name.removesuffix("Fast") != "LlamaTokenizer":
        raise UserError(
            f"{folder}: tokenizer.model is for {name}, known is LlamaTokenizer; save it with transformers' fast tokenizer, "
            "which writes tokenizer.json"
        )
    return True


def _opens(path: str) -> bool:
    try:
        _processor(path, _read(path))
    except UserError:
        return False
    return True


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _processor(path: str, model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise UserError(
            f"{path}: is no sentencepiece model ({error}); fetch it again, or (Llama 3's is one of tiktoken) take the folder "
            "that has tokenizer.json"
        ) from error
    return processor


def _read_config(folder: str) -> dict[str, Any]:
    """tokenizer_config.json with `added_tokens_decoder`. Where an older folder lacks that list, special_tokens_map.json
    comes first and added_tokens.json and tokenizer.json name the added tokens."""
    config = read_json(os.path.join(folder, "tokenizer_config.json"))
    if "added_tokens_decoder" not in config:
        config |= read_json(os.path.join(folder, "special_tokens_map.json"))
        roles = {content(config.get(name)) for name in _ROLES}
        roles |= {content(token) for token in config.get("additional_special_tokens") or ()}
        listed = {
            index: {"content": name, "special": name in roles, "normalized": name not in roles}
            for name, index in read_json(os.path.join(folder, "added_tokens.json")).items()
        }
        tokens = read_json(os.path.join(folder, "tokenizer.json")).get("added_tokens", ())
        config["added_tokens_decoder"] = listed | {token["id"]: token for token in tokens}
    return _DEFAULTS | {key: value for key, value in config.items() if value is not None}


def _without_broken_bytes(pieces: Sequence[str]) -> list[str]:
    """The pieces, with U+FFFD for each byte of a run of bytes that is no UTF-8 (which sentencepiece copies as it stands)."""
    result: list[str] = []
    for is_byte, group in itertools.groupby(pieces, key=lambda piece: _BYTE.fullmatch(piece) is not None):
        run = list(group)
        if is_byte:
            try:
                bytes(int(piece[3:5], 16) for piece in run).decode()
            except UnicodeDecodeError:
                run = ["\ufffd"] * len(run)
        result += run
    return result


class SentencePieceBackend:
    """Immutable after construction. `prefix` and `suffix`: ids that stand around every text."""

    def __init__(self, folder: str, added_tokens: Sequence[str], pad_token: str = ""):
        path = os.path.join(folder, "tokenizer.model")
        self._model = _read(path)
        config = _read_config(folder)
        self._legacy = bool(config["legacy"])
        self._prefix_space = bool(config["add_prefix_space"])
        self._processor = _processor(path, self._model + (b"" if self._legacy else _WITHOUT_DUMMY_PREFIX))
        self._count: int = self._processor.get_piece_size()
        self._pieces: list[str] = self._processor.id_to_piece(list(range(self._count)))
        self._ids = {piece: token for token, piece in enumerate(self._pieces)}
        self.added: dict[int, AddedToken] = {}
        self.config = config | self._place(config, added_tokens, pad_token)
        self.size = 1 + max(self._ids.values())
        self.prefix = self._role("bos_token") if config["add_bos_token"] else ()
        self.suffix = self._role("eos_token") if config["add_eos_token"] else ()
        self._unknown: int = self._processor.unk_id()
        self._unknown_text: str = content(config["unk_token"])
        self._unknown_length = len(self._processor.encode(self._unknown_text))
        self._tokens = {spec.content: spec for spec in self.added.values()}
        longest = sorted(filter(None, self._tokens), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest)) + ")").split
        self._strips = any(spec.lstrip or spec.rstrip or spec.single_word for spec in self.added.values())
        # Headers and system texts recur in every record, and masks count the same pieces again.
        self._piece_ids = functools.lru_cache(maxsize=4096)(self._tokenise)

    def _place(self, config: dict[str, Any], added_tokens: Sequence[str], pad_token: str) -> dict[str, Any]:
        """Give ids to the added tokens: those listed, those that have a role, then `added_tokens`. A token of the
        vocabulary keeps its id, a new one comes last. Returns the keys of the config that follow from it."""
        extra = list(config.get("additional_special_tokens", ()))
        listed = read_listed(config)
        names = {spec.content for spec in listed.values()}
        for token, spec in listed.items():
            self._put(token, spec)
        for token in [config[name] for name in _ROLES if name in config] + extra:
            if content(token) not in names:
                names.add(content(token))
                self._put(self._next(content(token)), added_token(token))
        for spec in new_tokens(added_tokens, self.added.values()):
            self._put(self._next(spec.content), spec)
        if pad_token in self._ids:  # elsewhere, as for tokenizer.json, it stays without an id
            self._put(self._ids[pad_token], self.added.get(self._ids[pad_token], added_token(pad_token)))
            config = config | {"pad_token": pad_token}
        roles = {name: content(config[name]) for name in _ROLES if name in config}
        extra = [content(token) for token in extra]
        extra += [name for name in added_tokens if name not in {*roles.values(), *extra, *ORDINARY}]
        self._special = {*roles.values(), *extra}
        self._special_ids = {self._ids[name] for name in self._special}
        # Decoding sets these apart: added tokens without a role, and additional ones beyond the model's vocabulary.
        self._apart = {spec.content for spec in self.added.values()} - self._special
        self._apart |= {name for name in extra if self._ids[name] >= self._count}
        return roles | {"additional_special_tokens": extra, "added_tokens_decoder": write_listed(self.added)}

    def _next(self, token: str) -> int:
        return self._ids.get(token, len(self._ids))

    def _put(self, token: int, spec: AddedToken) -> None:
        self.added[token] = spec
        self._ids[spec.content] = token

    def _role(self, name: str) -> tuple[int, ...]:
        return (self._ids[content(self.config[name])],)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without prefix and suffix."""
        if not self._legacy and text:
            text = text.replace(_BLANK, " ")
            text = _BLANK + text if self._prefix_space else text
        parts = self._split(text) if self._tokens else [text]
        parts = [part for part in (self._stripped(parts) if self._strips else parts) if part]
        if not self._legacy and self._is_blank_before_special(parts):
            parts = parts[1:]
        ids: list[int] = []
        for part in parts:
            if part in self._tokens:
                ids.append(self._ids[part])
            else:
                ids.extend(self._piece_ids(part))
        return ids

    def _is_blank_before_special(self, parts: list[str]) -> bool:
        """Whether the blank set before the text stands alone: a special token (added ones without a role do not count)
        loses it."""
        if len(parts) < 2 or parts[0] in self._tokens or parts[1] not in self._special:
            return False
        return self._piece_ids(parts[0]) == (self._ids.get(_BLANK, self._unknown),)

    def _stripped(self, parts: list[str]) -> list[str]:
        """The parts of a text (odd ones are tokens) after each token took the blanks beside it."""
        parts = [part for part in parts if part]
        for index, part in enumerate(parts):
            spec = self._tokens.get(part)
            if spec is None:
                continue
            left = parts[index - 1] if index else ""
            right = parts[index + 1] if index + 1 < len(parts) else ""
            if spec.rstrip and right:
                parts[index + 1] = right.lstrip()
            if spec.lstrip and left:
                parts[index - 1] = left.rstrip()
            # A token that must be a whole word goes back to the text it touches.
            if spec.single_word and left and left[-1] != " ":
                parts[index - 1], parts[index] = parts[index - 1] + part, ""
            elif spec.single_word and right and right[0] != " ":
                parts[index], parts[index + 1] = "", part + parts[index + 1]
        return parts

    def _tokenise(self, text: str) -> tuple[int, ...]:
        if self._legacy or not text.startswith((_BLANK, " ")):
            pieces = self._processor.encode(text, out_type=str)
        else:
            # Some models strip blanks before a text, so it is tokenised behind the unknown token's spelling.
            pieces = self._processor.encode(self._unknown_text + text, out_type=str)[self._unknown_length :]
        return tuple(self._ids.get(piece, self._unknown) for piece in pieces)

    def decode(self, ids: Sequence[int], keep_special: bool, whole_bytes: bool = False) -> str:
        """`whole_bytes`: a run of byte pieces that is no UTF-8 becomes U+FFFD as a whole, one a byte, as transformers' fast
        tokenizer has it; else what of it is UTF-8 stays."""
        texts: list[str] = []
        run: list[str] = []
        for token in ids:
            piece = self.spelling(token)
            if piece is None or (token in self._special_ids and not keep_special):
                continue
            if piece not in self._apart:
                run.append(piece)
                continue
            run = _without_broken_bytes(run) if whole_bytes else run
            texts += [text for text in (self._join(run),) if text]
            texts.append(piece)
            run = []
        run = _without_broken_bytes(run) if whole_bytes else run
        return " ".join([*texts, self._join(run)] if run else texts)

    def _join(self, pieces: list[str]) -> str:
        """Text of pieces; special tokens among them are copied, and sentencepiece joins what lies between."""
        if pieces and pieces[0].startswith(_BLANK) and self._prefix_space:
            pieces = [pieces[0][1:], *pieces[1:]]
        text = ""
        run: list[str] = []
        after_special = False
        for index, piece in enumerate(pieces):
            if piece in self._special:
                text += " " if self._legacy and index and not after_special else ""
                text += self._processor.decode(run) + piece
                run = []
            else:
                text += " " if after_special and index == 1 and self._prefix_space and piece[:1] != _BLANK else ""
                run.append(piece)
            after_special = piece in self._special
        return text + self._processor.decode(run)

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def spelling(self, token: int) -> str | None:
        if token in self.added:
            return self.added[token].content
        return self._pieces[token] if 0 <= token < self._count else None

    def state(self) -> str:
        """All that turns text into ids and back."""
        names = ("add_bos_token", "add_eos_token", "add_prefix_space", "unk_token", "added_tokens_decoder")
        state = [hashlib.sha256(self._model).hexdigest(), sorted(self._special), *(self.config[name] for name in names)]
        return json.dumps(state, sort_keys=True)

    def save(self, folder: str) -> None:
        with open(os.path.join(folder, "tokenizer.model"), "wb") as file:
            file.write(self._model)
