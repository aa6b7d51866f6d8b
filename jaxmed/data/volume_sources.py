"""Every form in which a CT volume lies on disk, behind one reader; orientation to one convention.

    a file .nii, .nii.gz               [X, Y, Z] as stored, affine of the header
    a folder with a DICOM series       [X, Y, Z] columns, rows, slices, affine of the slices' positions
    a folder of PNG or JPEG slices     [X, Y, Z] columns, rows, files; no affine
    a file .npy                        prepared already; not read here

`view` turns them: "radiological" is (Z, Y, X), Z growing to the head, Y to the back, X to the patient's left, so that a slice
shown row by row has the front above and the patient's right on the left, as in the images that M3D-CLIP saw. Axes are
exchanged and mirrored, never resampled: an oblique volume takes the nearest axes. Slice folders are that way already.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import nibabel
import numpy as np

from jaxmed.config import PrepareConfig
from jaxmed.data import nifti, slice_folders
from jaxmed.data.nifti import Header
from jaxmed.errors import UserError

Kind = Literal["prepared", "nifti", "dicom", "slices"]
Axes = Literal["radiological", "zyx", "zxy"]
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
RADIOLOGICAL = ("L", "P", "S")
OBLIQUE = 15.0
"""Degrees between a volume's axes and the body's from which it is said"""


@dataclass(frozen=True)
class RawVolume:
    header: Header
    stored: np.ndarray
    """[X, Y, Z] numbers as in the file, unscaled"""
    affine: np.ndarray | None
    """[4, 4] indices -> millimetres to the right, front and head; None: the files do not say"""
    kind: Kind
    notices: tuple[str, ...]


def kind_of(path: str) -> Kind:
    """What a record's file or folder holds, by name, or by what lies in the folder."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file; check the folder of the volumes")
    if os.path.isdir(path):
        return _kind_of_folder(path)
    if path.lower().endswith(nifti.ENDINGS):
        return "nifti"
    if path.lower().endswith(DICOM_ENDINGS):
        raise UserError(f"{path}: one DICOM file is one slice; give the folder of its series")
    if path.lower().endswith(slice_folders.ENDINGS):
        raise UserError(f"{path}: one image is one slice; give the folder of the slices")
    if path.endswith(".npy"):
        return "prepared"
    raise UserError(f"{path}: not a volume that is read here (.nii, .nii.gz, .npy, a folder of DICOM, PNG or JPEG slices)")


def _kind_of_folder(path: str) -> Kind:
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if not (entry.is_dir() or entry.name.startswith(".")))
    if any(name.lower().endswith(DICOM_ENDINGS) for name in names):
        return "dicom"
    # pictures may lie beside a series whose files have no ending, never the other way round
    if any(_is_dicom(os.path.join(path, name)) for name in names if not slice_folders.is_slice(name)):
        return "dicom"
    if any(map(slice_folders.is_slice, names)):
        return "slices"
    raise UserError(f"{path}: a folder without DICOM, PNG or JPEG slices; give the folder that holds the slices themselves")


def _is_dicom(path: str) -> bool:
    """Whether a file without an ending is DICOM; DICOMDIR only lists others."""
    if os.path.basename(path).upper() == "DICOMDIR":
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _dicom() -> ModuleType:
    """pydicom takes a third of a second to import, which commands without DICOM need not wait for."""
    from jaxmed.data import dicom

    return dicom


def check(path: str, config: PrepareConfig) -> None:
    """UserError for what the heads of the files show. Not for prepared volumes."""
    kind = kind_of(path)
    if kind == "nifti":
        _check_shape(nifti.read_header(path, config.index))
    elif kind == "dicom":
        _dicom().check_series(path, config.series)
    else:
        slice_folders.check_folder(path)


