"""From a CT volume on disk to what a 3-D tower reads: orientation, intensities from 0 to 1, foreground crop, resize.

    prepare(path, visual) -> Prepared.values [D, H, W, 1] float32, the sizes of `visual.volume`

Always in this order: the header's scaling (or the Hounsfield rule), the turn to (depth, rows, columns), the two numbers that
become 0 and 1 (found on the whole volume), the crop to what is above the lower one, the resize without antialiasing. All
presets are that with other numbers:

    preset            becomes 0 and 1                                            axes           crop   resize
    m3d               the smallest and the largest                               radiological   yes    half-pixel
    amos_challenge    the smallest and the largest                               radiological   no     corners aligned
    hu_window         the same after clipping to a window of Hounsfield units    radiological   asked  half-pixel
    m3d_seg           0.05 and 99.95 percentile of the voxels above the mean     zyx, unturned  yes    half-pixel
    m3d_refseg        0.5 and 99.5 percentile of all voxels                      zxy, unturned  yes    half-pixel

The z-score of M3D-Seg's scripts falls out: min-max follows it. Beside the stored numbers and the output only a few slices
exist, except under the percentile presets, which hold the volume in float32 as well.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from jaxmed.config import PrepareConfig, VisualConfig
from jaxmed.data.hounsfield import choose_reading, scaled_ends
from jaxmed.data.metadata import Metadata, VolumeMetadata
from jaxmed.data.resample import resize
from jaxmed.data.volume_sources import Axes, RawVolume, read_raw, view
from jaxmed.errors import UserError

PADDING_HU = -1024.0
"""No tissue is darker; smaller numbers fill what a scanner did not see"""
PADDING_SHARE = 0.001
SLICES_PRESET = "m3d"
Planes = Callable[[int], np.ndarray]
Interval = tuple[float, float]
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Recipe:
    axes: Axes
    crop: bool
    align_corners: bool


RECIPES = {
    "m3d": Recipe("radiological", True, False),
    "amos_challenge": Recipe("radiological", False, True),
    "hu_window": Recipe("radiological", True, False),
    "m3d_seg": Recipe("zyx", True, False),
    "m3d_refseg": Recipe("zxy", True, False),
}


@dataclass(frozen=True)
class Frame:
    """Where a prepared volume lies in the patient, and what was done to its numbers: for display and for captions."""

    source: str
    """`nifti`, `dicom` or `slices`; `prepared`: a file that somebody prepared before"""
    preset: str
    axes: str
    """Where depth, rows and columns grow to, such as `SPL` (head, back, left); "" unknown"""
    spacing: tuple[float, float, float]
    """Millimetres between voxels of the prepared volume along (depth, rows, columns); zeros: unknown"""
    shape: tuple[int, int, int]
    """(depth, rows, columns) before the crop"""
    box: Box
    """First and last + 1 index of the crop along each"""
    interval: Interval
    """Numbers that became 0 and 1: Hounsfield units where the scaling gives such"""
    reading: str
    """Which scaling was taken, in words"""


@dataclass(frozen=True)
class Prepared:
    values: np.ndarray
    """[D, H, W, 1] float32"""
    notices: tuple[str, ...]
    """What should be said of the file, without its name"""
    frame: Frame


def prepare(path: str | os.PathLike, visual: VisualConfig) -> Prepared:
    """Reads a NIfTI file or a folder of slices and prepares it as `visual.prepare` says. UserError names the file."""
    path, config = os.fspath(path), visual.prepare
    raw = read_raw(path, config)
    preset, recipe = chosen(config, raw.kind)
    voxels, spacing, axes = view(raw, recipe.axes)
    notices = list(raw.notices)
    scale, reading = _scaling(raw, preset, config)
    slope, intercept = scale

    def plane(k: int) -> np.ndarray:
        """Slice k in the units of the file's scaling, [rows, columns] float32"""
        return (voxels[k] * slope + intercept).astype(np.float32)

    ends = scaled_ends(path, voxels, slope, intercept)
    low, high = _interval(preset, config, plane, len(voxels), ends)
    if preset in ("m3d", "amos_challenge") and low < PADDING_HU:
        _say_padding(voxels, scale, preset, notices)
    box = _foreground(plane, voxels.shape, low) if recipe.crop else tuple((0, n) for n in voxels.shape)
    if not high > low or box is None:
        limits = f" between {config.window[0]:g} and {config.window[1]:g} HU" if preset == "hu_window" else ""
        raise UserError(
            f"{path}: nothing but air: every voxel has the same value{limits} ({low:g}), so the crop to the foreground is "
            "empty; leave the volume out, or choose another window"
        )
    values = _resized(plane, box, (low, high), visual.volume, recipe.align_corners)
    sizes = [stop - start for start, stop in box]
    scales = [_step(old, new, recipe.align_corners) for old, new in zip(sizes, visual.volume, strict=True)]
    sides = tuple(float(side * step) for side, step in zip(spacing, scales, strict=True))
    frame = Frame(raw.kind, preset, axes, sides, tuple(voxels.shape), box, (float(low), float(high)), reading)
    return Prepared(values[..., None], tuple(notices), frame)


