"""Token files: names, headers, merging, packed codes, and what is refused."""

import os
import tracemalloc
import zipfile

import numpy as np
import pytest

from jaxmed.config import VisualConfig
from jaxmed.data.embeddings import (
    Header,
    encoder_problem,
    header_problem,
    load_tokens,
    merge_neighbours,
    merged_grid,
    npz_name,
    npz_path,
    pack_codes,
    read_header,
    unpack_codes,
    write_npz,
)
from jaxmed.errors import UserError

GOLDEN = os.path.join(os.path.dirname(__file__), "..", "golden", "btb3d")
PLAIN = VisualConfig(features=18, tokens=210, grid=(5, 6, 7))
MERGED = VisualConfig(features=72, tokens=60, grid=(3, 4, 5), merge=(1, 2, 2))


def signs(shape, seed=0):
    return np.where(np.random.default_rng(seed).random(shape) < 0.5, -1, 1).astype(np.float32)


@pytest.mark.parametrize("image", ["v_1_a.nii.gz", "v_1_a.nii", "v_1_a.npz", "v_1_a.nii_embedded.npz"])
def test_path_rule(image):
    assert npz_name(image) == "v_1_a.nii_embedded.npz"
    assert npz_name(npz_name(image)) == npz_name(image)
    assert npz_path("tokens", image) == npz_path("tokens/", image) == "tokens/v_1_a.nii_embedded.npz"
    assert npz_path("tokens/", "/sub/" + image) == "tokens/sub/v_1_a.nii_embedded.npz"


def test_codes_of_all_18_bits():
    codes = np.arange(2**18, dtype=np.uint32).reshape(64, 64, 64)
    unpacked = unpack_codes(codes)
    assert unpacked.shape == (18, 64, 64, 64) and unpacked.dtype == np.float32
    assert set(np.unique(unpacked)) == {-1.0, 1.0}
    np.testing.assert_array_equal(pack_codes(unpacked), codes)


def test_first_channel_is_the_most_significant_bit_and_zero_counts_as_minus():
    for channel, code in ((0, 131072), (17, 1)):
        x = np.zeros((18, 1, 1, 1))
        x[channel] = 0.25
        assert pack_codes(x).item() == code
    assert pack_codes(np.ones((18, 1))).item() == 262143


def test_merge_order_and_inverse():
    c, t, h, w, p0, p1, p2 = 3, 2, 4, 5, 2, 3, 2
    x = np.arange(c * t * p0 * h * p1 * w * p2).reshape(c, t * p0, h * p1, w * p2)
    merged = merge_neighbours(x, (p0, p1, p2))
    assert merged.shape == (c * p0 * p1 * p2, t, h, w)
    for channel, a, b, d in ((0, 0, 0, 0), (2, 1, 2, 1), (1, 0, 2, 1), (2, 1, 0, 0)):
        np.testing.assert_array_equal(merged[((channel * p0 + a) * p1 + b) * p2 + d], x[channel, a::p0, b::p1, d::p2])
    back = merged.reshape(c, p0, p1, p2, t, h, w).transpose(0, 4, 1, 5, 2, 6, 3).reshape(x.shape)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("name", ["valid_57_a_1", "valid_21_a_2"])
def test_merging_at_load_gives_what_was_merged_in_the_file(name):
    folder = os.path.join(GOLDEN, "embeddings_8x8x8", name)
    before, grid = load_tokens(folder + ".unmerged.npz", MERGED)
    after, same_grid = load_tokens(folder + ".nii_embedded.npz", MERGED)
    assert before.shape[1] == 72 and len(before) == grid[0] * grid[1] * grid[2] and grid == same_grid
    np.testing.assert_array_equal(before, after)
    with np.load(folder + ".nii_embedded.npz") as file:
        np.testing.assert_array_equal(before, file["arr"][0].transpose(1, 2, 3, 0).reshape(-1, 72))


