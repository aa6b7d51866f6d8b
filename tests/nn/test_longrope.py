"""LongRoPE: its frequencies against transformers', which list a token gets, and cached decoding on either side of the limit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from jaxmed.config import DecoderConfig, LoraConfig, MeshConfig, RopeConfig
from jaxmed.models.decoder import Decoder, empty_cache
from jaxmed.nn.attention import Layout
from jaxmed.nn.rope import is_long, rope_angles
from jaxmed.sharding import Rules, balanced_order, make_mesh

RULES = Rules()
PROMPTS = Rules(length=())
"""As generation has them: T is never sharded"""
ROPE = RopeConfig(
    321.0,
    "longrope",
    original_positions=11,
    short_factors=(1.0, 1.25, 2.0),
    long_factors=(2.5, 6.0, 19.0),
    attention_factor=1.3,
)
CONFIG = DecoderConfig(
    vocab=90,
    width=30,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp=40,
    norm_eps=2e-3,
    rope=ROPE,
    max_positions=64,
    fused=True,
    initializer_range=0.4,
)


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


@pytest.mark.parametrize("last", [4095, 4096, 120000])
def test_angles_of_the_published_sizes(last):
    factors = 1.0 + np.random.default_rng(1).gamma(2.0, 8.0, (2, 48))
    config = Phi3Config(
        hidden_size=3072,
        num_attention_heads=32,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": factors[0].tolist(),
            "long_factor": factors[1].tolist(),
        },
    )
    positions = np.array([[0, 1, 77, 4000, last]])
    cos, sin = Phi3RotaryEmbedding(config)(torch.zeros(1, 1), torch.from_numpy(positions))
    lists = {"short_factors": tuple(factors[0]), "long_factors": tuple(factors[1])}
    rope = RopeConfig(1e4, "longrope", original_positions=4096, attention_factor=1.1902380714, **lists)
    ours = rope_angles(jnp.asarray(positions), rope, 96, jnp.asarray([[last >= 4096]]))
    for got, wanted in zip(ours, (cos, sin), strict=True):
        # float32 frequencies differ by a rounding, which position 120000 multiplies
        np.testing.assert_allclose(got, wanted[..., :48], atol=1e-5 + 1.2e-7 * last)


def longest_by_hand(positions: np.ndarray, segments: np.ndarray) -> np.ndarray:
    found = np.zeros(positions.shape, bool)
    for row in range(len(positions)):
        for segment in set(segments[row]) - {0}:
            here = segments[row] == segment
            found[row, here] = positions[row, here].max() >= ROPE.original_positions
    return found


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 4, 1)], ids=str)
def test_each_packed_sample_by_its_own_length(shape):
    lengths = [(12, 11, 13, 12), (40, 8), (11, 11, 11, 11), (3, 12, 12, 12, 7)]
    positions, segments = np.zeros((4, 48), np.int32), np.zeros((4, 48), np.int32)
    for row, pieces in enumerate(lengths):
        positions[row, : sum(pieces)] = np.concatenate([np.arange(n) for n in pieces])
        segments[row, : sum(pieces)] = np.repeat(np.arange(len(pieces)) + 9 * row + 1, pieces)
    order = balanced_order(48, shape[2]) if shape[2] > 1 else np.arange(48)
    positions, segments = positions[:, order], segments[:, order]
    mesh = mesh_of(*shape)
    place = NamedSharding(mesh, RULES.spec("batch", "length"))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda p, s: is_long(p, s, ROPE))(jax.device_put(positions, place), jax.device_put(segments, place))
        assert found.sharding.is_equivalent_to(place, 2)
    wanted = longest_by_hand(positions, segments)
    assert 0 < wanted.sum() < (segments > 0).sum()
    np.testing.assert_array_equal(found, wanted)


def test_short_rows_cost_nothing():
    short = jnp.zeros((2, 11), jnp.int32)
    assert is_long(short, short, ROPE) is False
    assert is_long(jnp.zeros((2, 48), jnp.int32), jnp.ones((2, 48), jnp.int32), RopeConfig(321.0)) is False


def run_decoder(config: DecoderConfig, lengths: tuple[int, ...], new: int, cached: bool) -> np.ndarray:
    """Hidden states of rows of `lengths` + `new` tokens, padded on the left: in one go, or the last `new` one by one."""
    rng = np.random.default_rng(4)
    bucket, total = max(lengths), max(lengths) + new
    h = rng.standard_normal((len(lengths), total, config.width)).astype(np.float32)
    n = np.array(lengths)[:, None]
    positions = np.maximum(np.arange(total) - (bucket - n), 0).astype(np.int32)
    segments = (np.arange(total) >= bucket - n).astype(np.int32)
    mesh = mesh_of(1, 1, 1, 1)
    with jax.set_mesh(mesh):
        graphdef, _ = nnx.split(jax.eval_shape(lambda: Decoder(config, LoraConfig(rank=0), 0, jax.random.key(2), split=False)))

        def make():
            return nnx.to_pure_dict(nnx.state(Decoder(config, LoraConfig(rank=0), 0, jax.random.key(2), split=False)))

        def run(params, h, positions, segments):
            model, layout = nnx.merge(graphdef, params), Layout("natural", 8)
            if not cached:
                return model(h, positions, segments, layout, PROMPTS, "none", None)
            cache = empty_cache(config, len(lengths), total, jnp.float32, False, PROMPTS)
            hidden, cache = model.prefill(h[:, :bucket], positions[:, :bucket], segments[:, :bucket], cache, layout, PROMPTS)
            steps = [hidden]
            for t in range(bucket, total):
                hidden, cache = model.step(h[:, t : t + 1], positions[:, t], cache, PROMPTS)
                steps.append(hidden)
            return jnp.concatenate(steps, 1)

        def place(x):
            return jax.device_put(x, PROMPTS.sharding(mesh, "batch", "length", *[None] * (x.ndim - 2)))

        hidden = jax.jit(run)(jax.jit(make)(), *(place(x) for x in (h, positions, segments)))
    return np.asarray(hidden) * (segments[..., None] > 0)


def test_cached_decoding_uses_one_list_throughout(compiled_quickly):
    """Rows that stay below the limit, reach it in the answer, and begin beyond it: as the whole sequence at once gives."""
    lengths, new = (5, 9, 10, 14), 2  # 7, 11, 12 and 16 positions; the limit is 11
    whole, cached = (run_decoder(CONFIG, lengths, new, way) for way in (False, True))
    np.testing.assert_allclose(cached, whole, atol=2e-5)
    for rows, factors in ((slice(0, 2), ROPE.short_factors), (slice(2, 4), ROPE.long_factors)):
        one = dataclasses.replace(CONFIG, rope=dataclasses.replace(ROPE, short_factors=factors, long_factors=factors))
        alone = run_decoder(one, lengths, new, False)
        np.testing.assert_allclose(whole[rows], alone[rows], atol=2e-5)
        assert np.abs(whole - alone).max(axis=(1, 2)).max() > 0.05
