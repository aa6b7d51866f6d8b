"""Weight-free 3-D Haar transforms of a preprocessed volume.

`patch` is the first stage of BTB3D's own encoder: one level over 2x2x2 cells, the first slice duplicated.
`encode` makes the tokens of a file out of several levels. Its features are named:

    LLH4     a Haar coefficient; letters for depth, rows, columns, L the mean and H the difference of a pair; 4 is the level.
             Of a level before the last: the mean over the token's block
    |LLH3|   the magnitude, mean over the token's block (texture and edges that cancel in LLH3)
    max3     the largest average LLL3 in the token's block; max0 is the largest voxel
    min3     the smallest
    dev3     the mean absolute deviation of LLL3 from the block's average

The coefficients are linear in the voxels; magnitudes, extremes and deviations are not, and no decoder can undo them.
Along an axis with fewer levels than another the *first* levels are left out, so that the last ones are in 3-D.
A depth that 2**levels does not divide is completed by repeating the first slice, as `patch` does (241 slices and three
levels give 31 tokens, of which the first sees the first slice alone).

Axis letters: [D, H, W] voxels, D depth (z), H rows (x), W columns (y); [C, T, h, w] tokens. Letters of a band: (T, h, w).
"""

import functools
import itertools
import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxmed.config import ConfigError, EncodeConfig

DETAILS = ("LLH", "LHL", "LHH", "HLL", "HLH", "HHL", "HHH")
ORDER = ("LLL", *DETAILS)
_NAME = re.compile(
    r"(?P<letters>[LH]{3})(?P<level>\d)|\|(?P<magnitude>[LH]{3})(?P<mlevel>\d)\||(?P<kind>max|min|dev)(?P<klevel>\d)"
)


@dataclass(frozen=True)
class Band:
    """One feature of a token."""

    kind: Literal["mean", "magnitude", "max", "min", "dev"]
    letters: str
    level: int


def parse_band(name: str) -> Band:
    match = _NAME.fullmatch(name)
    if not match:
        raise ConfigError(f"encode.bands has {name!r}; a band is named like LLH2, |LLH1|, max1, min1 or dev1")
    if match["letters"]:
        return Band("mean", match["letters"], int(match["level"]))
    if match["magnitude"]:
        return Band("magnitude", match["magnitude"], int(match["mlevel"]))
    return Band(match["kind"], "LLL", int(match["klevel"]))


def default_bands(levels: tuple[int, int, int]) -> tuple[str, ...]:
    """The last level's coefficients; of the level before, magnitudes of the details and spread of the averages."""
    last = max(levels)
    axes = _axes(levels, last - 1) if last > 1 else ()
    existing = [b for b in DETAILS if last > 1 and all(a in axes or letter == "L" for a, letter in enumerate(b))]
    magnitudes = [f"|{letters}{last - 1}|" for letters in existing]
    coefficients = [f"{b}{last}" for b in ORDER if all(a in _axes(levels, last) or x == "L" for a, x in enumerate(b))]
    return (*coefficients, *magnitudes, *(f"{kind}{last - 1}" for kind in ("max", "min", "dev")))


def band_names(config: EncodeConfig) -> tuple[str, ...]:
    return config.bands or default_bands(config.levels)


def check_bands(config: EncodeConfig) -> None:
    """ConfigError for a band that the levels do not give."""
    _parsed(band_names(config), config.levels)


def signature(config: EncodeConfig) -> str:
    """The `encoder` of a file: everything that its tokens depend on but the volume."""

    def joined(values: tuple[float, ...] | tuple[str, ...]) -> str:
        return ",".join(v if isinstance(v, str) else f"{v:g}" for v in values)

    parts = {
        "levels": joined(config.levels),
        "canvas": joined(config.canvas),
        "mm": joined(config.spacing),
        "hu": joined(config.hu_range),
        "bands": joined(band_names(config)),
    }
    return "haar3d-nonlinear/1 " + " ".join(f"{key}={value}" for key, value in parts.items())


