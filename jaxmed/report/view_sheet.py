"""The contact sheet of `jaxmed view` as one picture: facts and legend above, then the planes, beside each slice its maps.

Everything is drawn with Pillow at exact places: patches are seen as patches, and what is drawn can be checked pixel by pixel.
"""

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxmed.report import page
from jaxmed.report.view_features import Components, Grid
from jaxmed.report.view_planes import AXES, Plane, Seen, drawn, extent, grey, patch_of, places, planes, slice_of

CELL, CELL_ALONE = 224, 448
"""Pixels of a picture's longest side; of a picture that stands alone"""
MARGIN, GAP, LINE, CAPTION = 24, 14, 20, 20
TICKS = 20
"""Room for the numbers of the patches above and to the left of a map"""
RAMP = (80, 10)
BACK, INK, SOFT, AMBER = (22, 24, 29), (236, 238, 242), (150, 156, 168), (240, 184, 80)


@dataclass(frozen=True)
class Features:
    components: Components
    similarity: np.ndarray | None
    """[d, h, w] cosines, where a patch was chosen"""
    place: Grid = (0, 0, 0)
    """That patch"""


@dataclass(frozen=True)
class Tile:
    picture: np.ndarray
    """uint8 [rows, columns, 3]"""
    caption: str
    letters: tuple[str, ...] = ()
    ticks: bool = False
    box: tuple[int, int, int, int] = ()
    """Chosen patch in it: left, top, right, bottom"""


@dataclass(frozen=True)
class Band:
    plane: Plane
    units: list[list[Tile]]
    """One a slice: its picture and the maps beside it"""
    columns: int
    """Units side by side"""


def draw(seen: Seen, features: Features | None, slices: int) -> np.ndarray:
    """uint8 [rows, columns, 3]. `slices`: of the first plane (0: as many as suit); the others get half as many."""
    bands = [_band(seen, plane, features, slices, first=number == 0) for number, plane in enumerate(planes(seen))]
    width = max(MARGIN * 2 + max(_width(band) for band in bands), 720)
    head = _head(seen, features, width - 2 * MARGIN)
    height = MARGIN * 2 + head.height + sum(_height(band) for band in bands)
    sheet = Canvas(width, height)
    sheet.image.paste(head.image, (MARGIN, MARGIN))
    top = MARGIN + head.height
    for band in bands:
        _draw_band(sheet, seen, band, top)
        top += _height(band)
    return np.asarray(sheet.image)


# -- planes ----------------------------------------------------------------------------------------------------------------


def _band(seen: Seen, plane: Plane, features: Features | None, slices: int, first: bool) -> Band:
    length, patches = seen.values.shape[plane.axis], seen.grid[plane.axis]
    usual = 24 if seen.flat else 4 if features else 8
    count = slices or usual
    count = count if first else max(count // 2, 1)
    if features:
        wanted = [features.place[plane.axis]] if features.similarity is not None else []
        shown = [slice_of(patch, plane.axis, seen) for patch in places(count, patches, wanted)]
    else:
        shown = places(count, length)
    size = extent(seen, plane, CELL_ALONE if seen.flat and length == 1 else CELL)
    units = [_unit(seen, plane, place, features, size) for place in shown]
    columns = min(len(units), 2 if features else 6 if seen.flat else 4)
    return Band(plane, units, columns)


def _unit(seen: Seen, plane: Plane, place: int, features: Features | None, size: tuple[int, int]) -> list[Tile]:
    patch = patch_of(place, plane.axis, seen)
    name = f"{AXES[plane.axis]} {place}"
    tiles = []
    box = _box(seen, plane, patch, features, size)
    if 0 not in seen.values.shape:
        picture = _rgb(drawn(grey(plane.cut(seen.values, place), seen.window), size, smooth=True))
        tiles.append(Tile(picture, f"{name}, patch {patch}" if features else name, plane.letters, box=box))
    if features:
        colours = drawn(plane.cut(features.components.colours, patch), size, smooth=False)
        tiles.append(Tile(colours, "components" if tiles else f"patch {name}", ticks=True, box=box))
    if features and features.similarity is not None:
        tiles.append(Tile(drawn(heat(plane.cut(features.similarity, patch), features), size, False), "similarity", box=box))
    return tiles


def _rgb(picture: np.ndarray) -> np.ndarray:
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, -1)


