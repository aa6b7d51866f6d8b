"""Preview of what a tower gets: pictures, places of images that lie on the text's own positions, the cut, the command."""

import base64
import dataclasses
import io
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxmed.cli import preview as command
from jaxmed.config import DataConfig, Experiment, ModelConfig, PixelConfig, VisualConfig
from jaxmed.data.conversation import Example
from jaxmed.data.tokenizer import IGNORE, Tokenizer
from jaxmed.models.presets import TINY
from jaxmed.report import input_panel, token_panel

BASE = Path(__file__).parents[1] / "golden" / "btb3d" / "base"
PIXELS = VisualConfig(kind="pixels", tokens=12, grid=(1, 3, 4), features=5, pixels=PixelConfig("pad", 24, 20))
CONFIG = """
import dataclasses
from jaxmed._configs import btb3d
from jaxmed.config import DataConfig, PixelConfig, VisualConfig

def get_config():
    return dataclasses.replace(
        btb3d.get_config(),
        visual=VisualConfig(kind="pixels", tokens=12, grid=(1, 3, 4), features=5, pixels=PixelConfig("pad", 24, 20)),
        data=DataConfig(buckets=(160,), supervised=64, max_length=120),
    )
"""
LAMED = BASE.parents[1] / "vit3d" / "lamed_merged"
VOLUMES = """
import dataclasses
from jaxmed._configs import btb3d
from jaxmed.config import DataConfig, PrepareConfig, ProjectorConfig, TowerConfig, VisualConfig

def get_config():
    base = btb3d.get_config()
    tower = TowerConfig("vit3d", (8, 24, 24), (2, 6, 6), 1, 32, 2, 4, 41, class_position=False, select_layer=-1)
    model = dataclasses.replace(base.model, tower=tower, projector=ProjectorConfig("spp"), added_tokens=())
    prepare = PrepareConfig("hu_window", window=(-150.0, 250.0), augment="intensity")
    visual = VisualConfig("volumes", tokens=64, features=32, grid=(4, 4, 4), volume=(8, 24, 24), prepare=prepare)
    return dataclasses.replace(base, model=model, visual=visual,
                               data=DataConfig(buckets=(160,), supervised=64, template="m3d", max_length=120))
"""


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def panels(folder, visual, name):
    model = ModelConfig(dataclasses.replace(TINY, vocab=432))
    data = DataConfig(images=str(folder), volumes=str(folder), embeddings=str(folder))
    return input_panel.panels([name], Experiment(model, visual=visual, data=data))


def test_pictures(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "p.png")
    (panel,) = panels(tmp_path, PIXELS, "p.png")
    np.testing.assert_array_equal(decoded(panel["uri"]), picture[2:22, 2:22])
    volume = np.random.default_rng(1).integers(0, 255, (90, 72, 11)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "v.nii")
    slices = VisualConfig(kind="slices", tokens=11, grid=(11, 1, 1), slices=11, pixels=PixelConfig(shortest=72, crop=72))
    (panel,) = panels(tmp_path, slices, "v.nii")
    sheet = decoded(panel["uri"])
    assert sheet.shape == (144, 576) and "11 of 11 slices, 11 × 72 × 72" in panel["caption"]
    np.testing.assert_array_equal(sheet[72:, 144:216], volume[9:81, :, 10])
    assert not sheet[72:, 216:].any()
    np.save(tmp_path / "v.npy", np.linspace(-3, 5, 30 * 4 * 6, dtype=np.float32).reshape(30, 4, 6))
    (panel,) = panels(tmp_path, VisualConfig(kind="volumes", tokens=8, grid=(2, 2, 2), volume=(30, 4, 6)), "v.npy")
    names = [(view.name, view.place) for view in panel["views"]]
    assert names[:2] == [("across the depth", "slice 8 of 30"), ("across the depth", "slice 23 of 30")]
    assert names[2:] == [("across the rows", "slice 3 of 4"), ("across the columns", "slice 4 of 6")]
    # the darkest voxel of the volume is black, the brightest white, and a slice has its share of that
    first = decoded(panel["views"][0].uri)
    assert first.shape == (224, 224) and first[0, 0] == round(255 * 7 * 24 / 719) and first[-1, -1] == round(255 * 191 / 719)
    assert dict(panel["facts"])["Window"] == "values −3 to 5 are drawn black to white"
    assert "no such file" in panels(tmp_path, PIXELS, "gone.png")[0]["fault"]
    assert panels(tmp_path, VisualConfig(), "x.npz") == []