def test_reversed_channels_are_those_of_the_file_before_merging():
    reverse = VisualConfig(features=72, tokens=60, merge=(1, 2, 2), channel_order="reverse")
    folder = os.path.join(GOLDEN, "embeddings_8x8x8", "valid_57_a_1")
    with np.load(folder + ".unmerged.npz") as file:
        flipped = merge_neighbours(file["arr"][0][::-1], (1, 2, 2)).reshape(72, -1).T
    assert not np.array_equal(flipped, load_tokens(folder + ".unmerged.npz", MERGED)[0])
    for suffix in (".unmerged.npz", ".nii_embedded.npz"):
        np.testing.assert_array_equal(load_tokens(folder + suffix, reverse)[0], flipped)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_written_and_read(tmp_path, dtype):
    """(1, 18, T, H, W) -> (N, 18), depth slowest and columns fastest."""
    x = np.random.default_rng(3).standard_normal((18, 5, 6, 7)).astype(dtype)
    path = str(tmp_path / "a.nii_embedded.npz")
    np.savez(path, arr=x[None])
    assert read_header(path) == Header(path, (18, 5, 6, 7), dtype, "arr", "")
    tokens, grid = load_tokens(path, PLAIN)
    assert tokens.shape == (210, 18) and tokens.dtype == np.float32 and grid == (5, 6, 7)
    np.testing.assert_array_equal(tokens[(2 * 6 + 4) * 7 + 5], x[:, 2, 4, 5].astype(np.float32))
    write_npz(path, x, "mine 3")
    with np.load(path) as file:
        assert file["arr"].shape == (1, 18, 5, 6, 7) and file["arr"].dtype == np.float32
    assert read_header(path).encoder == "mine 3"
    np.testing.assert_array_equal(load_tokens(path, PLAIN)[0], tokens)
    assert os.listdir(tmp_path) == ["a.nii_embedded.npz"]


def test_codes_and_floats_hold_the_same(tmp_path):
    x = signs((18, 3, 8, 10))
    floats, codes = str(tmp_path / "f.npz"), str(tmp_path / "c.npz")
    write_npz(floats, x, "e")
    write_npz(codes, pack_codes(x), "e")
    assert read_header(codes) == Header(codes, (18, 3, 8, 10), "uint32", "codes", "e")
    assert merged_grid(read_header(codes), MERGED) == (3, 4, 5)
    np.testing.assert_array_equal(load_tokens(codes, MERGED)[0], load_tokens(floats, MERGED)[0])
    packed = VisualConfig(kind="codes", features=72, tokens=60, grid=(3, 4, 5), merge=(1, 2, 2))
    for path in (floats, codes):
        loaded, grid = load_tokens(path, packed)
        assert loaded.shape == (240,) and loaded.dtype == np.uint32 and grid == (3, 4, 5)
        np.testing.assert_array_equal(loaded, pack_codes(x).reshape(-1))


def test_header_is_read_without_the_data(tmp_path):
    path = str(tmp_path / "big.npz")
    np.savez(path, arr=np.ones((1, 18, 31, 32, 32), np.float32))
    tracemalloc.start()
    read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


def test_archives_of_compressed_arrays_serve(tmp_path):
    x = signs((18, 5, 6, 7))
    np.savez_compressed(tmp_path / "z.npz", arr=x[None], encoder="z", other=np.arange(3))
    path = str(tmp_path / "z.npz")
    assert read_header(path).encoder == "z"
    np.testing.assert_array_equal(load_tokens(path, PLAIN)[0], x.reshape(18, -1).T)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": np.zeros(3)}, "no array `arr` or `codes`.*found: tokens"),
        ({"arr": np.zeros((18, 5, 6, 7), np.float32)}, r"shape \(1, C, T, H, W\), found float32 \(18, 5, 6, 7\)"),
        ({"arr": np.zeros((2, 18, 5, 6, 7), np.float32)}, r"\(2, 18, 5, 6, 7\)"),
        ({"arr": np.zeros((1, 18, 5, 0, 7), np.float32)}, "empty"),
        ({"arr": np.array([[object()]])}, "Python objects"),
        ({"arr": np.zeros((1, 18, 5, 6, 7), np.complex64)}, "complex64"),
        ({"codes": np.zeros((1, 5, 6, 7), np.int64)}, "must be uint32"),
        ({"codes": np.zeros((5, 6, 7), np.uint32)}, r"\(1, T, H, W\)"),
        ({"arr": np.zeros((1, 18, 5, 6, 7), np.float32), "encoder": np.arange(2)}, "`encoder` must be one string"),
    ],
)
def test_bad_headers(tmp_path, arrays, message):
    path = str(tmp_path / "bad.npz")
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as error:
        read_header(path)
    assert path in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        load_tokens(path, PLAIN)


def test_missing_torn_and_foreign_files(tmp_path):
    path = str(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"x\.npz: no such file"):
        read_header(path)
    np.savez(path, arr=signs((18, 5, 6, 7))[None])
    whole = (tmp_path / "x.npz").read_bytes()
    for torn in (whole[:400], whole[:-30], b"", b"not a zip", whole[200:]):
        (tmp_path / "x.npz").write_bytes(torn)
        with pytest.raises(UserError, match=r"x\.npz: .*(copy or )?encode"):
            read_header(path)
    np.save(path + ".npy", np.zeros(3))
    with pytest.raises(UserError, match=r"not a readable \.npz"):
        read_header(path + ".npy")
    with pytest.raises(UserError, match="not a readable"):
        read_header(str(tmp_path))


