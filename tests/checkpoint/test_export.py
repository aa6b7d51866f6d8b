"""Exports are read by the libraries they are for, to the bit or to the same logits; what cannot be written leaves nothing."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from small_runs import BASE, GOLDEN, ROPE, golden_experiment, run_from_scratch, save_run, train
from tiny_llama import save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

import jaxmed
from jaxmed.api import resolve
from jaxmed.checkpoint import manager
from jaxmed.checkpoint.export import plan_export
from jaxmed.checkpoint.export_folder import sha256, write_export
from jaxmed.checkpoint.export_plan import TABLE
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.folders import BTB3D_TOKENS
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.values import Values
from jaxmed.config import MeshConfig
from jaxmed.errors import UserError

UPSTREAM = {
    "zero2": "llava_lora_z2/checkpoint-16",
    "zero3": "llava_lora_z3/checkpoint-10",
    "m72": "llava_lora_8x8x8/checkpoint-9",
}
PROMPTS = ["Is there a nodule?", "Describe the lungs in detail.", "a", "The report, please.\nBriefly"]
IMAGE = str(GOLDEN / "embeddings" / "valid_34_b_1.nii_embedded.npz")


def convert(source, to: str, out, base: str = "", dtype: str = "", shard_size: int = 5 * 10**9) -> Path:
    experiment = resolve(str(source), base, "float32", {})
    write_export(plan_export(experiment, to, dtype), str(source), str(out), shard_size, MeshConfig(), lambda text: None)
    return Path(out)


def tensors(folder) -> dict[str, np.ndarray]:
    return open_folder(str(folder)).arrays


def assert_bits_equal(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert array.dtype == two[name].dtype and array.shape == two[name].shape, name
        assert array.tobytes() == two[name].tobytes(), name


def torch_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(ids)[None]).long()).logits[0].float().numpy()


def checkpoint_arrays(run: Path) -> dict[str, np.ndarray]:
    with manager.ocp.StandardCheckpointer() as reader:
        path = run.absolute() / "checkpoints" / str(manager.newest(str(run))) / "trainable"
        return {name: np.asarray(x) for name, x in reader.restore(path).items()}


pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "two-steps")


@pytest.fixture(scope="module")
def trained(run):
    return jaxmed.load(str(run), dtype="float32")


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory) -> Path:
    """In shards; the base is a copy that has a chat template."""
    folder = tmp_path_factory.mktemp("hf")
    base = shutil.copytree(BASE, folder / "base", copy_function=shutil.copyfile)
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    return convert(run, "hf", folder / "merged", str(base), shard_size=40_000)


# -- upstream's layout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UPSTREAM)
def test_upstream_folder_comes_back_to_the_bit(name, tmp_path):
    source = GOLDEN / UPSTREAM[name]
    out = convert(source, "llava", tmp_path / "out", BASE)
    assert_bits_equal(tensors(out), tensors(source))
    for file in ("config.json", "adapter_config.json"):
        assert json.loads((out / file).read_text()) == json.loads((source / file).read_text())
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    ours, theirs = (torch.load(f / "non_lora_trainables.bin", weights_only=True) for f in (out, source))
    assert list(ours) and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert ("base_model.model.model.embed_tokens.weight" in ours) == (name == "zero3")
    again, first = (resolve(str(folder), BASE, "float32", {}) for folder in (out, source))
    assert dataclasses.replace(again.model, adapter="", tokenizer="") == dataclasses.replace(
        first.model, adapter="", tokenizer=""
    )
    assert (again.visual, again.lora, again.train) == (first.visual, first.lora, first.train)


def test_run_in_upstreams_layout_is_the_same_model(run, trained, tmp_path):
    out = convert(run, "llava", tmp_path / "out")
    assert detect(str(out)) == "llava_lora"
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == 437 and config["model_type"] == "llava_llama" and config["mm_hidden_size"] == 18
    one, two = (Values(resolve(str(folder), BASE, "float32", {"visual.tokens": 30})) for folder in (out, run))
    assert one.shapes.keys() == two.shapes.keys()
    for path in one.shapes:
        for layer in range(4 if path[1] == "blocks" else 1):
            rows = slice(432) if path == TABLE else slice(None)  # those after them are overlaid
            np.testing.assert_array_equal(one.read(path, layer)[rows], two.read(path, layer)[rows], err_msg=str(path))
    again = jaxmed.load(str(out), base=BASE, dtype="float32", overrides={"visual.tokens": 30})
    prompt = "<image>\nWhat about <report_generation> here?"
    got, want = (model.logits([IMAGE], [prompt])[0] for model in (again, trained))
    np.testing.assert_allclose(got, want, atol=2e-5)
    embed = torch.load(out / "non_lora_trainables.bin", weights_only=True)["base_model.model.model.embed_tokens.weight"]
    np.testing.assert_array_equal(embed[432:].numpy(), checkpoint_arrays(run)["decoder/embed/added"])
    np.testing.assert_array_equal(embed[:432].numpy(), tensors(BASE)["model.embed_tokens.weight"])


def test_alignment_run_is_a_projector_alone(tmp_path):
    experiment = golden_experiment()
    experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, trainable="projector"))
    saved = save_run(tmp_path / "run", experiment)
    out = convert(tmp_path / "run", "llava", tmp_path / "out")
    assert detect(str(out)) == "mm_projector" and not (out / "adapter_config.json").exists()
    found = torch.load(out / "mm_projector.bin", weights_only=True)
    assert found.keys() == {f"model.mm_projector.proj.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    np.testing.assert_array_equal(found["model.mm_projector.proj.0.weight"].numpy(), saved["projector/layers/0/weight"])
    whole = tensors(convert(tmp_path / "run", "hf", tmp_path / "hf"))
    for name, array in tensors(BASE).items():  # adapters that were never trained are zero
        np.testing.assert_array_equal(whole[name][: len(array)], array)
    with pytest.raises(UserError, match="no LoRA adapter"):
        convert(tmp_path / "run", "peft", tmp_path / "peft")


# -- PEFT ------------------------------------------------------------------------------------------------------------------


def test_peft_loads_the_adapter_of_a_run(run, trained, tmp_path):
    out = convert(run, "peft", tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    ids = trained.prompt(None, PROMPTS[1]).ids
    without = torch_logits(plain, ids)
    model = peft.PeftModel.from_pretrained(plain, str(out)).eval()
    assert set(peft.get_peft_model_state_dict(model)) == set(load_file(out / "adapter_model.safetensors"))
    got, want = torch_logits(model, ids), trained.logits([None], [PROMPTS[1]])[0][:, :432]
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(got - without).max() > 0.1
    beside = {name.removeprefix("model.mm_projector."): x for name, x in load_file(out / "mm_projector.safetensors").items()}
    saved = checkpoint_arrays(run)
    assert set(beside) == {"proj.0.weight", "proj.0.bias", "proj.2.weight", "proj.2.bias"}
    np.testing.assert_array_equal(beside["proj.2.weight"].numpy(), saved["projector/layers/1/weight"])


def test_peft_gets_a_trained_table_without_added_rows(tmp_path):
    out = convert(GOLDEN / UPSTREAM["zero3"], "peft", tmp_path / "adapter", BASE)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), str(out)).eval()
    ours = jaxmed.load(str(GOLDEN / UPSTREAM["zero3"]), base=BASE, dtype="float32")
    ids = ours.prompt(None, PROMPTS[3]).ids
    np.testing.assert_allclose(torch_logits(model, ids), ours.logits([None], [PROMPTS[3]])[0][:, :432], atol=1e-4)
    manifest = json.loads((out / "manifest.json").read_text())
    assert "added tokens" in manifest["ignored"]["decoder/embed/added"]


# -- Hugging Face ----------------------------------------------------------------------------------------------------------


def load_hf(folder):
    """The model, with nothing missing, unexpected or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


