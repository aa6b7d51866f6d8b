"""Linear with its adapter, norms and rotary embeddings, against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmed.config import MeshConfig, RopeConfig
from jaxmed.nn.dropout import Dropout
from jaxmed.nn.linear import Adapter, Linear, merged_weight
from jaxmed.nn.norm import LayerNorm, RMSNorm
from jaxmed.nn.rope import inverse_frequencies, rope_angles, rotate
from jaxmed.sharding import Rules, make_mesh

RULES = Rules()
OUT = ("batch", "length", None)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(MeshConfig(1), jax.devices()[:1])):
        yield


def x_of(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def linear(rank=3, alpha=7.0, bias=True):
    made = Linear(11, 5, ("embed", None), jax.random.key(4), std=0.3, bias=bias, adapter=Adapter(rank, alpha))
    if bias:
        made.bias[...] = x_of(11, seed=8)
    return made


def test_linear_with_an_adapter():
    layer, x = linear(), x_of(2, 7, 5)
    plain = np.einsum("bti,oi->bto", x, layer.weight[...]) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(layer(x, RULES, OUT, None), plain, atol=1e-6, err_msg="B starts at zero")
    layer.lora_b[...] = x_of(11, 3, seed=1)
    a, b = np.asarray(layer.lora_a[...], np.float64), np.asarray(layer.lora_b[...], np.float64)
    wanted = plain + (7.0 / 3) * np.einsum("bti,ri,or->bto", x, a, b)
    np.testing.assert_allclose(layer(x, RULES, OUT, None), wanted, atol=1e-5)
    merged = merged_weight(layer.weight[...], layer.lora_a[...], layer.lora_b[...], layer.adapter.scale)
    np.testing.assert_allclose(merged, layer.weight[...] + (7.0 / 3) * b @ a, atol=1e-6)
    stacked = merged_weight(*(jnp.stack([p[...]] * 2) for p in (layer.weight, layer.lora_a, layer.lora_b)), 7.0 / 3)
    np.testing.assert_allclose(stacked[1], merged, atol=1e-6)


def test_dropout_touches_the_adapters_input_alone():
    layer, x = linear(), x_of(2, 7, 5)
    layer.lora_b[...] = x_of(11, 3, seed=1)
    bits = Dropout.for_tokens(jax.random.key(0), jnp.ones((2, 7), jnp.int32), jnp.arange(14).reshape(2, 7), 0.4)
    plain = np.einsum("bti,oi->bto", x, layer.weight[...]) + np.asarray(layer.bias[...])
    dropped = np.asarray(bits(x, RULES, None))
    assert 0 < (dropped == 0).mean() < 1
    wanted = plain + (7.0 / 3) * np.einsum("bti,ri,or->bto", dropped, layer.lora_a[...], layer.lora_b[...])
    np.testing.assert_allclose(layer(x, RULES, OUT, bits), wanted, atol=1e-5)


def test_merging_bfloat16_weights_rounds_once():
    w, a, b = x_of(9, 6, dtype=jnp.bfloat16), x_of(2, 6, seed=1), x_of(9, 2, seed=2)
    merged = merged_weight(w, a, b, 1.7)
    assert merged.dtype == jnp.bfloat16
    exact = np.asarray(w, np.float32) + 1.7 * np.asarray(b) @ np.asarray(a)
    np.testing.assert_array_equal(merged, jnp.asarray(exact).astype(jnp.bfloat16))


def test_initial_values():
    layer = Linear(300, 400, ("heads", "embed"), jax.random.key(0), std=0.03, bias=True, adapter=Adapter(16, 1.0))
    weight, a = np.asarray(layer.weight[...]), np.asarray(layer.lora_a[...])
    assert weight.std() == pytest.approx(0.03, rel=0.02) and np.abs(weight).max() > 0.09, "normal"
    assert not np.any(layer.bias[...]) and not np.any(layer.lora_b[...])
    assert np.abs(a).max() == pytest.approx(1 / math.sqrt(400), rel=0.01), "uniform up to 1 / sqrt(in)"
    assert a.std() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    torchs = Linear(300, 400, (None, None), jax.random.key(0), std=-1.0, bias=True)
    for p in (torchs.weight, torchs.bias):
        assert np.abs(p[...]).max() == pytest.approx(1 / math.sqrt(400), rel=0.03)


def test_rms_norm_multiplies_after_the_cast():
    norm = RMSNorm(33, 1e-2)
    norm.scale[...] = 1 + x_of(33, seed=3)
    x = x_of(2, 5, 33)
    exact = np.asarray(x) / np.sqrt((np.asarray(x, np.float64) ** 2).mean(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(norm(x, RULES), exact * np.asarray(norm.scale[...]), rtol=1e-5, atol=1e-6)
    x16 = x.astype(jnp.bfloat16)
    x32 = np.asarray(x16, np.float32)
    normed = jnp.asarray(x32 / np.sqrt((x32**2).mean(-1, keepdims=True) + 1e-2)).astype(jnp.bfloat16)
    wanted = normed * norm.scale[...].astype(jnp.bfloat16)
    off = np.asarray(norm(x16, RULES) != wanted).mean()
    assert norm(x16, RULES).dtype == jnp.bfloat16 and off < 0.02, "but for ties in float32"


def test_layer_norm():
    norm = LayerNorm(18, 1e-2)
    norm.scale[...], norm.bias[...] = x_of(18, seed=1), x_of(18, seed=2)
    x = 3 + x_of(4, 18)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(norm(x), exact * norm.scale[...] + norm.bias[...], atol=2e-6)


def test_rotation_depends_on_distance_alone_and_keeps_lengths():
    rope = RopeConfig(theta=321.0)
    q, k = x_of(1, 1, 1, 10), x_of(1, 1, 1, 10, seed=1)

    def turned(x, position):
        return np.asarray(rotate(x, rope_angles(jnp.full((1, 1), position), rope, 10, False)))[0, 0, 0]

    dots = [turned(q, p) @ turned(k, p - 7) for p in (7, 40, 1999)]
    np.testing.assert_allclose(dots, dots[0], atol=2e-3)
    assert abs(dots[0] - turned(q, 9) @ turned(k, 3)) > 0.01
    np.testing.assert_allclose(np.linalg.norm(turned(q, 777)), np.linalg.norm(np.asarray(q)), rtol=1e-5)
    # feature i goes with i + H / 2
    x = jnp.zeros((1, 1, 1, 10)).at[..., 1].set(1.0)
    angle = 3 * 321.0 ** (-2 / 10)
    wanted = np.zeros(10)
    wanted[1], wanted[6] = math.cos(angle), math.sin(angle)
    np.testing.assert_allclose(turned(x, 3), wanted, atol=1e-6)


def test_llama3_scaling_has_three_regions():
    rope = RopeConfig(10000.0, "llama3", factor=6.0, low_freq_factor=1.5, high_freq_factor=5.0, original_positions=300)
    plain, scaled = inverse_frequencies(RopeConfig(10000.0), 32), inverse_frequencies(rope, 32)
    ratio = plain / scaled
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 300 / 5.0, wavelength > 300 / 1.5
    assert short.any() and long.any() and (~short & ~long).any()
    np.testing.assert_allclose(ratio[short], 1.0)
    np.testing.assert_allclose(ratio[long], 6.0, rtol=1e-6)
    assert ((ratio > 1) & (ratio < 6))[~short & ~long].all() and (np.diff(ratio) > -1e-5).all()


def test_angles_of_far_positions_are_float32_exact():
    rope = RopeConfig(500000.0, "llama3")
    cos, _ = rope_angles(jnp.asarray([[131071, 33000]]), rope, 128, False)
    exact = np.cos(np.asarray([131071, 33000])[:, None] * inverse_frequencies(rope, 128).astype(np.float64))
    assert np.abs(np.asarray(cos[0]) - exact).max() < 0.01, "float32 angles err by half a unit in the last place, 0.008 at most"


def test_parameters_keep_their_axes_through_a_split():
    assert nnx.state(linear())["weight"].axes == ("embed", None)