def test_short_or_changed_data_is_noticed(tmp_path):
    path = str(tmp_path / "x.npz")
    with zipfile.ZipFile(path, "w") as archive:
        np.save(tmp_path / "a.npy", signs((18, 5, 6, 7))[None])
        archive.writestr("arr.npy", (tmp_path / "a.npy").read_bytes()[:-40])
    with pytest.raises(UserError, match="cut short"):
        read_header(path)
    np.savez(path, arr=signs((18, 5, 6, 7))[None])
    changed = bytearray((tmp_path / "x.npz").read_bytes())
    changed[2000] ^= 0xFF
    (tmp_path / "x.npz").write_bytes(changed)
    read_header(path)
    with pytest.raises(UserError, match="CRC"):
        load_tokens(path, PLAIN)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(tmp_path, bad):
    x = signs((18, 5, 6, 7))
    x[3, 2, 1, 4] = bad
    path = str(tmp_path / "n.npz")
    np.savez(path, arr=x[None])
    with pytest.raises(UserError, match="1 of 3780 values are NaN or infinite"):
        load_tokens(path, PLAIN)


def test_large_finite_values_pass_and_overflow_of_float32_does_not(tmp_path):
    path = str(tmp_path / "n.npz")
    np.savez(path, arr=np.full((1, 18, 5, 6, 7), 3e38, np.float32))
    assert load_tokens(path, PLAIN)[0].max() == np.float32(3e38)
    np.savez(path, arr=np.full((1, 18, 5, 6, 7), 1e39))
    with pytest.raises(UserError, match="infinite in float32"):
        load_tokens(path, PLAIN)


def test_codes_only_from_signs_and_below_2_to_18(tmp_path):
    path = str(tmp_path / "n.npz")
    config = VisualConfig(kind="codes", features=18, tokens=210, grid=(5, 6, 7))
    x = signs((18, 5, 6, 7))
    x[0, 0, 0, 0] = 0.5
    np.savez(path, arr=x[None])
    with pytest.raises(UserError, match=r"not all \+1 or -1"):
        load_tokens(path, config)
    np.savez(path, codes=np.full((1, 5, 6, 7), 2**18, np.uint32))
    for visual in (config, PLAIN):
        with pytest.raises(UserError, match="262144, above 262143"):
            load_tokens(path, visual)


def test_headers_against_the_config():
    def header(*shape):
        return Header("d/x.npz", shape, "float32", "arr", "")

    assert header_problem(header(18, 3, 8, 10), MERGED) == ""
    assert header_problem(header(72, 3, 4, 5), MERGED) == ""
    assert "has 20 channels, expected 18 or 72" in header_problem(header(20, 3, 8, 10), MERGED)
    assert "has 20 channels, expected 18;" in header_problem(header(20, 3, 8, 10), PLAIN)
    assert "(3, 8, 9), which visual.merge (1, 2, 2)" in header_problem(header(18, 3, 8, 9), MERGED)
    assert "80 tokens, visual.tokens is 60" in header_problem(header(18, 4, 8, 10), MERGED)
    assert header_problem(header(18, 2, 8, 10), MERGED) == ""
    codes = VisualConfig(kind="codes", features=72, tokens=60, grid=(3, 4, 5), merge=(1, 2, 2))
    assert header_problem(header(18, 3, 8, 10), codes) == ""
    assert "(3, 5, 4) after merging" in header_problem(header(18, 3, 10, 8), codes)
    assert "needs files of 18" in header_problem(header(72, 3, 4, 5), codes)
    assert "not a multiple of the 4" in header_problem(header(18, 3, 8, 10), VisualConfig(features=18, merge=(1, 2, 2)))


def test_encoders_never_mix():
    signed, unsigned = (Header("d/x.npz", (18, 1, 1, 1), "float32", "arr", name) for name in ("haar/2", ""))
    assert encoder_problem(signed, "haar/2") == encoder_problem(signed, "") == encoder_problem(unsigned, "haar/2") == ""
    assert "encoder 'haar/2', expected 'btb3d'" in encoder_problem(signed, "btb3d")


def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch):
    path = str(tmp_path / "x.npz")
    write_npz(path, signs((18, 2, 2, 2)), "first")

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"x\.npz: cannot be written.*No space left.*make room"):
        write_npz(path, signs((18, 2, 2, 2)), "second")
    assert os.listdir(tmp_path) == ["x.npz"] and read_header(path).encoder == "first"
