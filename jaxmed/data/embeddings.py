"""Volume tokens in `.npz` files: names, headers, loading, merging of neighbours, packed codes, writing.

A file holds `arr`, float, (1, C, T, H, W), or `codes`, uint32, (1, T, H, W), and perhaps `encoder`, the name of what wrote it.
Axis letters here: C channels of a file's token, (T, H, W) depth, rows and columns of its grid; merging makes of them
(c p0 p1 p2) channels and (t, h, w). N = t*h*w tokens of an image, t slowest.
A code is 18 signs in the low bits of a uint32, channel 0 the most significant: code = sum over j of [x_j > 0] * 2**(17 - j).
"""

import contextlib
import math
import os
import threading
import zipfile
from dataclasses import dataclass
from typing import IO

import numpy as np

from jaxmed.config import VisualConfig
from jaxmed.errors import UserError

CODE_BITS = 18
SUFFIX = ".nii_embedded.npz"
Grid = tuple[int, int, int]
# numpy reads headers with ast.literal_eval, whose recursion count CPython 3.11 keeps for all threads together: two at once fail
_HEADERS = threading.Lock()


def npz_name(image: str) -> str:
    """The file of a record's `image`: x.nii.gz, x.nii, x.npy, x.npz, x.nii_embedded.npz and a folder x of slices all give
    x.nii_embedded.npz."""
    for ending in (SUFFIX, ".nii.gz", ".nii", ".npz", ".npy"):
        if image.endswith(ending):
            return image[: -len(ending)] + SUFFIX
    return image.rstrip("/") + SUFFIX


def npz_path(folder: str, image: str) -> str:
    """Upstream glues folder and name together, so a leading slash of the name does not leave the folder."""
    return os.path.join(folder, npz_name(image).lstrip("/")) if folder else npz_name(image)


@dataclass(frozen=True)
class Header:
    """What a file says about itself without its data."""

    path: str
    shape: tuple[int, int, int, int]
    """(C, T, H, W); C is 18 for codes"""
    dtype: str
    key: str
    """`arr` or `codes`"""
    encoder: str
    """"": unsigned"""


def read_header(path: str) -> Header:
    """Reads the directory of the zip and the headers in it, about a kilobyte whatever the volume's size."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            key = next((k for k in ("arr", "codes") if k in names), "")
            if not key:
                found = ", ".join(sorted(names)) or "nothing"
                raise UserError(f"{path}: no array `arr` or `codes` in it (found: {found}); write the tokens under `arr`")
            with archive.open(names[key]) as member:
                shape, dtype, _, offset = read_npy_header(member)
            if not dtype.hasobject and names[key].file_size != offset + dtype.itemsize * math.prod(shape):
                raise UserError(f"{path}: `{key}` is cut short; copy or encode the file again")
            encoder = _read_encoder(archive, path) if "encoder" in names else ""
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the folder of the embeddings, or encode the volume") from None
    except UserError:
        raise
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise UserError(f"{path}: not a readable .npz file ({error}); copy or encode it again") from None
    return Header(path, _token_shape(path, key, shape, dtype), dtype.name, key, encoder)


def read_npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool, int]:
    """Shape, dtype, whether the first axis runs fastest, and length of the header in bytes."""
    version = np.lib.format.read_magic(member)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"npy format {version} is not known")
    with _HEADERS:
        shape, fortran, dtype = readers[version](member)
    return shape, dtype, fortran, member.tell()


def _read_member(path: str, key: str) -> np.ndarray:
    """The array `key` of a file whose header is known to be sound; read-only."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
        shape, dtype, fortran, _ = read_npy_header(member)
        return np.frombuffer(member.read(), dtype).reshape(shape, order="F" if fortran else "C")


def _read_encoder(archive: zipfile.ZipFile, path: str) -> str:
    with _HEADERS, archive.open("encoder.npy") as member:
        name = np.lib.format.read_array(member, allow_pickle=False)
    if name.size != 1 or name.dtype.kind not in "US":
        raise UserError(f"{path}: `encoder` must be one string, found {name.dtype} with shape {name.shape}")
    text = name.reshape(-1)[0]
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def _token_shape(path: str, key: str, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, int, int, int]:
    if dtype.hasobject:
        raise UserError(f"{path}: `{key}` holds Python objects, which are never read; save it as a float32 array")
    if key == "codes":
        if dtype != np.uint32 or len(shape) != 4 or shape[0] != 1:
            raise UserError(f"{path}: `codes` must be uint32 of shape (1, T, H, W), found {dtype} {shape}")
        shape = (1, CODE_BITS, *shape[1:])
    elif dtype.kind not in "fi" or len(shape) != 5 or shape[0] != 1:
        raise UserError(f"{path}: `arr` must be a float array of shape (1, C, T, H, W), found {dtype} {shape}")
    if 0 in shape:
        raise UserError(f"{path}: `{key}` is empty, its shape is {shape}; encode the volume again")
    return tuple(int(n) for n in shape[1:])


