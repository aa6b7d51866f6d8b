"""Reads the tensors of a torch `.bin` file without torch and without running the pickle in it.

A pickle is a program. `pickle.load` would run whatever it names; here its opcodes are walked by a small interpreter that
builds plain dicts, lists and tuples, and knows the handful of names that `torch.save` writes for a dict of tensors. Any
other name or opcode is refused. Nothing is imported or called by name, so a hostile file can at worst be refused.

Two layouts: the zip archive that torch has written since 1.6 (`*/data.pkl` and `*/data/N`, stored uncompressed), and the
older stream of five pickles followed by the storages. Tensors come back as read-only views of the mapped file, strides
and offsets as saved: only what is sliced out of them is read.
"""

import io
import mmap
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxmed.errors import UserError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_DTYPES = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
STORAGES = {f"torch {name}Storage": np.dtype(dtype) for name, dtype in _DTYPES.items()}

_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED_DICT = "collections OrderedDict"
_NAMES = {_TENSOR, _PARAMETER, _ORDERED_DICT, *STORAGES}


@dataclass(frozen=True)
class _Global:
    """A class or function that the pickle names; never looked up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    size: int
    """Elements"""


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements, as torch counts them"""


class _Mark:
    """Where a run of stack items begins."""


class _Interpreter:
    """Walks the opcodes of one pickle and returns what it builds."""

    def __init__(self, path: str):
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: {what}; only a plain dict of tensors is read. "
            "Convert the file to safetensors with the program that wrote it, if you trust it"
        )

    def run(self, stream: BinaryIO | mmap.mmap) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
            raise UserError(f"{self.path}: its pickle is damaged ({error}); download or copy the file again") from error
        raise UserError(f"{self.path}: its pickle ends early; download or copy the file again")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSH:
            stack.append(argument)
        elif name in _CONSTANT:
            stack.append(_CONSTANT[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            stack.append(_Mark())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(self.marked()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self.last(int(name[-1]))))
        elif name in ("APPEND", "APPENDS"):
            items = self.marked() if name == "APPENDS" else self.last(1)
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.marked() if name == "SETITEMS" else self.last(2)
            stack[-1].update(self.pairs(zip(items[::2], items[1::2], strict=True)))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            named = argument if name == "GLOBAL" else " ".join(self.last(2))
            if named not in _NAMES:
                raise self.refuse(f"its pickle asks for {named.replace(' ', '.')}")
            stack.append(_Global(named))
        elif name == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif name == "REDUCE":
            function, arguments = self.last(2)
            stack.append(self.call(function, arguments))
        elif name == "BUILD":
            # An OrderedDict's attributes, such as a state dict's `_metadata` (module versions): no tensors in there.
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise self.refuse("its pickle sets attributes of an object")
        else:
            raise self.refuse(f"its pickle has the opcode {name}, which torch does not write for tensors")

    def last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("stack is too short")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pairs(self, items: Iterable[Any]) -> dict[str | int, Any]:
        """Keys and values of a dict. Other keys are refused: hashing a tuple nested a million deep would end the process."""
        checked = list(items)
        if not all(isinstance(key, str | int) for key, _ in checked):
            raise self.refuse("its pickle has a dict whose keys are not texts")
        return dict(checked)

    def marked(self) -> list[Any]:
        items: list[Any] = []
        while not isinstance(item := self.stack.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def storage(self, identity: Any) -> _Storage:
        kind, storage_type, key, _, size = identity[:5]  # a legacy file has a sixth entry, for views
        if kind != "storage" or not isinstance(storage_type, _Global) or storage_type.name not in STORAGES:
            raise self.refuse("its pickle refers to something that is not a storage of numbers")
        if len(identity) > 5 and identity[5] is not None:
            raise self.refuse("its storages are views of other storages (a file of torch before 0.4)")
        return _Storage(str(key), STORAGES[storage_type.name], int(size))

    def call(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, _Global) else ""
        if name == _ORDERED_DICT:
            return self.pairs(arguments[0] if arguments else ())
        if name == _PARAMETER and isinstance(arguments[0], _Tensor):
            return arguments[0]
        if name == _TENSOR and isinstance(arguments[0], _Storage):
            storage, offset, shape, strides = arguments[:4]
            return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))
        raise self.refuse(f"its pickle calls {name.replace(' ', '.') or type(function).__name__} in a way torch does not")


_PUSH = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list}