def test_transformers_writes_what_the_run_writes(trained, merged):
    model = load_hf(merged)
    assert model.dtype == torch.float32 and model.config.vocab_size == 437
    for prompt, answer in zip(PROMPTS, trained.generate([None] * 4, PROMPTS, max_new_tokens=24), strict=True):
        ids = trained.prompt(None, prompt).ids
        made = model.generate(torch.from_numpy(ids[None]).long(), do_sample=False, max_new_tokens=24)[0, len(ids) :]
        assert made.tolist() == answer.token_ids
    assert set(model.generation_config.eos_token_id) == {422, 429, 430}
    ids = trained.prompt(None, PROMPTS[1]).ids
    np.testing.assert_allclose(torch_logits(model, ids), trained.logits([None], [PROMPTS[1]])[0], atol=1e-4)


def test_merged_folder_in_shards(merged, run):
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 10 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = {}
    for file in files:
        with safe_open(merged / file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = opened.keys()
            sizes |= {name: opened.get_tensor(name).nbytes for name in names}
            held = [sizes[name] for name in names]
            assert sum(held) <= 40_000 or len(held) == 1
    assert index["metadata"]["total_size"] == sum(sizes.values()) and sizes.keys() == index["weight_map"].keys()
    saved, embed = checkpoint_arrays(run), tensors(merged)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(embed[432:], saved["decoder/embed/added"])
    assert tensors(merged)["lm_head.weight"].shape == (437, 54)


def test_merged_tokenizer_knows_the_added_tokens(merged, trained):
    theirs = AutoTokenizer.from_pretrained(merged)
    text = "Any finding?<report_generation> Nodules<short_answe>"
    assert theirs(text).input_ids == trained.tokenizer.encode(text)
    assert len(set(theirs(text).input_ids) & set(range(432, 437))) == 2
    assert theirs.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False) == "Hello!"


