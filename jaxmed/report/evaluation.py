"""The page of `jaxmed evaluate`: scores with their intervals, collapse, the control, and every study beside its reference.

Takes what jaxmed.evaluate.scores computed; reads volumes alone, for the slices. A page of thousands of studies would be slow to
open: beyond `shown` studies an even selection is shown, and slices stand with the first `pictured` of them; notices say so.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.data.metadata import Metadata
from jaxmed.data.volumes import Override, read_volume
from jaxmed.errors import UserError
from jaxmed.evaluate import text
from jaxmed.evaluate.scores import Control, Scores
from jaxmed.evaluate.studies import Study
from jaxmed.report import page, slices
from jaxmed.report.difference import Run, differences

LABELS = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
}
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
class Verdict:
    """A plain sentence on what the figures show."""

    kind: str
    """`good` or `warn`"""
    head: str
    text: str


@dataclass(frozen=True)
class _Turn:
    question: str
    answer: list[Run]
    reference: list[Run]
    control: str
    unchanged: bool


def _bars(scores: Scores) -> tuple[list[dict[str, Any]], list[tuple[float, str]]]:
    """Rows of the table with places in percent of the axis, and the axis' ticks; the axis ends at the next 0.1."""
    control = scores.control
    tops = [high for _, high in scores.intervals.values()] + list(scores.always_commonest.values())
    tops += list(control.corpus.values()) if control else []
    end = min(max(np.ceil(max(tops) * 10 + 1e-9) / 10, 0.1), 1.0)
    rows = []
    for name, value in scores.corpus.items():
        low, high = scores.intervals[name]
        row: dict[str, Any] = {"name": LABELS[name], "value": value, "low": low, "high": high}
        row |= {"at": 100 * value / end, "from": 100 * low / end, "span": 100 * (high - low) / end}
        row |= {"always": scores.always_commonest[name], "always_at": 100 * scores.always_commonest[name] / end}
        if control:
            row |= {"control": control.corpus[name], "control_at": 100 * control.corpus[name] / end}
            row |= {"drop": control.drop[name], "drop_low": control.intervals[name][0], "drop_high": control.intervals[name][1]}
        rows.append(row)
    step = 0.2 if end > 0.7 else 0.1 if end > 0.35 else 0.05
    return rows, [(100 * at / end, f"{at:.3g}") for at in np.arange(0, end + 1e-9, step)]


def _histogram(values: np.ndarray, bins: int = 25) -> dict[str, Any]:
    """Bars of a plot that is 100 wide and 100 high."""
    counts, edges = np.histogram(values, bins, (0, 1))
    tallest = max(int(counts.max()), 1)
    bars = [
        {"x": 100 * a, "h": 100 * n / tallest, "n": int(n), "a": a, "b": a + 1 / bins}
        for a, n in zip(edges, counts, strict=False)
    ]
    return {"bars": bars, "median": float(np.median(values)), "width": 100 / bins, "tallest": tallest}


def _median_words(texts: Iterable[tuple[str, ...]]) -> int:
    return round(float(np.median([len(text.split()) for study in texts for text in study])))


def _variety(scores: Scores, name: str) -> Verdict:
    times, always, low = scores.commonest[0][1], scores.always_commonest[name], scores.intervals[name][0]
    beaten, collapsed = low > always, times > scores.answers / 2
    text = (
        f"{scores.distinct:,} distinct answers to {scores.answers:,} questions; the commonest was given {times:,} times "
        f"({page.share(times / scores.answers)}). Always giving it would score {LABELS[name]} {always:.3f}, "
        f"which these answers {'beat' if beaten else 'do not clearly beat'}."
        f"{' Most answers are one and the same text.' if collapsed else ''}"
    )
    return Verdict("good" if beaten and not collapsed else "warn", "Variety.", text)


