"""Writing into a cache of keys and values whose slots may be split over context shards.

Tokens go round the shards: token n lies in slot n // c of shard n % c. A prompt, of which each shard holds an equal part, is
thus written without a transfer, whatever order it lies in: a slot's position says what it is. Every write is local.

Axis letters: B batch, T tokens, S cache slots, K kv heads, H head width, D width, c context shards.
"""

import jax
import jax.numpy as jnp

from jaxmed.sharding import Rules
from jaxmed.types import KVCache, Order


def context_shards(rules: Rules) -> int:
    """Shards of T and of the cache's slots on the mesh that is entered."""
    return dict(jax.sharding.get_abstract_mesh().shape)["context"] if rules.length else 1


def cache_prompt(cache: jax.Array, new: jax.Array, rules: Rules) -> jax.Array:
    """cache [B, K, S, H], new [B, T, K, H] -> the cache with `new` in the first slots (of every shard)"""

    def write(cache: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(cache, new.transpose(0, 2, 1, 3).astype(cache.dtype), 0, axis=2)

    spec = rules.spec("batch", "kv_heads", "length", None)
    new_spec = rules.spec("batch", "length", "kv_heads", None)
    return jax.shard_map(write, in_specs=(spec, new_spec), out_specs=spec)(cache, new)


def cache_row(cache: jax.Array, new: jax.Array, rules: Rules) -> jax.Array:
    """The same for what has neither heads nor width: cache [B, S], new [B, T]"""
    spec = rules.spec("batch", "length")

    def write(cache: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, 0, axis=1)

    return jax.shard_map(write, in_specs=(spec, spec), out_specs=spec)(cache, new)


def cache_token(cache: jax.Array, new: jax.Array, cursor: jax.Array, rules: Rules) -> jax.Array:
    """cache [B, K, S, H], new [B, 1, K, H], the token's number [] -> the cache with the token in its slot"""
    context = context_shards(rules)

    def write(cache: jax.Array, new: jax.Array, cursor: jax.Array) -> jax.Array:
        new = new.transpose(0, 2, 1, 3).astype(cache.dtype)
        if context > 1:
            old = jax.lax.dynamic_slice_in_dim(cache, cursor // context, 1, axis=2)
            new = jnp.where(cursor % context == jax.lax.axis_index("context"), new, old)
        return jax.lax.dynamic_update_slice_in_dim(cache, new, cursor // context, axis=2)

    spec, new_spec = rules.spec("batch", "kv_heads", "length", None), rules.spec("batch", None, "kv_heads", None)
    return jax.shard_map(write, in_specs=(spec, new_spec, rules.spec()), out_specs=spec)(cache, new, cursor)


def next_slot(cache: KVCache, rules: Rules) -> jax.Array:
    """[1, S] bool: where the next token goes"""
    slots, context = cache.positions.shape[1], context_shards(rules)
    number = jax.lax.broadcasted_iota(jnp.int32, (1, slots), 1, out_sharding=rules.spec(None, "length"))
    return number == cache.cursor % context * (slots // context) + cache.cursor // context


def last_token(hidden: jax.Array, order: Order, rules: Rules) -> jax.Array:
    """hidden [B, T, D] of left-padded prompts -> of their last tokens [B, D], on every context shard"""
    context = context_shards(rules)
    if order not in ("natural", "balanced"):
        raise ValueError(f"where the last token lies is not known of order {order}")
    holder = 0 if order == "balanced" else context - 1

    def pick(hidden: jax.Array) -> jax.Array:
        last = hidden[:, -1]
        if not rules.length:
            return last
        return jax.lax.psum(jnp.where(jax.lax.axis_index("context") == holder, last, 0), "context")

    specs = {"in_specs": rules.spec("batch", "length", None), "out_specs": rules.spec("batch", None)}
    return jax.shard_map(pick, **specs)(hidden)
