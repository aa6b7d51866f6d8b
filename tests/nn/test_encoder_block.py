"""The encoder block against torch's own layer, both norms and every activation; its mask, dropout, dtypes, stored bytes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxmed.config import MeshConfig
from jaxmed.nn.attention_mask import Mask
from jaxmed.nn.dropout import Dropout
from jaxmed.nn.encoder_block import (
    ACTIVATIONS,
    BlockConfig,
    EncoderBlock,
    attend_within,
    encoder_rules,
    quick_gelu,
    stacked_blocks,
)
from jaxmed.sharding import Rules, device_bytes, make_mesh, state_specs, to_shardings, tower_axis

CONFIG = BlockConfig(width=20, heads=5, mlp=34, norm_eps=3e-2, activation="gelu", post_norm=False, qkv_bias=True)
RULES = encoder_rules(Rules())
TORCH = {
    "gelu": torch.nn.functional.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}


def one_device():
    return make_mesh(MeshConfig(1), jax.devices()[:1])


def torch_layer(config: BlockConfig) -> torch.nn.TransformerEncoderLayer:
    layer = torch.nn.TransformerEncoderLayer(
        config.width,
        config.heads,
        config.mlp,
        activation=TORCH[config.activation],
        layer_norm_eps=config.norm_eps,
        norm_first=not config.post_norm,
        batch_first=True,
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator) + (p.dim() == 1) * 0.5)
    return layer.eval()


def params_of(layer: torch.nn.TransformerEncoderLayer) -> dict:
    """torch's layer as our parameters."""
    state = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    attention = {}
    for i, name in enumerate("qkv"):
        weight, bias = state["self_attn.in_proj_weight"], state["self_attn.in_proj_bias"]
        rows = slice(i * weight.shape[1], (i + 1) * weight.shape[1])
        attention[name] = {"weight": weight[rows], "bias": bias[rows]}
    attention["o"] = {"weight": state["self_attn.out_proj.weight"], "bias": state["self_attn.out_proj.bias"]}
    mlp = {
        ours: {end: state[f"{theirs}.{end}"] for end in ("weight", "bias")}
        for ours, theirs in (("up", "linear1"), ("down", "linear2"))
    }
    norms = {name: {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]} for name in ("norm1", "norm2")}
    return {"attn": attention, "mlp": mlp, **norms}


def block_of(config: BlockConfig) -> tuple[nnx.GraphDef, dict]:
    graphdef, state = nnx.split(jax.eval_shape(lambda: EncoderBlock(config, jax.random.key(0))))
    rng = np.random.default_rng(1)
    return graphdef, jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), nnx.to_pure_dict(state))


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, params, x, segments, dropout=None):
    return nnx.merge(graphdef, params)(x, attend_within(segments, RULES, Mask(False, 0)), RULES, dropout)


@pytest.mark.parametrize(
    ("activation", "post_norm"), [("gelu", False), ("quick_gelu", False), ("gelu_tanh", True), ("relu", True)]
)
def test_equals_torchs_layer(activation, post_norm):
    config = dataclasses.replace(CONFIG, activation=activation, post_norm=post_norm)
    layer = torch_layer(config)
    graphdef, _ = block_of(config)
    x = np.random.default_rng(0).normal(size=(2, 7, 20)).astype(np.float32)
    there = np.arange(7) < np.array([[7], [4]])
    with torch.no_grad():
        want = layer(torch.from_numpy(x), src_key_padding_mask=torch.from_numpy(~there)).numpy()
    with jax.set_mesh(one_device()):
        got = run(graphdef, params_of(layer), x, there.astype(np.int32))
    np.testing.assert_allclose(np.asarray(got)[there], want[there], atol=2e-5)  # padding attends to nothing here


def test_quick_gelu_is_openais():
    x = jnp.linspace(-4, 4, 33)
    np.testing.assert_allclose(quick_gelu(x), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    apart = {name: np.abs(np.asarray(f(x) - ACTIVATIONS["gelu"](x))).max() for name, f in ACTIVATIONS.items()}
    assert apart["quick_gelu"] > 1e-2 and apart["gelu_tanh"] > 1e-4 and apart["gelu"] == 0


def test_segments_do_not_see_each_other():
    """Two sequences in one row are as each by itself."""
    graphdef, params = block_of(CONFIG)
    x = np.random.default_rng(0).normal(size=(1, 9, 20)).astype(np.float32)
    with jax.set_mesh(one_device()):
        together = run(graphdef, params, x, np.array([[1] * 5 + [2] * 4]))
        padded = [
            run(graphdef, params, x, np.array([[1] * 5 + [0] * 4])),
            run(graphdef, params, x, np.array([[0] * 5 + [3] * 4])),
        ]
    np.testing.assert_allclose(together, np.concatenate([padded[0][:, :5], padded[1][:, 5:]], 1), atol=1e-5)


def test_bfloat16_goes_in_and_out_with_norms_and_softmax_in_float32():
    graphdef, params = block_of(CONFIG)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 20)), jnp.bfloat16)
    with jax.set_mesh(one_device()):
        text = str(jax.make_jaxpr(lambda x: run(graphdef, params, x, np.ones((1, 9), np.int32)))(x))
        out = jax.eval_shape(lambda x: run(graphdef, params, x, np.ones((1, 9), np.int32)), x)
    assert out.dtype == jnp.bfloat16
    lines = [line for line in text.splitlines() if "= exp " in line or "= rsqrt" in line]
    assert lines and all("f32" in line for line in lines)


def test_dropout_falls_on_three_places_and_on_nothing_without_it():
    graphdef, params = block_of(CONFIG)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 20)), jnp.float32)
    segments, positions = jnp.ones((2, 9), jnp.int32), jnp.broadcast_to(jnp.arange(9), (2, 9))
    with jax.set_mesh(one_device()):
        plain = run(graphdef, params, x, segments)
        bits = {rate: Dropout.for_tokens(jax.random.key(3), segments, positions, rate) for rate in (0.5, 0.9999999)}
        dropped, nothing = (run(graphdef, params, x, segments, bits[rate]) for rate in bits)
    assert np.abs(np.asarray(plain - dropped)).max() > 0.1
    np.testing.assert_allclose(nothing, x, atol=1e-5)  # both residual branches are gone


def test_parameters_are_split_over_fsdp_and_copied_over_tensor():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=1, tensor=2))
    state = nnx.split(jax.eval_shape(lambda: stacked_blocks(CONFIG, 3, jax.random.key(5))))[1]

    def held(rules: Rules) -> int:
        shardings = to_shardings(state_specs(state, rules), mesh)
        shapes = nnx.to_pure_dict(state)
        return device_bytes(jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), shapes, shardings))

    matrices = 3 * 4 * (4 * 20 * 20 + 2 * 20 * 34)
    whole = held(dataclasses.replace(RULES, tower=tower_axis((20, 27), 2)))  # 27 does not divide: all is replicated
    assert whole == sum(4 * leaf.size for leaf in jax.tree.leaves(state))
    assert matrices / 2 <= whole - held(RULES) < 1.02 * matrices / 2
    assert tower_axis((20, 34), 2) == ("fsdp",)
