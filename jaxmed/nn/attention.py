"""Attention behind one function, whatever computes it; its memory is linear in T.

Who may attend to whom is one `Mask` over positions and segments. Three backends give the same numbers:

    xla      any device, mask and order (jaxmed.nn.attention_xla)
    splash   TPUs (jaxmed.nn.attention_splash)
    cudnn    NVIDIA GPUs, rows of one segment (jaxmed.nn.attention_cudnn)

`train.attention` chooses; `auto` takes the mesh's own, and XLA where that cannot express what is asked.

Axis letters: B batch, T queries, S keys or cache slots, Q query heads, K kv heads, H head width.
"""

import warnings

import jax
import jax.numpy as jnp

from jaxmed.config import AttentionBackend
from jaxmed.errors import Notice
from jaxmed.nn import attention_cudnn, attention_splash, attention_xla
from jaxmed.nn.attention_mask import NEGATIVE, Layout, Mask, layout_for
from jaxmed.nn.cache import context_shards
from jaxmed.sharding import Rules

__all__ = ["Layout", "Mask", "attention", "cached_attention", "choose_backend", "layout_for", "mesh_platform"]

OWN = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}
"""The backend that `auto` asks for, by platform"""


def mesh_platform() -> str:
    """Platform of the devices of the mesh that is entered, also of devices that are only described; "cpu" where unknown."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else "cpu"


def choose_backend(
    layout: Layout, mask: Mask, platform: str, dtype: jnp.dtype, length: int, width: int, context: int
) -> tuple[AttentionBackend, str]:
    """-> what computes rows of `length` tokens and heads of `width`, and why not what was wanted ("": it is that)."""
    wanted = OWN.get(platform, "xla") if layout.backend == "auto" else layout.backend
    reason = ""
    if wanted == "splash":
        reason = attention_splash.obstacle(mask, layout, platform, length, context)
    elif wanted == "cudnn":
        reason = attention_cudnn.obstacle(mask, layout, platform, dtype, width, context)
    return ("xla", reason) if reason else (wanted, "")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    mask: Mask,
    layout: Layout,
    rules: Rules,
) -> jax.Array:
    """Self-attention over a batch laid out on the mesh: q [B, T, Q, H], k and v [B, T, K, H], positions and segment_ids [B, T]
    -> [B, T, Q, H]. Queries stay on their context shard; keys and values are gathered over `context`."""
    platform, shards = mesh_platform(), dict(jax.sharding.get_abstract_mesh().shape)
    context = context_shards(rules)
    length, width = q.shape[1], q.shape[3]
    backend, reason = choose_backend(layout, mask, platform, q.dtype, length, width, context)
    if reason:
        warnings.warn(f"attention runs in plain XLA: {reason}", Notice, stacklevel=2)
    q_spec, kv_spec = rules.spec("batch", "length", "heads", None), rules.spec("batch", "length", "kv_heads", None)
    row = rules.spec("batch", "length")
    specs = (q_spec, kv_spec, kv_spec, row, row)
    inputs = (q, k, v, positions, segment_ids)

    def whole(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array) -> tuple:
        """Inside shard_map: all keys and values that a shard's queries need, with their positions and segments."""
        if rules.kv_heads != rules.heads:
            k, v = (own_kv_heads(x, axis=2) for x in (k, v))
        keys = (k, v, positions, segments)
        if context > 1:
            # along a new first axis: TPUs sum the gradients of arrays split there by reduce-scatter, else by all-reduce
            keys = tuple(jax.lax.all_gather(x, "context") for x in keys)
            keys = tuple(from_balanced(x) if layout.order == "balanced" else _flat(x) for x in keys)
        return keys

    if backend == "splash":
        heads = q.shape[2] // (shards["tensor"] if rules.heads else 1)
        padded = attention_splash.padded_length(length, layout.chunk, context)
        kernel = attention_splash.kernel_for(mask, layout, heads, padded, context, interpret=platform != "tpu")
        kernel_specs = attention_splash.kernel_specs(kernel, rules)
        kernel = jax.sharding.reshard(kernel, kernel_specs)

        def by_splash(kernel, *inputs):
            k, v, _, segment_k = whole(*inputs)
            return attention_splash.local_attention(kernel, inputs[0], k, v, inputs[4], segment_k, padded)

        # a Pallas kernel does not say over which axes its results differ
        attend = jax.shard_map(by_splash, in_specs=(kernel_specs, *specs), out_specs=q_spec, check_vma=False)
        return attend(kernel, *inputs)
    if backend == "cudnn":

        def by_cudnn(*inputs):
            k, v, *_ = whole(*inputs)
            return attention_cudnn.local_attention(inputs[0], k, v, inputs[4], mask, layout.padding)

        return jax.shard_map(by_cudnn, in_specs=specs, out_specs=q_spec, check_vma=False)(*inputs)

    axes = tuple(a for name in ("batch", "length", "heads") for a in getattr(rules, name))

    def by_xla(*inputs):
        k, v, position_k, segment_k = whole(*inputs)
        where = (inputs[3], inputs[4], position_k, segment_k)
        return attention_xla.local_attention(inputs[0], k, v, where, mask, layout, context, axes)

    return jax.shard_map(by_xla, in_specs=specs, out_specs=q_spec)(*inputs)


