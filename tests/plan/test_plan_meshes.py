"""Meshes that a config allows, and the errors about those that it does not."""

import dataclasses

import pytest
from small import small

from jaxmed.config import MeshConfig
from jaxmed.errors import UserError
from jaxmed.plan.meshes import check_mesh, legal_meshes, lies, nearest
from jaxmed.plan.topology import parse_topology

EIGHT = parse_topology("cpu:8")


def on(mesh, rows=8):
    return dataclasses.replace(small(rows=rows), mesh=MeshConfig(*mesh))


def test_a_mesh_that_fits_is_filled_in():
    assert check_mesh(on((0, 2, 1, 2)), EIGHT).mesh == MeshConfig(2, 2, 1, 2)


def test_a_mesh_of_another_number_of_devices_names_the_nearest():
    with pytest.raises(UserError, match=r"has 6 devices, cpu:8 has 8") as error:
        check_mesh(on((1, 3, 1, 2)), EIGHT)
    assert "nearest legal mesh of cpu:8: --mesh.data 1 --mesh.fsdp 4 --mesh.context 1 --mesh.tensor 2" in str(error.value)


def test_sizes_that_do_not_divide_are_listed_with_a_mesh_that_does():
    with pytest.raises(UserError, match=r"(?s)decoder.heads is 4, not a multiple of mesh.tensor = 8.*nearest legal mesh"):
        check_mesh(on((1, 1, 1, 8)), EIGHT)
    with pytest.raises(UserError, match=r"(?s)data.batch / data.microbatches is 3.*--change|no mesh|nearest"):
        check_mesh(on((1, 8, 1, 1), rows=3), EIGHT)


def test_legal_meshes_multiply_and_divide():
    found = legal_meshes(on((1, 1, 1, 1)), EIGHT)
    assert all(a * b * c * d == 8 for a, b, c, d in found) and len(found) == len(set(found))
    assert (8, 1, 1, 1) in found and (1, 1, 8, 1) in found and not any(t == 8 for *_, t in found)


def test_nearest_counts_doublings():
    assert nearest((1, 4, 1, 1), [(8, 1, 1, 1), (1, 4, 2, 1), (2, 2, 1, 2)]) == (1, 4, 2, 1)


@pytest.mark.parametrize(
    ("topology", "mesh", "possible"),
    [
        ("v6e:4x4", (1, 8, 2, 1), False),
        ("v6e:4x4", (1, 4, 4, 1), True),
        ("v6e:4x4", (1, 16, 1, 1), True),
        ("v5e:4x4", (1, 8, 2, 1), True),
        ("v5p:2x2x4", (1, 8, 2, 1), True),
        ("v5p:2x2x4", (1, 2, 2, 4), True),
        ("v5p:2x2x1", (1, 4, 1, 1), True),
        ("tpu7x:2x2x1", (1, 4, 1, 2), True),
        ("h100:1x8", (1, 8, 1, 1), True),
    ],
)
def test_a_torus_gives_whole_sides(topology, mesh, possible):
    assert lies(mesh, parse_topology(topology)) == possible


def test_a_mesh_that_a_torus_cannot_take_names_one_that_it_can():
    with pytest.raises(UserError, match=r"(?s)cannot be laid on a torus of 4 x 4.*nearest legal mesh of v6e:4x4"):
        check_mesh(on((1, 8, 2, 1)), parse_topology("v6e:4x4"))
