"""A DICOM series as one volume: slices sorted along their normal, checked, stacked.

Order and spacing come from ImagePositionPatient, never from file names, numbers or SliceThickness. Refused: a lost slice,
uneven spacing, different slices at one place, slices of several sizes or directions. Mended with a notice: the same slice
twice, a tilted gantry (the slices are moved in their planes until they stand over each other). Said: slices that overlap.

Axis letters: [X, Y, Z], columns, rows and slices; Z along cross(columns, rows).
"""

from dataclasses import dataclass

import numpy as np

from jaxmed.data.dicom_heads import Slice, pixels, series_slices
from jaxmed.data.hounsfield import AIR_SHARE, air_share
from jaxmed.errors import UserError

UNEVEN = 0.1
"""Of the distance between slices; more is refused"""
WORTH_SAYING = 0.01
LOST = 1.5
"""Times the smallest distance: from here on slices are missing in between"""
LOOKED_AT = 8
"""Slices from which it is told whether numbers are inverted"""
DRIFT = 0.5
"""Pixels that the stack may lean as a whole before it is straightened"""


@dataclass(frozen=True)
class Series:
    values: np.ndarray
    """[X, Y, Z] numbers as stored; float32 Hounsfield units where the slices' scalings differ"""
    affine: np.ndarray
    """[4, 4] indices -> millimetres to the right, front and head"""
    spacing: tuple[float, float, float]
    slope: float
    intercept: float
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """Slices in order, each with others at the same place."""

    places: list[list[Slice]]
    normal: np.ndarray
    distance: float
    """Millimetres from slice to slice"""
    leans: np.ndarray
    """[Z, 2] pixels (columns, rows) by which each slice stands beside the middle one"""
    notices: list[str]

    @property
    def first(self) -> Slice:
        return self.places[0][0]


def check_series(folder: str, series: str) -> None:
    """UserError for what the slices' heads show."""
    _stack(folder, series)


def read_series(folder: str, series: str) -> Series:
    stack = _stack(folder, series)
    notices = list(stack.notices)
    kept = _without_repeats(folder, stack, notices)
    scalings = {(one.slope, one.intercept) for one in kept}
    dtype = np.result_type(*{one.dtype for one in kept})
    tilted = bool(np.abs(stack.leans).max() > 0)
    invert = _says_inverted(kept, notices)
    rows, columns = stack.first.shape
    planes = np.empty((len(kept), rows, columns), dtype if len(scalings) == 1 and not tilted else np.float32)
    for number, one in enumerate(kept):
        plane = pixels(one, invert)
        if len(scalings) > 1:
            plane = plane * one.slope + one.intercept
        if tilted:
            plane = _moved(_moved(plane.astype(np.float32), stack.leans[number, 0], 1), stack.leans[number, 1], 0)
        planes[number] = plane
    slope, intercept = scalings.pop() if len(scalings) == 1 else (1.0, 0.0)
    spacing = (stack.first.spacing[1], stack.first.spacing[0], stack.distance)
    return Series(planes.transpose(2, 1, 0), _affine(stack), spacing, slope, intercept, tuple(notices))


