"""The patcher against closed forms and upstream's arrays; the named features against plain sums over blocks."""

import itertools
import json
import os

import numpy as np
import pytest

from jaxmed.config import ConfigError, EncodeConfig
from jaxmed.data import haar
from jaxmed.data.metadata import Metadata
from jaxmed.data.volumes import preprocess, read_volume

GOLDEN = os.path.join(os.path.dirname(__file__), "..", "golden", "btb3d_encoder")
with open(os.path.join(GOLDEN, "case.json"), encoding="utf-8") as _file:
    CASE = json.load(_file)


def closed_form(x):
    """(1/8) * sum over a 2x2x2 cell of s_a(t) s_b(h) s_c(w) x, the first slice duplicated."""
    x = np.concatenate([x[:1], x]).astype(np.float64)
    signs = {"L": (1, 1), "H": (1, -1)}
    bands = []
    for a, b, c in itertools.product("LH", repeat=3):
        total = 0.0
        for i, j, k in itertools.product((0, 1), repeat=3):
            total = total + signs[a][i] * signs[b][j] * signs[c][k] * x[i::2, j::2, k::2]
        bands.append(total / 8)
    return np.stack(bands)


@pytest.mark.parametrize("depth", [5, 9, 241])
def test_patcher_equals_the_closed_form(depth):
    x = np.random.default_rng(depth).uniform(-1, 1, (depth, 6, 10)).astype(np.float32)
    got = haar.patch(x)
    assert got.shape == (8, (depth + 1) // 2, 3, 5)
    np.testing.assert_allclose(got, closed_form(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [c["name"] for c in CASE["checks"] if c["name"].startswith("haar_")])
def test_patcher_equals_upstream(name):
    check = next(c for c in CASE["checks"] if c["name"] == name)
    canvas, volume = name.removeprefix("haar_").split("_", 1)
    path = os.path.join(GOLDEN, CASE["volumes"][volume]["file"])
    row = Metadata(os.path.join(GOLDEN, "metadata.csv")).of(path)
    config = EncodeConfig(canvas=tuple(CASE["runs"][f"16x16x8_{canvas}"]["canvas_xyz"]))
    got = haar.patch(preprocess(read_volume(path, row), config))[None]
    got = got[(..., *(slice(None, None, n) for n in check.get("stride", ())))]
    want = np.load(os.path.join(GOLDEN, check["golden"]))
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=check["atol"], rtol=0)


def test_even_depth_is_no_input_of_the_patcher():
    with pytest.raises(ValueError, match="odd depth"):
        haar.patch(np.zeros((4, 2, 2), np.float32))


def blocks(x, size):
    """[T, H, W] -> [t, h, w, places]"""
    (t, h, w), (p, q, r) = (n // s for n, s in zip(x.shape, size, strict=True)), size
    return x.reshape(t, p, h, q, w, r).transpose(0, 2, 4, 1, 3, 5).reshape(t, h, w, -1)


def test_features_are_what_their_names_say():
    x = np.random.default_rng(3).normal(size=(8, 12, 4)).astype(np.float32)
    names = ("LLL2", "HLH2", "LHL1", "|LLH1|", "|HHH1|", "max1", "min0", "dev1", "dev0")
    config = EncodeConfig(canvas=(12, 4, 8), levels=(2, 2, 2), bands=names)
    got = dict(zip(names, haar.encode(x, config), strict=True))
    level1 = plain_level(x)
    level2 = plain_level(level1["LLL"])
    np.testing.assert_allclose(got["LLL2"], blocks(x, (4, 4, 4)).mean(-1), atol=1e-6)
    np.testing.assert_allclose(got["HLH2"], level2["HLH"], atol=1e-6)
    np.testing.assert_allclose(got["LHL1"], blocks(level1["LHL"], (2, 2, 2)).mean(-1), atol=1e-6)
    np.testing.assert_allclose(got["|LLH1|"], np.abs(blocks(level1["LLH"], (2, 2, 2))).mean(-1), atol=1e-6)
    np.testing.assert_allclose(got["|HHH1|"], np.abs(blocks(level1["HHH"], (2, 2, 2))).mean(-1), atol=1e-6)
    np.testing.assert_allclose(got["max1"], blocks(level1["LLL"], (2, 2, 2)).max(-1), atol=1e-6)
    np.testing.assert_allclose(got["min0"], blocks(x, (4, 4, 4)).min(-1), atol=1e-6)
    for name, values in (("dev1", blocks(level1["LLL"], (2, 2, 2))), ("dev0", blocks(x, (4, 4, 4)))):
        spread = np.abs(values - values.mean(-1, keepdims=True)).mean(-1)
        np.testing.assert_allclose(got[name], spread, atol=1e-6)


def plain_level(x):
    """Bands of one level in three axes, cell by cell."""
    cells = blocks(x, (2, 2, 2)).reshape(*(n // 2 for n in x.shape), 2, 2, 2).astype(np.float64)
    signs = {"L": np.array([1, 1]), "H": np.array([1, -1])}
    return {
        a + b + c: np.einsum("thwijk,i,j,k->thw", cells, signs[a], signs[b], signs[c]) / 8
        for a, b, c in itertools.product("LH", repeat=3)
    }


def test_axis_with_fewer_levels_leaves_out_the_first():
    x = np.random.default_rng(4).normal(size=(2, 8, 4)).astype(np.float32)
    got = haar.encode(x, EncodeConfig(canvas=(8, 4, 2), levels=(1, 2, 2), bands=("HLL2", "LHH2", "max1")))
    averages = x.reshape(2, 4, 2, 2, 2).mean((2, 4))
    level2 = plain_level(averages)
    np.testing.assert_allclose(got[0], level2["HLL"], atol=1e-6)
    np.testing.assert_allclose(got[1], level2["LHH"], atol=1e-6)
    np.testing.assert_allclose(got[2], blocks(averages, (2, 2, 2)).max(-1), atol=1e-6)


def test_missing_depth_repeats_the_first_slice():
    x = np.random.default_rng(5).normal(size=(17, 4, 4)).astype(np.float32)
    config = EncodeConfig(canvas=(4, 4, 17), levels=(3, 2, 2), bands=("LLL3",))
    got = haar.encode(x, config)
    assert got.shape == (1, 3, 1, 1) == haar.token_shape(config)
    np.testing.assert_allclose(got[0, :, 0, 0], [x[0].mean(), x[1:9].mean(), x[9:].mean()], atol=1e-6)


def test_default_features_fill_the_published_shapes():
    assert haar.token_shape(EncodeConfig()) == (18, 31, 32, 32)
    small = EncodeConfig(canvas=(48, 48, 32), spacing=(8.0, 8.0, 10.5), levels=(2, 2, 2))
    assert haar.token_shape(small) == (18, 8, 12, 12)
    assert haar.encode(np.zeros((32, 48, 48), np.float32), small).shape == (18, 8, 12, 12)
    assert haar.default_bands((1, 1, 1))[-3:] == ("max0", "min0", "dev0")
    for levels in ((1, 2, 2), (1, 1, 1), (2, 1, 2), (0, 1, 1)):
        config = EncodeConfig(canvas=(8, 8, 8), levels=levels)
        assert np.isfinite(haar.encode(np.ones((8, 8, 8), np.float32), config)).all()


def test_signature_names_everything_that_tokens_depend_on():
    base = EncodeConfig()
    others = [
        EncodeConfig(canvas=(512, 512, 233)),
        EncodeConfig(spacing=(0.75, 0.75, 1.25)),
        EncodeConfig(hu_range=(-1000.0, 200.0)),
        EncodeConfig(levels=(2, 4, 4)),
        EncodeConfig(bands=(*haar.default_bands(base.levels)[:-1], "dev2")),
    ]
    signatures = {haar.signature(config) for config in (base, *others)}
    assert len(signatures) == 6
    assert "nonlinear" in haar.signature(base)
    assert haar.signature(EncodeConfig(bands=haar.default_bands(base.levels))) == haar.signature(base)


@pytest.mark.parametrize("name", ["LLX1", "LL1", "|LLH|", "mean1", "max", "LLL5", "HLL1", "LLH0", "|HLL2|", ""])
def test_impossible_feature_is_refused_by_name(name):
    config = EncodeConfig(canvas=(16, 16, 16), levels=(2, 4, 4), bands=("LLL4", name))
    with pytest.raises(ConfigError, match=r"encode\.bands has"):
        haar.check_bands(config)


def test_canvas_must_divide():
    with pytest.raises(ConfigError, match="columns are not a multiple"):
        EncodeConfig(canvas=(48, 44, 32), levels=(2, 3, 3))
