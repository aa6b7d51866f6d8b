"""Whole vision-language models written as others read them: the same bytes where the layout is the source's own, the same
logits and greedy ids in transformers' Llava, upstream's own merge where adapters are merged."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from golden_case import Case
from transformers import LlavaForConditionalGeneration

import jaxmed
from jaxmed.api import resolve
from jaxmed.checkpoint.export import plan_export
from jaxmed.checkpoint.export_folder import write_export
from jaxmed.checkpoint.export_plan import Plan
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.orbax_export import plan_native
from jaxmed.checkpoint.values import Values
from jaxmed.cli import convert as command
from jaxmed.config import MeshConfig
from jaxmed.errors import UserError
from jaxmed.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("compiled_quickly")
MISTRAL, TINY, LAMED, SAMF = (Case(name) for name in ("mistral_llava", "tinyllava", "vit3d", "samf"))
MISTRAL_BASE, MISTRAL_LORA, MISTRAL_TOWER = "llava_mistral_base", "llava_lora_mistral_tubes", "clip_small46"

SOURCES = {
    "mistral": (MISTRAL, MISTRAL_BASE, "llava", {}, {"tower": MISTRAL_TOWER}),
    "mistral_lora": (MISTRAL, MISTRAL_LORA, "llava", {}, {"base": MISTRAL_BASE, "tower": MISTRAL_TOWER}),
    "tinyllava": (TINY, "tinyllava_mini", "llava", {}, {"tower": "siglip_mini"}),
    "lamed_merged": (LAMED, "lamed_merged", "lamed", {"vision.heads": 3}, {}),
    "lamed_lora": (LAMED, "lamed_lora", "lamed", {"vision.heads": 3}, {}),
    "samf_merged": (SAMF, "samf_merged", "samf", {"vision.heads": 5}, {}),
    "samf_lora": (SAMF, "samf_lora", "samf", {"vision.heads": 5, "lora.alpha": 15}, {}),
    "ao2d_merged": (SAMF, "ao2d_merged", "samf", {}, {}),
}


def experiment_of(name: str):
    case, folder, _, overrides, beside = SOURCES[name]
    places = {key: case.path(value) for key, value in beside.items()}
    return resolve(case.path(folder), places.get("base", ""), "float32", overrides, places.get("tower", ""))


def write(plan: Plan, source: str, out: Path) -> Path:
    write_export(plan, source, str(out), 5 * 10**9, MeshConfig(), lambda text: None)
    return out


def export(name: str, out: Path, to: str = "", merge: bool = False, dtype: str = "") -> tuple[Path, Plan]:
    case, folder, own, _, _ = SOURCES[name]
    plan = plan_export(experiment_of(name), to or own, dtype, merge)
    return write(plan, case.path(folder), out), plan


def tensors(folder: Path | str) -> dict[str, np.ndarray]:
    return open_folder(str(folder)).arrays


# -- upstream's layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_folder_comes_back_to_the_bit(name, tmp_path):
    """The tower's later blocks and norms included, which are not computed with."""
    case, folder, *_ = SOURCES[name]
    out, plan = export(name, tmp_path / "out")
    ours, theirs = tensors(out), tensors(case.path(folder))
    assert ours.keys() == theirs.keys() and plan.notes == []
    for key, array in theirs.items():
        assert array.dtype == ours[key].dtype and array.shape == ours[key].shape, key
        assert array.tobytes() == ours[key].tobytes(), key
    for file in ("config.json", "adapter_config.json", "tokenizer.model", "tokenizer_config.json"):
        place = Path(case.path(folder, file))
        if place.exists():
            same = json.loads if file.endswith("json") else bytes
            assert same((out / file).read_bytes()) == same(place.read_bytes()), file
    assert detect(str(out)) == detect(case.path(folder))


@pytest.mark.parametrize(("adapters", "merged", "heads"), [("lamed_lora", "lamed_merged", 3), ("samf_lora", "samf_merged", 5)])
def test_merge_is_upstreams(adapters, merged, heads, tmp_path):
    """Upstream's merge scripts made one golden folder of the other."""
    out, plan = export(adapters, tmp_path / "out", merge=True)
    case, folder, *_ = SOURCES[merged]
    ours, theirs = tensors(out), tensors(case.path(folder))
    assert ours.keys() == theirs.keys()
    if adapters == "samf_lora":  # the alpha of the other is not the default
        for key, array in theirs.items():
            np.testing.assert_allclose(ours[key], array, atol=2e-6, rtol=1e-5, err_msg=key)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == json.loads(Path(case.path(folder, "config.json")).read_text())["architectures"]
    fused = next(tensor for tensor in plan.tensors if "self_attn.q" in tensor.name)
    assert "merged LoRA" in fused.rule


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("lamed_merged", "samf", "give --to lamed"),
        ("samf_merged", "lamed", "give --to samf"),
        ("mistral", "lamed", "give --to llava"),
        ("samf_merged", "llava", "give --to samf"),
        ("samf_merged", "peft", "no LoRA adapter"),
    ],
)
def test_layout_of_another_system_is_refused(name, to, words, tmp_path):
    with pytest.raises(UserError, match=words):
        export(name, tmp_path / "out", to)
    assert not any(tmp_path.iterdir())


