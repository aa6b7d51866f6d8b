"""The page of `jaxmed preview` for pairs of a volume and its report: chosen pairs as the two encoders get them, and what
contrastive training will make of the whole file: lengths, what is cut, whose words repeat.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import Experiment
from jaxmed.data.inputs import input_folder
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import Problem
from jaxmed.report import input_panel, page
from jaxmed.report.preview import listed, preparation
from jaxmed.report.survey_pairs import PairRow, PairSurvey, Repeated, unknown_id

BARS = 40
"""Of the histogram of lengths"""
GROUPS = 12
"""Repeated texts that are shown"""
SHOWN = 240
"""Characters of a repeated text"""
NAMED = 6
"""Records of a repeated text that are named"""


def write_page(
    path: str | Path,
    experiment: Experiment,
    tokenizer: Tokenizer,
    found: PairSurvey,
    rows: list[PairRow],
    values: list[Problem] | None,
    config: str,
) -> None:
    """`values`: what check_values found, None where it was not asked for; `config`: how the config was named."""
    data, contrast = experiment.data, experiment.contrastive
    folder, usable = input_folder(data, experiment.visual), found.usable
    longer = {"sentences": "their first sentence and others, drawn anew in each epoch", "head": "their beginning"}
    told = f"{contrast.group or data.batch:,} of a step" + (f", in groups of a batch of {data.batch:,}" * bool(contrast.group))
    facts = [
        ("Config", config),
        ("Records", data.records),
        ("Tokenizer", experiment.model.tokenizer),
        ("Texts", f"{found.limit:,} tokens at most; longer reports keep {longer[contrast.truncate]}"),
        ("Pairs told from each other", told),
        ("Preparation", preparation(experiment.visual)),
    ]
    if folder:
        facts.append(("Volumes", folder))
    notices = [] if folder else ["Without --data.volumes no volume is shown or looked at."]
    lengths = [row.length for row in usable]
    page.write(
        path,
        "preview_pairs.jinja",
        title=f"Preview of {Path(data.records).name}",
        subtitle="Volumes and reports as the two encoders get them, to be told from all others of a step.",
        facts=facts,
        notices=notices,
        pairs=[_pair(row, experiment, tokenizer, found) for row in rows],
        usable=len(usable),
        total=len(found.rows) + len(found.unreadable),
        long=len(found.long),
        unknown=sum(row.unknown > 0 for row in usable),
        median=round(float(np.median(lengths))) if usable else 0,
        longest=max(lengths, default=0),
        limit=found.limit,
        histogram=histogram(lengths, found.limit),
        texts=_groups(found.repeated_texts),
        volumes=_groups(found.repeated_volumes),
        told_apart=found.told_apart,
        twins=found.false_negatives,
        refused=listed(found.refused),
        values=None if values is None else listed(values),
    )


def _groups(groups: Sequence[Repeated]) -> dict[str, Any]:
    """Of repeated texts or volumes: how many, in how many pairs, and the most frequent."""
    shown = []
    for group in groups[:GROUPS]:
        rows = ", ".join(str(row.record.row) for row in group.rows[:NAMED])
        more = f" and {len(group.rows) - NAMED:,} more" if len(group.rows) > NAMED else ""
        text = " ".join(group.what.split())
        text = text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()} …"
        shown.append({"count": len(group.rows), "what": text, "rows": rows + more})
    return {
        "count": len(groups),
        "pairs": sum(len(group.rows) for group in groups),
        "shown": shown,
        "more": max(len(groups) - GROUPS, 0),
    }


def histogram(lengths: Sequence[int], limit: int) -> dict[str, Any]:
    """Bars of reports by length, in percent of the width and of the highest bar. One ends at the limit, which is at `mark`."""
    beyond = max([*lengths, limit]) - limit
    width = next(n for n in range(1, limit + beyond + 1) if -(-limit // n) - (-beyond // n) <= BARS)
    start = limit + (-limit // width) * width
    counts = np.zeros(BARS, int)
    np.add.at(counts, (np.asarray(lengths, int) - start - 1) // width, 1)

    def place(length: int) -> float:
        return 100 * (length - start) / (width * BARS)

    bars = [
        {
            "from": start + n * width + 1,
            "to": start + (n + 1) * width,
            "count": int(count),
            "x": 100 * n / BARS,
            "h": 100 * int(count) / max(int(counts.max()), 1),
            "long": start + n * width >= limit,
        }
        for n, count in enumerate(counts)
    ]
    ticks = [(place(length), f"{length:,}") for length in range(0, width * BARS, max(width * BARS // 4, 1))]
    return {"bars": bars, "width": 100 / BARS, "mark": place(limit), "ticks": ticks}


def _pair(row: PairRow, experiment: Experiment, tokenizer: Tokenizer, found: PairSurvey) -> dict[str, Any]:
    same = next((group for group in found.repeated_texts if group.what == row.text and row.usable), None)
    kept = min(row.given_length, found.limit)
    return {
        "row": row.record.row,
        "id": row.record.id,
        "image": ", ".join(row.record.images),
        "about": [(name, value) for name, value in (("Set", row.record.dataset), ("Patient", row.record.patient)) if value],
        "faults": row.faults,
        "length": row.length,
        "kept": kept,
        "share": 100 * kept / found.limit,
        "twins": [other.record.row for other in same.rows if other is not row] if same else [],
        "inputs": input_panel.panels(row.record.images, experiment) if row.placed else [],
        "runs": runs(row, tokenizer, found.limit),
        "left": left_out(row),
    }


def left_out(row: PairRow) -> str:
    """Sentences that the first epoch's draw leaves out."""
    if row.given == row.text:
        return ""
    chosen = set(row.given.split("."))
    return ".".join(sentence for sentence in row.text.split(".") if sentence not in chosen and sentence.strip()).strip()


def runs(row: PairRow, tokenizer: Tokenizer, limit: int) -> list[dict[str, Any]]:
    """The tokens of what is given, as runs of one kind: special, text, unknown, cut."""
    if not row.text.strip():
        return []
    whole, kept = tokenizer.encode(row.given, special=False), tokenizer.encode(row.given, max_length=limit)
    before, after, unknown = len(tokenizer.prefix), len(tokenizer.suffix), unknown_id(tokenizer)
    inside = len(kept) - before - after
    kinds = ["unknown" if token == unknown else "text" for token in whole[:inside]] + ["cut"] * (len(whole) - inside)
    ids = [*tokenizer.prefix, *whole, *tokenizer.suffix]
    kinds = ["special"] * before + kinds + ["special"] * after
    # the end token follows what is kept; what is cut has no place
    places = [*range(before + inside), *[-1] * (len(whole) - inside), *range(before + inside, len(kept))]
    found: list[dict[str, Any]] = []
    for token, kind, place, text in zip(ids, kinds, places, spelled(ids, tokenizer), strict=True):
        if not found or found[-1]["kind"] != kind:
            found.append({"kind": kind, "pieces": []})
        found[-1]["pieces"].append({"text": text, "tip": f"id {token}, " + (f"place {place:,}" if place >= 0 else "cut off")})
    return found


def spelled(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Each token's text as it stands behind the one before it: pieces of a word join, words do not."""
    texts = [tokenizer.piece(token) for token in ids[:1]]
    for before, token in itertools.pairwise(ids):
        start, both = tokenizer.decode([before]), tokenizer.decode([before, token])
        texts.append(both[len(start) :] if both.startswith(start) and "\ufffd" not in both else tokenizer.piece(token))
    return texts
