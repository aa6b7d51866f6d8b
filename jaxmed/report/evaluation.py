"""The page of `jaxmed evaluate`: scores with their intervals, collapse, the control, and every study beside its reference.

Takes what jaxmed.evaluate computed; reads volumes alone, for the slices.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.evaluate import text
from jaxmed.evaluate.parts import Control as ChoiceControl
from jaxmed.evaluate.parts import Parts
from jaxmed.evaluate.scores import Control, Scores
from jaxmed.evaluate.studies import Study
from jaxmed.report import evaluation_parts, evaluation_studies, page
from jaxmed.report.evaluation_parts import LABELS, Verdict, group_tables
from jaxmed.report.evaluation_studies import WINDOW, PageLimits, PageOptions

__all__ = ["LABELS", "PageLimits", "PageOptions", "Verdict", "group_tables", "verdicts", "write_page"]


@dataclass(frozen=True)
class Beside:
    """What a page shows beside the scores of texts."""

    parts: Parts | None = None
    choice_control: ChoiceControl | None = None
    bertscore: Mapping[str, Any] | None = None
    """Facts of the encoder"""
    resamples: int = 1000


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
    often = "once" if times == 1 else f"{times:,} times"
    text = (
        f"{scores.distinct:,} distinct answers to {scores.answers:,} questions; the commonest was given {often} "
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


def verdicts(
    scores: Scores, name: str = "bleu_4", parts: Parts | None = None, choice_control: ChoiceControl | None = None
) -> list[Verdict]:
    """Plain sentences on multiple choice, collapse and the control; of texts by one of the scores."""
    lines = evaluation_parts.choice_verdicts(parts, choice_control) if parts else []
    if lines:
        return lines
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


def write_page(
    path: str | Path,
    studies: list[Study],
    scores: Scores,
    title: str,
    facts: list[tuple[str, str]],
    notices: list[str],
    options: PageOptions,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
    beside: Beside = Beside(),
) -> list[str]:
    """Writes the page; returns the notices that its own limits gave rise to."""
    chosen, own = evaluation_studies.choose(len(studies), options.limits.studies)
    views, more = evaluation_studies.pictures([studies[i] for i in chosen], options)
    own += more
    parts = beside.parts
    shown = evaluation_studies.Shown(scores, parts, evaluation_parts.chips_of(parts, list(scores.corpus)))
    rows, ticks = _bars(scores)
    words = [_median_words(s.answers for s in studies), _median_words(s.references for s in studies)]
    page.write(
        path,
        "evaluation.jinja",
        title=title,
        subtitle="Generated text against the references, as scores and study by study.",
        facts=facts,
        notices=notices + own,
        verdicts=verdicts(scores, parts=parts, choice_control=beside.choice_control),
        rows=rows,
        ticks=ticks,
        control=scores.control,
        histogram=_histogram(np.array([s["rouge_l"] for s in scores.per_study])),
        words=words,
        commonest=scores.commonest,
        answers=scores.answers,
        tables=_tables(extra or {}),
        groups=evaluation_parts.group_tables(parts) if parts else [],
        choice=evaluation_parts.choice(parts, beside.choice_control) if parts else {},
        judges=evaluation_parts.judge_cards(parts) if parts else [],
        bertscore=beside.bertscore,
        resamples=beside.resamples,
        orders=evaluation_studies.orders(shown),
        meteor=text.METEOR in scores.corpus,
        studies=[evaluation_studies.values(studies[i], int(i), shown, views.get(k, [])) for k, i in enumerate(chosen)],
        total=len(studies),
        window=WINDOW,
    )
    return own