def _says_inverted(kept: list[Slice], notices: list[str]) -> bool:
    """Whether the numbers of MONOCHROME1 are to be inverted. It tells how they are shown; where the scaling makes Hounsfield
    units of them as they are, they stay: of the two readings the one that has air counts, as everywhere."""
    if not kept[0].inverted:
        return False
    some = kept[:: max(len(kept) // LOOKED_AT, 1)]

    def air(invert: bool) -> float:
        return float(np.mean([air_share(pixels(one, invert), one.slope, one.intercept) for one in some]))

    as_stored = air(False) >= AIR_SHARE > air(True)
    notices.append(f"MONOCHROME1: grey values are {'left as they are, their air is dark' if as_stored else 'inverted'}")
    return not as_stored


def _stack(folder: str, series: str) -> Stack:
    slices, notices = series_slices(folder, series)
    normal = _same_planes(folder, slices)
    slices.sort(key=lambda one: (float(one.position @ normal), one.instance, one.name))
    heights = np.array([float(one.position @ normal) for one in slices])
    steps = np.diff(heights)
    apart = steps[steps > 1e-3]
    if not len(apart):
        raise UserError(f"{folder}: a series of one slice; a volume needs at least two")
    same = max(1e-3, WORTH_SAYING * float(np.median(apart)))
    places: list[list[Slice]] = [[slices[0]]]
    for one, step in zip(slices[1:], steps, strict=True):
        if step <= same:
            places[-1].append(one)
        else:
            places.append([one])
    distance = _even(folder, places, normal, notices)
    leans = _leans(places, normal, distance, notices)
    thickness = slices[0].thickness
    if thickness > distance * (1 + UNEVEN):
        notices.append(f"slices of {thickness:g} mm every {distance:.4g} mm overlap; their positions count")
    elif 0 < thickness < distance * (1 - UNEVEN):
        notices.append(f"slices of {thickness:g} mm every {distance:.4g} mm leave gaps; their positions count")
    return Stack(places, normal, distance, leans, notices)


def _same_planes(folder: str, slices: list[Slice]) -> np.ndarray:
    """The normal of all slices; UserError where they do not make one stack."""
    first = slices[0]
    for one in slices:
        where = f"{folder}: {first.name} and {one.name}"
        if one.shape != first.shape:
            raise UserError(f"{where} have {first.shape} and {one.shape} pixels; give the slices of one volume alone")
        turned = max(np.abs(one.along_columns - first.along_columns).max(), np.abs(one.along_rows - first.along_rows).max())
        if turned > 1e-3:
            raise UserError(f"{where} lie in different directions; give the slices of one volume alone")
        if not np.allclose(one.spacing, first.spacing, rtol=1e-3):
            raise UserError(f"{where} have pixels of {first.spacing} and {one.spacing} mm; give the slices of one volume alone")
        if one.inverted != first.inverted:
            raise UserError(f"{where}: only one of them is MONOCHROME1; export the series again")
    return np.cross(first.along_columns, first.along_rows)


def _even(folder: str, places: list[list[Slice]], normal: np.ndarray, notices: list[str]) -> float:
    """The distance from slice to slice."""
    heights = np.array([float(group[0].position @ normal) for group in places])
    steps = np.diff(heights)
    usual, smallest = float(np.median(steps)), float(steps.min())
    at = int(np.argmax(steps))
    between = f"between {places[at][0].name} and {places[at + 1][0].name}"
    whole = steps / smallest
    if steps[at] >= LOST * smallest and np.abs(whole - np.rint(whole)).max() < UNEVEN * 2:
        lost = int(np.rint(whole - 1).sum())
        raise UserError(
            f"{folder}: {lost} slice(s) lost: {steps[at]:.4g} mm {between}, {smallest:.4g} mm elsewhere; copy the series again"
        )
    off = float(np.abs(steps - usual).max()) / usual
    if off > UNEVEN:
        raise UserError(
            f"{folder}: its slices are {smallest:.4g} to {steps[at]:.4g} mm apart ({steps[at]:.4g} mm {between}); slices are "
            "lost, or several stacks are mixed: give one evenly spaced stack"
        )
    if off > WORTH_SAYING:
        notices.append(f"slices are {smallest:.4g} to {steps[at]:.4g} mm apart and taken as even")
    return float((heights[-1] - heights[0]) / (len(heights) - 1))


def _leans(places: list[list[Slice]], normal: np.ndarray, distance: float, notices: list[str]) -> np.ndarray:
    first, middle = places[0][0], places[len(places) // 2][0]
    offsets = np.array([group[0].position - middle.position for group in places])
    leans = np.stack([offsets @ first.along_columns / first.spacing[1], offsets @ first.along_rows / first.spacing[0]], axis=1)
    if np.ptp(leans, axis=0).max() <= DRIFT:
        return np.zeros_like(leans)
    lean = offsets[-1] - offsets[0]
    angle = np.degrees(np.arctan2(np.linalg.norm(lean - (lean @ normal) * normal), abs(float(lean @ normal))))
    notices.append(f"gantry tilted by {angle:.1f} degrees: slices are moved in their planes to stand over each other")
    return leans


def _without_repeats(folder: str, stack: Stack, notices: list[str]) -> list[Slice]:
    """One slice a place; those that lie there as well must hold the same pixels."""
    dropped = 0
    for group in stack.places:
        for other in group[1:]:
            same = (other.slope, other.intercept) == (group[0].slope, group[0].intercept)
            if not same or not np.array_equal(pixels(group[0]), pixels(other)):
                raise UserError(
                    f"{folder}: {group[0].name} and {other.name} are different slices at the same place; leave one acquisition "
                    "(phase) alone in the folder"
                )
            dropped += 1
    if dropped:
        notices.append(f"{dropped} slice(s) are there twice, with the same pixels; one of each is taken")
    return [group[0] for group in stack.places]


def _moved(plane: np.ndarray, by: float, axis: int) -> np.ndarray:
    """The slice moved by so many pixels, between pixels linearly; what comes in is the darkest of the slice."""
    if by == 0:
        return plane
    plane = np.moveaxis(plane, axis, 0)
    source = np.arange(len(plane)) - by
    low = np.floor(source).astype(np.int64)
    weight = (source - low).astype(np.float32)[:, None]
    padded = np.concatenate([plane, np.full_like(plane[:1], plane.min())])  # index -1 and beyond: outside
    outside = len(plane)

    def at(index: np.ndarray) -> np.ndarray:
        return padded[np.where((index >= 0) & (index < outside), index, outside)]

    return np.moveaxis(at(low) * (1 - weight) + at(low + 1) * weight, 0, axis)


def _affine(stack: Stack) -> np.ndarray:
    """DICOM's axes go to the left and back, NIfTI's to the right and front."""
    middle = len(stack.places) // 2
    first = stack.first
    affine = np.eye(4)
    affine[:3, 0] = first.along_columns * first.spacing[1]
    affine[:3, 1] = first.along_rows * first.spacing[0]
    affine[:3, 2] = stack.normal * stack.distance
    affine[:3, 3] = stack.places[middle][0].position - middle * affine[:3, 2]
    affine[:2] *= -1
    return affine
