"""Batches on the devices, by optimizer step: Grain threads build rows ahead, the last step here places them on the mesh.

A process loads the rows whose shards its devices hold, as the sharding's own index map says: hosts that are joined by the
context or tensor axis load the same rows. What is in a batch depends on the plan alone, never on processes or threads.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxmed.data.dataset import Dataset, Sample, scan
from jaxmed.data.inputs import image_ndim
from jaxmed.data.pairs import PairSet
from jaxmed.data.plan import GlobalBatch
from jaxmed.data.rows import Arrays, build_rows, permute_batch
from jaxmed.errors import Problem, UserError
from jaxmed.sharding import Rules, balanced_order, batch_specs, pair_specs, to_shardings
from jaxmed.types import Batch, PairBatch

__all__ = ["Batches", "Dataset", "Sample", "batches", "build_rows", "evaluation_batches", "local_rows", "permute_batch", "scan"]


class Steps(Protocol):
    """A plan: the global batch of each step."""

    def __getitem__(self, step: int) -> GlobalBatch: ...


def local_rows(index_map: Mapping[Any, tuple[slice, ...]], batch: int) -> list[int]:
    """Rows of the global batch that the devices of an index map hold, ascending."""
    return sorted({row for index in index_map.values() for row in range(*index[0].indices(batch))})


def check_buckets(buckets: tuple[int, ...], context: int) -> None:
    """Balanced shards need 2 * context equal pieces of every bucket."""
    bad = [bucket for bucket in buckets if context > 1 and bucket % (2 * context)]
    if bad:
        raise UserError(f"data.buckets {bad} are not multiples of 2 x mesh.context = {2 * context}; change them or the mesh")


class Batches(Iterator[tuple[GlobalBatch, Batch | PairBatch]]):
    """Iterator over (global batch, its arrays on the mesh), a PairBatch for a PairSet. After an item, `data_wait` says how long
    it was waited for."""

    def __init__(
        self,
        dataset: Dataset | PairSet,
        plan: Steps,
        start_step: int,
        mesh: Mesh,
        rules: Rules,
        stop_step: int,
        on_problem: Callable[[Problem], None] | None,
    ):
        data = dataset.experiment.data
        self._dataset, self._plan, self._on_problem = dataset, plan, on_problem
        self._context = mesh.shape["context"]
        if isinstance(dataset, PairSet):
            specs, self._build = pair_specs(rules), dataset.build_rows
        else:
            check_buckets(data.buckets, self._context)
            order = "balanced" if self._context > 1 else "natural"
            specs = batch_specs(rules, order, image_ndim(dataset.experiment.visual), padding="right")
            self._build = self._token_rows
        self._shardings = to_shardings(specs, mesh)
        row_map = rules.sharding(mesh, "batch").addressable_devices_indices_map((data.batch,))
        self._rows = local_rows(row_map, data.batch)
        self.data_wait = 0.0
        """Seconds that the last item was waited for"""
        self.step = start_step
        """The step of the next item"""
        options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=data.prefetch)
        steps = grain.MapDataset.range(start_step, max(stop_step, start_step))
        self._loader = iter(steps.map(self._load).to_iter_dataset(options))

    def _load(self, step: int) -> tuple[GlobalBatch, Arrays, list[Problem]]:
        """Runs in Grain's threads."""
        batch = self._plan[int(step)]
        return batch, *self._build(batch, self._rows)

    def _token_rows(self, batch: GlobalBatch, rows: list[int]) -> tuple[Arrays, list[Problem]]:
        arrays, problems = build_rows(self._dataset, batch, rows)
        if self._context > 1:
            arrays = permute_batch(arrays, balanced_order(batch.bucket, self._context))
        return arrays, problems

    def __next__(self) -> tuple[GlobalBatch, Batch | PairBatch]:
        start = time.perf_counter()
        batch, arrays, problems = next(self._loader)
        self.data_wait = time.perf_counter() - start
        self.step += 1
        for problem in problems:
            if self._on_problem:
                self._on_problem(problem)
        return batch, self._place(arrays, len(batch.rows))

    def _place(self, arrays: Arrays, rows: int) -> Batch | PairBatch:
        """Local rows -> global arrays; each device takes its slice."""
        fields = {name: to_global(x, self._rows, rows, getattr(self._shardings, name)) for name, x in arrays.items()}
        return dataclasses.replace(self._shardings, **fields)

    def close(self) -> None:
        """Stops the threads."""
        self._loader.close()


def to_global(array: np.ndarray, rows: list[int], count: int, sharding: NamedSharding) -> jax.Array:
    """The global array of `count` rows, of which this process holds `rows` (ascending) in `array`."""
    place = {row: at for at, row in enumerate(rows)}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        wanted = range(*index[0].indices(count))
        local = slice(place[wanted[0]], place[wanted[-1]] + 1)
        return array[(local, *index[1:])]

    return jax.make_array_from_callback((count, *array.shape[1:]), sharding, shard)


def batches(
    dataset: Dataset | PairSet,
    plan: Steps,
    start_step: int,
    mesh: Mesh,
    rules: Rules,
    stop_step: int = sys.maxsize,
    on_problem: Callable[[Problem], None] | None = None,
) -> Batches:
    """Batches from `start_step` to before `stop_step`. `on_problem` hears of samples left out of the batches handed over."""
    return Batches(dataset, plan, start_step, mesh, rules, stop_step, on_problem)


def evaluation_batches(
    dataset: Dataset | PairSet, mesh: Mesh, rules: Rules, on_problem: Callable[[Problem], None] | None = None
) -> Batches:
    """Every sample of a held-out set once, in the order of its file within each bucket; empty rows fill the last batch."""
    plan = dataset.evaluation_plan()
    return Batches(dataset, plan, 0, mesh, rules, len(plan), on_problem)
