"""What the slices of a DICOM folder say of themselves, without their pixels, and which series of the folder is meant."""

import logging
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder
from pydicom.uid import UID

from jaxmed.errors import UserError

# pydicom logs the whole trace of a decoder that fails; what a person needs is told here.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
TAGS = [
    "SeriesInstanceUID",
    "SeriesDescription",
    "SeriesNumber",
    "InstanceNumber",
    "ImageType",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "RescaleSlope",
    "RescaleIntercept",
]
SHOWN = 3
"""File names that a notice lists"""
# What pydicom and its decoders raise for files that are damaged.
DAMAGE = (OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError)
DAMAGE += (NotImplementedError, MemoryError, struct.error)
_DECODERS = {
    "JPEG-LS": "pyjpegls",
    "JPEG 2000": "pylibjpeg pylibjpeg-openjpeg",
    "JPEG": "pylibjpeg pylibjpeg-libjpeg",
    "RLE": "pylibjpeg pylibjpeg-rle",
}
"""A word of a transfer syntax's name -> the packages of which one `pip install` makes pydicom decode it; the first that fits"""


@dataclass(frozen=True)
class Slice:
    path: str
    series: str
    """SeriesInstanceUID"""
    label: str
    """The series in words"""
    number: str
    """SeriesNumber"""
    instance: int
    """InstanceNumber, for messages and ties alone"""
    localizer: bool
    shape: tuple[int, int]
    """(rows, columns)"""
    position: np.ndarray
    """[3] millimetres to the left, back and head: the centre of the first pixel"""
    along_columns: np.ndarray
    """[3] unit vector in which the column number grows"""
    along_rows: np.ndarray
    """[3] unit vector in which the row number grows"""
    spacing: tuple[float, float]
    """Millimetres from row to row and from column to column"""
    thickness: float
    """Millimetres; 0: not said"""
    slope: float
    intercept: float
    inverted: bool
    """MONOCHROME1: small numbers are shown bright"""
    bits: int
    """Bits of a number that count"""
    dtype: np.dtype

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


def series_slices(folder: str, series: str) -> tuple[list[Slice], list[str]]:
    """The slices of the folder's one series, or of the one that `series` names, and what was left out, in words."""
    try:
        paths = sorted(entry.path for entry in os.scandir(folder) if not (entry.is_dir() or entry.name.startswith(".")))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check the folder of the volumes") from None
    heads = {path: _dataset(path) for path in paths}
    images = [head for head in heads.values() if head is not None and head.get("Rows")]
    if not images:
        raise UserError(
            f"{folder}: no DICOM image among its {len(paths)} files; give the folder that holds the slices themselves"
        )
    notices = []
    slices = [_slice(head) for head in _chosen(folder, images, series, notices)]
    if others := [os.path.basename(path) for path, head in heads.items() if head is None or not head.get("Rows")]:
        notices.append(f"{len(others)} file(s) that are no DICOM image are left out ({_some(others)})")
    if scouts := [one.name for one in slices if one.localizer]:
        slices = [one for one in slices if not one.localizer]
        notices.append(f"{len(scouts)} localizer image(s) left out ({_some(scouts)})")
    if not slices:
        raise UserError(f"{folder}: the series holds localizer images alone; give the folder of the volume")
    return slices, notices


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def pixels(one: Slice, invert: bool = False) -> np.ndarray:
    """[rows, columns] whole numbers as stored; `invert`: the largest become the smallest."""
    try:
        array = pydicom.dcmread(one.path, force=True).pixel_array
    except DAMAGE as error:
        raise UserError(f"{one.path}: its pixels cannot be read ({_brief(error)}); copy the file again") from None
    if array.shape != one.shape:
        raise UserError(f"{one.path}: its pixels have the shape {array.shape}, its header says {one.shape}; export it again")
    if invert:
        top = -1 if array.dtype.kind == "i" else 2**one.bits - 1
        array = (top - array.astype(np.int64)).astype(array.dtype)
    return array


def _dataset(path: str) -> Dataset | None:
    """The head of a DICOM file; None if it is something else. Old files lack the four letters at byte 128."""
    expected = path.lower().endswith((".dcm", ".dicom", ".ima"))
    try:
        try:
            head = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
        except InvalidDicomError:
            if not expected:
                return None
            head = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS, force=True)
        known = bool(head.get("SeriesInstanceUID"))
        image = getattr(head, "file_meta", {}).get("MediaStorageSOPClassUID", UID("")).keyword.endswith("ImageStorage")
    except DAMAGE as error:
        raise UserError(f"{path}: not a readable DICOM file ({_brief(error)}); copy it again") from None
    if expected and not known and not getattr(head, "file_meta", None):
        raise UserError(f"{path}: not a readable DICOM file; copy it again, or take it out of the folder")
    if image and not (known and head.get("Rows")):
        what = "Rows" if known else "SeriesInstanceUID"
        raise UserError(f"{path}: is an image and has no {what}; copy it again, or take it out of the folder")
    return head if known else None


def _chosen(folder: str, heads: Sequence[Dataset], series: str, notices: list[str]) -> list[Dataset]:
    """Those of one series. Others that cannot be a volume (a scout, a dose report) are no reason to ask which."""
    groups: dict[str, list[Dataset]] = {}
    for head in heads:
        groups.setdefault(str(head.SeriesInstanceUID), []).append(head)
    if len(groups) == 1 and not series:
        return list(heads)
    volumes = [uid for uid, group in groups.items() if any(map(_of_a_volume, group))]
    if len(volumes) == 1 and not series:
        left = [f"{_label(group[0])} with {len(group)} image(s)" for uid, group in groups.items() if uid != volumes[0]]
        notices.append(f"series that are no volume left out: {_some(left)}")
        return groups[volumes[0]]
    names = {uid: {uid, _text(group[0], "SeriesNumber"), _text(group[0], "SeriesDescription")} for uid, group in groups.items()}
    wanted = [uid for uid in groups if series and series in names[uid]]
    if len(wanted) == 1:
        return groups[wanted[0]]
    listed = "; ".join(f"{_label(group[0])} with {len(group)} images, {uid}" for uid, group in groups.items())
    if not series:
        raise UserError(
            f"{folder}: holds {len(groups)} series ({listed}); give each a folder of its own, or choose one by "
            "visual.prepare.series"
        )
    what = "no series" if not wanted else f"{len(wanted)} series"
    raise UserError(f"{folder}: {what} with the UID, number or description {series!r} (visual.prepare.series); holds {listed}")


