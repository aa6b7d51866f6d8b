"""The torch-free reader gives what torch.load gives, and runs nothing that a file asks for."""

import collections
import contextlib
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from jaxmed.checkpoint.torch_pickle import load_bin
from jaxmed.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def samples() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    shared = torch.randn(7, 11)
    return {
        "single": torch.randn(3, 5),
        "half": torch.randn(5, 2).half(),
        "brain": torch.randn(9, 3).bfloat16(),
        "double": torch.randn(2).double(),
        "long": torch.arange(6).reshape(2, 3) - 2**40,
        "int": torch.arange(-3, 4, dtype=torch.int32),
        "byte": torch.arange(250, 256, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "row": shared[3],
        "columns": shared[:, 2:9:3],
        "transposed": shared.t()[1:4],
        "expanded": torch.tensor([1.5, 2.5])[:, None].expand(2, 3),
        "parameter": torch.nn.Parameter(torch.randn(4, 6)[1:]),
        "brain_columns": torch.randn(4, 6).bfloat16()[:, 1::2],
    }


@pytest.mark.parametrize("layout", ["zip", "zip_protocol_4", "legacy"])
def test_every_kind_of_tensor(tmp_path, layout):
    tensors = samples()
    path = str(tmp_path / "x.bin")
    torch.save(tensors, path, _use_new_zipfile_serialization=layout != "legacy", pickle_protocol=4 if "4" in layout else 2)
    read = load_bin(path)
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        want = as_numpy(tensor)
        assert read[name].dtype == want.dtype and read[name].shape == want.shape, name
        np.testing.assert_array_equal(read[name], want, err_msg=name)
        assert not read[name].flags.writeable


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict_of_nested_modules(tmp_path, zipped):
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Sequential(torch.nn.LayerNorm(5), torch.nn.BatchNorm1d(5)))
    path = str(tmp_path / "x.bin")
    torch.save({"model": model.state_dict(), "epoch": 3, "note": "text"}, path, _use_new_zipfile_serialization=zipped)
    read = load_bin(path)
    assert set(read) == {f"model.{name}" for name in model.state_dict()}
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(read[f"model.{name}"], tensor.numpy())


def test_files_that_upstream_wrote():
    for path in GOLDEN.glob("llava_lora_*/*/non_lora_trainables.bin"):
        want = torch.load(path, weights_only=True)
        read = load_bin(str(path))
        assert set(read) == set(want) and len(read) >= 4
        for name, tensor in want.items():
            np.testing.assert_array_equal(read[name], tensor.numpy())


