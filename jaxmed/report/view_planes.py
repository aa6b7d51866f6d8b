"""Slices of what a model gets of a volume, turned as a radiologist holds them, and of any map over its grid of patches.

Arrays are [D, H, W], in the order that the model reads them; a map over patches is [d, h, w, ...] and is cut where the voxels
are. Places are counted in the model's order from 0, whatever the turning. Where nothing says how the axes lie in the patient,
nothing is turned; where nothing says how large a voxel is, patches are drawn square.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

Grid = tuple[int, int, int]
AXES = ("D", "H", "W")
_TOWARDS = ("I", "P", "L")
"""How pictures run: down to the feet or to the back, to the patient's left on the viewer's right"""
_OPPOSITE = {"I": "S", "S": "I", "P": "A", "A": "P", "L": "R", "R": "L"}
_NAMES = ("axial", "coronal", "sagittal")
_PLAIN = ("across the depth", "across the rows", "across the columns")


@dataclass(frozen=True)
class Seen:
    """One image as the model gets it."""

    name: str
    values: np.ndarray
    """[D, H, W], or [D, H, W, 3] from 0 to 1; of token files [d, h, w, 0]"""
    window: tuple[float, float]
    """Values that are drawn black and white"""
    facts: tuple[tuple[str, str], ...]
    """Name and value, for the head of the sheet"""
    grid: Grid
    """Patches"""
    spacing: tuple[float, ...] = ()
    """Millimetres along D, H, W; () where nothing says"""
    sides: tuple[str, ...] = ()
    """Towards which side of the patient D, H, W run, such as I, P, L; () where nothing says"""
    notices: tuple[str, ...] = ()
    flat: bool = False
    """Slices along D are pictures by themselves: there are no other planes"""
    first_alone: bool = False
    """The first token along D is of the first slice alone (BTB3D's encoder)"""


@dataclass(frozen=True)
class Plane:
    name: str
    axis: int
    """Across which axis of the array"""
    rows: int
    columns: int
    """Axes of the array that run down and to the right"""
    flip_rows: bool
    flip_columns: bool
    letters: tuple[str, ...]
    """At the left, right, top and bottom edge"""

    def cut(self, array: np.ndarray, place: int) -> np.ndarray:
        """[D, H, W, ...] -> [rows, columns, ...]"""
        picture = np.take(array, place, self.axis)
        if self.rows > self.columns:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def planes(seen: Seen) -> list[Plane]:
    """Axial, coronal and sagittal, or across the array's axes where it is not known which these are."""
    if seen.flat:
        return [Plane("", 0, 1, 2, False, False, ())]
    if not seen.sides:
        return [Plane(_PLAIN[a], a, *(n for n in range(3) if n != a), False, False, ()) for a in range(3)]
    role = [next(r for r, side in enumerate(_TOWARDS) if code in (side, _OPPOSITE[side])) for code in seen.sides]
    axis_of = [role.index(r) for r in range(3)]
    flip = [seen.sides[axis_of[r]] != _TOWARDS[r] for r in range(3)]
    made = []
    for name, (across, down, right) in zip(_NAMES, ((0, 1, 2), (1, 0, 2), (2, 0, 1)), strict=True):
        letters = (_OPPOSITE[_TOWARDS[right]], _TOWARDS[right], _OPPOSITE[_TOWARDS[down]], _TOWARDS[down])
        made.append(Plane(name, axis_of[across], axis_of[down], axis_of[right], flip[down], flip[right], letters))
    return made


def places(count: int, length: int, wanted: Sequence[int] = ()) -> list[int]:
    """`count` of `length` slices, evenly from the middle of the first share to that of the last; `wanted` are among them."""
    count = min(count, length)
    even = [int((i + 0.5) * length / count) for i in range(count)]
    for place in wanted:
        nearest = min(range(count), key=lambda i: abs(even[i] - place))
        even[nearest] = place
    return sorted(set(even))


def patch_of(place: int, axis: int, seen: Seen) -> int:
    """The patch that a slice lies in."""
    length, patches = seen.values.shape[axis], seen.grid[axis]
    if axis == 0 and seen.first_alone and patches > 1:
        return min(-(-place * (patches - 1) // (length - 1)), patches - 1)
    return min(place * patches // length, patches - 1)


def slice_of(patch: int, axis: int, seen: Seen) -> int:
    """The slice in the middle of a patch."""
    length = seen.values.shape[axis]
    inside = [place for place in range(length) if patch_of(place, axis, seen) == patch]
    return inside[len(inside) // 2] if inside else min(patch, length - 1)


def millimetres(seen: Seen) -> tuple[float, float, float]:
    """Of a voxel along D, H, W; where they are not known, such that patches are square."""
    if seen.spacing:
        d, h, w = seen.spacing
        return d, h, w
    d, h, w = (patches / length for patches, length in zip(seen.grid, seen.values.shape[:3], strict=True))
    return (1.0, 1.0, 1.0) if seen.flat else (d, h, w)


def extent(seen: Seen, plane: Plane, cell: int) -> tuple[int, int]:
    """(width, height) in pixels of the plane's pictures, such that the longest side of the volume has `cell`."""
    sides = [length * side for length, side in zip(seen.values.shape, millimetres(seen), strict=False)]
    scale = cell / max(sides[1:] if seen.flat else sides)
    return max(round(sides[plane.columns] * scale), 1), max(round(sides[plane.rows] * scale), 1)


def drawn(picture: np.ndarray, size: tuple[int, int], smooth: bool) -> np.ndarray:
    """uint8 [rows, columns(, 3)] resized to `size` (width, height): areas' means, or what is nearest."""
    method = Image.Resampling.BOX if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize(size, method))


def grey(picture: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Values -> uint8"""
    low, high = window
    scaled = (picture.astype(np.float32) - low) / max(high - low, 1e-12)
    return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)
