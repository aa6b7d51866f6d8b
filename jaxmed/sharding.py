"""The mesh, and the one table from logical axes to mesh axes. No PartitionSpec is written anywhere else.

The mesh axes are (data, fsdp, context, tensor), Explicit type, entered always; one device is the mesh (1, 1, 1, 1).
Parameters name logical axes right-aligned (a leading stack of layers is unsharded). Specs have one entry per dimension:
a shorter one costs a recompilation after the first step.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmed.config import Experiment, MeshConfig
from jaxmed.errors import UserError
from jaxmed.types import Batch, Order, Padding, PairBatch

AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes it is split over."""

    batch: tuple[str, ...] = ("data", "fsdp")
    length: tuple[str, ...] = ("context",)
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    adapter: tuple[str, ...] = ("tensor", "fsdp")
    """the long axis of LoRA's A and B as they are stored; in this order, gathering over fsdp leaves whole tensor shards"""
    tower: tuple[str, ...] = ("fsdp",)
    """the width of image towers, text encoders and aggregators as it is stored; all of them are gathered where they are used"""

    def spec(self, *axes: str | None) -> PartitionSpec:
        """One entry per dimension; None is an unsharded one."""
        unknown = {a for a in axes if a is not None} - {f.name for f in dataclasses.fields(self)}
        if unknown:
            raise ValueError(f"unknown logical axes {sorted(unknown)}; declare them in Rules")
        entries = [getattr(self, a) if a is not None else () for a in axes]
        used = [mesh_axis for entry in entries for mesh_axis in entry]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {axes} use a mesh axis twice: {used}")
        return PartitionSpec(*(entry or None for entry in entries))

    def summed_once(self, x: jax.Array, axis: str, *axes: str | None) -> jax.Array:
        """x, laid out by `axes`, for several products whose other operands are split along `axis`: their gradients of x are
        added up before they are summed over that axis's shards, not one by one."""
        sizes = jax.sharding.get_abstract_mesh().shape
        over = getattr(self, axis)
        if all(sizes[a] == 1 for a in over):
            return x
        return jax.sharding.reshard(x, self.spec(*axes).update(reduced=set(over)))

    def sharding(self, mesh: Mesh, *axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, self.spec(*axes))

    def param_spec(self, param: nnx.Variable) -> PartitionSpec:
        """The spec of a parameter that names its axes; leading stack dimensions are unsharded."""
        return self.spec(*[None] * (len(param.shape) - len(param.axes)), *param.axes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The Explicit mesh over all devices (or `devices`). Raises UserError where the sizes do not multiply to their number."""
    devices = list(jax.devices() if devices is None else devices)
    rest = config.fsdp * config.context * config.tensor
    data = config.data or len(devices) // rest
    if data * rest != len(devices) or data == 0:
        shape = f"mesh.data {config.data or 'auto'} x fsdp {config.fsdp} x context {config.context} x tensor {config.tensor}"
        raise UserError(f"{shape} does not multiply to the {len(devices)} devices of this job; change the --mesh flags")
    shape = (data, config.fsdp, config.context, config.tensor)
    return Mesh(laid_out(shape, devices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def laid_out(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of `shape`, neighbours on the machine's links along its axes.

    Slices of TPUs, which only the data-centre network joins, lie outermost. A mesh axis takes whole sides of a slice's torus if
    it can, else a part of one.
    """
    # devices of one slice alone may not say which it is
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    outer = across_slices(shape, slices)
    if outer is None:
        raise UserError(
            f"{slices} slices lie along mesh.data, and what it lacks along mesh.fsdp; data {shape[0]} and fsdp {shape[1]} "
            f"cannot hold them. Make --mesh.data a multiple of {slices}"
        )
    inner = tuple(n // m for n, m in zip(shape, outer, strict=True))
    try:
        return _laid_out(inner, outer, devices, split=False)
    except NotImplementedError:
        return _laid_out(inner, outer, devices, split=True)


def _laid_out(inner: tuple[int, ...], outer: tuple[int, ...], devices: Sequence[Any], split: bool) -> np.ndarray:
    if math.prod(outer) == 1:
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=split)
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=split)


