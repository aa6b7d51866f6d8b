"""`jaxmed plan --sweep`: every legal mesh, remat policy and number of microbatches, by the memory model and the roofline alone.

Nothing is compiled on the way (a second each, not minutes); whoever calls compiles the best one to confirm it. A frozen base
that is replicated is among them: it is the mesh whose axes but `data` are 1, or `data` times `context`.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxmed.config import Experiment, replace_field
from jaxmed.errors import Notice, UserError
from jaxmed.plan.analysis import Analysis, analyse
from jaxmed.plan.meshes import Shape, flags, legal_meshes, with_mesh
from jaxmed.plan.topology import Topology
from jaxmed.plan.verdict import COMFORT

POLICIES = ("full", "attention", "offload", "none")
PIECES = {"tokens": (1, 2, 4, 8), "contrastive": (1, 2, 4, 8, 16, 32)}
"""Microbatches, by task: pairs are told from each other in batches of hundreds"""


@dataclass(frozen=True)
class Candidate:
    mesh: Shape
    remat: str
    microbatches: int
    bytes: int
    """Of one device"""
    seconds: float
    """Expected, of one step"""
    mfu: float
    bound: str
    fits: bool
    """Within the comfortable share of a chip's memory"""
    frontier: bool = False
    """Whether no other is both faster and smaller"""

    @property
    def flags(self) -> str:
        return f"{flags(self.mesh)} --train.remat {self.remat} --data.microbatches {self.microbatches}"


def variants(experiment: Experiment, topology: Topology, step: str) -> Iterator[Experiment]:
    """Every configuration that is tried."""
    if step != "train":
        for shape in legal_meshes(experiment, topology):
            if shape[2] == 1:  # the cache is not split along its length
                yield with_mesh(experiment, shape)
        return
    batch = experiment.data.batch
    for pieces in (n for n in PIECES[experiment.task] if batch % n == 0):
        cut = replace_field(experiment, "data.microbatches", pieces)
        for shape in legal_meshes(cut, topology):
            for policy in (p for p in POLICIES if p != "offload" or topology.chip.platform != "cpu"):
                yield replace_field(with_mesh(cut, shape), "train.remat", policy)


def sweep(
    experiment: Experiment, topology: Topology, step: str, length: int, progress: Callable[[int, int], None] | None = None
) -> list[Candidate]:
    """Fastest first; those that fit before those that don't."""
    tried = list(variants(experiment, topology, step))
    candidates = []
    for number, variant in enumerate(tried):
        if progress:
            progress(number, len(tried))
        try:
            with warnings.catch_warnings(
                action="ignore", category=Notice
            ):  # which kernel each variant has; the chosen one says it again
                candidates.append(_candidate(variant, topology, analyse(variant, topology, step, length)))
        except UserError:  # what only tracing finds out
            continue
    if not candidates:
        raise UserError(
            f"no mesh of {topology.count} devices divides this config; change --data.batch (now {experiment.data.batch})"
        )
    marked = [dataclasses.replace(c, frontier=_on_frontier(c, candidates)) for c in candidates]
    return sorted(marked, key=lambda c: (not c.fits, c.seconds if c.fits else c.bytes, c.bytes))


def _candidate(experiment: Experiment, topology: Topology, found: Analysis) -> Candidate:
    mesh = experiment.mesh
    return Candidate(
        mesh=(mesh.data, mesh.fsdp, mesh.context, mesh.tensor),
        remat=experiment.train.remat,
        microbatches=experiment.data.microbatches,
        bytes=found.memory.total,
        seconds=found.roofline.expected,
        mfu=found.mfu(topology),
        bound=found.roofline.bound,
        fits=found.memory.total <= COMFORT * topology.chip.hbm,
    )


def _on_frontier(c: Candidate, others: list[Candidate]) -> bool:
    return not any(
        o.seconds <= c.seconds and o.bytes <= c.bytes and (o.seconds, o.bytes) != (c.seconds, c.bytes) for o in others
    )


def chosen(experiment: Experiment, candidate: Candidate) -> Experiment:
    changed = with_mesh(experiment, candidate.mesh)
    changed = replace_field(changed, "train.remat", candidate.remat)
    return replace_field(changed, "data.microbatches", candidate.microbatches)
