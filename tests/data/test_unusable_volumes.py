"""Volumes that cannot be used, or of which something is said: one line that names the file and what to do."""

import gzip
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from scans import lps_affine, phantom, save_nifti, save_slices

from jaxmed.config import PrepareConfig, VisualConfig
from jaxmed.data.input_files import check_files
from jaxmed.data.inputs import check_header, read_input
from jaxmed.data.prepare import prepare
from jaxmed.data.volume_sources import find_volumes
from jaxmed.errors import Notice, UserError


def visual(volume=(5, 6, 7), **fields):
    return VisualConfig(kind="volumes", volume=volume, prepare=PrepareConfig(**fields))


def broken(tmp_path, kind):
    hu, affine = phantom(), lps_affine()
    path = tmp_path / "a.nii.gz"
    if kind == "nan":
        values = hu.astype(np.float32)
        values[3, 4, 5] = np.nan
        return save_nifti(path, values, affine)
    if kind in ("huge", "range"):
        values = hu.astype(np.float64)
        values[3, 4, 5:7] = (1e300, 0) if kind == "huge" else (3e38, -3e38)
        return save_nifti(path, values, affine)
    if kind in ("cut", "bit"):
        whole = Path(save_nifti(tmp_path / "a.nii", hu, affine)).read_bytes()
        if kind == "cut":
            (tmp_path / "a.nii").write_bytes(whole[:-900])
            return str(tmp_path / "a.nii")
        packed = bytearray(gzip.compress(whole, 0))  # as it is, so that a changed bit changes one voxel
        packed[-900] ^= 16
        path.write_bytes(packed)
        return str(path)
    if kind in ("plain", "packed"):
        saved = save_nifti(tmp_path / ("a.nii" if kind == "plain" else "a.nii.gz"), hu, affine)
        other = str(tmp_path / ("b.nii.gz" if kind == "plain" else "b.nii"))
        os.rename(saved, other)
        return other
    if kind == "one slice":
        return save_nifti(path, hu[:, :, :1], affine)
    if kind == "two axes":
        return save_nifti(path, hu[:, :, 2], affine)
    if kind == "singular":
        return save_nifti(path, hu, np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    if kind == "air":
        return save_nifti(path, np.full((5, 6, 7), -1000, np.int16), affine)
    if kind == "folder":
        (tmp_path / "empty").mkdir()
        return str(tmp_path / "empty")
    if kind == "one image":
        return save_slices(tmp_path / "s", [(4, 5)], ["1.png"])
    if kind == "no number":
        return save_slices(tmp_path / "s", [(4, 5)] * 2, ["1.png", "first.png"])
    if kind == "twice":
        return save_slices(tmp_path / "s", [(4, 5)] * 2, ["1.png", "01.png"])
    if kind == "no image":
        folder = save_slices(tmp_path / "s", [(4, 5)] * 2, ["1.png", "2.png"])
        (tmp_path / "s" / "2.png").write_bytes(b"nothing")
        return folder
    if kind == "slice":
        return os.path.join(save_slices(tmp_path / "s", [(4, 5)] * 2, ["1.png", "2.png"]), "1.png")
    (tmp_path / "a.mha").write_text("x")
    return str(tmp_path / "a.mha")


@pytest.mark.parametrize(
    ("kind", "words", "by_head"),
    [
        ("nan", "1 of 1386 voxels are NaN", False),
        ("huge", r"from -1e\+03 to 1e\+300 are no CT", False),
        ("range", r"from -3e\+38 to 3e\+38 are no CT", False),
        ("cut", "is cut short by 900 bytes", True),
        ("bit", "its voxels cannot be read .*CRC", False),
        ("plain", r"is not compressed, as its name says; rename it to end in \.nii$", True),
        ("packed", r"is compressed, which its name does not say; rename it to end in \.nii\.gz", True),
        ("one slice", "a volume of one slice", True),
        ("two axes", "three axes", True),
        ("singular", "singular", True),
        ("air", "nothing but air", False),
        ("folder", "without DICOM, PNG or JPEG slices", True),
        ("one image", "a volume of one slice", True),
        ("no number", "first.png has no whole number", True),
        ("twice", "same number", True),
        ("no image", "2.png: not an image file", True),
        ("slice", "give the folder of the slices", True),
        ("other", "not a volume that is read here", True),
    ],
)
def test_unusable_input_gives_one_line(tmp_path, kind, words, by_head):
    path = broken(tmp_path, kind)
    config = visual(preset="hu_window")
    with pytest.raises(UserError, match=words) as caught:
        read_input(path, config)
    message = str(caught.value)
    assert message.startswith(path) and "\n" not in message
    assert check_header(path, config) == (message if by_head else "")


@pytest.mark.parametrize("preset", ["m3d", "amos_challenge", "m3d_seg", "m3d_refseg"])
def test_air_alone_under_every_preset(tmp_path, preset):
    path = save_nifti(tmp_path / "a.nii", np.full((5, 6, 7), -1024, np.int16), lps_affine())
    with pytest.raises(UserError, match="nothing but air"):
        prepare(path, visual(preset=preset))


def test_settings_that_make_no_sense():
    for fields, words in (
        ({"window": (3.0, 3.0)}, "window"),
        ({"index": -2}, "index"),
        ({"hu": "csv"}, "metadata"),
        ({"preset": "ct"}, "known are m3d, amos"),
    ):
        with pytest.raises(ValueError, match=words):
            PrepareConfig(**fields)
    with pytest.raises(ValueError, match="not square"):
        visual((4, 6, 7), augment="m3d")


def test_what_is_said_of_files_is_said_once(tmp_path):
    path = save_slices(tmp_path / "s", [(4, 5)] * 3 + [(5, 4)], ["1.png", "2.png", "3.png", "4.png"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_input(path, visual())
        read_input(path, visual((3, 4, 5)))
    told = [(warning.category, str(warning.message)) for warning in caught]
    assert told == [(Notice, f"{path}: 1 of 4 slices are not 4 x 5 pixels and left out (4.png)")]


def test_prepared_files_that_nobody_prepared_are_told(tmp_path):
    path, values = str(tmp_path / "v.npy"), np.linspace(-1000, 700, 60, dtype=np.float32).reshape(3, 4, 5)
    for array, what in (
        (values, "values from -1e+03 to 700, where"),
        (np.full((3, 4, 5), 0.25, np.float32), "every value is 0.25"),
    ):
        np.save(path, array)
        with pytest.warns(Notice, match=re.escape(f"{path}: {what}")):
            np.testing.assert_array_equal(read_input(path, visual((3, 4, 5))).values[..., 0], array)


def test_endings_in_capitals(tmp_path):
    want = prepare(save_nifti(tmp_path / "a.nii.gz", phantom(), lps_affine()), visual()).values
    os.rename(tmp_path / "a.nii.gz", tmp_path / "A.NII.GZ")
    (found,) = find_volumes(str(tmp_path))
    np.testing.assert_array_equal(prepare(found, visual()).values, want)


def test_metadata_without_the_volume_is_known_before_a_voxel_is_read(tmp_path):
    path = save_nifti(tmp_path / "scan_1.nii.gz", phantom(), lps_affine())
    table = tmp_path / "m.csv"
    config = visual(preset="hu_window", metadata=str(table))
    assert check_header(path, config) == f"{table}: no such file; check visual.prepare.metadata"
    table.write_text("VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing\nother.nii.gz,1,-1024,1,2\n")
    assert "scan_1.nii.gz: " in check_header(path, config) and "has no row for it" in check_header(path, config)
    records = str(tmp_path / "r.json")
    assert "no row" in check_files([path], config, records)[path].problem
    table.write_text(table.read_text().replace("other", "scan_1"))
    assert check_files([path], config, records)[path].problem == ""
    os.unlink(table)
    assert "no such file" in check_files([path], config, records)[path].problem
