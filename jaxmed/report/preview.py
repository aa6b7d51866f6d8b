"""The page of `jaxmed preview`: chosen training samples as the model gets them, tokens, labels and volumes, and what
training will make of the whole file.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.config import Experiment, VisualConfig
from jaxmed.data.conversation import Example, encode_training, text_options
from jaxmed.data.encode import same_preprocessing
from jaxmed.data.inputs import FOLDERS, TOKEN_KINDS, input_folder, is_placed
from jaxmed.data.metadata import Metadata
from jaxmed.data.records import Record, RecordError
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.data.volumes import Override
from jaxmed.errors import Problem, UserError
from jaxmed.report import input_panel, page, token_panel, view_input, volume_panel
from jaxmed.report.slices import VolumeFolder
from jaxmed.report.survey import Row, Survey
from jaxmed.report.survey_pairs import PairSurvey

LISTED = 30
"""Problems that the page lists by name"""


@dataclass(frozen=True)
class Volumes:
    folder: VolumeFolder
    metadata: Metadata | None
    hu: Override


def choose(found: Survey | PairSurvey, wanted: tuple[int, ...], count: int, seed: int) -> list[Any]:
    """The rows that the page shows: those asked for by their index in the file, else `count` of them by lot."""
    by_index: dict[int, list[Any]] = {}
    for row in found.rows:  # an entry of the file may be several records, of its regions and questions
        by_index.setdefault(row.record.row, []).append(row)
    broken = [row for row in wanted if row not in by_index]
    if broken:
        total = max([len(found.rows) + len(found.unreadable), *(row + 1 for row in by_index)])
        reason = "cannot be read as a record" if 0 <= broken[0] < total else f"does not exist, the file has {total} records"
        raise UserError(f"--rows: record {broken[0]} {reason}; give rows from 0 to {total - 1}")
    if wanted:
        return [row for index in wanted for row in by_index[index]]
    picks = np.random.default_rng(seed).permutation(len(found.rows))[:count]
    return [found.rows[i] for i in sorted(picks)]


def _volume(image: str, volumes: Volumes, experiment: Experiment) -> dict[str, Any]:
    path = volumes.folder.find(image)
    if not path:
        return {"panels": [], "fault": "", "missing": f"{image} is not in {volumes.folder.folder}."}
    try:
        shown, fault = volume_panel.panels(path, volumes.metadata, volumes.hu, experiment.encode)
    except UserError as error:
        return {"panels": [], "fault": str(error), "missing": ""}
    return {"panels": shown, "fault": fault, "missing": ""}


def _parts(row: Row) -> list[dict[str, Any]]:
    """Shares of the row's bucket in percent: image, context, supervised, padding."""
    whole = max(row.bucket or row.length, 1)
    image = min(sum(row.places[: row.text.places]), row.length)
    counts = {"image": image, "context": max(row.length - image - row.supervised, 0), "supervised": row.supervised}
    counts["padding"] = max(row.bucket - row.length, 0)
    return [{"kind": kind, "count": n, "share": 100 * n / whole} for kind, n in counts.items() if n]


def _about(record: Record) -> list[tuple[str, str]]:
    """What a record says of itself beside its texts."""
    options = "; ".join(f"{letter}{' (right)' * (letter == record.answer)}: {text}" for letter, text in record.options.items())
    drawn = f"one of {len(record.prompts)} prompts, drawn in training" if record.prompts[1:] else ""
    about = (("Set", record.dataset), ("Patient", record.patient), ("Region", record.region))
    about += (("Question type", record.question_type), ("Options", options), ("Question", drawn))
    return [(name, value) for name, value in about if value]


def _example(row: Row, experiment: Experiment, tokenizer: Tokenizer) -> Example:
    try:
        return encode_training(row.record, tokenizer, experiment.data.template, text_options(experiment))
    except RecordError:  # why is said as the reason for which it is voided
        return Example(np.zeros(0, np.int32), np.zeros(0, np.int32), row.text.voided)


def _as_read_by_tower(experiment: Experiment) -> Experiment:
    """Where files hold a tower's tokens, what they were made of, if the volumes are at hand."""
    if experiment.model.tower.kind == "none" or experiment.has_tower or not experiment.data.volumes:
        return experiment
    return replace(experiment, visual=replace(experiment.visual, kind=experiment.model.tower.reads))


