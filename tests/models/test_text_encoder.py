"""The text encoder: padding, lengths, dtypes, sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmed.config import MeshConfig, TextEncoderConfig
from jaxmed.models.text_encoder import TextEncoder
from jaxmed.nn.dropout import Dropout
from jaxmed.sharding import Rules, make_mesh

RULES = Rules()
CONFIG = TextEncoderConfig(vocab=29, width=20, layers=2, heads=5, mlp=18, norm_eps=1e-3, positions=11, types=2)


@pytest.fixture(scope="module")
def encode():
    graphdef, state = nnx.split(jax.eval_shape(lambda: TextEncoder(CONFIG, jax.random.key(0))))
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), nnx.to_pure_dict(state))

    @functools.partial(jax.jit, static_argnums=2)
    def run(ids, mask, dtype):
        return nnx.merge(graphdef, params)(ids, mask, RULES, dtype)

    with jax.set_mesh(make_mesh(MeshConfig(1), jax.devices()[:1])):
        yield run


def test_padding_changes_nothing_whatever_it_is(encode):
    ids = np.random.default_rng(0).integers(0, 29, (2, 9)).astype(np.int32)
    mask = (np.arange(9) < np.array([[9], [5]])).astype(np.int32)
    first = encode(ids, mask, jnp.float32)
    other = encode(np.where(mask == 1, ids, 28 - ids), mask, jnp.float32)
    short = encode(ids[1:, :5], mask[1:, :5], jnp.float32)
    np.testing.assert_array_equal(first[0], other[0])
    np.testing.assert_allclose(first[1, :5], other[1, :5], atol=1e-6)
    np.testing.assert_allclose(first[1:, :5], short, atol=1e-5)
    seen = encode(ids, np.ones_like(mask), jnp.float32)
    assert np.abs(np.asarray(seen[1, :5] - first[1, :5])).max() > 1e-3


def test_dtype_and_length(encode):
    ids = jnp.zeros((3, 11), jnp.int32)
    assert jax.eval_shape(lambda ids: encode(ids, ids + 1, jnp.bfloat16), ids).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="texts of 12 tokens, the text encoder's position table has 11 rows"):
        encode(jnp.zeros((3, 12), jnp.int32), jnp.ones((3, 12), jnp.int32), jnp.float32)


def test_bert_base_has_its_published_parameters():
    """109,482,240 with the pooler, which is not kept."""
    state = nnx.split(jax.eval_shape(lambda: TextEncoder(TextEncoderConfig(), jax.random.key(0))))[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 109_482_240 - (768 * 768 + 768)


def test_dropout_falls_where_bert_has_it():
    """On embeddings, attention weights, outputs of attention and MLP, not on the MLP's hidden values; none of it, at rate 0, is
    the plain encoder. Padding and other rows do not change a token's bits."""
    config = dataclasses.replace(CONFIG, layers=1)
    graphdef, state = nnx.split(jax.eval_shape(lambda: TextEncoder(config, jax.random.key(0))))
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), nnx.to_pure_dict(state))
    ids = rng.integers(0, 29, (3, 9)).astype(np.int32)
    mask = (np.arange(9) < np.array([[9], [5], [7]])).astype(np.int32)
    places: list[tuple[int, ...]] = []

    class Counted(Dropout):
        def fold(self, number: jax.Array | int) -> "Counted":
            return Counted(super().fold(number).bits, self.rate)

        def __call__(self, x: jax.Array, rules: Rules, feature_axis: str | None) -> jax.Array:
            places.append(x.shape)
            return super().__call__(x, rules, feature_axis)

    def run(rows: slice, rate: float) -> jax.Array:
        samples = np.broadcast_to(np.arange(1, 4)[rows, None], ids[rows].shape)
        drawn = Dropout.for_tokens(jax.random.key(5), jnp.asarray(samples), jnp.zeros_like(samples) + np.arange(9), rate)
        model = nnx.merge(graphdef, params)
        return model(ids[rows], mask[rows], RULES, jnp.float32, dropout=Counted(drawn.bits, rate))

    with jax.set_mesh(make_mesh(MeshConfig(1), jax.devices()[:1])):
        plain = nnx.merge(graphdef, params)(ids, mask, RULES, jnp.float32)
        np.testing.assert_allclose(run(slice(0, 3), 0.0), plain, atol=1e-5)
        width, heads = config.width, config.heads
        assert places == [(3, 9, width), (3, 9, heads * 9), (3, 9, width), (3, 9, width)]
        dropped = run(slice(0, 3), 0.3)
        assert np.abs(np.asarray(dropped - plain)).max() > 0.1
        np.testing.assert_allclose(run(slice(1, 2), 0.3), dropped[1:2], atol=1e-5)
