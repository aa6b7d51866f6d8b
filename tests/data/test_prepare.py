"""From files to a 3-D tower's input: upstream's own arrays, torch's resize, orientations, presets, forms of files."""

import gzip
import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from scans import SIDES, lps_affine, oblique, phantom, save_nifti, save_slices, turned

import jaxmed
from jaxmed.config import PrepareConfig, VisualConfig
from jaxmed.data.inputs import check_header
from jaxmed.data.nifti import read_stored
from jaxmed.data.prepare import prepare
from jaxmed.data.resample import resize
from jaxmed.errors import UserError

GOLDEN = os.path.join(os.path.dirname(__file__), "..", "golden", "vit3d")
with open(os.path.join(GOLDEN, "case.json"), encoding="utf-8") as _file:
    CHECKS = {c["name"]: c for c in json.load(_file)["checks"] if c["name"].startswith("preprocess_")}
PRESETS = {"preprocess_nifti": "m3d_seg", "preprocess_nifti_refseg": "m3d_refseg"}


def visual(volume=(5, 6, 7), **fields):
    return VisualConfig(kind="volumes", volume=volume, prepare=PrepareConfig(**fields))


def raw_of(name):
    if name in PRESETS:
        return os.path.join(GOLDEN, "raw", "volume_17.nii.gz")
    return os.path.join(GOLDEN, CHECKS[name]["golden"].replace("data/M3D_Cap_npy", "raw").removesuffix(".npy"))


def torch_resized(values, size, align_corners):
    found = torch.nn.functional.interpolate(
        torch.from_numpy(values.copy())[None, None], size=size, mode="trilinear", align_corners=align_corners
    )
    return found[0, 0].numpy()


@pytest.mark.parametrize("name", CHECKS)
def test_equals_upstream(name):
    want = np.load(os.path.join(GOLDEN, CHECKS[name]["golden"]))[0]
    got = prepare(raw_of(name), visual(want.shape, preset=PRESETS.get(name, "hu_window")))
    assert got.values.dtype == np.float32
    np.testing.assert_allclose(got.values[..., 0], want, atol=3e-7, rtol=0)


def test_six_upstream_arrays_are_checked():
    assert len(CHECKS) == 6


def test_equals_upstream_through_a_loaded_model():
    """Folders of slices need no setting; a preset is an override."""
    for preset, folder, heads in (("m3d_seg", "lamed_merged", 3), ("m3d_refseg", "m3d_clip", 5)):
        overrides = {"vision.heads": heads, "visual.prepare.preset": preset}
        model = jaxmed.load(os.path.join(GOLDEN, folder), overrides=overrides)
        for name in CHECKS:
            if PRESETS.get(name, preset) == preset:
                want = np.load(os.path.join(GOLDEN, CHECKS[name]["golden"]))
                np.testing.assert_allclose(model.preprocess(raw_of(name))[..., 0], want[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(13, 5, 9), (3, 20, 1), (1, 8, 17), (32, 97, 63)])
def test_resize_equals_torch(size, align_corners):
    """Of long axes, float32's places are not the exact ones: torch's values are 1e-5 off those."""
    values = np.random.default_rng(4).random((7, 11, 9) if max(size) < 32 else (37, 67, 121), np.float32)
    asked = []
    got = resize(lambda k: asked.append(k) or values[k], values.shape, size, align_corners)
    np.testing.assert_allclose(got, torch_resized(values, size, align_corners), atol=2e-7, rtol=0)
    assert asked == sorted(set(asked))


CODES = ["LPS", "RAS", "LAI", "PLS", "SAR", "ILP"]


@pytest.mark.parametrize("turn", [None, oblique()], ids=["straight", "oblique"])
def test_every_orientation_gives_the_same_array(tmp_path, turn):
    """In the frame that is shown radiologically: rows to the back, columns to the patient's left."""
    hu, affine = phantom(), lps_affine(turn)
    config = visual((9, 11, 14), preset="amos_challenge")
    want = (hu.transpose(2, 1, 0).astype(np.float32) + 1000) / 1700
    for code in CODES:
        stored, own = turned(hu, affine, code)
        found = prepare(save_nifti(tmp_path / f"{code}.nii.gz", stored, own), config)
        np.testing.assert_allclose(found.values[..., 0], want, atol=1e-6, err_msg=code)
        assert found.frame.axes == "SPL" and found.frame.interval == (-1000, 700)
        np.testing.assert_allclose(found.frame.spacing, SIDES[::-1], rtol=1e-5)