def _box(seen: Seen, plane: Plane, patch: int, features: Features | None, size: tuple[int, int]) -> tuple[int, ...]:
    """Where the chosen patch lies in a picture of the plane; () where it does not."""
    if not features or features.similarity is None or features.place[plane.axis] != patch:
        return ()
    edges = []
    for axis, flipped, pixels in ((plane.columns, plane.flip_columns, size[0]), (plane.rows, plane.flip_rows, size[1])):
        place = features.place[axis]
        place = seen.grid[axis] - 1 - place if flipped else place
        edges.append((round(place * pixels / seen.grid[axis]), round((place + 1) * pixels / seen.grid[axis]) - 1))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


@cache
def _heat_table() -> np.ndarray:
    """[256, 3] uint8, dark to bright"""
    # matplotlib takes a while to import
    from matplotlib import colormaps

    return np.rint(colormaps["magma"](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)


def heat(values: np.ndarray, features: Features) -> np.ndarray:
    """Cosines as colours, from the lowest of the volume to 1."""
    low = float(features.similarity.min())
    return _heat_table()[np.rint(np.clip((values - low) / max(1 - low, 1e-9), 0, 1) * 255).astype(int)]


# -- drawing ---------------------------------------------------------------------------------------------------------------


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib  # brings a font with all the signs that are written here

    name = f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


@dataclass
class Canvas:
    width: int
    height: int
    image: Image.Image = field(init=False)

    def __post_init__(self):
        self.image = Image.new("RGB", (self.width, max(self.height, 1)), BACK)
        self.pen = ImageDraw.Draw(self.image)

    def text(self, at: tuple[float, float], text: str, colour: tuple = INK, size: int = 13, anchor: str = "la", **more) -> None:
        bold = more.pop("bold", False)
        self.pen.text(at, text, fill=colour, font=font(size, bold), anchor=anchor, **more)


def _draw_band(sheet: Canvas, seen: Seen, band: Band, top: int) -> None:
    title = f"{band.plane.name} ({AXES[band.plane.axis]})" if band.plane.name else ""
    sheet.text((MARGIN, top + 4), title, INK, 14, bold=True)
    for number, unit in enumerate(band.units):
        row, column = divmod(number, band.columns)
        left = MARGIN + column * (_unit_width(unit) + GAP)
        y = top + LINE + TICKS + row * (unit[0].picture.shape[0] + CAPTION + TICKS)
        for tile in unit:
            left += TICKS if tile.ticks else 0
            sheet.image.paste(Image.fromarray(tile.picture), (left, y))
            _decorate(sheet, seen, band.plane, tile, left, y)
            left += tile.picture.shape[1] + GAP // 2


def _decorate(sheet: Canvas, seen: Seen, plane: Plane, tile: Tile, left: int, top: int) -> None:
    height, width = tile.picture.shape[:2]
    sheet.text((left, top + height + 3), tile.caption, SOFT, 11)
    if tile.letters:
        west, east, north, south = tile.letters
        spots = ((3, height / 2, west, "lm"), (width - 3, height / 2, east, "rm"))
        spots += ((width / 2, 2, north, "ma"), (width / 2, height - 2, south, "md"))
        for x, y, letter, anchor in spots:
            sheet.text((left + x, top + y), letter, AMBER, 12, anchor, stroke_width=1, stroke_fill=(0, 0, 0))
    if tile.ticks:
        _ticks(sheet, seen.grid[plane.columns], plane.flip_columns, AXES[plane.columns], (left, top), width, across=True)
        _ticks(sheet, seen.grid[plane.rows], plane.flip_rows, AXES[plane.rows], (left, top), height, across=False)
    if tile.box:
        x0, y0, x1, y1 = tile.box
        for grown, colour in ((1, (0, 0, 0)), (0, (255, 255, 255))):
            sheet.pen.rectangle((left + x0 - grown, top + y0 - grown, left + x1 + grown, top + y1 + grown), outline=colour)


def _ticks(sheet: Canvas, patches: int, flipped: bool, name: str, at: tuple[int, int], pixels: int, across: bool) -> None:
    """Numbers of the patches along an edge, as many as there is room for; the first bears the name of the axis."""
    step = 2 ** max(math.ceil(math.log2(max((28 if across else 14) * patches / pixels, 1))), 0)
    for patch in range(0, patches, step):
        along = ((patches - 1 - patch if flipped else patch) + 0.5) * pixels / patches
        spot = (at[0] + along, at[1] - 2) if across else (at[0] - 3, at[1] + along)
        sheet.text(spot, f"{name}{patch}" if patch == 0 else str(patch), SOFT, 9, "md" if across else "rm")


def _unit_width(unit: list[Tile]) -> int:
    ticks = sum(TICKS for tile in unit if tile.ticks)
    return sum(tile.picture.shape[1] for tile in unit) + ticks + (len(unit) - 1) * (GAP // 2)


def _width(band: Band) -> int:
    return band.columns * _unit_width(band.units[0]) + (band.columns - 1) * GAP


def _height(band: Band) -> int:
    rows = math.ceil(len(band.units) / band.columns)
    return LINE + TICKS + rows * (band.units[0][0].picture.shape[0] + CAPTION + TICKS)


# -- head ------------------------------------------------------------------------------------------------------------------


def _lines(text: str, width: int, size: int) -> list[str]:
    """Words in lines that fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(size).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _head(seen: Seen, features: Features | None, width: int) -> Canvas:
    label = 150
    facts = [(name, line) for name, text in seen.facts for line in _lines(text, width - label, 13)]
    notices = [line for text in seen.notices for line in _lines(text, width, 13)]
    legend = _legend(features) if features else []
    head = Canvas(width, 32 + LINE * (len(facts) + len(notices) + len(legend)) + 8)
    head.text((0, 0), seen.name, INK, 18, bold=True)
    top, last = 32, ""
    for name, line in facts:
        head.text((0, top), "" if name == last else name, SOFT)
        head.text((label, top), line)
        top, last = top + LINE, name
    for line in notices:
        head.text((0, top), line, AMBER)
        top += LINE
    for name, parts in legend:
        head.text((0, top), name, SOFT)
        left = float(label)
        for part in parts:
            left = _part(head, part, left, top)
        top += LINE
    return head


def _part(head: Canvas, part: str | np.ndarray, left: float, top: int) -> float:
    """A ramp of colours or a text at `left`; where the next one begins."""
    if isinstance(part, str):
        head.text((left, top), part)
        return left + font(13).getlength(part) + 8
    ramp = Image.fromarray(part[None]).resize(RAMP, Image.Resampling.NEAREST)
    head.image.paste(ramp, (round(left), top + 4))
    return left + RAMP[0] + 6


def _legend(features: Features) -> list[tuple[str, list[str | np.ndarray]]]:
    up = np.linspace(0, 255, 60).astype(np.uint8)
    parts: list[str | np.ndarray] = []
    for number, (colour, share) in enumerate(zip(("red", "green", "blue"), features.components.shares, strict=True)):
        ramp = np.zeros((60, 3), np.uint8)
        ramp[:, number] = up
        parts += [ramp, f"{colour}: {page.share(share)}"]
    whole = page.share(sum(features.components.shares))
    about = f"together {whole} of the variance of its {len(features.components.scores):,} tokens"
    lines = [("Components", parts), ("", [about])]
    if features.similarity is not None:
        place = ",".join(map(str, features.place))
        low = f"{features.similarity.min():.2f}".replace("-", "−")
        lines.append(("Similarity", [low, _heat_table()[::4], f"1.00: cosine with the framed patch {place} (D,H,W)"]))
    return lines
