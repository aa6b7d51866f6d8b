"""The Hounsfield rule: which scaling turns a file's stored numbers into Hounsfield units.

The header's scaling is applied first. Then the metadata's slope and intercept would follow; but files that are in HU already
(CT-RATE's second release) must not be rescaled again. Of the two readings exactly one must have air; two that are the same
function are one. `override` settles it by hand.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxmed.data.metadata import VolumeMetadata
from jaxmed.data.nifti import Header
from jaxmed.errors import UserError

AIR_HU = -1000.0
AIR_WIDTH = 60.0
AIR_SHARE = 0.02
SOFT_TISSUE = (40.0, 60.0)
LARGEST = 1e30
"""No unit of a CT reaches it, and float32 overflows at differences of larger numbers"""
Override = Literal["auto", "header", "csv", "none"]


@dataclass(frozen=True)
class Reading:
    """How stored numbers become Hounsfield units: slope * stored + intercept."""

    name: Literal["header", "csv", "none"]
    slope: float
    intercept: float
    air: float
    """Share of the voxels that are air under this reading"""
    chosen: str
    """Why it was taken, in words"""


def scaled_ends(path: str, stored: np.ndarray, slope: float, intercept: float) -> tuple[np.float32, np.float32]:
    """The smallest and the largest voxel, computed as all of them are: the smallest equals itself. UserError where they are no
    numbers of a CT."""
    with np.errstate(over="ignore"):
        low, high = np.sort(np.array([stored.min(), stored.max()], stored.dtype) * slope + intercept)
    if not max(abs(low), abs(high)) < LARGEST:
        raise UserError(f"{path}: scaled voxels from {low:.3g} to {high:.3g} are no CT; check them and the header's scaling")
    return np.float32(low), np.float32(high)


def share_near(stored: np.ndarray, slope: float, intercept: float, centre: float, width: float) -> float:
    """Share of the voxels within centre ± width HU. Bounds are carried back to stored numbers: no scaled copy is made."""
    ends = sorted((centre + side * width - intercept) / slope for side in (-1, 1))
    low, high = (np.float64(end) for end in ends)
    if stored.dtype.kind in "iu":
        info = np.iinfo(stored.dtype)
        low, high = max(math.ceil(low), info.min), min(math.floor(high), info.max)
        if low > high:
            return 0.0
    return float(np.count_nonzero((stored >= low) & (stored <= high)) / stored.size)


def air_share(stored: np.ndarray, slope: float, intercept: float) -> float:
    return share_near(stored, slope, intercept, AIR_HU, AIR_WIDTH)


def choose_reading(stored: np.ndarray, header: Header, metadata: VolumeMetadata | None, override: Override) -> Reading:
    """The Hounsfield rule (see the module's docstring)."""
    readings = {"header": (header.slope, header.intercept)}
    if metadata:
        # The metadata's scaling is applied to what the header's gave, as published code does it.
        readings["csv"] = (header.slope * metadata.slope, metadata.slope * header.intercept + metadata.intercept)
    if override == "none":
        return Reading("none", 1.0, 0.0, air_share(stored, 1.0, 0.0), "stored numbers taken as HU, as asked")
    if override != "auto":
        if override not in readings:
            raise UserError(f"{header.path}: --hu csv needs the rescale of a metadata CSV; pass --metadata")
        slope, intercept = readings[override]
        return Reading(override, slope, intercept, air_share(stored, slope, intercept), f"{override}, as asked")
    air = {name: air_share(stored, *scaling) for name, scaling in readings.items()}
    with_air = [name for name in readings if air[name] >= AIR_SHARE]
    agree = len(with_air) == 2 and readings["csv"] == readings["header"]
    if len(with_air) == 1 or agree:
        name = with_air[0]
        words = {"header": "the header's scaling alone gives air", "csv": "the header's scaling, then the CSV's gives air"}
        why = "header and CSV agree" if agree else words[name]
        return Reading(name, *readings[name], air[name], why)
    shares = ", ".join(f"{name} {air[name]:.1%} ({slope:g}v{intercept:+g})" for name, (slope, intercept) in readings.items())
    fault = "no reading of its numbers gives air" if not with_air else "two different readings of its numbers give air"
    raise UserError(
        f"{header.path}: {fault} (share of voxels within {AIR_HU:g}±{AIR_WIDTH:g} HU, at least {AIR_SHARE:.0%} needed: "
        f"{shares}); {_advice(stored, {name: readings[name] for name in with_air})}"
    )


def _advice(stored: np.ndarray, candidates: dict[str, tuple[float, float]]) -> str:
    """Rescaling HU by -1024 once more moves soft tissue to where air was: the wrong one of two readings has no tissue."""
    tissue = [n for n, scaling in candidates.items() if share_near(stored, *scaling, *SOFT_TISSUE) >= AIR_SHARE]
    if len(tissue) == 1:
        return f"only {tissue[0]} gives soft tissue as well, so --hu {tissue[0]} is likely right; look at it with preview"
    return "look at it with preview, then pass --hu header, csv or none"
