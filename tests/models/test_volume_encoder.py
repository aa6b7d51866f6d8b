"""The volume encoder's published sizes, what its outputs may depend on, and configs that cannot be one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmed.config import ConfigError
from jaxmed.models.volume_encoder import PUBLISHED, VolumeEncoder, VolumeEncoderConfig
from jaxmed.nn.conv import CausalConv, GroupNorm


@pytest.mark.parametrize(
    ("name", "cell", "tensors", "parameters", "out"),
    [
        ("16x16x8", (8, 16, 16), 134, 81_508_626, (3, 2, 32, 32, 18)),
        ("8x8x8", (8, 8, 8), 108, 72_547_410, (3, 2, 64, 64, 18)),
    ],
)
def test_published_sizes(name, cell, tensors, parameters, out):
    config = PUBLISHED[name]
    assert (config.name, config.cell) == (name, cell)
    graphdef, state = nnx.split(jax.eval_shape(lambda: VolumeEncoder(config, jax.random.key(0))))
    leaves = jax.tree.leaves(state)
    assert (len(leaves), sum(math.prod(leaf.shape) for leaf in leaves)) == (tensors, parameters)
    windows = jax.ShapeDtypeStruct((3, 5, 256, 256, 8), jnp.bfloat16)
    z = jax.eval_shape(lambda state, x: nnx.merge(graphdef, state)(x), state, windows)
    assert (z.shape, z.dtype) == (out, jnp.float32)


def test_a_token_sees_only_the_frames_up_to_its_own():
    config = VolumeEncoderConfig(32, 1, (1, 1, 1), (True, True))
    graphdef, shapes = nnx.split(jax.eval_shape(lambda: VolumeEncoder(config, jax.random.key(0))))
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), nnx.to_pure_dict(shapes))
    run = jax.jit(lambda x: nnx.merge(graphdef, state)(x))
    x = rng.normal(size=(1, 5, 8, 8, 8)).astype(np.float32)
    before = np.asarray(run(x))
    for frame in range(5):
        changed = x.copy()
        changed[:, frame] += 1.0 + changed[:, frame] ** 2
        moved = np.abs(np.asarray(run(changed)) - before).max((0, 2, 3, 4)) > 1e-6
        np.testing.assert_array_equal(moved, [frame == 0, True])


def test_causal_convolution_is_the_plain_sum():
    conv = CausalConv(3, 2, 3, jax.random.key(2), stride=(2, 2, 2), bias=True)
    x = np.random.default_rng(2).normal(size=(2, 5, 6, 4, 2)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (2, 0), (1, 1), (1, 1), (0, 0)))
    weight, bias = np.asarray(conv.weight[...]), np.asarray(conv.bias[...])
    want = np.zeros((2, 3, 3, 2, 3)) + bias
    for t, h, w in np.ndindex(3, 3, 2):
        cell = padded[:, 2 * t : 2 * t + 3, 2 * h : 2 * h + 3, 2 * w : 2 * w + 3]
        want[:, t, h, w] += np.einsum("bthwi,oithw->bo", cell, weight)
    np.testing.assert_allclose(conv(x), want, atol=1e-5)


def test_group_norm_knows_one_frame_at_a_time():
    norm = GroupNorm(6, 3, 0.07)
    norm.scale[...] = jnp.arange(1.0, 7.0)
    norm.bias[...] = jnp.arange(6.0)
    x = np.random.default_rng(3).normal(2.0, 3.0, (2, 3, 4, 5, 6)) * np.arange(1, 4)[:, None, None, None]
    frames = x.reshape(2, 3, 20, 3, 2)
    mean, var = frames.mean((2, 4), keepdims=True), frames.var((2, 4), keepdims=True)
    want = ((frames - mean) / np.sqrt(var + 0.07)).reshape(x.shape) * np.arange(1, 7) + np.arange(6)
    np.testing.assert_allclose(norm(x.astype(np.float32)), want, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ((32, 0, (1, 1, 1), (True, True)), "at least 1"),
        ((32, 1, (2, 1, 1), (True, True)), "the first must be 1"),
        ((48, 1, (1, 2, 2), (True, True)), r"\[48, 96, 96\] channels; each must be a multiple of 32"),
        ((32, 1, (1, 2, 2), (True, True, False)), "3 entries for 3 channel_multipliers"),
        ((32, 1, (1, 2, 2), (True, False)), "makes 3 token frames of a window of 5; two"),
        ((32, 1, (1, 2, 2, 2), (True, True, True)), "makes 1 token frames"),
    ],
)
def test_sizes_that_cannot_be(fields, words):
    with pytest.raises(ConfigError, match=words):
        VolumeEncoderConfig(*fields)
