"""M3D-LaMed's and SAMF's folders, merged and as training leaves them, give the golden cases' sizes and say what they assume."""

import dataclasses
import shutil

import pytest
import torch
from golden_folders import GOLDEN, case, check_tensors, copy_of, edit, resolve

from jaxmed.api import resolve as resolve_model
from jaxmed.checkpoint.export import plan_export
from jaxmed.checkpoint.export_folder import write_export
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.orbax_export import plan_native
from jaxmed.checkpoint.values import Values
from jaxmed.config import LORA_TARGETS, SHORT_NAMES, MeshConfig, replace_field
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import UserError


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
    for name, field in SHORT_NAMES.items():
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


def test_state_dict_of_unpublished_sizes(tmp_path):
    """Tensors hold products of a volume's and a patch's sides, never the sides."""
    folder = tmp_path / "output"
    folder.mkdir()
    tensors = torch.load(GOLDEN / "vit3d/lamed_lora/model_with_lora.bin")
    torch.save(tensors, folder / "model_with_lora.bin")
    with pytest.raises(UserError, match=r"published image side: a volume of \(32, 256, 256\) .*168 of 24"):
        resolve(folder, "vit3d/base", vision__heads=3)
    sizes = {"model.tower.image": "8,24,21", "model.tower.patch": (2, 4, 3), "vision.heads": 3}
    experiment, notices = resolve(folder, "vit3d/base", **sizes)
    whole, _ = resolve("vit3d/lamed_lora", "vit3d/base", vision__heads=3)
    assert (experiment.model.tower, experiment.visual) == (whole.model.tower, whole.visual)
    assert any("no config.json" in notice and "model.tower.image" in notice for notice in notices)
    other = sizes | {"model.tower.image": "8,12,42", "model.tower.patch": "2,2,6"}  # neither fits the published other one
    assert resolve(folder, "vit3d/base", **other)[0].visual.grid == (4, 6, 7)
    stem = "base_model.model.model.mm_projector."
    spp = {name for name in tensors if name.startswith(stem)}
    linear = {f"{stem}linear.{end}": tensors[f"{stem}projector.0.{end}"] for end in ("weight", "bias")}
    torch.save({n: t for n, t in tensors.items() if n not in spp} | linear, folder / "model_with_lora.bin")
    experiment, _ = resolve(folder, "vit3d/base", **sizes)
    assert (experiment.model.projector.kind, experiment.image_tokens) == ("linear", 168)
    check_tensors(experiment)


def test_tower_named_as_upstream_takes_it(tmp_path):
    folder = copy_of("vit3d/lamed_merged", tmp_path / "x")
    whole, _ = resolve("vit3d/lamed_merged", vision__heads=3)
    for name in ("M3D-ViT3D", None):
        edit(folder / "config.json", vision_tower=name)
        assert resolve(folder, vision__heads=3)[0].model.tower == whole.model.tower
    edit(folder / "config.json", image_size=[8, 24, 23])
    with pytest.raises(UserError, match=r"config\.json: volumes of \(8, 24, 23\) are no whole patches of \(2, 4, 3\)"):
        resolve(folder, vision__heads=3)


def test_shared_head_stands_twice_in_a_state_dict(tmp_path):
    """Upstream's merging script loads model_with_lora.bin strictly, and torch lists what two modules share under both."""
    folder = copy_of("vit3d/lamed_lora", tmp_path / "x")
    edit(folder / "config.json", tie_word_embeddings=True)
    tensors = torch.load(folder / "model_with_lora.bin")
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.model.embed_tokens.weight"]
    torch.save(tensors, folder / "model_with_lora.bin")
    plan = plan_export(resolve_model(str(folder), "", "float32", {"vision.heads": 3, "lora.alpha": 15}), "lamed")
    write_export(plan, str(folder), str(tmp_path / "out"), 10**9, MeshConfig(), lambda text: None)
    written = torch.load(tmp_path / "out" / "model_with_lora.bin")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_config_that_is_made_says_everything(tmp_path):
    """Of a model whose folder had none: other numbers a voxel, the class token, a head that is the embedding."""
    folder, base = tmp_path / "output", copy_of("vit3d/base", tmp_path / "base")
    folder.mkdir()
    edit(base / "config.json", tie_word_embeddings=True)
    edit(base / "generation_config.json", eos_token_id=[174, 9])
    tensors = torch.load(GOLDEN / "vit3d/lamed_lora/model_with_lora.bin")
    stem = "base_model.model.model.mm_projector."
    kept = {name: x for name, x in tensors.items() if not name.startswith((stem, "base_model.model.lm_head"))}
    linear = {f"{stem}linear.{end}": tensors[f"{stem}projector.0.{end}"] for end in ("weight", "bias")}
    torch.save(kept | linear, folder / "model_with_lora.bin")
    said = {"image": (8, 12, 21), "patch": (2, 2, 3), "channels": 2, "select_feature": "cls_patch", "heads": 3}
    first = resolve_model(str(folder), str(base), "float32", {f"model.tower.{name}": value for name, value in said.items()})
    assert (first.image_tokens, first.visual.channels) == (169, 2)
    write_export(plan_export(first, "lamed", merge=True), str(folder), str(tmp_path / "out"), 10**9, MeshConfig(), print)
    again = resolve_model(str(tmp_path / "out"), "", "float32", {"vision.heads": 3})
    assert (again.model.tower, again.model.projector, again.visual) == (first.model.tower, first.model.projector, first.visual)
    assert again.model.decoder.tied
    assert Tokenizer.from_folder(str(tmp_path / "out")).eos_ids == first.model.end_ids == (174, 9)
    check_tensors(again)


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


def test_positions_of_slices_are_added_to_a_published_folder_and_come_back(tmp_path):
    """They begin with zeros, so nothing changes; trained ones are in the folder that is written, which says so by itself."""
    one, learned = (
        resolve_model(str(GOLDEN / "samf" / "samf_merged"), "", "float32", {"slice_encoder.heads": 5, **more})
        for more in ({}, {"model.aggregator.slice_pos": "learned"})
    )
    values = Values(learned)
    fresh = [path for path in values.shapes if not values.stored(path)]
    assert fresh == [("aggregator", "positions")] and values.shapes[fresh[0]].shape == (24, 40)
    assert set(Values(one).shapes) == set(values.shapes) - set(fresh)
    plan = plan_native(learned, None, False)
    assert any("aggregator/positions" in note for note in plan.notes)
    write_export(plan, str(GOLDEN / "samf" / "samf_merged"), str(tmp_path / "own"), 0, MeshConfig(), lambda text: None)
    own = resolve_model(str(tmp_path / "own"), "", "float32", {})
    plan = plan_export(own, "samf")
    assert any("positions of slices are ours" in note for note in plan.notes)
    write_export(plan, str(tmp_path / "own"), str(tmp_path / "samf"), 10**9, MeshConfig(), lambda text: None)
    again, _ = resolve(tmp_path / "samf", vision__heads=5)
    assert again.model.aggregator.slice_pos == "learned" and again.visual.slices == 24
    held = open_folder(str(tmp_path / "samf")).arrays["model.mm_projector.slice_positions"]
    assert held.shape == (24, 40) and not held.any()