def _of_a_volume(head: Dataset) -> bool:
    frames = _text(head, "NumberOfFrames") not in ("", "1")
    placed = all(head.get(name) for name in ("ImagePositionPatient", "ImageOrientationPatient"))
    return frames or (placed and not _is_localizer(head))


def _is_localizer(head: Dataset) -> bool:
    return "LOCALIZER" in [str(part).upper() for part in head.get("ImageType", None) or ()]


def _label(head: Dataset) -> str:
    number, description = _text(head, "SeriesNumber"), _text(head, "SeriesDescription")
    return f'"{description}"' + (f" (number {number})" if number else "") if description else f"number {number or '?'}"


def _text(head: Dataset, name: str) -> str:
    return str(head.get(name, "") or "").strip()


def _slice(head: Dataset) -> Slice:
    path = str(head.filename)
    packed = _is_packed(path, head)
    if int(_numbers(path, head, "NumberOfFrames", 1, 1.0)[0]) > 1:
        raise UserError(f"{path}: a multi-frame DICOM file; convert it with dcm2niix and give the NIfTI file")
    photometric = _text(head, "PhotometricInterpretation") or "MONOCHROME2"
    if _numbers(path, head, "SamplesPerPixel", 1, 1.0)[0] != 1 or not photometric.startswith("MONOCHROME"):
        raise UserError(f"{path}: {photometric} pixels; a CT slice holds one grey value a pixel")
    rows, columns = (int(_numbers(path, head, name, 1)[0]) for name in ("Rows", "Columns"))
    bits, stored, signed = (
        int(_numbers(path, head, name, 1, default)[0])
        for name, default in (("BitsAllocated", 16.0), ("BitsStored", 16.0), ("PixelRepresentation", 0.0))
    )
    if bits not in (8, 16, 32):
        raise UserError(f"{path}: {bits} bits a pixel; 8, 16 or 32 are read")
    if not packed and os.path.getsize(path) < rows * columns * bits // 8:
        raise UserError(f"{path}: is cut short; copy it again")
    directions = np.array(_numbers(path, head, "ImageOrientationPatient", 6)).reshape(2, 3)
    lengths = np.linalg.norm(directions, axis=1)
    if not (np.abs(lengths - 1) < 0.01).all() or abs(directions[0] @ directions[1]) > 0.01:
        raise UserError(f"{path}: ImageOrientationPatient {directions.ravel().tolist()} are no two directions at right angles")
    spacing = _numbers(path, head, "PixelSpacing", 2)
    if min(spacing) <= 0:
        raise UserError(f"{path}: PixelSpacing {spacing}; it must be above 0")
    slope = _numbers(path, head, "RescaleSlope", 1, 1.0)[0]
    if slope == 0:
        raise UserError(f"{path}: RescaleSlope is 0, which would make every pixel equal; export it again")
    return Slice(
        path,
        str(head.SeriesInstanceUID),
        _label(head),
        _text(head, "SeriesNumber"),
        int(_numbers(path, head, "InstanceNumber", 1, 0.0)[0]),
        _is_localizer(head),
        (rows, columns),
        np.array(_numbers(path, head, "ImagePositionPatient", 3)),
        directions[0] / lengths[0],
        directions[1] / lengths[1],
        (spacing[0], spacing[1]),
        _numbers(path, head, "SliceThickness", 1, 0.0)[0],
        slope,
        _numbers(path, head, "RescaleIntercept", 1, 0.0)[0],
        photometric == "MONOCHROME1",
        stored,
        np.dtype(f"{'i' if signed else 'u'}{bits // 8}"),
    )


def _is_packed(path: str, head: Dataset) -> bool:
    """Whether the file is smaller than its pixels. One whose decoder is not installed is refused with the package's name."""
    syntax = getattr(getattr(head, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is None:
        return False
    if not syntax.is_transfer_syntax:
        raise UserError(f"{path}: its transfer syntax {syntax} is not known; convert it with dcm2niix")
    if not syntax.is_encapsulated:
        return syntax.is_deflated
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        raise UserError(f"{path}: compressed as {syntax.name}, which nothing decodes; convert it with dcm2niix") from None
    if not available:
        package = next((package for word, package in _DECODERS.items() if word in syntax.name), "python-gdcm")
        raise UserError(f"{path}: compressed as {syntax.name}; pip install {package} lets pydicom decode it")
    return True


def _numbers(path: str, head: Dataset, name: str, count: int, default: float | None = None) -> list[float]:
    """The finite numbers of an element; `default` where the file has none."""
    try:
        value = head.get(name, None)
        if value is None or value == "":
            if default is None:
                raise UserError(
                    f"{path}: has no {name}; a slice without it has no place in a volume; export it again, or take it out"
                )
            return [default] * count
        found = [float(v) for v in (value if count > 1 else [value])]
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{path}: {name} cannot be read; export it again") from None
    if len(found) != count or not all(map(math.isfinite, found)):
        raise UserError(f"{path}: {name} is {found}; {count} finite number(s) are needed")
    return found


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
