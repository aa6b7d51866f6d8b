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
    assert "24 of 30 slices" in panel["caption"] and decoded(panel["uri"])[0, 0] == 0 and decoded(panel["uri"])[-1, -1] == 255
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
