"""Memory of one device by class, from the traced program alone (see jaxmed.plan.liveness for the rules).

frozen             weights that are not trained, as they are stored
trainable          trained parameters, float32
optimizer          their moments
batch              the step's inputs
cache              keys and values (generation)
activations        what the forward pass keeps for the backward pass, by the remat policy
gathered weights   whole copies of split weights, one layer's at a time, and casts of weights
logits             scores over the vocabulary, of a chunk of positions; of pairs, of all with all
gradients          of the trainables
working set        everything else that lives at the worst moment: one layer's values, attention's running sums
compiler           what a compiler adds by itself, as a share of the sum: a cap, not a remainder
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxmed.config import Experiment
from jaxmed.models.decoder import padded_vocab
from jaxmed.plan.jaxprs import equations, local_shape, nbytes, on_host, size_of
from jaxmed.plan.liveness import Machine, Value
from jaxmed.plan.programs import Program

CLASSES = (
    "frozen",
    "trainable",
    "optimizer",
    "batch",
    "cache",
    "activations",
    "gathered weights",
    "logits",
    "gradients",
    "working set",
    "compiler",
)
COMPILER_SHARE = {"tpu": 0.01, "cuda": 0.03, "cpu": 0.05}
"""Of all else: alignment, padding of tiles, what packing leaves free, and on several GPUs gathers that begin before they are
needed. A lone device has none of the last, and nothing is added there."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the worst moment."""

    classes: dict[str, int]
    largest: list[tuple[int, str, str]]
    """(bytes, class, what) of the largest buffers"""
    host: int = 0
    """Bytes of the host's memory for what one device keeps there (remat `offload`)"""

    @property
    def total(self) -> int:
        return sum(self.classes.values())

    @property
    def worst(self) -> str:
        """The largest class."""
        return max(self.classes, key=lambda name: self.classes[name])


def estimate(program: Program, experiment: Experiment, platform: str) -> Memory:
    jaxpr = program.traced.jaxpr.jaxpr
    vocab = padded_vocab(experiment.model.decoder.vocab + len(experiment.model.added_tokens))
    trained = {v.aval.shape for v, c in zip(jaxpr.invars, program.classes, strict=True) if c == "trainable"}
    depths, around = stacks(experiment), int("trainable" in program.classes and experiment.data.microbatches > 1)
    pairs = (experiment.data.batch, experiment.data.batch) if experiment.task == "contrastive" else None
    generates = "trainable" not in program.classes
    cached = {s for v in jaxpr.outvars if generates and len(v.aval.shape) > 3 for s in (v.aval.shape, local_shape(v.aval))}

    def label(eqn: Any, out: Any, machine: Machine) -> str:
        shape = out.aval.shape
        if shape == pairs or (len(shape) > 1 and (shape[-1] == vocab or (shape[0] == vocab and len(shape) == 2))):
            return "logits"
        if shape in cached:
            return "cache"
        if eqn.primitive.name == "scan" and machine.loops == around and shape[:1] in depths and shape not in trained:
            return "activations"
        if shape in trained or (machine.loops and any((*depth, *shape) in trained for depth in depths)):
            return "gradients"
        return "working set"

    mesh = experiment.mesh
    alone = mesh.data * mesh.fsdp * mesh.context * mesh.tensor == 1
    several = platform == "cuda" and not alone
    matrices = _matrices(program, jaxpr, depths) if several else frozenset()
    machine = Machine(platform != "cpu", 2.0 if platform == "cuda" else 1.0, label, several, matrices)
    arguments = []
    for v, kind, donated, name in zip(jaxpr.invars, program.classes, program.donated, program.names, strict=True):
        buffer = machine.make(nbytes(v.aval), kind, f"{v.aval.str_short(short_dtypes=True)} {name}")
        buffer.readers += 1 if donated else 2  # the caller keeps what is not donated
        arguments.append(Value((buffer,), kind in ("frozen", "trainable")))
    machine.check()
    machine.run(jaxpr, arguments)
    classes = {name: machine.peak.classes.get(name, 0) for name in CLASSES}
    classes["compiler"] = 0 if alone else round(COMPILER_SHARE[platform] * sum(classes.values()))
    return Memory(classes, machine.peak.largest, kept_on_host(jaxpr))


def stacks(experiment: Experiment) -> set[tuple[int]]:
    """Leading axes of what the loops over layers stack up."""
    tower = experiment.model.tower.blocks
    if experiment.task == "contrastive":
        return {(tower,), (experiment.contrastive.text.layers,)}
    trained = experiment.has_tower and experiment.train.train_tower
    return {(experiment.model.decoder.layers,)} | ({(tower,)} if trained else set())


def _matrices(program: Program, jaxpr: Any, depths: set[tuple[int]]) -> frozenset[tuple]:
    """Shapes of a layer's trained weights, adapters aside."""
    named = zip(jaxpr.invars, program.classes, program.names, strict=True)
    trained = (v.aval.shape for v, kind, name in named if kind == "trainable" and name.endswith("weight"))
    return frozenset(shape[1:] for shape in trained if len(shape) == 3 and shape[:1] in depths)


def kept_on_host(jaxpr: Any) -> int:
    """Bytes of what the loop over layers stacks up in the host's memory."""
    stacked = (sum(size_of(v.aval) for v in e.eqn.outvars if on_host(v.aval)) for e in equations(jaxpr) if e.name == "scan")
    return max(stacked, default=0)


def measured(stats: Mapping[str, int]) -> int:
    """Bytes of one device by a compiler's own account: arguments, results that are no argument's memory, temporaries."""
    return stats["argument"] + stats["output"] - stats["alias"] + stats["temp"]


def shard(shape: tuple[int, ...], itemsize: int) -> int:
    return math.prod(shape) * itemsize
