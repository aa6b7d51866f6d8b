"""Files written tensor by tensor: torch and safetensors read them, our readers too."""

import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jaxmed.checkpoint.hf_io import is_finite
from jaxmed.checkpoint.tensor_files import Tensor, parse_size, write_safetensors
from jaxmed.checkpoint.torch_pickle import load_bin
from jaxmed.checkpoint.torch_pickle_writer import _integer, save_bin
from jaxmed.errors import UserError


def assert_bits_equal(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert array.dtype == two[name].dtype and array.shape == two[name].shape, name
        assert array.tobytes() == two[name].tobytes(), name


def planned(arrays: dict[str, np.ndarray]) -> list[Tensor]:
    return [Tensor(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()]


def odd_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = {"z.weight": (3, 5, 2), "a.bias": (7,), "scalar": (), "none": (0, 4)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["turned"] = rng.normal(size=(4, 6)).astype(np.float32).T
    arrays["brain \u00e9"] = rng.normal(size=(9, 3)).astype(ml_dtypes.bfloat16)
    arrays["half"] = rng.normal(size=(11,)).astype(np.float16)
    return arrays


def test_torch_reads_the_pickle(tmp_path):
    arrays = odd_arrays()
    save_bin(str(tmp_path / "x.bin"), planned(arrays))
    for mmap in (False, True):
        found = torch.load(tmp_path / "x.bin", weights_only=True, mmap=mmap)
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            assert str(found[name].dtype).removeprefix("torch.") == array.dtype.name and found[name].is_contiguous()
            np.testing.assert_array_equal(found[name].float().numpy(), array.astype(np.float32))
    ours = load_bin(str(tmp_path / "x.bin"))
    assert_bits_equal({name: np.array(x) for name, x in ours.items()}, arrays)
    data = (tmp_path / "x.bin").read_bytes()
    assert all(data.index(x.tobytes()) % 64 == 0 for x in arrays.values() if x.nbytes > 8)


@pytest.mark.parametrize("value", [0, 255, 2**31 - 1, 2**31, 2**39 + 5, 2**63 + 1])
def test_sizes_of_any_length_are_written(value):
    assert pickle.loads(b"\x80\x02" + _integer(value) + b".") == value


def test_safetensors_reads_the_file(tmp_path):
    arrays = odd_arrays()
    write_safetensors(str(tmp_path / "x.safetensors"), planned(arrays))
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].float().numpy(), array.astype(np.float32))
    assert (8 + int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")) % 8 == 0


def test_sizes_of_shards():
    assert [parse_size(text, "f") for text in ("5GB", "1.5 MB", "2KiB", "77")] == [5 * 10**9, 1_500_000, 2048, 77]
    for text in ("", "GB", "5 tons", "-3MB", "0GB", "inf", "nan"):
        with pytest.raises(UserError, match="--shard-size"):
            parse_size(text, "--shard-size")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_bad_value_is_found_wherever_it_is(dtype):
    array = np.zeros((1300, 1700), dtype)
    array[1299, 1699] = np.inf
    assert not is_finite(array) and not is_finite(array.T) and is_finite(array[:1299])
