"""FLOPs of the traced step against the formula of its remat policy; 8B at full size, traced alone."""

import dataclasses

import pytest

from jaxmed._configs import btb3d, m3d_clip, vit3d_amos
from jaxmed.config import MeshConfig, replace_field
from jaxmed.plan.analysis import analyse
from jaxmed.plan.topology import parse_topology

CASES = [
    (btb3d, "v5p:2x2x4", (1, 8, 2, 1), 32768, {}),
    (btb3d, "v5p:2x2x4", (1, 8, 2, 1), 32768, {"train.remat": "attention"}),
    (btb3d, "h100:1x8", (1, 8, 1, 1), 32768, {"train.remat": "attention"}),
    (btb3d, "h100:1x8", (1, 4, 1, 2), 32768, {"train.attention": "xla", "train.remat": "none"}),
    (vit3d_amos, "v5p:2x2x2", (1, 8, 1, 1), 1024, {"data.batch": 8}),
    (m3d_clip, "v5p:2x2x2", (1, 8, 1, 1), 512, {"data.microbatches": 8}),
    (m3d_clip, "h100:1x8", (2, 4, 1, 1), 512, {"train.attention": "xla", "train.remat": "attention"}),
    (m3d_clip, "cpu:8", (8, 1, 1, 1), 512, {"train.remat": "none", "contrastive.dropout": 0.0}),
]


@pytest.mark.parametrize(("config", "topology", "mesh", "length", "fields"), CASES)
def test_the_program_computes_what_its_policy_needs(config, topology, mesh, length, fields):
    experiment = dataclasses.replace(config.get_config(), mesh=MeshConfig(*mesh))
    for name, value in fields.items():
        experiment = replace_field(experiment, name, value)
    found = analyse(experiment, parse_topology(topology), "train", length)
    near = (0.999, 1.001) if config is m3d_clip else (0.98, 1.05)
    assert near[0] <= found.flops / found.policy_flops <= near[1]
    assert found.policy_flops >= found.model_flops * 0.99