def test_adapter_of_a_fused_decoder_for_peft(tmp_path):
    """One A for q, k and v, as Phi-3 has them in one matrix."""
    out, plan = export("samf_lora", tmp_path / "out", "peft")
    source = tensors(SAMF.path("samf_lora"))
    found = {key: x for key, x in tensors(out).items() if "lora" in key}
    assert len(found) == 2 * 2 * 4
    for key, array in found.items():
        np.testing.assert_array_equal(array, source[key.replace(".weight", ".default.weight")])
    config = json.loads((out / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert (config["r"], config["lora_alpha"]) == (6, 15) and "the image tower" in plan.ignored


# -- transformers' Llava -----------------------------------------------------------------------------------------------------


def load_hf(folder: Path) -> LlavaForConditionalGeneration:
    """Nothing missing, unexpected or of another shape."""
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


def inputs(model: LlavaForConditionalGeneration, ids: np.ndarray, pixels: np.ndarray) -> dict[str, torch.Tensor]:
    """Our ids with the image's place, as often as transformers wants it."""
    places = np.full(model.config.image_seq_length, model.config.image_token_id)
    spread = np.concatenate([places if i == -200 else [i] for i in ids])
    return {
        "input_ids": torch.from_numpy(spread[None]).long(),
        "pixel_values": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None],
    }


@torch.no_grad()
def test_merged_mistral_answers_in_transformers_as_upstream(tmp_path):
    out, _ = export("mistral_lora", tmp_path / "out", "hf")
    model = load_hf(out)
    config = model.config
    assert (config.image_token_id, config.text_config.vocab_size, config.vision_feature_layer) == (461, 512, -2)
    ours = MISTRAL.load(MISTRAL_LORA, base=MISTRAL_BASE, tower=MISTRAL_TOWER, overrides={"pad_grey": True})
    rows = MISTRAL.golden("generate_lora")
    last = []
    for row in rows:
        made = inputs(model, np.asarray(row["prompt_ids"]), ours.preprocess(MISTRAL.path(row["image"])))
        length = made["input_ids"].shape[1]
        assert length == row["sequence_length"]
        last.append(model(**made).logits[0, -1].numpy())
        answer = model.generate(**made, do_sample=False, max_new_tokens=MISTRAL.about["runs"]["lora"]["max_new_tokens"])
        assert answer[0, length:].tolist() == row["token_ids"], row["id"]
    MISTRAL.close("logits_last_lora", np.stack(last)[:, :461])
    assert not np.any(np.stack(last)[:, 461:].max(-1) > np.stack(last)[:, :461].max(-1))
    again = MISTRAL.load(str(out), overrides={"pad_grey": True})  # an absolute path stays as it is
    prompt = rows[0]["question"]
    got, want = (m.logits([MISTRAL.path(rows[0]["image"])], [prompt])[0] for m in (again, ours))
    np.testing.assert_allclose(got[:, :461], want, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("through", ["folder", "native"])
def test_siglip_in_transformers(through, tmp_path):
    """The native form has no later blocks and no norm after them: the tower is then written without."""
    source, name = experiment_of("tinyllava"), TINY.path("tinyllava_mini")
    if through == "native":
        native = write(plan_native(source, None, False), name, tmp_path / "native")
        source, name = resolve(str(native), "", "float32", {}), str(native)
    plan = plan_export(source, "hf")
    model = load_hf(write(plan, name, tmp_path / "out"))
    assert model.config.vision_config.num_hidden_layers == (5 if through == "folder" else 4)
    assert any("the source lacks" in note for note in plan.notes) == (through == "native")
    ours = TINY.load("tinyllava_mini", tower="siglip_mini")
    path, prompt = TINY.path("images", "wide_452x301.png"), "<image>\nWhat is shown?"
    want = ours.logits([path], [prompt])[0]
    made = inputs(model, ours.prompt(path, prompt).ids, ours.preprocess(path))
    got = model(**made).logits[0, :, : want.shape[1]].numpy()
    np.testing.assert_allclose(got, want, atol=2e-4)
    answer = model.generate(**made, do_sample=False, max_new_tokens=12)[0, len(want) :]
    assert answer.tolist() == ours.generate([path], [prompt], max_new_tokens=12)[0].token_ids


def test_tokenizer_and_processor_of_the_folder(tmp_path):
    out, _ = export("mistral", tmp_path / "out", "hf")
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    assert {"<image>": 461, "<pad>": 462}.items() <= {t["content"]: t["id"] for t in tokenizer["added_tokens"]}.items()
    settings = {name: json.loads((out / f"{name}_config.json").read_text()) for name in ("preprocessor", "processor")}
    assert settings["preprocessor"]["do_pad"] and settings["preprocessor"]["size"] == {"shortest_edge": 50}
    assert settings["processor"]["num_additional_image_tokens"] == 1
    assert "[INST] " in (out / "chat_template.jinja").read_text()
    assert resolve(str(out), "", "float32", {}).visual.pixels == experiment_of("mistral").visual.pixels


def test_llava_layout_of_another_source_has_its_tower_beside(tmp_path):
    hf, _ = export("mistral", tmp_path / "hf", "hf")
    out = write(plan_export(resolve(str(hf), "", "float32", {}), "llava"), str(hf), tmp_path / "llava")
    ours, theirs = tensors(out), tensors(MISTRAL.path(MISTRAL_BASE))
    assert ours.keys() == theirs.keys()
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key][:461] if key in tables else ours[key], array, err_msg=key)
    again = resolve(str(out), "", "float32", {})
    assert again.model.tower == experiment_of("mistral").model.tower and again.data.template == "mistral_instruct"
    beside, own = tensors(out / "vision_tower"), tensors(MISTRAL.path(MISTRAL_TOWER))
    assert {key.removeprefix("vision_model.") for key in beside} == {key.removeprefix("vision_model.") for key in own}


