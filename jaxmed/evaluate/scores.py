"""Scores of a set of studies: each one's, the corpus', intervals, collapse, and what a control with wrong images loses.

Corpus BLEU sums the sufficient statistics over all answers; the other corpus scores are means over studies (a study of
several questions counts once, as the mean over its answers). Intervals are the central 95% of resamples of the *studies*,
drawn with replacement by a seed; a control is resampled with the same draws, so that its drop is that of paired differences.
All of it is a product of a matrix of draws [R, S] with per-study statistics.

Where records are parts of what is asked about one volume (its regions, multiple choice), what is resampled is the volume
with all its records; where the data set names patients (CT-RATE), it is the patient with all volumes, whose reports are alike
or the same: `units` says which records belong together.

Axis letters: S studies (records), R resamples, K the scores that are means (ROUGE, METEOR, BERTScore where it can be had).
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.evaluate import text
from jaxmed.evaluate.studies import Study

RESAMPLES = 1000
FEW = 10
"""Studies below which their resamples say too little of how others would do: intervals come out too narrow"""
CHUNK = 50
"""Resamples whose draws exist at once: 50 of 50,000 studies are 20 MB."""
TOGETHER = 512
"""Pairs of texts that a scorer prepares at once"""


@dataclass(frozen=True)
class Statistics:
    """What the scores of a set of answers are made of."""

    bleu: np.ndarray
    """[S, 10] int64, summed over a study's answers"""
    means: np.ndarray
    """[S, K] float64"""
    names: tuple[str, ...]
    """The K scores"""


@dataclass(frozen=True)
class Control:
    """The same studies written with wrong images."""

    kind: str
    """`shuffled`, `zeros`, `noise`; "" where it is not known"""
    answers: tuple[tuple[str, ...], ...]
    studies: list[dict[str, float]]
    corpus: dict[str, float]
    drop: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """Of the drop"""
    unchanged_share: float


@dataclass(frozen=True)
class Scores:
    """Everything that the files and the page say of texts."""

    statistics: Statistics
    volumes: int
    """Studies: records, or volumes with several records"""
    units: int
    """What was resampled: studies, or patients with several of them"""
    per_study: list[dict[str, float]]
    """One dict a study, in their order"""
    corpus: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    commonest: list[tuple[str, int]]
    """The commonest answers and how often each was given, the most frequent first"""
    answers: int
    distinct: int
    always_commonest: dict[str, float]
    control: Control | None


def statistics(
    answers: Sequence[tuple[str, ...]], references: Sequence[tuple[str, ...]], scorers: Sequence[text.Scorer] | None = None
) -> Statistics:
    """Reads every pair once; all that follows is arithmetic. `scorers`: those beside BLEU and ROUGE (None: METEOR's)."""
    scorers = text.scorers() if scorers is None else scorers
    pairs = [list(zip(ours, theirs, strict=True)) for ours, theirs in zip(answers, references, strict=True)]
    distinct = list(dict.fromkeys(pair for row in pairs for pair in row))  # letters and "Normal." come over and over
    found: dict[tuple[str, str], tuple[np.ndarray, list[float]]] = {}
    for start in range(0, len(distinct), TOGETHER):
        group = distinct[start : start + TOGETHER]
        for scorer in scorers:
            scorer.prepare(one for pair in group for one in pair)
        for pair in group:
            found[pair] = text.bleu_statistics(*pair), [*text.rouge(*pair), *(scorer(*pair) for scorer in scorers)]
    rows = [[found[pair] for pair in row] for row in pairs]
    bleu = [np.sum([one for one, _ in row], axis=0) for row in rows]
    means = [np.mean([one for _, one in row], axis=0) for row in rows]
    return Statistics(np.array(bleu), np.array(means), text.ROUGE + tuple(scorer.name for scorer in scorers))


def _named(bleu: np.ndarray, means: np.ndarray, names: tuple[str, ...], single: bool) -> dict[str, np.ndarray]:
    """Scores from summed BLEU statistics [..., 10] and averaged means [..., K]."""
    scores = {name: text.bleu_from_statistics(bleu, order, single) for order, name in enumerate(text.BLEU, 1)}
    return scores | {name: means[..., k] for k, name in enumerate(names)}


def corpus_scores(stats: Statistics) -> dict[str, float]:
    scores = _named(stats.bleu.sum(0), stats.means.mean(0), stats.names, single=False)
    return {name: float(value) for name, value in scores.items()}


def study_scores(stats: Statistics) -> list[dict[str, float]]:
    scores = _named(stats.bleu, stats.means, stats.names, single=True)
    return [{name: float(value[i]) for name, value in scores.items()} for i in range(len(stats.bleu))]


