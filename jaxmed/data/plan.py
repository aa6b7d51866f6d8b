"""The order of the data: an epoch is a pure function of (seed, epoch), whatever the number of processes.

An epoch is a list of global batches, each of one bucket, with `data.batch` rows; a row holds the indices of the samples in it
(one, several where rows are packed, none in the empty rows that fill a bucket's last batch). Every sample comes once an epoch,
unless a draw (jaxmed.data.mixture) says how often which samples come.
"""

import dataclasses
import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jaxmed.config import DataConfig, TrainConfig
from jaxmed.data.pack import pack
from jaxmed.errors import UserError

EPOCHS_KEPT = 3


@dataclass(frozen=True)
class SampleSize:
    """What a sample takes of a row, and what length grouping goes by."""

    length: int
    """Tokens after splicing"""
    supervised: int
    """Tokens with a label"""
    images: int
    words: int
    """Whitespace words over all turns"""


@dataclass(frozen=True)
class GlobalBatch:
    bucket: int
    """Row length"""
    rows: tuple[tuple[int, ...], ...]
    """Samples of each row; () is an empty row"""
    # Two plans with the same rows are the same order of the data.
    epoch: int = field(default=-1, compare=False)
    """What is drawn for a sample is drawn anew in each epoch; -1: nothing is drawn (evaluation)"""
    repeats: tuple[int, ...] = ()
    """For each of `samples`, how often it came earlier in the epoch; (): each comes once"""

    @property
    def samples(self) -> tuple[int, ...]:
        """All samples in row order: sample k has segment id k + 1."""
        return tuple(sample for row in self.rows for sample in row)

    @property
    def offsets(self) -> tuple[int, ...]:
        """For each row, the number of samples in the rows before it."""
        return tuple(itertools.accumulate((len(row) for row in self.rows[:-1]), initial=0))

    def key(self, place: int) -> tuple[int, int, int]:
        """(epoch, sample, repeat) of the sample at `place` of `samples`: with the seed, all that may decide what is drawn for
        it (its prompt, its augmentation)."""
        return self.epoch, self.samples[place], self.repeats[place] if self.repeats else 0


class Draw(Protocol):
    """Which samples an epoch has, where that is not every sample once."""

    def epoch(self, seed: int, epoch: int, shuffle: bool) -> list[int]:
        """Indices, with repeats; a pure function."""
        ...


def random_order(count: int, *key: int) -> np.ndarray:
    """A permutation drawn from `key`. The raw stream of a bit generator never changes; numpy's own shuffles may, by version."""
    draws = np.random.Philox(np.random.SeedSequence(list(key))).random_raw(count)
    return np.argsort(draws, kind="stable")


def capacity(data: DataConfig, images: int, bucket: int) -> tuple[int, int, int]:
    """(length, supervised, images) that a row of the bucket holds."""
    return bucket, min(data.supervised, bucket), images


def bucket_for(length: int, buckets: Sequence[int]) -> int:
    """The shortest bucket that holds `length` tokens, 0 if none does."""
    return next((bucket for bucket in buckets if bucket >= length), 0)


def epoch_plan(
    sizes: Sequence[SampleSize], data: DataConfig, images: int, seed: int, epoch: int, drawn: Sequence[int] | None = None
) -> list[GlobalBatch]:
    """The batches of one epoch. `images`: images a row holds at most. `drawn`: the epoch's samples; None: each once."""
    if drawn is None:
        return [dataclasses.replace(batch, epoch=epoch) for batch in _arranged(sizes, data, images, seed, epoch)]
    seen: Counter[int] = Counter()
    repeats = []
    for sample in drawn:
        repeats.append(seen[sample])
        seen[sample] += 1
    batches = []
    for batch in _arranged([sizes[sample] for sample in drawn], data, images, seed, epoch):
        rows = tuple(tuple(drawn[place] for place in row) for row in batch.rows)
        batches.append(GlobalBatch(batch.bucket, rows, epoch, tuple(repeats[place] for place in batch.samples)))
    return batches


