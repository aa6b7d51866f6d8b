"""Reads tensors from the folders that transformers, PEFT and LLaVA write: safetensors (sharded or not) and torch `.bin`.

A folder is opened by its headers alone; every check that needs no values is made then, so that a shard that is absent or
cut off is reported before anything is put on a device. Tensors are views of the mapped files: what is sliced is read.
"""

import hashlib
import json
import math
import os
import re
import zipfile
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jaxmed.checkpoint.torch_pickle import load_bin
from jaxmed.errors import UserError

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}

# One of these holds the model (the first found wins: many folders carry it twice) ...
MODEL_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
# ... or, without any safetensors, one of these: M3D's and SAMF's merged and unmerged models, M3D-CLIP's image tower ...
BIN_FILES = ("merged_model.bin", "model_with_lora.bin", "pretrained_ViT.bin")
# ... one of each of these may stand beside it, or alone.
SIDE_FILES = (("adapter_model.safetensors", "adapter_model.bin"), ("non_lora_trainables.bin",), ("mm_projector.bin",))

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_TESTED_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class TensorFolder:
    """Named tensors of one folder (or of one file)."""

    path: str
    arrays: dict[str, np.ndarray]
    """Read-only views of the mapped files"""
    files: dict[str, str]
    """The file, relative to `path`, in which each tensor is"""
    role: Literal["model", "tower"] = "model"
    """What it is opened as: a tower alone spells its names without the model's prefix"""

    def names(self) -> list[str]:
        return list(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._array(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._array(name).dtype

    def read(self, name: str, index: Any = ...) -> np.ndarray:
        """A copy of `tensor[index]`; no more than that is read."""
        return np.array(self._array(name)[index])

    def where(self, name: str) -> str:
        """`FILE: NAME`, for messages."""
        return f"{os.path.join(self.path, self.files[name])}: {name}"

    def _array(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise UserError(f"{self.path}: has no tensor {name}")
        return self.arrays[name]


def open_folder(path: str) -> TensorFolder:
    """Opens every weight file of a folder, or the one file given."""
    if os.path.isfile(path):
        folder, files = os.path.split(path)
        parts = [(files, _open_file(path))]
        path = folder or "."
    else:
        parts = [(name, _open_file(os.path.join(path, name))) for name in weight_files(path)]
        _check_index(path, dict(parts))
    if not parts:
        raise UserError(
            f"{path}: has no weight file (looked for {', '.join(MODEL_FILES)}, *.safetensors, {', '.join(BIN_FILES)}, "
            f"{', '.join(name for group in SIDE_FILES for name in group)}, or a single .bin or .pth file)"
        )
    arrays: dict[str, np.ndarray] = {}
    files_of: dict[str, str] = {}
    for file, tensors in parts:
        for name in tensors:
            if name in arrays:
                raise UserError(f"{path}: {name} is both in {files_of[name]} and in {file}; remove the stale file")
        arrays |= tensors
        files_of |= dict.fromkeys(tensors, file)
    return TensorFolder(path, arrays, files_of)


def weight_files(path: str) -> list[str]:
    """Names of the weight files in a folder, from the index where there is one. A shard that is absent is an error."""
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder (jaxmed downloads nothing; give the path of a folder on this machine)")
    present = set(os.listdir(path))
    files: list[str] = []
    found = next((name for name in MODEL_FILES if name in present), "")
    if found.endswith(".index.json"):
        files = sorted(set(_weight_map(os.path.join(path, found)).values()))
    elif found:
        files = [found]
    else:
        files = _loose_shards(path, present)
    files = files or [name for name in BIN_FILES if name in present][:1]
    for group in SIDE_FILES:
        files += [name for name in group if name in present and name not in files][:1]
    files = files or _lone_bin(path, present)
    absent = [name for name in files if name not in present]
    if absent:
        raise UserError(f"{path}: {', '.join(absent)} is missing, though the index names it; download the rest of the folder")
    return files


def _loose_shards(path: str, present: set[str]) -> list[str]:
    """`*.safetensors` without an index; numbered names say by themselves whether one is missing."""
    side = {name for group in SIDE_FILES for name in group}
    files = sorted(name for name in present if name.endswith(".safetensors") and name not in side)
    wanted = set(files)
    for stem, _, count in (match.groups() for match in map(_SHARD.fullmatch, files) if match):
        wanted |= {f"{stem}-{i + 1:05d}-of-{count}.safetensors" for i in range(int(count))}
    if wanted - present:
        raise UserError(f"{path}: {', '.join(sorted(wanted - present))} is missing; download the rest of the folder")
    return files


def _lone_bin(path: str, present: set[str]) -> list[str]:
    """The one .bin or .pth file of a folder, whatever its name: such as a DINO encoder's, or the model of a SAMF step."""
    files = sorted(name for name in present if name.endswith((".bin", ".pth")) and name not in _NO_WEIGHTS)
    files = [name for name in files if not name.startswith("rng_state")]
    if len(files) > 1:
        raise UserError(f"{path}: holds {', '.join(files)}, any of which may be the model; keep the one that is meant")
    return files


def _weight_map(index: str) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_plain_name(name) for name in weight_map.values()):
        raise UserError(f"{index}: has no weight_map of tensors to files in the same folder; download the file again")
    return weight_map


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and os.path.basename(name) == name


def _check_index(path: str, files: dict[str, dict[str, np.ndarray]]) -> None:
    """A tensor that the index promises and its shard does not hold is told here, by name."""
    index = next((name for name in MODEL_FILES if os.path.exists(os.path.join(path, name))), "")
    if index.endswith(".index.json"):
        weight_map = _weight_map(os.path.join(path, index))
        lost = sorted(f"{name} ({file})" for name, file in weight_map.items() if name not in files[file])
        if lost:
            raise UserError(f"{path}: {index} names tensors that their files lack: {', '.join(lost)}; download them again")


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file; anything else is an error that names the file."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, an object is needed")
    return content


def _open_file(path: str) -> dict[str, np.ndarray]:
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:
        if file.read(7) == b"version" and os.path.getsize(path) < 1024:
            raise UserError(f"{path}: is a git-lfs pointer, not the weights; run `git lfs pull` in its folder")
    return _open_safetensors(path) if path.endswith(".safetensors") else load_bin(path)


def safetensors_header(path: str) -> tuple[dict[str, Any], bytes, int]:
    """The header as JSON and as bytes, and where the data begin."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > 100_000_000 or (size >= 9 and file.read(1) != b"{"):
            raise UserError(f"{path}: is not a safetensors file; download or copy it again")
        if 8 + length > size:
            raise UserError(f"{path}: is cut off within its header ({size} bytes); download or copy it again")
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{path}: its safetensors header is damaged ({error}); download or copy it again") from error
    header.pop("__metadata__", None)
    return header, raw, 8 + length


def _open_safetensors(path: str) -> dict[str, np.ndarray]:
    header, _, start = safetensors_header(path)
    available = os.path.getsize(path) - start
    needed = 0
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            shape, dtype = entry["shape"], DTYPES.get(entry["dtype"])
            if dtype is None:
                raise UserError(f"{path}: {name} has the dtype {entry['dtype']}, which is not supported")
            sound = begin >= 0 and all(n >= 0 for n in shape) and end - begin == math.prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: the header's entry for {name} is damaged; download or copy the file again") from error
        if not sound:
            raise UserError(f"{path}: size and shape of {name} disagree in the header; download or copy the file again")
        needed = max(needed, end)
    if needed != available:
        what = "is cut off" if needed > available else "has bytes that belong to no tensor"
        raise UserError(f"{path}: {what} ({available} bytes of data, the header says {needed}); download or copy it again")
    mapped = np.memmap(path, np.uint8, "r")
    return {
        name: np.ndarray(entry["shape"], DTYPES[entry["dtype"]], mapped, start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; piece by piece, as the test takes as much memory as what it tests."""
    if not array.flags.c_contiguous:
        return _is_finite(array)
    flat = array.reshape(-1)
    return all(_is_finite(flat[i : i + _TESTED_ELEMENTS]) for i in range(0, flat.size, _TESTED_ELEMENTS))


def _is_finite(array: np.ndarray) -> bool:
    """bfloat16 and float16 by their bits: ml_dtypes' own test is slow."""
    if array.dtype == ml_dtypes.bfloat16 or array.dtype == np.float16:
        exponent = np.uint16(0x7F80 if array.dtype == ml_dtypes.bfloat16 else 0x7C00)
        return not np.any((array.view(np.uint16) & exponent) == exponent)
    return array.dtype.kind in "iub" or bool(np.isfinite(array).all())


def base_fingerprint(path: str) -> str:
    """Hash by which a checkpoint knows its base: index, headers, file sizes, and a few bytes from all over each file.

    Headers and sizes alone are the same for a model and its instruction-tuned sister, hence the samples of the data; a
    zip archive's directory has a checksum of every storage in it. The folder's place and name do not matter.
    """
    digest = hashlib.sha256()
    for name in sorted(set(MODEL_FILES) & set(os.listdir(path))) if os.path.isdir(path) else []:
        if name.endswith(".index.json"):
            with open(os.path.join(path, name), "rb") as file:
                digest.update(file.read())
    for name in sorted(weight_files(path)):
        full = os.path.join(path, name)
        digest.update(f"{name}\0{os.path.getsize(full)}\0".encode())
        if name.endswith(".safetensors"):
            digest.update(safetensors_header(full)[1])
        elif zipfile.is_zipfile(full):
            with zipfile.ZipFile(full) as archive:
                digest.update(repr([(info.filename, info.CRC, info.file_size) for info in archive.infolist()]).encode())
        sample(full, digest)
    return digest.hexdigest()


def sample(path: str, digest: Any) -> None:
    """A few bytes from all over a file into a hash."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