def draws(studies: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each study is in each resample, [chunk, S], chunk by chunk; the same for the same arguments."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, CHUNK):
        picks = random.integers(0, studies, (min(CHUNK, resamples - start), studies))
        yield np.stack([np.bincount(row, minlength=studies) for row in picks])


def counted(scores: Scores) -> str:
    """`12 studies`, `1,564 studies of 1,304 patients`"""
    studies = f"{scores.volumes:,} stud{'y' if scores.volumes == 1 else 'ies'}"
    patients = f" of {scores.units:,} patient{'' if scores.units == 1 else 's'}"
    return studies + (patients if scores.units < scores.volumes else "")


def few_notice(scores: Scores) -> list[str]:
    """What a person should know of intervals from few studies."""
    few = f"{counted(scores)}: too few for intervals, those given here are too narrow"
    return [few] if scores.units < FEW else []


def units(studies: Sequence[Study]) -> np.ndarray:
    """[S] int: which unit each study is part of, from 0 on in the studies' order."""
    return _numbered([("patient", study.patient) if study.patient else study.volume or i for i, study in enumerate(studies)])


def _numbered(names: Sequence[Any]) -> np.ndarray:
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


def weights(units: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each study is in each resample of the units, [chunk, S], chunk by chunk."""
    for drawn in draws(int(units.max()) + 1, resamples, seed):
        yield drawn[:, units]


def weighted(stats: Statistics, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Corpus scores of studies that count so often: [R, S] -> [R] each."""
    means = weights @ stats.means / np.maximum(weights.sum(-1, keepdims=True), 1)
    return _named(weights @ stats.bleu, means, stats.names, single=False)


def resampled(stats: Statistics, resamples: int, seed: int, units: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Corpus scores of every resample, [R] each."""
    units = np.arange(len(stats.bleu)) if units is None else units
    pieces = [weighted(stats, w) for w in weights(units, resamples, seed)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The central 95% of those that are there; NaN where none is (a lone study that no resample drew)."""
    there = samples[np.isfinite(samples)]
    low, high = np.percentile(there, [2.5, 97.5]) if len(there) else (np.nan, np.nan)
    return float(low), float(high)


def score(
    studies: list[Study],
    control: list[tuple[str, ...]] | None = None,
    control_kind: str = "",
    resamples: int = RESAMPLES,
    seed: int = 0,
    scorers: Sequence[text.Scorer] | None = None,
) -> Scores:
    """Scores all studies; `control`: their answers with wrong images, in the same order."""
    answers, references = [s.answers for s in studies], [s.references for s in studies]
    stats, together = statistics(answers, references, scorers), units(studies)
    samples = resampled(stats, resamples, seed, together)
    counts = Counter(answer for study in answers for answer in study)
    commonest = counts.most_common(5)
    always = statistics([(commonest[0][0],) * len(study) for study in references], references, scorers)
    corpus = corpus_scores(stats)
    compared = None
    if control is not None:
        theirs = statistics(control, references, scorers)
        wrong = resampled(theirs, resamples, seed, together)
        wrong_corpus = corpus_scores(theirs)
        pairs = [pair for mine, other in zip(answers, control, strict=True) for pair in zip(mine, other, strict=True)]
        compared = Control(
            kind=control_kind,
            answers=tuple(control),
            studies=study_scores(theirs),
            corpus=wrong_corpus,
            drop={name: corpus[name] - wrong_corpus[name] for name in corpus},
            intervals={name: interval(samples[name] - wrong[name]) for name in corpus},
            unchanged_share=sum(mine == other for mine, other in pairs) / len(pairs),
        )
    return Scores(
        statistics=stats,
        volumes=len({study.volume or i for i, study in enumerate(studies)}),
        units=int(together.max()) + 1,
        per_study=study_scores(stats),
        corpus=corpus,
        intervals={name: interval(samples[name]) for name in corpus},
        commonest=commonest,
        answers=counts.total(),
        distinct=len(counts),
        always_commonest=corpus_scores(always),
        control=compared,
    )


def to_json(scores: Scores) -> dict[str, Any]:
    """The content of scores.json, as far as texts go. What can't be had is absent."""
    content: dict[str, Any] = {
        "corpus": scores.corpus,
        "intervals": {name: list(pair) for name, pair in scores.intervals.items()},
        "collapse": {
            "distinct": scores.distinct,
            "commonest_share": scores.commonest[0][1] / scores.answers,
            "always_commonest": scores.always_commonest,
        },
        "studies": scores.volumes,
    }
    if scores.units < scores.volumes:
        content["patients"] = scores.units
    if scores.volumes < len(scores.per_study):
        content["records"] = len(scores.per_study)
    if scores.control is not None:
        kind = {"kind": scores.control.kind} if scores.control.kind else {}
        content["control"] = kind | {
            "drop": scores.control.drop,
            "intervals": {name: list(pair) for name, pair in scores.control.intervals.items()},
            "unchanged_share": scores.control.unchanged_share,
        }
    return content


def write_json(path: Path, scores: Scores, more: Mapping[str, Any] | None = None) -> None:
    """`more`: further keys."""
    path.write_text(json.dumps(to_json(scores) | dict(more or {}), indent=2) + "\n", encoding="utf-8")


def write_csv(path: Path, studies: list[Study], scores: Scores, more: Mapping[str, Sequence[Any]] | None = None) -> None:
    """One row a study; several questions of one study stand below each other in a cell. `more`: further columns."""
    names = list(scores.corpus)
    control, more = scores.control, dict(more or {})
    head = ["id", "image", "questions", *names, *([f"control_{name}" for name in names] if control else [])]
    head += ["unchanged"] if control else []
    head += [*more, "answer", "reference", *(["control_answer"] if control else [])]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for i, study in enumerate(studies):
            row: list[Any] = [study.id, study.image, len(study.questions)]
            row += [f"{scores.per_study[i][name]:.6f}" for name in names]
            if control:
                row += [f"{control.studies[i][name]:.6f}" for name in names]
                row.append(int(control.answers[i] == study.answers))
            row += [_cell(column[i]) for column in more.values()]
            row += ["\n".join(study.answers), "\n".join(study.references)]
            row += ["\n".join(control.answers[i])] if control else []
            writer.writerow(row)


def _cell(value: Any) -> Any:
    """Fractions with six digits; what is not there is empty."""
    if not isinstance(value, float):
        return value
    return "" if np.isnan(value) else f"{value:.6f}"
