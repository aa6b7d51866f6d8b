"""Dropout bits: their share, their independence of any layout, and their dependence on everything else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxmed.config import MeshConfig
from jaxmed.nn.dropout import Dropout
from jaxmed.sharding import Rules, make_mesh

ROWS, LENGTH, FEATURES, RATE = 3, 40, 64, 0.3
RULES = Rules()


def dropped(segments, positions, fold=2, key=5, rate=RATE, shape=(1, 1, 1, 1), features=FEATURES):
    """Ones through dropout, [B, T, F]."""
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])

    def place(x, *axes):
        return jax.device_put(np.asarray(x), NamedSharding(mesh, RULES.spec(*axes)))

    def run(x, segments, positions):
        return Dropout.for_tokens(jax.random.key(key), segments, positions, rate).fold(fold)(x, RULES, "mlp")

    segments, positions = np.asarray(segments, np.int32), np.asarray(positions, np.int32)
    ones = np.ones((*segments.shape, features), np.float32)
    with jax.set_mesh(mesh):
        return np.asarray(
            jax.jit(run)(
                place(ones, "batch", "length", "mlp"), place(segments, "batch", "length"), place(positions, "batch", "length")
            )
        )


def layout():
    segments = np.repeat(np.arange(1, 2 * ROWS + 1).reshape(ROWS, 2), [25, 15], axis=1)
    positions = np.tile(np.concatenate([np.arange(25), np.arange(15)]), (ROWS, 1))
    return segments, positions


def test_share_and_scale():
    segments, positions = np.full((2, 500), 7), np.arange(1000).reshape(2, 500)
    for rate in (0.05, 0.3, 0.8):
        x = dropped(segments, positions, rate=rate, features=200)
        np.testing.assert_allclose(np.unique(x), [0.0, 1 / (1 - rate)], rtol=1e-6)
        kept = x > 0
        spread = np.sqrt(rate * (1 - rate))
        assert abs(kept.mean() - (1 - rate)) < 5 * spread / np.sqrt(kept.size)
        for axis, n in ((2, 200), ((0, 1), 1000)):  # of every token, and of every feature
            assert np.abs(kept.mean(axis) - (1 - rate)).max() < 6 * spread / np.sqrt(n)


def test_a_token_keeps_its_bits_wherever_it_lies():
    segments, positions = layout()
    base = dropped(segments, positions)
    known = {(s, p): bits for s, p, bits in zip(segments.flat, positions.flat, base.reshape(-1, FEATURES), strict=True)}
    assert len({bits.tobytes() for bits in known.values()}) == len(known), "no two tokens share theirs"
    order = np.random.default_rng(0).permutation(LENGTH)
    turned = dropped(segments[::-1, order], positions[::-1, order])
    np.testing.assert_array_equal(turned, base[::-1, order])
    # the samples one by one in rows of their own, padded
    alone = np.zeros((6, 25), int), np.zeros((6, 25), int)
    for sample in range(6):
        n = 25 if sample % 2 == 0 else 15
        alone[0][sample, -n:], alone[1][sample, -n:] = 1 + sample, np.arange(n)
    apart = dropped(*alone)
    for sample, position in known:
        column = 25 - (25 if sample % 2 else 15) + position
        np.testing.assert_array_equal(apart[sample - 1, column], known[sample, position])


@pytest.mark.parametrize("shape", [(1, 1, 4, 2), (1, 3, 2, 1)])
def test_shards_draw_the_same_bits(shape):
    np.testing.assert_array_equal(dropped(*layout(), shape=shape), dropped(*layout()))


def test_bits_differ_by_step_place_sample_and_position():
    segments, positions = layout()
    base = dropped(segments, positions) > 0
    others = {
        "place in the layer": dropped(segments, positions, fold=3),
        "key": dropped(segments, positions, key=6),
        "sample": dropped(segments + 1, positions),
        "position": dropped(segments, positions + 1),
        "feature": np.roll(dropped(segments, positions), 1, axis=-1),
    }
    for name, other in others.items():
        # independent draws agree on kept-kept or dropped-dropped
        agree = (base == (other > 0)).mean()
        assert abs(agree - (0.7**2 + 0.3**2)) < 6 * 0.5 / np.sqrt(base.size), name


def test_rate_zero_is_off_and_a_fold_of_a_fold_is_new():
    segments, positions = layout()
    np.testing.assert_array_equal(dropped(segments, positions, rate=0.0), 1.0)
    bits = Dropout.for_tokens(jax.random.key(0), jnp.asarray(segments), jnp.asarray(positions), 0.1)
    # layers and places in a layer: all pairs differ
    drawn = {np.asarray(bits.fold(layer).fold(place).bits).tobytes() for layer in range(32) for place in range(7)}
    assert len(drawn) == 32 * 7


def test_gradient_flows_through_what_is_kept_alone():
    segments, positions = layout()
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        bits = Dropout.for_tokens(jax.random.key(1), jnp.asarray(segments), jnp.asarray(positions), RATE)
        x = jnp.full((ROWS, LENGTH, 8), 3.0)
        y, pull = jax.vjp(lambda x: bits(x, RULES, None), x)
        (gradient,) = pull(jnp.ones_like(y))
    np.testing.assert_allclose(gradient, np.asarray(y) / 3.0, rtol=1e-6)
