"""Volumes whose values fail when the cache is filled leave the plan, with their share of a mixture."""

import dataclasses
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from jaxmed.cli import common
from jaxmed.cli.validate import resolve
from jaxmed.config import DataConfig, Experiment, PrepareConfig
from jaxmed.errors import BadRecords, UserError
from jaxmed.train.sources import open_data

VIT3D = Path(__file__).parents[1] / "golden" / "vit3d"


def save(path: Path, values: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.diag([1.5, 1.5, 3.0, 1.0])), path)


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """v0 to v4; v1 is air, v3 holds a NaN. Regions by volume, so that their counts tell who is left."""
    folder = tmp_path / "volumes"
    folder.mkdir()
    for number in range(5):
        values = np.random.default_rng(number).integers(-1000, 400, (6, 7, 5)).astype(float)
        values[...] = -1000 if number == 1 else values
        values[2, 3, 1] = np.nan if number == 3 else -1000
        save(folder / f"v{number}.nii", values)
    for name, numbers in (("train", range(4)), ("valid", (1, 4))):
        rows = [
            {
                "image": f"v{n}.nii",
                "labels": {"report": {"findings": dict.fromkeys(("chest", "pelvis")[: 1 + n % 2], "Clear.")}},
            }
            for n in numbers
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return folder


def experiment(volumes: Path, rule: str, train: str = "train") -> Experiment:
    asked = common.load_experiment("vit3d_amos")
    model = dataclasses.replace(asked.model, base=str(VIT3D / "base"), tower_folder=str(VIT3D / "m3d_clip"))
    places = {"records": train, "eval_records": "valid"}
    data: DataConfig = dataclasses.replace(
        asked.data,
        volumes=str(volumes),
        on_bad_record=rule,
        **{k: str(volumes.parent / f"{v}.json") for k, v in places.items()},
    )
    prepare: PrepareConfig = dataclasses.replace(asked.visual.prepare, cache=str(volumes.parent / "cache"))
    visual = dataclasses.replace(asked.visual, prepare=prepare)
    return resolve(dataclasses.replace(asked, model=model, data=data, visual=visual), ())[0]


def test_they_are_told_and_out_of_the_plan(volumes: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    sources = open_data(experiment(volumes, "skip"), str(tmp_path / "run"))
    assert [sample.record.id for sample in sources.train.samples] == ["v0/chest", "v2/chest"]
    assert [sample.record.id for sample in sources.held_out.samples] == ["v4/chest"]
    assert {index for batch in sources.plan.epoch(0) for index in batch.samples} == {0, 1}
    assert sources.train.draw is None or sum(group.count for group in sources.train.draw.groups) == 2
    assert [problem.where.partition("id ")[2] for problem in sources.left_out] == [
        "'v1/chest')",
        "'v1/pelvis')",
        "'v3/chest')",
        "'v3/pelvis')",
        "'v1/chest')",
        "'v1/pelvis')",
    ]
    assert f"{volumes}/v1.nii: nothing but air" in sources.left_out[0].what
    assert "v3.nii: 1 of 210 voxels are NaN" in sources.left_out[2].what
    said = capfd.readouterr().err
    assert "3 prepared" in said and "v1.nii: nothing but air" in said
    again = open_data(experiment(volumes, "skip"), str(tmp_path / "run"))  # as when a run goes on
    assert again.fingerprint == sources.fingerprint


def test_none_left_and_stop(volumes: Path, tmp_path: Path) -> None:
    rows = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps([rows[1], rows[3]]))
    with pytest.raises(UserError, match=r"bad\.json: no volume can be prepared; the first: .*v1\.nii"):
        open_data(experiment(volumes, "skip", "bad"), str(tmp_path / "run"))
    with pytest.raises(BadRecords, match=r"v[13]\.nii"):
        open_data(experiment(volumes, "stop"), str(tmp_path / "run"))
