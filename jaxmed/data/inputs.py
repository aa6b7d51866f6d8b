"""One image of any kind as the arrays of a batch hold it, and what a file's header says against it.

    kind         a file                        values                                    grid
    embeddings   .npz, float or codes          [N, C] float32                            of the file, merged
    codes        .npz                          [N'] uint32, N' before merging            of the file, merged
    pixels       PNG, JPEG, ...                [H, W, 3] float32, normalised             the tower's, (1, rows, columns)
    volumes      .nii, .nii.gz, a folder with  [D, H, W, C'] float32                     the tower's
                 a DICOM series or with PNG or
                 JPEG slices; .npy, prepared
    slices       .nii, .nii.gz                 [S, H, W] float32 from 0 to 1             (S, 1, 1)

N tokens of an image, C features, D, H, W depth, rows and columns, S slices, C' numbers of a voxel: one, but for .npy files
[C', D, H, W] with several channels. A source is a path, or an array as the file would give it. The first two kinds may differ
in N from file to file; what a tower reads has `visual.tokens` tokens always.
"""

import math
import os
import threading
import warnings
from dataclasses import dataclass

import numpy as np

from jaxmed.config import DataConfig, VisualConfig
from jaxmed.data import embeddings, images, slices
from jaxmed.data.ct_rate import flat_path
from jaxmed.data.embeddings import Grid
from jaxmed.data.prepare import Frame, Prepared, metadata_row
from jaxmed.data.volume_cache import prepared
from jaxmed.data.volume_sources import check as check_volume
from jaxmed.data.volume_sources import kind_of
from jaxmed.errors import Notice, UserError

Source = str | os.PathLike | np.ndarray
TOKEN_KINDS = ("embeddings", "codes")
"""Kinds whose files hold tokens; the others are what a tower reads"""
FOLDERS = {"embeddings": "embeddings", "codes": "embeddings", "pixels": "images", "volumes": "volumes", "slices": "volumes"}
"""Kind -> the field of the data config that names the folder of its files"""
NOTICES = 50
"""About volumes that a process gives at most"""
SLACK = 0.5
"""By which prepared values may leave 0 to 1, as those that were varied and kept do"""


@dataclass(frozen=True)
class VisualInput:
    values: np.ndarray
    """See the table above"""
    grid: Grid
    """Tokens along (depth, rows, columns)"""


def read_input(source: Source, visual: VisualConfig) -> VisualInput:
    """Reads a file whole (or checks an array); UserError names the file."""
    path = None if isinstance(source, np.ndarray) else os.fspath(source)
    if visual.kind == "none":
        raise UserError(f"{path or 'an image array'}: the model reads no images (visual.kind is none)")
    if visual.kind in TOKEN_KINDS:
        found = embeddings.load_tokens(path, visual) if path else embeddings.array_tokens(np.asarray(source), visual)
        return VisualInput(*found)
    if visual.kind == "pixels":
        return VisualInput(images.load_pixels(source, visual.pixels), visual.grid)
    if visual.kind == "volumes":
        values = read_prepared(path, visual).values if path else _checked_volume(source, "a volume array", visual)
        return VisualInput(values, visual.grid)
    return VisualInput(slices.load_slices(source, visual.slices, visual.pixels.side, visual.window), (visual.slices, 1, 1))


def token_count(grid: Grid, visual: VisualConfig) -> int:
    """Tokens of an image with this grid: a tower may add some of its own, a class token for one."""
    return math.prod(grid) if visual.kind in TOKEN_KINDS else visual.tokens


def image_array_shape(visual: VisualConfig, rows: int, images: int, tokens: int) -> tuple[tuple[int, ...], type]:
    """Shape and dtype of Batch.images for `rows` rows of `images` images with `tokens` tokens at most."""
    side = visual.pixels.side
    if visual.kind == "codes":
        return (rows, images, tokens * math.prod(visual.merge)), np.uint32
    if visual.kind == "pixels":
        return (rows, images, side, side, 3), np.float32
    if visual.kind == "volumes":
        return (rows, images, *visual.volume, visual.channels), np.float32
    if visual.kind == "slices":
        return (rows, images, visual.slices, side, side), np.float32
    return (rows, images, tokens, visual.features), np.float32


def image_ndim(visual: VisualConfig) -> int:
    return len(image_array_shape(visual, 0, 0, 0)[0])


def input_folder(data: DataConfig, visual: VisualConfig) -> str:
    """The folder of the data set's image files, "" where none is given."""
    folders = {"embeddings": data.embeddings, "images": data.images, "volumes": data.volumes}
    return "" if visual.kind == "none" else folders[FOLDERS[visual.kind]]


def is_placed(folder: str, name: str) -> bool:
    """Whether it is known where a record's `image` lies: the sets of a mixture have folders of their own."""
    return bool(folder) or os.path.isabs(name)


def input_path(folder: str, name: str, visual: VisualConfig) -> str:
    """The file that a record's `image` means: token files by upstream's rule, others in the folder or where they say. Volumes
    of CT-RATE may lie side by side."""
    found, flat = _path(folder, name, visual), flat_path(name)
    if not flat or os.path.exists(found):
        return found
    beside = _path(folder, flat, visual)
    return beside if os.path.exists(beside) else found


