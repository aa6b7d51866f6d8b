"""tokenizer.json, or BERT's vocab.txt, by the `tokenizers` library: text -> ids -> text, without clean-up."""

import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxmed.data.tokenizer_files import content, new_tokens, read_json, read_listed
from jaxmed.errors import UserError

_BERT = {
    "tokenizer_class": "BertTokenizer",
    "do_lower_case": True,
    "tokenize_chinese_chars": True,
    "strip_accents": None,
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}
# The library normalises and cuts each piece between special tokens by itself. Only a pre-tokenizer that treats the first
# piece of a text differently (Metaspace with "first") looks beyond its piece; these do not.
_LOCAL_PRETOKENIZERS = {"Sequence", "Split", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"}


def read_tokenizer(folder: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """(tokenizer.json with the tokens that tokenizer_config.json adds, the keys of the folder's two config files)"""
    config = read_json(os.path.join(folder, "special_tokens_map.json"))
    config |= read_json(os.path.join(folder, "tokenizer_config.json"))
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        raw, config = _word_pieces(os.path.join(folder, "vocab.txt"), config)
    else:
        try:
            raw = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise UserError(f"{path}: is not a tokenizer ({error}); fetch the file again") from error
    _add_listed(raw, config, folder)
    return raw, config


def _word_pieces(path: str, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """BERT's tokenizer from the list of its pieces, as BertTokenizer of transformers 4 made it, and its complete settings."""
    config = _BERT | config
    with open(path, encoding="utf-8") as file:
        pieces = [line.rstrip("\n") for line in file]
    ids = {piece: token for token, piece in enumerate(pieces)}
    roles = {name: content(config[f"{name}_token"]) for name in ("unk", "cls", "sep", "pad", "mask")}
    lacking = sorted(token for token in roles.values() if token not in ids)
    if lacking:
        raise UserError(f"{path}: has no piece {', '.join(lacking)}; it is no vocabulary of BERT's, fetch the file again")
    raw = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=roles["unk"], max_input_chars_per_word=100))
    raw.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config["tokenize_chinese_chars"]),
        strip_accents=config["strip_accents"],
        lowercase=bool(config["do_lower_case"]),
    )
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(roles[name], ids[roles[name]]) for name in ("cls", "sep")]
    raw.post_processor = processors.TemplateProcessing(single=f"{roles['cls']} $A {roles['sep']}", special_tokens=ends)
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    raw.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in roles.values()])
    return raw, config


def _add_listed(raw: tokenizers.Tokenizer, config: dict[str, Any], folder: str) -> None:
    """Add tokens that tokenizer_config.json lists and tokenizer.json lacks, as transformers does."""
    for token, spec in read_listed(config).items():
        if raw.token_to_id(spec.content) is None:
            raw.add_tokens([spec])
            got = raw.token_to_id(spec.content)
            if got != token:
                raise UserError(
                    f"{folder}: tokenizer_config.json gives {spec.content!r} the id {token}, tokenizer.json puts it at {got}; "
                    "the two files do not belong together, fetch both again"
                )


class JsonBackend:
    """Immutable after construction. `prefix` and `suffix`: ids that stand around every text."""

    def __init__(self, raw: tokenizers.Tokenizer, config: dict[str, Any], added_tokens: Sequence[str]):
        """`raw` is taken over (it grows by `added_tokens`)."""
        raw.no_truncation()
        raw.no_padding()
        for spec in new_tokens(added_tokens, raw.get_added_tokens_decoder().values()):
            (raw.add_special_tokens if spec.special else raw.add_tokens)([spec])
        self._raw = raw
        self.config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True} | config
        self.size = 1 + max(raw.get_vocab(with_added_tokens=True).values())
        self.prefix, self.suffix = _surroundings(raw)
        self.added: dict[int, tokenizers.AddedToken] = raw.get_added_tokens_decoder()
        self.encode = _encoder(raw)

    def decode(self, ids: Sequence[int], keep_special: bool, whole_bytes: bool = False) -> str:
        return self._raw.decode(ids, skip_special_tokens=not keep_special)

    def token_id(self, token: str) -> int | None:
        return self._raw.token_to_id(token)

    def spelling(self, token: int) -> str | None:
        return self._raw.id_to_token(token)

    def state(self) -> str:
        return self._raw.to_str()

    def save(self, folder: str) -> None:
        self._raw.save(os.path.join(folder, "tokenizer.json"))


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