def _arranged(sizes: Sequence[SampleSize], data: DataConfig, images: int, seed: int, epoch: int) -> list[GlobalBatch]:
    """Batches in which each of `sizes` comes once."""
    count = len(sizes)
    if data.group_by_modality_length:
        return _grouped(sizes, data, seed, epoch)
    order = random_order(count, seed, epoch) if data.shuffle else np.arange(count)
    needs = np.array([(s.length, s.supervised, s.images) for s in sizes], np.int64).reshape(count, 3)
    lengths = np.array(data.buckets)
    if count and needs[:, 0].max() > lengths[-1]:
        raise ValueError(f"a sample has {needs[:, 0].max()} tokens, the largest bucket is {lengths[-1]}")
    if data.pack:
        rows = pack(order, needs, [capacity(data, images, bucket) for bucket in data.buckets], data.batch)
    else:
        bucket_of = np.searchsorted(lengths, needs[order, 0])
        rows = [[[sample] for sample in order[bucket_of == b].tolist()] for b in range(len(lengths))]
    batches = []
    for number, (bucket, bucket_rows) in enumerate(zip(data.buckets, rows, strict=True)):
        if data.pack and data.shuffle:
            # Packing sorts by length within a window; batches shall not be sorted.
            bucket_rows = [bucket_rows[i] for i in random_order(len(bucket_rows), seed, epoch, 1, number)]
        batches += _cut(bucket_rows, bucket, data.batch)
    if data.shuffle:
        return [batches[i] for i in random_order(len(batches), seed, epoch, 2)]
    place = {int(sample): at for at, sample in enumerate(order)}
    return sorted(batches, key=lambda batch: min(place[sample] for sample in batch.samples))


def _cut(rows: Sequence[Sequence[int]], bucket: int, batch: int) -> list[GlobalBatch]:
    """Batches of the rows in their order, the last one filled with empty rows."""
    batches = []
    for start in range(0, len(rows), batch):
        piece = [tuple(row) for row in rows[start : start + batch]]
        batches.append(GlobalBatch(bucket, tuple(piece + [()] * (batch - len(piece)))))
    return batches


def _grouped(sizes: Sequence[SampleSize], data: DataConfig, seed: int, epoch: int) -> list[GlobalBatch]:
    """LLaVA's sampler, cut into optimizer batches.

    Upstream deals a megabatch of world_size * accumulation * b samples into world_size * accumulation chunks of b, and one
    optimizer step takes one megabatch. Here a row is a chunk of its own (upstream trains with b = 1): megabatch and chunks
    are both data.batch. A batch takes the bucket that its longest sample needs.
    """
    if data.pack:
        raise UserError("data.pack and data.group_by_modality_length cannot be combined; switch one of them off")
    lengths = [s.words if s.images else -s.words for s in sizes]
    draws = iter(range(3))
    order = llava_order(lengths, 1, data.batch, lambda count: random_order(count, seed, epoch, 3, next(draws)).tolist())
    batches = []
    for start in range(0, len(order), data.batch):
        piece = order[start : start + data.batch]
        bucket = bucket_for(max(sizes[i].length for i in piece), data.buckets)
        if not bucket:
            raise ValueError(f"a sample of batch {start // data.batch} is longer than the largest bucket {data.buckets[-1]}")
        batches += _cut([[i] for i in piece], bucket, data.batch)
    return batches


def llava_order(lengths: Sequence[int], batch: int, chunks: int, permutation: Callable[[int], Sequence[int]]) -> list[int]:
    """LLaVA's `group_by_modality_length`, exactly.

    lengths: words of each sample, negative where it has no image; batch: samples of a chunk; chunks: of a megabatch.
    permutation(n) is asked once if all samples are of one modality, else for the samples with images, for those without, and
    for the megabatches of both.
    """
    if not all(lengths):
        raise UserError(f"sample {list(lengths).index(0)} has no words; data.group_by_modality_length cannot place it")
    if min(lengths) > 0 or max(lengths) < 0:
        return _length_grouped(lengths, batch, chunks, permutation)
    megabatches, last = [], []
    for sign in (1, -1):
        own = [i for i, length in enumerate(lengths) if length * sign > 0]
        grouped = _length_grouped([lengths[i] * sign for i in own], batch, chunks, permutation)
        cut = _megabatches([own[i] for i in grouped], batch * chunks)
        megabatches += cut[:-1]
        last += cut[-1]
    return [i for m in permutation(len(megabatches)) for i in megabatches[m]] + sorted(last)


