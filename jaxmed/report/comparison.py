"""The page that compares runs: differences with their intervals, wins and losses, and the studies where they differ most."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.evaluate.compare import LOWER_IS_BETTER, Comparison, Difference, Differences, Run, most_different, per_study
from jaxmed.evaluate.parts import ACCURACY
from jaxmed.evaluate.scores import FEW
from jaxmed.report import evaluation_studies, page
from jaxmed.report.difference import Run as Piece
from jaxmed.report.difference import differences
from jaxmed.report.evaluation_parts import LABELS, Verdict, choices, tags
from jaxmed.report.evaluation_studies import WINDOW, PageOptions

_HEADLINES = ("green", ACCURACY, "likelihood_accuracy", "percentage", "rouge_l", "bleu_4")
"""Scores that speak for a run, the foremost first"""
_OF_GROUPS = ("green", "percentage", "accuracy", "likelihood_accuracy", "bleu_4", "rouge_l", "meteor_exact")


def headlines(runs: Sequence[Run]) -> list[str]:
    """The scores by which the page orders its studies; by the first of them it judges."""
    return [name for name in _HEADLINES if all(name in run.parts.figures for run in runs)]


def shown(first: Run, one: Comparison) -> list[str]:
    """Scores of a comparison, those that speak for a run first; those of texts where not all records are multiple choice."""
    beside = [name for name in one.all if name not in first.scores.corpus]
    closed = ACCURACY in one.all and first.parts.figures[ACCURACY].studies == len(first.studies)
    return beside if closed else [*beside, *(name for name in one.all if name in first.scores.corpus)]


def verdicts(runs: Sequence[Run], found: Sequence[Comparison]) -> list[Verdict]:
    """A plain sentence a comparison."""
    name, units = headlines(runs)[0], runs[0].scores.units
    return [_verdict(runs[0].name, one.run.name, one.all[name], LABELS[name], units) for one in found]


def _verdict(first: str, run: str, one: Difference, label: str, units: int) -> Verdict:
    low, high = one.interval
    few = units < FEW
    clear = (low > 0 or high < 0) and not few
    text = (
        f"{label} differs by {page.signed(one.value)}, 95% interval {page.signed(low)} to {page.signed(high)}, "
        f"p {p_value(one.p)}; of the records {run} is better in {one.wins:,}, worse in {one.losses:,}, even in {one.ties:,}. "
    )
    unclear = "That few studies decide nothing." if few else "The difference is not clear of zero."
    text += f"On the whole {run if one.value > 0 else first} is better." if clear else unclear
    return Verdict("good" if clear else "warn", f"{run} against {first}.", text)


def p_value(p: float) -> str:
    return "< 0.01" if p < 0.01 else f"{p:.2f}"


def _end(found: Sequence[Comparison]) -> float:
    """Where the axis of differences ends on both sides."""
    sides = [abs(side) for one in found for difference in one.all.values() for side in difference.interval]
    reach = max((side for side in sides if np.isfinite(side)), default=0.0)
    return max(float(np.ceil(reach * 20 - 1e-9) / 20), 0.05)


def _row(name: str, one: Difference, end: float) -> dict[str, Any]:
    low, high = one.interval
    place = [50 + 50 * np.clip(side / end, -1, 1) for side in (low, high, one.value)]
    total = max(one.wins + one.losses + one.ties, 1)
    return {
        "name": LABELS[name],
        "value": one.value,
        "low": low,
        "high": high,
        "p": p_value(one.p),
        "from": place[0],
        "span": place[1] - place[0],
        "at": place[2],
        "sure": low > 0 or high < 0,
        "better": (one.value > 0) != (name in LOWER_IS_BETTER),
        "lower": name in LOWER_IS_BETTER,
        "counts": (one.wins, one.ties, one.losses) if one.wins + one.ties + one.losses else None,
        "shares": [100 * count / total for count in (one.wins, one.ties, one.losses)],
    }


def _card(first: Run, one: Comparison, end: float) -> dict[str, Any]:
    """Every score of one run beside the first's."""
    rows = []
    for name in shown(first, one):
        values = {"first": first.parts.figures[name].value, "own": one.run.parts.figures[name].value}
        rows.append(_row(name, one.all[name], end) | values)
    ticks = [(50 + 50 * share, page.signed(share * end)) for share in (-0.5, 0.5)] + [(50, "0")]
    groups = [("Region", one.regions), ("Type of question", one.types)]
    tables = [_groups(title, found, shown(first, one), end) for title, found in groups if found]
    return {"run": one.run.name, "first": first.name, "rows": rows, "ticks": ticks, "tables": tables}


