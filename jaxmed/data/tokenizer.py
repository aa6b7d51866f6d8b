"""A Hugging Face tokenizer folder as one immutable object: text -> ids -> text, exactly as transformers 4 had it.

Only `tokenizer.json` is needed; `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` and
`config.json` are read where present. Added tokens become special tokens, in the order given, as
`add_special_tokens` of transformers makes them; those that the folder holds already keep their ids.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tokenizers

from jaxmed.errors import UserError

IMAGE_TOKEN = "<image>"
IMAGE_ID = -200
IGNORE = -100

# The library normalises and cuts each piece between special tokens by itself. Only a pre-tokenizer that treats the first
# piece of a text differently (Metaspace with "first") looks beyond its piece; these do not.
_LOCAL_PRETOKENIZERS = {"Sequence", "Split", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"}
_CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def clean_up(text: str) -> str:
    """Join punctuation and English contractions to the word before, literally and in this order.

    transformers 4 did this on decoding; transformers 5 ignores the switch for BPE tokenizers.
    """
    for mark in _CLEAN_UP:
        text = text.replace(mark, mark.strip())
    return text


def _read_json(path: str) -> dict[str, Any]:
    """The JSON object of a file, {} if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}; it must be an object")
    return value


def _content(token: Any) -> str:
    """Tokens stand in these files as a string, as {"content": string} or not at all."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def read_end_ids(folder: str) -> tuple[int, ...]:
    """End ids that a model folder states: generation_config.json's, else config.json's, else ()."""
    for name in ("generation_config.json", "config.json"):
        value = _read_json(os.path.join(folder, name)).get("eos_token_id")
        if value is not None:
            return tuple(int(i) for i in value) if isinstance(value, list) else (int(value),)
    return ()


def _add_listed(raw: tokenizers.Tokenizer, listed: dict[str, Any], folder: str) -> None:
    """Add tokens that tokenizer_config.json lists and tokenizer.json lacks, as transformers does."""
    for key, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if raw.token_to_id(_content(token)) is None:
            flags = {
                name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in token
            }
            raw.add_tokens([tokenizers.AddedToken(_content(token), **flags)])
            got = raw.token_to_id(_content(token))
            if got != int(key):
                raise UserError(
                    f"{folder}: tokenizer_config.json gives {_content(token)!r} the id {key}, tokenizer.json puts it at {got}; "
                    "the two files do not belong together, fetch both again"
                )


def _load_raw(folder: str) -> tokenizers.Tokenizer:
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; give the one that holds tokenizer.json (--model.tokenizer or --model.base)")
    if not os.path.isfile(path):
        raise UserError(
            f"{folder}: has no tokenizer.json; a folder with tokenizer.model alone gets one from transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        return tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        raise UserError(f"{path}: is not a tokenizer ({error}); fetch the file again") from error


class Tokenizer:
    """Immutable after construction; safe to share between threads."""

    def __init__(
        self,
        raw: tokenizers.Tokenizer,
        config: dict[str, Any] | None = None,
        end_ids: Sequence[int] = (),
        added_tokens: Sequence[str] = (),
    ):
        """`raw` is taken over (it grows by `added_tokens`). `config`: the keys of tokenizer_config.json that count here,
        `bos_token`, `eos_token`, `pad_token`, `clean_up_tokenization_spaces`, `legacy`."""
        raw.no_truncation()
        raw.no_padding()
        _add_special(raw, added_tokens)
        self._raw = raw
        self._config = dict(config or {})
        self.size: int = 1 + max(raw.get_vocab(with_added_tokens=True).values())
        self.base_size: int = _base_size(raw, added_tokens, self.size)
        self.prefix, self.suffix = _surroundings(raw)
        named = {name: self.token_id(_content(self._config.get(f"{name}_token"))) for name in ("bos", "eos", "pad")}
        self.bos_id: int | None = self.prefix[0] if named["bos"] is None and self.prefix else named["bos"]
        self.eos_ids: tuple[int, ...] = tuple(end_ids) or (() if named["eos"] is None else (named["eos"],))
        self.pad_id: int = named["pad"] if named["pad"] is not None else (self.eos_ids or (0,))[0]
        # Which way of joining rounds a sentencepiece vocabulary has; None where the notion does not exist.
        legacy = self._config.get("legacy")
        is_llama = str(self._config.get("tokenizer_class", "")).startswith("Llama")
        self.legacy: bool | None = legacy if isinstance(legacy, bool) else (True if is_llama else None)
        self._ids = _encoder(raw)

    @classmethod
    def from_folder(cls, path: str, added_tokens: tuple[str, ...] = (), pad_token: str = "") -> "Tokenizer":
        """`pad_token`: one of the tokens that is to be the padding, else what the folder says."""
        raw = _load_raw(path)
        config = _read_json(os.path.join(path, "special_tokens_map.json"))
        config |= _read_json(os.path.join(path, "tokenizer_config.json"))
        config |= {"pad_token": pad_token} if pad_token else {}
        _add_listed(raw, config.get("added_tokens_decoder") or {}, path)
        return cls(raw, config, read_end_ids(path), added_tokens)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of `text`; with `special` between what the post-processor puts around it (a BOS, as a rule)."""
        ids = self._ids(text)
        return [*self.prefix, *ids, *self.suffix] if special else ids

    def decode(self, ids: Iterable[int], keep_special: bool = True) -> str:
        """Text of `ids`, cleaned up if the folder says so (or says nothing), not stripped."""
        text = self._raw.decode([int(i) for i in ids], skip_special_tokens=not keep_special)
        return clean_up(text) if self._config.get("clean_up_tokenization_spaces", True) else text

    def token_id(self, token: str) -> int | None:
        return self._raw.token_to_id(token) if token else None

    def piece(self, token: int) -> str:
        """One id for display: its text, or the vocabulary's own spelling where it is no whole character."""
        if token == IMAGE_ID:
            return IMAGE_TOKEN
        spelling = self._raw.id_to_token(token) or f"<{token}>"
        text = self._raw.decode([token], skip_special_tokens=False)
        if "\ufffd" in text or not text:
            return spelling
        return f" {text}" if spelling.startswith("\u2581") and not text.startswith(" ") else text

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all that turns text into ids and back (added tokens too): a saved copy has the same."""
        config = {name: self._config.get(name) for name in ("clean_up_tokenization_spaces", "legacy")}
        state = [self._raw.to_str(), config]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str) -> None:
        """Write a folder that transformers and `from_folder` read back to the same ids. Other keys of an existing
        generation_config.json are left as they are."""
        os.makedirs(folder, exist_ok=True)
        self._raw.save(os.path.join(folder, "tokenizer.json"))
        names = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None), "pad_token": None}
        named = {name: _content(self._config.get(name)) or self._name(token) for name, token in names.items()}
        named = {name: token for name, token in named.items() if token}
        listed = {
            str(token): {
                name: getattr(spec, name) for name in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
            }
            for token, spec in sorted(self._raw.get_added_tokens_decoder().items())
        }
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
        _write_json(
            os.path.join(folder, "tokenizer_config.json"), config | self._config | named | {"added_tokens_decoder": listed}
        )
        _write_json(os.path.join(folder, "special_tokens_map.json"), named)
        path = os.path.join(folder, "generation_config.json")
        _write_json(path, _read_json(path) | {"eos_token_id": list(self.eos_ids)})

    def _name(self, token: int | None) -> str:
        return "" if token is None else self._raw.id_to_token(token) or ""


def _write_json(path: str, value: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def _add_special(raw: tokenizers.Tokenizer, tokens: Sequence[str]) -> None:
    repeated = sorted({token for token in tokens if not token or tokens.count(token) > 1})
    if repeated:
        raise UserError(f"added tokens {list(tokens)}: {repeated[0]!r} is empty or stands there twice; give each once")
    known = {spec.content for spec in raw.get_added_tokens_decoder().values()}
    raw.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in tokens if t not in known])


def _base_size(raw: tokenizers.Tokenizer, added: Sequence[str], size: int) -> int:
    """Rows before the added tokens: those of them that stand last in the vocabulary are cut off."""
    ids = {raw.token_to_id(token) for token in added}
    while size - 1 in ids:
        size -= 1
    return size


def _surroundings(raw: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and after a text."""
    encoding = raw.encode("a", add_special_tokens=True)
    inner = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    if not inner:
        ids = raw.encode("", add_special_tokens=True).ids
        return tuple(ids), ()
    return tuple(encoding.ids[: inner[0]]), tuple(encoding.ids[inner[-1] + 1 :])


