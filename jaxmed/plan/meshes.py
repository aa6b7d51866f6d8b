"""Which meshes a number of devices allows for a config, and the one nearest to what was asked for. Nothing is traced."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from jaxmed.config import Experiment, MeshConfig
from jaxmed.errors import UserError
from jaxmed.plan.topology import Topology
from jaxmed.sharding import AXES, check_divisible

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
    """All meshes of the topology's devices over which the config divides and which can be laid on its torus."""
    return [shape for shape in _shapes(topology.count) if lies(shape, topology) and not offence(experiment, shape)]


def lies(shape: Shape, topology: Topology) -> bool:
    """Whether `jax.make_mesh` can lay a mesh on a torus: each mesh axis takes whole sides of it (v5e's sides may be split)."""
    chip = topology.chip
    if chip.platform != "tpu" or chip.family == "v5e":
        return True
    sides = [n for n in (*topology.sides, chip.devices) if n > 1]
    return _covers([n for n in shape if n > 1], sides)


def _covers(axes: list[int], sides: list[int]) -> bool:
    """Whether the sides can be dealt out so that each axis gets sides that multiply to it."""
    if not axes:
        return True
    places = range(len(sides))
    for chosen in (c for size in range(1, len(sides) + 1) for c in itertools.combinations(places, size)):
        left = [sides[i] for i in places if i not in chosen]
        if math.prod(sides[i] for i in chosen) == axes[0] and _covers(axes[1:], left):
            return True
    return False


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
    if not problem and not lies(shape, topology):
        sides = " x ".join(map(str, topology.sides))
        problem = f"the mesh {flags(shape)} cannot be laid on a torus of {sides}: each axis takes whole sides of it"
    if not problem:
        return with_mesh(experiment, shape)
    legal = legal_meshes(experiment, topology)
    if not legal:
        data = experiment.data
        rows = f"data.batch {data.batch} over data.microbatches {data.microbatches}"
        raise UserError(f"{problem}\nno mesh of {count} devices divides this config ({rows}); change --data.batch")
    raise UserError(f"{problem}\nthe nearest legal mesh of {topology.name}: {flags(nearest(shape, legal))}")