def test_axes_as_stored(tmp_path):
    stored, own = turned(phantom(), lps_affine(), "RAS")
    path = save_nifti(tmp_path / "a.nii", stored, own)
    scaled = (stored.astype(np.float32) + 1000) / 1700
    for axes, order, codes in (("zyx", (2, 1, 0), "SAR"), ("zxy", (2, 0, 1), "SRA")):
        moved = scaled.transpose(order)
        found = prepare(path, visual(moved.shape, preset="amos_challenge", axes=axes))
        np.testing.assert_allclose(found.values[..., 0], moved, atol=1e-6)
        assert found.frame.axes == codes


def test_presets_on_scaled_numbers(tmp_path):
    """Stored numbers with a falling scale, so that stored and scaled minimum are different voxels."""
    hu = phantom()
    stored = ((300 - hu.astype(np.int32)) * 2).astype(np.int16)
    path = save_nifti(tmp_path / "a.nii.gz", stored, lps_affine(), -0.5, 300.0)
    planes = hu.transpose(2, 1, 0).astype(np.float32)
    body = np.s_[1:8, 1:9, 2:12]
    size = (6, 10, 5)
    whole = torch_resized((planes + 1000) / 1700, size, True)
    np.testing.assert_allclose(prepare(path, visual(size, preset="amos_challenge")).values[..., 0], whole, atol=1e-6)
    cut = torch_resized(((planes + 1000) / 1700)[body], size, False)
    np.testing.assert_allclose(prepare(path, visual(size)).values[..., 0], cut, atol=1e-6)
    window = (np.clip(planes, -1100, 240) + 1000) / 1240  # the darkest voxel is inside the window: min-max comes after it
    for crop, values in ((True, window[body]), (False, window)):
        found = prepare(path, visual(size, preset="hu_window", window=(-1100.0, 240.0), crop=crop))
        np.testing.assert_allclose(found.values[..., 0], torch_resized(values, size, False), atol=1e-6)
        assert found.frame.interval == (-1000, 240) and "air" in found.frame.reading
    box = prepare(path, visual(size)).frame.box
    assert box == ((1, 8), (1, 9), (2, 12))


def test_the_hounsfield_rule_decides_for_a_window(tmp_path):
    hu = phantom()
    path = save_nifti(tmp_path / "scan_1.nii.gz", (hu + 1024).astype(np.int16), lps_affine())
    table = tmp_path / "m.csv"
    table.write_text("VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing\nscan_1.nii.gz,1,-1024,1,2\n")
    right = prepare(save_nifti(tmp_path / "hu.nii", hu, lps_affine()), visual(preset="hu_window"))
    given = prepare(path, visual(preset="hu_window", metadata=str(table)))
    np.testing.assert_array_equal(given.values, right.values)
    assert "CSV" in given.frame.reading
    with pytest.raises(UserError, match=r"scan_1\.nii\.gz: no reading of its numbers gives air"):
        prepare(path, visual(preset="hu_window"))
    asked = prepare(path, visual(preset="hu_window", hu="none"))
    assert asked.frame.interval == (24, 1000)
    np.testing.assert_allclose(prepare(path, visual()).values, prepare(tmp_path / "hu.nii", visual()).values, atol=1e-6)


def test_padding_outside_the_scan_is_said(tmp_path):
    hu = phantom()
    hu[0] = -3000
    found = prepare(save_nifti(tmp_path / "a.nii", hu, lps_affine()), visual(preset="amos_challenge"))
    assert len(found.notices) == 1 and "7.1% of the voxels are below -1024" in found.notices[0]
    assert prepare(tmp_path / "a.nii", visual(preset="hu_window")).notices == ()


