"""Random changes of prepared volumes in training, as M3D makes them: [D, H, W, 1] float32 in and out.

In order: a turn by 90, 180 or 270 degrees in the (H, W) plane; mirrored along D, H and W, each by itself; scaled by 1 + u;
shifted by u. `intensity` makes the last two alone: turned or mirrored, a volume contradicts a report that names sides. Values
may leave [0, 1], as upstream's do.

The draws of a volume are a function of (seed, epoch, sample, repeat, image): they differ from epoch to epoch and repeat with
the same numbers, whatever the processes, threads and the place in a batch. In evaluation (epoch -1) nothing is changed.
"""

from typing import Literal

import numpy as np

Augment = Literal["none", "intensity", "m3d"]
TURN, MIRROR, SCALE, SHIFT = 0.5, 0.1, 0.5, 0.5
"""Probability of each"""
REACH = 0.1
"""Scale and shift are drawn from -REACH to REACH"""
DRAWS = 9
_WORD = 61
"""First word of the key, so that what else is drawn for a sample is drawn apart"""


def augment(values: np.ndarray, kind: Augment, seed: int, key: tuple[int, int, int], image: int = 0) -> np.ndarray:
    """A changed copy, or `values` itself where nothing changes. `key`: (epoch, sample, repeat) as GlobalBatch.key gives it;
    `image`: which of the sample's."""
    if kind == "none" or key[0] < 0:
        return values
    turn, quarter, *mirrors, scale, by, shift, up = _uniform(_WORD, seed, *key, image)
    changed = values
    if kind == "m3d":
        if turn < TURN:
            changed = np.rot90(changed, 1 + int(3 * quarter), axes=(1, 2))
        for axis, mirror in enumerate(mirrors):
            if mirror < MIRROR:
                changed = np.flip(changed, axis)
    if scale < SCALE:
        changed = changed * np.float32(1 + REACH * (2 * by - 1))
    if shift < SHIFT:
        changed = changed + np.float32(REACH * (2 * up - 1))
    return np.ascontiguousarray(changed)


def _uniform(*key: int) -> list[float]:
    """Numbers from 0 to 1. The raw stream of a bit generator never changes; numpy's distributions may, by version."""
    raw = np.random.Philox(np.random.SeedSequence(list(key))).random_raw(DRAWS)
    return ((raw >> np.uint64(11)) * 2.0**-53).tolist()
