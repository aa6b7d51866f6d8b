"""NIfTI files as they are stored: shape, voxel size, scaling and affine, checked; voxels unscaled and never turned.

Arrays are [X, Y, Z], the file's axes 0, 1, 2. A file of four axes holds several volumes; one is taken by its index alone.
"""

import gzip
import logging
import math
import os
import zlib
from dataclasses import dataclass

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from jaxmed.errors import UserError

# nibabel logs each fault of a header that it mends; those that matter are told here, with the file's name.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)

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
GZIP_MAGIC, NIFTI_MAGIC = b"\x1f\x8b", (b"n+1\0", b"n+2\0")
PIECE = 2**20
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
        values = _unscaled(path, image, index).reshape(header.shape)
    except UNREADABLE as error:
        raise UserError(f"{path}: its voxels cannot be read ({_brief(error)}); copy or download the file again") from None
    # One pass: a sum is finite only if every entry is.
    if values.dtype.kind == "f" and not np.isfinite(values.sum(dtype=np.float64)):
        bad = int(values.size - np.isfinite(values).sum())
        if bad:
            raise UserError(f"{path}: {bad} of {values.size} voxels are NaN or infinite; repair or leave out the volume")
    oriented = int(image.header["sform_code"]) > 0 or int(image.header["qform_code"]) > 0
    return Stored(header, values, np.asarray(image.affine, np.float64), oriented)


def _unscaled(path: str, image: nibabel.Nifti1Image, index: int) -> np.ndarray:
    """The numbers as stored: of the whole file, or of one of its volumes without reading those behind it.

    gzip knows of damage only at the end of a file, where its checksum stands, and behind the voxels nobody reads on.
    """
    spec = (image.shape, image.get_data_dtype(), image.dataobj.offset, 1.0, 0.0)
    part = (..., index) if index != WHOLE and _volumes(image.shape) else ...
    if not compressed(path):
        return np.asarray(ArrayProxy(path, spec)[part])
    with gzip.open(path) as file:
        values = np.asarray(ArrayProxy(file, spec)[part])
        while file.read(PIECE):
            pass
    return values


def compressed(path: str) -> bool:
    """As its name says."""
    return path.lower().endswith(".gz")


def open_nifti(path: str) -> nibabel.Nifti1Image:
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; this model reads .nii and .nii.gz alone, dcm2niix makes one of a DICOM series")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; check the folder of the volumes")
    try:
        image = nibabel.load(path)
    except UNREADABLE as error:
        what = _misnamed(path) or f"not a readable NIfTI file ({_brief(error)}); copy or download it again"
        raise UserError(f"{path}: {what}") from None
    if not isinstance(image, nibabel.Nifti1Image):
        raise UserError(f"{path}: a {type(image).__name__}, not NIfTI; convert it first (DICOM: with dcm2niix)")
    return image


def _misnamed(path: str) -> str:
    """What is wrong with a whole file whose name says that it is compressed, or is not; "" if it is another fault."""
    try:
        with open(path, "rb") as file:
            head = file.read(348)
    except OSError:
        return ""
    if head.startswith(GZIP_MAGIC) and not compressed(path):
        return "is compressed, which its name does not say; rename it to end in .nii.gz"
    if compressed(path) and (head[344:348] in NIFTI_MAGIC or head[4:8] in NIFTI_MAGIC):
        return "is not compressed, as its name says; rename it to end in .nii"
    return ""


def header_of(path: str, image: nibabel.Nifti1Image, index: int = WHOLE) -> Header:
    shape = _volume_shape(path, image.shape, index)
    if image.get_data_dtype().kind not in "iuf":
        raise UserError(f"{path}: voxels of type {image.get_data_dtype()}; a CT volume holds one number a voxel")
    _check_length(path, image)
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


def _check_length(path: str, image: nibabel.Nifti1Image) -> None:
    """UserError for a file that was copied in part, without reading it: gzip ends with the length of what it holds."""
    wanted = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
    missing = wanted - os.path.getsize(path)
    if not compressed(path):
        if missing > 0:
            raise UserError(f"{path}: is cut short by {missing:,} bytes; copy or download the file again")
        return
    with open(path, "rb") as file:
        file.seek(-4, os.SEEK_END)
        if int.from_bytes(file.read(), "little") == wanted % 2**32:
            return
    try:
        _read_through(path)  # other lengths are rare and may be right: of files in several pieces, or with something behind
    except UNREADABLE as error:
        raise UserError(f"{path}: is cut short or damaged ({_brief(error)}); copy or download the file again") from None


def _read_through(path: str) -> None:
    with gzip.open(path) as file:
        while file.read(PIECE):
            pass


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