def read_raw(path: str, config: PrepareConfig) -> RawVolume:
    """The numbers of a volume, unscaled and not turned yet."""
    kind = kind_of(path)
    if kind == "slices":
        planes, notices = slice_folders.read_folder(path)
        stored = planes.transpose(2, 1, 0)
        return RawVolume(Header(path, stored.shape, (0.0, 0.0, 0.0), 1.0, 0.0), stored, None, kind, notices)
    if kind == "dicom":
        series = _dicom().read_series(path, config.series)
        header = Header(path, series.values.shape, series.spacing, series.slope, series.intercept)
        return RawVolume(header, series.values, series.affine, kind, (*series.notices, *_oblique(series.affine)))
    found = nifti.read_stored(path, config.index)
    _check_shape(found.header)
    unsaid = () if found.oriented else ("the header does not say its orientation; the format's default is taken",)
    return RawVolume(found.header, found.values, found.affine, kind, (*unsaid, *_oblique(found.affine)))


def _check_shape(header: Header) -> None:
    if 1 in header.shape:
        raise UserError(f"{header.path}: shape {header.shape}, a volume of one slice; at least two are needed")


def _oblique(affine: np.ndarray) -> tuple[str, ...]:
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    angle = float(np.degrees(np.arccos(np.clip(np.abs(directions).max(axis=0), 0, 1))).max())
    return (f"its axes are {angle:.0f} degrees off the body's; they are not resampled",) if angle > OBLIQUE else ()


def view(raw: RawVolume, axes: Axes) -> tuple[np.ndarray, tuple[float, float, float], str]:
    """A view (no copy) of the stored numbers as (depth, rows, columns), its voxels' sides in millimetres along them, and where
    they grow to, such as "SPL"; zeros and "" where the files do not say."""
    order = (2, 0, 1) if axes == "zxy" else (2, 1, 0)
    if raw.affine is None:
        return raw.stored.transpose(order), (0.0, 0.0, 0.0), ""
    own = nibabel.orientations.io_orientation(raw.affine)
    stored, spacing = raw.stored, np.array(raw.header.spacing)
    if axes == "radiological":
        wanted = nibabel.orientations.axcodes2ornt(RADIOLOGICAL)
        turn = nibabel.orientations.ornt_transform(own, wanted)
        stored = nibabel.orientations.apply_orientation(stored, turn)
        # entry i of `turn` says to which axis the stored axis i goes
        spacing, own = spacing[np.argsort(turn[:, 0])], wanted
    codes = nibabel.orientations.ornt2axcodes(own)
    return stored.transpose(order), tuple(float(spacing[a]) for a in order), "".join(codes[a] for a in order)


def stamp(path: str) -> tuple[int, int]:
    """(size, time) of a file, or two numbers that change when a file in a folder does; (0, 0) where nothing is."""
    try:
        if not os.path.isdir(path):
            status = os.stat(path)
            return status.st_size, status.st_mtime_ns
        digest = hashlib.sha256()
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                status = entry.stat(follow_symlinks=os.path.exists(entry.path))  # what a link leads to may be gone
                digest.update(f"{entry.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return int.from_bytes(digest.digest()[:6], "big"), int.from_bytes(digest.digest()[6:12], "big")
    except OSError:
        return 0, 0


def find_volumes(folder: str) -> list[str]:
    """Every volume below a folder, sorted: NIfTI files, prepared .npy files, folders that hold slices themselves."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; give the folder of the volumes")
    found = []
    for parent, files in files_below(folder):
        whole = [name for name in files if name.lower().endswith(nifti.ENDINGS) or name.endswith(".npy")]
        found += [os.path.join(parent, name) for name in whole]
        slices = any(slice_folders.is_slice(name) or name.lower().endswith(DICOM_ENDINGS) for name in files)
        if slices or (not whole and any(_is_dicom(os.path.join(parent, name)) for name in files)):
            found.append(parent)
    if not found:
        raise UserError(f"{folder}: no volume in it or below (.nii, .nii.gz, .npy, folders of DICOM, PNG or JPEG slices)")
    return sorted(found)


def files_below(folder: str, above: frozenset[str] = frozenset()) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of a folder and all below it, but for hidden ones, in order. Links are followed, though not
    round in circles (`above`: where they have led); a folder that cannot be read is an error, lest its volumes be missed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as scanned:
            entries = sorted((entry for entry in scanned if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check the folder of the volumes") from None
    yield folder, [entry.name for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            yield from files_below(entry.path, above | {real})
