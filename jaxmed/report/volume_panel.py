"""A volume as the model gets it: three slices after preprocessing, a histogram of its Hounsfield units, and their rule.

Where the rule refuses to choose, every possible reading is shown, for a person to settle it with --hu.
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.config import EncodeConfig
from jaxmed.data.metadata import Metadata, VolumeMetadata
from jaxmed.data.volumes import AIR_HU, AIR_WIDTH, Override, Volume, preprocess, read_volume
from jaxmed.errors import UserError
from jaxmed.report import slices

SPAN = (-1200.0, 1600.0)
"""Hounsfield units of the histogram's axis; what lies beyond counts in the outermost bars"""
BINS = 112
VOXELS = 2_000_000
"""About as many voxels go into a histogram, evenly picked"""


@dataclass(frozen=True)
class Panel:
    name: str
    reading: str
    """header, csv or none"""
    rule: str
    """Why this reading was taken"""
    views: list[slices.Picture]
    histogram: dict[str, Any]
    facts: list[tuple[str, str]]


def _at(value: float) -> float:
    """Place on the histogram's axis in percent."""
    return 100 * (min(max(value, SPAN[0]), SPAN[1]) - SPAN[0]) / (SPAN[1] - SPAN[0])


def histogram(volume: Volume, config: EncodeConfig) -> dict[str, Any]:
    """Bars in percent of the plot, heights by the logarithm of the count (air would dwarf everything else)."""
    step = max(int(np.ceil((volume.stored.size / VOXELS) ** (1 / 3))), 1)
    picked = volume.stored[::step, ::step, ::step] * volume.reading.slope + volume.reading.intercept
    counts, edges = np.histogram(np.clip(picked, *SPAN), BINS, SPAN)
    heights = 100 * np.log1p(counts) / np.log1p(max(counts.max(), 1))
    bars = [
        {"x": _at(edge), "h": float(height), "from": round(float(edge)), "share": count / picked.size}
        for edge, height, count in zip(edges, heights, counts, strict=False)
    ]
    low, high = config.hu_range
    ticks = [(_at(value), f"{value}".replace("-", "−")) for value in range(-1000, 1501, 500)]
    shown = {"kept": (_at(low), _at(high) - _at(low)), "air": (_at(AIR_HU - AIR_WIDTH), _at(AIR_HU + AIR_WIDTH))}
    return {
        "bars": bars,
        "width": 100 / BINS,
        "ticks": ticks,
        **shown,
        "clipped": float(((picked < low) | (picked > high)).mean()),
    }


def _panel(path: str, volume: Volume, config: EncodeConfig) -> Panel:
    # [D, H, W] back to the file's axes: D is axis 2, H axis 0, W axis 1.
    voxels = preprocess(volume, config).transpose(1, 2, 0)
    views = slices.pictures(voxels, slices.orientation(path), config.spacing, (-1.0, 1.0))
    reading = volume.reading

    def joined(values: tuple[float, ...]) -> str:
        return " × ".join(f"{value:g}" for value in values)

    neutral = (reading.slope, reading.intercept) == (1, 0)
    scaling = "the stored numbers as they are" if neutral else f"{reading.slope:g} × stored {reading.intercept:+g}"
    facts = [
        ("In the file", f"{joined(volume.stored.shape)} voxels of {joined(volume.spacing)} mm, {volume.stored.dtype}"),
        ("As the model gets it", f"{joined(config.canvas)} of {joined(config.spacing)} mm, {_range(config)} HU"),
        ("Hounsfield units", scaling.replace("-", "−")),
        ("Air", f"{100 * reading.air:.1f}% of the voxels"),
    ]
    return Panel(os.path.basename(path), reading.name, reading.chosen, views, histogram(volume, config), facts)


def _range(config: EncodeConfig) -> str:
    return f"{config.hu_range[0]:g} to {config.hu_range[1]:g}".replace("-", "−")


def panels(path: str, metadata: Metadata | None, override: Override, config: EncodeConfig) -> tuple[list[Panel], str]:
    """One panel, or one for each possible reading together with why none was chosen."""
    row = metadata.of(path) if metadata else None
    try:
        return [_panel(path, read_volume(path, row, override), config)], ""
    except UserError as error:
        if override != "auto":
            raise
        return [_panel(path, volume, config) for volume in _readings(path, row)], str(error)


def _readings(path: str, row: VolumeMetadata | None) -> list[Volume]:
    """The volume under every reading; raises what is wrong with the file if it isn't the choice."""
    names: list[Override] = ["header", "csv"] if row else ["header"]
    return [read_volume(path, row, name) for name in names]
