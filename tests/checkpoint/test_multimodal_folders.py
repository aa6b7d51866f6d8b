"""Whole vision-language folders give their experiment: the golden cases' sizes, and what is assumed where files are silent."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.hf_tables import experiment_rows
from jaxmed.checkpoint.load import read_params
from jaxmed.checkpoint.multimodal_folders import OVERRIDES, resolve_folder
from jaxmed.checkpoint.names import canonical_names
from jaxmed.checkpoint.sources import weight_sources
from jaxmed.checkpoint.transforms import AddedRows, Vocabulary
from jaxmed.config import LORA_TARGETS, Experiment, LoraConfig, PixelConfig, from_json, replace_field, to_json
from jaxmed.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
CLIP = str(GOLDEN / "mistral_llava/clip_small46")
SIGLIP = str(GOLDEN / "tinyllava/siglip_mini")


def case(system: str) -> dict:
    return json.loads((GOLDEN / system / "case.json").read_text())


def resolve(folder: str | Path, base: str = "", tower: str = "", **overrides) -> tuple[Experiment, list[str]]:
    """`folder`, `base`: below the golden folder."""
    path, base = str(GOLDEN / folder), str(GOLDEN / base) if base else ""
    given = {name.replace("__", "."): value for name, value in overrides.items()}
    return resolve_folder(detect(path), path, base, tower, given)


def copy_of(name: str, to: Path) -> Path:
    to.mkdir()
    for file in (GOLDEN / name).iterdir():
        shutil.copyfile(file, to / file.name)
    return to


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def check_tensors(experiment: Experiment) -> dict[str, str]:
    """Every row has its tensor, and every other tensor a reason; returns those."""
    sources = weight_sources(experiment)
    names = {name for folder in sources.folders for name in sources.names(folder)}
    wanted = {name for row in sources.rows if not row.same_as for name in row.names()}
    assert wanted <= names
    left = {name: sources.surplus(name) for name in names - wanted}
    assert all(left.values()), left
    return left


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


@pytest.mark.parametrize("name", ["lamed_merged", "lamed_lora"])
def test_lamed(name):
    about, path = case("vit3d"), str(GOLDEN / "vit3d" / name)
    lora = name == "lamed_lora"
    experiment, notices = resolve(path, "vit3d/base" if lora else "")
    model, decoder, tower = experiment.model, experiment.model.decoder, experiment.model.tower
    vit, llm = about["vit"], about["llm"]
    assert (tower.kind, list(tower.image), list(tower.patch), list(tower.grid)) == (
        "vit3d",
        vit["image_size"],
        vit["patch_size"],
        vit["grid"],
    )
    assert (tower.width, tower.mlp, tower.layers, tower.heads) == (36, vit["mlp_dim"], vit["num_layers"], 12)
    assert (tower.final_norm, tower.select_layer, tower.qkv_bias, tower.channels) == (True, -1, False, 1)
    assert (decoder.width, decoder.layers, decoder.heads, decoder.kv_heads) == (48, 2, 6, llm["num_key_value_heads"])
    assert (decoder.vocab, decoder.surplus, decoder.rope.theta) == (llm["resized_vocab_size"], 0, llm["rope_theta"])
    projector = model.projector
    assert (projector.kind, projector.spp_pooling, projector.spp_size) == ("spp", "spatial", 2)
    assert (projector.spp_head, projector.spp_depth) == ("mlp", 2)
    assert experiment.image_tokens == about["image_tokens"]
    visual = experiment.visual
    assert (visual.kind, visual.tokens, visual.features, visual.grid) == ("volumes", 168, 36, (4, 6, 7))
    assert visual.volume == tuple(vit["image_size"])
    assert (model.base, model.adapter, model.tokenizer, model.added_tokens, model.fusion.kind) == (path, "", "", (), "none")
    data, train = experiment.data, experiment.train
    assert (data.template, data.max_length, data.pad_id) == ("m3d", 512, -1)
    assert train.train_tower and train.trainable == ("adapter" if lora else "all")
    assert (train.train_embed_tokens, train.train_head) == (lora, lora)
    assert experiment.lora.rank == (about["runs"]["lora"]["lora_r"] if lora else 0)
    assert "vision: heads 12 assumed (no file says); --set vision.heads=N says otherwise" in notices
    if lora:
        assert (experiment.lora.alpha, experiment.lora.targets) == (32.0, LORA_TARGETS)
        assert any("alpha 32 assumed" in notice for notice in notices)
        assert model.end_ids == (174,)
    assert check_tensors(experiment) == {}


def test_what_was_said_is_not_assumed():
    experiment, notices = resolve("vit3d/lamed_lora", **{"vision.heads": 3, "lora.alpha": 15})
    assert experiment.model.tower.heads == 3 and notices == []
    assert experiment.lora.alpha == 32.0  # set by the caller, with everything else
    experiment, notices = resolve("samf/samf_lora", **{"slice_encoder.heads": 5, "aggregator.heads": 8, "lora.alpha": 15})
    assert experiment.model.tower.heads == 5 and notices == []
    for name, field in OVERRIDES.items():
        assert replace_field(experiment, field, 4 if "heads" in name else 3) != experiment


@pytest.mark.parametrize("name", ["samf_merged", "samf_lora", "ao2d_merged"])
def test_samf(name):
    about, path = case("samf"), str(GOLDEN / "samf" / name)
    system = name.split("_")[0]
    sizes, lora = about["sizes"][system], name == "samf_lora"
    heads = {"vision.heads": sizes["dino"]["num_heads"]} if system == "samf" else {}
    experiment, notices = resolve(path, "samf/base" if lora else "", **heads)
    model, decoder, tower = experiment.model, experiment.model.decoder, experiment.model.tower
    dino, aggregator, fusion, llm = (sizes[part] for part in ("dino", "aggregator", "fusion", "llm"))
    assert (tower.kind, tower.width, tower.layers, tower.heads) == (
        "dino",
        dino["embed_dim"],
        dino["depth"],
        dino["num_heads"],
    )
    assert (tower.mlp, tower.image, tower.patch) == (dino["embed_dim"] * 2.5, (224, 224), (16, 16))
    assert (tower.select_feature, tower.select_layer, tower.final_norm) == ("cls", -1, True)
    assert model.projector.kind == "aggregator"
    assert (model.aggregator.layers, model.aggregator.heads) == (aggregator["layers"], aggregator["heads"])
    assert (model.aggregator.mlp, model.aggregator.features) == (aggregator["ffn"], aggregator["volume_dim"])
    assert (model.fusion.kind, model.fusion.width, model.fusion.tokens) == (system, fusion["d_proj"], fusion["tokens"])
    assert (decoder.width, decoder.heads, decoder.kv_heads, decoder.mlp) == (
        llm["hidden_size"],
        llm["num_attention_heads"],
        llm["num_key_value_heads"],
        llm["intermediate_size"],
    )
    assert (decoder.vocab, decoder.fused, decoder.window) == (llm["vocab_size"], True, 2047)
    visual = experiment.visual
    assert (visual.kind, visual.slices, visual.tokens, visual.grid) == ("slices", 24, 24, (24, 1, 1))
    assert (visual.features, visual.pixels.shortest, visual.pixels.crop) == (dino["embed_dim"], 224, 224)
    assert experiment.image_tokens == 256
    data, train = experiment.data, experiment.train
    assert (data.template, data.max_length, data.pad_id) == ("m3d", 512, about["end_ids"][system][0])
    assert train.train_tower and train.trainable == ("adapter" if lora else "all")
    assert (train.train_embed_tokens, train.train_head) == (lora, lora)
    assert experiment.lora.rank == (about["lora"]["samf"]["r"] if lora else 0)
    assert list(model.end_ids) == (about["end_ids"]["samf"] if lora else [])
    assert any("aggregator: 8 heads assumed" in notice for notice in notices)
    assert any("vision: heads 1 assumed" in notice for notice in notices) == (system == "ao2d")
    assert check_tensors(experiment) == {}


def test_heads_that_cannot_be_guessed():
    with pytest.raises(UserError, match=r"12 do not divide its width 40.*heads"):
        resolve("samf/samf_merged")


def test_state_dict_as_training_leaves_it(tmp_path):
    """model_with_lora.bin alone: config, tokenizer and end ids are the base's, and training added its tokens to them."""
    folder = tmp_path / "output"
    folder.mkdir()
    shutil.copyfile(GOLDEN / "samf/samf_lora/model_with_lora.bin", folder / "model_with_lora_20.bin")
    with pytest.raises(UserError, match=r"no config\.json.*--base"):
        resolve(folder, **{"vision.heads": 5})
    base = str(GOLDEN / "samf/base")
    experiment, notices = resolve(folder, base, **{"vision.heads": 5})
    whole, _ = resolve("samf/samf_lora", base, **{"vision.heads": 5})
    decoder = dataclasses.replace(whole.model.decoder, vocab=353)
    tokens = ("<im_patch>", "<bx_start>", "<bx_end>")
    model = dataclasses.replace(whole.model, base=str(folder), tokenizer=base, decoder=decoder, added_tokens=tokens)
    assert experiment == dataclasses.replace(whole, model=model)
    assert any("no config.json" in notice for notice in notices)
    check_tensors(experiment)
    other = copy_of("samf/base", tmp_path / "other")
    edit(other / "config.json", rms_norm_eps=1e-6)
    with pytest.raises(UserError, match=r"was not trained on the base .*norm_eps 1e-05 against 1e-06.*--base"):
        resolve("samf/samf_lora", str(other), **{"vision.heads": 5})


