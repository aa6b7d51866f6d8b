"""Every study of a page of scores: its texts side by side, its scores, its slices.

A page of thousands of studies would be slow to open: beyond `PageLimits.studies` an even selection is shown, and slices stand
with the first `PageLimits.slices` of them; notices say so.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.data.metadata import Metadata
from jaxmed.data.volumes import Override, read_volume
from jaxmed.errors import UserError
from jaxmed.evaluate.parts import Parts
from jaxmed.evaluate.scores import Scores
from jaxmed.evaluate.studies import Study
from jaxmed.report import slices
from jaxmed.report.difference import Run, differences
from jaxmed.report.evaluation_parts import LABELS, choices, tags

WINDOW = (-1000.0, 400.0)
"""Hounsfield units from black to white: lung and soft tissue in one picture"""


@dataclass(frozen=True)
class PageLimits:
    """How much the page shows; scores.csv has everything."""

    studies: int = 500
    """Studies on the page at most, evenly chosen"""
    slices: int = 40
    """Studies shown with slices at most (about 0.1 MB each)"""

    def __post_init__(self):
        if self.studies < 0 or self.slices < 0:
            raise UserError("--page.studies and --page.slices must not be negative")


@dataclass(frozen=True)
class PageOptions:
    volumes: str = ""
    metadata: str = ""
    hu: Override = "auto"
    limits: PageLimits = PageLimits()


@dataclass(frozen=True)
class _Turn:
    question: str
    answer: list[Run]
    reference: list[Run]
    control: str
    unchanged: bool


@dataclass(frozen=True)
class Shown:
    """What stands beside each study."""

    scores: Scores
    parts: Parts | None
    chips: list[str]
    """Names of scores"""

    def score(self, name: str, i: int) -> float:
        """NaN where the study has none."""
        if name in self.scores.per_study[i]:
            return self.scores.per_study[i][name]
        return float(self.parts.measured.values[name][i])


def choose(count: int, limit: int) -> tuple[np.ndarray, list[str]]:
    """An even selection of `count` studies, and a notice where it is not all."""
    chosen = np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(int))
    if len(chosen) == count:
        return chosen, []
    return chosen, [f"The page shows {len(chosen)} of {count} studies, evenly chosen; scores.csv has them all."]


def pictures(studies: list[Study], options: PageOptions) -> tuple[dict[int, list[slices.Picture]], list[str]]:
    """Slices of the first studies whose volume is at hand, by place in `studies`, and notices."""
    if not options.volumes or not options.limits.slices:
        return {}, []
    folder = slices.VolumeFolder(options.volumes)
    metadata = Metadata(options.metadata) if options.metadata else None
    found: dict[int, list[slices.Picture]] = {}
    failed: list[str] = []
    for i, study in enumerate(studies):
        path = folder.find(study.image) if study.image and len(found) < options.limits.slices else ""
        if not path:
            continue
        try:
            volume = read_volume(path, metadata.of(path) if metadata else None, options.hu)
            scale = (volume.reading.slope, volume.reading.intercept)
            found[i] = slices.pictures(volume.stored, slices.orientation(path), volume.spacing, WINDOW, scale)
        except UserError as error:
            failed.append(str(error))
    notices = []
    if failed:
        notices.append(f"Slices of {len(failed)} studies cannot be shown; the first: {failed[0]}")
    if not found and not failed:
        notices.append(f"None of the volumes is in {options.volumes}; the page has no slices.")
    elif len(found) == options.limits.slices and len(studies) > len(found):
        notices.append(f"Slices stand with the first {len(found)} studies on this page, to keep it small.")
    return found, notices


def orders(shown: Shown) -> list[tuple[str, str]]:
    """Further orders that the reader may choose: (attribute with its sign, what it is called)."""
    found = []
    for one in shown.parts.judged if shown.parts else ():
        found += [
            (one.measure, f"lowest {LABELS[one.measure]} first"),
            (f"-{one.measure}", f"highest {LABELS[one.measure]} first"),
        ]
    return found + ([("correct", "wrong letters first")] if shown.parts and shown.parts.closed else [])


def values(study: Study, i: int, shown: Shown, views: list[slices.Picture]) -> dict[str, Any]:
    """What the template shows of the i-th study."""
    scores, parts = shown.scores, shown.parts
    control = scores.control.answers[i] if scores.control else ("",) * len(study.answers)
    turns = []
    for question, answer, reference, other in zip(study.questions, study.answers, study.references, control, strict=True):
        ours, theirs = differences(answer, reference)
        turns.append(_Turn(question, ours, theirs, other, bool(scores.control) and other == answer))
    per_study = scores.per_study[i]
    chips = [(LABELS[name], shown.score(name, i)) for name in shown.chips]
    order = {"sort": per_study["rouge_l"]}
    order["drop"] = per_study["rouge_l"] - scores.control.studies[i]["rouge_l"] if scores.control else 0.0
    order |= {one.measure: shown.score(one.measure, i) for one in (parts.judged if parts else ())}
    closed = parts.closed if parts and study.options else None
    if closed:
        order["correct"] = float(closed.correct[i])
    return {
        "id": study.id,
        "image": study.image,
        "tags": tags(study),
        "turns": turns,
        "views": views,
        "order": i,
        "orders": {name: value for name, value in order.items() if np.isfinite(value)},
        "scores": [] if closed else [(name, value) for name, value in chips if np.isfinite(value)],
        "choices": choices(study, closed.letters[i]) if closed else [],
        "correct": bool(closed.correct[i]) if closed else None,
        "drop": order["drop"],
    }
