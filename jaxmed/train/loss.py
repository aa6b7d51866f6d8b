"""Token cross-entropy at supervised positions only; [B, T, V] is never built.

The hidden states at supervised positions are gathered, and logits exist for a chunk of them at a time, recomputed in the
backward pass. Sums and counts are returned; whoever calls divides once.

Axis letters: B batch, T text, M supervised positions, D width, V padded vocabulary, c chunk of M.
"""

import jax
import jax.numpy as jnp

from jaxmed.models.vlm import Vlm
from jaxmed.nn.attention_xla import chunk_length
from jaxmed.nn.dropout import Draws
from jaxmed.sharding import Rules
from jaxmed.types import Batch


def token_losses(model: Vlm, batch: Batch, rules: Rules, draws: Draws | None, chunk: int) -> tuple[jax.Array, ...]:
    """-> of each row [B]: summed negative log-likelihood float32, count of supervised tokens int32, and how many of them have
    the largest logit int32"""
    hidden = model(batch, rules, draws)
    picked = pick_positions(hidden, batch.supervised, rules)
    valid = batch.supervised >= 0
    # a trained head's gradient is summed over the rows' shards after the last chunk, not in every one
    table = rules.summed_once(model.decoder.head_table(rules), "batch", "vocab", None)
    rows, places = batch.supervised.shape
    size = chunk_length(places, chunk)
    pad = -places % size

    def cut(x: jax.Array, spec) -> jax.Array:  # [B, M, ...] -> [M / c, B, c, ...]
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, -1, size, *x.shape[2:], out_sharding=spec), 1, 0)

    by_chunk = rules.spec("batch", None, None)
    pieces = cut(picked, rules.spec("batch", None, None, None)), cut(batch.labels, by_chunk), cut(valid, by_chunk)

    def add(sums: tuple[jax.Array, jax.Array], piece: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
        total, right = sums
        hidden, labels, valid = piece
        logits = model.decoder.logits(hidden, rules, None, table)
        column = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2, out_sharding=rules.spec(None, None, "vocab"))
        wanted = jnp.sum(jnp.where(column == labels[..., None], logits, 0.0), axis=-1)
        nll = jax.nn.logsumexp(logits, axis=-1) - wanted
        first = valid & (wanted >= jnp.max(logits, axis=-1))
        return (total + jnp.sum(jnp.where(valid, nll, 0.0), axis=-1), right + jnp.sum(first, axis=-1, dtype=jnp.int32)), None

    start = tuple(jnp.zeros((rows,), dtype, out_sharding=rules.spec("batch")) for dtype in (jnp.float32, jnp.int32))
    (total, right), _ = jax.lax.scan(jax.checkpoint(add), start, pieces)
    return total, jnp.sum(valid, axis=-1, dtype=jnp.int32), right


def pick_positions(hidden: jax.Array, at: jax.Array, rules: Rules) -> jax.Array:
    """hidden [B, T, D] with T over `context`, at [B, M] over all of T (-1: none) -> [B, M, D], whole on every context shard"""
    if not rules.length:
        raise ValueError("pick_positions needs a rule for the length axis")

    def pick(hidden: jax.Array, at: jax.Array) -> jax.Array:
        local = at - jax.lax.axis_index("context") * hidden.shape[1]
        here = (local >= 0) & (local < hidden.shape[1])
        rows = jnp.take_along_axis(hidden, jnp.clip(local, 0, hidden.shape[1] - 1)[..., None], axis=1)
        return jax.lax.psum(jnp.where(here[..., None], rows, 0), "context")

    specs = (rules.spec("batch", "length", None), rules.spec("batch", None))
    return jax.shard_map(pick, in_specs=specs, out_specs=rules.spec("batch", None, None))(hidden, at)
