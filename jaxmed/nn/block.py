"""One pre-norm transformer block. It serves training, prefill and decoding: only the driver's `attend` differs.

Where upstream's files hold projections as one matrix (`DecoderConfig.fused`: q, k, v and gate, up), ours are split all the
same, and only their adapters remember it: the group has one A, at `attn/qkv/lora_a` and `mlp/gate_up/lora_a`.
"""

from collections.abc import Callable, Container
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxmed.config import DecoderConfig, LoraConfig, require
from jaxmed.nn.dropout import Dropout
from jaxmed.nn.linear import NO_ADAPTER, Adapter, Linear, SharedAdapter, grouped
from jaxmed.nn.mlp import GatedMlp
from jaxmed.nn.norm import RMSNorm
from jaxmed.nn.rope import rotate
from jaxmed.sharding import Rules

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""(q [B, T, Q, H], k [B, T, K, H], v [B, T, K, H]) -> (y [B, T, Q, H], whatever the driver keeps, such as a cache)"""

GROUPS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""Projections that fused decoders have as one matrix, in its order"""


def group_of(name: str) -> str:
    """The group of a projection; "" where it has none."""
    return next((group for group, names in GROUPS.items() if name in names), "")


def check_targets(config: DecoderConfig, lora: LoraConfig) -> None:
    """An adapter of a fused matrix is one adapter: its projections have it together or not at all."""
    if not (config.fused and lora.rank):
        return
    for group, names in GROUPS.items():
        given = [name for name in names if name in lora.targets]
        whole = not given or len(given) == len(names)
        require(
            whole,
            f"lora.targets has {', '.join(given)} of {', '.join(names)}, which are one matrix ({group}_proj) in this decoder; "
            "name all of them, or none",
        )


def adapter_paths(weight: tuple, known: Container[tuple]) -> tuple[tuple, tuple] | None:
    """Where A and B of the weight at a path are, if `known` has them: A beside the weight or with its group; None: nowhere."""
    if weight[-1] != "weight" or (*weight[:-1], "lora_b") not in known:
        return None
    *above, name, _ = weight
    own = (*above, name, "lora_a")
    return (own if own in known else (*above, group_of(str(name)), "lora_a")), (*above, name, "lora_b")


class Attention(nnx.Module):
    """The four projections around attention. Axis letters: Q query heads, K kv heads, H head width."""

    def __init__(self, make: Callable[..., Linear], share: Callable[..., SharedAdapter | None], config: DecoderConfig):
        heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = make("q", heads, config.width, ("heads", "embed"), bias=config.qkv_bias)
        self.k = make("k", kv_heads, config.width, ("kv_heads", "embed"), bias=config.qkv_bias)
        self.v = make("v", kv_heads, config.width, ("kv_heads", "embed"), bias=config.qkv_bias)
        self.o = make("o", config.width, heads, ("embed", "heads"))
        shared = share("qkv", config.width, "embed")
        if shared is not None:
            self.qkv = shared
        self.head_dim, self.shares = config.head_dim, shared is not None

    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], attend: Attend, rules: Rules, dropout: Dropout | None
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D], angles of x's positions -> [B, T, D] and what `attend` keeps"""
        batch, length, _ = x.shape
        drop = [dropout.fold(n) if dropout is not None else None for n in range(4)]
        reduced = self.qkv(x, rules, ("batch", "length", "heads"), drop[0]) if self.shares else None
        wide = grouped(x, rules, "heads")
        split = []
        for projection, axis, bits in (
            (self.q, "heads", drop[0]),
            (self.k, "kv_heads", drop[1]),
            (self.v, "kv_heads", drop[2]),
        ):
            of_group = wide if rules.spec(axis) == rules.spec("heads") else x  # kv heads may be replicated
            y = projection(x, rules, ("batch", "length", axis), bits, reduced, of_group)
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
            shared = config.fused and bool(group_of(name))
            adapter = Adapter(lora.rank, lora.alpha, shared) if name in lora.targets else NO_ADAPTER
            return Linear(out_features, in_features, axes, next(keys), std=config.initializer_range, bias=bias, adapter=adapter)

        def share(group: str, in_features: int, in_axis: str) -> SharedAdapter | None:
            if not (config.fused and lora.rank and GROUPS[group][0] in lora.targets):
                return None
            place = 7 + list(GROUPS).index(group)  # after the projections' keys, which are the same for every family
            return SharedAdapter(lora.rank, in_features, in_axis, jax.random.fold_in(key, place))

        check_targets(config, lora)
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(make, share, config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMlp(make, share, config.width, config.mlp)

    def __call__(
        self, h: jax.Array, angles: tuple[jax.Array, jax.Array], attend: Attend, rules: Rules, dropout: Dropout | None
    ) -> tuple[jax.Array, Any]:
        """h [B, T, D] -> [B, T, D] and what `attend` keeps"""
        y, kept = self.attn(self.attn_norm(h, rules), angles, attend, rules, dropout)
        h = h + y
        return h + self.mlp(self.mlp_norm(h, rules), rules, dropout), kept
