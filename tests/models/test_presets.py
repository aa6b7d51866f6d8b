"""Published decoders at full size against transformers on its `meta` device: every tensor's name and shape, and the totals.
Nothing is allocated."""

import math

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, PreTrainedConfig

from jaxmed.checkpoint.decoder_tables import decoder_rows, lora_rows
from jaxmed.checkpoint.hf_config import decoder_config
from jaxmed.checkpoint.row import LAYER
from jaxmed.config import DecoderConfig, LoraConfig
from jaxmed.models.decoder import Decoder, padded_vocab
from jaxmed.models.presets import DECODERS
from jaxmed.train.init import flatten

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "phi3": Phi3Config}
COUNTS = {
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "tinyllama_1_1b": 1_100_048_384,
    "mistral_7b": 7_241_732_096,
    "mistral_7b_v01": 7_241_732_096,
    "phi3_mini_4k": 3_821_079_552,
    "phi3_mini_128k": 3_821_079_552,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def llama3(factor: float, **sizes: int) -> dict:
    base = {"vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
    return {"model_type": "llama", "rope_parameters": LLAMA3 | {"factor": factor}} | base | sizes


BIG = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
MISTRAL = BIG | {"model_type": "mistral", "vocab_size": 32000, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
MISTRAL |= {"max_position_embeddings": 32768}
PUBLISHED = {
    "llama2_7b": BIG
    | {"model_type": "llama", "vocab_size": 32000, "intermediate_size": 11008, "rms_norm_eps": 1e-5}
    | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "max_position_embeddings": 4096},
    "llama3_8b": llama3(0.0, **BIG)
    | {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "max_position_embeddings": 8192},
    "llama3_1_8b": llama3(8.0, **BIG),
    "llama3_2_1b": llama3(32.0, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, intermediate_size=8192)
    | {"tie_word_embeddings": True, "head_dim": 64},
    "llama3_2_3b": llama3(32.0, hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, intermediate_size=8192)
    | {"tie_word_embeddings": True, "head_dim": 128},
    "tinyllama_1_1b": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 22}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632, "rms_norm_eps": 1e-5}
    | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "max_position_embeddings": 2048},
    "mistral_7b": MISTRAL | {"sliding_window": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "mistral_7b_v01": MISTRAL | {"sliding_window": 4096, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "phi3_mini_4k": {"model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 8192, "rms_norm_eps": 1e-5}
    | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "max_position_embeddings": 4096}
    | {"sliding_window": 2047},
}
ROPE = DECODERS["phi3_mini_128k"].rope
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": list(ROPE.long_factors)}
LONGROPE |= {"short_factor": list(ROPE.short_factors), "original_max_position_embeddings": 4096}
PUBLISHED["phi3_mini_128k"] = PUBLISHED["phi3_mini_4k"] | {"sliding_window": 262144, "rope_parameters": LONGROPE}
PUBLISHED["phi3_mini_128k"] |= {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}


def published(name: str) -> PreTrainedConfig:
    """config.json's fields as the models' own repositories have them, as a config of transformers."""
    fields = PUBLISHED[name]
    return CONFIGS[fields["model_type"]](**{key: value for key, value in fields.items() if key != "model_type"})


def shapes_of(decoder: DecoderConfig, lora: LoraConfig) -> dict:
    build = jax.eval_shape(lambda: Decoder(decoder, lora, 0, jax.random.key(0), split=False))
    return {("decoder", *path): leaf for path, leaf in flatten(nnx.to_pure_dict(nnx.state(build))).items()}


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "tiny"])
def test_every_tensor_of_the_published_model(name):
    config, decoder = published(name), DECODERS[name]
    assert decoder_config(config.to_dict(), "config.json") == decoder
    with torch.device("meta"):
        theirs = {key: tuple(p.shape) for key, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    ours, filled = shapes_of(decoder, LoraConfig(rank=0)), dict.fromkeys(theirs, 0)
    places = {tuple(part for part in row.ours if part != LAYER): row for row in decoder_rows(decoder) if row.ours}
    assert places.keys() == ours.keys()
    for path, row in places.items():
        shape = ours[path].shape[1:] if row.layers else ours[path].shape
        for theirs_name in row.names():
            assert row.transform.fits(theirs[theirs_name], shape), (theirs_name, theirs[theirs_name], shape)
            table = path[-1] == "table" or path[1] == "head"
            filled[theirs_name] += decoder.vocab * shape[1] if table else math.prod(shape)
    assert filled == {key: math.prod(shape) for key, shape in theirs.items()}, "parts of a fused matrix fill it exactly"
    assert sum(filled.values()) == COUNTS[name]
    tables = [ours[path].shape for path in ours if path[-1] == "table" or path[1] == "head"]
    assert set(tables) == {(padded_vocab(decoder.vocab), decoder.width)} and len(tables) == 2 - decoder.tied


def test_longrope_factors_are_those_that_its_config_is_quoted_with():
    """danbev/learning-ai, notes/position-embeddings/rope.md: config.json of microsoft/Phi-3-mini-128k-instruct, and the factor
    of attention that llama.cpp's conversion wrote."""
    first = [1.0700000524520874, 1.1200000047683716, 1.149999976158142, 1.4199999570846558, 1.5699999332427979]
    first += [1.7999999523162842, 2.129999876022339, 2.129999876022339, 3.009999990463257, 5.910000324249268, 6.950000286102295]
    first += [9.070000648498535, 9.930000305175781, 10.710000038146973, 11.130000114440918, 14.609999656677246]
    last = [64.12435150146484, 64.15435028076172, 64.19435119628906, 64.24435424804688, 64.57435607910156, 64.69000244140625]
    last += [64.76000213623047]
    assert len(ROPE.long_factors) == len(ROPE.short_factors) == 48
    assert (list(ROPE.long_factors[:16]), list(ROPE.long_factors[-7:])) == (first, last)
    assert ROPE.short_factors[:5] == (1.1, 1.1, 1.1, 1.3000000000000003, 1.3500000000000003)
    assert ROPE.short_factors[-3:] == (2.799999999999998, 2.8999999999999977, 3.049999999999997)
    assert list(ROPE.long_factors) == sorted(ROPE.long_factors) and list(ROPE.short_factors) == sorted(ROPE.short_factors)
    assert np.float32(ROPE.attention_factor) == np.float32(1.190238118171692)


@pytest.mark.parametrize(("name", "rank", "count"), [("phi3_mini_4k", 16, 25_165_824), ("mistral_7b", 8, 20_971_520)])
def test_adapters_of_every_projection(name, rank, count):
    """Phi-3's fused matrices have one A each."""
    leaves = shapes_of(DECODERS[name], LoraConfig(rank=rank))
    adapters = {path: math.prod(x.shape) for path, x in leaves.items() if path[-1] in ("lora_a", "lora_b")}
    assert sum(adapters.values()) == count
    rows = {tuple(part for part in row.ours if part != LAYER) for row in lora_rows(LoraConfig(rank=rank), DECODERS[name])}
    assert rows == adapters.keys()