def token_shape(config: EncodeConfig) -> tuple[int, int, int, int]:
    """(C, T, h, w) of a file."""
    height, width, depth = config.canvas
    t, h, w = (-(-n // 2**k) for n, k in zip((depth, height, width), config.levels, strict=True))
    return len(band_names(config)), t, h, w


def split(x: np.ndarray, axes: tuple[int, ...], details: bool = True) -> dict[str, np.ndarray]:
    """One level over disjoint pairs along `axes`: band -> half-size array. L is (a + b) / 2, H is (a - b) / 2.

    Without `details` there is LLL alone.
    """
    bands = {"": x}
    for axis in (0, 1, 2):
        if axis not in axes:
            bands = {name + "L": value for name, value in bands.items()}
            continue
        halves = {}
        for name, value in bands.items():
            first = value[(slice(None),) * axis + (slice(0, None, 2),)]
            second = value[(slice(None),) * axis + (slice(1, None, 2),)]
            halves[name + "L"] = (first + second) * np.float32(0.5)
            if details:
                halves[name + "H"] = (first - second) * np.float32(0.5)
        bands = halves
    return bands


def patch(x: np.ndarray) -> np.ndarray:
    """[D, H, W], D odd -> [8, (D + 1) / 2, H / 2, W / 2], bands in the order of ORDER.

    The first slice is duplicated: the pairs along depth are (x0, x0), (x1, x2), (x3, x4), ...
    """
    if x.shape[0] % 2 == 0 or x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(f"the patcher takes an odd depth and even rows and columns, got {x.shape}")
    bands = split(np.concatenate([x[:1], x]), (0, 1, 2))
    return np.stack([bands[name] for name in ORDER])


def encode(x: np.ndarray, config: EncodeConfig) -> np.ndarray:
    """[D, H, W] as `volumes.preprocess` gives it -> [C, T, h, w] float32, C the bands."""
    wanted = _parsed(band_names(config), config.levels)
    depth_missing = -x.shape[0] % 2 ** config.levels[0]
    if depth_missing:
        x = np.concatenate([np.repeat(x[:1], depth_missing, axis=0), x])
    needed = {(band.letters, band.level) for band in wanted}
    kept = {("LLL", 0): x} if ("LLL", 0) in needed else {}
    average = x
    for level in range(1, max(config.levels) + 1):
        details = any(name != "LLL" and at == level for name, at in needed)
        bands = split(average, _axes(config.levels, level), details)
        average = bands["LLL"]
        kept.update({(name, level): value for name, value in bands.items() if (name, level) in needed})
    out = np.empty((len(wanted), *average.shape), np.float32)
    for row, band in zip(out, wanted, strict=True):
        row[...] = _over_block(kept[band.letters, band.level], average, band.kind)
    return out


def _over_block(value: np.ndarray, average: np.ndarray, kind: str) -> np.ndarray:
    """Reduce the entries of each token's block to one; `average` is the block's own."""
    if value.shape == average.shape and kind == "mean":
        return value
    if kind == "magnitude":
        value, kind = np.abs(value), "mean"
    cells = [(n, v // n) for n, v in zip(average.shape, value.shape, strict=True)]
    if kind == "dev":
        (t, p0), (h, p1), (w, p2) = cells
        blocks = value.reshape(t, p0, h, p1, w, p2) - average[:, None, :, None, :, None]
        value, kind = np.abs(blocks).reshape(value.shape), "mean"
    pairwise = {"mean": np.add, "max": np.maximum, "min": np.minimum}[kind]
    for axis, (_, size) in enumerate(cells):
        # Strided slices, one for each place in the block, are several times faster than a reduction over small axes.
        places = [value[(slice(None),) * axis + (slice(i, None, size),)] for i in range(size)]
        value = functools.reduce(pairwise, places)
    return value * np.float32(1 / math.prod(size for _, size in cells)) if kind == "mean" else value


def _axes(levels: tuple[int, int, int], level: int) -> tuple[int, ...]:
    """Axes that are halved at a level (1 the first)."""
    return tuple(axis for axis in range(3) if level > max(levels) - levels[axis])


@functools.lru_cache
def _parsed(names: tuple[str, ...], levels: tuple[int, int, int]) -> tuple[Band, ...]:
    """Bands, checked against the levels: one that cannot exist is an error that lists those that can."""
    bands = tuple(parse_band(name) for name in names)
    for name, band in zip(names, bands, strict=True):
        known = 0 <= band.level <= max(levels)
        halved = _axes(levels, band.level) if band.level else ()
        if not known or any(letter == "H" and axis not in halved for axis, letter in enumerate(band.letters)):
            possible = ["".join(p) for p in itertools.product("LH", repeat=3)]
            raise ConfigError(
                f"encode.bands has {name!r}, which encode.levels {levels} do not give; levels go from 1 to {max(levels)} "
                f"(0: voxels), letters are {possible[0]} to {possible[-1]}, H only along axes halved at that level"
            )
    return bands
