"""Every spelling of a tensor's name becomes the conversion table's; towers alone and whole models of both transformers."""

import pytest
import torch
import transformers

from jaxmed.checkpoint.names import BESIDE, canonical_names, ignored_reason
from jaxmed.checkpoint.tower_tables import TOWER_PREFIX
from jaxmed.errors import UserError

VISION = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 14,
    "patch_size": 7,
}
TEXT = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 23}


def test_peft():
    peft = [
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.model.mm_projector.proj.0.bias",
        "base_model.model.lm_head.weight",
    ]
    assert canonical_names(peft, "d") == {
        "model.layers.0.mlp.up_proj.lora_A.weight": peft[0],
        "model.mm_projector.proj.0.bias": peft[1],
        "lm_head.weight": peft[2],
    }
    for name in (
        "model.mm_projector.proj.0.weight",
        "mm_projector.proj.0.weight",
        "base_model.model.mm_projector.proj.0.weight",
    ):
        assert canonical_names([name], "d") == {"model.mm_projector.proj.0.weight": name}
    older = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
    assert list(canonical_names([older], "d")) == ["model.layers.1.self_attn.q_proj.lora_B.weight"]
    plain = ["model.embed_tokens.weight", "lm_head.weight"]
    assert list(canonical_names(plain, "d")) == plain
    with pytest.raises(UserError, match="same tensor"):
        canonical_names(["mm_projector.proj.0.weight", "model.mm_projector.proj.0.weight"], "d")


def test_a_whole_state_dict_with_adapters():
    """As M3D and SAMF save it: PEFT's wrappers in the middle of names, the tower's `default`-free names untouched."""
    names = {
        "base_model.model.model.layers.1.self_attn.qkv_proj.base_layer.weight": "model.layers.1.self_attn.qkv_proj.weight",
        "base_model.model.model.layers.1.self_attn.qkv_proj.lora_A.default.weight": (
            "model.layers.1.self_attn.qkv_proj.lora_A.weight"
        ),
        "base_model.model.model.embed_tokens.modules_to_save.default.weight": "model.embed_tokens.weight",
        "base_model.model.model.embed_tokens.original_module.weight": "model.embed_tokens.original_module.weight",
        "base_model.model.lm_head.modules_to_save.weight": "lm_head.weight",
        "base_model.model.model.vision_tower.vision_tower.blocks.0.norm1.bias": f"{TOWER_PREFIX}blocks.0.norm1.bias",
        "base_model.model.model.mm_fusion.project_2d.bias": "model.mm_fusion.project_2d.bias",
        "base_model.model.model.mm_projector.cls_token": "model.mm_projector.cls_token",
    }
    assert canonical_names(names, "d") == {ours: theirs for theirs, ours in names.items()}
    assert "before training" in ignored_reason("model.embed_tokens.original_module.weight")
    assert ignored_reason("model.embed_tokens.weight") == ""


@pytest.fixture(scope="module")
def llava():
    """(names in memory, names in the file) of transformers' Llava, and the names that it should have here."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT), image_token_index=5
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
        text = transformers.LlamaForCausalLM(config.text_config)
        tower = transformers.CLIPVisionModel(config.vision_config)
    wanted = set(text.state_dict()) | {f"{TOWER_PREFIX}vision_model.{name}" for name in tower.state_dict()}
    wanted |= {f"model.mm_projector.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")}
    return model, wanted


def renamed(name: str, tower: str) -> str:
    """A name of transformers 5 as version 4 wrote it; `tower` stands before the tower's own names."""
    for new, old in {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.vision_tower.": tower,
    }.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise AssertionError(name)


def test_llava_of_both_transformers(llava):
    model, wanted = llava
    names = list(model.state_dict())
    assert any(name.startswith("model.language_model.layers.0") for name in names)
    spellings = [
        names,
        [renamed(name, "vision_tower.vision_model.") for name in names],
        [renamed(name, "vision_tower.") for name in names],
        [name.replace("model.vision_tower.", "model.vision_tower.vision_model.") for name in names],
        [f"base_model.model.{name}" for name in names],
        [f"base_model.model.{renamed(name, 'vision_tower.vision_model.')}" for name in names],
        [name.replace("vision_model.", "") for name in wanted],  # LLaVA's own code under transformers 5
    ]
    for spelling in spellings:
        found = canonical_names(spelling, "d")
        assert set(found) == wanted
        assert list(found.values()) == spelling