def test_tied_base_with_an_adapter_of_peft(tmp_path):
    model = save_llama(tmp_path / "base", tie_word_embeddings=True)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "k_proj", "gate_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    out = convert(tmp_path / "adapter", "hf", tmp_path / "out", str(tmp_path / "base"))
    assert "lm_head.weight" not in tensors(out) and len(tensors(out)) == 29
    assert not (out / "tokenizer.json").exists()
    ids = np.random.default_rng(3).integers(0, 331, 19)
    np.testing.assert_allclose(torch_logits(load_hf(out), ids), torch_logits(adapted, ids), atol=1e-4)
    back = convert(tmp_path / "adapter", "peft", tmp_path / "back", str(tmp_path / "base"))
    assert_bits_equal(tensors(back), tensors(tmp_path / "adapter"))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_hf_folder_comes_back_to_the_bit(family, tmp_path):
    source = tmp_path / "source"
    if family == "llama":
        save_llama(source, torch.bfloat16)
    else:
        sizes = {"vocab_size": 301, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 6, "head_dim": 8}
        config = MistralConfig(**sizes, num_key_value_heads=3, intermediate_size=31, sliding_window=17, rms_norm_eps=4e-4)
        MistralForCausalLM(config).half().save_pretrained(source)
    out = convert(source, "hf", tmp_path / "out")
    assert_bits_equal(tensors(out), tensors(source))
    ids = np.random.default_rng(5).integers(0, 300, 31)
    one, two = (load_hf(folder) for folder in (out, source))
    assert one.dtype == two.dtype == (torch.bfloat16 if family == "llama" else torch.float16)
    np.testing.assert_array_equal(torch_logits(one, ids), torch_logits(two, ids))


@pytest.mark.parametrize(
    ("decoder", "added"),
    [({"tied": True, "rope": ROPE}, BTB3D_TOKENS[:3]), ({"window": 9, "rope": dataclasses.replace(ROPE, scaling="none")}, ())],
)
def test_model_trained_from_scratch(decoder, added, tmp_path):
    saved = run_from_scratch(tmp_path / "run", decoder, added)
    model = load_hf(convert(tmp_path / "run", "hf", tmp_path / "out"))
    assert model.config.model_type == ("mistral" if "window" in decoder else "llama")
    assert model.config.vocab_size == 432 + len(added) and model.config.bos_token_id == 421
    ours = jaxmed.load(str(tmp_path / "run"), dtype="float32")
    prompt = PROMPTS[1] + "".join(added)
    ids = ours.prompt(None, prompt).ids
    want = ours.logits([None], [prompt])[0]
    assert len(ids) > 20 and len(set(ids) & set(range(432, 440))) == len(added)
    np.testing.assert_allclose(torch_logits(model, ids), want, atol=3e-5 * np.abs(want).max())
    np.testing.assert_array_equal(model.model.embed_tokens.weight[:432].detach(), saved["decoder/embed/table"][:432])


