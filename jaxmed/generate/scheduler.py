"""Many prompts through the engine in batches of one fixed shape; each result depends on its own prompt alone.

A task's keys come from (seed, study, turn) and the engine folds in the position, so neither the batch that a prompt lands in
nor an interruption changes what is drawn.
"""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import jax
import numpy as np

from jaxmed.config import Experiment
from jaxmed.generate.engine import Engine
from jaxmed.generate.prompts import Bucket, Prompt, bucket_of, left_padded
from jaxmed.generate.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Task:
    """One answer to be written."""

    name: Hashable
    prompt: Prompt
    study: str
    """Identity of the study, for its draws"""
    turn: int


class Scheduler:
    """Collects tasks by bucket and hands full batches to the engine; partial ones when nothing else is left."""

    def __init__(self, engine: Engine, experiment: Experiment, rows: int, sampling: Sampling, max_new_tokens: int):
        self.engine, self.experiment, self.rows = engine, experiment, rows
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.waiting: dict[Bucket, list[Task]] = defaultdict(list)

    def add(self, task: Task) -> None:
        self.waiting[bucket_of(task.prompt, self.experiment)].append(task)

    def full(self) -> Bucket | None:
        """A bucket with enough tasks for a batch."""
        return next((b for b, tasks in self.waiting.items() if len(tasks) >= self.rows), None)

    def largest(self) -> Bucket | None:
        """The bucket with most tasks."""
        return max(self.waiting, key=lambda b: len(self.waiting[b]), default=None)

    def run(self, bucket: Bucket) -> list[tuple[Task, np.ndarray]]:
        """One batch of a bucket -> its tasks with the ids of their answers, end token included."""
        tasks = self.waiting[bucket][: self.rows]
        del self.waiting[bucket][: self.rows]
        if not self.waiting[bucket]:
            del self.waiting[bucket]
        batch = left_padded([task.prompt for task in tasks], self.rows, bucket, self.experiment)
        keys = draw_keys(self.sampling.seed, [(task.study, task.turn) for task in tasks], self.rows)
        tokens, lengths = self.engine(self.engine.placed(batch), keys, self.sampling, self.max_new_tokens)
        return [(task, row[:length]) for task, row, length in zip(tasks, tokens, lengths, strict=False)]


def run_all(scheduler: Scheduler, tasks: Sequence[Task]) -> Iterator[tuple[Task, np.ndarray]]:
    """All tasks of a list, in the order in which batches finish."""
    for task in tasks:
        scheduler.add(task)
    while (bucket := scheduler.largest()) is not None:
        yield from scheduler.run(bucket)


def draw_keys(seed: int, names: Sequence[tuple[str, int]], rows: int) -> jax.Array:
    """[rows] typed keys, one a (study, turn); the rest belong to empty rows."""
    words = np.zeros((rows, 2), np.uint32)
    for row, (study, turn) in enumerate(names):
        digest = hashlib.sha256(f"{seed}\x00{study}\x00{turn}".encode()).digest()
        words[row] = np.frombuffer(digest[:8], "<u4")
    return jax.random.wrap_key_data(words, impl="threefry2x32")
