"""Learned position tables at other grid sizes, as torch's `interpolate` resizes them: a small matrix for every axis.

The matrices are computed with numpy while tracing. Axis letters: G places along an axis of the new grid, O of the old one.
"""

import jax
import jax.numpy as jnp
import numpy as np

_CUBIC = -0.75
"""torch's coefficient of the cubic kernel"""
_DINO_OFFSET = 0.1
"""DINO's code adds it to the new size before it divides, against rounding; the scale, and so every value, changes with it"""


def resized(table: jax.Array, old: tuple[int, ...], new: tuple[int, ...], dino: bool) -> jax.Array:
    """table [prod(old), D] -> [prod(new), D] float32; cubic along two axes, linear along three (torch's bicubic, trilinear)."""
    x = table.astype(jnp.float32).reshape(*old, table.shape[-1])
    for axis, (o, g) in enumerate(zip(old, new, strict=True)):
        scale = (g + _DINO_OFFSET) / o if dino else g / o
        matrix = cubic_matrix(g, o, scale) if len(old) == 2 else linear_matrix(g, o)
        x = jnp.moveaxis(jnp.tensordot(matrix, x, (1, axis)), 0, axis)
    return x.reshape(-1, table.shape[-1])


def cubic_matrix(new: int, old: int, scale: float) -> np.ndarray:
    """[G, O] float32. Sample g lies at (g + 0.5) / scale - 0.5 and has four taps; beyond the edge the edge counts."""
    at = (np.arange(new) + 0.5) / scale - 0.5
    below = np.floor(at).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(at - (below + tap))
        near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
        far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
        place = np.clip(below + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), place), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)


def linear_matrix(new: int, old: int) -> np.ndarray:
    """[G, O] float32. Sample g lies at (g + 0.5) * O / G - 0.5, not before the first place, between two taps."""
    at = np.maximum((np.arange(new) + 0.5) * old / new - 0.5, 0.0)
    below = np.floor(at).astype(int)
    matrix = np.zeros((new, old))
    for tap, weight in ((0, 1 - (at - below)), (1, at - below)):
        np.add.at(matrix, (np.arange(new), np.minimum(below + tap, old - 1)), weight)
    return matrix.astype(np.float32)
