"""Published models as a whole, built from the presets: their parameters, those that training changes, every tensor's name, and
the bytes of their KV caches. Shapes alone, nothing is allocated."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxmed.checkpoint.hf_tables import experiment_rows
from jaxmed.checkpoint.tower_tables import TOWER_PREFIX
from jaxmed.config import (
    AggregatorConfig,
    DecoderConfig,
    Experiment,
    FusionConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    ProjectorConfig,
    TrainConfig,
    VisualConfig,
)
from jaxmed.model_config import TowerConfig
from jaxmed.models.decoder import empty_cache
from jaxmed.models.presets import LLAMA2_7B, LLAMA3_8B, MISTRAL_7B, PHI3_MINI_4K, TINYLLAMA_1_1B
from jaxmed.models.presets_towers import CLIP_L14_336, DINO_VITB16, SIGLIP_SO400M_384, VIT3D
from jaxmed.models.vlm import Vlm
from jaxmed.sharding import Rules, make_mesh
from jaxmed.train.init import flatten
from jaxmed.train.step import is_trainable

M3D_LORA = LoraConfig(rank=16, alpha=32.0)
M3D_TRAIN = TrainConfig(train_tower=True, train_embed_tokens=True, train_head=True)
"""What M3D's and SAMF's second stage trains: adapters and all that is not the language model, with both of its tables."""
M3D_TOKENS = ("<im_patch>", "<bx_start>", "<bx_end>", "[SEG]")
NO_LORA = LoraConfig(rank=0)


def of_images(decoder: DecoderConfig, tower: TowerConfig, lora: LoraConfig, train: TrainConfig) -> Experiment:
    visual = VisualConfig("pixels", tokens=tower.tokens, features=tower.width, grid=(1, *tower.grid))
    model = ModelConfig(decoder, tower=tower, projector=ProjectorConfig("mlp2x_gelu"))
    return Experiment(model, visual, lora, train=train)


def lamed(decoder: DecoderConfig) -> Experiment:
    visual = VisualConfig("volumes", tokens=2048, features=768, grid=VIT3D.grid)
    model = ModelConfig(decoder, tower=VIT3D, projector=ProjectorConfig("spp"), added_tokens=M3D_TOKENS)
    return Experiment(model, visual, M3D_LORA, train=M3D_TRAIN)


def samf(kind: str) -> Experiment:
    """The tokenizer has 32,011 tokens, the model's tables 32,064 rows, of which upstream drops the last."""
    decoder = dataclasses.replace(PHI3_MINI_4K, vocab=32011, surplus=53)
    visual = VisualConfig("slices", tokens=24, features=768, grid=(24, 1, 1))
    parts = {"projector": ProjectorConfig("aggregator"), "aggregator": AggregatorConfig(), "fusion": FusionConfig(kind)}
    model = ModelConfig(decoder, tower=DINO_VITB16, added_tokens=M3D_TOKENS[:3], **parts)
    return Experiment(model, visual, M3D_LORA, train=M3D_TRAIN)


TINYLLAVA = of_images(TINYLLAMA_1_1B, SIGLIP_SO400M_384, NO_LORA, TrainConfig(trainable="all"))
LLAVA_MED = of_images(MISTRAL_7B, CLIP_L14_336, LoraConfig(rank=16, alpha=32.0), TrainConfig())


@functools.cache
def counted(experiment: Experiment) -> dict[str, tuple[int, int]]:
    """Part -> (parameters, trained ones). Rows of padding do not count; rows of added tokens count once a table."""
    model = experiment.model
    vocab, added = model.decoder.vocab, len(model.added_tokens)
    trains, sums = is_trainable(experiment), {}
    built = jax.eval_shape(lambda: Vlm(experiment, jax.random.key(0), split=False))
    for path, leaf in flatten(nnx.to_pure_dict(nnx.state(built))).items():
        part, size = str(path[0]), math.prod(leaf.shape)
        if part == "decoder":
            part = "lora" if path[-1].startswith("lora") else "llm"
            if path[1] in ("embed", "head"):
                part, rows = path[1], {"table": vocab, "weight": vocab + added, "added": added}[path[-1]]
                size = rows * leaf.shape[1]
        whole, trained = sums.get(part, (0, 0))
        sums[part] = (whole + size, trained + size * trains(path))
    return sums


def total(experiment: Experiment, trained: bool = False) -> int:
    return sum(part[trained] for part in counted(experiment).values())


