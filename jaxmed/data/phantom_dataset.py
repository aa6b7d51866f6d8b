"""A data set of phantom studies on disk, laid out as a real one.

    OUT/volumes/phantom_00001.nii.gz ...   int16 in Hounsfield units, voxel size and orientation in the header
    OUT/metadata.csv                       CT-RATE's columns (slope 1, intercept 0)
    OUT/SPLIT.json                         LLaVA-style records of each split
    OUT/labels.json                        {id: {finding: side}}
    OUT/dataset.json                       seed and sizes

Study i is a pure function of (seed, i), so that a data set begun is completed by the same call, and may be made larger.
"""

import contextlib
import csv
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np

from jaxmed.data.parallel import over_items
from jaxmed.data.phantom import SHAPE, SPACING, draw, sample_study
from jaxmed.data.phantom_reports import REQUESTS, write_report
from jaxmed.errors import UserError

# Goes up whenever the same (seed, i) draws or says something else.
VERSION = 1
# x runs from right to left, y from front to back, z from feet to head: the way CT-RATE's files mostly lie.
AFFINE = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])


@dataclass(frozen=True)
class PhantomDataset:
    """Where the parts lie."""

    folder: str
    volumes: str
    metadata: str
    labels: str
    records: dict[str, str]
    """split -> JSON file"""


def study_id(index: int) -> str:
    return f"phantom_{index + 1:05d}"


def make_dataset(out: str, splits: Mapping[str, int], seed: int, processes: int = 0) -> PhantomDataset:
    """Draw what is missing and write the records. Splits take the studies in the order given: {"train": 4000, "test": 128}."""
    count = sum(splits.values())
    dataset = PhantomDataset(
        out,
        os.path.join(out, "volumes"),
        os.path.join(out, "metadata.csv"),
        os.path.join(out, "labels.json"),
        {split: os.path.join(out, f"{split}.json") for split in splits},
    )
    os.makedirs(dataset.volumes, exist_ok=True)
    _check_same(os.path.join(out, "dataset.json"), seed, splits)
    present = set(os.listdir(dataset.volumes))
    missing = [i for i in range(count) if f"{study_id(i)}.nii.gz" not in present]
    job = functools.partial(_write_volume, folder=dataset.volumes, seed=seed)
    for _ in over_items(job, missing, processes, "Drawing phantoms", small=True):
        pass
    first = 0
    for split, size in splits.items():
        _write_json(dataset.records[split], [_record(seed, i) for i in range(first, first + size)])
        first += size
    _write_json(dataset.labels, {study_id(i): sample_study(seed, i).findings for i in range(count)})
    _write_metadata(dataset.metadata, count)
    return dataset


def _check_same(path: str, seed: int, splits: Mapping[str, int]) -> None:
    """A folder holds the studies of one seed and one version of the drawing."""
    facts = {"seed": seed, "version": VERSION, "shape": list(SHAPE), "spacing": list(SPACING)}
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove the folder and make the phantoms again") from None
        different = [key for key, value in facts.items() if not isinstance(found, dict) or found.get(key) != value]
        if different:
            raise UserError(f"{path}: phantoms of another {' and '.join(different)} lie here; give another folder or remove it")
    _write_json(path, {**facts, "splits": dict(splits)})


def _write_volume(index: int, folder: str, seed: int) -> None:
    image = nibabel.Nifti1Image(draw(sample_study(seed, index)), AFFINE)
    image.header.set_xyzt_units("mm")
    path = os.path.join(folder, f"{study_id(index)}.nii.gz")
    # nibabel goes by the name's ending; the fast compression level is its default.
    temporary = os.path.join(folder, f".{os.getpid()}.partial.nii.gz")
    try:
        image.to_filename(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); make room or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _record(seed: int, index: int) -> dict[str, Any]:
    rng = np.random.default_rng((seed, index, 2))
    study = sample_study(seed, index)
    request = REQUESTS[rng.integers(len(REQUESTS))]
    return {
        "id": study_id(index),
        "image": f"{study_id(index)}.nii.gz",
        "conversations": [
            {"from": "human", "value": f"<image>\n{request}"},
            {"from": "gpt", "value": write_report(study.findings, rng)},
        ],
    }


def _write_json(path: str, value: Any) -> None:
    temporary = f"{path}.{os.getpid()}.partial"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
    os.replace(temporary, path)


def _write_metadata(path: str, count: int) -> None:
    names = ("VolumeName", "Rows", "Columns", "RescaleIntercept", "RescaleSlope", "NumberofSlices", "XYSpacing", "ZSpacing")
    values = (SHAPE[1], SHAPE[0], 0, 1, SHAPE[2], f"[{SPACING[0]}, {SPACING[1]}]", SPACING[2])
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows((f"{study_id(i)}.nii.gz", *values) for i in range(count))
