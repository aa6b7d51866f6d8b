"""Attention by cuDNN's flash kernel on NVIDIA GPUs, for rows that hold one segment.

cuDNN knows causal, a window behind the query, and a length a row; padding must stand at the end. Rows that may be padded on
the left are turned so that their tokens come first, and their results turned back. Several segments in a row (packing) and a
share of T against all keys (context shards) cannot be said to it without a mask of T x T, so these go to XLA: its causal mask
starts at the first key whatever the queries' place, and joining a shard's two halves (all earlier keys; its own, causal) by
their log-sums needs those log-sums in the backward pass, which JAX's function does not take.

Axis letters: B batch, T queries and keys, Q query heads, K kv heads, H head width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmed.nn.attention_mask import Layout, Mask
from jaxmed.types import Padding

WIDEST_HEAD = 128


def is_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a primitive is the forward kernel: a checkpoint policy, since JAX gives the kernel's results no name."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


def obstacle(mask: Mask, layout: Layout, platform: str, dtype: jnp.dtype, width: int, context: int) -> str:
    """Why the kernel cannot serve; "": it can."""
    if platform not in ("gpu", "cuda"):
        return f"cuDNN runs on NVIDIA GPUs, and this mesh's devices are {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's flash attention takes bfloat16, not {jnp.dtype(dtype).name}"
    if width > WIDEST_HEAD or width % 8:
        return f"cuDNN's flash attention takes heads of a multiple of 8 up to {WIDEST_HEAD} wide, not {width}"
    if context > 1:
        return "cuDNN cannot say which part of T a context shard has"
    if layout.packed:
        return "cuDNN cannot keep the samples of a packed row apart"
    if layout.order == "any" and mask.ordered:
        return "cuDNN needs T in natural order"
    if mask.window and not mask.causal:
        return "cuDNN has windows for causal attention alone"
    return ""


def local_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, mask: Mask, padding: Padding) -> jax.Array:
    """One shard's part, inside shard_map: q [B, T, Q, H], k and v [B, T, K, H], segments [B, T] -> [B, T, Q, H]"""
    length = q.shape[1]
    if length % 2:  # the kernel's backward pass takes even T alone
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        segments, padding = jnp.pad(segments, ((0, 0), (0, 1))), "right" if padding == "none" else padding
    if padding == "none":
        return _kernel(q, k, v, None, mask)
    exists = (segments != 0)[..., None, None]
    lengths = jnp.maximum(jnp.sum(segments != 0, axis=1, dtype=jnp.int32), 1)
    # whatever the kernel leaves in padding, forward and backward, is replaced by 0
    q, k, v = (jnp.where(exists, x, 0) for x in (q, k, v))
    if padding == "right":
        out = _kernel(q, k, v, lengths, mask)
    else:
        first = jnp.argmax(segments != 0, axis=1).astype(jnp.int32)
        out = _turned(_kernel(*(_turned(x, first) for x in (q, k, v)), lengths, mask), -first)
    return jnp.where(exists, out, 0)[:, :length]


def _kernel(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, mask: Mask) -> jax.Array:
    """`lengths` [B]: tokens of a row, which come first; None: all of T."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=mask.causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=(mask.window - 1, 0) if mask.window else None,
        implementation="cudnn",
    )


@jax.custom_vjp
def _turned(x: jax.Array, by: jax.Array) -> jax.Array:
    """x [B, T, N, H] with row b turned left by `by[b]` places. Backward it is turned back: JAX would transpose the gather into
    a scatter, which on a GPU takes longer than the kernel at a few thousand tokens."""
    at = (jnp.arange(x.shape[1], dtype=jnp.int32) + by[:, None]) % x.shape[1]
    return jax.vmap(lambda row, at: row.at[at].get(mode="promise_in_bounds", unique_indices=True))(x, at)


def _turned_forward(x: jax.Array, by: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _turned(x, by), by


def _turned_backward(by: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return _turned(cotangent, -by), None


_turned.defvjp(_turned_forward, _turned_backward)
