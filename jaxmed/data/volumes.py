"""CT volumes: NIfTI files, the Hounsfield rule, and BTB3D's preprocessing.

Arrays as stored: [X, Y, Z], the file's axes 0, 1, 2. Like upstream, everything here takes them as x, y, z and ignores the
orientation in the header, so that tokens equal the published ones: a volume stored in another orientation keeps it.
After `preprocess`: [D, H, W] float32 in [-1, 1], D along axis 2 of the file, H along axis 0, W along axis 1.

The Hounsfield rule: the header's scaling is applied first. Then the metadata's slope and intercept would follow; but files
that are in HU already (CT-RATE's second release) must not be rescaled again. Of the two readings exactly one must have
air; two that are the same function are one. `override` settles it by hand.
"""

import math
import os
import zlib
from dataclasses import dataclass
from typing import Literal

import nibabel
import numpy as np

from jaxmed.config import EncodeConfig
from jaxmed.data.metadata import VolumeMetadata
from jaxmed.errors import UserError

AIR_HU = -1000.0
AIR_WIDTH = 60.0
AIR_SHARE = 0.02
SOFT_TISSUE = (40.0, 60.0)
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
Override = Literal["auto", "header", "csv", "none"]
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
class Reading:
    """How stored numbers become Hounsfield units: slope * stored + intercept."""

    name: Literal["header", "csv", "none"]
    slope: float
    intercept: float
    air: float
    """Share of the voxels that are air under this reading"""
    chosen: str
    """Why it was taken, in words"""


@dataclass(frozen=True)
class Volume:
    path: str
    stored: np.ndarray
    """[X, Y, Z] numbers as in the file, unscaled"""
    spacing: Triple
    """Millimetres along X, Y, Z: the metadata's, else the header's"""
    reading: Reading

    def hounsfield(self) -> np.ndarray:
        """[X, Y, Z] float32"""
        return (self.stored * self.reading.slope + self.reading.intercept).astype(np.float32)


def read_header(path: str) -> Header:
    return _header(path, _open(path))


def read_volume(path: str, metadata: VolumeMetadata | None = None, override: Override = "auto") -> Volume:
    """The voxels of one file, its spacing, and which rule gives its Hounsfield units."""
    image = _open(path)
    header = _header(path, image)
    try:
        stored = image.dataobj.get_unscaled()
    except UNREADABLE as error:
        raise UserError(f"{path}: its voxels cannot be read ({_brief(error)}); copy or download the file again") from None
    stored = stored.reshape(header.shape)
    # One pass: a sum is finite only if every entry is.
    if stored.dtype.kind == "f" and not np.isfinite(stored.sum(dtype=np.float64)):
        bad = int(stored.size - np.isfinite(stored).sum())
        raise UserError(f"{path}: {bad} of {stored.size} voxels are NaN or infinite; repair or leave out the volume")
    reading = choose_reading(stored, header, metadata, override)
    return Volume(path, stored, metadata.spacing if metadata else header.spacing, reading)


def _open(path: str) -> nibabel.Nifti1Image:
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; check the folder of the volumes")
    try:
        image = nibabel.load(path)
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable NIfTI file ({_brief(error)}); copy or download it again") from None
    if not isinstance(image, nibabel.Nifti1Image):
        raise UserError(f"{path}: a {type(image).__name__}, not NIfTI; convert it first (DICOM: with dcm2niix)")
    return image


def _header(path: str, image: nibabel.Nifti1Image) -> Header:
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or 0 in shape:
        raise UserError(f"{path}: shape {image.shape}; a CT volume has three axes, extract one volume first")
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


def _voxel_size(path: str, image: nibabel.Nifti1Image) -> Triple:
    """As written: nibabel silently makes a voxel size of 0 a 1 when it loads a file."""
    with nibabel.openers.ImageOpener(path) as file:
        written = image.header_class.from_fileobj(file, check=False)
    x, y, z = (abs(float(side)) for side in written["pixdim"][1:4])
    return x, y, z


