"""Rotary position embeddings in the half-split convention of Hugging Face's LLaMA; angles in float32.

Sources: RoFormer (arXiv 2104.09864); `linear` and `llama3` scaling and `longrope` (LongRoPE, arXiv 2402.13753) as in
huggingface/transformers, src/transformers/modeling_rope_utils.py.

LongRoPE has two lists of frequencies, one for sequences of at most `original_positions` tokens and one for longer ones. A
sequence is rotated by one list throughout: which one, `is_long` says of every token, from the longest position of its own
segment. (transformers asks for the longest position of the whole batch.)
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, long: bool = False) -> np.ndarray:
    """[H / 2] float32 radians per position; `long` asks for longrope's list of long sequences."""
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.scaling in ("none", "linear"):
        return (inverse / (rope.factor if rope.scaling == "linear" else 1.0)).astype(np.float32)
    if rope.scaling == "longrope":
        return (inverse / np.asarray(rope.long_factors if long else rope.short_factors)).astype(np.float32)
    wavelength = 2 * math.pi / inverse
    low = rope.original_positions / rope.low_freq_factor
    high = rope.original_positions / rope.high_freq_factor
    smooth = (rope.original_positions / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * inverse / rope.factor + smooth * inverse
    scaled = np.where(wavelength > low, inverse / rope.factor, np.where(wavelength < high, inverse, between))
    return scaled.astype(np.float32)


def rope_angles(positions: jax.Array, rope: RopeConfig, head_dim: int, long: jax.Array | bool) -> tuple[jax.Array, jax.Array]:
    """positions [B, T] -> cosines and sines, each [B, T, H / 2] float32.

    `long` [B, T] or [B, 1] (longrope alone): tokens of sequences beyond `original_positions`.
    """
    position = positions.astype(jnp.float32)[..., None]
    angles = position * inverse_frequencies(rope, head_dim)
    if rope.scaling != "longrope":
        return jnp.cos(angles), jnp.sin(angles)
    angles = jnp.where(jnp.asarray(long)[..., None], position * inverse_frequencies(rope, head_dim, long=True), angles)
    return rope.attention_factor * jnp.cos(angles), rope.attention_factor * jnp.sin(angles)


def is_long(positions: jax.Array, segment_ids: jax.Array, rope: RopeConfig) -> jax.Array | bool:
    """positions and segment_ids [B, T] -> [B, T] bool, whether a token's segment is longer than `original_positions`.

    A long segment has exactly one token at position `original_positions`, so its number is found by reductions over T, which
    any sharding and any order of T allow; a row has room for T // (original_positions + 1) of them.
    """
    most = positions.shape[1] // (rope.original_positions + 1)
    if rope.scaling != "longrope" or not most:
        return False
    marked = jnp.where(positions == rope.original_positions, segment_ids, 0)
    long = segment_ids < 0  # none
    for _ in range(most):
        found = jnp.max(marked, axis=1, keepdims=True)
        long |= (segment_ids == found) & (found > 0)
        marked = jnp.where(marked == found, 0, marked)
    return long


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [B, T, heads, H] -> the same, each pair (i, i + H / 2) turned by its position's angle; float32 inside."""
    cos, sin = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
