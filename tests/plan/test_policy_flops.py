"""FLOPs of the traced step against the formula of its remat policy; 8B at full size, traced alone."""

import dataclasses

import pytest

from jaxmed._configs import btb3d, vit3d_amos
from jaxmed.config import MeshConfig, replace_field
from jaxmed.plan.analysis import analyse
from jaxmed.plan.topology import parse_topology

CASES = [
    (btb3d, "v5p:2x2x4", (1, 8, 2, 1), 32768, {}),
    (btb3d, "v5p:2x2x4", (1, 8, 2, 1), 32768, {"train.remat": "attention"}),
    (btb3d, "h100:1x8", (1, 8, 1, 1), 32768, {"train.remat": "attention"}),
    (btb3d, "h100:1x8", (1, 4, 1, 2), 32768, {"train.attention": "xla", "train.remat": "none"}),
    (vit3d_amos, "v5p:2x2x2", (1, 8, 1, 1), 1024, {"data.batch": 8}),
]


@pytest.mark.parametrize(("config", "topology", "mesh", "length", "fields"), CASES)
def test_the_program_computes_what_its_policy_needs(config, topology, mesh, length, fields):
    experiment = dataclasses.replace(config.get_config(), mesh=MeshConfig(*mesh))
    for name, value in fields.items():
        experiment = replace_field(experiment, name, value)
    found = analyse(experiment, parse_topology(topology), "train", length)
    assert 0.98 <= found.flops / found.policy_flops <= 1.05
    assert found.policy_flops >= found.model_flops * 0.99
