"""Fused projections: one A and one dropout mask for a group, against one Linear over all of its rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxmed.config import ConfigError, DecoderConfig, LoraConfig, MeshConfig, RopeConfig
from jaxmed.models.decoder import Decoder
from jaxmed.nn.attention import Layout
from jaxmed.nn.block import Block, adapter_paths
from jaxmed.nn.dropout import Dropout
from jaxmed.nn.linear import Adapter, Linear, SharedAdapter
from jaxmed.nn.rope import rope_angles
from jaxmed.sharding import Rules, make_mesh, state_specs, to_shardings
from jaxmed.train.init import flatten, unflatten

RULES = Rules()
OUT = ("batch", "length", None)
CONFIG = DecoderConfig(
    vocab=90,
    width=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=40,
    norm_eps=2e-3,
    rope=RopeConfig(321.0),
    max_positions=64,
    fused=True,
    initializer_range=0.3,
)
LORA = LoraConfig(rank=3, alpha=7.0, dropout=0.4)


@pytest.fixture
def one_device():
    with jax.set_mesh(make_mesh(MeshConfig(1), jax.devices()[:1])):
        yield


def x_of(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def bits_of(rows, length, rate):
    return Dropout.for_tokens(
        jax.random.key(1), jnp.ones((rows, length), jnp.int32), jnp.arange(rows * length).reshape(rows, -1), rate
    )


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_group_is_one_linear_over_all_rows(one_device, rate):
    sizes, x = (7, 4, 5), x_of(2, 6, 9)
    bits = bits_of(2, 6, rate) if rate else None
    key = jax.random.key(2)
    shared = SharedAdapter(3, 9, None, key)
    parts = [Linear(n, 9, (None, None), jax.random.key(n), std=0.5, adapter=Adapter(3, 8.0, shared=True)) for n in sizes]
    whole = Linear(16, 9, (None, None), key, std=0.5, adapter=Adapter(3, 8.0))
    for n, part in enumerate(parts):
        part.lora_b[...] = x_of(sizes[n], 3, seed=n)
    whole.weight[...] = jnp.concatenate([part.weight[...] for part in parts])
    whole.lora_a[...], whole.lora_b[...] = shared.lora_a[...], jnp.concatenate([part.lora_b[...] for part in parts])
    reduced = shared(x, RULES, OUT, bits)
    got = jnp.concatenate([part(x, RULES, OUT, None, reduced) for part in parts], -1)
    np.testing.assert_allclose(got, whole(x, RULES, OUT, bits), atol=1e-5)
    assert float(jnp.abs(got - whole(x, RULES, OUT, None)).max()) > 0.1 or not rate
    assert float(jnp.abs(shared.lora_a[...]).max()) <= 1 / 3 and not hasattr(parts[0], "lora_a")


def block_with_adapters(config=CONFIG, lora=LORA):
    block = Block(config, lora, jax.random.key(5))
    for n, name in enumerate(("q", "k", "v", "o")):
        linear = getattr(block.attn, name)
        linear.lora_b[...] = x_of(*linear.lora_b.shape, seed=n)
    for n, name in enumerate(("gate", "up", "down")):
        linear = getattr(block.mlp, name)
        linear.lora_b[...] = x_of(*linear.lora_b.shape, seed=9 + n)
    return block


def test_block_draws_one_mask_a_group(one_device, compiled_quickly):
    """q, k, v as attention gets them, and the MLP's product, from the formula with one mask and one A."""

    def both():
        block, x, bits = block_with_adapters(), x_of(2, 6, 24), bits_of(2, 6, 0.4)
        got = {}

        def attend(q, k, v):
            got.update(q=q, k=k, v=v)
            return q, None

        def through(linear, dropped, a):
            y = jnp.einsum("bti,oi->bto", x, linear.weight[...])
            return y + 7.0 / 3 * jnp.einsum("bti,ri,or->bto", dropped, a, linear.lora_b[...])

        still = rope_angles(jnp.zeros((2, 6), jnp.int32), CONFIG.rope, CONFIG.head_dim, False)  # position 0 turns nothing
        block.attn(x, still, attend, RULES, bits)
        got = {name: y.reshape(2, 6, -1) for name, y in got.items()} | {"mlp": block.mlp(x, RULES, bits)}
        dropped, a = bits.fold(0)(x, RULES, None), block.attn.qkv.lora_a[...]
        wanted = {name: through(getattr(block.attn, name), dropped, a) for name in "qkv"}
        dropped, a = bits.fold(4)(x, RULES, None), block.mlp.gate_up.lora_a[...]
        product = jax.nn.silu(through(block.mlp.gate, dropped, a)) * through(block.mlp.up, dropped, a)
        return got, wanted | {"mlp": block.mlp.down(product, RULES, OUT, bits.fold(6))}

    got, wanted = jax.jit(both)()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, atol=1e-4, err_msg=name)


