"""Scores of parts: by region of the body, by type of question, and those that not every study has (a judge's, multiple choice).

Every figure comes with its resamples over the same draws of the units (jaxmed.evaluate.scores), so that intervals of means
over regions, and of differences between two runs, are those of paired draws.

Axis letters: S studies, R resamples, Z bins of confidence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.data.regions import REGIONS
from jaxmed.evaluate import scores, vqa
from jaxmed.evaluate.judging import Judged
from jaxmed.evaluate.studies import Study

GREEN, ACCURACY, CALIBRATION = "green", "accuracy", "calibration_error"


@dataclass(frozen=True)
class Figure:
    value: float
    samples: np.ndarray
    """[R]"""
    studies: int
    """Over how many"""

    @property
    def interval(self) -> tuple[float, float]:
        return scores.interval(self.samples)


Figures = dict[str, Figure]


@dataclass(frozen=True)
class Grouped:
    """Figures of the groups, and their means, in which every group counts the same (in a resample: every group that it has)."""

    groups: dict[str, Figures]
    mean: Figures
    sizes: dict[str, int]


@dataclass(frozen=True)
class Measured:
    """What was measured of every study."""

    stats: scores.Statistics
    values: dict[str, np.ndarray]
    """[S] float64, NaN for studies that have none"""
    distances: np.ndarray
    """[S, Z]: confidence less right or wrong, in the answer's bin; no bins where there are no probabilities"""


@dataclass(frozen=True)
class Parts:
    """All of one file of answers beside the corpus' text scores."""

    closed: vqa.Closed | None
    judged: tuple[Judged, ...]
    measured: Measured
    figures: Figures
    """Over all studies; text scores too"""
    regions: Grouped | None
    types: Grouped | None


def measure(
    stats: scores.Statistics, closed: vqa.Closed | None, judged: Sequence[Judged], studies: Sequence[Study]
) -> Measured:
    """Values by name, as files and pages call them."""
    values = {found.measure: found.values for found in judged}
    distances = np.zeros((len(studies), 0))
    if closed is not None:
        letters = [letter for letter, study in zip(closed.letters, studies, strict=True) if study.options and letter]
        commonest = max(sorted(set(letters)), key=letters.count, default="")
        always = [float(s.letter == commonest) if s.options else np.nan for s in studies]
        values |= {ACCURACY: closed.correct, "unparsable_share": closed.unparsable}
        values |= {"always_commonest": np.array(always), "chance": closed.chance}
        if np.isfinite(closed.likely).any():
            values |= {"likelihood_accuracy": closed.likely, "brier": closed.squared}
            distances = _distances(closed)
    return Measured(stats, values, distances)


def _distances(closed: vqa.Closed) -> np.ndarray:
    there = np.isfinite(closed.confidence)
    places = np.minimum((np.where(there, closed.confidence, 0) * vqa.BINS).astype(int), vqa.BINS - 1)
    one_hot = np.eye(vqa.BINS)[places] * there[:, None]
    return one_hot * np.where(there, closed.confidence - closed.likely, 0)[:, None]


