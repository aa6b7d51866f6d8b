"""Weight folders open by their headers; slices equal those of safetensors and torch; damage is told in one line."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jaxmed.checkpoint.hf_io import base_fingerprint, is_finite, open_folder, weight_files
from jaxmed.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"
TENSORS = {
    "single": torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(1)),
    "half": torch.arange(15.0).reshape(3, 5).half(),
    "brain": torch.linspace(-3, 4, 33).reshape(11, 3).bfloat16(),
    "long": torch.arange(4) * 2**33,
    "byte": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(-1.25),
    "none": torch.zeros(0, 3),
    "eighth": torch.tensor([1.5, -2.0, 448.0]).to(torch.float8_e4m3fn),
}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    views = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16), torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn)}
    if tensor.dtype in views:
        plain, dtype = views[tensor.dtype]
        return tensor.view(plain).numpy().view(dtype)
    return tensor.numpy()


def folder_with(tmp_path: Path, split: int) -> Path:
    """The sample tensors in `split` shards with an index."""
    names = list(TENSORS)
    weight_map = {}
    for i in range(split):
        file = f"model-{i + 1:05d}-of-{split:05d}.safetensors"
        part = {name: TENSORS[name] for name in names[i::split]}
        save_file(part, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def refused(path: Path | str, *words: str) -> None:
    with pytest.raises(UserError) as error:
        open_folder(str(path))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("layout", ["one", "sharded", "loose", "file", "bin", "sharded_bin"])
def test_every_layout_and_dtype(tmp_path, layout):
    path = tmp_path
    plain = {k: v for k, v in TENSORS.items() if k != "eighth"}
    if layout in ("one", "file"):
        save_file(TENSORS, tmp_path / "model.safetensors")
        path = tmp_path / "model.safetensors" if layout == "file" else tmp_path
    elif layout in ("sharded", "loose"):
        folder_with(tmp_path, 3)
        if layout == "loose":
            (tmp_path / "model.safetensors.index.json").unlink()
    elif layout == "bin":
        torch.save(plain, tmp_path / "pytorch_model.bin")
    else:
        names = list(plain)
        for i in range(2):
            torch.save({n: plain[n] for n in names[i::2]}, tmp_path / f"pytorch_model-{i}.bin")
        index = {"weight_map": {n: f"pytorch_model-{i % 2}.bin" for i, n in enumerate(names)}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    tensors = plain if "bin" in layout else TENSORS
    folder = open_folder(str(path))
    assert sorted(folder.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        want = as_numpy(tensor)
        assert folder.shape(name) == tuple(tensor.shape)
        assert folder.dtype(name) == want.dtype
        np.testing.assert_array_equal(folder.read(name), want)
        assert name in folder.where(name) and str(tmp_path) in folder.where(name)
    np.testing.assert_array_equal(folder.read("single", np.s_[2:6, :, 1:]), tensors["single"].numpy()[2:6, :, 1:])
    np.testing.assert_array_equal(folder.read("brain", np.s_[:, 1]), as_numpy(tensors["brain"])[:, 1])
    copy = folder.read("half", np.s_[1])
    copy[:] = 0  # a copy, not a view of the file
    assert folder.read("half", np.s_[1]).any()
    with pytest.raises(UserError, match="no tensor absent"):
        folder.read("absent")


def test_golden_adapter_joins_its_two_files():
    folder = open_folder(str(GOLDEN / "llava_lora_z3" / "checkpoint-10"))
    assert len(folder.names()) == 4 * 7 * 2 + 5
    assert folder.shape("base_model.model.model.embed_tokens.weight") == (437, 54)
    assert folder.files["base_model.model.model.embed_tokens.weight"] == "non_lora_trainables.bin"


def test_safetensors_win_over_bin_and_strangers_are_left_alone(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    save_file({"layers.0.wq": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "training_args.bin").write_bytes(b"cos\nsystem\n")
    (tmp_path / "optimizer.bin").write_bytes(b"cos\nsystem\n")
    folder = open_folder(str(tmp_path))
    assert folder.names() == ["a"] and folder.read("a").tolist() == [1, 1]


def test_missing_things(tmp_path):
    refused(tmp_path / "absent", "absent", "downloads nothing")
    refused("meta-llama/Llama-3.1-8B", "no such folder")
    refused(tmp_path, "no weight file", "non_lora_trainables.bin")
    folder_with(tmp_path, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00003.safetensors", "download")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, "model-00002-of-00003.safetensors", "download")


def test_index_and_shard_disagree(tmp_path):
    folder_with(tmp_path, 2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = content["weight_map"]["single"]
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"ghost": first}}))
    refused(tmp_path, f"ghost ({first})")
    for bad in ("../x.safetensors", "/etc/passwd", 3, "", ".."):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        refused(tmp_path, "weight_map")
    index.write_text("[]")
    refused(tmp_path, "index.json", "object")
    index.write_text("{")
    refused(tmp_path, "index.json", "JSON")


def test_same_name_twice(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "both in model.safetensors and in adapter_model.safetensors")


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    open_folder(str(tmp_path))
    for length in [0, 5, 8, 9, 60, *range(200, len(whole), 101), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(tmp_path, "model.safetensors")
    path.write_bytes(whole + b"x")
    refused(tmp_path, "belong to no tensor")
    path.write_bytes(whole[:-7])
    refused(tmp_path, "cut off", "download")
    path.write_bytes(b"<html>not found</html>" * 9)
    refused(tmp_path, "not a safetensors file")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    refused(tmp_path, "git lfs pull")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        7,
    ],
)
def test_damaged_header_entry(tmp_path, entry):
    raw = json.dumps({"tensor": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    refused(tmp_path, "model.safetensors")


def test_fingerprint(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    folder_with(one, 3)
    shutil.copytree(one, two)
    (two / "README.md").write_text("another place, the same weights")
    start = base_fingerprint(str(one))
    assert start == base_fingerprint(str(two)) and len(start) == 64
    shard = two / "model-00001-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1  # same header, same size: a sister model
    shard.write_bytes(content)
    assert base_fingerprint(str(two)) != start
    other = tmp_path / "other"
    other.mkdir()
    assert base_fingerprint(str(folder_with(other, 2))) != start
    torch.save(TENSORS["single"], one / "adapter_model.bin")
    assert base_fingerprint(str(one)) != start


def test_is_finite():
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
        array = np.linspace(-60000, 60000, 35).reshape(5, 7).astype(dtype)
        assert is_finite(array)
        for bad in (np.nan, np.inf, -np.inf):
            spoilt = array.copy()
            spoilt[4, 3] = bad
            assert not is_finite(spoilt), (dtype, bad)
    assert is_finite(np.arange(3))


def test_weight_files_of_the_golden_base():
    assert weight_files(str(GOLDEN / "base")) == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]


def test_no_more_is_read_than_asked_for(tmp_path):
    """A sparse file of 16 GB: opening and slicing it must not touch the rest."""
    rows, columns = 2**21, 2**11
    entry = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, rows * columns * 4]}
    raw = json.dumps({"vast": entry}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + rows * columns * 4)
        file.seek(8 + len(raw) + 4 * (1_000_003 * columns + 17))
        file.write(np.float32(2.5).tobytes())
    piece = open_folder(str(tmp_path)).read("vast", np.s_[1_000_000:1_000_007, 10:20])
    assert piece.shape == (7, 10) and piece[3, 7] == 2.5 and piece.sum() == 2.5
    assert len(base_fingerprint(str(tmp_path))) == 64


def test_bin_files_of_m3d_and_samf(tmp_path):
    """Whole models and a tower without safetensors beside them; a single file of any name; several of which are a question."""
    (tmp_path / "rng_state_0.pth").write_bytes(b"cos\nsystem\n")
    refused(tmp_path, "no weight file", "model_with_lora.bin")
    torch.save({"step": torch.full((2,), 20.0)}, tmp_path / "model_with_lora_20.bin")
    assert open_folder(str(tmp_path)).names() == ["step"]
    torch.save({"step": torch.full((2,), 40.0)}, tmp_path / "model_with_lora_40.bin")
    refused(tmp_path, "model_with_lora_20.bin, model_with_lora_40.bin", "keep the one")
    for name in ("pretrained_ViT.bin", "model_with_lora.bin", "merged_model.bin"):  # the later the stronger
        torch.save({name: torch.ones(2)}, tmp_path / name)
        assert open_folder(str(tmp_path)).names() == [name]
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert open_folder(str(tmp_path)).names() == ["a"]