def test_tinyllava():
    """1,504,353,824 with the tower's last norm, which nothing reads. Three stages train all but the tower."""
    parts = counted(TINYLLAVA)
    assert sum(parts[name][0] for name in ("embed", "llm", "head")) == 1_100_048_384
    assert parts["projector"] == (6_557_696, 6_557_696)
    last_norm = 2 * 1152
    assert parts["tower"] == (397_747_744 - last_norm, 0)
    assert total(TINYLLAVA) == 1_504_353_824 - last_norm
    assert total(TINYLLAVA, trained=True) == 1_106_606_080


def test_tinyllavas_presets_of_what_is_trained():
    for train, wanted in {
        TrainConfig(trainable="projector"): 6_557_696,
        TrainConfig(trainable="all"): 1_106_606_080,
        TrainConfig(trainable="all", train_tower=True): 1_504_353_824 - 2 * 1152,
    }.items():
        assert total(dataclasses.replace(TINYLLAVA, train=train), trained=True) == wanted


def test_llava_med():
    """7,566,219,264 with the tower's last block and norm, which are neither kept nor run."""
    parts = counted(LLAVA_MED)
    assert sum(parts[name][0] for name in ("embed", "llm", "head")) == 7_241_732_096
    assert (parts["embed"], parts["head"]) == ((131_072_000, 0),) * 2
    not_run = 12_596_224 + 2 * 1024
    assert parts["tower"] == (303_507_456 - not_run, 0)
    assert parts["projector"] == (20_979_712, 20_979_712)
    assert parts["lora"] == (41_943_040, 41_943_040)
    assert total(LLAVA_MED) - parts["lora"][0] == 7_566_219_264 - not_run
    assert total(LLAVA_MED) - parts["lora"][0] - parts["tower"][0] == 7_262_711_808
    assert total(LLAVA_MED, trained=True) == 62_922_752
    smaller = dataclasses.replace(LLAVA_MED, lora=LoraConfig(rank=8, alpha=16.0))
    assert counted(smaller)["lora"] == (20_971_520, 20_971_520)


def test_m3d_lamed_over_llama_3():
    parts = counted(lamed(LLAMA3_8B))
    assert parts["lora"] == (41_943_040, 41_943_040)
    assert parts["tower"] == (87_389_184, 87_389_184)
    assert parts["projector"] == (19_931_136, 19_931_136)
    assert (parts["embed"], parts["head"]) == ((525_352_960, 525_352_960),) * 2
    assert sum(parts[name][0] for name in ("embed", "llm", "head")) == 8_030_261_248 + 2 * 4 * 4096
    assert total(lamed(LLAMA3_8B), trained=True) == 41_943_040 + 87_389_184 + 19_931_136 + 2 * 525_352_960


@pytest.mark.parametrize(
    ("kind", "fusion", "whole", "trained"),
    [("samf", 31_466_496, 3_946_115_328, 347_202_816), ("ao2d", 50_343_936, 3_964_992_768, 366_080_256)],
)
def test_samf(kind, fusion, whole, trained):
    parts = counted(samf(kind))
    assert parts["lora"] == (25_165_824, 25_165_824)
    assert parts["llm"] == (3_624_078_336, 0)
    assert (parts["embed"], parts["head"]) == ((98_347_008, 98_347_008),) * 2
    assert parts["tower"] == (85_798_656, 85_798_656)
    assert parts["aggregator"] == (8_077_824, 8_077_824)
    assert parts["fusion"] == (fusion, fusion)
    assert total(samf(kind)) - parts["lora"][0] == whole
    assert total(samf(kind), trained=True) == trained
    assert total(samf("samf")) == 3_971_281_152


# -- names -----------------------------------------------------------------------------------------------------------------


def expand(*patterns: str, layers: int, ends: tuple[str, ...] = ("weight",)) -> set[str]:
    return {f"{p.replace('#', str(i))}.{end}" for p in patterns for i in range(layers) for end in ends}


BOTH = ("weight", "bias")
LLM_NORMS = ("model.layers.#.input_layernorm", "model.layers.#.post_attention_layernorm")
LLM_ENDS = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
SEPARATE = tuple(f"model.layers.#.self_attn.{x}_proj" for x in "qkvo") + tuple(
    f"model.layers.#.mlp.{x}_proj" for x in ("gate", "up", "down")
)
FUSED = tuple(f"model.layers.#.{x}_proj" for x in ("self_attn.qkv", "self_attn.o", "mlp.gate_up", "mlp.down"))


