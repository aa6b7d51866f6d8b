"""CT volumes as BTB3D reads them: a NIfTI file, its spacing, its Hounsfield units, and BTB3D's preprocessing.

Arrays as stored: [X, Y, Z], the file's axes 0, 1, 2. Like upstream, everything here takes them as x, y, z and ignores the
orientation in the header, so that tokens equal the published ones: a volume stored in another orientation keeps it.
After `preprocess`: [D, H, W] float32 in [-1, 1], D along axis 2 of the file, H along axis 0, W along axis 1.
`jaxmed.data.prepare` makes what a 3-D tower reads, and turns volumes.
"""

from dataclasses import dataclass

import numpy as np

from jaxmed.config import EncodeConfig
from jaxmed.data.hounsfield import AIR_HU, AIR_WIDTH, Override, Reading, choose_reading, scaled_ends
from jaxmed.data.metadata import VolumeMetadata
from jaxmed.data.nifti import Triple, read_header, read_stored
from jaxmed.data.resample import Taps, blend, taps
from jaxmed.errors import UserError

__all__ = [
    "AIR_HU",
    "AIR_WIDTH",
    "Override",
    "Volume",
    "crop_depth",
    "preprocess",
    "read_header",
    "read_volume",
    "resized_length",
]


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


def read_volume(path: str, metadata: VolumeMetadata | None = None, override: Override = "auto") -> Volume:
    """The voxels of one file, its spacing, and which rule gives its Hounsfield units."""
    found = read_stored(path)
    reading = choose_reading(found.values, found.header, metadata, override)
    scaled_ends(path, found.values, reading.slope, reading.intercept)
    return Volume(path, found.values, metadata.spacing if metadata else found.header.spacing, reading)


def resized_length(old: int, spacing: float, target: float) -> int:
    """Truncated, the quotient first: the order matters (60 * (0.7 / 0.75) is 55.99..., 60 * 0.7 / 0.75 is 56)."""
    return int(old * (spacing / target))


def _on_canvas(old: int, new: int, canvas: int) -> tuple[Taps, slice]:
    """Interpolation of the outputs that the canvas keeps, and where they stand on it: centre crop or centre pad."""
    kept = min(new, canvas)
    start = (canvas - kept) // 2
    return taps(old, new, max((new - canvas) // 2, 0), kept, False, np.float64), slice(start, start + kept)


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
    kept = [_on_canvas(n, m, c) for n, m, c in zip((x, y, z), new, config.canvas, strict=True)]
    (columns, to_rows), (rows, to_columns), (planes, to_depth) = kept
    height, width, depth = config.canvas
    out = np.full((depth, height, width), -1.0, np.float32)
    low_hu, high_hu = config.hu_range
    centre, half = np.float32((low_hu + high_hu) / 2), np.float32((high_hu - low_hu) / 2)
    recent: dict[int, np.ndarray] = {}

    def plane(k: int) -> np.ndarray:
        """Slice k in HU, resampled in its plane, [axis 1, axis 0] (NIfTI keeps axis 0 contiguous)."""
        if k not in recent:
            hounsfield = (volume.stored[:, :, k].T * volume.reading.slope + volume.reading.intercept).astype(np.float32)
            recent[k] = blend(blend(hounsfield, rows, 0), columns, 1)
        return recent[k]

    for i, (low, high, weight) in enumerate(zip(planes.low, planes.high, planes.weight, strict=True)):
        for old in [k for k in recent if k < low]:
            del recent[old]
        blended = plane(low) if weight == 0 else plane(low) + weight * (plane(high) - plane(low))
        scaled = np.clip(blended, low_hu, high_hu)
        if centre:
            scaled -= centre
        scaled /= half
        out[to_depth.start + i, to_rows, to_columns] = scaled.T
    return out


def crop_depth(x: np.ndarray) -> np.ndarray:
    """[D, H, W] -> the centred 1 + 4 * floor((D - 1) / 4) slices: depths that BTB3D's own encoder takes."""
    depth = x.shape[0]
    kept = 1 + 4 * ((depth - 1) // 4)
    start = (depth - kept) // 2
    return x[start : start + kept]