def load_bin(path: str) -> dict[str, np.ndarray]:
    """Tensors by name, as read-only views of the mapped file.

    Names of nested dicts are joined by dots; numbers and texts among the values are left out.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        if not start:
            raise UserError(f"{path}: the file is empty; download or copy it again")
        file.seek(0)
        if start == b"PK\x03\x04":
            root, places = _read_zip(path, file)
        else:
            # A mapped file gives at most what it has; a plain one would first allocate what a damaged length asks for.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
                root, places = _read_legacy(path, stream)
    tensors: dict[str, np.ndarray] = {}
    mapped = np.memmap(path, np.uint8, "r")
    for name, tensor in _flatten(path, root):
        place, room = places.get(tensor.storage.key, (-1, 0))
        wanted = tensor.storage.size * tensor.storage.dtype.itemsize
        if place < 0 or not 0 <= wanted <= room or place + wanted > mapped.size:
            raise UserError(f"{path}: the data of {name} is missing or cut off; download or copy the file again")
        tensors[name] = _view(path, name, tensor, mapped[place : place + wanted])
    return tensors


def _view(path: str, name: str, tensor: _Tensor, data: np.ndarray) -> np.ndarray:
    itemsize = tensor.storage.dtype.itemsize
    strides = tuple(stride * itemsize for stride in tensor.strides)
    try:
        return np.ndarray(tensor.shape, tensor.storage.dtype, data, tensor.offset * itemsize, strides)
    except (ValueError, TypeError, OverflowError) as error:  # numpy refuses a view that leaves its storage
        raise UserError(f"{path}: {name} reaches beyond its data ({error}); download or copy the file again") from error


def _flatten(path: str, root: Any) -> list[tuple[str, _Tensor]]:
    """Named tensors of nested dicts. A dict met twice is refused: it may contain itself, or double with every level."""
    if not isinstance(root, dict):
        raise UserError(f"{path}: holds one {type(root).__name__.strip('_').lower()}, not a dict of tensors")
    found: list[tuple[str, _Tensor]] = []
    pending: list[tuple[str, dict]] = [("", root)]
    met = {id(root)}
    while pending:
        prefix, current = pending.pop(0)
        for key, value in current.items():
            if isinstance(value, _Tensor):
                found.append((f"{prefix}{key}", value))
            elif isinstance(value, dict) and value:
                if id(value) in met:
                    raise UserError(f"{path}: {prefix}{key} is a dict that stands elsewhere too; save a plain dict of tensors")
                met.add(id(value))
                pending.append((f"{prefix}{key}.", value))
    return found


def _read_zip(path: str, file: BinaryIO) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The pickle's value, and per storage key its place and size in the file."""
    try:
        archive = zipfile.ZipFile(file)
        records = {info.filename: info for info in archive.infolist()}
        compressed = [name for name, info in records.items() if info.compress_type != zipfile.ZIP_STORED]
        roots = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1 or compressed:
            what = f"{compressed[0]} in it is compressed" if compressed else "no data.pkl in it"
            raise UserError(f"{path}: a zip archive, but not one that torch.save wrote ({what})")
        folder = roots[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in records and archive.read(f"{folder}byteorder") != b"little":
            raise UserError(f"{path}: was written on a big-endian machine; convert it to safetensors there")
        root = _Interpreter(path).run(io.BytesIO(archive.read(roots[0])))
        places = {}
        for name, info in records.items():
            # The local header repeats the name and has padding of its own: only it says where the data begin.
            file.seek(info.header_offset + 26)
            lengths = file.read(4)
            if name.startswith(f"{folder}data/") and len(lengths) == 4:
                start = info.header_offset + 30 + sum(struct.unpack("<HH", lengths))
                places[name.removeprefix(f"{folder}data/")] = (start, info.file_size)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, OverflowError, struct.error) as error:
        raise UserError(f"{path}: is cut off or damaged ({error}); download or copy it again") from error
    return root, places


def _read_legacy(path: str, file: mmap.mmap) -> tuple[Any, dict[str, tuple[int, int]]]:
    """As `_read_zip`, for files before torch 1.6: magic number, version, system, value and storage keys, then the storages."""
    try:
        magic = _Interpreter(path).run(file)
    except UserError as error:
        raise UserError(f"{path}: is not a file that torch.save wrote, or is damaged at its very start") from error
    if magic != LEGACY_MAGIC:
        raise UserError(f"{path}: is a pickle, but not one that torch.save wrote; convert it to safetensors")
    _, system, root, keys = (_Interpreter(path).run(file) for _ in range(4))
    if not (isinstance(system, dict) and system.get("little_endian", True)):
        raise UserError(f"{path}: was written on a big-endian machine; convert it to safetensors there")
    storages = {tensor.storage.key: tensor.storage for _, tensor in _flatten(path, root)}
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise UserError(f"{path}: is damaged (no list of storages in it); download or copy it again")
    places, end = {}, os.path.getsize(path)
    for key in keys:
        start = file.read(8)
        size = struct.unpack("<q", start)[0] * storages[key].dtype.itemsize if len(start) == 8 and key in storages else -1
        if not 0 <= size <= end - file.tell():
            raise UserError(f"{path}: is cut off before the end of storage {key}; download or copy it again")
        places[key] = (file.tell(), size)
        file.seek(size, os.SEEK_CUR)
    return root, places
