"""Meshes that a config allows, and the errors about those that it does not."""

import dataclasses

import pytest
from small import small

from jaxmed.config import MeshConfig
from jaxmed.errors import UserError
from jaxmed.plan.meshes import check_mesh, legal_meshes, nearest
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


def test_slices_lie_along_data_and_then_along_fsdp():
    four = parse_topology("4xv5e:2x2")
    assert check_mesh(on((4, 2, 1, 2), rows=8), four).mesh == MeshConfig(4, 2, 1, 2)
    assert all(data % 4 == 0 or fsdp % (4 // data) == 0 for data, fsdp, *_ in legal_meshes(on((1, 1, 1, 1), rows=16), four))
    with pytest.raises(
        UserError, match=r"(?s)4 slices lie along data.*nearest legal mesh of 4xv5e:2x2: --mesh.data 1 --mesh.fsdp 4"
    ):
        check_mesh(on((1, 2, 4, 2), rows=8), four)
