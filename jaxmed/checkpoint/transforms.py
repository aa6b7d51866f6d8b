"""How a tensor of a file becomes an array of ours, and back: the invertible transforms of the conversion table.

`read` takes slices only, so that a file that is memory-mapped is never read whole; `write` is the exact inverse.

Axis letters: V rows of a vocabulary with padding, D width, A added tokens, C channels, P size of a patch.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

_MEAN_ROWS = 4096


class Transform(Protocol):
    """How a tensor of theirs becomes an array of ours."""

    def wanted(self, ours: tuple[int, ...]) -> str:
        """The shape of theirs that fits, for messages."""
        ...

    def fits(self, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool: ...

    def read(self, theirs: np.ndarray, ours: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        """`index` of ours, from their tensor (a view of a file: only what is sliced is read)."""
        ...

    def write(self, ours: np.ndarray, theirs: np.ndarray | None) -> np.ndarray | None:
        """The way back; `theirs` is what rows before this one made of the same tensor. None: nothing to write."""
        ...


@dataclass(frozen=True)
class Identity:
    def wanted(self, ours: tuple[int, ...]) -> str:
        return str(list(ours))

    def fits(self, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
        return theirs == ours

    def read(self, theirs: np.ndarray, ours: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        return theirs[index]

    def write(self, ours: np.ndarray, theirs: np.ndarray | None) -> np.ndarray | None:
        return ours


@dataclass(frozen=True)
class Vocabulary:
    """Theirs [base or more rows, D] -> ours [V, D]: rows that theirs lacks get the mean of the base's, padding is zero.

    `surplus`: rows after the base's in a file whose table is longer than its tokenizer; no token has them, they are left out.
    """

    base: int
    added: int
    surplus: int = 0

    def wanted(self, ours: tuple[int, ...]) -> str:
        rows = f"{self.base}" if not self.added else f"{self.base} to {self.base + self.added}"
        rows += f" or {self.base + self.surplus}" if self.surplus else ""
        return f"[{rows}, {ours[1]}]"

    def fits(self, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
        if len(theirs) != 2 or theirs[1] != ours[1]:
            return False
        return self.base <= theirs[0] <= self.base + self.added or theirs[0] == self.base + self.surplus

    def read(self, theirs: np.ndarray, ours: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        start, stop, _ = rows.indices(ours[0])
        return vocabulary_rows(self.known(theirs), start, stop, columns, self.base, self.base + self.added)

    def known(self, theirs: np.ndarray) -> np.ndarray:
        """Theirs without the rows that no token has."""
        return theirs[: self.base] if self.surplus and len(theirs) == self.base + self.surplus else theirs

    def write(self, ours: np.ndarray, theirs: np.ndarray | None) -> np.ndarray | None:
        return ours[: self.base + self.added]


@dataclass(frozen=True)
class AddedRows:
    """The rows of added tokens alone, ours [A, D]: laid over the table's rows from `base` on."""

    base: int
    added: int
    surplus: int = 0

    @property
    def _whole(self) -> Vocabulary:
        return Vocabulary(self.base, self.added, self.surplus)

    def wanted(self, ours: tuple[int, ...]) -> str:
        return self._whole.wanted(ours)

    def fits(self, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
        return self._whole.fits(theirs, ours) and ours[0] == self.added

    def read(self, theirs: np.ndarray, ours: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(ours[0])
        known = self._whole.known(theirs)
        return vocabulary_rows(known, self.base + start, self.base + stop, index[1], self.base, self.base + self.added)

    def write(self, ours: np.ndarray, theirs: np.ndarray | None) -> np.ndarray | None:
        """Alone they are no tensor of upstream's: written into the whole matrix, or not at all."""
        return None if theirs is None else np.concatenate([theirs[: self.base], ours])


def vocabulary_rows(theirs: np.ndarray, start: int, stop: int, columns: slice, base: int, size: int) -> np.ndarray:
    """Rows start to stop: theirs as far as it has them, then the mean of its `base` first up to `size`, then zeros."""
    there = theirs[start:stop, columns]
    if stop <= len(theirs):
        return there
    rows = np.zeros((stop - start, there.shape[1]), np.float32)
    rows[: len(there)] = there
    first = max(len(theirs), start)
    if first < min(size, stop):
        rows[first - start : min(size, stop) - start] = mean_row(theirs[:base, columns])
    return rows


def mean_row(rows: np.ndarray) -> np.ndarray:
    """Mean over rows as float32, a few thousand rows at a time (the table of an 8B model takes 2 GB in float32)."""
    total = np.zeros(rows.shape[1], np.float64)
    for start in range(0, len(rows), _MEAN_ROWS):
        total += rows[start : start + _MEAN_ROWS].astype(np.float32).sum(0, dtype=np.float64)
    return (total / len(rows)).astype(np.float32)


@dataclass(frozen=True)
class Part:
    """Ours are the rows `start` to `start + n` of theirs [total, ...], such as q of a fused q, k, v."""

    start: int
    total: int

    def wanted(self, ours: tuple[int, ...]) -> str:
        return str([self.total, *ours[1:]])

    def fits(self, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
        return theirs == (self.total, *ours[1:]) and self.start + ours[0] <= self.total

    def read(self, theirs: np.ndarray, ours: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(ours[0])
        return theirs[(slice(self.start + start, self.start + stop), *index[1:])]

    def write(self, ours: np.ndarray, theirs: np.ndarray | None) -> np.ndarray | None:
        """The rows of the others are theirs to fill: they come before and after this one."""
        if theirs is None:
            theirs = np.zeros((self.total, *ours.shape[1:]), ours.dtype)
        theirs[self.start : self.start + ours.shape[0]] = ours
        return theirs


@dataclass(frozen=True)
class Kernel:
    """Theirs, a convolution over patches [D, C, *patch], is our matrix [D, P * C]: raster order, channels fastest."""

    channels: int
    patch: tuple[int, ...]

    def _shape(self, width: int) -> tuple[int, ...]:
        return (width, self.channels, *self.patch)

    def wanted(self, ours: tuple[int, ...]) -> str:
        return str(list(self._shape(ours[0])))

    def fits(self, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
        return theirs == self._shape(ours[0]) and ours[1] == self.channels * math.prod(self.patch)

    def read(self, theirs: np.ndarray, ours: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        rows = theirs[index[0]]
        return np.moveaxis(rows, 1, -1).reshape(len(rows), -1)[:, index[1]]

    def write(self, ours: np.ndarray, theirs: np.ndarray | None) -> np.ndarray | None:
        return np.moveaxis(ours.reshape(len(ours), *self.patch, self.channels), -1, 1)


@dataclass(frozen=True)
class Leading:
    """Theirs has `count` leading axes of length 1 more than ours."""

    count: int

    def _shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * self.count + ours

    def wanted(self, ours: tuple[int, ...]) -> str:
        return str(list(self._shape(ours)))

    def fits(self, theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
        return theirs == self._shape(ours)

    def read(self, theirs: np.ndarray, ours: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        return theirs[(0,) * self.count][index]

    def write(self, ours: np.ndarray, theirs: np.ndarray | None) -> np.ndarray | None:
        return ours.reshape(self._shape(ours.shape))