def _sample(row: Row, experiment: Experiment, tokenizer: Tokenizer, volumes: Volumes | None) -> dict[str, Any]:
    data = experiment.data
    example = _example(row, experiment, tokenizer)
    images = list(zip(row.record.images, row.places, strict=True))
    other = next((f.encoder for f in row.files if not same_preprocessing(f.encoder, experiment.encode)), "")
    return {
        "row": row.record.row,
        "id": row.record.id,
        "images": ", ".join(row.record.images),
        "about": _about(row.record),
        "bucket": row.bucket,
        "length": row.length,
        "supervised": row.supervised,
        "faults": row.faults,
        "voided": row.text.voided,
        "runs": token_panel.runs(example, tokenizer, images, min(data.buckets[-1], data.max_length or data.buckets[-1])),
        "parts": _parts(row),
        "inputs": input_panel.panels(row.record.images, _as_read_by_tower(experiment)) if row.files else [],
        "assumed": bool(row.record.images) and not row.files,
        "volumes": [_volume(image, volumes, experiment) for image in row.record.images] if volumes else [],
        "other_encoder": other if volumes else "",
    }


def _buckets(found: Survey, experiment: Experiment) -> list[dict[str, Any]]:
    """One line a bucket: how many samples go there, and how full they make it."""
    usable = [row for row in found.rows if row.usable]
    counts = Counter(row.bucket for row in usable)
    lines = []
    for bucket in experiment.data.buckets:
        lengths = [row.length for row in usable if row.bucket == bucket]
        full = float(np.mean(lengths)) / bucket if lengths else 0.0
        lines.append({"bucket": bucket, "count": counts[bucket], "share": counts[bucket] / max(len(usable), 1), "full": full})
    return lines


def preparation(visual: VisualConfig) -> str:
    prepare = visual.prepare
    window = f", {view_input.numbers(prepare.window, ' to ')} HU" if prepare.preset == "hu_window" else ""
    changed = "" if prepare.augment == "none" else f"; training changes it at random ({prepare.augment})"
    return f"{prepare.preset}{window}, {view_input.numbers(visual.volume)} voxels{changed}"


def listed(problems: list[Problem]) -> dict[str, Any]:
    return {"count": len(problems), "lines": [str(p) for p in problems[:LISTED]], "more": max(len(problems) - LISTED, 0)}


def write_page(
    path: str | Path,
    experiment: Experiment,
    tokenizer: Tokenizer,
    found: Survey,
    rows: list[Row],
    volumes: Volumes | None,
    values: list[Problem] | None,
    config: str,
) -> None:
    """`values`: what check_values found, None where it was not asked for; `config`: how the config was named."""
    data = experiment.data
    usable = [row for row in found.rows if row.usable]
    facts = [
        ("Config", config),
        ("Records", data.records),
        ("Template", data.template),
        ("Tokenizer", experiment.model.tokenizer or experiment.model.base),
        ("Buckets", ", ".join(f"{bucket:,}" for bucket in data.buckets)),
    ]
    folder, kind = input_folder(data, experiment.visual), experiment.visual.kind
    if kind == "volumes":
        facts.append(("Preparation", preparation(experiment.visual)))
    if folder:
        names = {"embeddings": "Token files", "images": "Images", "volumes": "Volumes"}
        facts.append((names[FOLDERS[kind]], folder))
    if folder and kind in TOKEN_KINDS:
        facts.append(("Encoder", found.encoder or "unsigned"))
    notices = []
    if kind != "none" and not all(is_placed(folder, image) for row in rows for image in row.record.images):
        notices.append(f"Without --data.{FOLDERS[kind]} every image counts as the largest that the config allows.")
    page.write(
        path,
        "preview.jinja",
        title=f"Preview of {Path(data.records).name}",
        subtitle="What the model is given, and what it is trained to say.",
        facts=facts,
        notices=notices,
        samples=[_sample(row, experiment, tokenizer, volumes) for row in rows],
        usable=len(usable),
        total=len(found.rows) + len(found.unreadable),
        supervised=round(float(np.median([row.supervised for row in usable]))) if usable else 0,
        length=round(float(np.median([row.length for row in usable]))) if usable else 0,
        buckets=_buckets(found, experiment),
        refused=listed(found.refused),
        voided=listed(found.voided),
        values=None if values is None else listed(values),
        conversation=data.template,
        hu_range=experiment.encode.hu_range,
    )