def _megabatches(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def _length_grouped(lengths: Sequence[int], batch: int, chunks: int, permutation: Callable[[int], Sequence[int]]) -> list[int]:
    """Shuffled, cut into megabatches, each sorted by falling length and dealt. Text alone keeps its minus signs here."""
    order = []
    for megabatch in _megabatches(permutation(len(lengths)), batch * chunks):
        falling = sorted(megabatch, key=lambda i: -lengths[i])
        order += [i for chunk in _deal(falling, lengths, chunks) for i in chunk]
    return order


def _deal(samples: list[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Each sample goes to the chunk with the smallest sum that is not full; a ragged megabatch is dealt in turn."""
    if len(samples) % chunks:
        return [samples[chunk::chunks] for chunk in range(chunks)]
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    sums: list[float] = [0] * chunks
    for sample in samples:
        chunk = sums.index(min(sums))
        dealt[chunk].append(sample)
        sums[chunk] = math.inf if len(dealt[chunk]) == len(samples) // chunks else sums[chunk] + lengths[sample]
    return dealt


class Plan:
    """Batches by optimizer step over all epochs: plan[step]. Epochs of packed or drawn rows may differ a little in their
    steps."""

    def __init__(self, sizes: Sequence[SampleSize], data: DataConfig, images: int, seed: int, draw: Draw | None = None):
        if not sizes:
            raise UserError(f"{data.records or 'data.records'}: no sample to train on")
        self._sizes, self._data, self._images, self._seed, self._draw = tuple(sizes), data, images, seed, draw
        self._vary = data.pack or draw is not None
        self._epochs: dict[int, list[GlobalBatch]] = {}
        self._starts = [0]
        # Loader threads ask for steps at the same time.
        self._lock = threading.RLock()

    def epoch(self, epoch: int) -> list[GlobalBatch]:
        with self._lock:
            if epoch not in self._epochs:
                drawn = self._draw.epoch(self._seed, epoch, self._data.shuffle) if self._draw else None
                batches = epoch_plan(self._sizes, self._data, self._images, self._seed, epoch, drawn)
                if len(self._epochs) == EPOCHS_KEPT:
                    self._epochs.pop(min(self._epochs))
                self._epochs[epoch] = batches
            return self._epochs[epoch]

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Every epoch has the same number unless rows are packed or drawn."""
        return len(self.epoch(epoch if self._vary else 0))

    def total_steps(self, train: TrainConfig) -> int:
        """`train.steps`, else ceil(epochs x steps of the first epoch), as Hugging Face's trainer counts."""
        return train.steps or math.ceil(train.epochs * self.steps_per_epoch())

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of a step"""
        with self._lock:
            if not self._vary:
                return divmod(step, self.steps_per_epoch())
            while self._starts[-1] <= step:
                self._starts.append(self._starts[-1] + self.steps_per_epoch(len(self._starts) - 1))
            epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
            return epoch, step - self._starts[epoch]

    def __getitem__(self, step: int) -> GlobalBatch:
        if step < 0:
            raise IndexError(f"step {step} is negative")
        epoch, batch = self.locate(step)
        return self.epoch(epoch)[batch]

    def efficiency(self, epoch: int = 0) -> float:
        """Tokens used over tokens compiled in an epoch."""
        return efficiency(self.epoch(epoch), self._sizes)


def evaluation_plan(sizes: Sequence[SampleSize], data: DataConfig, images: int) -> list[GlobalBatch]:
    """Every sample once, in the order of the file within its bucket."""
    return _arranged(sizes, dataclasses.replace(data, shuffle=False, group_by_modality_length=False), images, 0, 0)


def efficiency(batches: Sequence[GlobalBatch], sizes: Sequence[SampleSize]) -> float:
    used = sum(sizes[sample].length for batch in batches for sample in batch.samples)
    return used / max(sum(batch.bucket * len(batch.rows) for batch in batches), 1)