def test_adapters_of_several_ranks(tmp_path):
    folder = copy_of("vit3d/lamed_lora", tmp_path / "x")
    tensors = torch.load(folder / "model_with_lora.bin")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"
    torch.save(tensors | {name: tensors[name][:4]}, folder / "model_with_lora.bin")
    with pytest.raises(UserError, match=r"ranks \[4, 6\]"):
        resolve(folder)
    stray = {"base_model.model.lm_head.lora_A.default.weight": torch.zeros(6, 48)}
    torch.save(tensors | stray, folder / "model_with_lora.bin")
    with pytest.raises(UserError, match="adapters of lm_head"):
        resolve(folder)
    torch.save({n: t for n, t in tensors.items() if ".mlp.up_proj.lora" not in n}, folder / "model_with_lora.bin")
    assert resolve(folder)[0].lora.targets == tuple(t for t in LORA_TARGETS if t != "up")


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


def test_surplus_rows_are_left_out():
    experiment, _ = resolve("mistral_llava/llava_mistral_short", tower=CLIP)
    folder = open_folder(experiment.model.base)
    rows = [row for row in experiment_rows(experiment) if row.theirs in ("model.embed_tokens.weight", "lm_head.weight")]
    leaf = jax.ShapeDtypeStruct((512, 40), jnp.float32)
    alone = dataclasses.replace(folder, arrays={row.theirs: folder.arrays[row.theirs] for row in rows})
    read = read_params(rows, [alone], {"decoder": {"embed": {"table": leaf}, "head": {"weight": leaf}}})
    for ours, theirs in (("embed", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        table = np.asarray(next(iter(read["decoder"][ours].values())))
        assert folder.shape(theirs) == (466, 40)
        np.testing.assert_array_equal(table[:461], folder.read(theirs)[:461])
        assert not table[461:].any()


def test_vocabulary_with_surplus():
    table = np.arange(14.0, dtype=np.float32).reshape(7, 2)
    whole = (slice(None), slice(None))
    cut = Vocabulary(4, 2, 3)
    assert cut.fits((7, 2), (8, 2)) and cut.fits((5, 2), (8, 2)) and not cut.fits((8, 2), (8, 2))
    assert not Vocabulary(4, 2).fits((7, 2), (8, 2))
    assert "or 7" in cut.wanted((8, 2))
    mean = table[:4].mean(0)
    wanted = np.concatenate([table[:4], [mean, mean], np.zeros((2, 2))])
    np.testing.assert_array_equal(cut.read(table, (8, 2), whole), wanted)  # added tokens start from the mean, not from surplus
    np.testing.assert_array_equal(AddedRows(4, 2, 3).read(table, (2, 2), whole), [mean, mean])
    trained = cut.read(table[:6], (8, 2), whole)
    np.testing.assert_array_equal(trained[:6], table[:6])  # rows that an adapter stored
    assert cut.write(wanted, None).shape == (6, 2)


def test_a_tokenizer_longer_than_the_tables(tmp_path):
    folder = copy_of("mistral_llava/llava_mistral_short", tmp_path / "x")
    edit(folder / "config.json", vocab_size=460)
    with pytest.raises(UserError, match="461 tokens, the model's tables 460 rows"):
        resolve(folder, tower=CLIP)
