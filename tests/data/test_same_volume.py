"""One volume as NIfTI in two orientations and as a DICOM series: the same picture, the same tokens, by their names."""

from pathlib import Path

import jax
import numpy as np
from scans import lps_affine, phantom, save_dicom, save_nifti, turned

from jaxmed.data.embeddings import load_tokens
from jaxmed.data.inputs import input_path
from jaxmed.generate.encode_tower import encode_folder
from jaxmed.generate.tower import Tower, of_encoder
from jaxmed.report import view_input, view_sheet

CLIP = str(Path(__file__).parents[1] / "golden" / "vit3d" / "m3d_clip")


def test_view_and_encode_give_the_same(tmp_path):
    hu = phantom()
    volumes = tmp_path / "v"
    save_dicom(volumes / "study" / "series", hu)
    save_nifti(volumes / "study" / "one.nii.gz", hu, lps_affine())
    save_nifti(volumes / "two.nii", *turned(hu, lps_affine(), "RIA"))
    tower = Tower(of_encoder(CLIP, {"vision.heads": 5, "text.heads": 3}), "float32", devices=jax.devices()[:1])
    summary = encode_folder(str(volumes), str(tmp_path / "t"), tower)
    assert summary.written == 3
    assert set(summary.readings) == {"nifti, m3d, the header's scaling", "dicom, m3d, the header's scaling"}
    names = ("study/series", "study/one.nii.gz", "two.nii")
    visual = tower.visual
    read = type(visual)(kind="embeddings", tokens=visual.tokens, features=visual.features, grid=visual.grid)
    tokens = [load_tokens(input_path(str(tmp_path / "t"), name, read), read)[0] for name in names]
    sheets = [view_sheet.draw(view_input.of_tower(str(volumes / name), visual)[0], None, 2)[-200:] for name in names]
    for other in (1, 2):
        np.testing.assert_allclose(tokens[other], tokens[0], atol=2e-5)
        np.testing.assert_allclose(sheets[other].astype(int), sheets[0].astype(int), atol=1)
    assert tokens[0].std() > 0.1 and sheets[0].std() > 20
