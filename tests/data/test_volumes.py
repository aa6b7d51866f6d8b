"""Preprocessing against arrays of BTB3D's own code and against torch; the Hounsfield rule; files that cannot be used."""

import gzip
import json
import os

import nibabel
import numpy as np
import pytest
import torch

from jaxmed.config import EncodeConfig
from jaxmed.data.metadata import Metadata
from jaxmed.data.volumes import crop_depth, preprocess, read_header, read_volume, resized_length
from jaxmed.errors import UserError

GOLDEN = os.path.join(os.path.dirname(__file__), "..", "golden", "btb3d_encoder")
with open(os.path.join(GOLDEN, "case.json"), encoding="utf-8") as _file:
    CASE = json.load(_file)
CHECKS = {check["name"]: check for check in CASE["checks"]}
CANVASES = {name.removeprefix("16x16x8_"): tuple(run["canvas_xyz"]) for name, run in CASE["runs"].items()}


def golden_volume(name, override="auto"):
    path = os.path.join(GOLDEN, CASE["volumes"][name]["file"])
    return read_volume(path, Metadata(os.path.join(GOLDEN, "metadata.csv")).of(path), override)


def config(canvas, spacing=(0.75, 0.75, 1.5), **kwargs):
    return EncodeConfig(canvas=canvas, spacing=spacing, levels=(1, 0, 0), **kwargs)


def write(path, array, affine=None, slope=None, intercept=0.0):
    image = nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 1.0, 1.0]) if affine is None else affine)
    if slope is not None:
        image.header.set_slope_inter(slope, intercept)
    image.to_filename(path)
    return str(path)


def chest(shape, seed=0):
    """Half air, half tissue, in HU."""
    rng = np.random.default_rng(seed)
    hu = rng.normal(40, 30, shape)
    hu[: shape[0] // 2] = rng.normal(-1000, 20, hu[: shape[0] // 2].shape)
    return np.rint(hu).astype(np.int16)


@pytest.mark.parametrize("name", [n for n in CHECKS if n.startswith("preprocess_c")])
def test_preprocessing_equals_upstream(name):
    check = CHECKS[name]
    canvas, volume = name.removeprefix("preprocess_").removesuffix("_depth_cropped").split("_", 1)
    got = preprocess(golden_volume(volume), config(CANVASES[canvas]))
    got = crop_depth(got)[None] if name.endswith("_depth_cropped") else got
    want = np.load(os.path.join(GOLDEN, check["golden"]))
    got = got[None][(..., *(slice(None, None, n) for n in check.get("stride", ())))]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=check["atol"], rtol=0)


def test_means_along_the_axes_equal_upstream_on_every_canvas():
    check = CHECKS["preprocess_means_reduced"]
    with np.load(os.path.join(GOLDEN, check["golden"])) as archive:
        want = {name: archive[name] for name in archive.files}
    assert len(want) == 5 * 3 * 3
    for canvas, sizes in CANVASES.items():
        for volume in CASE["volumes"]:
            got = preprocess(golden_volume(volume), config(sizes))
            for axis, others in (("z", (1, 2)), ("x", (0, 2)), ("y", (0, 1))):
                mean = got.mean(others, dtype=np.float64)
                np.testing.assert_allclose(mean, want[f"{canvas}_{volume}_{axis}"], atol=check["atol"], rtol=0)


@pytest.mark.parametrize("volume", CASE["volumes"])
def test_resized_lengths_truncate_the_quotient_first(volume):
    facts = CASE["volumes"][volume]
    x, y, z = facts["shape_xyz"]
    xy, spacing_z = facts["csv_spacing"]["xy_used"], facts["csv_spacing"]["z"]
    got = [resized_length(z, spacing_z, 1.5), resized_length(x, xy, 0.75), resized_length(y, xy, 0.75)]
    assert got == facts["resized_zxy"]