def names(config, lora):
    state = nnx.to_pure_dict(nnx.state(jax.eval_shape(lambda: Block(config, lora, jax.random.key(0)))))
    return {"/".join(path): leaf.shape for path, leaf in flatten(state).items() if "lora" in path[-1]}


def test_paths(one_device):
    b = {"attn/q": 32, "attn/k": 16, "attn/v": 16, "attn/o": 24, "mlp/gate": 40, "mlp/up": 40, "mlp/down": 24}
    a = {"attn/qkv": 24, "attn/o": 32, "mlp/gate_up": 24, "mlp/down": 40}
    wanted = {f"{name}/lora_b": (n, 3) for name, n in b.items()} | {f"{name}/lora_a": (3, n) for name, n in a.items()}
    assert names(CONFIG, LORA) == wanted
    some = dataclasses.replace(LORA, targets=("up", "gate", "o"))
    assert set(names(CONFIG, some)) == {
        "attn/o/lora_a",
        "attn/o/lora_b",
        "mlp/gate_up/lora_a",
        "mlp/gate/lora_b",
        "mlp/up/lora_b",
    }
    assert "attn/q/lora_a" in names(dataclasses.replace(CONFIG, fused=False), LORA)
    known = {("decoder", "blocks", *name.split("/")) for name in wanted}
    q, o = (("decoder", "blocks", "attn", name, "weight") for name in "qo")
    assert adapter_paths(q, known) == ((*q[:3], "qkv", "lora_a"), (*q[:4], "lora_b"))
    assert adapter_paths(o, known) == ((*o[:4], "lora_a"), (*o[:4], "lora_b"))
    assert adapter_paths(q, ()) is None and adapter_paths(("logit_scale",), known) is None


@pytest.mark.parametrize("targets", [("q", "v"), ("q", "k", "v", "up"), ("k",)])
def test_a_group_is_named_whole(one_device, targets):
    with pytest.raises(ConfigError, match=r"lora\.targets has .*one matrix \((qkv|gate_up)_proj\).*name all of them"):
        Block(CONFIG, LoraConfig(rank=2, targets=targets), jax.random.key(0))
    Block(dataclasses.replace(CONFIG, fused=False), LoraConfig(rank=2, targets=targets), jax.random.key(0))
    Block(CONFIG, LoraConfig(rank=0, targets=targets), jax.random.key(0))


def run_on(shape):
    """Loss and gradients of the adapters of a whole decoder, with dropout, over packed rows of a longrope model."""
    factors = {"short_factors": (1.0, 1.1, 1.2, 2.0), "long_factors": (2.0, 3.0, 9.0, 20.0)}
    rope = RopeConfig(321.0, "longrope", original_positions=7, attention_factor=1.2, **factors)
    config = dataclasses.replace(CONFIG, rope=rope, window=5)
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    positions = np.tile(np.concatenate([np.arange(9), np.arange(7)]), (4, 1)).astype(np.int32)
    segments = np.repeat([[1, 2]], [9, 7], axis=1).repeat(4, axis=0).astype(np.int32)
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(jax.eval_shape(lambda: Decoder(config, LORA, 0, jax.random.key(3), split=False)))
        shardings = to_shardings(state_specs(state, RULES), mesh)

        def make():
            values = flatten(nnx.to_pure_dict(nnx.state(Decoder(config, LORA, 0, jax.random.key(3), split=False))))
            for n, path in enumerate(values):
                if path[-1] == "lora_b":  # zero would hide A
                    values[path] = 0.1 * jax.random.normal(jax.random.key(n), values[path].shape)
            return unflatten(values)

        params = jax.jit(make, out_shardings=shardings)()

        def place(x, *axes):
            return jax.device_put(x, NamedSharding(mesh, RULES.spec(*axes)))

        h = place(np.asarray(x_of(4, 16, 24)), "batch", "length", None)
        positions, segments = (place(x, "batch", "length") for x in (positions, segments))

        def loss(params, h, positions, segments):
            model = nnx.merge(graphdef, params)
            bits = Dropout.for_tokens(jax.random.key(8), segments, positions, LORA.dropout)
            y = model(h, positions, segments, Layout("natural", 4), RULES, "none", bits)
            return jnp.sum(jnp.sin(y))

        value, grads = jax.jit(jax.value_and_grad(loss))(params, h, positions, segments)
        return float(value), {path: np.asarray(x) for path, x in flatten(grads).items() if "lora" in path[-1]}


def test_same_on_a_mesh(compiled_quickly):
    value, grads = run_on((1, 1, 1, 1))
    assert {"/".join(path[-3:]) for path in grads} >= {"attn/qkv/lora_a", "mlp/gate_up/lora_a"}
    other, others = run_on((1, 2, 2, 2))
    assert other == pytest.approx(value, rel=1e-5)
    for path, wanted in grads.items():
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(others[path], wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=str(path))
