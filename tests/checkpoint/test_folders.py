"""Folders are known by their files and tensors; upstream's LoRA folders give a whole experiment; variants are refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jaxmed.checkpoint.export_config import adapter_config, fresh_config
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.folders import BTB3D_TOKENS, added_tokens, llava_experiment, lora_config
from jaxmed.checkpoint.hf_config import decoder_config, decoder_of
from jaxmed.config import DataConfig, Experiment, LoraConfig, ModelConfig, OptimConfig, RopeConfig, VisualConfig, to_json
from jaxmed.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"
BASE = str(GOLDEN / "base")
Z2 = GOLDEN / "llava_lora_z2" / "checkpoint-16"
DEFAULTS = Experiment(
    model=ModelConfig(decoder=dataclasses.replace(decoder_of(BASE), layers=9), dtype="float32"),
    visual=VisualConfig(tokens=321, norm=True, positions=True),
    optim=OptimConfig(learning_rate=0.125),
    data=DataConfig(batch=6),
)


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        shutil.copyfile(file, to / file.name)  # without the read-only mode
    return to


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def test_every_kind(tmp_path):
    assert detect(BASE) == "hf"
    for folder in GOLDEN.glob("llava_lora_*/*"):
        assert detect(str(folder)) == "llava_lora"
    plain = copy_of(Z2, tmp_path / "llava_lora_by_name_alone")
    (plain / "non_lora_trainables.bin").unlink()
    (plain / "config.json").unlink()
    assert detect(str(plain)) == "peft"
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(to_json(DEFAULTS))
    assert detect(str(run)) == "run"
    aligned = tmp_path / "aligned"
    aligned.mkdir()
    torch.save({"model.mm_projector.proj.0.weight": torch.zeros(2)}, aligned / "mm_projector.bin")
    (aligned / "config.json").write_text((Z2 / "config.json").read_text())
    assert detect(str(aligned)) == detect(str(aligned / "mm_projector.bin")) == "mm_projector"
    one = tmp_path / "one"
    one.mkdir()
    save_file({"model.embed_tokens.weight": torch.zeros(2)}, one / "model.safetensors")
    (one / "config.json").write_text((GOLDEN / "base" / "config.json").read_text())
    assert detect(str(one)) == "hf"
    with pytest.raises(UserError, match="single file"):
        detect(str(one / "model.safetensors"))


def test_unknown_folders_say_what_is_known(tmp_path):
    with pytest.raises(UserError, match=r"none of a run of jaxmed.*adapter_config\.json.*mm_projector\.bin"):
        detect(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        detect(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="checkpoint-16"):
        detect(str(GOLDEN / "llava_lora_z2"))
    (tmp_path / "config.json").write_text(to_json(DEFAULTS))
    with pytest.raises(UserError, match="no checkpoint yet"):
        detect(str(tmp_path))


@pytest.mark.parametrize(
    ("folder", "rank", "alpha", "features", "merge", "table"),
    [
        ("llava_lora_z2/checkpoint-16", 7, 12.0, 18, (1, 1, 1), False),
        ("llava_lora_z3/checkpoint-10", 3, 7.0, 18, (1, 1, 1), True),
        ("llava_lora_8x8x8/checkpoint-9", 4, 6.0, 72, (1, 2, 2), False),
    ],
)
def test_upstream_experiment(folder, rank, alpha, features, merge, table):
    path = str(GOLDEN / folder)
    experiment = llava_experiment(path, BASE, DEFAULTS)
    assert experiment.model.decoder == decoder_of(BASE)  # 432 rows, not the adapter's 437; 4 layers, not the default's 9
    assert (experiment.model.base, experiment.model.adapter, experiment.model.tokenizer) == (BASE, path, path)
    assert experiment.model.added_tokens == BTB3D_TOKENS[:5]
    assert experiment.model.projector.kind == "attn_pool+mlp2x_gelu" and not experiment.model.projector.pooled
    assert experiment.lora == LoraConfig(rank=rank, alpha=alpha, dropout=0.05)
    visual = experiment.visual
    assert (visual.features, visual.merge, visual.file_features, visual.tokens) == (features, merge, 18, 321)
    assert not visual.norm and not visual.positions
    assert experiment.train.train_embed_tokens == table
    assert (experiment.optim, experiment.data, experiment.model.dtype) == (DEFAULTS.optim, DEFAULTS.data, "float32")


def test_base_named_by_the_adapter(tmp_path, monkeypatch):
    folder = copy_of(Z2, tmp_path / "x")
    with pytest.raises(UserError, match=r"'base' is not on this machine.*--base"):
        llava_experiment(str(folder), "", DEFAULTS)
    monkeypatch.chdir(GOLDEN)
    assert llava_experiment(str(folder), "", DEFAULTS).model.base == "base"


def test_pool_in_use_is_told_by_its_tensors(tmp_path):
    folder = copy_of(Z2, tmp_path / "x")
    tensors = torch.load(folder / "non_lora_trainables.bin")
    tensors["base_model.model.model.mm_projector.attn_pool.query"] = torch.zeros(11, 18)
    torch.save(tensors, folder / "non_lora_trainables.bin")
    projector = llava_experiment(str(folder), BASE, DEFAULTS).model.projector
    assert projector.pooled and projector.pool_queries == 11


def test_another_base_is_refused(tmp_path):
    other = copy_of(GOLDEN / "base", tmp_path / "other")
    edit(other / "config.json", rope_theta=30000.0, rms_norm_eps=1e-5)
    with pytest.raises(UserError, match=r"norm_eps 3e-05 against 1e-05, rope .*20000.*against.*30000"):
        llava_experiment(str(Z2), str(other), DEFAULTS)


def test_added_tokens(tmp_path):
    assert added_tokens(str(Z2), 432, 437) == BTB3D_TOKENS[:5]
    with pytest.raises(UserError, match=r"config\.json counts 438"):
        added_tokens(str(Z2), 432, 438)
    with pytest.raises(UserError, match=r"ids \[433"):
        edit(copy_of(Z2, tmp_path / "x") / "tokenizer.json", added_tokens=[{"id": 433, "content": "<a>"}])
        added_tokens(str(tmp_path / "x"), 432, 433)
    (tmp_path / "x" / "tokenizer.json").unlink()
    assert added_tokens(str(tmp_path / "x"), 432, 437) == BTB3D_TOKENS[:5]
    assert added_tokens(str(tmp_path / "x"), 432, 438) == BTB3D_TOKENS
    assert added_tokens(str(tmp_path / "x"), 432, 432) == ()
    for count in (431, 439):
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            added_tokens(str(tmp_path / "x"), 432, count)


def test_rslora_is_written_as_plain_lora(tmp_path):
    """Its scale is in alpha then; a reader that applied it again would be wrong by the root of the rank."""
    folder = tmp_path / "x"
    shutil.copytree(Z2, folder)
    settings = json.loads((Z2 / "adapter_config.json").read_text()) | {"use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    experiment = llava_experiment(str(folder), BASE, DEFAULTS)
    written = adapter_config(experiment, str(folder))
    assert (written["use_rslora"], written["r"], written["lora_alpha"]) == (False, 7, pytest.approx(12 * 7**0.5))
    assert lora_config(written, "d") == experiment.lora


def test_rope_settings_come_back():
    for rope in (RopeConfig(321.0, "linear", factor=2.5), RopeConfig(321.0, "llama3", 5.0, 1.5, 3.0, 96), RopeConfig(99.0)):
        decoder = dataclasses.replace(decoder_of(BASE), rope=rope)
        assert decoder_config(fresh_config(decoder) | {"vocab_size": decoder.vocab}, "c").rope == rope


def test_adapter_settings():
    adapter = json.loads((Z2 / "adapter_config.json").read_text())
    assert lora_config(adapter | {"target_modules": ["model.layers.0.mlp.up_proj", "v_proj"]}, "d").targets == ("v", "up")
    assert lora_config(adapter | {"lora_dropout": 0.25, "lora_alpha": 9}, "d") == LoraConfig(7, 9.0, 0.25)
    pattern = {"target_modules": r".*\.(self_attn|mlp)\.\w+"}
    assert lora_config(adapter | pattern, str(Z2)) == lora_config(adapter, "d")
    assert lora_config(adapter | {"use_rslora": True}, "d").alpha == pytest.approx(12 * 7**0.5)
    for change, word in [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"r": None}, "no r"),
    ]:
        with pytest.raises(UserError, match=word) as error:
            lora_config(adapter | change, "DIR")
        assert "DIR/adapter_config.json" in str(error.value) and "\n" not in str(error.value)


def test_features_are_needed(tmp_path):
    folder = copy_of(Z2, tmp_path / "x")
    edit(folder / "config.json", mm_hidden_size="absent")
    with pytest.raises(UserError, match="mm_hidden_size"):
        llava_experiment(str(folder), BASE, DEFAULTS)
    edit(folder / "config.json", mm_hidden_size=24)
    visual = llava_experiment(str(folder), BASE, DEFAULTS).visual
    assert (visual.features, visual.merge) == (24, (1, 1, 1))
    assert np.prod(visual.merge) * visual.file_features == 24
