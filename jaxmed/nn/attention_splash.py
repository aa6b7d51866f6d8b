"""Attention by JAX's splash kernel for TPUs: blocks that the mask rules out are never visited, forward and backward.

The kernel knows a mask by indices along T and segments by their ids. Within a segment positions and indices differ by a
constant as long as T lies in its natural order, so the two say the same. Context shards: keys are gathered in natural order,
and each query brings the index that it would have there, which is how a `balanced` order is expressed.

On another device than a TPU the kernel is interpreted: slow, for tests.

Axis letters: B batch, T queries, S keys, Q query heads, K kv heads, H head width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxmed.nn.attention_mask import Layout, Mask
from jaxmed.sharding import Rules, balanced_order

LANES = 128
"""Blocks are multiples of a vector register's lanes"""


def obstacle(mask: Mask, layout: Layout, platform: str, length: int, context: int) -> str:
    """Why the kernel cannot serve rows of `length`; "": it can."""
    if platform in ("gpu", "cuda"):
        return "the splash kernel is for TPUs"
    if layout.order == "any" and mask.ordered:
        return "the splash kernel needs T in natural or balanced order"
    if context > 1 and _granule(length, layout, context) % LANES:
        pieces = length // _granule(length, layout, context)
        return f"the splash kernel needs rows of a multiple of {pieces} x {LANES} tokens on this mesh, and these have {length}"
    return ""


def _granule(length: int, layout: Layout, context: int) -> int:
    """Length of the longest runs of T that lie on a shard in natural order."""
    return length // (2 * context if layout.order == "balanced" and context > 1 else context)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """Mask between indices, for the kernel and for numpy alike; equal rules compile once."""

    mask: Mask

    def __call__(self, q: Any, k: Any) -> Any:
        far = self.mask.window
        if not self.mask.causal:
            return q - k < far
        return (q >= k) & (q - k < far) if far else q >= k


@dataclasses.dataclass(frozen=True, eq=False)
class _Band(masks.Mask):
    """[T, S]: which keys the queries see, were all of one segment; query i has natural index `q_sequence[i]`."""

    q_sequence: np.ndarray
    mask_function: _Rule

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q_sequence), len(self.q_sequence)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = self.q_sequence[index[0]], np.arange(self.shape[1])[index[1]]
        return self.mask_function(rows[:, None], columns[None, :])

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, _Band) and self.mask_function == other.mask_function
        return same and np.array_equal(self.q_sequence, other.q_sequence)

    def __hash__(self) -> int:
        return hash((self.q_sequence.tobytes(), self.mask_function))


@functools.cache
def _mask(mask: Mask, length: int, balanced_over: int) -> masks.Mask:
    if not mask.ordered:
        return masks.FullMask((length, length))
    order = balanced_order(length, balanced_over) if balanced_over > 1 else np.arange(length)
    return _Band(order.astype(np.int32), _Rule(mask))


def padded_length(length: int, chunk: int, context: int) -> int:
    """T as the kernel takes it: whole blocks, the largest up to `chunk` for which an eighth of T is added at most (small blocks
    cost more than that). Shards of T are never padded: see `obstacle`."""
    if context > 1:
        return length
    sizes = (-(-length // block) * block for block in range(chunk // LANES * LANES, LANES, -LANES))
    return next((size for size in sizes if 8 * size <= 9 * length), -(-length // LANES) * LANES)


def block_size(length: int, layout: Layout, context: int) -> int:
    """Queries and keys of a block: the most up to the layout's chunk that cut a shard's runs evenly."""
    granule = _granule(length, layout, context)
    return max(b for b in range(LANES, max(layout.chunk, LANES) + 1, LANES) if granule % b == 0)


def kernel_for(mask: Mask, layout: Layout, heads: int, length: int, context: int, interpret: bool) -> Any:
    """The kernel as a pytree of small arrays (which blocks to visit) that go into shard_map with `kernel_specs`.

    `heads` of one shard; `length` of whole rows, as `padded_length` gives it.
    """
    block = block_size(length, layout, context)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    one = _mask(mask, length, context if layout.order == "balanced" else 1)
    return splash.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=context,
        residual_checkpoint_name="attention_out",
        interpret=interpret,
    )


def kernel_specs(kernel: Any, rules: Rules) -> Any:
    """Specs of the kernel's arrays: lists of blocks [heads, blocks of T, blocks of S], the queries' indices [T]."""
    axes = {1: ("length",), 3: (None, "length", None)}
    return jax.tree.map(lambda x: rules.spec(*axes[x.ndim]), kernel)


def local_attention(
    kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, segment_q: jax.Array, segment_k: jax.Array, padded: int
) -> jax.Array:
    """One shard's part, inside shard_map: q [B, T, Q, H], k and v [B, S, K, H], keys in natural order -> [B, T, Q, H]"""
    length = q.shape[1]
    if padded != k.shape[1]:
        pad = padded - k.shape[1]
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
        segment_q, segment_k = (jnp.pad(x, ((0, 0), (0, pad))) for x in (segment_q, segment_k))
    # the kernel has no scale of its own; one more rounding of q, where the scale is no power of two
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    heads_first = (x.transpose(0, 2, 1, 3) for x in (scaled, k, v))
    out = jax.vmap(kernel)(*heads_first, splash.SegmentIds(segment_q, segment_k)).transpose(0, 2, 1, 3)
    # padding is a segment like any other to the kernel
    return jnp.where((segment_q != 0)[..., None, None], out, 0).astype(q.dtype)[:, :length]
