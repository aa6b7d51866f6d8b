"""One pre-norm transformer block. It serves training, prefill and decoding: only the driver's `attend` differs."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxmed.config import DecoderConfig, LoraConfig
from jaxmed.nn.dropout import Dropout
from jaxmed.nn.linear import NO_ADAPTER, Adapter, Linear
from jaxmed.nn.mlp import GatedMlp
from jaxmed.nn.norm import RMSNorm
from jaxmed.nn.rope import rotate
from jaxmed.sharding import Rules

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""(q [B, T, Q, H], k [B, T, K, H], v [B, T, K, H]) -> (y [B, T, Q, H], whatever the driver keeps, such as a cache)"""


class Attention(nnx.Module):
    """The four projections around attention. Axis letters: Q query heads, K kv heads, H head width."""

    def __init__(self, make: Callable[..., Linear], config: DecoderConfig):
        heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = make("q", heads, config.width, ("heads", "embed"), bias=config.qkv_bias)
        self.k = make("k", kv_heads, config.width, ("kv_heads", "embed"), bias=config.qkv_bias)
        self.v = make("v", kv_heads, config.width, ("kv_heads", "embed"), bias=config.qkv_bias)
        self.o = make("o", config.width, heads, ("embed", "heads"))
        self.head_dim = config.head_dim

    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], attend: Attend, rules: Rules, dropout: Dropout | None
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D], angles of x's positions -> [B, T, D] and what `attend` keeps"""
        batch, length, _ = x.shape
        drop = [dropout.fold(n) if dropout is not None else None for n in range(4)]
        split = []
        for projection, axis, bits in (
            (self.q, "heads", drop[0]),
            (self.k, "kv_heads", drop[1]),
            (self.v, "kv_heads", drop[2]),
        ):
            y = projection(x, rules, ("batch", "length", axis), bits)
            by_head = rules.spec("batch", "length", axis, None)
            split.append(y.reshape(batch, length, -1, self.head_dim, out_sharding=by_head))
        q, k, v = split
        q, k, v = (checkpoint_name(y, "qkv") for y in (rotate(q, angles), rotate(k, angles), v))
        y, kept = attend(q, k, v)
        y = y.reshape(batch, length, -1, out_sharding=rules.spec("batch", "length", "heads"))
        return self.o(y, rules, ("batch", "length", None), drop[3]), kept


class Block(nnx.Module):
    def __init__(self, config: DecoderConfig, lora: LoraConfig, key: jax.Array):
        keys = iter(jax.random.split(key, 7))

        def make(name: str, out_features: int, in_features: int, axes: tuple, bias: bool = False) -> Linear:
            adapter = Adapter(lora.rank, lora.alpha) if name in lora.targets else NO_ADAPTER
            return Linear(out_features, in_features, axes, next(keys), std=config.initializer_range, bias=bias, adapter=adapter)

        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(make, config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMlp(make, config.width, config.mlp)

    def __call__(
        self, h: jax.Array, angles: tuple[jax.Array, jax.Array], attend: Attend, rules: Rules, dropout: Dropout | None
    ) -> tuple[jax.Array, Any]:
        """h [B, T, D] -> [B, T, D] and what `attend` keeps"""
        y, kept = self.attn(self.attn_norm(h, rules), angles, attend, rules, dropout)
        h = h + y
        return h + self.mlp(self.mlp_norm(h, rules), rules, dropout), kept
