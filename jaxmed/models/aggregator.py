"""SAMF's aggregator: a small transformer over the features of a volume's slices, whose class token describes the volume.

Post-norm blocks with ReLU. As published it has no positions: the order of the slices makes no difference. Sources: SAMF (MICCAI
2025), serag-ai/SAMF, where it is torch's TransformerEncoder.

Axis letters: M volumes, S slices, T = 1 + S tokens (the class token first), C features of a slice, F of a volume, Q heads,
H head width, L layers.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmed.config import AggregatorConfig
from jaxmed.model_config import require
from jaxmed.nn.dropout import Dropout, mix
from jaxmed.nn.encoder_block import BlockConfig, EncoderAttend, EncoderBlock, encoder_rules
from jaxmed.nn.linear import Linear
from jaxmed.nn.param import constant, gathered, uniform
from jaxmed.sharding import Rules

NORM_EPS = 1e-5
TORCH_INIT = -1.0

_ATTENTION_WEIGHTS = 3  # place of dropout in a block, after the three of EncoderBlock


class Aggregator(nnx.Module):
    def __init__(self, config: AggregatorConfig, width: int, slices: int, key: jax.Array):
        """`width`: features of a slice (C); `slices`: of a volume (S), the rows of a learned table of positions."""
        heads = f"aggregator.heads {config.heads} does not divide the {width} features of a slice; give another"
        require(width % config.heads == 0, heads)
        key_block, key_out = jax.random.split(key)
        self.class_token = constant((width,), 0.0, (None,))
        # as torch deep-copies one layer, all layers start equal
        self.blocks = jax.vmap(lambda _: _fresh_block(config, width, key_block))(jnp.arange(config.layers))
        if config.slice_pos == "learned":  # zeros: a model that was trained without it begins as it was
            self.positions = constant((slices, width), 0.0, (None, "tower"))
        self.out = Linear(config.features, width, (None, "tower"), key_out, std=TORCH_INIT, bias=True)
        self.config = config

    def __call__(self, f2d: jax.Array, rules: Rules, bits: jax.Array | None = None) -> jax.Array:
        """f2d [M, S, C] -> [M, F], in f2d's dtype. M is split as rows of a batch are.

        `bits` [M] uint32, a hash of (seed, step, volume), in training: then dropout falls where torch's has it, on attention
        weights, on the outputs of attention and MLP, and on the MLP's hidden values.
        """
        rules = encoder_rules(rules)
        spec = rules.spec("batch", None, None)
        count, slices, width = f2d.shape
        if self.config.slice_pos != "none":
            f2d = f2d + self.slice_code(slices, width, rules).astype(f2d.dtype)
        first = jnp.broadcast_to(self.class_token[...].astype(f2d.dtype), (count, 1, width), out_sharding=spec)
        h = jnp.concatenate([first, f2d], axis=1)
        dropout = _token_dropout(bits, 1 + slices, self.config.dropout)
        graphdef, stacked = nnx.split(self.blocks)

        def body(h: jax.Array, layer: tuple[nnx.State, jax.Array]) -> tuple[jax.Array, None]:
            state, number = layer
            drop = dropout.fold(number) if dropout is not None else None
            return nnx.merge(graphdef, state)(h, _attend(rules, drop), rules, drop), None

        h, _ = jax.lax.scan(body, h, (stacked, jnp.arange(self.config.layers)))
        return self.out(h[:, :1], rules, ("batch", None, None), None)[:, 0]

    def slice_code(self, slices: int, width: int, rules: Rules) -> jax.Array:
        """What is added to the slices by their places, [S, C] float32."""
        if self.config.slice_pos == "sincos":
            return sine_code(slices, width)
        table = gathered(self.positions, rules).astype(jnp.float32)
        if slices > len(table):
            raise ValueError(f"volumes of {slices} slices, the aggregator's table of positions has {len(table)} rows")
        return table[:slices]


def sine_code(count: int, width: int) -> jax.Array:
    """[count, width] float32: of place p, feature j: sine (even j) or cosine (odd j) of p / 10000^(2 floor(j / 2) / width)"""
    feature = jnp.arange(width)
    angles = jnp.arange(count)[:, None] * 10000.0 ** (-2.0 * (feature // 2) / width)
    return jnp.where(feature % 2 == 0, jnp.sin(angles), jnp.cos(angles))


def _fresh_block(config: AggregatorConfig, width: int, key: jax.Array) -> EncoderBlock:
    """With the initial values of torch's MultiheadAttention: Xavier over q, k and v as one matrix, biases of attention zero."""
    size = BlockConfig(width, config.heads, config.mlp, NORM_EPS, "relu", post_norm=True, qkv_bias=True)
    key_block, *keys = jax.random.split(key, 4)
    block = EncoderBlock(size, key_block)
    bound = (6.0 / (width + 3 * width)) ** 0.5
    for projection, key_weight in zip((block.attn.q, block.attn.k, block.attn.v), keys, strict=True):
        projection.weight = uniform(key_weight, projection.weight.shape, bound, projection.weight.axes)
    for projection in (block.attn.q, block.attn.k, block.attn.v, block.attn.o):
        projection.bias = constant(projection.bias.shape, 0.0, projection.bias.axes)
    return block


def _token_dropout(bits: jax.Array | None, tokens: int, rate: float) -> Dropout | None:
    """Bits [M, T] from one hash a volume."""
    if bits is None or rate == 0:
        return None
    token = jnp.arange(tokens, dtype=jnp.uint32) * jnp.uint32(0x27D4EB2F)
    return Dropout(mix(bits[:, None] ^ mix(token)[None]), rate)


def _attend(rules: Rules, dropout: Dropout | None) -> EncoderAttend:
    """Attention of every token to every other, with dropout on its weights; q, k, v [M, T, Q, H] -> [M, T, Q, H]"""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("mtqh,msqh->mtqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores, axis=-1)
        if dropout is not None:
            count, tokens, heads, keys = weights.shape
            flat = weights.reshape(count, tokens, heads * keys, out_sharding=rules.spec("batch", None, None))
            dropped = dropout.fold(_ATTENTION_WEIGHTS)(flat, rules, None)
            weights = dropped.reshape(weights.shape, out_sharding=rules.spec("batch", None, None, None))
        return jnp.einsum("mtqs,msqh->mtqh", weights.astype(v.dtype), v)

    return attend
