"""A folder of PNG or JPEG slices as one grey volume, as M3D-Cap's studies come: [Z, Y, X] uint8 (uint16 where the files have 16
bits), rows and columns as displayed.

Slices stand in the order of their whole-number names (2.png before 10.png); those of another size than most are dropped, and
colours become grey, as upstream's preparation does it. Nothing in such files says orientation, spacing or Hounsfield units.
"""

import os
from collections import Counter

import numpy as np

from jaxmed.data.images import image_size, load_grey
from jaxmed.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg")
SHOWN = 3
"""File names that a notice lists"""


def is_slice(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def check_folder(folder: str) -> None:
    """UserError for what names and heads of the files show."""
    _kept(folder)


def read_folder(folder: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The volume, and what should be said of it."""
    paths, notices = _kept(folder)
    first = load_grey(paths[0])
    volume = np.empty((len(paths), *first.shape), first.dtype)
    for number, path in enumerate(paths):
        plane = load_grey(path) if number else first
        if plane.dtype != first.dtype:
            raise UserError(
                f"{path}: {_bits(plane)} bits a pixel, {os.path.basename(paths[0])} has {_bits(first)}; save all alike"
            )
        if plane.shape != first.shape:
            raise UserError(f"{path}: {plane.shape} pixels, its header said {first.shape}; copy the file again")
        volume[number] = plane
    return volume, tuple(notices)


def _bits(plane: np.ndarray) -> int:
    return 8 * plane.dtype.itemsize


def _kept(folder: str) -> tuple[list[str], list[str]]:
    """Files in order, and notices."""
    numbered = _numbered(folder)
    paths = [os.path.join(folder, name) for _, name in numbered]
    shapes = [image_size(path) for path in paths]
    usual = Counter(shapes).most_common(1)[0][0]
    kept = [path for path, shape in zip(paths, shapes, strict=True) if shape == usual]
    notices = []
    if dropped := [os.path.basename(path) for path, shape in zip(paths, shapes, strict=True) if shape != usual]:
        names = ", ".join(dropped[:SHOWN]) + (", ..." if len(dropped) > SHOWN else "")
        notices.append(f"{len(dropped)} of {len(paths)} slices are not {usual[0]} x {usual[1]} pixels and left out ({names})")
    if len(kept) < 2:
        raise UserError(f"{folder}: a volume of one slice; at least two are needed")
    steps = np.diff([number for number, _ in numbered])
    holes = np.flatnonzero(steps > steps.min())
    if len(holes):
        notices.append(f"{len(holes)} hole(s) in the numbers of the slices (the first after {numbered[holes[0]][1]})")
    return kept, notices


def _numbered(folder: str) -> list[tuple[int, str]]:
    found: dict[int, str] = {}
    for name in sorted(filter(is_slice, os.listdir(folder))):
        stem = os.path.splitext(name)[0]
        if not (stem.isascii() and stem.isdigit()):
            raise UserError(f"{folder}: {name} has no whole number for a name, by which slices are put in order; rename it")
        if int(stem) in found:
            raise UserError(f"{folder}: {found[int(stem)]} and {name} have the same number; take one of them out")
        found[int(stem)] = name
    if len(found) < 2:
        raise UserError(f"{folder}: {'a volume of one slice' if found else 'no PNG or JPEG slices'}; at least two are needed")
    return sorted(found.items())
