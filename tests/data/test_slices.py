"""Slices of NIfTI volumes: which are taken, how numbers become grey, resize and crop, bad files."""

import gzip

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxmed.data.slices import header_problem, load_slices, slice_indices
from jaxmed.errors import UserError


def save(path, array, slope=None, intercept=None, affine=None):
    image = nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine)
    image.header.set_slope_inter(slope, intercept)
    nibabel.save(image, path)
    return path


def naive(values, size):
    """One slice [X, Y] of whole numbers from 0 to 255 -> [size, size], with Pillow."""
    x, y = values.shape
    wide = (int(size * y / x), size) if x <= y else (size, int(size * x / y))
    resized = np.asarray(Image.fromarray(values.astype(np.uint8)).resize(wide, Image.Resampling.BICUBIC))
    top, left = round((resized.shape[0] - size) / 2), round((resized.shape[1] - size) / 2)
    return resized[top : top + size, left : left + size] / np.float32(255)


def test_which_slices_are_taken():
    """Numbers as the specification of SAMF lists them."""
    assert slice_indices(241, 24)[:5] == [48, 54, 60, 66, 73] and slice_indices(241, 24)[-3:] == [179, 185, 192]
    assert slice_indices(100, 24)[:5] == [0, 4, 8, 12, 17] and slice_indices(100, 24)[-2:] == [94, 99]
    assert slice_indices(10, 24) == sorted(slice_indices(10, 24)) and set(slice_indices(10, 24)) == set(range(10))
    assert slice_indices(1, 5) == [0] * 5


def test_numbers_wrap_as_the_cast_of_upstreams_machine_did():
    wraps = {-1000: 24, -850: 174, -500: 12, -100: 156, -1: 255, -0.9: 0, 40: 40, 255.7: 255, 256: 0, 300: 44, 1000: 232}
    wraps |= {np.nan: 0, np.inf: 0, 70000.25: 112}
    for value, grey in wraps.items():
        slices = load_slices(np.full((3, 3, 2), value), 2, 3)
        np.testing.assert_array_equal(slices, np.full((2, 3, 3), grey, np.float32) / np.float32(255), err_msg=str(value))


def test_a_window_instead():
    volume = np.array([[-1000.0, -200.0], [50.0, np.nan]])[..., None]
    slices = load_slices(volume, 1, 2, (-200.0, 300.0))
    np.testing.assert_allclose(slices[0] * 255, [[0, 0], [128, 0]], atol=1e-4)
    assert load_slices(np.full((2, 2, 1), np.inf), 1, 2, (0.0, 9.0)).min() == 1


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_a_file_is_scaled_and_never_turned(tmp_path, name):
    """Slices as [axis 0, axis 1] whatever the affine says; the crop's offset is 4.5, which rounds to 4."""
    stored = np.random.default_rng(3).integers(-900, 1800, (22, 13, 9)).astype(np.int16)
    path = save(tmp_path / name, stored, 0.5, -24.25, np.diag([-1.0, 2.0, -3.0, 1.0]))
    values = np.mod(np.trunc(stored * 0.5 - 24.25), 256)
    found = load_slices(path, 4, 13)
    assert found.shape == (4, 13, 13) and found.dtype == np.float32
    for slot, k in enumerate([0, 2, 5, 8]):
        np.testing.assert_array_equal(found[slot], naive(values[:, :, k], 13))
    np.testing.assert_array_equal(load_slices(stored * 0.5 - 24.25, 4, 13), found)


def test_only_wanted_slices_of_a_file_are_read(tmp_path):
    """A file cut behind the last wanted slice, and one cut before it."""
    volume = np.random.default_rng(4).integers(0, 99, (16, 16, 400)).astype(np.int16)
    path = save(tmp_path / "v.nii", volume)
    whole, head = path.read_bytes(), 352
    path.write_bytes(whole[: head + 2 * 256 * 273])
    np.testing.assert_array_equal(load_slices(path, 24, 16), load_slices(volume, 24, 16))
    path.write_bytes(whole[: head + 2 * 256 * 200])
    with pytest.raises(UserError, match=r"v\.nii: its voxels cannot be read"):
        load_slices(path, 24, 16)


def test_bad_files(tmp_path):
    volume = np.zeros((5, 6, 7), np.float32)
    save(tmp_path / "four.nii.gz", volume[..., None])
    save(tmp_path / "two.nii.gz", volume[..., 0])
    save(tmp_path / "strip.nii.gz", np.zeros((2, 500, 3), np.float32))
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.complex64), np.eye(4)), tmp_path / "complex.nii")
    nibabel.save(nibabel.MGHImage(volume, np.eye(4)), tmp_path / "other.mgz")
    (tmp_path / "text.nii").write_text("not a volume at all")
    whole = save(tmp_path / "whole.nii.gz", np.random.default_rng(0).normal(size=(40, 40, 40))).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.nii.gz").write_bytes(gzip.compress(b"\0" * 400))
    for name, message in {
        "four.nii.gz": r"shape \(5, 6, 7, 1\); slices are taken from three axes",
        "two.nii.gz": r"shape \(5, 6\)",
        "strip.nii.gz": "too narrow",
        "complex.nii": "complex64",
        "other.mgz": "not NIfTI",
        "text.nii": "not a readable NIfTI",
        "flipped.nii.gz": "not a readable NIfTI",
        "cut.nii.gz": "cannot be read",
        "gone.nii.gz": "no such file",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            load_slices(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
        assert (header_problem(str(tmp_path / name)) == "") == (name == "cut.nii.gz")
    for array in (np.zeros((3, 3)), np.zeros((3, 3, 0)), np.zeros((3, 3, 3), complex)):
        with pytest.raises(UserError, match="a volume array"):
            load_slices(array)
