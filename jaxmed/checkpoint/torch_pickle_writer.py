"""Writes a dict of tensors as `torch.save` does (the zip form of torch 1.6 and later), without torch.

The archive holds `STEM/data.pkl`, a pickle of protocol 2 that names each tensor's storage, and the storages `STEM/data/N`,
uncompressed and aligned to 64 bytes. The pickle's opcodes are written out here one by one; `torch.load(weights_only=True)`
and `jaxmed.checkpoint.torch_pickle` read it.
"""

import os
import struct
import zipfile
from collections.abc import Iterable, Sequence

import numpy as np

from jaxmed.checkpoint.tensor_files import Tensor
from jaxmed.checkpoint.torch_pickle import STORAGES

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64
_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20
_DATE = (1980, 1, 1, 0, 0, 0)  # the same tensors make the same file


def save_bin(path: str, tensors: Sequence[Tensor]) -> None:
    """A file for `torch.load`: a dict of contiguous CPU tensors, in the order given."""
    stem = os.path.basename(path).partition(".")[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        pickle = _pickle(tensors)
        _add(archive, f"{stem}/data.pkl", [pickle], len(pickle))
        _add(archive, f"{stem}/byteorder", [b"little"], 6)
        for key, tensor in enumerate(tensors):
            _add(archive, f"{stem}/data/{key}", tensor.data(), tensor.nbytes)
        _add(archive, f"{stem}/version", [b"3\n"], 2)


def _add(archive: zipfile.ZipFile, name: str, pieces: Iterable[bytes | memoryview], size: int) -> None:
    """One record of `size` bytes; an extra field before it pads its data to the alignment, as torch's own writer does."""
    info = zipfile.ZipInfo(name, _DATE)
    info.file_size = size
    large = size * 1.05 > zipfile.ZIP64_LIMIT  # zipfile then adds a field of its own
    begin = archive.fp.tell() + _LOCAL_HEADER + len(name.encode()) + (_ZIP64_EXTRA if large else 0) + 4
    padding = -begin % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as record:
        for piece in pieces:
            record.write(piece)


def _pickle(tensors: Sequence[Tensor]) -> bytes:
    parts = [b"\x80\x02}("]  # PROTO 2, EMPTY_DICT, MARK
    for key, tensor in enumerate(tensors):
        count = int(np.prod(tensor.shape, dtype=np.int64))
        identity = [_text("storage"), _name(_STORAGE_OF[tensor.dtype]), _text(str(key)), _text("cpu"), _integer(count)]
        strides = [int(np.prod(tensor.shape[i + 1 :], dtype=np.int64)) for i in range(len(tensor.shape))]
        hooks = _name("collections OrderedDict") + b")R"  # EMPTY_TUPLE, REDUCE
        arguments = [_tuple(identity) + b"Q", _integer(0)]  # BINPERSID
        arguments += [_tuple([_integer(n) for n in tensor.shape]), _tuple([_integer(n) for n in strides]), b"\x89", hooks]
        parts += [_text(tensor.name), _name("torch._utils _rebuild_tensor_v2"), _tuple(arguments), b"R"]
    return b"".join([*parts, b"u."])  # SETITEMS, STOP


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _name(module_and_name: str) -> bytes:
    return b"c" + module_and_name.replace(" ", "\n").encode() + b"\n"


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little")  # LONG1 is signed
    return b"\x8a" + bytes([len(raw)]) + raw


def _tuple(items: Sequence[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"