@pytest.mark.parametrize(
    ("shape", "spacing", "canvas"),
    [
        ((61, 47, 180), (0.9, 0.7, 2.3), (37, 51, 241)),
        ((23, 31, 12), (2.0, 0.31, 5.1), (64, 7, 19)),
        ((1024, 1024, 3), (0.3, 0.33, 4.0), (384, 401, 9)),
    ],
    ids=["more than 241 slices", "coarse and fine", "matrix of 1024"],
)
def test_preprocessing_equals_torch(tmp_path, shape, spacing, canvas):
    stored = chest(shape, seed=shape[0])
    volume = read_volume(write(tmp_path / "a.nii", stored, np.diag([*spacing, 1.0])))
    assert volume.spacing == spacing
    size = [
        int(n * (s / t)) for n, s, t in zip((shape[2], *shape[:2]), (spacing[2], *spacing[:2]), (1.5, 0.75, 0.75), strict=True)
    ]
    moved = torch.from_numpy(stored.astype(np.float64)).permute(2, 0, 1)[None, None]
    resized = torch.nn.functional.interpolate(moved, size=size, mode="trilinear", align_corners=False)[0, 0].numpy()
    want = np.clip(resized, -1000, 1000) / 1000
    for axis, length in enumerate((canvas[2], *canvas[:2])):
        excess = want.shape[axis] - length
        if excess > 0:
            want = np.take(want, np.arange(excess // 2, excess // 2 + length), axis)
        else:
            pad = [(0, 0)] * 3
            pad[axis] = (-excess // 2, -excess - (-excess // 2))
            want = np.pad(want, pad, constant_values=-1)
    got = preprocess(volume, config(canvas))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def test_numbers_of_no_ct_and_folders_are_refused(tmp_path):
    stored = chest((9, 8, 7), seed=1).astype(np.float64)
    stored[3, 4, 5] = 1e200
    with pytest.raises(UserError, match=r"a\.nii: scaled voxels from .* to 1e\+200 are no CT"):
        read_volume(write(tmp_path / "a.nii", stored))
    with pytest.raises(UserError, match=r"is a folder; this model reads \.nii"):
        read_volume(str(tmp_path))


def test_range_is_scaled_to_minus_one_and_one(tmp_path):
    stored = np.full((4, 4, 4), -400, np.int16)
    stored[0] = -1000
    stored[1] = 900
    volume = read_volume(write(tmp_path / "a.nii", stored))
    got = preprocess(volume, config((4, 4, 4), (1.0, 1.0, 1.0), hu_range=(-900.0, 300.0)))
    assert np.unique(got[:, 0]).tolist() == [-1.0]
    assert np.unique(got[:, 1]).tolist() == [1.0]
    np.testing.assert_allclose(got[:, 2], -1 / 6, rtol=1e-6)


def metadata(tmp_path, rows):
    path = tmp_path / "metadata.csv"
    path.write_text("VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing\n" + "\n".join(rows) + "\n")
    return Metadata(str(path))


def test_rule_takes_the_one_reading_with_air(tmp_path):
    hu = chest((20, 9, 7))
    rows = metadata(tmp_path, ['a.nii.gz,1,-1024,"[0.7, 0.8]",2.5', 'b.nii.gz,1,-8192,"[0.7, 0.8]",2.5'])
    stored = read_volume(write(tmp_path / "a.nii.gz", hu + 1024), rows.of("a.nii.gz"))
    assert stored.reading.name == "csv"
    assert stored.spacing == (0.7, 0.7, 2.5)
    np.testing.assert_array_equal(stored.hounsfield(), hu)
    already = read_volume(write(tmp_path / "b.nii.gz", hu), rows.of("b.nii.gz"))
    assert already.reading.name == "header"
    np.testing.assert_array_equal(already.hounsfield(), hu)


def test_refusal_says_which_reading_is_likely(tmp_path):
    rows = metadata(tmp_path, ['a.nii.gz,1,-1024,"[0.7, 0.8]",2.5'])
    # Rescaled once more, the soft tissue of a file in HU lies where air was: both readings have air.
    path = write(tmp_path / "a.nii.gz", chest((20, 9, 7)))
    with pytest.raises(UserError, match=r"two different readings.*--hu header is likely right"):
        read_volume(path, rows.of(path))
    assert read_volume(path, rows.of(path), "header").reading.intercept == 0


def test_header_scaling_comes_before_the_csv(tmp_path):
    hu = chest((20, 9, 7))
    rows = metadata(tmp_path, ['a.nii,3,-1030,"[1.0, 1.0]",2.5'])
    stored = np.rint(((hu + 1030.0) / 3 - 12.0) / 0.5).astype(np.int16)
    path = write(tmp_path / "a.nii", stored, slope=0.5, intercept=12.0)
    volume = read_volume(path, rows.of(path))
    assert volume.reading.name == "csv"
    np.testing.assert_allclose(volume.hounsfield(), (stored * 0.5 + 12.0) * 3 - 1030)
    np.testing.assert_allclose(volume.hounsfield(), hu, atol=0.76)


def test_readings_that_agree_are_one(tmp_path):
    rows = metadata(tmp_path, ['a.nii,1,0,"[1.0, 1.0]",2.5'])
    path = write(tmp_path / "a.nii", chest((20, 9, 7)))
    assert read_volume(path, rows.of(path)).reading.name == "header"


@pytest.mark.parametrize(("intercept", "words"), [(-3000, "no reading"), (-30, "two different readings")])
def test_none_or_two_readings_with_air_are_refused(tmp_path, intercept, words):
    rows = metadata(tmp_path, [f'a.nii,1,{intercept},"[1.0, 1.0]",2.5'])
    stored = chest((20, 9, 7))
    path = write(tmp_path / "a.nii", stored + 400 if intercept == -3000 else stored)
    with pytest.raises(UserError, match=rf"a\.nii: {words}.*--hu header, csv or none"):
        read_volume(path, rows.of(path))
    assert read_volume(path, rows.of(path), "csv").reading.intercept == intercept


def test_overrides_are_taken_without_air(tmp_path):
    path = write(tmp_path / "a.nii", np.full((4, 5, 6), 3.0), slope=0.5, intercept=2.0)
    assert read_volume(path, None, "header").hounsfield()[0, 0, 0] == 3.5
    assert read_volume(path, None, "none").hounsfield()[0, 0, 0] == 3.0
    with pytest.raises(UserError, match="--metadata"):
        read_volume(path, None, "csv")


def test_share_of_air_counts_at_two_percent(tmp_path):
    stored = np.zeros((100, 10, 1), np.int16)
    stored.reshape(-1)[:19] = -1000
    with pytest.raises(UserError, match=r"header 1\.9%"):
        read_volume(write(tmp_path / "a.nii", stored))
    stored.reshape(-1)[19] = -940
    assert read_volume(write(tmp_path / "a.nii", stored)).reading.air == 0.02
    stored.reshape(-1)[19] = -939
    with pytest.raises(UserError):
        read_volume(write(tmp_path / "a.nii", stored))


def broken(tmp_path, kind):
    path = tmp_path / "a.nii.gz"
    good = chest((8, 9, 10))
    if kind == "missing":
        return str(path)
    if kind == "not nifti":
        path.write_bytes(b"hello, not a volume")
    elif kind == "cut short":
        whole = write(path, np.random.default_rng(0).integers(-1000, 1000, (40, 40, 40)).astype(np.int16))
        path.write_bytes(path.read_bytes()[:20000])
        return whole
    elif kind == "cut inside":
        whole = write(path, good)
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:900]))
        return whole
    elif kind == "nan":
        values = good.astype(np.float32)
        values[1, 2, 3] = np.nan
        write(path, values)
    elif kind == "four axes":
        write(path, np.stack([good, good], -1))
    elif kind == "two axes":
        write(path, good[..., 0])
    elif kind == "colour":
        write(path, np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    elif kind == "singular":
        affine = np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        image = nibabel.Nifti1Image(good, None)
        image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = affine[:3]
        image.header["sform_code"] = 1
        image.header.set_zooms((1, 1, 1))
        path.write_bytes(gzip.compress(image.header.binaryblock + bytes(4) + good.tobytes("F")))
    elif kind == "no spacing":
        image = nibabel.Nifti1Image(good, np.eye(4))
        image.header["pixdim"][3] = 0
        path.write_bytes(gzip.compress(image.header.binaryblock + bytes(4) + good.tobytes("F")))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file"),
        ("not nifti", "not a readable NIfTI"),
        ("cut short", "is cut short or damaged"),
        ("cut inside", "cannot be read"),
        ("nan", "1 of 720 voxels are NaN"),
        ("four axes", "three axes"),
        ("two axes", "three axes"),
        ("colour", "one number a voxel"),
        ("singular", "singular"),
        ("no spacing", "voxel size"),
    ],
)
def test_unusable_file_gives_one_line(tmp_path, kind, words):
    path = broken(tmp_path, kind)
    with pytest.raises(UserError, match=words) as caught:
        read_volume(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_trailing_axis_of_one_is_no_axis(tmp_path):
    path = write(tmp_path / "a.nii", chest((8, 9, 10))[..., None])
    assert read_header(path).shape == (8, 9, 10)
    assert read_volume(path).stored.shape == (8, 9, 10)


def test_too_thin_to_resample(tmp_path):
    volume = read_volume(write(tmp_path / "a.nii", chest((8, 9, 1))))
    with pytest.raises(UserError, match="too thin"):
        preprocess(volume, config((4, 4, 4)))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('b.nii.gz,1,-1024,"[0.7, 0.7]",2', "no row for it"),
        ('a.nii.gz,1,-1024,"[0.7, 0.7]",', "ZSpacing is ''"),
        ('a.nii.gz,1,-1024,"[0.7, 0.7]",nan', "must be finite"),
        ('a.nii.gz,1,-1024,"[]",2', "XYSpacing"),
        ('a.nii.gz,0,-1024,"[0.7, 0.7]",2', "RescaleSlope is 0"),
        ('a.nii.gz,1,-1024,"[0.7, 0.7]",0', "above 0"),
    ],
)
def test_unusable_metadata_row(tmp_path, row, words):
    with pytest.raises(UserError, match=words):
        metadata(tmp_path, [row]).of("sub/a.nii.gz")


def test_metadata_without_a_column(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("VolumeName,RescaleSlope\na.nii.gz,1\n")
    with pytest.raises(UserError, match="no column RescaleIntercept, XYSpacing, ZSpacing"):
        Metadata(str(path))
