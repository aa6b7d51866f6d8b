"""Three orthogonal slices of a CT volume as pictures, turned as a radiologist holds them, with the patient's sides named.

Arrays as stored are [X, Y, Z], the axes of the file; the affine says which way they run. For display they are turned to
(right to left, anterior to posterior, superior to inferior): the patient's right is on the viewer's left, nothing else changes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from jaxmed.errors import UserError
from jaxmed.report import page

HEIGHT = 224
"""Pixels of a picture along its longer side"""
_SIDES = {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I"), "sagittal": ("A", "P", "S", "I")}


@dataclass(frozen=True)
class Picture:
    uri: str
    name: str
    """`axial`, `coronal` or `sagittal`"""
    sides: tuple[str, str, str, str]
    """Letters at the left, right, top and bottom edge"""
    place: str
    """Which slice, in words"""


def orientation(path: str) -> np.ndarray:
    """How the axes of a file run, as nibabel's orientation array [3, 2] towards (L, P, I)."""
    towards = nibabel.orientations.axcodes2ornt(("L", "P", "I"))
    return nibabel.orientations.ornt_transform(nibabel.io_orientation(nibabel.load(path).affine), towards)


def _grey(values: np.ndarray, window: tuple[float, float], size_mm: tuple[float, float]) -> np.ndarray:
    """[columns, rows] values -> uint8 [rows, columns] with square pixels."""
    low, high = window
    picture = np.clip((values.T - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
    scale = HEIGHT / max(size_mm)
    width, height = (max(round(side * scale), 1) for side in size_mm)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def pictures(
    stored: np.ndarray,
    turn: np.ndarray,
    spacing: tuple[float, float, float],
    window: tuple[float, float],
    scale: tuple[float, float] = (1.0, 0.0),
) -> list[Picture]:
    """Middle slices of [X, Y, Z] numbers; `scale` (slope, intercept) turns them into what `window` is in, slice by slice."""
    turned = nibabel.orientations.apply_orientation(stored, turn)
    mm = np.empty(3)
    mm[turn[:, 0].astype(int)] = spacing
    made = []
    for name, axis in (("axial", 2), ("coronal", 1), ("sagittal", 0)):
        middle = turned.shape[axis] // 2
        values = np.take(turned, middle, axis).astype(np.float32) * scale[0] + scale[1]
        across, down = (side for side in range(3) if side != axis)
        size = (turned.shape[across] * mm[across], turned.shape[down] * mm[down])
        uri = page.png(_grey(values, window, size))
        made.append(Picture(uri, name, _SIDES[name], f"slice {middle + 1} of {turned.shape[axis]}"))
    return made


class VolumeFolder:
    """Finds the volume of a record: beside the folder's top files also in sub-folders, as CT-RATE keeps them."""

    def __init__(self, folder: str):
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: no such folder of volumes; check --volumes")
        self.folder = Path(folder)
        self._index: dict[str, str] = {}

    def find(self, image: str) -> str:
        """The path of the NIfTI that a record's `image` means, "" where it is not at hand. Names of token files serve too."""
        direct = self.folder / image
        if image.endswith((".nii", ".nii.gz")) and direct.is_file():
            return str(direct)
        if not self._index:
            for root, _, names in os.walk(self.folder):
                for name in sorted(names, reverse=True):  # .nii before .nii.gz
                    if name.endswith((".nii", ".nii.gz")):
                        self._index[_stem(name)] = os.path.join(root, name)
        return self._index.get(_stem(os.path.basename(image)), "")


def _stem(name: str) -> str:
    for ending in (".nii_embedded.npz", ".npz", ".nii.gz", ".nii"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name