def _groups(title: str, found: dict[str, Differences], scores: Sequence[str], end: float) -> dict[str, Any]:
    there = [name for name in _OF_GROUPS if any(name in group for group in found.values())]
    names = [name for name in there if name in scores]
    rows = [
        ("mean" if group == "mean" else group, [_row(n, one[n], end) if n in one else None for n in names])
        for group, one in found.items()
    ]
    return {"title": title, "columns": [LABELS[name] for name in names], "rows": rows}


@dataclass(frozen=True)
class _Answer:
    """One run's answer to one question."""

    run: str
    pieces: list[Piece]
    same: bool
    """As the first run's, word for word"""
    chips: list[tuple[str, float]]
    correct: bool | None
    choices: list[dict[str, Any]]


def _study(
    runs: Sequence[Run], tables: Sequence[dict[str, np.ndarray]], i: int, names: Sequence[str], views: list[Any]
) -> dict[str, Any]:
    """The i-th study: each question with its reference and every run's answer. `tables`: single studies' scores by run."""
    study, turns = runs[0].studies[i], []
    last = len(study.answers) - 1
    for turn, (question, reference) in enumerate(zip(study.questions, study.references, strict=True)):
        answers = []
        for run, table in zip(runs, tables, strict=True):
            text, own, closed = run.studies[i].answers[turn], run.studies[i], run.parts.closed
            here = closed if closed is not None and own.options and turn == last else None
            chips = [(LABELS[n], float(table[n][i])) for n in names if n != ACCURACY and np.isfinite(table[n][i])]
            answers.append(
                _Answer(
                    run.name,
                    differences(text, reference)[0],
                    run is not runs[0] and text == study.answers[turn],
                    chips if turn == last and here is None else [],
                    bool(here.correct[i]) if here else None,
                    choices(own, here.letters[i]) if here else [],
                )
            )
        turns.append({"question": question, "reference": reference, "answers": answers})
    return {"id": study.id, "image": study.image, "tags": tags(study), "turns": turns, "views": views}


def write_page(
    path: str | Path,
    runs: Sequence[Run],
    found: Sequence[Comparison],
    facts: list[tuple[str, str]],
    notices: list[str],
    options: PageOptions,
    resamples: int,
) -> None:
    """Writes the page, the studies that differ most first."""
    names = headlines(runs)
    order = most_different(runs, names[0])[: options.limits.studies]
    own = []
    if len(order) < len(runs[0].studies):
        own.append(
            f"The page shows the {len(order)} of {len(runs[0].studies)} studies that differ most; comparison.csv has all."
        )
    views, more = evaluation_studies.pictures([runs[0].studies[i] for i in order], options)
    tables = [per_study(run) for run in runs]
    spreads = {name: np.ptp(np.stack([table[name] for table in tables]), axis=0) for name in names}
    studies = []
    for k, i in enumerate(order):
        keys = {name: float(spread[i]) for name, spread in spreads.items() if np.isfinite(spread[i])}
        studies.append(_study(runs, tables, int(i), names, views.get(k, [])) | {"orders": keys, "order": int(i)})
    end = _end(found)
    page.write(
        path,
        "comparison.jinja",
        title=f"{runs[0].name} against {', '.join(run.name for run in runs[1:])}",
        subtitle="The same studies, answered by several runs: what differs, how surely, and where.",
        facts=facts,
        notices=[*notices, *own, *more],
        verdicts=verdicts(runs, found),
        cards=[_card(runs[0], one, end) for one in found],
        orders=[(name, LABELS[name]) for name in names],
        studies=studies,
        resamples=resamples,
        window=WINDOW,
    )
