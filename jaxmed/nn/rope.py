"""Rotary position embeddings in the half-split convention of Hugging Face's LLaMA; angles in float32.

Sources: RoFormer (arXiv 2104.09864); `llama3` scaling as in huggingface/transformers, src/transformers/modeling_rope_utils.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """[H / 2] float32 radians per position."""
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.scaling == "none":
        return inverse.astype(np.float32)
    wavelength = 2 * math.pi / inverse
    low = rope.original_positions / rope.low_freq_factor
    high = rope.original_positions / rope.high_freq_factor
    smooth = (rope.original_positions / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * inverse / rope.factor + smooth * inverse
    scaled = np.where(wavelength > low, inverse / rope.factor, np.where(wavelength < high, inverse, between))
    return scaled.astype(np.float32)


def rope_angles(positions: jax.Array, rope: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """positions [B, T] -> cosines and sines, each [B, T, H / 2] float32."""
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(rope, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [B, T, heads, H] -> the same, each pair (i, i + H / 2) turned by its position's angle; float32 inside."""
    cos, sin = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