def is_merged(header: Header, visual: VisualConfig) -> bool:
    """Whether the file holds `visual.features` channels already, so that no neighbours are merged any more."""
    return header.shape[0] == visual.features and visual.file_features != visual.features


def merged_grid(header: Header, visual: VisualConfig) -> Grid:
    """(t, h, w), as the projector sees the file."""
    merge = (1, 1, 1) if is_merged(header, visual) else visual.merge
    _, t, h, w = header.shape
    return t // merge[0], h // merge[1], w // merge[2]


def header_problem(header: Header, visual: VisualConfig) -> str:
    """What keeps the file from serving under `visual`, or ""."""
    channels, grid = header.shape[0], header.shape[1:]
    name = os.path.basename(header.path)
    if visual.file_features * math.prod(visual.merge) != visual.features:
        return (
            f"visual.features {visual.features} is not a multiple of the {math.prod(visual.merge)} neighbours that are merged"
        )
    if channels not in (visual.file_features, visual.features):
        expected = " or ".join(str(n) for n in sorted({visual.file_features, visual.features}))
        return f"{name} has {channels} channels, expected {expected}; set visual.features and visual.merge to suit the files"
    if not is_merged(header, visual) and any(n % m for n, m in zip(grid, visual.merge, strict=True)):
        return f"{name} has a token grid {grid}, which visual.merge {visual.merge} does not divide"
    merged = merged_grid(header, visual)
    tokens = math.prod(merged)
    if tokens > visual.tokens:
        return f"{name} has {tokens} tokens, visual.tokens is {visual.tokens}; set visual.tokens to at least {tokens}"
    if visual.kind == "codes":
        if channels != CODE_BITS or is_merged(header, visual):
            return f"{name} has {channels} channels; visual.kind codes needs files of {CODE_BITS}, before merging"
        if merged != tuple(visual.grid):
            return f"{name} has a token grid {merged} after merging, visual.grid is {tuple(visual.grid)}; codes need them equal"
    return ""


def encoder_problem(header: Header, expected: str) -> str:
    """A signed file must be of the expected encoder; unsigned ones, and all if none is expected, pass."""
    if header.encoder and expected and header.encoder != expected:
        name = os.path.basename(header.path)
        return f"{name} was written by encoder {header.encoder!r}, expected {expected!r}; tokens of two encoders never mix"
    return ""


def load_tokens(path: str, visual: VisualConfig) -> tuple[np.ndarray, Grid]:
    """Tokens of one file and its grid after merging.

    kind `embeddings`: [N, C] float32, channels ordered and neighbours merged, whichever of `arr` and `codes` the file holds.
    kind `codes`: [N'] uint32 as in the file, in (T, H, W) order: order and merge of channels are the device's work.
    """
    header = read_header(path)
    problem = header_problem(header, visual)
    if problem:
        raise UserError(f"{path}: {problem}")
    try:
        array = _read_member(path, header.key)[0]
    except (OSError, zipfile.BadZipFile, ValueError, EOFError) as error:
        raise UserError(f"{path}: `{header.key}` cannot be read ({error}); copy or encode the file again") from None
    return _checked_tokens(header, array, visual)


def array_tokens(array: np.ndarray, visual: VisualConfig) -> tuple[np.ndarray, Grid]:
    """As `load_tokens`, of an array as a file holds it: floats ([1,] C, T, H, W) or uint32 codes ([1,] T, H, W)."""
    key = "codes" if array.dtype == np.uint32 else "arr"
    axes = 3 if key == "codes" else 4
    if array.ndim == axes + 1 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != axes or (key == "arr" and array.dtype.kind != "f"):
        shape = "uint32 (1, T, H, W)" if key == "codes" else "floating point (1, C, T, H, W)"
        raise UserError(f"an image array has shape {array.shape} and dtype {array.dtype}; {shape} is needed")
    shape = (CODE_BITS, *array.shape) if key == "codes" else array.shape
    header = Header("array", shape, str(array.dtype), key, "")
    problem = header_problem(header, visual)
    if problem:
        raise UserError(f"an image array: {problem}")
    return _checked_tokens(header, array, visual)


