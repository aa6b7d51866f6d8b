"""Attention in plain XLA whose memory is linear in T, for any device, mask and order.

Work is a list of pairs (chunk of queries, chunk of keys); a single scan visits them with a running softmax, forward and
backward, so no array has two axes of length T. Pairs that the mask rules out wholesale are left off the list where the order
along T is known (`natural`, or `balanced` over context shards: then every shard's list has the same length, about half the
full square). Correctness never depends on the list: each pair is masked by positions and segments.

The running softmax follows FlashAttention-2 (Dao, arXiv 2307.08691).

Axis letters: B batch, T queries, S keys, Q query heads, K kv heads, G = Q / K, H head width, P pairs, c chunk length.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxmed.nn.attention_mask import NEGATIVE, Layout, Mask
from jaxmed.types import Order


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    where: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    mask: Mask,
    layout: Layout,
    context: int,
    axes: tuple[str, ...],
) -> jax.Array:
    """One shard's part, inside shard_map: its queries [B, T, Q, H] against all keys [B, S, K, H] -> [B, T, Q, H].

    `where`: positions and segments of queries [B, T], of keys [B, S]; keys in natural order unless `layout.order` is `any`.
    `context`: shards of T; `axes`: mesh axes over which the inputs differ.
    """
    positions, segments, position_k, segment_k = where
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    granule = length // 2 if layout.order == "balanced" and context > 1 else length
    chunk = chunk_length(granule, layout.chunk)
    if length % chunk:  # only where nothing near the wanted length divides: pad with positions that attend to nothing
        assert context == 1
        pad = -length % chunk
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
        positions, segments = (jnp.pad(x, ((0, 0), (0, pad))) for x in (positions, segments))
        position_k, segment_k = positions, segments
    table = _pair_table(q.shape[1] // chunk, k.shape[1] // chunk, context, chunk, mask, layout.order)
    pairs = _varying(jnp.asarray(table), axes)[jax.lax.axis_index("context") if context > 1 else 0]  # [P, 2]
    # tied to q: otherwise JAX takes the masks of all pairs, the same in every layer, out of the loop over layers (T x T)
    q, pairs = jax.lax.optimization_barrier((q, pairs))
    grouped = q.reshape(batch, q.shape[1], kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))  # [B, K, S, H]
    out = _flash(grouped, k, v, (positions, position_k, segments, segment_k, pairs), mask, chunk, axes)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, -1, heads, width)[:, :length]


def chunk_length(length: int, wanted: int) -> int:
    """The largest divisor of `length` up to `wanted`, unless it is under a quarter of what was wanted: then `wanted` itself."""
    if length <= wanted:
        return length
    best = max(d for d in range(1, wanted + 1) if length % d == 0)
    return best if 4 * best >= wanted else wanted


def _pair_table(n_q: int, n_k: int, context: int, chunk: int, mask: Mask, order: Order) -> np.ndarray:
    """[context, P, 2] int32: for each context shard the pairs of chunks (queries, keys) to visit, queries ascending."""
    every = [(i, j) for i in range(n_q) for j in range(n_k)]
    if order == "any" or (order == "natural" and context > 1):
        return np.asarray([every] * context, np.int32)
    half = n_q // 2
    tables, left_off = [], []
    for shard in range(context):
        natural = np.arange(n_q)
        if context > 1:
            natural = np.where(natural < half, shard * half + natural, (2 * context - 1 - shard) * half + natural - half)
        meet = [_may_meet(natural[i], j, chunk, mask) for i, j in every]
        tables.append([pair for pair, wanted in zip(every, meet, strict=True) if wanted])
        left_off.append([pair for pair, wanted in zip(every, meet, strict=True) if not wanted])
    longest = max(len(table) for table in tables)
    # a window leaves the shards unequal work: pairs that are masked throughout fill the shorter lists
    return np.asarray([sorted(t + rest[: longest - len(t)]) for t, rest in zip(tables, left_off, strict=True)], np.int32)


def _may_meet(i: int, j: int, chunk: int, mask: Mask) -> bool:
    """Whether any query of natural chunk i may see any key of natural chunk j, were all of one segment."""
    if mask.causal and j > i:
        return False
    return not (mask.window and (i - j - 1) * chunk + 1 >= mask.window)


def _varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A fresh constant, marked as differing between the shards of `axes`: a scan's carry must be so from the start."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _cut(x: jax.Array, index: jax.Array, chunk: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis)


def _put(x: jax.Array, piece: jax.Array, index: jax.Array, chunk: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, piece.astype(x.dtype), index * chunk, axis)


def _scores(q: jax.Array, k: jax.Array, where: tuple, i: jax.Array, j: jax.Array, mask: Mask, chunk: int):
    """Scaled scores of one pair of chunks, [B, K, G, c, c] float32, and what is allowed, [B, 1, 1, c, c]."""
    position_q, position_k, segment_q, segment_k = where
    along = [_cut(x, n, chunk, 1) for x, n in ((position_q, i), (position_k, j), (segment_q, i), (segment_k, j))]
    allowed = mask(*along)[:, None, None]
    scores = jnp.einsum("bkgqh,bksh->bkgqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return scores, allowed


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, meta: tuple, mask: Mask, chunk: int, axes: tuple[str, ...]) -> jax.Array:
    """q [B, K, G, T, H], k and v [B, K, S, H], meta (positions and segments of queries and keys, pairs [P, 2]),
    axes: mesh axes over which the inputs differ -> as q"""
    return _flash_forward(q, k, v, meta, mask, chunk, axes)[0]


def _flash_forward(q: jax.Array, k: jax.Array, v: jax.Array, meta: tuple, mask: Mask, chunk: int, axes: tuple[str, ...]):
    *where, pairs = meta
    row = (*q.shape[:3], chunk)
    start = (
        jnp.zeros(q.shape, q.dtype),  # output
        jnp.full(q.shape[:4], NEGATIVE, jnp.float32),  # log of the softmax's denominator
        jnp.zeros((*row, q.shape[-1]), jnp.float32),  # of this chunk of queries: weighted sum,
        jnp.full(row, NEGATIVE, jnp.float32),  # running maximum,
        jnp.zeros(row, jnp.float32),  # running denominator
        jnp.int32(-1),  # and which chunk it is
    )

    def visit(carry, pair):
        out, lse, acc, top, total, last = carry
        i, j = pair
        fresh = i != last
        acc, total = jnp.where(fresh, 0.0, acc), jnp.where(fresh, 0.0, total)
        top = jnp.where(fresh, NEGATIVE, top)
        scores, allowed = _scores(_cut(q, i, chunk, 3), _cut(k, j, chunk, 2), where, i, j, mask, chunk)
        new_top = jnp.maximum(top, jnp.max(jnp.where(allowed, scores, NEGATIVE), axis=-1))
        weights = jnp.where(allowed, jnp.exp(scores - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=-1)
        v_chunk = _cut(v, j, chunk, 2)
        update = jnp.einsum("bkgqs,bksh->bkgqh", weights.astype(v.dtype), v_chunk, preferred_element_type=jnp.float32)
        acc = acc * shrink[..., None] + update
        floor = jnp.maximum(total, 1e-30)  # a query that sees nothing gets 0
        out = _put(out, acc / floor[..., None], i, chunk, 3)
        lse = _put(lse, new_top + jnp.log(floor), i, chunk, 3)
        return (out, lse, acc, new_top, total, i), None

    carry = tuple(_varying(x, axes) for x in start)
    (out, lse, *_), _ = jax.lax.scan(visit, carry, pairs)
    return out, lse


def _flash_fwd(q: jax.Array, k: jax.Array, v: jax.Array, meta: tuple, mask: Mask, chunk: int, axes: tuple[str, ...]):
    out, lse = _flash_forward(q, k, v, meta, mask, chunk, axes)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, meta, out, lse)


def _flash_bwd(mask: Mask, chunk: int, axes: tuple[str, ...], saved: tuple, d_out: jax.Array):
    q, k, v, meta, out, lse = saved
    *where, pairs = meta
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B, K, G, T]
    scale = q.shape[-1] ** -0.5

    def visit(carry, pair):
        dq, dk, dv = carry
        i, j = pair
        q_i, k_j, v_j, do_i = _cut(q, i, chunk, 3), _cut(k, j, chunk, 2), _cut(v, j, chunk, 2), _cut(d_out, i, chunk, 3)
        scores, allowed = _scores(q_i, k_j, where, i, j, mask, chunk)
        weights = jnp.where(allowed, jnp.exp(scores - _cut(lse, i, chunk, 3)[..., None]), 0.0)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        dv_j = product("bkgqs,bkgqh->bksh", weights.astype(do_i.dtype), do_i)
        d_weights = product("bkgqh,bksh->bkgqs", do_i, v_j)
        d_scores = (weights * (d_weights - _cut(delta, i, chunk, 3)[..., None]) * scale).astype(q.dtype)
        dq = _put(dq, _cut(dq, i, chunk, 3) + product("bkgqs,bksh->bkgqh", d_scores, k_j), i, chunk, 3)
        dk = _put(dk, _cut(dk, j, chunk, 2) + product("bkgqs,bkgqh->bksh", d_scores, q_i), j, chunk, 2)
        dv = _put(dv, _cut(dv, j, chunk, 2) + dv_j, j, chunk, 2)
        return (dq, dk, dv), None

    start = tuple(_varying(jnp.zeros(x.shape, jnp.float32), axes) for x in (q, k, v))
    (dq, dk, dv), _ = jax.lax.scan(visit, start, pairs)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_flash.defvjp(_flash_fwd, _flash_bwd)
