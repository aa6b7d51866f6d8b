"""Many prompts through the engine in batches of few fixed shapes; each answer depends on its own prompt alone.

A task's keys come from (seed, study, turn) and the engine folds in the position, so neither the batch that a prompt lands in
nor an interruption changes what is drawn. Tasks of one study may share a prefix (jaxmed.generate.sharing): a family is a row.

Axis letters: B rows, R branches a row, C continuations of a prompt, M tokens of one.
"""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import jax
import numpy as np

from jaxmed.config import Experiment
from jaxmed.generate.engine import Engine
from jaxmed.generate.prompts import Bucket, Prompt, bucket_of, left_padded, power_of_two
from jaxmed.generate.sampling import Sampling
from jaxmed.generate.sharing import ALONE, SHORTEST_REST, Split, prefix_of, rest_of, split_of


@dataclasses.dataclass(frozen=True)
class Task:
    """One answer to be written, or given ones to be judged."""

    name: Hashable
    prompt: Prompt
    study: str
    """Identity of the study, for its draws"""
    turn: int
    continuations: tuple[np.ndarray, ...] = ()
    """int32 ids of answers whose likelihood is asked for; without any, an answer is generated"""


@dataclasses.dataclass(frozen=True)
class Answered:
    task: Task
    ids: np.ndarray
    """Of the answer, end token included; empty where likelihoods were asked for"""
    likelihoods: tuple[np.ndarray, ...] = ()
    """Of each continuation the log-likelihoods of its tokens, float32"""


@dataclasses.dataclass(frozen=True)
class Family:
    """Tasks of one study, as one row takes them."""

    tasks: tuple[Task, ...]
    split: Split


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """The compiled shape that holds a family."""

    bucket: Bucket
    """Of the prompt, or of the prefix that prompts share"""
    branches: int
    """R"""
    rest: int
    """U; 0: nothing is shared"""
    continuations: int = 0
    """C; 0: answers are generated"""
    tokens: int = 0
    """M"""


def families(tasks: Sequence[Task], split: Split) -> list[Family]:
    """Tasks of one study as rows; tasks of either kind (see `Task.continuations`) stay among themselves."""
    rows = []
    for judged in (False, True):
        some = [task for task in tasks if bool(task.continuations) == judged]
        rows += [Family(tuple(some[at : at + split.branches]), split) for at in range(0, len(some), split.branches)]
    return rows


