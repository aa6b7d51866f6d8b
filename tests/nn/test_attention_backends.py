"""Backends against the plain softmax of test_attention: the splash kernel interpreted, cuDNN's calls by JAX's own reference."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_attention import KV_HEADS, RULES, compare, draw, mesh_of, packed, plain, plain_with_gradients, rows_of, run

from jaxmed.nn import attention as module
from jaxmed.nn import attention_cudnn, attention_splash
from jaxmed.nn.attention import Layout, Mask, attention, choose_backend
from jaxmed.sharding import Rules, balanced_order


def on_one_device(inputs, positions, segments, layout):
    """Output on a mesh of one device."""
    mesh = mesh_of(1, 1, 1, 1)
    axes = [("heads", None), ("kv_heads", None), ("kv_heads", None), (), ()]
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, RULES.sharding(mesh, "batch", "length", *a))
            for x, a in zip((*inputs, positions, segments), axes, strict=True)
        ]
        return attention(*placed, Mask(True, 0), layout, RULES)


def by_splash(inputs, weights, positions, segments, mask, shape, order, permutation):
    """Output and gradients on a mesh, T permuted on the way in."""
    mesh = mesh_of(*shape)
    rules = Rules(kv_heads=()) if shape[3] > KV_HEADS else RULES

    def place(x, *axes):
        return jax.device_put(x[:, permutation], rules.sharding(mesh, "batch", "length", *axes))

    with jax.set_mesh(mesh):
        rows, layout = (place(positions), place(segments)), Layout(order, 128, "splash")
        function = partial(attention, positions=rows[0], segment_ids=rows[1], mask=mask, layout=layout, rules=rules)
        placed = [place(x, name, None) for x, name in zip(inputs, ("heads", "kv_heads", "kv_heads"), strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a fallback would say so
            return run(function, placed, place(weights, "heads", None))


@pytest.mark.parametrize(
    ("length", "causal", "window", "kind", "shape", "order"),
    [
        (300, True, 0, "packed", (1, 1, 1, 1), "natural"),  # padded inside to three blocks
        (256, False, 0, "padded right", (1, 1, 1, 1), "any"),
        (512, True, 150, "packed", (1, 1, 2, 1), "balanced"),
        (256, True, 0, "padded left", (1, 1, 1, 6), "natural"),  # twice as many shards as kv heads
    ],
)
def test_splash_gives_the_same(length, causal, window, kind, shape, order):
    positions, segments = rows_of(length, kind)
    inputs = draw(length)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(inputs[0].shape), jnp.float32)
    permutation = balanced_order(length, shape[2]) if order == "balanced" else np.arange(length)
    found = by_splash(inputs, weights, positions, segments, Mask(causal, window), shape, order, permutation)
    wanted = plain_with_gradients(inputs, weights, positions, segments, jnp.bool(causal), window)
    compare(found, [np.asarray(x)[:, permutation] for x in wanted])


def test_splash_in_bfloat16_is_near_and_silent_in_padding():
    positions, segments = rows_of(128, "padded left")
    inputs = [x.astype(jnp.bfloat16) for x in draw(128)]
    out = on_one_device(inputs, positions, segments, Layout("natural", 128, "splash"))
    assert out.dtype == jnp.bfloat16
    wanted = np.asarray(plain(*(x.astype(jnp.float32) for x in inputs), positions, segments, jnp.bool(True), 0))
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted, atol=2**-7 * np.abs(wanted).max())
    assert not np.asarray(out, np.float32)[0, :4].any()


@pytest.mark.parametrize(
    ("length", "causal", "window", "kind", "padding"),
    [
        (40, True, 0, "padded left", "either"),
        (41, False, 0, "padded left", "either"),
        (40, True, 9, "padded right", "right"),
        (40, False, 0, "full", "none"),
        (41, False, 0, "full", "none"),
    ],
)
def test_what_cudnn_is_asked_for_gives_the_same(monkeypatch, length, causal, window, kind, padding):
    """The kernel's place is taken by JAX's reference for the same arguments: turning rows, lengths, windows, and padding."""
    own = jax.nn.dot_product_attention

    def reference(*args, implementation, **kwargs):
        assert implementation == "cudnn" and args[0].shape[1] % 2 == 0  # odd rows have no backward kernel
        out = own(*args, implementation="xla", **kwargs)
        if kwargs["query_seq_lengths"] is None:
            return out
        end = jnp.arange(out.shape[1]) >= kwargs["query_seq_lengths"][:, None]
        return jnp.where(end[..., None, None], jnp.nan, out)  # what the kernel leaves behind the end must not matter

    monkeypatch.setattr(jax.nn, "dot_product_attention", reference)
    positions, segments = rows_of(length, kind)
    segments = segments.at[1].set(0) if kind == "padded left" else segments  # an empty row
    inputs = draw(length)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(inputs[0].shape), jnp.float32)
    function = partial(attention_cudnn.local_attention, segments=segments, mask=Mask(causal, window), padding=padding)
    found = run(function, inputs, weights)
    wanted = plain_with_gradients(inputs, weights, positions, segments, jnp.bool(causal), window)
    compare(found, [np.asarray(x) for x in wanted])


@given(length=st.integers(1, 5000), chunk=st.sampled_from([128, 512, 700, 1024]))
def test_rows_are_padded_to_whole_blocks_that_are_not_small(length, chunk):
    padded = attention_splash.padded_length(length, chunk, context=1)
    least = -(-length // 128) * 128
    assert padded % 128 == 0 and length <= padded <= max(least, 9 * length / 8)
    kernel = attention_splash.block_size(padded, Layout("any", chunk), 1)
    assert padded % kernel == 0 and kernel <= chunk
    # no larger block would have been had for an eighth more
    assert all(-(-length // b) * b > 9 * length / 8 for b in range(kernel + 128, chunk + 1, 128))


def test_2049_tokens_of_a_vit_take_blocks_of_768():
    assert attention_splash.padded_length(2049, 1024, context=1) == 3 * 768


ORDINARY = {"dtype": jnp.bfloat16, "length": 4096, "width": 128, "context": 1}


@pytest.mark.parametrize(
    ("platform", "layout", "changed", "backend", "reason"),
    [
        ("tpu", Layout("natural", 512), {}, "splash", ""),
        ("tpu", Layout("balanced", 512), {"context": 4}, "splash", ""),
        ("tpu", Layout("balanced", 512), {"context": 4, "length": 4096 + 64}, "xla", "8 x 128 tokens"),
        ("tpu", Layout("any", 512), {}, "xla", "order"),
        ("tpu", Layout("natural", 512, "xla"), {}, "xla", ""),
        ("tpu", Layout("natural", 512, "cudnn"), {}, "xla", "NVIDIA"),
        ("gpu", Layout("natural", 512, packed=False), {}, "cudnn", ""),
        ("gpu", Layout("natural", 512, packed=True), {}, "xla", "packed row"),
        ("gpu", Layout("balanced", 512, packed=False), {"context": 2}, "xla", "context shard"),
        ("gpu", Layout("natural", 512, packed=False), {"dtype": jnp.float32}, "xla", "float32"),
        ("gpu", Layout("natural", 512, packed=False), {"width": 160}, "xla", "160"),
        ("gpu", Layout("natural", 512, "splash"), {}, "xla", "TPUs"),
        ("cpu", Layout("natural", 512), {}, "xla", ""),
        ("cpu", Layout("natural", 512, "splash"), {}, "splash", ""),
    ],
)
def test_the_choice_and_its_reason(platform, layout, changed, backend, reason):
    found, said = choose_backend(layout, Mask(True, 0), platform, **(ORDINARY | changed))
    assert found == backend
    assert (reason in said) if reason else not said


def test_a_choice_that_cannot_be_had_is_said():
    positions, segments = (jnp.asarray(x, jnp.int32)[None] for x in packed([20], 24))
    inputs = draw(24, rows=1)
    with pytest.warns(UserWarning, match="plain XLA: cuDNN runs on NVIDIA GPUs"):
        out = on_one_device(inputs, positions, segments, Layout("natural", 8, "cudnn"))
    np.testing.assert_allclose(out, plain(*inputs, positions, segments, jnp.bool(True), 0), atol=2e-6)


def test_the_platform_is_that_of_the_entered_mesh():
    with jax.set_mesh(mesh_of(2, 1, 1, 1)):
        assert jax.jit(lambda x: x + (module.mesh_platform() == "cpu"))(0) == 1
    described = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    mesh = mesh_of(1, 1, 1, 1)
    abstract = jax.sharding.AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types, abstract_device=described
    )
    with jax.sharding.use_abstract_mesh(abstract):
        assert module.mesh_platform() == "tpu"
