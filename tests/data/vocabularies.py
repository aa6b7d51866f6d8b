"""Tokenizers for tests: Llama 3's real vocabulary, and a small sentencepiece-like one made by hand."""

import base64
import functools
import importlib.util
import json
import string
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *[f"<|reserved_special_token_{i}|>" for i in range(3, 248)],
]


def bos_before(bos: str, token: int):
    return processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, token)])


def llama3_ranks() -> dict[bytes, int]:
    """Byte sequence -> rank, from the vocabulary that Meta ships in tiktoken's format."""
    spec = importlib.util.find_spec("llama_models")
    if spec is None:
        pytest.skip("llama-models, which ships Llama 3's vocabulary, is not installed")
    path = Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: printable ones stand for themselves, the others from 256 up."""
    own = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


@functools.cache
def llama3() -> Tokenizer:
    """The tokenizer.json that Llama 3.1's folder holds, rebuilt. Do not change it; `Tokenizer.from_str(x.to_str())` copies."""
    ranks = llama3_ranks()
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        halves = [(a, b) for a, b in halves if a in ranks and b in ranks]
        merges += [(spelled[a], spelled[b]) for a, b in sorted(halves, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    raw = Tokenizer(models.BPE({spelled[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA3_SPECIALS])
    raw.post_processor = processors.Sequence([processors.ByteLevel(), bos_before("<|begin_of_text|>", 128000)])
    return raw


def pieces(legacy: bool, more: tuple[str, ...] = ()) -> Tokenizer:
    """A unigram vocabulary as Llama 2's looks from outside: "▁" for blanks, a "▁" before each text (`legacy`: also after
    each special token), BOS in front. "USER" is one piece, "▁USER" two, on which v1's mask counts."""
    words = ["USER", "▁ASSISTANT", "▁the", "▁is", "▁lung", "▁nodule", "▁Normal", "▁No", "ST]", "[IN", "▁[/IN"]
    letters = [*string.ascii_letters, *string.digits, *".,:;!?'\"()[]/<>|_-\n", "▁"]
    scored = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    scored += [(word, -2.0 - 0.01 * i) for i, word in enumerate(words)] + [(letter, -6.0) for letter in letters]
    raw = Tokenizer(models.Unigram(scored, unk_id=0))
    if legacy:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>", *more)])
    raw.post_processor = bos_before("<s>", 1)
    return raw


def save(raw: Tokenizer, folder: Path, **config) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)
