"""Whole LLaVA folders give their experiment: the golden cases' sizes, and what is assumed where files are silent."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from golden_folders import CLIP, GOLDEN, SIGLIP, case, check_tensors, copy_of, edit, resolve
from safetensors.numpy import load_file, save_file

from jaxmed.checkpoint.adapter import upstream_folder
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.names import canonical_names
from jaxmed.config import Experiment, LoraConfig, PixelConfig, from_json, replace_field, to_json
from jaxmed.errors import UserError


@pytest.mark.parametrize("name", ["llava_mistral_base", "llava_mistral_short"])
def test_llava_mistral(name):
    sizes, path = case("mistral_llava")["sizes"], str(GOLDEN / "mistral_llava" / name)
    experiment, _ = resolve(path, tower=CLIP)
    model, decoder, tower = experiment.model, experiment.model.decoder, experiment.model.tower
    wanted, clip = sizes[name], sizes["clip_small46"]
    assert (decoder.width, decoder.heads, decoder.kv_heads) == (wanted["hidden"], wanted["heads"], wanted["kv_heads"])
    assert (decoder.layers, decoder.mlp, decoder.rope.theta) == (wanted["layers"], wanted["ffn"], wanted["rope_theta"])
    assert (decoder.norm_eps, decoder.window) == (wanted["rms_norm_eps"], wanted["sliding_window"] or 0)
    assert (decoder.vocab, decoder.vocab + decoder.surplus) == (sizes["tokenizer"], wanted["vocabulary"])
    assert (tower.kind, tower.width, tower.heads, tower.layers, tower.mlp) == ("clip", 35, 5, 5, clip["ffn"])
    assert (tower.image, tower.patch, tower.norm_eps) == ((clip["image"],) * 2, (clip["patch"],) * 2, clip["layer_norm_eps"])
    assert tower.select_layer == wanted["select_layer"] and tower.select_feature == "patch"
    assert (model.base, model.adapter, model.tower_folder, model.tower_source) == (path, "", CLIP, "checkpoint")
    assert model.projector.kind == "mlp2x_gelu" and model.added_tokens == () and model.end_ids == ()
    visual = experiment.visual
    assert (visual.kind, visual.images, visual.tokens, visual.features, visual.grid) == ("pixels", 1, 36, 35, (1, 6, 6))
    assert visual.pixels == PixelConfig("pad", 50, 46, (0.5012, 0.4473, 0.3921), (0.2511, 0.2732, 0.2904))
    data, train = experiment.data, experiment.train
    assert (data.template, data.max_length, data.buckets) == ("mistral_instruct", 2048, (2048,))
    assert data.missing_image_token == "refuse"
    assert (train.trainable, train.train_tower, experiment.lora.rank) == ("all", False, 0)
    assert from_json(Experiment, to_json(experiment)) == experiment
    left = check_tensors(experiment)
    assert {name.split(".")[4] for name in left} == {"encoder", "post_layernorm"}


def test_lora_over_a_whole_llava():
    sizes, tubes = case("mistral_llava")["sizes"], GOLDEN / "mistral_llava/llava_lora_mistral_tubes"
    experiment, _ = resolve(tubes, "mistral_llava/llava_mistral_base", CLIP)
    whole, _ = resolve("mistral_llava/llava_mistral_base", tower=CLIP)
    assert experiment.lora == LoraConfig(sizes["lora"]["r"], sizes["lora"]["alpha"], sizes["lora"]["dropout"])
    assert experiment.train.trainable == "adapter" and not experiment.train.train_embed_tokens
    assert experiment.model == dataclasses.replace(whole.model, adapter=str(tubes))
    assert experiment.visual == whole.visual and experiment.data.max_length == 2048
    tensors = open_folder(str(tubes))
    assert sum(".lora_" in name for name in tensors.names()) == sizes["lora"]["tensors"]
    check_tensors(experiment)


def test_lora_over_a_plain_language_model(tmp_path):
    """As LLaVA 1.5's own adapters are published: base without image side, projector beside the adapter, tower apart."""
    base = copy_of("mistral_llava/llava_mistral_base", tmp_path / "base")
    tensors = open_folder(str(base)).arrays
    for file in base.glob("model*"):
        file.unlink()  # the tensors are views of the mapped files
    save_file(
        {n: t for n, t in tensors.items() if "mm_projector" not in n and "vision_tower" not in n}, base / "model.safetensors"
    )
    config = json.loads((base / "config.json").read_text())
    plain = {n: v for n, v in config.items() if not n.startswith("mm_")} | {"model_type": "mistral"}
    (base / "config.json").write_text(json.dumps(plain))
    assert detect(str(base)) == "hf"
    folder = "mistral_llava/llava_lora_mistral_tubes"
    experiment, _ = resolve(folder, str(base), CLIP)
    over_whole, _ = resolve(folder, "mistral_llava/llava_mistral_base", CLIP)
    assert experiment == replace_field(over_whole, "model.base", str(base))
    check_tensors(experiment)
    with pytest.raises(UserError, match=r"image tower \(clip_small46\).*--tower"):
        resolve(folder, str(base))


