"""Runs on the same studies against each other: differences, how sure they are, and who wins how often.

All runs are resampled by the same draws of the studies (jaxmed.evaluate.scores), so that a difference's interval is that of
paired differences. p is two-sided: twice the share of resamples on the smaller side of zero, counting the ties on both sides
and one draw more, so that it is never 0. Each run is compared with the first.

Axis letters: S studies, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.errors import UserError
from jaxmed.evaluate import parts as parting
from jaxmed.evaluate.parts import Figures, Parts
from jaxmed.evaluate.scores import Scores, interval
from jaxmed.evaluate.studies import Study

TIE = 1e-9
LOWER_IS_BETTER = frozenset({"unparsable_share", "brier", "calibration_error"})
NOT_COMPARED = frozenset({"chance", "always_commonest"})


@dataclass(frozen=True)
class Run:
    """One file of answers, scored."""

    name: str
    path: str
    studies: list[Study]
    scores: Scores
    parts: Parts


@dataclass(frozen=True)
class Difference:
    """Of one score between a run and the first."""

    value: float
    interval: tuple[float, float]
    p: float
    wins: int
    """Studies where the run's own value is better than the first's; 0 of all three where it is none of single studies"""
    losses: int
    ties: int

    def json(self) -> dict[str, Any]:
        low, high = self.interval
        sure = {"interval": [low, high], "p": self.p} if np.isfinite(low) else {}
        counts = {"wins": self.wins, "losses": self.losses, "ties": self.ties}
        return {"difference": self.value} | sure | (counts if sum(counts.values()) else {})


Differences = dict[str, Difference]


@dataclass(frozen=True)
class Comparison:
    run: Run
    all: Differences
    regions: dict[str, Differences]
    """By region, and `mean`"""
    types: dict[str, Differences]


def shared(runs: Sequence[tuple[str, list[Study]]]) -> tuple[list[list[Study]], list[str]]:
    """The studies that every run has, in the first one's order, and notices of those left out."""
    tables = []
    for path, studies in runs:
        table = {(study.id, study.image): study for study in studies}
        if len(table) < len(studies):
            raise UserError(f"{path}: has the same id and volume twice; make the ids unique to compare runs")
        tables.append(table)
    keys = [key for key in tables[0] if all(key in table for table in tables)]
    if not keys:
        raise UserError(f"{runs[0][0]} and the other files share no study; give answers to the same records")
    missing = len({key for table in tables for key in table}) - len(keys)
    notices = [f"{missing} studies are not in all files; the comparison leaves them out"] if missing else []
    for key in keys:
        counts = {len(table[key].answers) for table in tables}
        if len(counts) > 1:
            raise UserError(f"study {key[0]!r} has {sorted(counts)} answers in the files; give answers to the same records")
    return [[table[key] for key in keys] for table in tables], notices


def per_study(run: Run) -> dict[str, np.ndarray]:
    """[S] each, NaN where a study has none: what wins and losses are counted by."""
    texts = {name: np.array([scores[name] for scores in run.scores.per_study]) for name in run.scores.corpus}
    return texts | {name: v for name, v in run.parts.measured.values.items() if name not in NOT_COMPARED}


def compare(first: Run, run: Run) -> Comparison:
    ours, theirs = per_study(run), per_study(first)

    def differences(a: Figures, b: Figures, rows: np.ndarray) -> Differences:
        names = [name for name in a if name in b and name not in NOT_COMPARED]
        return {name: _difference(name, a[name], b[name], ours, theirs, rows) for name in names}

    def grouped(a: parting.Grouped | None, b: parting.Grouped | None, names: Sequence[str]) -> dict[str, Differences]:
        if a is None or b is None:
            return {}
        labels = np.array(names)
        found = {name: differences(a.groups[name], b.groups[name], labels == name) for name in a.groups if name in b.groups}
        return found | {"mean": differences(a.mean, b.mean, labels != "")} if len(found) > 1 else found

    every = np.ones(len(run.studies), bool)
    regions = grouped(run.parts.regions, first.parts.regions, [study.region for study in run.studies])
    types = grouped(run.parts.types, first.parts.types, [study.question_type for study in run.studies])
    return Comparison(run, differences(run.parts.figures, first.parts.figures, every), regions, types)


def _difference(
    name: str,
    a: parting.Figure,
    b: parting.Figure,
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    rows: np.ndarray,
) -> Difference:
    samples = a.samples - b.samples
    samples = samples[np.isfinite(samples)]
    sides = [int((samples <= 0).sum()), int((samples >= 0).sum())]
    p = min(1.0, 2 * (1 + min(sides)) / (1 + len(samples)))
    better = np.zeros(0)
    if name in ours and name in theirs:
        better = (ours[name] - theirs[name])[rows] * (-1 if name in LOWER_IS_BETTER else 1)
        better = better[np.isfinite(better)]
    wins, losses = int((better > TIE).sum()), int((better < -TIE).sum())
    return Difference(a.value - b.value, interval(samples), p, wins, losses, len(better) - wins - losses)


def to_json(runs: Sequence[Run], found: Sequence[Comparison], resamples: int) -> dict[str, Any]:
    """The content of comparison.json."""

    def of(differences: Differences) -> dict[str, Any]:
        return {name: one.json() for name, one in differences.items()}

    def compared(one: Comparison) -> dict[str, Any]:
        content: dict[str, Any] = {"run": one.run.name, "with": runs[0].name, "differences": of(one.all)}
        for key, groups in (("regions", one.regions), ("question_types", one.types)):
            if groups:
                content[key] = {name: of(differences) for name, differences in groups.items()}
        return content

    scored = runs[0].scores
    patients = {"patients": scored.units} if scored.units < scored.volumes else {}
    return {
        "runs": [
            {"name": run.name, "answers": run.path} | parting.figures_json(run.parts.figures) | parting.to_json(run.parts)
            for run in runs
        ],
        "comparisons": [compared(one) for one in found],
        "studies": scored.volumes,
        **patients,
        "resamples": resamples,
    }


def most_different(runs: Sequence[Run], name: str) -> np.ndarray:
    """[S]: the studies by how far the runs are apart in one score, the farthest first; without the score, last."""
    values = np.stack([per_study(run)[name] for run in runs])
    there = np.isfinite(values).all(0)
    spread = np.where(there, np.ptp(np.where(np.isfinite(values), values, 0), axis=0), -1)
    return np.argsort(-spread, kind="stable")
