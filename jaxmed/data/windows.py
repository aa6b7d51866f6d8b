"""BTB3D's overlapping windows: a preprocessed volume to windows of Haar-patched frames, and token frames back to a volume.

Each window has 5 patched frames, each begins 4 after the last; 5 frames become 2 token frames, of which the first depends on
the window's first frame alone. So token 0 of window 0 and token 1 of every window make the volume: T = 1 + windows.
Depths of 1 + 8m slices are used whole (241 -> 121 patched frames -> 30 windows -> T 31); others lose slices: the depth is
cropped to 1 + 4m around its centre, and patched frames after the last whole window are dropped (21 gives what 17 gives, T 3).

Axis letters: [D, H, W] voxels, B windows, C channels, (T, h, w) tokens.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from jaxmed.config import EncodeConfig
from jaxmed.data import haar
from jaxmed.data.volumes import crop_depth
from jaxmed.errors import UserError

FRAMES, STEP = 5, 4
# The shortest depth with one window; one more window takes 8 slices.
SHORTEST, WINDOW_SLICES = 9, 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def window_count(depth: int) -> int:
    """Windows of a volume of `depth` slices."""
    if depth < SHORTEST:
        raise UserError(f"encode.canvas has {depth} slices; BTB3D's encoder needs at least {SHORTEST}")
    return (depth - 1) // WINDOW_SLICES


def token_shape(config: EncodeConfig, cell: tuple[int, int, int], features: int) -> tuple[int, int, int, int]:
    """(C, T, h, w) of a file; `cell` is a token's voxels along depth, rows and columns."""
    height, width, depth = config.canvas
    _, rows, columns = cell
    if height % rows or width % columns:
        raise UserError(
            f"encode.canvas {config.canvas}: {height} x {width} voxels a slice are not a multiple of the encoder's "
            f"{rows} x {columns} voxels a token; choose another canvas"
        )
    return features, 1 + window_count(depth), height // rows, width // columns


def patched_windows(volume: np.ndarray) -> list[np.ndarray]:
    """[D, H, W] as `volumes.preprocess` gives it -> windows [8, 5, H / 2, W / 2], views of one array."""
    cropped = crop_depth(volume)
    patched = haar.patch(cropped)
    return [patched[:, start : start + FRAMES] for start in range(0, STEP * window_count(len(cropped)), STEP)]


def join(z: np.ndarray) -> np.ndarray:
    """Both token frames of every window [B, 2, h, w, C] -> [C, T, h, w]"""
    return np.ascontiguousarray(np.concatenate([z[:1, 0], z[:, 1]]).transpose(3, 0, 1, 2))


def ahead(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> Iterator[Result]:
    """Results in order, at most `threads` of them computed before they are asked for: what is prepared stays bounded.

    Reading, unpacking and resampling release the interpreter's lock, and threads need not copy a volume to hand it over.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