def across_slices(shape: tuple[int, ...], slices: int) -> tuple[int, ...] | None:
    """How many slices each mesh axis spans: data all of them, or data some and fsdp the rest; None: neither is possible."""
    data, fsdp, *inner = shape
    if data % slices == 0:
        return (slices, 1, *(1 for _ in inner))
    rest = slices // data
    return (data, rest, *(1 for _ in inner)) if slices % data == 0 and fsdp % rest == 0 else None


def rules_for(experiment: Experiment, mesh_shape: dict[str, int]) -> Rules:
    """The rules for a model on a mesh: kv heads are replicated where `tensor` is a multiple of their number, and a tower's
    parameters where its width does not divide over fsdp."""
    kv_heads, tensor = experiment.model.decoder.kv_heads, mesh_shape["tensor"]
    if experiment.task == "contrastive":
        widths = (experiment.model.tower.width, experiment.contrastive.text.width)
        return Rules(tower=tower_axis(widths, mesh_shape["fsdp"]))
    rules = Rules(tower=tower_axis((experiment.model.tower.width,), mesh_shape["fsdp"]))
    if kv_heads % tensor and tensor % kv_heads == 0:
        return dataclasses.replace(rules, kv_heads=())
    return rules


def mesh_notices(experiment: Experiment, mesh_shape: dict[str, int]) -> list[str]:
    """What a mesh does not split although its axes say so; for the person who chose it."""
    rules, kv_heads = rules_for(experiment, mesh_shape), experiment.model.decoder.kv_heads
    width, notices = experiment.model.tower.width, []
    if rules.kv_heads != rules.heads:
        notices.append(
            f"mesh.tensor is {mesh_shape['tensor']} and the decoder has {kv_heads} kv heads: their projections, keys and "
            "values are replicated over tensor, and each shard reads the one kv head of its query heads"
        )
    if experiment.has_tower and mesh_shape["fsdp"] > 1 and not rules.tower:
        notices.append(f"the tower is {width} wide, which mesh.fsdp = {mesh_shape['fsdp']} does not divide: it is replicated")
    if experiment.task == "contrastive" and mesh_shape["context"] * mesh_shape["tensor"] > 1:
        notices.append("mesh.context and mesh.tensor split nothing of a contrastive model; use mesh.data and mesh.fsdp")
    return notices


def generation_rules(experiment: Experiment, mesh_shape: dict[str, int]) -> Rules:
    """The rules of generation: prompts and caches are split over `context` where that axis has several shards."""
    rules = rules_for(experiment, mesh_shape)
    return rules if mesh_shape["context"] > 1 else whole_rows(rules)


def whole_rows(rules: Rules) -> Rules:
    """The same rules with T unsplit, as for the single token of a decode step."""
    return dataclasses.replace(rules, length=())


def tower_axis(widths: Sequence[int], fsdp: int) -> tuple[str, ...]:
    """`Rules.tower` for towers of these widths: replicated where one does not divide (towers are small beside the decoder)."""
    return () if any(width % fsdp for width in widths) else ("fsdp",)


def check_divisible(experiment: Experiment, mesh_shape: dict[str, int]) -> None:
    """Every dimension that a mesh axis must divide, in one error that lists all offenders."""
    decoder, data = experiment.model.decoder, experiment.data
    fsdp, tensor, context = (mesh_shape[a] for a in ("fsdp", "tensor", "context"))
    rows = mesh_shape["data"] * fsdp
    per_microbatch = data.batch // data.microbatches
    by_rows = ("data.batch / data.microbatches", per_microbatch, "mesh.data x fsdp", rows, per_microbatch % rows == 0)
    kv_ok = decoder.kv_heads % tensor == 0 or tensor % decoder.kv_heads == 0
    checks = [
        ("model.decoder.width", decoder.width, "mesh.fsdp", fsdp, decoder.width % fsdp == 0),
        ("model.decoder.heads", decoder.heads, "mesh.tensor", tensor, decoder.heads % tensor == 0),
        ("model.decoder.kv_heads", decoder.kv_heads, "mesh.tensor", tensor, kv_ok),
        ("model.decoder.mlp", decoder.mlp, "mesh.tensor", tensor, decoder.mlp % tensor == 0),
    ]
    checks = [by_rows] if experiment.task == "contrastive" else [*checks, by_rows]
    if experiment.lora.rank and experiment.task == "tokens":
        whole = fsdp * tensor
        ends = {"width": decoder.width, "mlp": decoder.mlp, "heads x head_dim": decoder.heads * decoder.head_dim}
        ends["kv_heads x head_dim"] = decoder.kv_heads * decoder.head_dim
        checks += [(f"model.decoder.{n} (LoRA)", v, "mesh.fsdp x tensor", whole, v % whole == 0) for n, v in ends.items()]
    if context > 1 and experiment.task == "tokens":
        pieces = 2 * context
        checks += [(f"data.buckets entry {b}", b, "2 x mesh.context", pieces, b % pieces == 0) for b in data.buckets]
    bad = [f"  {name} is {value}, not a multiple of {axis} = {size}" for name, value, axis, size, ok in checks if not ok]
    if bad:
        raise UserError("these sizes do not divide over the mesh; change them or the --mesh flags:\n" + "\n".join(bad))