def test_an_adapter_whose_projector_has_no_weights(tmp_path):
    """`identity` leaves upstream's non_lora_trainables.bin empty."""
    folder = copy_of("mistral_llava/llava_lora_mistral_tubes", tmp_path / "x")
    (folder / "non_lora_trainables.bin").unlink()
    experiment, _ = resolve(folder, "mistral_llava/llava_mistral_base", CLIP)
    with pytest.raises(UserError, match="holds no projector"):
        upstream_folder(experiment)
    edit(folder / "config.json", mm_projector_type="identity")
    experiment, _ = resolve(folder, "mistral_llava/llava_mistral_base", CLIP)
    assert upstream_folder(experiment) is not None


@pytest.mark.parametrize(
    ("folder", "base", "tower"),
    [
        ("btb3d/llava_lora_z2/checkpoint-16", "btb3d/base", ""),
        ("mistral_llava/llava_lora_mistral_tubes", "mistral_llava/llava_mistral_base", CLIP),
    ],
)
def test_answers_end_where_the_base_says(folder, base, tower, tmp_path):
    """As upstream generates: by the base's generation_config.json, though the adapter's folder has tokenizer and config."""
    adapter, other = copy_of(folder, tmp_path / "x"), copy_of(base, tmp_path / "base")
    for file in other.glob("tokenizer*"):
        if not (adapter / file.name).exists():
            shutil.copyfile(file, adapter / file.name)
    assert resolve(adapter, str(other), tower)[0].model.end_ids == ()
    edit(other / "generation_config.json", eos_token_id=[7, 40])
    assert resolve(adapter, str(other), tower)[0].model.end_ids == (7, 40)
    (adapter / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert resolve(adapter, str(other), tower)[0].model.end_ids == ()


def test_where_samples_are_cut():
    """Upstream cuts at its config's length, whatever the image side is."""
    experiment, _ = resolve("btb3d/llava_lora_z2/checkpoint-16", "btb3d/base")
    assert experiment.visual.kind == "embeddings" and experiment.data.max_length == 1024


@pytest.mark.parametrize(
    ("folder", "base", "tower"),
    [
        ("btb3d/llava_lora_z2/checkpoint-16", "btb3d/base", ""),
        ("mistral_llava/llava_mistral_short", "", CLIP),
        ("mistral_llava/llava_lora_mistral_tubes", "mistral_llava/llava_mistral_base", CLIP),
    ],
)
def test_images_between_tokens_of_their_own_are_refused(folder, base, tower, tmp_path):
    copy = copy_of(folder, tmp_path / "x")
    edit(copy / "config.json", mm_use_im_start_end=True)
    with pytest.raises(UserError, match=r"config\.json: mm_use_im_start_end is true.*<im_start>"):
        resolve(copy, base, tower)


def test_tower_named_by_the_config(tmp_path, monkeypatch):
    folder = copy_of("mistral_llava/llava_mistral_short", tmp_path / "short")
    with pytest.raises(UserError, match=r"\(clip_small46\) are neither in it nor on this machine.*--tower"):
        resolve(folder)
    shutil.copytree(CLIP, folder / "clip_small46")
    assert resolve(folder)[0].model.tower_folder == str(folder / "clip_small46")
    shutil.rmtree(folder / "clip_small46")
    monkeypatch.chdir(GOLDEN / "mistral_llava")
    assert resolve(folder)[0].model.tower_folder == "clip_small46"
    with pytest.raises(UserError, match="no such folder or file"):
        resolve(folder, tower="clip_small_46")


def test_a_tower_of_another_model(tmp_path):
    with pytest.raises(UserError, match=r"20 wide.*mm_hidden_size 35.*own tower"):
        resolve("mistral_llava/llava_mistral_short", tower=SIGLIP)
    with pytest.raises(UserError, match="is a clip tower, this model has vit3d"):
        resolve("vit3d/lamed_merged", tower=CLIP)
    with pytest.raises(UserError, match=r"patch_size is \[2, 4, 3\], the image tower's is \[4, 6, 7\]"):
        folder = copy_of("vit3d/lamed_merged", tmp_path / "x")
        edit(folder / "config.json", mm_hidden_size=30)
        resolve(folder, tower=str(GOLDEN / "vit3d/m3d_clip"))


def test_tinyllava():
    sizes, path = case("tinyllava")["sizes"], str(GOLDEN / "tinyllava/tinyllava_mini")
    experiment, notices = resolve(path, tower=SIGLIP)
    decoder, tower = experiment.model.decoder, experiment.model.tower
    llm, siglip = sizes["llm"], sizes["tower"]
    assert (decoder.width, decoder.layers, decoder.heads, decoder.kv_heads) == (54, llm["layers"], 9, llm["kv_heads"])
    assert (decoder.mlp, decoder.vocab, decoder.surplus) == (llm["ffn"], llm["vocab"], 0)
    assert (decoder.rope.theta, decoder.norm_eps) == (llm["rope_theta"], llm["rms_norm_eps"])
    assert (tower.kind, tower.width, tower.heads, tower.mlp, tower.layers) == ("siglip", 20, 5, siglip["ffn"], 5)
    assert (tower.blocks, tower.select_layer, tower.image) == (4, -2, (384, 384))
    visual = experiment.visual
    assert (visual.kind, visual.tokens, visual.features, visual.grid) == ("pixels", 729, 20, (1, 27, 27))
    assert visual.pixels == PixelConfig("pad", 384, 0, (0.5,) * 3, (0.5,) * 3)
    assert any("preprocessor_config.json" in notice for notice in notices)  # siglip_mini has none
    assert any("tower-source" in notice for notice in notices)
    data, train = experiment.data, experiment.train
    assert (data.template, data.max_length, data.missing_image_token) == ("v1", sizes["model_max_length"], "text_only")
    assert (train.trainable, train.train_tower, experiment.lora.rank) == ("all", False, 0)
    left = check_tensors(experiment)
    assert any(".head.probe" in name for name in left)  # siglip_mini's pooling head


def test_the_tower_inside_a_llava_alone():
    """No config says a LLaVA's tower: the shapes do, except for its heads."""
    with pytest.raises(UserError, match=r"heads.*16 do not divide its width 20"):
        resolve("tinyllava/tinyllava_mini")
    for name in ("vision.heads", "model.tower.heads"):
        experiment, notices = resolve("tinyllava/tinyllava_mini", **{name: 5})
        tower = experiment.model.tower
        assert (tower.heads, tower.width, tower.layers, tower.blocks, experiment.model.tower_folder) == (5, 20, 5, 4, "")
        assert any("assumed (no file says)" in notice and "heads" not in notice for notice in notices)
        check_tensors(experiment)


def test_adapter_for_another_base(tmp_path):
    folder = copy_of("mistral_llava/llava_lora_mistral_tubes", tmp_path / "x")
    edit(folder / "config.json", rope_theta=5e5)
    with pytest.raises(UserError, match=r"was not trained on the base .*500000.*--base"):
        resolve(folder, "mistral_llava/llava_mistral_base", CLIP)
    with pytest.raises(UserError, match=r"layers 3 against 4"):
        resolve("mistral_llava/llava_lora_mistral_tubes", "mistral_llava/llava_mistral_short", CLIP)


def test_folders_that_are_no_whole_model():
    for name, hint in [("vit3d/m3d_clip", "--tower"), ("mistral_llava/clip_small46", "--tower")]:
        with pytest.raises(UserError, match=f"no whole model.*{hint}"):
            resolve(name)
    with pytest.raises(UserError, match="without an image tower"):
        resolve("vit3d/base", tower=CLIP)
    experiment, notices = resolve("vit3d/base")
    assert (experiment.visual.kind, experiment.lora.rank, notices) == ("none", 0, [])
    assert experiment.model.decoder.vocab == 175


def transformers_llava(folder: Path, version: int) -> Path:
    """A tiny one as transformers 5 saves it; for version 4 its names and config rewritten as that had them."""
    vision = {"hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 3, "num_attention_heads": 3}
    text = {"hidden_size": 16, "intermediate_size": 18, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(11)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=15, patch_size=5),
        text_config=transformers.LlamaConfig(**text, num_key_value_heads=2, vocab_size=435, rope_theta=26000.0),
        image_token_index=5,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(GOLDEN / "tinyllava/tinyllava_mini" / name, folder / name)
    if version == 4:
        names = canonical_names(load_file(folder / "model.safetensors"), "d")
        tensors = load_file(folder / "model.safetensors")
        spelled = {}
        for ours, theirs in names.items():
            name = ours.replace("model.vision_tower.vision_tower.", "vision_tower.")
            name = name.replace("model.mm_projector.0", "multi_modal_projector.linear_1")
            name = name.replace("model.mm_projector.2", "multi_modal_projector.linear_2")
            spelled[f"language_model.{name}" if name.startswith(("model.", "lm_head.")) else name] = tensors[theirs]
        assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias" in spelled
        assert "language_model.model.layers.0.mlp.up_proj.weight" in spelled
        save_file(spelled, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        rope = config["text_config"].pop("rope_parameters")
        config["text_config"] |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_transformers_llava_of_both_generations(tmp_path):
    five, four = (transformers_llava(tmp_path / str(version), version) for version in (5, 4))
    experiment, notices = resolve(five)
    assert replace_field(resolve(four)[0], "model.base", str(five)) == experiment
    left = [set(check_tensors(resolve(folder)[0])) for folder in (five, four)]
    assert left[0] == left[1] and any("post_layernorm" in name for name in left[0])
    decoder, tower = experiment.model.decoder, experiment.model.tower
    assert (decoder.width, decoder.kv_heads, decoder.rope.theta) == (16, 2, 26000.0)
    assert (decoder.vocab, decoder.surplus) == (430, 5)  # the tokenizer's, the rest is padding
    assert (tower.kind, tower.width, tower.heads, tower.blocks, tower.grid) == ("clip", 12, 3, 2, (3, 3))
    assert (experiment.visual.tokens, experiment.visual.pixels.aspect, experiment.visual.pixels.crop) == (9, "crop", 15)
    assert (experiment.model.projector.kind, experiment.data.template, experiment.data.max_length) == ("mlp2x_gelu", "v1", 0)
    assert experiment.train.trainable == "all" and len(notices) == 1
    for change in ({"projector_hidden_act": "relu"}, {"multimodal_projector_bias": False}, {"vision_feature_layer": [-2, -3]}):
        edit(four / "config.json", **change)
        with pytest.raises(UserError, match=next(iter(change)) if "layer" not in str(change) else "one layer"):
            resolve(four)
        edit(four / "config.json", projector_hidden_act="gelu", multimodal_projector_bias=True, vision_feature_layer=-2)
    edit(four / "config.json", vision_feature_select_strategy="full")
    assert resolve(four)[0].model.tower.select_feature == "cls_patch"


def test_text_config_that_leaves_defaults_out(tmp_path):
    """As version 4 wrote it: LLaVA 1.5's names the sizes in which it differs from LLaMA's defaults."""
    folder = transformers_llava(tmp_path / "x", 4)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    decoder = resolve(folder)[0].model.decoder
    assert (decoder.width, decoder.layers, decoder.heads, decoder.kv_heads, decoder.mlp) == (4096, 32, 32, 32, 11008)
    assert (decoder.norm_eps, decoder.head_dim, decoder.vocab + decoder.surplus) == (1e-5, 128, 32064)


def test_a_head_count_that_is_no_number_is_told() -> None:
    with pytest.raises(UserError, match=r"model\.tower\.heads is 'many'; a whole number is needed"):
        resolve("samf/samf_merged", **{"slice_encoder__heads": "many"})
