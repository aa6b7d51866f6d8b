"""Chunked attention against a plain softmax over the whole square: outputs and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxmed.config import MeshConfig
from jaxmed.nn.attention import Layout, Mask, attention, cached_attention
from jaxmed.nn.attention_xla import chunk_length
from jaxmed.sharding import Rules, balanced_order, make_mesh

HEADS, KV_HEADS, WIDTH = 6, 3, 5
RULES = Rules()


def mesh_of(*shape):
    return make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


def draw(length, rows=2, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for shape in shapes]


def plain(q, k, v, positions, segments, causal, window):
    """One row and head after the other in words of the definition: same segment, not padding, position, window."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bshd->bhqs", q, k, precision="highest") / np.sqrt(q.shape[-1])
    back = positions[:, :, None] - positions[:, None, :]
    sees = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    sees &= (back >= 0) | ~causal
    sees &= (back < window) | (window == 0)
    sees = sees[:, None]
    scores = jnp.where(sees, scores, -1e9)
    weights = jnp.where(sees, jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))), 0.0)
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-20)
    return jnp.einsum("bhqs,bshd->bqhd", weights, v, precision="highest")


def packed(lengths, total):
    """Segments 1, 2, ... of these lengths with restarting positions, then padding."""
    positions = np.concatenate([*(np.arange(n) for n in lengths), np.zeros(total - sum(lengths), int)])
    segments = np.concatenate([*(np.full(n, 1 + i) for i, n in enumerate(lengths)), np.zeros(total - sum(lengths), int)])
    return positions, segments