class Scheduler:
    """Collects tasks by shape and hands full batches to the engine; partial ones when nothing else is left."""

    def __init__(
        self, engine: Engine, experiment: Experiment, rows: int, sampling: Sampling, max_new_tokens: int, least: int = 1
    ):
        """rows: prompts decoded together, a multiple of `least`, the rows that the mesh needs."""
        self.engine, self.experiment, self.rows, self.least = engine, experiment, rows, least
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.waiting: dict[Shape, list[Family]] = defaultdict(list)

    def add(self, task: Task) -> None:
        """A task by itself."""
        self._queue(Family((task,), ALONE))

    def add_study(self, tasks: Sequence[Task], every: Sequence[Task] = ()) -> None:
        """Tasks about the same images; `every`: with those that are done already, so that they change nothing."""
        every = every or tasks
        ahead = max(self._ahead(task) for task in every)
        split = split_of([task.prompt for task in every], self.experiment, self.rows, ahead)
        for family in families(tasks, split):
            self._queue(family)

    def _ahead(self, task: Task) -> int:
        """Tokens that may follow its prompt."""
        longest = max((len(ids) for ids in task.continuations), default=0)
        return power_of_two(longest, 1) if longest else self.max_new_tokens

    def _queue(self, family: Family) -> None:
        self.waiting[self._shape(family)].append(family)

    def _shape(self, family: Family) -> Shape:
        prompt, split = family.tasks[0].prompt, family.split
        bucket = bucket_of(prompt, self.experiment)
        if split.length:
            bucket = bucket_of(prefix_of(prompt, split), self.experiment, SHORTEST_REST)
        if not family.tasks[0].continuations:
            return Shape(bucket, split.branches, split.rest)
        count = max(len(task.continuations) for task in family.tasks)
        tokens = max(self._ahead(task) for task in family.tasks)
        return Shape(bucket, split.branches, split.rest, count, tokens)

    def rows_of(self, shape: Shape) -> int:
        """B: as many rows as hold `rows` prompts."""
        return max(self.rows // shape.branches // self.least * self.least, self.least)

    def full(self) -> Shape | None:
        """A shape with enough families for a batch."""
        return next((s for s, waiting in self.waiting.items() if len(waiting) >= self.rows_of(s)), None)

    def largest(self) -> Shape | None:
        """The shape with most families."""
        return max(self.waiting, key=lambda s: len(self.waiting[s]), default=None)

    def run(self, shape: Shape) -> list[list[Answered]]:
        """One batch of a shape -> its families' tasks, answered."""
        rows = self.rows_of(shape)
        taken = self.waiting[shape][:rows]
        del self.waiting[shape][:rows]
        if not self.waiting[shape]:
            del self.waiting[shape]
        rest, prefixes = None, [family.tasks[0].prompt for family in taken]
        if shape.rest:
            ahead = shape.tokens or self.max_new_tokens
            members = [([task.prompt for task in family.tasks], family.split) for family in taken]
            rest = rest_of(members, (rows, shape.branches, shape.rest), self.experiment, ahead)
            prefixes = [prefix_of(p, family.split) for p, family in zip(prefixes, taken, strict=True)]
        batch = left_padded(prefixes, rows, shape.bucket, self.experiment)
        counts = self.engine.counts
        counts.prompts(batch, rest)
        placed = self.engine.placed(batch)
        if shape.continuations:
            return self._judged(taken, placed, rest, shape)
        names: list[tuple[str, int] | None] = [None] * (rows * shape.branches)
        for r, family in enumerate(taken):
            for b, task in enumerate(family.tasks):
                names[r * shape.branches + b] = (task.study, task.turn)
        keys = draw_keys(self.sampling.seed, names, len(names)).reshape(rows, shape.branches)
        tokens, lengths = self.engine.branched(placed, rest, keys, self.sampling, self.max_new_tokens)
        counts.generated += int(lengths.sum())
        return [
            [Answered(task, tokens[r, b, : lengths[r, b]]) for b, task in enumerate(family.tasks)]
            for r, family in enumerate(taken)
        ]

    def _judged(self, taken: Sequence[Family], batch: object, rest: object, shape: Shape) -> list[list[Answered]]:
        ids = np.full((self.rows_of(shape), shape.branches, shape.continuations, shape.tokens), -1, np.int32)
        for r, family in enumerate(taken):
            for b, task in enumerate(family.tasks):
                for c, continuation in enumerate(task.continuations):
                    ids[r, b, c, : len(continuation)] = continuation
        scores = self.engine.score(batch, rest, ids)
        self.engine.counts.scored += int((ids >= 0).sum())

        def of(task: Task, found: np.ndarray) -> Answered:
            each = tuple(row[: len(ids)] for row, ids in zip(found, task.continuations, strict=False))
            return Answered(task, np.zeros(0, np.int32), each)

        return [[of(task, scores[r, b]) for b, task in enumerate(family.tasks)] for r, family in enumerate(taken)]


def run_all(scheduler: Scheduler, studies: Sequence[Sequence[Task]]) -> Iterator[Answered]:
    """All tasks, those about the same images together, in the order in which batches finish."""
    for tasks in studies:
        scheduler.add_study(tasks)
    while (shape := scheduler.largest()) is not None:
        for family in scheduler.run(shape):
            yield from family


def draw_keys(seed: int, names: Sequence[tuple[str, int] | None], count: int) -> jax.Array:
    """[count] typed keys, one a (study, turn); None and the rest belong to places without a prompt."""
    words = np.zeros((count, 2), np.uint32)
    for place, name in enumerate(names):
        if name is not None:
            digest = hashlib.sha256(f"{seed}\x00{name[0]}\x00{name[1]}".encode()).digest()
            words[place] = np.frombuffer(digest[:8], "<u4")
    return jax.random.wrap_key_data(words, impl="threefry2x32")
