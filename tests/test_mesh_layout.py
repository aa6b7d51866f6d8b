"""How devices are laid out as a mesh: slices outermost, and every shape on every torus. Devices are stubs with coordinates."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from jaxmed.config import MeshConfig
from jaxmed.errors import UserError
from jaxmed.plan.roofline import dcn_share
from jaxmed.plan.topology import parse_topology
from jaxmed.sharding import AXES, across_slices, laid_out, make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    id: int
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int
    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"
    core_on_chip: int = 0


def chips(sides, slices=1):
    places = [tuple(reversed(p)) for p in itertools.product(*(range(n) for n in reversed(sides)))]
    return [Chip(100 * s + i, place, s, s * 10 + i // 4) for s in range(slices) for i, place in enumerate(places)]


def slice_of(mesh):
    return np.vectorize(lambda d: d.slice_index)(mesh)


@pytest.mark.parametrize("shape", [(2, 4, 1, 2), (4, 2, 2, 1), (2, 1, 1, 8), (8, 1, 2, 1)])
def test_slices_are_the_outer_part_of_data(shape):
    where = slice_of(laid_out(shape, chips((4, 2, 1), slices=2)))
    half = shape[0] // 2
    assert (where[:half] == where.flat[0]).all() and (where[half:] == where.flat[-1]).all()
    assert where.flat[0] != where.flat[-1]


def test_what_data_lacks_lies_along_fsdp():
    where = slice_of(laid_out((2, 4, 2, 1), chips((2, 2, 1), slices=4)))
    for row in where:
        assert len(set(row[:2].flat)) == len(set(row[2:].flat)) == 1 and row.flat[0] != row.flat[-1]
    assert len(set(where[:, 0, 0, 0]) | set(where[:, 2, 0, 0])) == 4


def test_too_many_slices_are_refused_with_what_to_do():
    assert across_slices((1, 2, 4, 1), 4) is None
    with pytest.raises(UserError, match=r"4 slices.*data 1 and fsdp 2.*multiple of 4"):
        laid_out((1, 2, 4, 1), chips((2, 1, 1), slices=4))


@pytest.mark.parametrize("sides", [(4, 4, 1), (2, 4, 1), (2, 2, 4)])
def test_every_shape_can_be_laid_on_a_torus(sides):
    devices = chips(sides)
    powers = [2**n for n in range(5)]
    for shape in (s for s in itertools.product(powers, repeat=4) if math.prod(s) == len(devices)):
        assert sorted(d.id for d in laid_out(shape, devices).flat) == [d.id for d in devices], shape


def test_devices_of_one_slice_need_not_say_so():
    class Silent:
        def __init__(self, chip):
            self.id, self.coords, self.core_on_chip = chip.id, chip.coords, chip.core_on_chip
            self.platform, self.device_kind, self.process_index = chip.platform, chip.device_kind, chip.process_index

    assert laid_out((2, 2, 1, 2), [Silent(c) for c in chips((2, 4, 1))]).shape == (2, 2, 1, 2)


def test_axes_take_whole_sides_where_they_can():
    """Each of four fsdp groups of a 4 x 4 torus is one of its lines, so its ring has no crossing."""
    for group in laid_out((1, 4, 4, 1), chips((4, 4, 1)))[0].transpose(1, 0, 2).reshape(4, 4):
        assert len({d.coords[0] for d in group}) == 1 or len({d.coords[1] for d in group}) == 1


def test_a_real_mesh_has_explicit_axes():
    mesh = make_mesh(MeshConfig(0, 2, 1, 2))
    assert mesh.axis_names == AXES and mesh.devices.shape == (2, 2, 1, 2)
    assert all("Explicit" in str(kind) for kind in mesh.axis_types)


@pytest.mark.parametrize(
    ("topology", "mesh", "axes", "share"),
    [
        ("2xv5p:2x2x2", (2, 8, 1, 1), ("data",), 1.0),
        ("2xv5p:2x2x2", (4, 4, 1, 1), ("data",), 1 / 3),
        ("2xv5p:2x2x2", (2, 8, 1, 1), ("fsdp",), 0.0),
        ("2xv5p:2x2x2", (1, 16, 1, 1), ("fsdp",), 1 / 15),
        ("2xv5p:2x2x2", (2, 4, 2, 1), ("data", "fsdp"), 1 / 7),
        ("h100:4x8", (1, 32, 1, 1), ("fsdp",), 3 / 31),
        ("h100:4x8", (4, 8, 1, 1), ("data",), 1.0),
    ],
)
def test_what_leaves_a_slice_or_a_node(topology, mesh, axes, share):
    assert dcn_share(parse_topology(topology), dict(zip(AXES, mesh, strict=True)), axes) == pytest.approx(share)
