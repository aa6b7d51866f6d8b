"""Full-size contracts: how many parameters the published shapes have. Nothing is allocated."""

import math

import jax
import pytest
from flax import nnx

from jaxmed._configs import btb3d, btb3d_8x8x8, btb3d_align
from jaxmed.models.vlm import Vlm
from jaxmed.train.init import flatten
from jaxmed.train.step import is_trainable


def parameters(build) -> dict:
    return {path: math.prod(x.shape) for path, x in flatten(nnx.to_pure_dict(nnx.state(jax.eval_shape(build)))).items()}


@pytest.mark.parametrize(
    ("config", "lora", "projector"), [(btb3d, 335_544_320, 16_859_136), (btb3d_8x8x8, 167_772_160, 17_080_320)]
)
def test_trainable_halves_of_btb3d(config, lora: int, projector: int) -> None:
    experiment = config.get_config()
    sizes = parameters(lambda: Vlm(experiment, jax.random.key(0), split=False))
    trains = is_trainable(experiment)
    trained = {path: n for path, n in sizes.items() if trains(path)}
    assert sum(n for path, n in trained.items() if path[-1] in ("lora_a", "lora_b")) == lora
    assert sum(n for path, n in trained.items() if path[0] == "projector") == projector
    added = 5 * 4096
    assert sum(trained.values()) == lora + projector + added
    assert sizes[("decoder", "embed", "table")] == 128512 * 4096, "128,261 rows, padded to a multiple of 256"


def test_alignment_stage_trains_the_projector_alone() -> None:
    experiment = btb3d_align.get_config()
    sizes = parameters(lambda: Vlm(experiment, jax.random.key(0), split=False))
    trains = is_trainable(experiment)
    assert sum(n for path, n in sizes.items() if trains(path)) == 16_859_136