def _brief(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def share_near(stored: np.ndarray, slope: float, intercept: float, centre: float, width: float) -> float:
    """Share of the voxels within centre ± width HU. Bounds are carried back to stored numbers: no scaled copy is made."""
    ends = sorted((centre + side * width - intercept) / slope for side in (-1, 1))
    low, high = (np.float64(end) for end in ends)
    if stored.dtype.kind in "iu":
        info = np.iinfo(stored.dtype)
        low, high = max(math.ceil(low), info.min), min(math.floor(high), info.max)
        if low > high:
            return 0.0
    return float(np.count_nonzero((stored >= low) & (stored <= high)) / stored.size)


def air_share(stored: np.ndarray, slope: float, intercept: float) -> float:
    return share_near(stored, slope, intercept, AIR_HU, AIR_WIDTH)


def choose_reading(stored: np.ndarray, header: Header, metadata: VolumeMetadata | None, override: Override) -> Reading:
    """The Hounsfield rule (see the module's docstring)."""
    readings = {"header": (header.slope, header.intercept)}
    if metadata:
        # The metadata's scaling is applied to what the header's gave, as published code does it.
        readings["csv"] = (header.slope * metadata.slope, metadata.slope * header.intercept + metadata.intercept)
    if override == "none":
        return Reading("none", 1.0, 0.0, air_share(stored, 1.0, 0.0), "stored numbers taken as HU, as asked")
    if override != "auto":
        if override not in readings:
            raise UserError(f"{header.path}: --hu csv needs the rescale of a metadata CSV; pass --metadata")
        slope, intercept = readings[override]
        return Reading(override, slope, intercept, air_share(stored, slope, intercept), f"{override}, as asked")
    air = {name: air_share(stored, *scaling) for name, scaling in readings.items()}
    with_air = [name for name in readings if air[name] >= AIR_SHARE]
    agree = len(with_air) == 2 and readings["csv"] == readings["header"]
    if len(with_air) == 1 or agree:
        name = with_air[0]
        words = {"header": "the header's scaling alone gives air", "csv": "the header's scaling, then the CSV's gives air"}
        why = "header and CSV agree" if agree else words[name]
        return Reading(name, *readings[name], air[name], why)
    shares = ", ".join(f"{name} {air[name]:.1%} ({slope:g}v{intercept:+g})" for name, (slope, intercept) in readings.items())
    fault = "no reading of its numbers gives air" if not with_air else "two different readings of its numbers give air"
    raise UserError(
        f"{header.path}: {fault} (share of voxels within {AIR_HU:g}±{AIR_WIDTH:g} HU, at least {AIR_SHARE:.0%} needed: "
        f"{shares}); {_advice(stored, {name: readings[name] for name in with_air})}"
    )


def _advice(stored: np.ndarray, candidates: dict[str, tuple[float, float]]) -> str:
    """Rescaling HU by -1024 once more moves soft tissue to where air was: the wrong one of two readings has no tissue."""
    tissue = [n for n, scaling in candidates.items() if share_near(stored, *scaling, *SOFT_TISSUE) >= AIR_SHARE]
    if len(tissue) == 1:
        return f"only {tissue[0]} gives soft tissue as well, so --hu {tissue[0]} is likely right; look at it with preview"
    return "look at it with preview, then pass --hu header, csv or none"


@dataclass(frozen=True)
class _Taps:
    """Linear interpolation along one axis, for those outputs alone that the canvas keeps."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray
    """float32, of `high`"""
    start: int
    """Where the outputs begin on the canvas"""
    identity: bool
    """Every output is an input as it is"""


def resized_length(old: int, spacing: float, target: float) -> int:
    """Truncated, the quotient first: the order matters (60 * (0.7 / 0.75) is 55.99..., 60 * 0.7 / 0.75 is 56)."""
    return int(old * (spacing / target))


def _taps(old: int, new: int, canvas: int) -> _Taps:
    """Half-pixel centres, edges clamped, no antialias; centre crop or centre pad to the canvas."""
    kept = min(new, canvas)
    first = max((new - canvas) // 2, 0)
    source = np.maximum((np.arange(first, first + kept) + 0.5) * (old / new) - 0.5, 0.0)
    low = np.minimum(source.astype(np.int64), old - 1)
    weight = (source - low).astype(np.float32)
    return _Taps(low, np.minimum(low + 1, old - 1), weight, (canvas - kept) // 2, bool((weight == 0).all()))


def _blend(x: np.ndarray, taps: _Taps, axis: int) -> np.ndarray:
    low = np.take(x, taps.low, axis)
    if taps.identity:
        return low
    weight = taps.weight.reshape([-1 if d == axis else 1 for d in range(x.ndim)])
    high = np.take(x, taps.high, axis)
    high -= low
    high *= weight
    high += low
    return high


def preprocess(volume: Volume, config: EncodeConfig) -> np.ndarray:
    """Resample, clip, scale to [-1, 1], crop or pad with -1: [D, H, W] float32 on the canvas.

    Trilinear interpolation is separable: each slice that is needed is resampled in its plane once, and pairs of slices
    are blended into the output. Beside the stored array and the output only three slices exist.
    """
    x, y, z = volume.stored.shape
    new = [resized_length(n, s, t) for n, s, t in zip((x, y, z), volume.spacing, config.spacing, strict=True)]
    if 0 in new:
        size = " x ".join(f"{n * s:g}" for n, s in zip((x, y, z), volume.spacing, strict=True))
        raise UserError(f"{volume.path}: {size} mm, too thin to resample to {config.spacing} mm; check its spacing")
    columns, rows, planes = (_taps(n, m, c) for n, m, c in zip((x, y, z), new, config.canvas, strict=True))
    height, width, depth = config.canvas
    out = np.full((depth, height, width), -1.0, np.float32)
    to_rows = slice(columns.start, columns.start + len(columns.low))
    to_columns = slice(rows.start, rows.start + len(rows.low))
    low_hu, high_hu = config.hu_range
    centre, half = np.float32((low_hu + high_hu) / 2), np.float32((high_hu - low_hu) / 2)
    recent: dict[int, np.ndarray] = {}

    def plane(k: int) -> np.ndarray:
        """Slice k in HU, resampled in its plane, [axis 1, axis 0] (NIfTI keeps axis 0 contiguous)."""
        if k not in recent:
            hounsfield = (volume.stored[:, :, k].T * volume.reading.slope + volume.reading.intercept).astype(np.float32)
            recent[k] = _blend(_blend(hounsfield, rows, 0), columns, 1)
        return recent[k]

    for i, (low, high, weight) in enumerate(zip(planes.low, planes.high, planes.weight, strict=True)):
        for old in [k for k in recent if k < low]:
            del recent[old]
        blended = plane(low) if weight == 0 else plane(low) + weight * (plane(high) - plane(low))
        scaled = np.clip(blended, low_hu, high_hu)
        if centre:
            scaled -= centre
        scaled /= half
        out[planes.start + i, to_rows, to_columns] = scaled.T
    return out


def crop_depth(x: np.ndarray) -> np.ndarray:
    """[D, H, W] -> the centred 1 + 4 * floor((D - 1) / 4) slices: depths that BTB3D's own encoder takes."""
    depth = x.shape[0]
    kept = 1 + 4 * ((depth - 1) // 4)
    start = (depth - kept) // 2
    return x[start : start + kept]
