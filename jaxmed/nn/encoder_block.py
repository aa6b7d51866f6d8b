"""The transformer block of image towers, of BERT and of SAMF's aggregator: attention over everything, biases, LayerNorm.

Towers are replicated over `tensor` and `context` (`encoder_rules`); rows are split over `batch`. Parameters are stored split
over fsdp along the width (`tower`), and gathered where they are used.

Axis letters: B rows, T tokens, D width, Q heads, H head width, F mlp width.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import reshard

from jaxmed.config import AttentionBackend
from jaxmed.nn.attention import Layout, Mask, attention
from jaxmed.nn.attention_mask import NEGATIVE
from jaxmed.nn.dropout import Dropout
from jaxmed.nn.linear import Linear
from jaxmed.nn.norm import LayerNorm
from jaxmed.sharding import Rules

EncoderAttend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q, k, v), each [B, T, Q, H] -> [B, T, Q, H]"""

Activation = Literal["gelu", "quick_gelu", "gelu_tanh", "relu"]

CHUNK = 1024
"""Queries and keys whose scores exist at once; every published 2-D tower is below it."""

_ROWS = ("batch", "length", None)


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI's approximation: x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": quick_gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Sizes and kind of one block."""

    width: int
    heads: int
    mlp: int
    norm_eps: float
    activation: Activation
    post_norm: bool
    """norm(x + f(x)), as the first transformers and BERT have it, instead of x + f(norm(x))"""
    qkv_bias: bool
    """whether q, k and v have biases; the other projections always do"""
    drop_hidden: bool = True
    """whether dropout, where there is any, falls on the MLP's hidden values too (not in BERT)"""


def encoder_rules(rules: Rules) -> Rules:
    """The rules inside towers, text encoders and aggregators: activations are split by rows alone."""
    return dataclasses.replace(rules, length=(), heads=(), kv_heads=(), mlp=())


def attend_within(segment_ids: jax.Array, rules: Rules, mask: Mask) -> EncoderAttend:
    """Attention under a rule over segments alone (0: padding); segment_ids [B, T] int32, `rules` as inside a tower.

    The rule may be any, so no kernel computes it.
    """
    segment_ids = reshard(segment_ids, rules.spec("batch", None))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        # the mask asks for no order, so any numbers serve as positions
        return attention(q, k, v, segment_ids, segment_ids, mask, Layout("any", CHUNK, "xla"), rules)

    return attend


def attend_all(h: jax.Array, rules: Rules, backend: AttentionBackend) -> EncoderAttend:
    """Attention of every token of a row to every other, for rows [B, T, D] without padding."""
    ones = jnp.ones(h.shape[:2], jnp.int32, out_sharding=rules.spec("batch", None))
    layout = Layout("any", CHUNK, backend, packed=False, padding="none")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, ones, ones, Mask(causal=False, window=0), layout, rules)

    return attend


def attend_dropped(segment_ids: jax.Array, dropout: Dropout, rules: Rules, mask: Mask) -> EncoderAttend:
    """As `attend_within`, with dropout on the attention weights, as BERT is trained. The weights [B, T, Q, T] exist whole: for
    texts, not for volumes."""
    segment_ids = reshard(segment_ids, rules.spec("batch", None))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        bias = NEGATIVE * ~mask(segment_ids, segment_ids, segment_ids, segment_ids)
        # tied to q: otherwise JAX takes the mask, the same in every layer and large as the scores, out of the loop over layers
        q, bias = jax.lax.optimization_barrier((q, bias))
        scores = jnp.einsum("btqh,bsqh->btqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores + bias[:, :, None], axis=-1)
        flat = weights.reshape(*weights.shape[:2], -1, out_sharding=rules.spec("batch", None, None))
        kept = dropout(flat, rules, None).reshape(weights.shape, out_sharding=rules.spec("batch", None, None, None))
        return jnp.einsum("btqs,bsqh->btqh", kept.astype(v.dtype), v)

    return attend


class EncoderAttention(nnx.Module):
    """The four projections around attention."""

    def __init__(self, config: BlockConfig, key: jax.Array):
        keys = jax.random.split(key, 4)
        into, out_of = (None, "tower"), ("tower", None)
        size = (config.width, config.width)
        # torch's default initialisation (std -1), as M3D's and timm's blocks have it
        self.q, self.k, self.v = (Linear(*size, into, k, std=-1.0, bias=config.qkv_bias) for k in keys[:3])
        self.o = Linear(*size, out_of, keys[3], std=-1.0, bias=True)
        self.heads = config.heads

    def __call__(self, x: jax.Array, attend: EncoderAttend, rules: Rules) -> jax.Array:
        """x [B, T, D] -> [B, T, D]"""
        by_head = rules.spec(*_ROWS, None)
        split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        projected = (projection(x, rules, _ROWS, None) for projection in (self.q, self.k, self.v))
        q, k, v = (checkpoint_name(y.reshape(split, out_sharding=by_head), "qkv") for y in projected)
        y = attend(q, k, v).reshape(x.shape, out_sharding=rules.spec(*_ROWS))
        return self.o(y, rules, _ROWS, None)


class EncoderMlp(nnx.Module):
    """down(activation(up x))"""

    def __init__(self, config: BlockConfig, key: jax.Array):
        key_up, key_down = jax.random.split(key)
        self.up = Linear(config.mlp, config.width, (None, "tower"), key_up, std=-1.0, bias=True)
        self.down = Linear(config.width, config.mlp, ("tower", None), key_down, std=-1.0, bias=True)
        self.activation, self.drop_hidden = config.activation, config.drop_hidden

    def __call__(self, x: jax.Array, rules: Rules, dropout: Dropout | None) -> jax.Array:
        """x [B, T, D] -> [B, T, D]"""
        hidden = ACTIVATIONS[self.activation](self.up(x, rules, _ROWS, None))
        return self.down(_dropped(hidden, dropout if self.drop_hidden else None, 1, rules), rules, _ROWS, None)


class EncoderBlock(nnx.Module):
    """h [B, T, D] -> [B, T, D], in h's dtype; `rules` are those of `encoder_rules`.

    Dropout falls on the outputs of attention and MLP and, if the config says so, on the MLP's hidden values.
    """

    def __init__(self, config: BlockConfig, key: jax.Array):
        key_attn, key_mlp = jax.random.split(key)
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.attn = EncoderAttention(config, key_attn)
        self.norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp = EncoderMlp(config, key_mlp)
        self.post_norm = config.post_norm

    def __call__(self, h: jax.Array, attend: EncoderAttend, rules: Rules, dropout: Dropout | None) -> jax.Array:
        if self.post_norm:
            h = self.norm1(h + _dropped(self.attn(h, attend, rules), dropout, 0, rules))
            return self.norm2(h + _dropped(self.mlp(h, rules, dropout), dropout, 2, rules))
        h = h + _dropped(self.attn(self.norm1(h), attend, rules), dropout, 0, rules)
        return h + _dropped(self.mlp(self.norm2(h), rules, dropout), dropout, 2, rules)


def _dropped(x: jax.Array, dropout: Dropout | None, place: int, rules: Rules) -> jax.Array:
    return x if dropout is None else dropout.fold(place)(x, rules, None)


def stacked_blocks(config: BlockConfig, layers: int, key: jax.Array) -> EncoderBlock:
    """`layers` blocks as one, every parameter with a leading L."""
    return jax.vmap(lambda key: EncoderBlock(config, key))(jax.random.split(key, layers))
