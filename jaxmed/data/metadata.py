"""CT-RATE's metadata CSV: spacing and rescale of every volume, by `VolumeName`.

Upstream takes the spacing from this file alone and applies slope and intercept after nibabel has applied the header's.
"""

import csv
import math
import os
from dataclasses import dataclass

from jaxmed.errors import UserError

COLUMNS = ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")


@dataclass(frozen=True)
class VolumeMetadata:
    """One row of the CSV."""

    slope: float
    intercept: float
    spacing: tuple[float, float, float]
    """Millimetres along axes 0, 1, 2 of the array; the first number of XYSpacing counts for both axes, as upstream has it"""


class Metadata:
    """The rows of a CSV; a row is parsed when its volume is asked for, so that a bad row harms no other volume."""

    def __init__(self, path: str):
        self.path = path
        self._rows: dict[str, tuple[int, dict[str, str]]] = {}
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
                if missing:
                    raise UserError(f"{path}: no column {', '.join(missing)}; a metadata CSV needs {', '.join(COLUMNS)}")
                for row in reader:
                    self._rows.setdefault(_stem(row["VolumeName"] or ""), (reader.line_num, row))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; check --metadata") from None
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: not a readable CSV ({error})") from None

    def of(self, volume: str) -> VolumeMetadata:
        """The row of a volume, by file name; the folder does not count, nor does .nii against .nii.gz."""
        name = os.path.basename(volume)
        if _stem(name) not in self._rows:
            raise UserError(
                f"{volume}: {self.path} has no row for it, so its spacing and rescale are not known; "
                "add the row, or encode this volume without --metadata"
            )
        line, row = self._rows[_stem(name)]
        where = f"{self.path}: line {line} ({name})"
        spacing_xy = _number(where, "XYSpacing", row["XYSpacing"], first=True)
        spacing_z = _number(where, "ZSpacing", row["ZSpacing"])
        if spacing_xy <= 0 or spacing_z <= 0:
            raise UserError(f"{where}: spacing {spacing_xy:g} x {spacing_z:g} mm; it must be above 0, mend the row")
        slope = _number(where, "RescaleSlope", row["RescaleSlope"])
        if slope == 0:
            raise UserError(f"{where}: RescaleSlope is 0, which would make every voxel equal; mend the row")
        intercept = _number(where, "RescaleIntercept", row["RescaleIntercept"])
        return VolumeMetadata(slope, intercept, (spacing_xy, spacing_xy, spacing_z))


def _stem(name: str) -> str:
    return name.strip().removesuffix(".gz").removesuffix(".nii")


def _number(where: str, column: str, text: str | None, first: bool = False) -> float:
    """A finite number; with `first`, the first of a list such as "[0.68, 0.68]"."""
    part = (text or "").strip()
    if first:
        part = part.strip("[]() ").split(",")[0]
    try:
        value = float(part)
    except ValueError:
        raise UserError(f"{where}: {column} is {text!r}, not a number; mend the row") from None
    if not math.isfinite(value):
        raise UserError(f"{where}: {column} is {text!r}; it must be finite, mend the row")
    return value