def rows_of(length, kind):
    """positions and segment ids of two rows."""
    if kind == "full":
        pairs = [packed([length], length)] * 2
    elif kind == "padded right":
        pairs = [packed([length - 3], length), packed([length // 2], length)]
    elif kind == "padded left":
        pairs = [tuple(np.roll(x, n) for x in packed([length - n], length)) for n in (4, length // 3)]
    else:
        pairs = [packed([length // 3, length // 2 - 2], length), packed([5, 1, length - 11], length)]
    return tuple(jnp.asarray(np.stack(x), jnp.int32) for x in zip(*pairs, strict=True))


def run(function, inputs, weights):
    """Output and the gradients of a weighted sum of it."""

    def weighted(q, k, v):
        out = function(q, k, v)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [np.asarray(x) for x in (out, *grads)]


@jax.jit
def plain_with_gradients(inputs, weights, positions, segments, causal, window):
    def weighted(q, k, v):
        out = plain(q, k, v, positions, segments, causal, window)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)(*inputs)
    return out, *grads


def compare(ours, theirs, tolerance=2e-6):
    for name, a, b in zip(("output", "dq", "dk", "dv"), ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=2e-5, err_msg=name)


CASES = [
    # length, chunk, causal, window, rows
    (40, 8, True, 0, "full"),
    (37, 8, True, 0, "padded right"),  # no divisor near the chunk: padded inside
    (36, 16, True, 0, "padded left"),  # divisor 12
    (37, 8, True, 0, "packed"),
    (36, 64, True, 0, "full"),
    (40, 8, True, 7, "padded left"),
    (37, 8, True, 9, "packed"),
    (40, 8, True, 17, "full"),
    (40, 8, True, 1, "full"),
    (37, 8, False, 0, "padded right"),
    (40, 8, False, 6, "packed"),
]


ONE = (1, 1, 1, 1)


def ours(inputs, weights, positions, segments, mask, chunk, shape=ONE, order="natural", permutation=None):
    """Output and gradients on a mesh, T permuted on the way in."""
    mesh = mesh_of(*shape)
    rules = Rules(kv_heads=()) if shape[3] > KV_HEADS else RULES
    permutation = np.arange(positions.shape[1]) if permutation is None else permutation
    heads, kv_heads = (("batch", "length", name, None) for name in ("heads", "kv_heads"))

    def place(x, *axes):
        return jax.device_put(x[:, permutation], NamedSharding(mesh, rules.spec(*axes)))

    with jax.set_mesh(mesh):
        row = ("batch", "length")
        function = partial(
            attention,
            positions=place(positions, *row),
            segment_ids=place(segments, *row),
            mask=mask,
            layout=Layout(order, chunk, "xla", True),
            rules=rules,
        )
        placed = [place(inputs[0], *heads), place(inputs[1], *kv_heads), place(inputs[2], *kv_heads)]
        return run(function, placed, place(weights, *heads))


def check(positions, segments, causal, window, chunk, shape=ONE, order="natural", permutation=None):
    inputs = draw(positions.shape[1])
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(inputs[0].shape), jnp.float32)
    mask = Mask(causal, window)
    found = ours(inputs, weights, positions, segments, mask, chunk, shape, order, permutation)
    wanted = [np.asarray(x) for x in plain_with_gradients(inputs, weights, positions, segments, jnp.bool(causal), window)]
    compare(found, wanted if permutation is None else [x[:, permutation] for x in wanted])


@pytest.mark.parametrize(("length", "chunk", "causal", "window", "kind"), CASES)
def test_against_a_plain_softmax(length, chunk, causal, window, kind):
    check(*rows_of(length, kind), causal, window, chunk)


@pytest.mark.parametrize("window", [0, 7])
def test_any_order_along_t_gives_the_same(window):
    shuffle = np.random.default_rng(2).permutation(36)
    check(*rows_of(36, "packed"), True, window, 8, order="any", permutation=shuffle)


@pytest.mark.parametrize(
    ("shape", "order", "window", "kind"),
    [
        ((1, 1, 4, 1), "balanced", 0, "packed"),
        ((1, 1, 2, 1), "balanced", 11, "padded left"),
        ((2, 1, 2, 1), "any", 0, "padded right"),
        ((1, 2, 1, 3), "natural", 0, "packed"),
        ((1, 1, 1, 6), "natural", 5, "full"),  # twice as many shards as kv heads
        ((1, 1, 2, 1), "natural", 0, "full"),
    ],
)
def test_shards_give_the_same(shape, order, window, kind):
    length = 48
    permutation = {
        "balanced": balanced_order(length, shape[2]),
        "natural": np.arange(length),
        "any": np.random.default_rng(4).permutation(length),
    }[order]
    check(*rows_of(length, kind), True, window, 8, shape, order, permutation)


def test_rows_of_padding_give_zero_and_finite_gradients():
    positions, segments = rows_of(24, "padded left")
    segments = segments.at[1].set(0)
    inputs = draw(24, scale=20.0)
    for x in ours(inputs, jnp.ones_like(inputs[0]), positions, segments, Mask(True, 0), 8):
        assert np.isfinite(x).all()
        assert not x[1].any(), "an empty row"
        assert not x[0, :4].any(), "padding of a row"
        assert x[0, 4:].any()


def test_large_scores_in_bfloat16_stay_finite_and_near():
    positions, segments = rows_of(40, "packed")
    inputs = [x.astype(jnp.bfloat16) for x in draw(40, scale=12.0)]
    found = ours(inputs, jnp.ones(inputs[0].shape, jnp.bfloat16), positions, segments, Mask(True, 0), 8)
    assert all(x.dtype == jnp.bfloat16 and np.isfinite(x.astype(np.float32)).all() for x in found)
    wanted = np.asarray(plain(*(x.astype(jnp.float32) for x in inputs), positions, segments, jnp.bool(True), 0))
    np.testing.assert_allclose(found[0].astype(np.float32), wanted, atol=2**-7 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("shape", "window"),
    [((1, 1, 1, 1), 0), ((1, 1, 1, 1), 6), ((1, 1, 1, 6), 0), ((2, 1, 1, 3), 0), ((2, 1, 3, 1), 0), ((1, 1, 7, 1), 6)],
)
def test_queries_against_a_cache(shape, window):
    """The last two queries of a row against all its keys, some slots of which hold nothing; with a window of 6 and seven
    shards of three slots, most shards hold nothing that is seen."""
    positions, segments = rows_of(21, "padded left")
    q, k, v = draw(21)
    rules = Rules(kv_heads=() if shape[3] > KV_HEADS else ("tensor",), length=("context",) if shape[2] > 1 else ())
    mesh = mesh_of(*shape)
    noise = 1e3 * (segments == 0)[..., None, None]  # unused slots may hold anything

    def place(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, rules.spec(*axes)))

    def cache(x):
        return place((x + noise).transpose(0, 2, 1, 3), "batch", "kv_heads", "length", None)

    rows = [place(positions[:, -2:], "batch", None), *(place(x, "batch", "length") for x in (positions, segments != 0))]
    with jax.set_mesh(mesh):
        attend = jax.jit(partial(cached_attention, mask=Mask(True, window), rules=rules))
        found = attend(place(q[:, -2:], "batch", None, "heads", None), cache(k), cache(v), *rows)
    np.testing.assert_allclose(found, plain(q, k, v, positions, segments, jnp.bool(True), window)[:, -2:], atol=2e-6)


@pytest.mark.parametrize(
    ("length", "wanted", "chunk"),
    [(40, 64, 40), (32768, 512, 512), (33792, 512, 512), (36, 16, 12), (37, 8, 8), (31 * 8, 16, 8), (2 * 499, 100, 100)],
)
def test_chunk_lengths(length, wanted, chunk):
    assert chunk_length(length, wanted) == chunk