def language_model(modules: tuple[str, ...], layers: int) -> set[str]:
    return LLM_ENDS | expand(*modules, *LLM_NORMS, layers=layers)


def vit(prefix: str, linears: tuple[str, ...], bias: bool, stem: set[str]) -> set[str]:
    blocks = expand("blocks.#.norm1", "blocks.#.norm2", *(f"blocks.#.{x}" for x in linears), layers=12, ends=BOTH)
    blocks |= expand("blocks.#.attn.qkv", layers=12, ends=BOTH if bias else ("weight",))
    return {prefix + name for name in blocks | stem | {"norm.weight", "norm.bias", "cls_token"}}


def held(experiment: Experiment) -> set[str]:
    return {name for row in experiment_rows(experiment) for name in row.names()}


@pytest.mark.parametrize(("kind", "count"), [("samf", 378), ("ao2d", 380)])
def test_names_of_samf(kind, count):
    """Merged: 378 or 380; as training leaves it, with 256 adapters: 634 with samf; the encoder's file: 150."""
    stem = {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    tower = vit(TOWER_PREFIX, ("attn.proj", "mlp.fc1", "mlp.fc2"), True, stem)
    linears = ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")
    blocks = expand(*(f"model.mm_projector.transformer_encoder.layers.#.{x}" for x in linears), layers=2, ends=BOTH)
    blocks |= {f"model.mm_projector.transformer_encoder.layers.{i}.self_attn.in_proj_{end}" for i in range(2) for end in BOTH}
    aggregator = blocks | {"model.mm_projector.cls_token", *(f"model.mm_projector.volume_proj.{end}" for end in BOTH)}
    parts = ("project_3d", "project_2d", *(("project_text",) if kind == "ao2d" else ()), "fusion_layer")
    fusion = {f"model.mm_fusion.{part}.{end}" for part in parts for end in BOTH}
    assert (len(tower), len(aggregator), len(fusion)) == (150, 27, 2 * len(parts))
    merged = language_model(FUSED, 32) | tower | aggregator | fusion
    assert len(merged) == count
    assert held(dataclasses.replace(samf(kind), lora=NO_LORA)) == merged
    adapters = expand(*FUSED, layers=32, ends=("lora_A.weight", "lora_B.weight"))
    assert len(adapters) == 2 * 128 and len(merged | adapters) == count + 256
    assert held(samf(kind)) == merged | adapters


@pytest.mark.parametrize(("decoder", "llm"), [(LLAMA2_7B, 291), (LLAMA3_8B, 291), (PHI3_MINI_4K, 195)])
def test_names_of_m3d_lamed(decoder, llm):
    stem = {f"patch_embedding.{x}" for x in ("position_embeddings", "patch_embeddings.1.weight", "patch_embeddings.1.bias")}
    tower = vit(TOWER_PREFIX, ("attn.out_proj", "mlp.linear1", "mlp.linear2"), False, stem)
    projector = {f"model.mm_projector.projector.{i}.{end}" for i in (0, 2) for end in BOTH}
    words = language_model(FUSED if decoder.fused else SEPARATE, 32)
    assert (len(words), len(tower)) == (llm, 138)
    assert held(dataclasses.replace(lamed(decoder), lora=NO_LORA)) == words | tower | projector


def test_adapters_lie_on_the_language_model_alone():
    """448 tensors of PEFT; none in the tower, whose projections have the same names."""
    adapters = expand(*SEPARATE, layers=32, ends=("lora_A.weight", "lora_B.weight"))
    assert len(adapters) == 448
    assert {name for name in held(LLAVA_MED) if "lora" in name} == adapters
    built = jax.eval_shape(lambda: Vlm(LLAVA_MED, jax.random.key(0), split=False))
    paths = [path for path in flatten(nnx.to_pure_dict(nnx.state(built))) if path[-1].startswith("lora")]
    assert len(paths) == 14 and {path[0] for path in paths} == {"decoder"}


@pytest.mark.parametrize(("decoder", "a_token"), [(TINYLLAMA_1_1B, 22_528), (MISTRAL_7B, 131_072)])
def test_bytes_of_the_cache(decoder, a_token):
    with jax.set_mesh(make_mesh(MeshConfig(1), jax.devices()[:1])):
        cache = jax.eval_shape(lambda: empty_cache(decoder, 1, 2048, jnp.bfloat16, False, Rules(length=())))
    assert sum(math.prod(x.shape) * x.dtype.itemsize for x in (cache.keys, cache.values)) == 2048 * a_token
