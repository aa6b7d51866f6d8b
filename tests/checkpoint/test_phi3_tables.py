"""Phi-3's fused matrices: split into ours and joined again to the bit, with adapters and without; strict both ways."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from small_runs import run_from_scratch, save_run
from tiny_llama import decoder_abstract
from tiny_phi3 import LONGROPE, SIZES, save_phi3
from transformers import AutoModelForCausalLM, Phi3Config

import jaxmed
from jaxmed.api import resolve
from jaxmed.checkpoint.decoder_tables import decoder_rows, lora_rows, peft_modules
from jaxmed.checkpoint.export import plan_export
from jaxmed.checkpoint.export_folder import write_export
from jaxmed.checkpoint.hf_config import decoder_of
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.load import read_params
from jaxmed.checkpoint.names import PEFT_PREFIX
from jaxmed.config import Experiment, LoraConfig, MeshConfig, ModelConfig, RopeConfig, TrainConfig, VisualConfig
from jaxmed.errors import UserError

MODULES = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def convert(source: Path, to: str, out: Path, base: str = "", **overrides) -> Path:
    experiment = resolve(str(source), base, "float32", overrides)
    write_export(plan_export(experiment, to, ""), str(source), str(out), 5 * 10**9, MeshConfig(), lambda text: None)
    return out


def assert_bits_equal(one: Path, two: Path) -> None:
    a, b = (open_folder(str(folder)).arrays for folder in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


def logits(model: torch.nn.Module, length: int) -> np.ndarray:
    ids = torch.from_numpy(np.random.default_rng(3).integers(3, 331, (1, length)))
    with torch.no_grad():
        return model(ids).logits[0].numpy()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phi3") / "base"
    save_phi3(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phi3") / "adapter"
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=MODULES, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    adapted.save_pretrained(folder)
    np.save(folder / "logits.npy", logits(adapted, 19))
    return folder


def test_names_are_those_of_transformers_and_peft(base, adapter):
    decoder = decoder_of(str(base))
    theirs = open_folder(str(base)).names()
    rows = decoder_rows(decoder)
    assert {name for row in rows for name in row.names()} == set(theirs)
    adapters = lora_rows(LoraConfig(rank=3), decoder)
    found = {f"{PEFT_PREFIX}{name}" for row in adapters for name in row.names()}
    assert found == set(load_file(adapter / "adapter_model.safetensors")) and len(found) == 2 * 4 * 2
    some = LoraConfig(rank=3, targets=("gate", "up", "o"))
    assert peft_modules(decoder, some.targets) == ["o_proj", "gate_up_proj"]
    assert not any("qkv" in row.theirs or "down" in row.theirs for row in lora_rows(some, decoder))


@pytest.mark.parametrize("split", [False, True])
def test_rows_of_the_fused_matrices(base, split):
    decoder, abstract = decoder_abstract(base, split)
    params = read_params(decoder_rows(decoder), [open_folder(str(base))], abstract)
    theirs = load_file(base / "model.safetensors")
    qkv, gate_up = (theirs[f"model.layers.1.{name}.weight"] for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"))
    blocks = params["decoder"]["blocks"]
    block = blocks[1] if split else jax.tree.map(lambda x: x[1], blocks)
    for name, rows in {"q": slice(0, 60), "k": slice(60, 80), "v": slice(80, 100)}.items():
        np.testing.assert_array_equal(block["attn"][name]["weight"], qkv[rows])
    for name, rows in {"gate": slice(0, 57), "up": slice(57, 114)}.items():
        np.testing.assert_array_equal(block["mlp"][name]["weight"], gate_up[rows])


def spoilt(base: Path, folder: Path, change) -> Path:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.0.self_attn.qkv_proj.weight"), ("layers.0.self_attn.qkv_proj.weight is missing", "100")),
        (
            lambda t: t.update({"model.layers.1.mlp.gate_proj.weight": np.zeros((57, 60), np.float32)}),
            ("no place", "gate_proj"),
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.gate_up_proj.weight": np.zeros((113, 60), np.float32)}),
            ("[113, 60]", "[114, 60]"),
        ),
    ],
)
def test_strict_both_ways(base, tmp_path, change, words):
    folder = spoilt(base, tmp_path / "spoilt", change)
    decoder, abstract = decoder_abstract(folder)
    with pytest.raises(UserError) as error:
        read_params(decoder_rows(decoder), [open_folder(str(folder))], abstract)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), "said once, not once a part"


@pytest.mark.parametrize("longrope", [False, True])
def test_hf_folder_comes_back_to_the_bit(tmp_path, longrope):
    changes = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 20} if longrope else {}
    save_phi3(tmp_path / "source", torch.bfloat16, **changes)
    out = convert(tmp_path / "source", "hf", tmp_path / "out")
    assert_bits_equal(out, tmp_path / "source")
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (out, tmp_path / "source"))
    assert ours == theirs and ours["architectures"] == ["Phi3ForCausalLM"]


def test_adapter_comes_back_to_the_bit_and_merges(base, adapter, tmp_path):
    assert_bits_equal(convert(adapter, "peft", tmp_path / "back", str(base)), adapter)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], set(config["target_modules"])) == (3, 7, set(MODULES))
    merged = AutoModelForCausalLM.from_pretrained(convert(adapter, "hf", tmp_path / "merged", str(base)))
    want = np.load(adapter / "logits.npy")
    assert np.abs(want - logits(AutoModelForCausalLM.from_pretrained(base), 19)).max() > 0.1
    np.testing.assert_allclose(logits(merged, 19), want, atol=1e-4)


def test_adapter_of_a_part_of_the_modules(base, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["gate_up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(tmp_path / "adapter")
    experiment = resolve(str(tmp_path / "adapter"), str(base), "float32", {})
    assert experiment.lora.targets == ("gate", "up")
    assert_bits_equal(convert(tmp_path / "adapter", "peft", tmp_path / "back", str(base)), tmp_path / "adapter")
    with pytest.raises(UserError, match="gate of gate, up, which are one matrix"):
        convert(tmp_path / "adapter", "peft", tmp_path / "never", str(base), **{"lora.targets": ("gate",)})


def test_run_with_adapters_is_the_same_model_everywhere(base, tmp_path):
    """Loaded here, as PEFT's adapter over the base, and merged."""
    experiment = Experiment(
        model=ModelConfig(decoder=decoder_of(str(base)), base=str(base), dtype="float32"),
        visual=VisualConfig(kind="none", images=0, tokens=0),
        lora=LoraConfig(rank=3, alpha=0.7, dropout=0.0),
        train=TrainConfig(steps=1),
    )
    saved = save_run(tmp_path / "run", experiment)
    assert saved["decoder/blocks/attn/qkv/lora_a"].shape == (2, 3, 60) and "decoder/blocks/attn/q/lora_a" not in saved
    ids = np.random.default_rng(3).integers(3, 331, (1, 19))
    ours = jaxmed.load(str(tmp_path / "run"), dtype="float32").logits([None], [ids[0]])[0]
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert np.abs(logits(plain, 19) - ours).max() > 0.1
    adapted = peft.PeftModel.from_pretrained(plain, convert(tmp_path / "run", "peft", tmp_path / "peft"))
    np.testing.assert_allclose(logits(adapted, 19), ours, atol=2e-4)
    merged = AutoModelForCausalLM.from_pretrained(convert(tmp_path / "run", "hf", tmp_path / "hf"))
    np.testing.assert_allclose(logits(merged, 19), ours, atol=2e-4)