def _path(folder: str, name: str, visual: VisualConfig) -> str:
    if visual.kind not in TOKEN_KINDS:
        return os.path.join(folder, name)
    own = embeddings.npz_name(name)
    return own if os.path.isabs(own) and os.path.exists(own) else embeddings.npz_path(folder, name)


def check_header(path: str, visual: VisualConfig) -> str:
    """What keeps a file from serving under `visual`, as far as its head shows; "" if nothing does."""
    try:
        if visual.kind in TOKEN_KINDS:
            problem = embeddings.header_problem(embeddings.read_header(path), visual)
            return f"{path}: {problem}" if problem else ""
        if visual.kind == "volumes" and kind_of(path) == "prepared":
            _volume_header(path, visual)
        elif visual.kind == "volumes":
            _check_channels(path, visual)
            check_volume(path, visual.prepare)
            metadata_row(path, visual.prepare)
    except UserError as error:
        return str(error)
    if visual.kind == "pixels":
        return images.header_problem(path)
    return slices.header_problem(path) if visual.kind == "slices" else ""


# -- volumes ---------------------------------------------------------------------------------------------------------------


def read_prepared(path: str, visual: VisualConfig) -> Prepared:
    """A volume of any form as the tower reads it, with its frame; from the cache where there is one. What should be said of
    the file is a Notice, once."""
    if kind_of(path) == "prepared":
        unknown = Frame(
            "prepared", "", "", (0.0, 0.0, 0.0), visual.volume, tuple((0, n) for n in visual.volume), (0.0, 1.0), ""
        )
        values = _read_volume(path, visual)
        notices = _doubts(values)
        for notice in notices:
            _NOTICES.tell(f"{path}: {notice}")
        return Prepared(values, notices, unknown)
    _check_channels(path, visual)
    return prepared(path, visual, _NOTICES.tell)


class _Notices:
    """Each once, and not without end: the slices of a whole data set may overlap."""

    def __init__(self):
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def tell(self, text: str) -> None:
        with self._lock:
            if text in self._told or len(self._told) > NOTICES:
                return
            self._told.add(text)
            last = len(self._told) > NOTICES
        text = "more is to be said of other volumes; a run with visual.prepare.cache counts it" if last else text
        warnings.warn(text, Notice, stacklevel=2)


_NOTICES = _Notices()


def _volume_header(path: str, visual: VisualConfig) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """Shape, dtype, whether the first axis runs fastest, and where the values begin."""
    try:
        with open(path, "rb") as file:
            shape, dtype, fortran, offset = embeddings.read_npy_header(file)
        size = os.path.getsize(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the folder of the volumes") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a readable .npy file ({error}); prepare the volume again") from None
    _check_volume(path, shape, dtype, visual)
    if size < offset + dtype.itemsize * math.prod(shape):
        raise UserError(f"{path}: is cut short; copy or prepare the volume again")
    return shape, dtype, fortran, offset


def _check_channels(path: str, visual: VisualConfig) -> None:
    if visual.channels > 1:
        raise UserError(
            f"{path}: a CT volume has one number a voxel, the model reads {visual.channels}; give prepared .npy files "
            f"{(visual.channels, *visual.volume)}"
        )


def _check_volume(name: str, shape: tuple[int, ...], dtype: np.dtype, visual: VisualConfig) -> None:
    known = [(visual.channels, *visual.volume)] + [tuple(visual.volume)] * (visual.channels == 1)
    if shape not in known:
        raise UserError(f"{name}: shape {shape}; the model reads {' or '.join(map(str, known))}")
    if dtype.kind != "f":
        raise UserError(f"{name}: values of type {dtype}; a prepared volume holds floating-point numbers")


def _doubts(values: np.ndarray) -> tuple[str, ...]:
    """What makes it doubtful that somebody prepared a volume."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return (f"every value is {low:g}, there is nothing to see in it",)
    if low < -SLACK or high > 1 + SLACK:
        return (f"values from {low:.3g} to {high:.3g}, where prepared volumes go from 0 to 1; give the CT itself",)
    return ()


def _read_volume(path: str, visual: VisualConfig) -> np.ndarray:
    shape, dtype, fortran, offset = _volume_header(path, visual)
    try:
        values = np.fromfile(path, dtype, math.prod(shape), offset=offset).reshape(shape, order="F" if fortran else "C")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or prepare the volume again") from None
    return _checked_volume(values, path, visual)


def _checked_volume(array: np.ndarray, name: str, visual: VisualConfig) -> np.ndarray:
    """-> [D, H, W, C'] float32"""
    _check_volume(name, array.shape, array.dtype, visual)
    with np.errstate(over="ignore"):  # what overflows is found just below
        values = np.moveaxis(array.reshape(visual.channels, *visual.volume), 0, -1).astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        raise UserError(f"{name}: {bad} of {values.size} values are NaN or infinite in float32; prepare the volume again")
    return values
