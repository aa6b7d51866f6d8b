"""Writing into a cache of keys and values whose slots may be split over context shards.

Tokens go round the shards: token n lies in slot n // c of shard n % c. A prompt, of which each shard holds an equal part, is
thus written without a transfer, whatever order it lies in: a slot's position says what it is. Every write is local.

Several answers may grow from one prefix. They are branches of a row and each slot says whose it is, so the prefix is held once
and nothing is copied: `fork` makes branches, `Decoder.extend` writes into them.

Axis letters: B batch, T tokens, S cache slots, K kv heads, H head width, D width, c context shards.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp

from jaxmed.sharding import Rules
from jaxmed.types import Order

Lineages = tuple[tuple[int, ...], ...]
"""A branch each: the numbers of the branches whose slots it sees, its own last; 0 is what all begin with"""
ROOT: Lineages = ((0,),)


def context_shards(rules: Rules) -> int:
    """Shards of T and of the cache's slots on the mesh that is entered."""
    return dict(jax.sharding.get_abstract_mesh().shape)["context"] if rules.length else 1


def fork(lineages: Lineages, count: int) -> Lineages:
    """Each branch's `count` children, one branch's after the other; a row begins as ROOT."""
    following = itertools.count(1 + max(max(lineage) for lineage in lineages))
    return tuple((*lineage, next(following)) for lineage in lineages for _ in range(count))


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


def cache_tokens(cache: jax.Array, new: jax.Array, cursor: jax.Array, rules: Rules) -> jax.Array:
    """cache [B, K, S, H], new [B, T, K, H], the first token's number [] -> the cache with the tokens in their slots"""
    spec, new_spec = rules.spec("batch", "kv_heads", "length", None), rules.spec("batch", None, "kv_heads", None)

    def write(cache: jax.Array, new: jax.Array, cursor: jax.Array) -> jax.Array:
        return _written(cache, new.transpose(0, 2, 1, 3).astype(cache.dtype), cursor, 2, context_shards(rules))

    return jax.shard_map(write, in_specs=(spec, new_spec, rules.spec()), out_specs=spec)(cache, new, cursor)


def cache_marks(cache: jax.Array, new: jax.Array, cursor: jax.Array, rules: Rules) -> jax.Array:
    """The same for what has neither heads nor width: cache [B, S], new [B, T]"""
    spec, new_spec, context = rules.spec("batch", "length"), rules.spec("batch", None), context_shards(rules)
    write = partial(_written, axis=1, context=context)
    return jax.shard_map(write, in_specs=(spec, new_spec, rules.spec()), out_specs=spec)(cache, new, cursor)


def _written(cache: jax.Array, new: jax.Array, cursor: jax.Array, axis: int, context: int) -> jax.Array:
    """Inside shard_map: this shard's slots along `axis` with those of the tokens that belong there."""
    if context == 1:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, cursor, axis)
    shard, count = jax.lax.axis_index("context"), -(-new.shape[axis] // context)
    first = jnp.minimum((cursor - shard + context - 1) // context, cache.shape[axis] - count)
    number = (first + jnp.arange(count)) * context + shard - cursor  # among the new tokens
    here = ((number >= 0) & (number < new.shape[axis])).reshape([-1 if a == axis else 1 for a in range(cache.ndim)])
    picked = jnp.take(new, jnp.clip(number, 0, new.shape[axis] - 1), axis=axis)
    old = jax.lax.dynamic_slice_in_dim(cache, first, count, axis)
    return jax.lax.dynamic_update_slice_in_dim(cache, jnp.where(here, picked, old), first, axis)


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
