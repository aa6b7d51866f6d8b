"""Writes tensors to files one at a time: safetensors (sharded, with an index) and torch's `.bin`.

A tensor is described before it is made, so headers and shards are known from shapes alone, and no more than one tensor is in
memory at once.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmed.checkpoint.hf_io import DTYPES, is_finite
from jaxmed.errors import UserError

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PIECE = 1 << 24
"""Numbers that are cast, tested and written together"""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]
    """-> the values, in any floating-point dtype"""
    ours: str = ""
    """Our path, for the table"""
    rule: str = ""
    """What was done to it"""
    sources: tuple[str, ...] = ()
    """Files (or a checkpoint's folder) that its values came from"""
    also: tuple[str, ...] = ()
    """Further paths of ours that it holds, such as k and v beside q"""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def data(self) -> Iterator[memoryview]:
        """The values as they go into the file, piece by piece; those that are no numbers, or that its dtype cannot hold, are
        refused."""
        made = self.make()
        if made.shape != self.shape:
            raise ValueError(f"{self.name}: was planned as {self.shape}, is {made.shape}")
        flat = np.ascontiguousarray(made).reshape(-1)
        for start in range(0, flat.size, _PIECE):
            values = cast(flat[start : start + _PIECE], self.dtype)
            if not is_finite(values):
                raise UserError(
                    f"{', '.join(self.sources)}: {self.name} has values that are not finite as {self.dtype}; "
                    "give another --dtype, or go back to sound weights"
                )
            yield values.view(np.uint8).data


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Contiguous and in `dtype`; what is too large becomes infinite, for `Tensor.data` to find."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype).reshape(values.shape)  # numpy makes a scalar one-dimensional


def parse_size(text: str, flag: str) -> int:
    """Bytes of "5GB", "300MB", "2GiB" (KB, MB, GB count in thousands)."""
    number = text.rstrip("BbIiKkMmGg ")
    unit = text[len(number) :].strip().upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"{flag} {text}: give a size such as 5GB or 300MB")
    return size


def write_safetensors(path: str, tensors: Sequence[Tensor]) -> None:
    """One file; the header is padded so that the data begin at a multiple of eight bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        entry = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, place + tensor.nbytes]}
        header[tensor.name] = entry
        place += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in tensor.data():
                file.write(piece)


def shards(tensors: Sequence[Tensor], shard_size: int) -> list[list[Tensor]]:
    """Tensors in their order, as many a shard as fit (a larger one has a shard of its own)."""
    parts: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not parts or tensor.nbytes > room:
            parts.append([])
            room = shard_size
        parts[-1].append(tensor)
        room -= tensor.nbytes
    return parts


def write_model(folder: str, tensors: Sequence[Tensor], shard_size: int, say: Callable[[str], None]) -> None:
    """model.safetensors, or numbered shards with the index that transformers reads."""
    parts = shards(tensors, shard_size)
    if len(parts) == 1:
        write_safetensors(os.path.join(folder, "model.safetensors"), parts[0])
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        say(f"writing {name}")
        write_safetensors(os.path.join(folder, name), part)
        weight_map |= dict.fromkeys((tensor.name for tensor in part), name)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
        json.dump(index, file, indent=2)
        file.write("\n")
