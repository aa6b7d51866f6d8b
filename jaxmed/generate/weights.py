"""The weights of a model for generation: adapters merged, layers split where the device wants it so.

Frozen weights stream from the base folder straight into separate per-layer arrays (on TPU: into stacked ones); only what was
trained passes through a stacked form. Merging is W + alpha / rank * B A in float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, reshard

from jaxmed.checkpoint.adapter import held_by_runs, text
from jaxmed.checkpoint.load import read_params
from jaxmed.checkpoint.manager import in_parts
from jaxmed.checkpoint.sources import weight_sources
from jaxmed.config import Experiment, LoraConfig
from jaxmed.models.vlm import Vlm
from jaxmed.nn.block import adapter_paths
from jaxmed.nn.linear import Adapter, merged_weight
from jaxmed.sharding import Rules, state_specs, to_shardings, unsplit_axis, without_axes
from jaxmed.train.init import Leaves, blueprint, flatten, materialise, unflatten
from jaxmed.train.optim import Path

BLOCKS = ("decoder", "blocks")


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model that is ready to generate."""

    graphdef: nnx.GraphDef
    params: Any
    """Nested dict of arrays in model.dtype; in a split model `decoder/blocks` has a dict a layer"""
    experiment: Experiment
    """Without LoRA: the adapters are merged"""


def splits_layers(platform: str) -> bool:
    """Whether layers are separate arrays on a platform (see jaxmed.models.decoder)."""
    return platform != "tpu"


def load_weights(experiment: Experiment, mesh: Mesh, rules: Rules, split: bool) -> Weights:
    """Everything from `model.base` and `model.adapter`. The mesh must be entered; `rules` has no length axis."""
    merged = dataclasses.replace(experiment, lora=LoraConfig(rank=0))
    graphdef, state = nnx.split(jax.eval_shape(lambda: Vlm(merged, jax.random.key(0), split=split)))
    dtype = jnp.dtype(experiment.model.dtype)
    shardings = flatten(to_shardings(state_specs(state, rules), mesh))
    shapes = flatten(nnx.to_pure_dict(state))
    wanted = {path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=shardings[path]) for path, leaf in shapes.items()}

    plan = blueprint(experiment, mesh)
    parts = _stacked_parts(experiment, flatten(plan.trainable), flatten(plan.frozen), split)
    missing = {path: leaf for path, leaf in wanted.items() if path not in parts}
    frozen = _frozen(experiment, missing, plan.frozen, split) if missing else {}
    merge = _merger(Adapter(experiment.lora.rank, experiment.lora.alpha), dtype)
    params = {}
    for path, leaf in wanted.items():
        weight = parts[path] if path in parts else frozen.pop(path)
        adapter = adapter_paths(path, parts)
        params[path] = merge(weight, *(parts[p] for p in adapter), leaf.sharding) if adapter else weight.astype(dtype)
    return Weights(graphdef, unflatten(params), merged)


def _stacked_parts(experiment: Experiment, trainable: Leaves, frozen: Leaves, split: bool) -> Leaves:
    """What was trained, all adapters, and whatever else a run holds; these are stored stacked, and split a few at a time."""
    held = held_by_runs(experiment)
    kept = {path: leaf for path, leaf in frozen.items() if path[-1] in ("lora_a", "lora_b") or text(path) in held}
    parts: Leaves = {}
    leaves = trainable | kept
    drawn = {path: leaf for path, leaf in leaves.items() if text(path) not in held}
    for some in [drawn, *in_parts({path: leaf for path, leaf in leaves.items() if path not in drawn})]:
        values = materialise(experiment, some, complete=False) if some else {}
        parts |= unstacked(values) if split else values
    return parts


def _frozen(experiment: Experiment, missing: Leaves, stacked: Any, split: bool) -> Leaves:
    """The parameters that were not trained: from the base folder, else freshly initialised as training had them."""
    sources = weight_sources(experiment)
    if not sources.folders:
        fresh = materialise(experiment, flatten(stacked), complete=False)
        return unstacked(fresh) if split else fresh
    return flatten(read_params(sources.rows, sources.folders, unflatten(missing), True, sources.surplus))


def unstacked(leaves: Leaves) -> Leaves:
    """Parameters of stacked blocks -> one a layer; the others as they are."""
    result: Leaves = {}
    for path, leaf in leaves.items():
        if path[:2] != BLOCKS:
            result[path] = leaf
            continue
        one = without_axes(leaf.sharding, 0)
        for layer in range(leaf.shape[0]):
            result[layer_path(path, layer)] = reshard(leaf[layer], one)
    return result


def layer_path(path: Path, layer: int) -> Path:
    return (*BLOCKS, layer, *path[2:])


def _merger(adapter: Adapter, dtype: jnp.dtype):
    """-> (weight, lora_a, lora_b, sharding) -> the merged weight in `dtype`"""

    def merge(weight: jax.Array, a: jax.Array, b: jax.Array, sharding: NamedSharding) -> jax.Array:
        def join(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            a, b = reshard(a, unsplit_axis(sharding.spec, -2)), reshard(b, unsplit_axis(sharding.spec, -1))
            return merged_weight(weight, a, b, adapter.scale).astype(dtype)

        return jax.jit(join, out_shardings=sharding)(weight, a, b)

    return merge
