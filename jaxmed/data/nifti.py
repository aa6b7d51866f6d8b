"""NIfTI files as they are stored: shape, voxel size, scaling and affine, checked; voxels unscaled and never turned.

Arrays are [X, Y, Z], the file's axes 0, 1, 2. A file of four axes holds several volumes; one is taken by its index alone.
"""

import math
import os
import zlib
from dataclasses import dataclass

import nibabel
import numpy as np

from jaxmed.errors import UserError

# What nibabel, gzip and numpy raise for files that are damaged or something else.
UNREADABLE = (
    nibabel.filebasedimages.ImageFileError,
    nibabel.spatialimages.HeaderDataError,
    nibabel.wrapstruct.WrapStructError,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    MemoryError,
    zlib.error,
)
ENDINGS = (".nii.gz", ".nii")
WHOLE = -1
"""The index that stands for: the file is one volume"""
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Header:
    """What a file says about itself before its voxels are read."""

    path: str
    shape: tuple[int, int, int]
    """(X, Y, Z)"""
    spacing: Triple
    """Millimetres along the same axes"""
    slope: float
    """The header's scaling, 1 and 0 where it has none"""
    intercept: float


@dataclass(frozen=True)
class Stored:
    header: Header
    values: np.ndarray
    """[X, Y, Z] numbers as in the file, unscaled"""
    affine: np.ndarray
    """[4, 4] float64: indices of a voxel -> millimetres to the patient's right, front and head"""
    oriented: bool
    """Whether the file says so; else the affine is the format's default"""


def read_header(path: str, index: int = WHOLE) -> Header:
    return header_of(path, open_nifti(path), index)


def read_stored(path: str, index: int = WHOLE) -> Stored:
    """The voxels of a volume. UserError where they cannot be read or are not finite."""
    image = open_nifti(path)
    header = header_of(path, image, index)
    try:
        values = image.dataobj.get_unscaled()
    except UNREADABLE as error:
        raise UserError(f"{path}: its voxels cannot be read ({_brief(error)}); copy or download the file again") from None
    values = values[..., index] if index != WHOLE and _volumes(image.shape) else values
    values = values.reshape(header.shape)
    # One pass: a sum is finite only if every entry is.
    if values.dtype.kind == "f" and not np.isfinite(values.sum(dtype=np.float64)):
        bad = int(values.size - np.isfinite(values).sum())
        if bad:
            raise UserError(f"{path}: {bad} of {values.size} voxels are NaN or infinite; repair or leave out the volume")
    oriented = int(image.header["sform_code"]) > 0 or int(image.header["qform_code"]) > 0
    return Stored(header, values, np.asarray(image.affine, np.float64), oriented)


def open_nifti(path: str) -> nibabel.Nifti1Image:
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; check the folder of the volumes")
    try:
        image = nibabel.load(path)
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable NIfTI file ({_brief(error)}); copy or download it again") from None
    if not isinstance(image, nibabel.Nifti1Image):
        raise UserError(f"{path}: a {type(image).__name__}, not NIfTI; convert it first (DICOM: with dcm2niix)")
    return image


def header_of(path: str, image: nibabel.Nifti1Image, index: int = WHOLE) -> Header:
    shape = _volume_shape(path, image.shape, index)
    if image.get_data_dtype().kind not in "iuf":
        raise UserError(f"{path}: voxels of type {image.get_data_dtype()}; a CT volume holds one number a voxel")
    zooms = _voxel_size(path, image)
    if not all(math.isfinite(z) and z > 0 for z in zooms):
        raise UserError(f"{path}: voxel size {zooms} in the header; every side must be above 0, mend the header")
    affine = np.asarray(image.affine[:3, :3], np.float64)
    sides = np.linalg.norm(affine, axis=0)
    if not np.isfinite(affine).all() or not abs(np.linalg.det(affine)) > 1e-6 * float(np.prod(sides)):
        raise UserError(f"{path}: the affine in the header is singular, its axes span no volume; mend the header")
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    # Headers hold float32; six digits give back the number that was written (0.7, not 0.699999988), on which the
    # truncated size after resampling depends.
    spacing = (float(f"{zooms[0]:.6g}"), float(f"{zooms[1]:.6g}"), float(f"{zooms[2]:.6g}"))
    return Header(path, shape, spacing, float(slope), float(intercept))


def _volumes(shape: tuple[int, ...]) -> int:
    """Volumes of a file of more than three axes that are longer than 1, else 0."""
    return shape[-1] if len(shape) == 4 and shape[-1] > 1 else 0


def _volume_shape(path: str, stored: tuple[int, ...], index: int) -> tuple[int, int, int]:
    shape = stored
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if count := _volumes(shape):
        if index == WHOLE:
            raise UserError(
                f"{path}: shape {stored}; a CT volume has three axes, extract one of the {count} first or, where the config "
                "has visual.prepare.index, set it"
            )
        if not index < count:
            raise UserError(f"{path}: holds {count} volumes, visual.prepare.index is {index}; the first is 0")
        shape = shape[:3]
    if len(shape) != 3 or 0 in shape:
        raise UserError(f"{path}: shape {stored}; a CT volume has three axes, extract one volume first")
    return shape


def _voxel_size(path: str, image: nibabel.Nifti1Image) -> Triple:
    """As written: nibabel silently makes a voxel size of 0 a 1 when it loads a file."""
    with nibabel.openers.ImageOpener(path) as file:
        written = image.header_class.from_fileobj(file, check=False)
    x, y, z = (abs(float(side)) for side in written["pixdim"][1:4])
    return x, y, z


def _brief(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
