"""Deterministic values without a generator, for which upstream's modules have given their outputs once."""

import math

import numpy as np


def fill(shape: tuple[int, ...], h: int) -> np.ndarray:
    """Numbers from -0.5 to 0.5: a hash of the flat index and of `h`."""
    i = np.arange(math.prod(shape), dtype=np.uint64)
    return (((i * 2654435761 + h * 97531 + 12345) % 2**32) / 2**32 - 0.5).reshape(shape)


def filled_by_name(name: str, shape: tuple[int, ...]) -> np.ndarray:
    u = fill(shape, sum(name.encode()) % 97)
    if name.endswith("bias"):
        return (0.2 * u).astype(np.float32)
    return (1 + 0.2 * u if name.endswith("weight") and len(shape) == 1 else 0.5 * u).astype(np.float32)