def _checked_tokens(header: Header, array: np.ndarray, visual: VisualConfig) -> tuple[np.ndarray, Grid]:
    path, grid = header.path, merged_grid(header, visual)
    if header.key == "codes" and array.max() >> CODE_BITS:
        raise UserError(f"{path}: a code is {array.max()}, above {2**CODE_BITS - 1}; encode the volume again")
    if visual.kind == "codes":
        codes = array if header.key == "codes" else _signs_to_codes(path, array)
        return np.ascontiguousarray(codes).reshape(-1), grid
    with np.errstate(over="ignore"):  # what overflows is found just below
        tokens = unpack_codes(array) if header.key == "codes" else array.astype(np.float32, copy=False)
    # One pass: a sum is finite only if every entry is (float64, so that no finite float32 entries overflow it).
    if not np.isfinite(tokens.sum(dtype=np.float64)):
        bad = int(tokens.size - np.isfinite(tokens).sum())
        raise UserError(f"{path}: {bad} of {tokens.size} values are NaN or infinite in float32; encode the volume again")
    return _order_and_merge(tokens, visual, is_merged(header, visual)), grid


def _order_and_merge(tokens: np.ndarray, visual: VisualConfig, merged: bool) -> np.ndarray:
    """[C, T, H, W] -> [N, visual.features], a transposed view: the copy into the batch's row is the only one"""
    if visual.channel_order == "reverse":
        # In a file merged by someone else the file's own channel is the slow part of the channel axis.
        split = tokens.reshape(visual.file_features if merged else tokens.shape[0], -1, *tokens.shape[1:])
        tokens = split[::-1].reshape(tokens.shape)
    if not merged:
        tokens = merge_neighbours(tokens, visual.merge)
    return tokens.reshape(tokens.shape[0], -1).T


def _signs_to_codes(path: str, array: np.ndarray) -> np.ndarray:
    if not np.all(np.abs(array) == 1):
        raise UserError(f"{path}: visual.kind is codes, but the values are not all +1 or -1; set visual.kind to embeddings")
    return pack_codes(array)


def merge_neighbours(x: np.ndarray, merge: Grid) -> np.ndarray:
    """c (t p0) (h p1) (w p2) -> (c p0 p1 p2) t h w"""
    c, depth, rows, columns = x.shape
    p0, p1, p2 = merge
    t, h, w = depth // p0, rows // p1, columns // p2
    cells = x.reshape(c, t, p0, h, p1, w, p2)
    return cells.transpose(0, 2, 4, 6, 1, 3, 5).reshape(c * p0 * p1 * p2, t, h, w)


def pack_codes(signs: np.ndarray) -> np.ndarray:
    """[18, ...] of any values (above zero counts as +1, zero as -1) -> [...] uint32"""
    if signs.shape[0] != CODE_BITS:
        raise ValueError(f"codes have {CODE_BITS} channels, got {signs.shape[0]}")
    codes = np.zeros(signs.shape[1:], np.uint32)
    for channel in signs:
        codes = (codes << np.uint32(1)) | (channel > 0)
    return codes


def unpack_codes(codes: np.ndarray) -> np.ndarray:
    """[...] uint32 -> [18, ...] float32 of +1 and -1"""
    shifts = np.arange(CODE_BITS - 1, -1, -1, dtype=np.uint32).reshape(-1, *[1] * codes.ndim)
    bits = (codes[None] >> shifts) & np.uint32(1)
    return bits.astype(np.float32) * np.float32(2) - np.float32(1)


def write_npz(path: str, array: np.ndarray, encoder: str, dtype: type[np.floating] = np.float32) -> None:
    """Writes [C, T, H, W] floats (as `dtype`) or [T, H, W] uint32 codes, signed. The file is there whole or not at all."""
    if array.dtype == np.uint32 and array.ndim == 3:
        arrays = {"codes": array[None]}
    elif array.dtype.kind == "f" and array.ndim == 4:
        arrays = {"arr": array[None].astype(dtype, copy=False)}
    else:
        raise ValueError(f"tokens are [C, T, H, W] floats or [T, H, W] uint32 codes, got {array.dtype} {array.shape}")
    if encoder:
        arrays["encoder"] = np.array(encoder)
    temporary = f"{path}.{os.getpid()}.partial"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); make room or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
