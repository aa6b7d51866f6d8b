"""Multiple choice: which option an answer names, accuracy, and how far the model's own probabilities can be trusted.

A letter is read from the beginning of the answer, `B`, `(B)`, `B. left lung`; else the answer names the option whose text it
holds; else it is unparsable and wrong. Upstream's two rules are there by name: M3D takes for right whatever holds the right
letter and a full stop anywhere ("vitamin A."), the AMOS-MM authors compare the first character.

Axis letters: Q questions, K options of a question.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxmed.evaluate.studies import Study

BINS = 10
RULES = ("vqa_substring", "vqa_first_letter")
"""Names of upstream's rules (`--upstream-exact`)"""


_BEFORE = r"[\s\"'`*(\[{<$]*"
"""Marks that may stand before a letter"""
_END = r"(?:\W*$|\s*[.):,;*\]}\"'`<>])"
"""What stands behind a letter that is no word: a mark, or nothing more"""
_WORDS = r"(?i:(?:the|my|final|correct|right|best)\s+)*(?i:answer|option|choice)"
_SAYS = r"(?i:(?:answer|option|choice)\s+(?:is|would be|should be|must be)|answer\s*[:=>]|choose|pick|select|it is|it's|boxed)"


def parse(answer: str, options: Mapping[str, str]) -> str:
    """The letter of the option that an answer names, "" for none. `options` has at least one.

    A capital at the beginning counts, alone or before anything that is no letter, but for another option's letter ("A or B"); a
    small one only alone or before a mark, as it may be the article. An answer of several words that is an option's whole text
    is that option, letters aside.
    """
    answer = unicodedata.normalize("NFKC", answer)
    text = _plain(answer)
    texts = {letter: _plain(unicodedata.normalize("NFKC", option)) for letter, option in options.items()}
    whole = [letter for letter, option in texts.items() if option == text and " " in text]
    if len(whole) == 1:
        return whole[0]
    by_name = {letter.upper(): letter for letter in options}
    letters = "|".join(re.escape(letter) for letter in by_name)
    another = rf"\)?\s*(?:,|/|&|\+|or\b|and\b)\s*\(?(?:{letters})(?![\w-])"
    if re.match(rf"\s*\(?({letters})\b{another}", answer):
        return ""
    capital = re.match(rf"\s*\(?({letters})\b", answer)
    small = re.match(rf"\s*\(?({letters.lower()})(?:\s*$|\s*[.):,])", answer)
    if found := capital or small:
        return by_name[found[1].upper()]
    if stated := _stated(answer, letters, another):
        return by_name[stated]
    held = [letter for letter, option in texts.items() if option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text)]
    longest = [a for a in held if not any(a != b and texts[a] in texts[b] and texts[a] != texts[b] for b in held)]
    return longest[0] if len(longest) == 1 else ""


def _stated(answer: str, letters: str, another: str) -> str:
    """The one letter of which the answer says that it is its answer, "" for none. Before a word a capital counts, but for A."""
    small = letters.lower()
    first = re.match(rf"{_BEFORE}(?:{_WORDS})?[\s:=]*{_BEFORE}({letters}|{small})(?!{another}){_END}", answer)
    if first:
        return first[1].upper()
    behind = rf"(?:{_END}|(?<![A{small.replace('|', '')}])(?![\w'-]))"
    found = re.finditer(rf"\b{_SAYS}\s*(?i:option|choice)?{_BEFORE}({letters}|{small})(?!{another}){behind}", answer)
    named = {one[1].upper() for one in found}
    return named.pop() if len(named) == 1 else ""


def _plain(text: str) -> str:
    """Lower case, single spaces, no marks at the ends."""
    return " ".join(text.lower().split()).rstrip(".;,:! ").strip("\"'`*")


def _as_parsed(answer: str, letter: str, options: Mapping[str, str]) -> bool:
    return parse(answer, options) == letter


def _substring(answer: str, letter: str, options: Mapping[str, str]) -> bool:
    return f"{letter}." in answer


def _first_letter(answer: str, letter: str, options: Mapping[str, str]) -> bool:
    return answer.strip()[:1].upper() == letter.upper()


_JUDGED: dict[str, Callable[[str, str, Mapping[str, str]], bool]] = {
    "": _as_parsed,
    "vqa_substring": _substring,
    "vqa_first_letter": _first_letter,
}


@dataclass(frozen=True)
class Closed:
    """The studies that are multiple choice; arrays over all studies [S], NaN where one is none."""

    rule: str
    """"" for ours, or upstream's name"""
    letters: tuple[str, ...]
    """The option that each answer names, "" for none"""
    correct: np.ndarray
    """1 or 0"""
    unparsable: np.ndarray
    """1 or 0"""
    likely: np.ndarray
    """Whether the likeliest option is right: 1 or 0; NaN also where the file has no probabilities"""
    squared: np.ndarray
    """Brier's sum over the options, from 0 to 2"""
    confidence: np.ndarray
    """Probability of the likeliest option"""
    chance: np.ndarray
    """1 / K"""


def closed(studies: Sequence[Study], rule: str = "", answers: Sequence[tuple[str, ...]] | None = None) -> Closed | None:
    """None where no study is multiple choice. `answers`: others than the studies' own (a control's), without likelihoods."""
    if not any(study.options for study in studies):
        return None
    given = [study.answers for study in studies] if answers is None else answers
    names = ("correct", "unparsable", "likely", "squared", "confidence", "chance")
    arrays = {name: np.full(len(studies), np.nan) for name in names}
    letters = []
    for i, (study, texts) in enumerate(zip(studies, given, strict=True)):
        letters.append(parse(texts[-1], study.options) if study.options else "")
        if not study.options:
            continue
        arrays["correct"][i] = _JUDGED[rule](texts[-1], study.letter, study.options)
        arrays["unparsable"][i] = not letters[-1]
        arrays["chance"][i] = 1 / len(study.options)
        if study.likelihoods and answers is None:
            said = study.likelihoods[-1]
            arrays["likely"][i] = said.prediction == study.letter
            arrays["confidence"][i] = max(said.probabilities.values())
            shares = [(said.probabilities.get(letter, 0.0), letter == study.letter) for letter in study.options]
            arrays["squared"][i] = sum((share - right) ** 2 for share, right in shares)
    return Closed(rule, tuple(letters), **arrays)


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def bins(confidence: np.ndarray, right: np.ndarray, count: int = BINS) -> list[Bin]:
    """Equal widths from 0 to 1, the empty ones left out; both arrays [Q]."""
    places = np.minimum((confidence * count).astype(int), count - 1)
    return [
        Bin(k / count, (k + 1) / count, int(here.sum()), float(confidence[here].mean()), float(right[here].mean()))
        for k in range(count)
        if (here := places == k).any()
    ]