def _weighted(measured: Measured, weights: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of the studies `rows` [S] that count so often: [R, S] -> [R] each; NaN where none of a resample has any."""
    w = weights[:, rows]
    stats = measured.stats
    found = scores.weighted(scores.Statistics(stats.bleu[rows], stats.means[rows], stats.names), w)
    empty = w.sum(-1) == 0
    found = {name: np.where(empty, np.nan, value) for name, value in found.items()}
    for name, column in measured.values.items():
        there = np.isfinite(column[rows])
        count = w @ there
        found[name] = np.where(count, w @ np.where(there, column[rows], 0), np.nan) / np.maximum(count, 1)
    if measured.distances.shape[1]:
        likely = np.isfinite(measured.values["likelihood_accuracy"][rows])
        found[CALIBRATION] = np.abs(w @ measured.distances[rows]).sum(-1) / np.maximum(w @ likely, 1)
    return found


def _figures(measured: Measured, rows: np.ndarray, units: np.ndarray, resamples: int, seed: int) -> Figures:
    ones = np.ones((1, len(units)), int)
    values = {name: float(value[0]) for name, value in _weighted(measured, ones, rows).items()}
    pieces = [_weighted(measured, w, rows) for w in scores.weights(units, resamples, seed)]
    samples = {name: np.concatenate([piece[name] for piece in pieces]) for name in values}
    counts = {name: int(np.isfinite(column[rows]).sum()) for name, column in measured.values.items()}
    return {
        name: Figure(value, samples[name], counts.get(name, int(rows.sum())))
        for name, value in values.items()
        if np.isfinite(value) and counts.get(name, 1)
    }


def _grouped(measured: Measured, names: Sequence[str], units: np.ndarray, resamples: int, seed: int) -> Grouped | None:
    """Regions from head to foot, other groups in the order in which they come; studies without a name are in none."""
    known = [name for name in dict.fromkeys((*REGIONS, *names)) if name and name in names]
    if not known:
        return None
    rows = {name: np.array([name == other for other in names]) for name in known}
    groups = {name: _figures(measured, rows[name], units, resamples, seed) for name in known}
    shared = [name for name in groups[known[0]] if all(name in group for group in groups.values())]
    mean = {
        name: Figure(
            float(np.mean([group[name].value for group in groups.values()])),
            _mean_of_those_there(np.stack([group[name].samples for group in groups.values()])),
            sum(group[name].studies for group in groups.values()),
        )
        for name in shared
    }
    return Grouped(groups, mean, {name: int(found.sum()) for name, found in rows.items()})


def _mean_of_those_there(samples: np.ndarray) -> np.ndarray:
    """[groups, R] -> [R]. A resample lacks a group of few studies now and then; of many such groups it always lacks some."""
    there = np.isfinite(samples)
    return np.where(there.any(0), np.where(there, samples, 0).sum(0) / np.maximum(there.sum(0), 1), np.nan)


def parts(
    studies: Sequence[Study],
    stats: scores.Statistics,
    judged: Sequence[Judged] = (),
    rule: str = "",
    resamples: int = scores.RESAMPLES,
    seed: int = 0,
) -> Parts:
    """`rule`: how multiple choice is judged (jaxmed.evaluate.vqa)."""
    closed = vqa.closed(studies, rule)
    measured = measure(stats, closed, judged, studies)
    together = scores.units(studies)
    every = np.ones(len(studies), bool)
    return Parts(
        closed,
        tuple(judged),
        measured,
        _figures(measured, every, together, resamples, seed),
        _grouped(measured, [study.region for study in studies], together, resamples, seed),
        _grouped(measured, [study.question_type for study in studies], together, resamples, seed),
    )


@dataclass(frozen=True)
class Control:
    """Multiple choice with the wrong images."""

    accuracy: float
    drop: float
    interval: tuple[float, float]
    """Of the drop"""


def control_of(
    studies: Sequence[Study], found: Parts, answers: Sequence[tuple[str, ...]], resamples: int, seed: int
) -> Control | None:
    """None where nothing is multiple choice. Same draws as `parts`, so that the drop is paired."""
    if found.closed is None:
        return None
    wrong = vqa.closed(studies, found.closed.rule, answers)
    measured = Measured(found.measured.stats, {ACCURACY: wrong.correct}, np.zeros((len(studies), 0)))
    other = _figures(measured, np.ones(len(studies), bool), scores.units(studies), resamples, seed)[ACCURACY]
    own = found.figures[ACCURACY]
    return Control(other.value, own.value - other.value, scores.interval(own.samples - other.samples))


def figures_json(figures: Mapping[str, Figure]) -> dict[str, Any]:
    values = {name: figure.value for name, figure in figures.items()}
    intervals = {name: list(figure.interval) for name, figure in figures.items() if np.isfinite(figure.samples).any()}
    return {"scores": values, "intervals": intervals}


def _grouped_json(found: Grouped) -> dict[str, Any]:
    groups = {name: {"records": found.sizes[name]} | figures_json(figures) for name, figures in found.groups.items()}
    return {"groups": groups, "mean": figures_json(found.mean)}


def to_json(found: Parts, control: Control | None = None) -> dict[str, Any]:
    """Further keys of scores.json; what is not there is absent."""
    content: dict[str, Any] = {}
    if found.regions:
        content["regions"] = _grouped_json(found.regions)
    if found.types:
        content["question_types"] = _grouped_json(found.types)
    if found.closed is not None:
        names = [name for name in (*found.measured.values, CALIBRATION) if name not in {j.measure for j in found.judged}]
        own = {name: found.figures[name] for name in names if name in found.figures}
        content["closed"] = {"questions": own[ACCURACY].studies, "rule": found.closed.rule or "letter"} | figures_json(own)
        if CALIBRATION in own:
            content["closed"]["reliability"] = [vars(b) for b in reliability(found.closed)]
        if control is not None:
            drop = {"drop": control.drop, "interval": list(control.interval)}
            content["closed"]["control"] = {"accuracy": control.accuracy} | drop
    for one in found.judged:
        content[one.measure] = dict(one.facts)
        if one.measure in found.figures:
            figure = found.figures[one.measure]
            content[one.measure] |= {"score": figure.value, "interval": list(figure.interval)}
        if one.counts:
            content[one.measure]["errors"] = errors(one)
    return content


def errors(judged: Judged) -> dict[str, dict[str, float]]:
    """GREEN's errors of each class, and matched findings, in the mean over the answers that were judged."""
    counts = [one for row in judged.counts for one in row]
    if not counts:
        return {}
    kinds = {name: np.mean([getattr(one, name) for one in counts], axis=0) for name in ("significant", "insignificant")}
    found = {name: dict(zip("abcdef", map(float, means), strict=True)) for name, means in kinds.items()}
    return found | {"matched": {"all": float(np.mean([one.matched for one in counts]))}}


def reliability(closed: vqa.Closed) -> list[vqa.Bin]:
    there = np.isfinite(closed.confidence)
    return vqa.bins(closed.confidence[there], closed.likely[there])


def columns(found: Parts, studies: Sequence[Study]) -> dict[str, Sequence[Any]]:
    """Further columns of scores.csv."""
    content: dict[str, Sequence[Any]] = {}
    if found.regions:
        content["region"] = [study.region for study in studies]
    if found.types:
        content["question_type"] = [study.question_type for study in studies]
    for one in found.judged:
        version = one.facts.get("version", "")
        content[f"{one.measure}_{version}" if version else one.measure] = [float(value) for value in one.values]
    if found.closed is not None:
        content["letter"] = [study.letter for study in studies]
        content["named"] = found.closed.letters
        content["correct"] = [float(value) for value in found.closed.correct]
        if CALIBRATION in found.figures:
            content["likeliest"] = [study.likelihoods[-1].prediction if study.likelihoods else "" for study in studies]
            content["confidence"] = [float(value) for value in found.closed.confidence]
    return content