def _looking(scores: Scores, control: Control, name: str) -> Verdict:
    low, high = control.intervals[name]
    text = (
        f"With the wrong images ({control.kind or 'kind not recorded'}) {LABELS[name]} goes from {scores.corpus[name]:.3f} to "
        f"{control.corpus[name]:.3f}: a drop of {control.drop[name]:.3f}, 95% interval {low:.3f} to {high:.3f}. "
        f"{page.share(control.unchanged_share)} of the answers did not change. "
    )
    if low > 0:
        return Verdict("good", "Does it look?", text + "The answers depend on the image.")
    doubt = "The drop is not clear of zero: nothing here shows that the model looks at the image."
    return Verdict("warn", "Does it look?", text + doubt)


def verdicts(scores: Scores, name: str = "bleu_4") -> list[Verdict]:
    """Plain sentences on collapse and on the control, by one of the scores."""
    lines = [_variety(scores, name)] if scores.answers > 1 else []
    return lines + ([_looking(scores, scores.control, name)] if scores.control else [])


def _tables(extra: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Named figures {title: {row: number or text, or {column: number or text}}} as tables."""

    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)

    tables = []
    for title, rows in extra.items():
        columns = list(dict.fromkeys(c for row in rows.values() if isinstance(row, Mapping) for c in row))
        first = (columns or [""])[0]  # a lone figure stands in the first column
        values = {name: row if isinstance(row, Mapping) else {first: row} for name, row in rows.items()}
        cells = {name: [cell(row.get(column)) for column in columns or [""]] for name, row in values.items()}
        tables.append({"title": title, "columns": columns, "rows": cells})
    return tables


def _pictures(studies: list[Study], options: PageOptions) -> tuple[dict[int, list[slices.Picture]], list[str]]:
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


def _study(study: Study, i: int, scores: Scores, views: list[slices.Picture], chips: list[str]) -> dict[str, Any]:
    control = scores.control.answers[i] if scores.control else ("",) * len(study.answers)
    turns = []
    for question, answer, reference, other in zip(study.questions, study.answers, study.references, control, strict=True):
        ours, theirs = differences(answer, reference)
        turns.append(_Turn(question, ours, theirs, other, bool(scores.control) and other == answer))
    per_study = scores.per_study[i]
    return {
        "id": study.id,
        "image": study.image,
        "turns": turns,
        "views": views,
        "order": i,
        "scores": [(LABELS[name], per_study[name]) for name in chips],
        "sort": per_study["rouge_l"],
        "drop": per_study["rouge_l"] - scores.control.studies[i]["rouge_l"] if scores.control else 0.0,
    }


def write_page(
    path: str | Path,
    studies: list[Study],
    scores: Scores,
    title: str,
    facts: list[tuple[str, str]],
    notices: list[str],
    options: PageOptions,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """Writes the page; returns the notices that its own limits gave rise to."""
    chosen = np.unique(np.linspace(0, len(studies) - 1, min(options.limits.studies, len(studies))).round().astype(int))
    own = []
    if len(chosen) < len(studies):
        own.append(f"The page shows {len(chosen)} of {len(studies)} studies, evenly chosen; scores.csv has them all.")
    views, more = _pictures([studies[i] for i in chosen], options)
    own += more
    chips = ["bleu_4", "rouge_l"] + (["meteor"] if "meteor" in scores.corpus else [])
    rows, ticks = _bars(scores)
    words = [_median_words(s.answers for s in studies), _median_words(s.references for s in studies)]
    page.write(
        path,
        "evaluation.jinja",
        title=title,
        subtitle="Generated text against the references, as scores and study by study.",
        facts=facts,
        notices=notices + own,
        verdicts=verdicts(scores),
        rows=rows,
        ticks=ticks,
        control=scores.control,
        histogram=_histogram(np.array([s["rouge_l"] for s in scores.per_study])),
        words=words,
        commonest=scores.commonest,
        answers=scores.answers,
        tables=_tables(extra or {}),
        meteor=text.METEOR in scores.corpus,
        studies=[_study(studies[i], int(i), scores, views.get(k, []), chips) for k, i in enumerate(chosen)],
        total=len(studies),
        window=WINDOW,
    )
    return own