def test_parts_without_a_place_stand_beside_or_are_named(tmp_path):
    out, plan = export("samf_merged", tmp_path / "out", "hf")
    assert detect(str(out)) == "hf" and "38 tensors" in plan.ignored["the image tower"]
    beside = tensors(out / "mm_projector.safetensors")
    assert any(".mm_fusion." in key for key in beside) and any(".transformer_encoder." in key for key in beside)


# -- native form, verification -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["samf_lora", "lamed_merged"])
def test_native_form_holds_every_part(name, tmp_path):
    case, folder, *_ = SOURCES[name]
    source = experiment_of(name)
    out = write(plan_native(source, None, False), case.path(folder), tmp_path / "out")
    again, first = Values(resolve(str(out), "", "float32", {})), Values(source)
    assert again.shapes == first.shapes and again.experiment.lora == source.lora
    for path in first.shapes:
        layers = first.shapes[path].shape[0] if first.is_stacked(path) else 1
        for layer in range(layers):
            np.testing.assert_array_equal(again.read(path, layer), first.read(path, layer), err_msg=str(path))
    model = jaxmed.load(str(out), mesh=make_mesh(MeshConfig(), jax.devices()[:1]), dtype="float32")
    assert model.experiment.model.tower == source.model.tower and model.experiment.visual == source.visual


@pytest.fixture
def quiet_one_device(monkeypatch):
    """The command loads models on every device."""
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: one)


def test_conversion_is_verified_stage_by_stage(quiet_one_device, tmp_path, capsys):
    folders = ["--base", MISTRAL.path(MISTRAL_BASE), "--tower", MISTRAL.path(MISTRAL_TOWER)]
    assert command.run([MISTRAL.path(MISTRAL_LORA), "--to", "hf", "--out", str(tmp_path / "out"), *folders]) == 0
    said = capsys.readouterr().err
    stages = ["tower", "projector", "decoder", "adapters apart against merged"]
    stages += [f"{stage} in transformers" for stage in stages[:3]]
    assert [line.split(": ")[1] for line in said.splitlines() if line.startswith("verified")] == stages


def damaged(part: tuple[str, ...], by: float) -> Callable:
    """A reader of parameters that gets one of them wrong."""
    read = Values.read

    def wrong(self: Values, path: tuple[str, ...], layer: int) -> np.ndarray:
        return read(self, path, layer) + (by if path == part else 0)

    return wrong


@pytest.mark.parametrize(
    ("part", "by", "dtype", "first"),
    [
        (("tower", "blocks", "mlp", "up", "bias"), 0.5, "float32", "tower"),
        (("decoder", "blocks", "mlp_norm", "scale"), 0.004, "float16", "decoder"),  # less than rounding to 16 bits may change
    ],
)
def test_wrong_stage_is_named_and_nothing_kept(part, by, dtype, first, quiet_one_device, tmp_path, monkeypatch):
    monkeypatch.setattr(Values, "read", damaged(part, by))
    with pytest.raises(UserError, match=f"computes something else: {first} differs"):
        flags = ["--to", "lamed", "--out", str(tmp_path / "out"), "--set", "vision.heads=3", "--dtype", dtype]
        command.run([LAMED.path("lamed_merged"), *flags])
    assert not any(tmp_path.iterdir())
