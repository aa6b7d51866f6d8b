"""Linear interpolation, one axis after the other: trilinear resizing without antialiasing, as torch's `interpolate` does it,
with its places, its order of the axes (columns first) and its two products, so that only the last bits may differ.

Two conventions: half-pixel centres (`align_corners=False`: pixels are areas) and aligned corners (`align_corners=True`: the
first and the last samples stay where they are). Edges are clamped. Axis letters: [D, H, W] voxels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Taps:
    """Each output of an axis as a mixture of two inputs."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray
    """float32, of `high`"""

    @property
    def identity(self) -> bool:
        """Every output is an input as it is."""
        return bool((self.weight == 0).all())


def taps(old: int, new: int, first: int, count: int, align_corners: bool, dtype: type[np.floating]) -> Taps:
    """Of `old` inputs resized to `new` outputs, those for outputs `first` to `first + count`.

    `dtype`: in which the original interpolates. float32's places are 1e-5 of a voxel off the exact ones and the values with
    them; they are torch's to the bit, with the product and the difference rounded once, as its kernels fuse them.
    """
    outputs = np.arange(first, first + count)
    if align_corners:
        source = outputs.astype(dtype) * (dtype(old - 1) / dtype(new - 1) if new > 1 else dtype(0))
    else:
        scale = np.float64(dtype(old) / dtype(new))  # its product with a float32 is exact
        source = np.maximum((scale * (outputs + 0.5) - 0.5).astype(dtype), dtype(0))
    low = np.minimum(source.astype(np.int64), old - 1)
    return Taps(low, np.minimum(low + 1, old - 1), (source - low.astype(dtype)).astype(np.float32))


def blend(x: np.ndarray, taps: Taps, axis: int) -> np.ndarray:
    low = np.take(x, taps.low, axis)
    if taps.identity:
        return low
    weight = taps.weight.reshape([-1 if d == axis else 1 for d in range(x.ndim)])
    high = np.take(x, taps.high, axis)
    high *= weight
    low *= 1 - weight
    low += high
    return low


def resize(
    plane: Callable[[int], np.ndarray], old: tuple[int, int, int], new: tuple[int, int, int], align_corners: bool
) -> np.ndarray:
    """[D, H, W] float32 of the sizes `new`, from slices plane(k) [H, W] float32 of a volume of the sizes `old`.

    Slices are asked for in rising order, once each, and only those that an output needs: beside the output three exist at a
    time.
    """
    depth, rows, columns = (taps(o, n, 0, n, align_corners, np.float32) for o, n in zip(old, new, strict=True))
    out = np.empty(new, np.float32)
    recent: dict[int, np.ndarray] = {}

    def resized(k: int) -> np.ndarray:
        if k not in recent:
            recent[k] = blend(blend(plane(k), columns, 1), rows, 0)
        return recent[k]

    for i, (low, high, weight) in enumerate(zip(depth.low.tolist(), depth.high.tolist(), depth.weight, strict=True)):
        for past in [k for k in recent if k < low]:
            del recent[past]
        out[i] = resized(low) if weight == 0 else resized(low) * (1 - weight) + resized(high) * weight
    return out
