"""What a tower gets of a record's images, as pictures: the pixels, slices side by side, or planes of a prepared volume."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxmed.config import Experiment, VisualConfig
from jaxmed.data.inputs import TOKEN_KINDS, input_folder, input_path, is_placed, read_input, read_prepared
from jaxmed.errors import UserError
from jaxmed.report import page, view_input
from jaxmed.report.slices import HEIGHT, Picture
from jaxmed.report.view_planes import Plane, Seen, drawn, extent, grey, places, planes

TILES = 24
"""Slices that a picture shows at most"""
TILE = 72
"""Pixels of a slice's longer side there"""
SHOWN = (2, 1, 1)
"""Slices of each plane of a prepared volume"""


def panels(names: Sequence[str], experiment: Experiment) -> list[dict[str, Any]]:
    """One a file of a tower's input; [] for token files, which nothing can be seen of. Volumes have `views` and `facts`, other
    inputs a picture (`uri`) with its `caption`."""
    visual, folder = experiment.visual, input_folder(experiment.data, experiment.visual)
    if visual.kind in TOKEN_KINDS or not all(is_placed(folder, name) for name in names):
        return []
    made = []
    for name in names:
        panel = {"name": name, "uri": "", "caption": "", "fault": "", "views": [], "facts": [], "notices": ()}
        path = input_path(folder, name, visual)
        try:
            if visual.kind == "volumes":
                seen = view_input.of_prepared(path, read_prepared(path, visual), visual)
                made.append(panel | {"views": _views(seen), "facts": seen.facts, "notices": seen.notices})
                continue
            picture, caption = _picture(read_input(path, visual).values, visual)
            made.append(panel | {"uri": page.png(picture), "caption": caption})
        except UserError as error:
            made.append(panel | {"fault": str(error)})
    return made


def _picture(values: np.ndarray, visual: VisualConfig) -> tuple[np.ndarray, str]:
    """uint8 [rows, columns] or [rows, columns, 3], and what it shows."""
    if visual.kind == "pixels":
        seen = values * np.array(visual.pixels.sd) + np.array(visual.pixels.mean)
        return _bytes(seen), f"{values.shape[0]} × {values.shape[1]} pixels as the tower gets them"
    shown = np.linspace(0, len(values) - 1, min(len(values), TILES)).astype(int)
    size = " × ".join(str(n) for n in values.shape)
    return _tiles(values[shown]), f"{len(shown)} of {len(values)} slices, {size} as the tower gets them"


def _views(seen: Seen) -> list[Picture]:
    """Slices of the three planes, the same scale in all of them."""
    made = []
    for plane, count in zip(planes(seen), SHOWN, strict=True):
        length = seen.values.shape[plane.axis]
        made += [_view(seen, plane, place, length) for place in places(count, length)]
    return made


def _view(seen: Seen, plane: Plane, place: int, length: int) -> Picture:
    picture = drawn(grey(plane.cut(seen.values, place), seen.window), extent(seen, plane, HEIGHT), smooth=True)
    sides = plane.letters or ("", "", "", "")
    return Picture(page.png(picture), plane.name, sides, f"slice {place + 1} of {length}")


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def _tiles(slices: np.ndarray) -> np.ndarray:
    """[S, H, W] from 0 to 1 -> one picture, row by row"""
    count, height, width = slices.shape
    scale = TILE / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    columns = min(count, 8)
    sheet = np.zeros((math.ceil(count / columns) * size[1], columns * size[0]), np.uint8)
    for number, values in enumerate(slices):
        top, left = number // columns * size[1], number % columns * size[0]
        sheet[top : top + size[1], left : left + size[0]] = Image.fromarray(_bytes(values)).resize(size)
    return sheet
