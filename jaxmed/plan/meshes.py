"""Which meshes a number of devices allows for a config, and the one nearest to what was asked for. Nothing is traced."""

import dataclasses
import math
from collections.abc import Iterator

from jaxmed.config import Experiment, MeshConfig
from jaxmed.errors import UserError
from jaxmed.plan.topology import Topology
from jaxmed.sharding import AXES, across_slices, check_divisible

Shape = tuple[int, int, int, int]


def shape_of(mesh: MeshConfig, count: int) -> Shape:
    """The mesh's sizes with data filled in; what does not multiply to `count` is left as it is."""
    rest = mesh.fsdp * mesh.context * mesh.tensor
    return (mesh.data or max(count // rest, 1), mesh.fsdp, mesh.context, mesh.tensor)


def with_mesh(experiment: Experiment, shape: Shape) -> Experiment:
    return dataclasses.replace(experiment, mesh=MeshConfig(*shape))


def offence(experiment: Experiment, shape: Shape) -> str:
    """Why the config's sizes do not divide over a mesh; "" where they do."""
    try:
        check_divisible(experiment, dict(zip(AXES, shape, strict=True)))
    except UserError as error:
        return str(error)
    return ""


def legal_meshes(experiment: Experiment, topology: Topology) -> list[Shape]:
    """All meshes of the topology's devices over which the config divides and along which its slices can lie; of a contrastive
    model those that split it, along data and fsdp alone."""
    shapes = (shape for shape in _shapes(topology.count) if across_slices(shape, topology.slices))
    if experiment.task == "contrastive":
        shapes = (shape for shape in shapes if shape[2] * shape[3] == 1)
    return [shape for shape in shapes if not offence(experiment, shape)]


def _shapes(count: int) -> Iterator[Shape]:
    sizes = [n for n in range(1, count + 1) if count % n == 0]
    for data in sizes:
        for fsdp in (n for n in sizes if count // data % n == 0):
            for context in (n for n in sizes if count // data // fsdp % n == 0):
                yield data, fsdp, context, count // data // fsdp // context


def nearest(shape: Shape, legal: list[Shape]) -> Shape:
    """The legal mesh that changes the fewest doublings of axes; of equals the one with more fsdp."""
    return min(legal, key=lambda s: (sum(abs(math.log2(a / b)) for a, b in zip(s, shape, strict=True)), -s[1]))


def flags(shape: Shape) -> str:
    return " ".join(f"--mesh.{name} {size}" for name, size in zip(AXES, shape, strict=True))


def check_mesh(experiment: Experiment, topology: Topology) -> Experiment:
    """The experiment with every mesh axis filled in. UserError that names the nearest legal mesh."""
    count = topology.count
    shape = shape_of(experiment.mesh, count)
    product = math.prod(shape)
    problem = ""
    if product != count:
        sizes = " x ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        problem = f"the mesh {sizes} has {product} devices, {topology.name} has {count}"
    problem = problem or offence(experiment, shape)
    if not problem and not across_slices(shape, topology.slices):
        problem = (
            f"{topology.slices} slices lie along data, and what it lacks along fsdp: the mesh {flags(shape)} cannot hold them"
        )
    if not problem:
        return with_mesh(experiment, shape)
    legal = legal_meshes(experiment, topology)
    if not legal:
        data = experiment.data
        rows = f"data.batch {data.batch} over data.microbatches {data.microbatches}"
        raise UserError(f"{problem}\nno mesh of {count} devices divides this config ({rows}); change one of the two")
    raise UserError(f"{problem}\nthe nearest legal mesh of {topology.name}: {flags(nearest(shape, legal))}")
