"""From a NIfTI volume to the 2-D slices that SAMF's tower reads, to the bit as its own code makes them.

The header's scaling, no reorientation, no resampling; slices evenly over the middle of axis 2, seen with axis 0 as rows and
axis 1 as columns; whole numbers modulo 256 (the published preset, which wraps Hounsfield units) or a window; Pillow's bicubic
resize, the square in the middle, values from 0 to 1. A volume is [X, Y, Z], its slices are [S, H, W] float32 with H = W.
"""

import os

import nibabel
import numpy as np
from PIL import Image

from jaxmed.data.nifti import UNREADABLE
from jaxmed.errors import UserError

WRAP = (0.0, 0.0)
"""The window that stands for whole numbers modulo 256"""
REACH = 72
"""Slices on either side of the middle one that can be picked, whatever their spacing"""
LONGEST = 100
"""Times that the longer side of a slice may be the shorter one"""


def load_slices(
    source: str | os.PathLike | np.ndarray, count: int = 24, size: int = 224, intensity: tuple[float, float] = WRAP
) -> np.ndarray:
    """A .nii or .nii.gz file, or its scaled numbers [X, Y, Z] -> [count, size, size] float32 from 0 to 1.

    `intensity`: values that become 0 and 1; WRAP for upstream's modulo 256. Slices of a file that are not wanted are not kept.
    """
    if isinstance(source, np.ndarray):
        name, volume = "a volume array", source
        _check(name, source.shape, source.dtype)
    else:
        name = os.fspath(source)
        volume = _open(name).dataobj
    grey: dict[int, np.ndarray] = {}
    for k in slice_indices(volume.shape[2], count):
        if k not in grey:
            grey[k] = _resized(_bytes(_slice(volume, k, name), intensity), size)
    return np.stack([grey[k] for k in slice_indices(volume.shape[2], count)]).astype(np.float32) / np.float32(255)


def slice_indices(depth: int, count: int) -> list[int]:
    """Which of `depth` slices are taken, ascending; few slices repeat."""
    middle = depth // 2
    return np.linspace(max(0, middle - REACH), min(depth - 1, middle + REACH), count).astype(int).tolist()


def header_problem(path: str) -> str:
    """What the header of a file says against it, "" if nothing does."""
    try:
        _open(path)
    except UserError as error:
        return str(error)
    return ""


def _open(path: str) -> nibabel.Nifti1Image:
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; check the folder of the volumes")
    try:
        # Kept open, a compressed file is read once from front to back and not once a slice.
        image = nibabel.load(path, keep_file_open=True)
    except UNREADABLE as error:
        raise UserError(
            f"{path}: not a readable NIfTI file ({' '.join(str(error).split())}); copy or download it again"
        ) from None
    except TypeError:  # a reader of another format that knows no `keep_file_open`
        raise UserError(f"{path}: not NIfTI; convert it first (DICOM: with dcm2niix)") from None
    if not isinstance(image, nibabel.Nifti1Image):
        raise UserError(f"{path}: a {type(image).__name__}, not NIfTI; convert it first (DICOM: with dcm2niix)")
    _check(path, image.shape, image.get_data_dtype())
    return image


def _check(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if len(shape) != 3 or 0 in shape:
        raise UserError(f"{name}: shape {shape}; slices are taken from three axes, extract one volume first")
    if dtype.kind not in "iuf":
        raise UserError(f"{name}: voxels of type {dtype}; a volume holds one number a voxel")
    if max(shape[:2]) > LONGEST * min(shape[:2]):
        raise UserError(f"{name}: slices of {shape[0]} x {shape[1]} are too narrow a strip to be made square; check the axes")


def _slice(volume: np.ndarray | nibabel.arrayproxy.ArrayProxy, k: int, name: str) -> np.ndarray:
    """[X, Y] float64"""
    try:
        return np.asarray(volume[:, :, k], np.float64)
    except UNREADABLE as error:
        why = " ".join(str(error).split())
        raise UserError(f"{name}: its voxels cannot be read ({why}); copy or download the file again") from None


def _bytes(values: np.ndarray, intensity: tuple[float, float]) -> np.ndarray:
    """[X, Y] uint8. Modulo is what a cast in C does on x86, written out: on other machines the cast saturates."""
    low, high = intensity
    if low == high:
        return np.mod(np.trunc(np.where(np.isfinite(values), values, 0)), 256).astype(np.uint8)
    known = np.where(np.isnan(values), low, values)
    return np.rint(np.clip((known - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _resized(grey: np.ndarray, size: int) -> np.ndarray:
    """[X, Y] -> [size, size]: the shorter side resized to `size`, then the middle (halves to the even pixel)."""
    rows, columns = grey.shape
    shorter = min(rows, columns)
    height, width = (size if n == shorter else int(size * n / shorter) for n in (rows, columns))
    resized = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resized[top : top + size, left : left + size]
