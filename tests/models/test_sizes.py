"""Full-size contracts: how many parameters the published shapes have. Nothing is allocated."""

import math

import jax
import pytest
from flax import nnx

from jaxmed._configs import btb3d, btb3d_8x8x8, btb3d_align
from jaxmed.config import DecoderConfig, LoraConfig
from jaxmed.models.decoder import Decoder, padded_vocab
from jaxmed.models.presets import LLAMA3_1_8B, LLAMA3_2_1B, TINYLLAMA_1_1B
from jaxmed.models.vlm import Vlm
from jaxmed.train.init import flatten
from jaxmed.train.step import is_trainable


def parameters(build) -> dict:
    return {path: math.prod(x.shape) for path, x in flatten(nnx.to_pure_dict(nnx.state(jax.eval_shape(build)))).items()}


@pytest.mark.parametrize(
    ("decoder", "count"),
    [(LLAMA3_1_8B, 8_030_261_248), (LLAMA3_2_1B, 1_235_814_400), (TINYLLAMA_1_1B, 1_100_048_384)],
    ids=["llama3_1_8b", "llama3_2_1b", "tinyllama_1_1b"],
)
def test_decoders_have_the_published_number_of_parameters(decoder: DecoderConfig, count: int) -> None:
    """Tables are padded to a multiple of 256 rows; the padding is not counted."""
    sizes = parameters(lambda: Decoder(decoder, LoraConfig(rank=0), 0, jax.random.key(0), split=False))
    tables = [path for path in sizes if path in (("embed", "table"), ("head", "weight"))]
    assert len(tables) == (1 if decoder.tied else 2)
    padding = padded_vocab(decoder.vocab) - decoder.vocab
    assert sum(sizes.values()) - len(tables) * padding * decoder.width == count


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
