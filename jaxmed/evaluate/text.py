"""Scores of one text against one reference: BLEU-1 to 4, ROUGE-1, 2 and L, METEOR. All from 0 to 1.

BLEU is sacrebleu's: 13a tokens, case kept, uniform geometric mean over the orders 1 to n, brevity penalty, exponential
smoothing. A text is reduced once to its sufficient statistics, int64 [10] = (answer length, reference length, matches of
order 1..4, n-grams of order 1..4); statistics add over texts, so any resample of a corpus is one matrix product away.
ROUGE is rouge_score's F1 with Porter stemming: lower case, letters and digits alone, words above three letters stemmed; ROUGE-L
over the whole text. The longest common subsequence is counted in bits of one integer (Hyyrö 2004), since the quadratic
loop of rouge_score takes most of a second for a long report. METEOR reads the 13a tokens in lower case: `meteor` is nltk's
with WordNet's synonyms, where WordNet is on this machine; `meteor_exact` is jaxmed.evaluate.meteor's, without synonyms, always.

What is a mean over studies and dearer than these comes as a `Scorer` (METEOR here, BERTScore in jaxmed.evaluate.bertscore).

Axis letters: R resamples or texts, 10 statistics.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from nltk.stem.porter import PorterStemmer
from rouge_score.tokenize import tokenize as rouge_tokenize
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from jaxmed.errors import UserError
from jaxmed.evaluate import meteor as alignment

ORDERS = 4
BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
ROUGE = ("rouge_1", "rouge_2", "rouge_l")
METEOR = "meteor"
METEOR_EXACT = "meteor_exact"

_stemmer = PorterStemmer()
_tokenize_13a = Tokenizer13a()


@functools.lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    return _stemmer.stem(word)


class _CachedStemmer:
    """Reports repeat their words; stemming is the dearest part of ROUGE."""

    stem = staticmethod(_stem)


def _ngrams(words: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def bleu_tokens(text: str) -> list[str]:
    """The words that BLEU counts."""
    return _tokenize_13a(text.rstrip()).split()


def bleu_statistics(answer: str, reference: str) -> np.ndarray:
    """Sufficient statistics of one pair: int64 [10], see the head of this file."""
    ours, theirs = bleu_tokens(answer), bleu_tokens(reference)
    matches, totals = [], []
    for order in range(1, ORDERS + 1):
        counts, reference_counts = _ngrams(ours, order), _ngrams(theirs, order)
        matches.append(sum(min(count, reference_counts[gram]) for gram, count in counts.items()))
        totals.append(max(len(ours) - order + 1, 0))
    return np.array([len(ours), len(theirs), *matches, *totals], np.int64)


def bleu_from_statistics(statistics: np.ndarray, order: int, single: bool) -> np.ndarray:
    """BLEU of the given order from summed statistics [..., 10] -> [...].

    `single`: the score of one text rather than of a corpus; a text shorter than `order` words is then judged by the orders
    it has (sacrebleu's effective order), where a corpus would get 0.
    """
    statistics = np.asarray(statistics, np.float64)
    ours, theirs = statistics[..., 0], statistics[..., 1]
    matches, totals = statistics[..., 2 : 2 + order], statistics[..., 2 + ORDERS : 2 + ORDERS + order]
    exists = totals > 0
    misses = np.cumsum((matches == 0) & exists, axis=-1)  # the k-th order without a match counts as 2^-k matches
    smoothed = np.where(matches > 0, matches, 0.5**misses)
    logs = np.where(exists, np.log(smoothed / np.where(exists, totals, 1)), 0)
    orders = exists.sum(-1)
    mean = logs.sum(-1) / np.maximum(orders, 1)
    length = np.where(ours > 0, ours, 1)
    brevity = np.where(ours < theirs, np.exp(1 - theirs / length), 1)
    valid = (matches[..., 0] > 0) & (single | (orders == order))
    return np.where(valid, brevity * np.exp(mean), 0)


def rouge_tokens(text: str) -> list[str]:
    """The words that ROUGE counts."""
    return rouge_tokenize(text, _CachedStemmer())


def common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | (1 << i)
    full = (1 << len(a)) - 1
    row = full  # a zero at bit i: the subsequence grows at word i of `a`
    for word in b:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(a) - row.bit_count()


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def rouge(answer: str, reference: str) -> tuple[float, float, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (F1) of one pair."""
    ours, theirs = rouge_tokens(answer), rouge_tokens(reference)
    scores = []
    for order in (1, 2):
        counts, reference_counts = _ngrams(ours, order), _ngrams(theirs, order)
        common = sum(min(count, reference_counts[gram]) for gram, count in counts.items())
        scores.append(_f1(common, counts.total(), reference_counts.total()))
    scores.append(_f1(common_subsequence(ours, theirs), len(ours), len(theirs)))
    return scores[0], scores[1], scores[2]


class Scorer(Protocol):
    """A score of one text against one reference, from 0 to 1."""

    name: str

    def prepare(self, texts: Iterable[str]) -> None:
        """Told of the texts that will be compared next, for scorers that read many at a time."""

    def __call__(self, answer: str, reference: str) -> float: ...


class ExactMeteor:
    """METEOR by exact words and Porter stems."""

    name = METEOR_EXACT

    def prepare(self, texts: Iterable[str]) -> None:
        pass

    def __call__(self, answer: str, reference: str) -> float:
        ours, theirs = ([_stem(word) for word in bleu_tokens(text.lower())] for text in (answer, reference))
        return alignment.meteor_exact(ours, theirs)


class SynonymMeteor:
    """METEOR with a WordNet."""

    name = METEOR

    def __init__(self, wordnet: Any = None):
        self._wordnet = wordnet

    def prepare(self, texts: Iterable[str]) -> None:
        pass

    def __call__(self, answer: str, reference: str) -> float:
        return meteor(answer, reference, self._wordnet)


def scorers(wordnet: Any = None) -> tuple[Scorer, ...]:
    """METEOR in the forms that can be had here; `wordnet`: one that `read_wordnet` opened."""
    with_synonyms = (SynonymMeteor(wordnet),) if wordnet is not None or meteor_available() else ()
    return (ExactMeteor(), *with_synonyms)


@functools.cache
def meteor_available() -> bool:
    """Whether METEOR's synonyms, WordNet as nltk keeps it, are on this machine. Nothing is downloaded."""
    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
    except (ImportError, LookupError, OSError):
        return False
    return True


def read_wordnet(folder: str) -> Any:
    """A WordNet from a folder: that of its files (data.noun, index.sense, ...), or nltk's data folder above it."""
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader, WordNetError

    places = [Path(folder, inner) for inner in ("", "wordnet", "corpora/wordnet")]
    found = next((place for place in places if (place / "data.noun").is_file()), None)
    if found is None:
        raise UserError(f"{folder}: has no data.noun; give the unpacked folder of WordNet's files with --wordnet")

    class English(WordNetCorpusReader):
        """Without the tables of other languages, which nltk seeks among its own data."""

        def map_wn(self, version: str = "wordnet") -> None:
            return None

    nltk.data.path.append(str(found))  # nltk reads from the folders that it knows alone
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that other languages are not there
            return English(str(found), None)
    except (OSError, ValueError, AssertionError, WordNetError) as error:
        raise UserError(f"{found}: is no whole WordNet ({error}); unpack it again") from error


def meteor(answer: str, reference: str, wordnet: Any = None) -> float:
    """METEOR of one pair with synonyms; only where `meteor_available()`, or with an opened WordNet."""
    if wordnet is None:
        from nltk.corpus import wordnet
    from nltk.translate.meteor_score import meteor_score

    ours, theirs = bleu_tokens(answer.lower()), bleu_tokens(reference.lower())
    return float(meteor_score([theirs], ours, wordnet=wordnet)) if ours and theirs else 0.0
