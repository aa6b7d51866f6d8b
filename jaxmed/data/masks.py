"""Which tokens of a training conversation are supervised: the published LLaVA rules, to the token.

All rules count tokens of *texts*: they cut the prompt at its separators, tokenise the pieces again and add up. Where the sum
misses the number of ids (an end token inside a turn, an empty answer), nothing of the sample can be supervised. The
odd constants (-2, -1, +1) are part of the rules: they undo a BOS and a blank that a sentencepiece vocabulary adds to a piece.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxmed.data.templates import Template

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Counted:
    """One round's instruction (masked) and whole length, in tokens."""

    instruction: int
    total: int


def _rounds_of_mpt(prompt: str, template: Template) -> list[str]:
    """The first round with the system block (where there is one), then a question and an answer each; no closing separator."""
    pieces = prompt.split(template.sep)
    first = 3 if template.system else 2
    cuts = [0, *range(first, len(pieces), 2), len(pieces)]
    return [template.sep.join(pieces[a:b]) for a, b in itertools.pairwise(cuts)]


def _instructions(rounds: list[str], header: str) -> list[tuple[str, str]]:
    """(round, its text up to the answer), up to the first round that does not hold exactly one answer header."""
    pairs = []
    for text in rounds:
        parts = text.split(header)
        if not text or len(parts) != 2:
            break
        pairs.append((text, parts[0] + header))
    return pairs


def _llama3(prompt: str, template: Template, encode: Encode, prefix: int, legacy: bool | None) -> list[Counted]:
    pairs = _instructions(_rounds_of_mpt(prompt, template), template.sep + template.roles[1])
    rounds = []
    for index, (text, instruction) in enumerate(pairs):
        bos = prefix if index else 0  # the tokenizer puts its BOS before every text, the prompt has it once
        rounds.append(Counted(len(encode(instruction)) - bos, len(encode(text)) + 1 - bos))
    return rounds


def _mpt(prompt: str, template: Template, encode: Encode, prefix: int, legacy: bool | None) -> list[Counted]:
    pairs = _instructions(_rounds_of_mpt(prompt, template), template.sep + template.roles[1])
    rounds = []
    for index, (text, instruction) in enumerate(pairs):
        more = 1 if index and legacy else 0
        rounds.append(Counted(len(encode(instruction)) - 1 + more, len(encode(text)) + more))
    return rounds


def _v1(prompt: str, template: Template, encode: Encode, prefix: int, legacy: bool | None) -> list[Counted]:
    pairs = _instructions(prompt.split(template.sep2), f"{template.sep}{template.roles[1]}: ")
    rounds = []
    for index, (text, instruction) in enumerate(pairs):
        less = 1 if index and legacy is False else 0
        rounds.append(Counted(len(encode(instruction)) - 2 - less, len(encode(text)) - less))
    return rounds


def _llama_2(prompt: str, template: Template, encode: Encode, prefix: int, legacy: bool | None) -> list[Counted]:
    pairs = _instructions(prompt.split(template.sep2), "[/INST] ")
    return [Counted(len(encode(instruction)) - 2, len(encode(text))) for text, instruction in pairs]


_RULES = {"llama3": (_llama3, 0), "mpt": (_mpt, 0), "v1": (_v1, 1), "llama_2": (_llama_2, 1)}


def supervised(
    prompt: str, size: int, template: Template, encode: Encode, prefix: int, legacy: bool | None
) -> tuple[np.ndarray, int]:
    """([size] bool: supervised tokens; how many tokens the rounds account for). The mask holds only if the two agree.

    `encode` gives the ids of a text with the tokenizer's BOS; `prefix` says how many ids the BOS is.
    """
    rule, cursor = _RULES[template.mask]
    mask = np.ones(size, bool)
    mask[:cursor] = False
    for counted in rule(prompt, template, encode, prefix, legacy):
        mask[cursor : cursor + counted.instruction] = False
        cursor += counted.total
    return mask, cursor