def test_llava_as_transformers_saves_it(llava, tmp_path):
    from safetensors import safe_open

    model, wanted = llava
    model.to_empty(device="cpu").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert set(canonical_names(file.keys(), "d")) == wanted


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_a_tower_alone(family):
    vision = getattr(transformers, f"{family}VisionConfig")(**VISION)
    text = getattr(transformers, f"{family}TextConfig")(**TEXT | {"max_position_embeddings": 9})
    whole_config = getattr(transformers, f"{family}Config")(vision_config=vision, text_config=text)
    with torch.device("meta"):
        alone = list(getattr(transformers, f"{family}VisionModel")(vision).state_dict())
        whole = list(getattr(transformers, f"{family}Model")(whole_config).state_dict())
    wanted = {f"{TOWER_PREFIX}vision_model.{name}" for name in alone}
    assert f"{TOWER_PREFIX}vision_model.post_layernorm.bias" in wanted and "embeddings.patch_embedding.weight" in alone
    for spelling in (
        alone,
        [f"vision_model.{name}" for name in alone],
        [f"module.vision_model.{name}" for name in alone],
        [f"model.vision_tower.vision_tower.vision_model.{name}" for name in alone],
        [f"vision_tower.vision_model.{name}" for name in alone],
    ):
        assert set(canonical_names(spelling, "d", "tower")) == wanted
    found = canonical_names(whole, "d", "tower")
    beside = {name for name in found if name.startswith(BESIDE)}
    assert found.keys() - beside == wanted
    assert f"{BESIDE}logit_scale" in beside and f"{BESIDE}text_model.embeddings.token_embedding.weight" in beside
    assert all("image tower" in ignored_reason(name) for name in beside)
    assert not any(map(ignored_reason, wanted))


def test_dino_and_vit3d():
    dino = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight"]
    wanted = {TOWER_PREFIX + name for name in dino}
    assert set(canonical_names(dino, "d", "tower")) == wanted
    teacher = [f"module.backbone.{name}" for name in dino] + ["module.head.mlp.0.weight", "module.head.last_layer.weight_v"]
    found = canonical_names(teacher, "d", "tower")
    assert found.keys() - wanted == {f"{BESIDE}head.mlp.0.weight", f"{BESIDE}head.last_layer.weight_v"}
    vit = ["cls_token", "patch_embedding.position_embeddings", "blocks.1.mlp.linear1.bias"]
    wanted = {TOWER_PREFIX + name for name in vit}
    assert set(canonical_names(vit, "d", "tower")) == wanted
    clip = [f"vision_encoder.{name}" for name in vit]
    rest = ["language_encoder.pooler.dense.bias", "mm_vision_proj.weight", "mm_language_proj.bias", "logit_scale"]
    found = canonical_names(clip + rest, "d", "tower")
    assert found.keys() == wanted | {BESIDE + name for name in rest}
    assert list(canonical_names(clip + rest, "d")) == clip + rest  # read as a model it keeps its own names
    with pytest.raises(UserError, match=r"vision_encoder\.cls_token and cls_token are the same"):
        canonical_names(["vision_encoder.cls_token", "cls_token"], "d", "tower")


def test_a_whole_model_read_for_its_tower():
    names = ["model.embed_tokens.weight", f"{TOWER_PREFIX}cls_token", "model.mm_projector.0.bias"]
    found = canonical_names([f"base_model.model.{name}" for name in names], "d", "tower")
    assert list(found) == [BESIDE + names[0], names[1], BESIDE + names[2]]


def test_what_nothing_explains_stays():
    assert list(canonical_names(["vision_model.embeddings.class_embedding", "surprise"], "d", "tower"))[1] == (
        f"{TOWER_PREFIX}surprise"
    )
    assert list(canonical_names(["surprise", "model.layers.0.surprise"], "d")) == ["surprise", "model.layers.0.surprise"]
    assert ignored_reason("surprise") == ""


def test_ignored_tensors_have_a_reason():
    assert "rope" in ignored_reason("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert "no weights" in ignored_reason(f"{TOWER_PREFIX}vision_model.embeddings.position_ids")
    assert "segmentation" in ignored_reason("model.seg_module.image_encoder.pos_embed")
    assert ignored_reason("model.layers.3.self_attn.q_proj.weight") == ""
