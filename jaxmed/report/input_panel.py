"""What a tower gets of a record's images, as pictures: the pixels, or slices of the volume side by side."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxmed.config import Experiment, VisualConfig
from jaxmed.data.inputs import TOKEN_KINDS, input_folder, input_path, read_input
from jaxmed.errors import UserError
from jaxmed.report import page

TILES = 24
"""Slices that a picture shows at most"""
TILE = 72
"""Pixels of a slice's longer side there"""


def panels(names: Sequence[str], experiment: Experiment) -> list[dict[str, Any]]:
    """One a file of a tower's input; [] for token files, which nothing can be seen of."""
    visual, folder = experiment.visual, input_folder(experiment.data, experiment.visual)
    if visual.kind in TOKEN_KINDS or not folder:
        return []
    made = []
    for name in names:
        panel = {"name": name, "uri": "", "caption": "", "fault": ""}
        try:
            picture, caption = _picture(read_input(input_path(folder, name, visual), visual).values, visual)
            made.append(panel | {"uri": page.png(picture), "caption": caption})
        except UserError as error:
            made.append(panel | {"fault": str(error)})
    return made


def _picture(values: np.ndarray, visual: VisualConfig) -> tuple[np.ndarray, str]:
    """uint8 [rows, columns] or [rows, columns, 3], and what it shows."""
    if visual.kind == "pixels":
        seen = values * np.array(visual.pixels.sd) + np.array(visual.pixels.mean)
        return _bytes(seen), f"{values.shape[0]} × {values.shape[1]} pixels as the tower gets them"
    if visual.kind == "volumes":
        values = values[..., 0]
        values = (values - values.min()) / max(values.max() - values.min(), 1e-8)
    shown = np.linspace(0, len(values) - 1, min(len(values), TILES)).astype(int)
    size = " × ".join(str(n) for n in values.shape)
    return _tiles(values[shown]), f"{len(shown)} of {len(values)} slices, {size} as the tower gets them"


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
