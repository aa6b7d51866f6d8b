"""The real train step of a shipped config, traced on a mesh of devices that are not there, and a walk through what it computes.

Axis letters: B rows, T text.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from jaxmed.config import Experiment, MeshConfig
from jaxmed.sharding import AXES, batch_specs
from jaxmed.train.init import abstract_state, blueprint
from jaxmed.train.optim import make_optimizer
from jaxmed.train.step import TokenCrossEntropy, make_step
from jaxmed.types import Batch

COLLECTIVES = {
    "psum",
    "psum_invariant",
    "all_gather",
    "all_gather_invariant",
    "all_to_all",
    "ppermute",
    "reduce_scatter",
    "pmax",
    "pmin",
}
Shape = tuple[int, int, int, int]


def abstract_mesh(shape: Shape) -> AbstractMesh:
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def abstract_batch(experiment: Experiment, mesh: Mesh | AbstractMesh, rules: Any, length: int) -> Batch:
    """Shapes and shardings of a batch of one bucket, from the config alone."""
    data, visual = experiment.data, experiment.visual
    order = "balanced" if mesh.shape["context"] > 1 else "natural"
    along_t, by_label = ((data.batch, length), jnp.int32), ((data.batch, data.supervised), jnp.int32)
    images = (data.batch, visual.images)
    described = dict.fromkeys(("tokens", "positions", "segment_ids", "image_index"), along_t) | {
        "supervised": by_label,
        "labels": by_label,
        "images": ((*images, visual.tokens, visual.features), jnp.float32),
        "image_token_mask": ((*images, visual.tokens), jnp.bool),
        "image_grid": ((*images, 3), jnp.int32),
    }
    specs = batch_specs(rules, order)
    leaves = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, getattr(specs, name)))
        for name, (shape, dtype) in described.items()
    }
    return Batch(**leaves, order=order)


def trace_step(experiment: Experiment, mesh: Mesh | AbstractMesh, length: int) -> Any:
    """What `jax.jit(step).trace` gives; the mesh must be entered."""
    plan = blueprint(experiment, mesh)
    batch = abstract_batch(experiment, mesh, plan.rules, length)
    objective = TokenCrossEntropy(plan.graphdef, plan.rules, experiment)
    step = make_step(objective, experiment, make_optimizer(experiment.optim, 1000, plan.trainable))
    return step.trace(abstract_state(plan), plan.frozen, batch)


def on_mesh(experiment: Experiment, shape: Shape, **train: Any) -> Experiment:
    """With rows for every data shard, and other fields of `train`."""
    rows = max(experiment.data.batch, shape[0] * shape[1])
    return dataclasses.replace(
        experiment,
        mesh=MeshConfig(*shape),
        data=dataclasses.replace(experiment.data, batch=rows),
        train=dataclasses.replace(experiment.train, **train),
    )


@dataclasses.dataclass(frozen=True)
class Equation:
    """One equation of a jaxpr, wherever it stands."""

    name: str
    shapes: list[tuple[int, ...]]
    """of its outputs; inside shard_map a shard's"""
    times: int
    """how often it runs: the product of the lengths of the scans around it"""
    shard: bool
    """whether it stands inside shard_map"""
    flops: float
    """of one run of a dot_general"""
    moves: bool
    """whether it changes where its operand lies: collectives, and a reshard that is no mere statement"""


def equations(jaxpr: Any, times: int = 1, shard: bool = False) -> Iterator[Equation]:
    """All equations, those of inner jaxprs (scan, shard_map, checkpoint, custom_vjp, jit, cond) included."""
    for equation in jaxpr.eqns:
        name, shapes = equation.primitive.name, [getattr(v.aval, "shape", ()) for v in equation.outvars]
        flops = 0.0
        if name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            flops = 2.0 * math.prod(shapes[0]) * math.prod(equation.invars[0].aval.shape[i] for i in contract)
        moves = name in COLLECTIVES
        if name == "reshard":
            before, after = equation.invars[0].aval.sharding, equation.outvars[0].aval.sharding
            # a gather with an out_sharding leaves the explicit axes for a moment: there the compiler decides
            explicit = all(x.mesh.are_all_axes_explicit for x in (before, after))
            moves = explicit and before.spec != after.spec
        yield Equation(name, shapes, times, shard, flops, moves)
        length = equation.params["length"] if name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from equations(getattr(inner, "jaxpr", inner), times * length, shard or name == "shard_map")


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")
