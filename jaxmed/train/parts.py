"""What a model consists of, part by part: parameters, bytes, and bytes on one device of a mesh. Nothing is read or allocated.

Axis letters: A added tokens, D decoder width, V rows of a vocabulary with padding.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from jaxmed.config import Experiment, MeshConfig
from jaxmed.sharding import AXES, Rules, state_specs, to_shardings, tower_axis
from jaxmed.train.init import abstract_state, blueprint, flatten
from jaxmed.train.optim import Path

_NAMES = {
    ("decoder", "embed"): "embedding",
    ("decoder", "blocks"): "blocks",
    ("decoder", "norm"): "final norm",
    ("decoder", "head"): "head",
}


_ORDER = ("tower", "aggregator", "fusion", "projector", "text encoder", "image projection", "text projection", "temperature")
_ORDER += ("embedding", "added tokens", "blocks", "LoRA", "final norm", "head")
_CONTRASTIVE = {
    "text": "text encoder",
    "vision_projection": "image projection",
    "text_projection": "text projection",
    "logit_scale": "temperature",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters of one part of a model that share dtype and fate."""

    name: str
    fate: Literal["trainable", "frozen"]
    dtype: str
    parameters: int
    """Without the padding of a vocabulary"""
    bytes: int
    """With it, as they lie in memory"""
    device_bytes: int
    """Of one device"""


@dataclasses.dataclass(frozen=True)
class Inventory:
    mesh: dict[str, int]
    parts: list[Part]
    optimizer_bytes: int
    optimizer_device_bytes: int


def take_inventory(experiment: Experiment, mesh: MeshConfig) -> Inventory:
    """Parts in the order of the computation. UserError where sizes do not divide over the mesh."""
    shape = (max(mesh.data, 1), mesh.fsdp, mesh.context, mesh.tensor)
    rows = shape[0] * shape[1]
    data = dataclasses.replace(experiment.data, batch=rows, microbatches=1, buckets=(2 * mesh.context,))  # no batch is at issue
    experiment = dataclasses.replace(experiment, data=data)
    devices = AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    with jax.sharding.use_abstract_mesh(devices):
        plan = blueprint(experiment, devices)
        moments = jax.tree.leaves(abstract_state(plan).opt_state) if plan.trainable else []
    halves = {"trainable": flatten(plan.trainable), "frozen": flatten(plan.frozen)}
    parts = _parts(halves, lambda path, leaf: _count(path, leaf, experiment))
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in moments)
    return Inventory(dict(zip(AXES, shape, strict=True)), parts, whole, sum(map(_on_device, moments)))


def encoder_inventory(build: Callable[[], nnx.Module], widths: Sequence[int], dtype: str, mesh: MeshConfig) -> Inventory:
    """Of a tower alone or of a contrastive model; nothing of it is trained here. `widths`: those that fsdp may split."""
    shape = (max(mesh.data, 1), mesh.fsdp, mesh.context, mesh.tensor)
    rules = Rules(tower=tower_axis(widths, mesh.fsdp))
    devices = AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    with jax.sharding.use_abstract_mesh(devices):
        state = nnx.state(jax.eval_shape(build))
        placed = flatten(to_shardings(state_specs(state, rules), devices))
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype), sharding=placed[path])
        for path, leaf in flatten(nnx.to_pure_dict(state)).items()
    }
    parts = _parts({"frozen": leaves}, lambda path, leaf: math.prod(leaf.shape))
    return Inventory(dict(zip(AXES, shape, strict=True)), parts, 0, 0)


def _parts(halves: Mapping[str, Mapping[Path, Any]], count: Callable[[Path, Any], int]) -> list[Part]:
    """In the order of the computation."""
    groups: dict[tuple[str, str, str], list[tuple[Path, Any]]] = {}
    for fate, leaves in halves.items():
        for path, leaf in leaves.items():
            groups.setdefault((_part(path), fate, np.dtype(leaf.dtype).name), []).append((path, leaf))
    return [
        Part(
            *key,
            sum(count(path, leaf) for path, leaf in members),
            sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf in members),
            sum(_on_device(leaf) for _, leaf in members),
        )
        for key, members in sorted(groups.items(), key=lambda item: _rank(*item[0]))
    ]


def _rank(name: str, fate: str, dtype: str) -> tuple[int, str, str, str]:
    """The image side first, then the language model, whatever else there is after that."""
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER)), name, fate, dtype


def _part(path: Path) -> str:
    if path[-1] in ("lora_a", "lora_b"):
        return "LoRA"
    if path[-1] == "added":
        return "added tokens"
    return _NAMES.get(path[:2], _CONTRASTIVE.get(str(path[0]), str(path[0])))


def _count(path: Path, leaf: Any, experiment: Experiment) -> int:
    """Rows of padding do not count; those of added tokens count once in the embedding, and in an untied head."""
    model = experiment.model
    rows = {"embed": model.decoder.vocab, "head": model.decoder.vocab + len(model.added_tokens)}
    if path[0] == "decoder" and path[-1] in ("table", "weight") and path[1] in rows:
        return rows[path[1]] * leaf.shape[1]
    return math.prod(leaf.shape)


def _on_device(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
