"""From a config to a model on a mesh: structure, shapes, shardings, and the values to start from.

Outside modules parameters are nested dicts. They are split once, by path, into a trainable half (float32, saved) and a frozen
half (`model.dtype`, never saved). Values come, the later over the earlier, from initialisation under one jit (the same on any
mesh), from the base folder, from `model.adapter`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxmed.checkpoint.adapter import held_by_runs, overlay_runs, text
from jaxmed.checkpoint.encoder_sources import read_encoders
from jaxmed.checkpoint.load import read_params
from jaxmed.checkpoint.sources import weight_sources
from jaxmed.config import Experiment
from jaxmed.models.contrastive import Contrastive
from jaxmed.models.vlm import Vlm
from jaxmed.sharding import Rules, check_divisible, like, replicated, rules_for, state_specs, to_shardings
from jaxmed.train.optim import Path, make_optimizer
from jaxmed.train.step import is_trainable
from jaxmed.types import TrainState

Leaves = dict[Path, Any]
EMBEDDINGS = ("decoder", "embed")


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model that has no values yet."""

    experiment: Experiment
    mesh: Mesh
    rules: Rules
    graphdef: nnx.GraphDef
    trainable: Any
    """Nested dict of jax.ShapeDtypeStruct with shardings, float32"""
    frozen: Any
    """The same in `model.dtype`"""


def blueprint(experiment: Experiment, mesh: Mesh) -> Blueprint:
    """Structure, shapes, dtypes and shardings; no memory is taken. The mesh must be entered."""
    check_divisible(experiment, dict(mesh.shape))
    rules = rules_for(experiment, dict(mesh.shape))
    graphdef, state = nnx.split(jax.eval_shape(lambda: _model(experiment)))
    shardings = to_shardings(state_specs(state, rules), mesh)
    trains = is_trainable(experiment)
    frozen_dtype = jnp.dtype(experiment.model.dtype)

    def describe(path: Path, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if trains(path) else frozen_dtype, sharding=sharding)

    placed = flatten(shardings)
    leaves = {path: describe(path, leaf, placed[path]) for path, leaf in flatten(nnx.to_pure_dict(state)).items()}
    trainable = {path: leaf for path, leaf in leaves.items() if trains(path)}
    frozen = {path: leaf for path, leaf in leaves.items() if not trains(path)}
    return Blueprint(experiment, mesh, rules, graphdef, unflatten(trainable), unflatten(frozen))


def start(plan: Blueprint) -> tuple[Any, Any]:
    """-> trainable, frozen: the values of a run that has no checkpoint yet."""
    trainable = set(flatten(plan.trainable))
    values = materialise(plan.experiment, flatten(plan.trainable) | flatten(plan.frozen), complete=True)
    halves = ({p: x for p, x in values.items() if (p in trainable) == wanted} for wanted in (True, False))
    trained, frozen = (unflatten(half) for half in halves)
    return trained, frozen


def embeddings_of_base(plan: Blueprint) -> Leaves:
    """The trained token embeddings as they were before the run in `model.adapter`."""
    model = dataclasses.replace(plan.experiment.model, adapter="", tower_source="random")  # no tower is asked for
    leaves = {path: leaf for path, leaf in flatten(plan.trainable).items() if path[:2] == EMBEDDINGS}
    return materialise(dataclasses.replace(plan.experiment, model=model), leaves, complete=False)


def frozen_half(plan: Blueprint) -> Any:
    """The frozen half alone, as `start` gave it: what a checkpoint leaves out."""
    return unflatten(materialise(plan.experiment, flatten(plan.frozen), complete=False))


def materialise(experiment: Experiment, leaves: Leaves, complete: bool) -> Leaves:
    """Arrays for a model's parameters, or for some of them (`complete` False)."""
    held = held_by_runs(experiment)
    in_runs = {path: leaf for path, leaf in leaves.items() if text(path) in held}
    read = _from_folders(experiment, {path: leaf for path, leaf in leaves.items() if path not in in_runs})
    fresh = initialised(experiment, {path: leaf for path, leaf in leaves.items() if path not in read and path not in in_runs})
    values = read | fresh | in_runs
    return overlay_runs(experiment, {path: values[path] for path in leaves}, complete)


def _from_folders(experiment: Experiment, leaves: Leaves) -> Leaves:
    """Those of `leaves` that folders hold."""
    if experiment.task == "contrastive":
        return read_encoders(experiment, leaves)
    sources = weight_sources(experiment)
    wanted = {path: leaf for path, leaf in leaves.items() if sources.covers(path)}
    if not sources.folders:
        return {}
    return flatten(read_params(sources.rows, sources.folders, unflatten(wanted), True, sources.surplus))


def initialised(experiment: Experiment, leaves: Leaves) -> Leaves:
    """Fresh values, under one jit: each device makes its own shards, and what is not asked for is never made."""
    if not leaves:
        return {}

    def make() -> list[jax.Array]:
        values = flatten(nnx.to_pure_dict(nnx.split(_model(experiment))[1]))
        return [values[path].astype(leaf.dtype) for path, leaf in leaves.items()]

    arrays = jax.jit(make, out_shardings=[leaf.sharding for leaf in leaves.values()])()
    return dict(zip(leaves, arrays, strict=True))


def _model(experiment: Experiment) -> nnx.Module:
    key, contrast = jax.random.key(experiment.train.seed), experiment.contrastive
    if experiment.task == "contrastive":
        return Contrastive(experiment.model.tower, contrast.text, contrast.features, key)
    return Vlm(experiment, key, split=False)


def abstract_state(plan: Blueprint) -> TrainState:
    """Shapes and shardings of the train state. The optimizer's moments lie as their parameters do."""

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = replicated(plan.mesh, len(leaf.shape))
        if leaf.sharding is not None:
            sharding = like(leaf.sharding, plan.mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = jax.tree.map(place, jax.eval_shape(_optimizer_init(plan), plan.trainable))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(plan.mesh))
    return TrainState(step, plan.trainable, opt_state)


def first_state(plan: Blueprint, trainable: Any) -> TrainState:
    """The train state at step 0."""
    abstract = abstract_state(plan)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
    opt_state = jax.jit(_optimizer_init(plan), out_shardings=shardings)(trainable)
    step = jax.jit(lambda: jnp.int32(0), out_shardings=abstract.step.sharding)()
    return TrainState(step, trainable, opt_state)


def _optimizer_init(plan: Blueprint) -> Callable[[Any], Any]:
    """The number of steps shapes the schedule, never the state."""
    return make_optimizer(plan.experiment.optim, 1, plan.trainable).init


def flatten(tree: Mapping[Any, Any], above: Path = ()) -> Leaves:
    """Nested dict -> {path: leaf}"""
    leaves: Leaves = {}
    for name, value in tree.items():
        path = (*above, name)
        leaves |= flatten(value, path) if isinstance(value, dict) else {path: value}
    return leaves


def unflatten(leaves: Leaves) -> dict[Any, Any]:
    """The inverse of `flatten`."""
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        place = tree
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = leaf
    return tree