def write_archive(path, data: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return str(path)


class Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("target", ["archive", "legacy"])
def test_nothing_is_run(tmp_path, protocol, target):
    witness = tmp_path / "witness"
    hostile = pickle.dumps({"weight": Runs(os.mkdir, str(witness))}, protocol=protocol)
    if target == "archive":
        path = write_archive(tmp_path / "x.bin", hostile)
    else:
        path = str(tmp_path / "x.bin")
        header = b"".join(pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        (tmp_path / "x.bin").write_bytes(header + hostile)
    with pytest.raises(UserError, match=r"mkdir|opcode") as error:
        load_bin(path)
    assert "x.bin" in str(error.value) and "\n" not in str(error.value)
    assert not witness.exists()
    pickle.loads(hostile)  # the same bytes do run in a real unpickler: the test would see it
    assert witness.exists()


@pytest.mark.parametrize(
    "value",
    [
        Runs(eval, "1"),
        Runs(getattr, 1.5, "hex"),
        Runs(torch.storage._load_from_bytes, b"x"),
        Runs(torch.load, "y"),
        np.zeros(3),
        torch.nn.Linear(2, 2),
    ],
)
def test_other_objects_are_refused_by_name(tmp_path, value):
    path = write_archive(tmp_path / "x.bin", pickle.dumps({"w": value}, protocol=2))
    with pytest.raises(UserError, match=r"asks for (__builtin__|torch|numpy)\.?"):
        load_bin(path)


def raw(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


GLOBAL = b"ctorch._utils\n_rebuild_tensor_v2\n"
ORDERED = b"ccollections\nOrderedDict\n"


def storage(key: bytes = b"0", size: int = 6) -> bytes:
    """Opcodes that push a float storage of `size` elements."""
    return b"((U\x07storagectorch\nFloatStorage\nU\x01" + key + b"U\x03cpuK" + bytes([size]) + b"tQ"


@pytest.mark.parametrize(
    "data",
    [
        raw(b"}", b"("),
        raw(b"]"),
        raw(b"K\x05"),
        raw(b"}", b"h\x07"),
        raw(b"}", b"K\x01", b"a"),
        raw(b"}", b"X\x01\x00\x00\x00a", ORDERED, b"R", b"s"),
        raw(b"}", b"X\x01\x00\x00\x00a", GLOBAL, b")", b"R", b"s"),
        raw(b"}", b"X\x01\x00\x00\x00a", b"K\x01", b"Q", b"s"),
        raw(b"}", b"q\x00", b"X\x01\x00\x00\x00a", b"h\x00", b"s"),
        raw(b"}", b")" + b"\x85" * 200_000, b"K\x01", b"s"),
        raw(b"}", b"X\x01\x00\x00\x00a", ORDERED, b")" + b"\x85" * 200_000, b"R", b"s"),
        b"\x80\x02}",
        b"",
        b"\x80\x02\xff.",
    ],
)
def test_malformed_pickles_are_refused_in_one_line(tmp_path, data):
    with pytest.raises(UserError) as error:
        load_bin(write_archive(tmp_path / "x.bin", data))
    assert "x.bin" in str(error.value) and "\n" not in str(error.value)


def test_dicts_that_double_are_refused(tmp_path):
    level: dict = {"weight": 1}
    for _ in range(60):
        level = {"a": level, "b": level}
    with pytest.raises(UserError, match="elsewhere"):
        load_bin(write_archive(tmp_path / "x.bin", pickle.dumps(level, protocol=2)))


@pytest.mark.parametrize(("key", "shape", "offset", "stride"), [("1", 2, 0, 1), ("0", 7, 0, 1), ("0", 2, 5, 1), ("0", 3, 0, 3)])
def test_tensor_beyond_its_storage_is_refused(tmp_path, key, shape, offset, stride):
    identity = ("storage", torch.FloatStorage, key, "cpu", 6)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return identity if obj is identity else None

    arguments = (identity, offset, (shape,), (stride,), False, collections.OrderedDict())
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"w": Runs(torch._utils._rebuild_tensor_v2, *arguments)})
    path = write_archive(tmp_path / "x.bin", buffer.getvalue(), {"0": np.arange(6, dtype=np.float32).tobytes()})
    with pytest.raises(UserError, match="w"):
        load_bin(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_off_anywhere(tmp_path, zipped):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.randn(40), "b": torch.randn(30)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    load_bin(str(path))
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as error:
            load_bin(str(path))
        assert "\n" not in str(error.value)


def test_flipped_bytes_never_escape(tmp_path):
    """Damage gives values or a UserError, never another exception."""
    path = tmp_path / "x.bin"
    random = np.random.default_rng(3)
    for zipped in (True, False):
        torch.save({"a": torch.randn(4), "b": torch.nn.Parameter(torch.randn(3))}, path, _use_new_zipfile_serialization=zipped)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(300):
            damaged = whole.copy()
            damaged[random.integers(0, len(whole), 3)] = random.integers(0, 256, 3)
            path.write_bytes(damaged.tobytes())
            with contextlib.suppress(UserError):
                load_bin(str(path))


def test_other_files_are_told_apart(tmp_path):
    compressed = write_archive(tmp_path / "c.bin", pickle.dumps({}, protocol=2), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        load_bin(compressed)
    (tmp_path / "p.bin").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(UserError, match=r"not one that torch\.save wrote"):
        load_bin(str(tmp_path / "p.bin"))
    with zipfile.ZipFile(tmp_path / "z.bin", "w") as archive:
        archive.writestr("word/document.xml", "x")
    with pytest.raises(UserError, match=r"data\.pkl"):
        load_bin(str(tmp_path / "z.bin"))
    (tmp_path / "t.bin").write_bytes(struct.pack("<q", 5) * 40)
    with pytest.raises(UserError, match=r"torch\.save"):
        load_bin(str(tmp_path / "t.bin"))
