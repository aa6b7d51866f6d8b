"""Packing: several samples share a row, so that fewer compiled tokens are padding.

A sample needs (length, supervised, images); a row of a bucket offers (bucket, min(data.supervised, bucket), visual.images).
"""

from collections.abc import Sequence

import numpy as np

# Samples packed together. Larger windows fill a little better, but a sample is compared with all rows of its window.
WINDOW = 2048


class Rows:
    """Rows of one bucket while they fill up; the first row that has room for a sample takes it."""

    def __init__(self, capacity: Sequence[int], expected: int):
        self.capacity = tuple(capacity)
        self.samples: list[list[int]] = []
        self._left = np.zeros((len(self.capacity), max(expected, 1)), np.int64)

    def open(self) -> None:
        """Adds an empty row."""
        row = len(self.samples)
        if row == self._left.shape[1]:
            self._left = np.concatenate([self._left, np.zeros_like(self._left)], axis=1)
        self._left[:, row] = self.capacity
        self.samples.append([])

    def place(self, sample: int, need: Sequence[int], grow: bool) -> bool:
        """Puts the sample into the first row with room; where there is none, into a new row if `grow`."""
        left = self._left[:, : len(self.samples)]
        fits = left[0] >= need[0]
        for have, want in zip(left[1:], need[1:], strict=True):
            if want:
                fits &= have >= want
        row = int(fits.argmax()) if fits.size else 0
        if not fits.size or not fits[row]:
            if not grow or any(n > c for n, c in zip(need, self.capacity, strict=True)):
                return False
            row = len(self.samples)
            self.open()
        self._left[:, row] -= need
        self.samples[row].append(sample)
        return True


def pack(order: np.ndarray, needs: np.ndarray, capacities: Sequence[Sequence[int]], batch: int) -> list[list[list[int]]]:
    """Rows of every bucket (ascending, as `capacities`), filled first-fit in order of falling length, window by window.

    order: samples in the order of the epoch; needs: [samples, 3]. Buckets are filled from the longest down; the room
    that a bucket's rows leave (the empty rows of its last batch too) is offered to shorter samples before a shorter row is.
    """
    lengths = np.array([capacity[0] for capacity in capacities])
    bucket_of = np.searchsorted(lengths, needs[:, 0])
    packed: list[list[list[int]]] = [[] for _ in capacities]
    rest = order
    for bucket in range(len(capacities) - 1, -1, -1):
        own, shorter = rest[bucket_of[rest] == bucket], rest[bucket_of[rest] < bucket]
        windows = _fill_windows(own, needs, capacities[bucket])
        spare = -sum(len(rows.samples) for rows in windows) % batch
        if spare and windows:
            windows.append(Rows(capacities[bucket], spare))
            for _ in range(spare):
                windows[-1].open()
        rest = _fill_room(windows, shorter, needs)
        packed[bucket] = [row for rows in windows for row in rows.samples if row]
    return packed


def _by_length(samples: np.ndarray, needs: np.ndarray) -> np.ndarray:
    """Longest first; equally long ones stay in the order of the epoch."""
    return samples[np.argsort(-needs[samples, 0], kind="stable")]


def _fill_windows(samples: np.ndarray, needs: np.ndarray, capacity: Sequence[int]) -> list[Rows]:
    windows = []
    for start in range(0, len(samples), WINDOW):
        window = _by_length(samples[start : start + WINDOW], needs)
        rows = Rows(capacity, len(window))
        for sample in window.tolist():
            if not rows.place(sample, needs[sample], grow=True):
                raise ValueError(
                    f"sample {sample} needs {needs[sample].tolist()} (length, supervised, images), a row has {capacity}"
                )
        windows.append(rows)
    return windows


def _fill_room(windows: list[Rows], samples: np.ndarray, needs: np.ndarray) -> np.ndarray:
    """Deals the samples over the windows and places those that find room; returns the others in their order."""
    if not windows:
        return samples
    placed = np.zeros(len(needs), bool)
    for index, rows in enumerate(windows):
        for sample in _by_length(samples[index :: len(windows)], needs).tolist():
            placed[sample] = rows.place(sample, needs[sample], grow=False)
    return samples[~placed[samples]]