def chosen(config: PrepareConfig, kind: str) -> tuple[str, Recipe]:
    """Preset and recipe for volumes of a kind: pictures of slices have neither Hounsfield units nor an orientation."""
    if kind == "slices":
        return SLICES_PRESET, replace(RECIPES[SLICES_PRESET], axes="zyx")
    recipe = RECIPES[config.preset]
    if config.preset == "hu_window":
        recipe = replace(recipe, crop=config.crop)
    return config.preset, recipe if config.axes == "preset" else replace(recipe, axes=config.axes)


def metadata_row(path: str, config: PrepareConfig) -> VolumeMetadata | None:
    """The row of the metadata CSV, where it counts: for the Hounsfield units of NIfTI files."""
    if not config.metadata or config.preset != "hu_window" or os.path.isdir(path):
        return None
    if not os.path.isfile(config.metadata):
        raise UserError(f"{config.metadata}: no such file; check visual.prepare.metadata")
    return _table(config.metadata, os.stat(config.metadata).st_mtime_ns).of(path)


@functools.lru_cache(maxsize=4)
def _table(path: str, time: int) -> Metadata:
    """`time`: of the file, so that a mended one is read again."""
    return Metadata(path)


def _scaling(raw: RawVolume, preset: str, config: PrepareConfig) -> tuple[Interval, str]:
    """(slope, intercept), and which it is in words. Only a window depends on it: the others are relative to the volume."""
    header = raw.header
    if preset != "hu_window":
        return (header.slope, header.intercept), "the header's scaling" if raw.kind != "slices" else ""
    # a CSV speaks of NIfTI files, which lost what DICOM says itself
    override = "auto" if config.hu == "csv" and raw.kind == "dicom" else config.hu
    reading = choose_reading(raw.stored, header, metadata_row(header.path, config), override)
    return (reading.slope, reading.intercept), reading.chosen


def _interval(preset: str, config: PrepareConfig, plane: Planes, depth: int, ends: Interval) -> Interval:
    """The numbers that become 0 and 1, after scaling."""
    if preset == "hu_window":
        return _clipped(ends, config.window)
    if preset not in ("m3d_seg", "m3d_refseg"):
        return ends
    values = np.stack([plane(k) for k in range(depth)])
    if preset == "m3d_refseg":
        return tuple(np.percentile(values, (0.5, 99.5)).astype(np.float32))
    bright = values[values > values.mean()]
    return _clipped(ends, tuple(np.percentile(bright if bright.size else values, (0.05, 99.95))))


def _clipped(ends: Interval, bounds: Interval) -> Interval:
    low, high = (np.float32(np.clip(end, *bounds)) for end in ends)
    return low, high


def _say_padding(voxels: np.ndarray, scale: Interval, preset: str, notices: list[str]) -> None:
    slope, intercept = scale
    bound = (PADDING_HU - intercept) / slope
    share = np.count_nonzero(voxels < bound if slope > 0 else voxels > bound) / voxels.size
    if share > PADDING_SHARE:
        notices.append(
            f"{share:.1%} of the voxels are below {PADDING_HU:g}, padding that takes contrast from the rest under {preset}; "
            "hu_window clips it"
        )


def _foreground(plane: Planes, shape: tuple[int, ...], low: float) -> Box | None:
    """The box of all voxels that will be above 0; None if there are none."""
    found = [np.zeros(n, bool) for n in shape]
    for k in range(shape[0]):
        above = plane(k) > low
        found[1] |= above.any(axis=1)
        columns = above.any(axis=0)
        found[2] |= columns
        found[0][k] = columns.any()
    if not found[0].any():
        return None
    ends = [np.flatnonzero(axis)[[0, -1]] for axis in found]
    return tuple((int(first), int(last) + 1) for first, last in ends)


def _resized(plane: Planes, box: Box, interval: Interval, size: tuple[int, int, int], align_corners: bool) -> np.ndarray:
    """[D, H, W] float32 from 0 to 1 of the voxels in the box."""
    (top, _), rows, columns = box
    low, high = interval

    def cut(k: int) -> np.ndarray:
        values = plane(top + k)[slice(*rows), slice(*columns)]
        return np.clip((values - low) / max(high - low, np.float32(1e-8)), 0, 1)

    return resize(cut, tuple(stop - start for start, stop in box), size, align_corners)


def _step(old: int, new: int, align_corners: bool) -> float:
    """Old voxels from one new voxel to the next."""
    return (old - 1) / max(new - 1, 1) if align_corners else old / new
