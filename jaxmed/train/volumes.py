"""Before the first step: every volume of the run prepared and in the cache, where the config has one."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmed.config import Experiment
from jaxmed.data.dataset import Dataset, Sample, sample_draw
from jaxmed.data.pairs import Pair, PairSet
from jaxmed.data.records import where
from jaxmed.data.volume_cache import fill_cache
from jaxmed.distributed import gather_texts, is_first, say, together
from jaxmed.errors import Problem, UserError

Found = TypeVar("Found", Dataset, PairSet)


def fill_volumes(experiment: Experiment, sets: Sequence[Dataset | PairSet]) -> dict[str, str]:
    """Each process prepares its share. -> {path: what is wrong with the volume} of all shares (`on_bad_record` skip; else the
    first of them ends the run)."""
    visual = experiment.visual
    if visual.kind != "volumes" or not visual.prepare.cache:
        return {}
    paths = sorted({path for found in sets for one in found.samples for path in _paths(one)})
    share = paths[jax.process_index() :: jax.process_count()]
    with together():
        filled = fill_cache(share, visual, progress=is_first(), on_bad_record=experiment.data.on_bad_record)
    for text in filled.lines():
        say(text)
    return _of_all(paths, {problem.where: problem.what for problem in filled.problems})


def without(found: Found, bad: dict[str, str], records_path: str) -> Found:
    """The data set without the records of volumes that cannot be prepared; they join its problems."""
    samples, problems = [], list(found.problems)
    for one in found.samples:
        faults = [f"{path}: {bad[path]}" for path in _paths(one) if path in bad]
        if faults:
            problems.append(Problem(where(one.record), "; ".join(faults)))
        else:
            samples.append(one)
    if len(samples) == len(found.samples):
        return found
    if not samples:
        raise UserError(f"{records_path}: no volume can be prepared; the first: {problems[len(found.problems)]}")
    draw = sample_draw([one.record for one in samples], records_path, found.experiment)
    return dataclasses.replace(found, samples=tuple(samples), problems=tuple(problems), draw=draw)


def _paths(one: Sample | Pair) -> tuple[str, ...]:
    return (one.path,) if isinstance(one, Pair) else one.paths


def _of_all(paths: Sequence[str], bad: dict[str, str]) -> dict[str, str]:
    """The faults that any process found, the same on all: the order of the data depends on them."""
    if jax.process_count() == 1:
        return bad
    here = np.array([path in bad for path in paths])
    everywhere = np.asarray(multihost_utils.process_allgather(here)).any(axis=0)
    # The words of very many faults are cut, which volumes they are is not.
    said: dict[str, str] = {}
    for text in gather_texts("".join(json.dumps([path, what]) + "\n" for path, what in sorted(bad.items()))):
        said |= dict(json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))
    unsaid = "cannot be prepared, as another process found"
    return {path: said.get(path, unsaid) for path, is_bad in zip(paths, everywhere, strict=True) if is_bad}