def test_dtype_is_chosen(tmp_path):
    out = convert(GOLDEN / UPSTREAM["zero2"], "hf", tmp_path / "half", BASE, "float16")
    assert {x.dtype.name for x in tensors(out).values()} == {"float16"} and load_hf(out).dtype == torch.float16
    out = convert(GOLDEN / UPSTREAM["zero2"], "llava", tmp_path / "brain", BASE, "bfloat16")
    wanted = tensors(GOLDEN / UPSTREAM["zero2"])
    assert_bits_equal(tensors(out), {name: x.astype(ml_dtypes.bfloat16) for name, x in wanted.items()})


def test_merged_folder_has_the_dtype_of_its_base(tmp_path):
    base = convert(BASE, "hf", tmp_path / "base", dtype="bfloat16")
    experiment = resolve(str(GOLDEN / UPSTREAM["zero3"]), str(base), "float32", {})
    assert {t.dtype.name for t in plan_export(experiment, "hf").files["model.safetensors"]} == {"bfloat16"}  # embed_tokens too
    assert plan_export(experiment, "hf").documents["config.json"]["torch_dtype"] == "bfloat16"
    assert {t.dtype.name for t in plan_export(experiment, "llava").tensors} == {"float32"}


# -- the manifest ----------------------------------------------------------------------------------------------------------


def test_manifest_says_where_everything_came_from(merged, run):
    manifest = json.loads((merged / "manifest.json").read_text())
    base = str(merged.parent / "base")
    assert manifest["source"] == {"folder": str(run), "kind": "run"} and manifest["base"]["folder"] == base
    checkpoint = str(run / "checkpoints" / "2" / "trainable")
    assert manifest["projector"] == manifest["adapter"] == [checkpoint]
    hashed = manifest["files"]
    assert all(sha256(path) == entry["sha256"] for path, entry in hashed.items())
    assert {f"{base}/model-0000{i}-of-00004.safetensors" for i in range(1, 5)} <= hashed.keys()
    assert any(path.startswith(checkpoint) for path in hashed)
    rows = {row["theirs"]: row for row in manifest["tensors"]}
    assert rows.keys() == {*tensors(merged), *load_file(merged / "mm_projector.safetensors")}
    assert "13 / 5 * B A" in rows["model.layers.2.mlp.up_proj.weight"]["rule"]
    assert "merged" not in rows["model.layers.2.mlp.gate_proj.weight"]["rule"]  # no target of LoRA
    assert any("optimizer" in name for name in manifest["ignored"])


# -- what cannot be written ------------------------------------------------------------------------------------------------


def damaged_base(folder: Path, value: float) -> Path:
    arrays = {name: np.array(x) for name, x in tensors(BASE).items()}
    arrays["model.layers.3.mlp.down_proj.weight"][5, 7] = value
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text((Path(BASE) / "config.json").read_text())
    return folder


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, ""), (np.inf, "float32"), (1e6, "float16")])
def test_values_that_are_no_numbers_leave_nothing(value, dtype, tmp_path):
    source = damaged_base(tmp_path / "source", value)
    with pytest.raises(UserError, match=r"model\.layers\.3\.mlp\.down_proj\.weight"):
        convert(source, "hf", tmp_path / "out", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(BASE, "hf", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("to", "what"), [("peft", "no LoRA adapter"), ("llava", "no projector")])
def test_plain_language_model_has_no_adapter(to, what, tmp_path):
    with pytest.raises(UserError, match=what):
        convert(BASE, to, tmp_path / "out")


def test_model_trained_from_scratch_is_no_adapter(tmp_path):
    run_from_scratch(tmp_path / "run", {"rope": ROPE})
    for to in ("peft", "llava"):
        with pytest.raises(UserError, match="no base model"):
            convert(tmp_path / "run", to, tmp_path / "out")