@jax.custom_vjp
def from_balanced(x: jax.Array) -> jax.Array:
    """[c, B, T / c, ...] of shards in `balanced_order` -> [B, T, ...] in natural order. Made of whole pieces, backward too: an
    index along T would turn into a scatter there."""
    half = x.shape[2] // 2
    return jnp.concatenate([_flat(x[:, :, :half]), _flat(x[::-1, :, half:])], axis=1)


def _to_balanced(context: int, y: jax.Array) -> tuple[jax.Array]:
    pieces = y.reshape(y.shape[0], 2, context, -1, *y.shape[2:])
    first, second = (jnp.moveaxis(pieces[:, n], 1, 0) for n in range(2))
    return (jnp.concatenate([first, second[::-1]], axis=2),)


from_balanced.defvjp(lambda x: (from_balanced(x), x.shape[0]), _to_balanced)


def _flat(x: jax.Array) -> jax.Array:
    """[c, B, T / c, ...] -> [B, T, ...]"""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def own_kv_heads(x: jax.Array, axis: int) -> jax.Array:
    """Of kv heads that every tensor shard holds in full, the one that this shard's query heads read."""
    shards = jax.lax.axis_size("tensor")
    head = jax.lax.axis_index("tensor") * x.shape[axis] // shards
    return jax.lax.dynamic_slice_in_dim(x, head, 1, axis)


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position_q: jax.Array,
    position_k: jax.Array,
    valid: jax.Array,
    mask: Mask,
    rules: Rules,
    branches: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """A few queries against a cache: q [B, T, Q, H], k and v [B, K, S, H], position_q [B, T], position_k and valid [B, S]
    -> [B, T, Q, H]. The scores [B, Q, T, S] exist at once, so T is small here (one, in the decode loop).

    Slots may be split over `context`: each shard takes the softmax over its own, and the shards' results are joined by their
    maxima and denominators. `branches`: those that each query sees [B, T, A], and that each slot is of [B, S]; None: no
    branches.
    """
    merged = bool(rules.length)

    def local(q, k, v, position_q, position_k, valid, *branches):
        if rules.kv_heads != rules.heads:
            k, v = (own_kv_heads(x, axis=1) for x in (k, v))
        batch, length, heads, width = q.shape
        # heads of a group and queries on one axis: XLA's CPU lacks some bfloat16 products of five axes
        kv_heads = k.shape[1]
        grouped = q.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width)
        allowed = mask(position_q, position_k, jnp.ones_like(position_q), valid.astype(jnp.int32))
        for seen, of_slot in [branches] if branches else []:
            allowed &= jnp.any(seen[..., None] == of_slot[:, None, None, :], axis=2)
        allowed = allowed[:, None, None]
        scores = jnp.einsum("bknh,bksh->bkns", grouped, k, preferred_element_type=jnp.float32) * width**-0.5
        scores = jnp.where(allowed, scores.reshape(batch, kv_heads, -1, length, k.shape[2]), NEGATIVE)
        weights, total = _weights(scores, merged)
        weights = weights.astype(v.dtype).reshape(batch, kv_heads, -1, k.shape[2])
        out = jnp.einsum("bkns,bksh->bknh", weights, v, preferred_element_type=jnp.float32)
        if merged:
            out = jax.lax.psum(out, "context") / total.reshape(*out.shape[:-1], 1)
        out = out.astype(q.dtype).reshape(batch, kv_heads, -1, length, width).transpose(0, 3, 1, 2, 4)
        return out.reshape(batch, length, heads, width)

    q_spec, kv_spec = rules.spec("batch", None, "heads", None), rules.spec("batch", "kv_heads", "length", None)
    of_queries, of_slots = rules.spec("batch", None), rules.spec("batch", "length")
    specs = (q_spec, kv_spec, kv_spec, of_queries, of_slots, of_slots)
    inputs = (q, k, v, position_q, position_k, valid)
    if branches is not None:
        specs, inputs = (*specs, rules.spec("batch", None, None), of_slots), (*inputs, *branches)
    return jax.shard_map(local, in_specs=specs, out_specs=q_spec)(*inputs)


def _weights(scores: jax.Array, merged: bool) -> tuple[jax.Array, jax.Array]:
    """[..., S] float32 -> softmax weights and 1; of slots split over `context`, weights that lack the shards' common
    denominator [..., 1], and that."""
    if not merged:
        return jax.nn.softmax(scores, axis=-1), jnp.ones((), jnp.float32)
    top = jax.lax.pmax(jnp.max(scores, axis=-1, keepdims=True), "context")
    weights = jnp.exp(scores - top)
    return weights, jax.lax.psum(jnp.sum(weights, axis=-1, keepdims=True), "context")
