"""Any model as a folder of our own that needs no other: `jaxmed convert --to orbax`.

The folder is a run's: config.json, tokenizer/, checkpoints/0/ with *every* parameter under `trainable` and a `meta` that says
so (`complete`). Parameters stream from the files onto the devices of a mesh and from there to the disk; each process reads
and writes its slices. Any mesh restores what any mesh wrote.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, reshard

from jaxmed.checkpoint.adapter import text
from jaxmed.checkpoint.export_config import tokenizer_folder
from jaxmed.checkpoint.model_plan import NO_TOKENIZER, ModelPlan
from jaxmed.checkpoint.native_writer import STEP, parameter_rows
from jaxmed.checkpoint.values import Values
from jaxmed.config import Experiment, LoraConfig, MeshConfig, to_dict, to_json
from jaxmed.nn.block import adapter_paths
from jaxmed.nn.linear import Adapter, merged_weight
from jaxmed.sharding import make_mesh, unsplit_axis
from jaxmed.train.init import Leaves, blueprint, flatten, materialise


def plan_native(experiment: Experiment, dtype: np.dtype | None, merge: bool) -> ModelPlan:
    """`dtype` None: each parameter as the source has it. Nothing is read; what does not fit is refused."""
    values = Values(experiment)
    merge = merge and experiment.lora.rank > 0
    tensors = [
        tensor
        for path in values.shapes
        if not (merge and path[-1] in ("lora_a", "lora_b"))
        for tensor in parameter_rows(values, path, dtype, experiment.lora if merge else None)
    ]
    found = {tensor.ours: tensor.dtype for tensor in tensors}
    kept = _own_config(experiment, found.get("decoder/embed/table", np.dtype(np.float32)), merge)
    notes = [] if tokenizer_folder(experiment) else [NO_TOKENIZER]
    fresh = [text(path) for path in values.shapes if not values.stored(path)]
    if fresh:
        notes.append(f"no folder holds {', '.join(fresh[:3])}{', ...' if fresh[3:] else ''}: they have their first values")
    optimizer = {f"{run.run}: optimizer state": "a converted model holds weights alone" for run in values.runs}
    native = ModelNative(experiment, kept, {tensor.ours.partition("[")[0]: tensor.dtype for tensor in tensors})
    ignored = values.ignored | optimizer
    return ModelPlan("orbax", {STEP: tensors}, {}, ignored, notes, native=native, experiment=kept, source=experiment)


def _own_config(experiment: Experiment, table: np.dtype, merge: bool) -> Experiment:
    """The config of a run that needs no folder beside it."""
    half = table.itemsize < 4
    model = dataclasses.replace(
        experiment.model,
        base="",
        adapter="",
        tower_folder="",
        tower_source="checkpoint",
        tokenizer="",
        dtype="bfloat16" if half else "float32",
    )
    lora = LoraConfig(rank=0) if merge or not experiment.lora.rank else experiment.lora
    return dataclasses.replace(experiment, model=model, lora=lora, mesh=MeshConfig())


def mesh_for(experiment: Experiment, asked: MeshConfig) -> Mesh:
    """The mesh asked for; where none was, every parameter split over as many devices as divide it."""
    if asked != MeshConfig() or jax.process_count() > 1:
        return make_mesh(asked)
    decoder = experiment.model.decoder
    ends = [decoder.width]
    if experiment.lora.rank:
        ends += [decoder.mlp, decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim]
    fsdp = math.gcd(len(jax.devices()), *ends)
    return make_mesh(MeshConfig(data=1, fsdp=fsdp), jax.devices()[:fsdp])


@dataclasses.dataclass(frozen=True)
class ModelNative:
    """A whole model on its way into our own form."""

    source: Experiment
    kept: Experiment
    """Of what is written"""
    dtypes: Mapping[str, np.dtype]
    """Path as text -> dtype"""

    @property
    def config(self) -> str:
        return to_json(self.kept)

    @property
    def meta(self) -> dict[str, Any]:
        return {"config": to_dict(self.kept), "encoder": self.kept.visual.encoder}

    def mesh(self, asked: MeshConfig) -> Mesh:
        return mesh_for(self.source, asked)

    def values(self, mesh: Mesh) -> dict[str, jax.Array]:
        return _values(self.source, self.kept.lora.rank > 0, self.dtypes, mesh)


def _values(source: Experiment, apart: bool, dtypes: Mapping[str, np.dtype], mesh: Mesh) -> dict[str, jax.Array]:
    """{path: array} of the whole model; adapters merged unless they stay `apart`."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    data = dataclasses.replace(source.data, batch=rows, microbatches=1, buckets=(2 * mesh.shape["context"],))
    source = dataclasses.replace(source, data=data)  # no batch is at issue
    model = blueprint(source, mesh)
    leaves: Leaves = {}
    for path, leaf in (flatten(model.trainable) | flatten(model.frozen)).items():
        leaves[path] = jax.ShapeDtypeStruct(leaf.shape, dtypes.get(text(path), np.float32), sharding=leaf.sharding)
    if apart or not source.lora.rank:
        return {text(path): value for path, value in materialise(source, leaves, complete=True).items()}
    return {text(path): value for path, value in _merged(source, leaves).items()}


def _merged(source: Experiment, leaves: Leaves) -> Leaves:
    """One weight with adapters after the other, in float32 until it is merged: rounded before, it would be rounded twice."""
    adapter = Adapter(source.lora.rank, source.lora.alpha)
    pairs = {path: pair for path in leaves if (pair := adapter_paths(path, leaves))}
    halves = {half for pair in pairs.values() for half in pair}
    values = materialise(source, {path: x for path, x in leaves.items() if path not in pairs and path not in halves}, False)
    for path, pair in pairs.items():
        wide = {name: leaves[name].update(dtype=np.float32) for name in (path, *pair)}
        found = materialise(source, wide, complete=False)
        merge_adapters(found, adapter)
        values[path] = found[path].astype(leaves[path].dtype).block_until_ready()
    return values


def merge_adapters(values: Leaves, adapter: Adapter) -> None:
    """W + scale * B A in float32, a layer at a time, in place of W."""
    for path in list(values):
        if pair := adapter_paths(path, values):
            weight = values[path]
            values[path] = _merger(weight.sharding, adapter.scale)(weight, *(values[half] for half in pair))
    for path in [path for path in values if path[-1] in ("lora_a", "lora_b")]:
        del values[path]


@functools.lru_cache(maxsize=16)
def _merger(sharding: NamedSharding, scale: float):
    def merge(weights: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = reshard(a, unsplit_axis(sharding.spec, -2)), reshard(b, unsplit_axis(sharding.spec, -1))
        with jax.default_matmul_precision("highest"):
            return jax.lax.map(lambda layer: merged_weight(*layer, scale), (weights, a, b))

    return jax.jit(merge, out_shardings=sharding, donate_argnums=0)