def test_an_image_on_positions_of_the_text_is_one_run():
    tokenizer = Tokenizer.from_folder(str(BASE), ("<im_patch>",))
    text = tokenizer.encode("Normal chest.", False)
    ids = np.array([text[0], *[tokenizer.token_id("<im_patch>")] * 5, *text], np.int32)
    labels = np.where(np.arange(len(ids)) > 7, ids, IGNORE)
    found = token_panel.runs(Example(ids, labels, "", image_start=1), tokenizer, [("v.nii.gz", 5)], len(ids) - 1)
    assert [run.kind for run in found] == ["context", "image", "context", "supervised", "cut"]
    assert found[1].pieces[0].text == "image · 5 tokens" and found[2].pieces[0].tip == f"id {text[0]} · place 6"


@pytest.mark.parametrize("check", [False, True])
def test_the_command_on_pixels(tmp_path, capsys, check):
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (90, 80), dtype=np.uint8)).save(tmp_path / "p.jpg")
    whole = (tmp_path / "p.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    turns = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "No effusion. " * 20}]
    records = [{"id": name, "image": f"{name}.jpg", "conversations": turns} for name in ("p", "cut", "gone")]
    (tmp_path / "r.json").write_text(json.dumps(records))
    (tmp_path / "c.py").write_text(CONFIG)
    flags = ["--model.tokenizer", str(BASE), "--data.records", str(tmp_path / "r.json"), "--data.images", str(tmp_path)]
    flags += ["--out", str(tmp_path / "page.html"), "--check-values"][: 3 if check else 2]
    assert command.run([str(tmp_path / "c.py"), *flags]) == check
    said = capsys.readouterr().out
    assert "2 of 3 records can be trained on" in said and "gone.jpg: no such file" in said
    assert ("cut.jpg: the image is cut short" in said) == check
    page = (tmp_path / "page.html").read_text()
    assert "20 × 20 pixels as the tower gets them" in page and "Without --data." not in page and 'class="tok cut"' in page


def test_volumes_with_their_regions(tmp_path, capsys):
    """A case of AMOS-MM is several records, of its regions; what the sheet says of the volume stands beside its planes."""
    hu = np.full((20, 18, 9), -1000, np.int16)
    hu[3:17, 2:15, 1:8] = np.random.default_rng(6).integers(-100, 300, (14, 13, 7))
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([2.0, 2.0, 5.0, 1.0])), tmp_path / "case.nii.gz")
    report = {"findings": {"chest": "", "abdomen": "No ascites.", "pelvis": "Normal bladder."}, "impressions": ""}
    question = {"question": "Which?", "type": "organ", "options": {"A": "lung", "B": "liver"}, "answer": "B"}
    entry = {"image": "./case.nii.gz", "meta": {}, "labels": {"report": report, "qa": [question]}}
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [entry]}))
    (tmp_path / "c.py").write_text(VOLUMES)
    flags = ["--model.tokenizer", str(LAMED), "--data.volumes", str(tmp_path), "--out", str(tmp_path / "page.html")]
    records = f"{tmp_path / 'dataset.json'}:training"
    assert command.run([str(tmp_path / "c.py"), *flags, "--data.records", records, "--rows", "0"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<h3>Record 0</h3>") == 2 and "<dd>abdomen</dd>" in page and "<dd>pelvis</dd>" in page
    assert page.count("coronal, slice 13 of 24") == 2 and "image · 8 tokens" in page
    assert "hu_window, −150 to 250 HU, 8 × 24 × 24 voxels; training changes it at random (intensity)" in page
    assert "−150 to 250 HU become 0 to 1" in page and "the header&#39;s scaling alone gives air" in page
    assert command.run([str(tmp_path / "c.py"), *flags, "--data.records", f"{records}:vqa"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<dd>organ</dd>" in page and "<dd>A: lung; B (right): liver</dd>" in page