def state_specs(state: Any, rules: Rules) -> dict[str, Any]:
    """Nested dict of specs for an nnx state whose parameters name their axes."""
    specs = jax.tree.map(rules.param_spec, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(specs)


def to_shardings(specs: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def like(sharding: NamedSharding, mesh: Mesh) -> NamedSharding:
    """The same layout on another description of the mesh."""
    return NamedSharding(mesh, sharding.spec)


def without_axes(sharding: NamedSharding, *axes: int) -> NamedSharding:
    """The sharding of an array from which dimensions are taken away."""
    return NamedSharding(sharding.mesh, PartitionSpec(*(s for i, s in enumerate(sharding.spec) if i not in axes)))


def unsplit_axis(spec: PartitionSpec, axis: int) -> PartitionSpec:
    """`spec` with one dimension whole."""
    entries = list(spec)
    entries[axis] = None
    return PartitionSpec(*entries)


def split_rows(spec: PartitionSpec, ndim: int) -> PartitionSpec:
    """The spec of [B, ...] reshaped to [B / n, n, ...]: rows stay on their devices."""
    tail = [*spec, *[None] * (ndim - len(spec))]
    return PartitionSpec(tail[0], None, *tail[1:])


def join_rows(spec: PartitionSpec, ndim: int) -> PartitionSpec:
    """The spec of [n, B / n, ...] brought back to [B, ...], rows in the order that `split_rows` took them from."""
    return PartitionSpec(*[*spec, *[None] * (ndim - len(spec))][1:])


def replicated(mesh: Mesh, ndim: int = 0) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*[None] * ndim))


def batch_specs(rules: Rules, order: Order = "natural", image_ndim: int = 4, padding: Padding = "either") -> Batch:
    """A Batch of specs; `image_ndim`: axes of `images`, by the kind of the visual input (data.inputs.image_ndim)."""
    along_t, row = rules.spec("batch", "length"), rules.spec("batch", None)
    return Batch(
        tokens=along_t,
        positions=along_t,
        segment_ids=along_t,
        image_index=along_t,
        supervised=row,
        labels=row,
        images=rules.spec("batch", *[None] * (image_ndim - 1)),
        image_token_mask=rules.spec("batch", None, None),
        image_grid=rules.spec("batch", None, None),
        order=order,
        padding=padding,
    )


def pair_specs(rules: Rules) -> PairBatch:
    """A PairBatch of specs: rows are split, nothing else."""
    row = rules.spec("batch", None)
    return PairBatch(rules.spec("batch", *[None] * 4), row, row, rules.spec("batch"))


def balanced_order(length: int, context: int) -> np.ndarray:
    """[length] permutation that evens out causal work: shard i of c holds pieces i and 2c - 1 - i of 2c.

    `x[..., balanced_order(T, c)]` is the balanced array.
    """
    if length % (2 * context):
        raise ValueError(f"length {length} is not a multiple of {2 * context}")
    pieces = np.arange(length).reshape(2 * context, -1)
    shards = [piece for i in range(context) for piece in (pieces[i], pieces[2 * context - 1 - i])]
    return np.concatenate(shards)


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays (or of ShapeDtypeStructs with shardings): the largest over devices."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total