def test_four_axes_need_an_index(tmp_path):
    hu = phantom()
    several = np.stack([hu, -hu, hu // 2], axis=-1)
    path = save_nifti(tmp_path / "four.nii.gz", several, lps_affine())
    with pytest.raises(UserError, match=r"extract one of the 3 first or.*visual\.prepare\.index"):
        prepare(path, visual())
    one = prepare(save_nifti(tmp_path / "one.nii.gz", hu // 2, lps_affine()), visual())
    np.testing.assert_array_equal(prepare(path, visual(index=2)).values, one.values)
    with pytest.raises(UserError, match=r"holds 3 volumes, visual\.prepare\.index is 3"):
        prepare(path, visual(index=3))


def test_one_of_several_volumes_is_read_alone(tmp_path):
    """Plain and packed; of a packed file the checksum stands behind the others."""
    hu = phantom()
    path = save_nifti(tmp_path / "four.nii", np.stack([hu, hu // 2, -hu], axis=-1), lps_affine())
    want = prepare(save_nifti(tmp_path / "one.nii", hu // 2, lps_affine()), visual()).values
    np.testing.assert_array_equal(prepare(path, visual(index=1)).values, want)
    with open(path, "rb") as file, gzip.open(f"{path}.gz", "wb") as packed:
        packed.write(file.read())
    np.testing.assert_array_equal(prepare(f"{path}.gz", visual(index=1)).values, want)
    with open(f"{path}.gz", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"none")
    with pytest.raises(UserError, match=r"its voxels cannot be read .*CRC"):
        prepare(f"{path}.gz", visual(index=0))


def test_a_compressed_file_that_was_copied_in_part_is_known_by_its_head(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", phantom(), lps_affine())
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:-300])
    assert "is cut short or damaged" in check_header(path, visual())
    raw = gzip.decompress(whole)
    Path(path).write_bytes(gzip.compress(raw[:900]) + gzip.compress(raw[900:]))  # the last piece has another length
    assert check_header(path, visual()) == ""
    np.testing.assert_array_equal(nibabel.load(path).dataobj.get_unscaled(), read_stored(path).values)


def test_slices_stand_by_number_whatever_the_ending(tmp_path):
    path = save_slices(tmp_path / "s", [(4, 5)] * 3 + [(5, 4)], ["10.png", "9.PNG", "2.png", "11.png"], "RGB")
    found = prepare(path, visual((3, 4, 5), preset="amos_challenge"))
    want = np.array([38, 29, 20], np.float32)  # 2, 9, 10; all of it above the darkest is cut to two slices
    assert found.frame.preset == "m3d" and found.frame.shape == (3, 4, 5)
    planes = np.broadcast_to(((want - 20) / 18)[:2, None, None], (2, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(found.values[..., 0], torch_resized(planes, (3, 4, 5), False), atol=1e-6)
    assert "11.png" in found.notices[0] and "after 2.png" in found.notices[1]


def test_holes_in_the_numbers_of_slices(tmp_path):
    path = save_slices(tmp_path / "s", [(4, 5)] * 4, ["1.png", "2.png", "4.png", "9.png"])
    (notice,) = prepare(path, visual((3, 4, 5))).notices
    assert notice == "2 hole(s) in the numbers of the slices (the first after 2.png)"


def test_slices_of_16_bits_keep_their_grey_levels(tmp_path):
    """40 of 65,536 levels are none of 256."""
    levels = np.random.default_rng(3).integers(30000, 30040, (3, 4, 5)).astype(np.uint16)
    levels[0, 0, 0], levels[2, 3, 4], levels[0, 1:, 0], levels[2, 0, 4] = 29999, 30040, 30001, 30002
    (tmp_path / "s").mkdir()
    for number, plane in enumerate(levels):
        Image.fromarray(plane).save(tmp_path / "s" / f"{number}.png")
    found = prepare(str(tmp_path / "s"), visual((3, 4, 5)))
    np.testing.assert_allclose(found.values[..., 0], (levels - 29999.0) / 41, atol=1e-6)
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "s" / "1.png")
    with pytest.raises(UserError, match=r"1\.png: 8 bits a pixel, 0\.png has 16; save all alike"):
        prepare(str(tmp_path / "s"), visual())