def _is_local(raw: tokenizers.Tokenizer) -> bool:
    """Whether text may be cut at special tokens and tokenised piece by piece with the same result."""
    parts = [raw.pre_tokenizer] if raw.pre_tokenizer is not None else []
    states = [json.loads(part.__getstate__()) for part in parts]
    kinds = {state["type"] for state in states}
    kinds |= {inner["type"] for state in states for inner in state.get("pretokenizers", ())}
    specs = raw.get_added_tokens_decoder().values()
    plain = all(not (spec.lstrip or spec.rstrip or spec.single_word) for spec in specs)
    return kinds <= _LOCAL_PRETOKENIZERS and plain


def _encoder(raw: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    """Text -> ids without surroundings. Where pieces between special tokens are independent of each other they are
    tokenised once and kept: headers and system texts recur in every record, and masks count the same pieces again."""

    def whole(text: str) -> list[int]:
        return raw.encode(text, add_special_tokens=False).ids

    specs = raw.get_added_tokens_decoder()
    tokens = {spec.content: token for token, spec in specs.items() if not spec.normalized}
    if not tokens or not _is_local(raw):
        return whole
    # Longest first: the library takes the longest of several tokens that start at one place.
    split = re.compile("(" + "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) + ")").split
    piece = functools.lru_cache(maxsize=4096)(lambda text: tuple(whole(text)))

    def pieces(text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(split(text)):
            if index % 2:
                ids.append(tokens[part])
            elif part:
                ids.extend(piece(part))
        return ids

    return pieces