def test_model_trained_from_scratch(tmp_path):
    rope = RopeConfig(2345.0, "longrope", original_positions=40, short_factors=(1.0, 1.5, 2.0), long_factors=(2.0, 5.0, 9.0))
    rope = dataclasses.replace(rope, attention_factor=1.375)
    run_from_scratch(tmp_path / "run", {"fused": True, "window": 23, "head_dim": 6, "rope": rope})
    out = convert(tmp_path / "run", "hf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert isinstance(model.config, Phi3Config) and model.config.sliding_window == 23
    decoder, again = resolve(str(tmp_path / "run"), "", "float32", {}).model.decoder, decoder_of(str(out))
    assert again == decoder
    ours = jaxmed.load(str(tmp_path / "run"), dtype="float32")
    for length in (40, 41):
        ids = np.random.default_rng(length).integers(0, 420, length)
        with torch.no_grad():
            want = model(torch.from_numpy(ids[None])).logits[0].numpy()
        np.testing.assert_allclose(ours.logits([None], [ids])[0], want, atol=3e-5 * np.abs(want).max())


def test_sizes_are_unusual():
    """Or parts of equal size would hide a wrong split."""
    assert SIZES["num_key_value_heads"] not in (1, SIZES["num_attention_heads"]) and SIZES["intermediate_size"] % 2
