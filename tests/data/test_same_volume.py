"""One volume as NIfTI in two orientations and as a DICOM series: the same array through view, encode and generate."""

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from scans import save_dicom, save_nifti, turned

from jaxmed.cli.main import run
from jaxmed.data.embeddings import npz_name

CT = Path(__file__).with_name("example_ct.nii.gz")
LAMED = str(Path(__file__).parents[1] / "golden" / "vit3d" / "lamed_merged")
SAME = ("study/ct.nii.gz", "study/series", "turned.nii")
OTHER = "other.nii.gz"
WINDOW = [f"--set={setting}" for setting in ("visual.prepare.preset=hu_window", "visual.prepare.window=-160,240")]
PICTURES = 1000
"""Rows of a sheet without its head"""
MODEL = ["--set", "vision.heads=3", *WINDOW]

pytestmark = pytest.mark.usefixtures("compiled_quickly", "on_one_device")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """The real CT as it is, turned about, and as overlapping slices with names in no order; another volume beside them."""
    folder = tmp_path_factory.mktemp("volumes")
    (folder / "study").mkdir()
    shutil.copy(CT, folder / SAME[0])
    image = nibabel.load(CT)
    hu, affine = image.dataobj.get_unscaled(), image.affine
    bits = {"BitsStored": 16, "HighBit": 15}
    save_dicom(folder / SAME[1], hu[::-1, ::-1], encode=lambda hu, k: (hu + 2048, 1.0, -2048.0), sides=(3.0, 3.0, 3.0), **bits)
    save_nifti(folder / SAME[2], *turned(hu, affine, "IPR"))
    save_nifti(folder / OTHER, hu[::-1], affine)
    return folder


def test_view(volumes, tmp_path, recwarn):
    paths = [str(volumes / name) for name in (*SAME, OTHER)]
    assert run(["view", *paths, "--config", LAMED, *MODEL, "--out", str(tmp_path)]) == 0
    pictures = [
        np.asarray(Image.open(tmp_path / name))[-PICTURES:] for name in ("ct.png", "series.png", "turned.png", "other.png")
    ]
    for picture in pictures[1:3]:
        np.testing.assert_array_equal(picture, pictures[0])
    assert pictures[0].std() > 40 and (pictures[3] != pictures[0]).mean() > 0.1
    assert [str(w.message) for w in recwarn if "overlap" in str(w.message)] == [
        f"{paths[1]}: slices of 6 mm every 3 mm overlap; their positions count"
    ]


def test_encode(volumes, tmp_path):
    assert run(["encode", LAMED, "--volumes", str(volumes), "--out", str(tmp_path), *MODEL]) == 0
    tokens = [np.load(tmp_path / npz_name(name))["arr"] for name in (*SAME, OTHER)]
    for same in tokens[1:3]:
        np.testing.assert_allclose(same, tokens[0], atol=1e-6)
    assert np.abs(tokens[3] - tokens[0]).max() > 0.1


def test_generate(volumes, tmp_path):
    """By the likelihoods of options, which differ where the volumes do."""
    options = {"A": "liver", "B": "left kidney", "C": "spleen"}
    qa = [{"question": "Which organ is on the left?", "type": "organ", "options": options, "answer": "C"}]
    entries = [{"image": name, "labels": {"qa": qa}} for name in (*SAME, OTHER)]
    (tmp_path / "r.json").write_text(json.dumps({"validation": entries}))
    out = tmp_path / "x_vqa.json"
    files = ["--records", f"{tmp_path / 'r.json'}:validation:vqa", "--volumes", str(volumes), "--out", str(out)]
    assert run(["generate", LAMED, *files, *MODEL, "--dtype", "float32", "--answers", "likelihood"]) == 0
    studies = {study["image"]: study["conversations_out"][0]["probabilities"] for study in json.loads(out.read_text())}
    shares = [list(studies[name].values()) for name in (*SAME, OTHER)]
    for same in shares[1:3]:
        np.testing.assert_allclose(same, shares[0], atol=1e-6)
    assert np.abs(np.subtract(shares[3], shares[0])).max() > 1e-3
