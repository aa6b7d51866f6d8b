"""`jaxmed.load`: a run, upstream's folder, a plain language model; arrays, batches, meshes."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

import jaxmed
from jaxmed.checkpoint.manager import named, newest, restore_part
from jaxmed.cli.main import run as command
from jaxmed.config import MeshConfig
from jaxmed.data.conversation import encode_prompt
from jaxmed.errors import UserError
from jaxmed.sharding import make_mesh

GOLDEN = Path(__file__).parent / "golden" / "btb3d"
ADAPTER, BASE = str(GOLDEN / "llava_lora_z2" / "checkpoint-16"), str(GOLDEN / "base")
IMAGE = str(GOLDEN / "embeddings" / "valid_21_a_2.nii_embedded.npz")
QUESTION = "Write the radiology report for the following CT.\n<image>"


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def model():
    return jaxmed.load(ADAPTER, base=BASE, mesh=one_device(), dtype="float32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two steps from upstream's adapter."""
    run = tmp_path_factory.mktemp("run") / "run"
    flags = ["--model.base", BASE, "--model.adapter", ADAPTER, "--model.dtype", "float32", "--out", str(run)]
    flags += ["--data.records", str(GOLDEN / "records.json"), "--data.embeddings", str(GOLDEN / "embeddings")]
    flags += ["--data.batch", "8", "--data.buckets", "384", "--train.steps", "2", "--optim.learning-rate", "0.01"]
    assert command(["train", "btb3d", *flags]) == 0
    return run


def test_a_path_an_array_and_an_array_without_its_batch_axis_are_one_image(model):
    array = np.load(IMAGE, allow_pickle=False)["arr"]
    tokens = [model.preprocess(x) for x in (IMAGE, array, array[0])]
    assert tokens[0].shape == (30, 18)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    np.testing.assert_array_equal(tokens[0], tokens[2])
    np.testing.assert_array_equal(model.image_features([array])[0], tokens[0])


def test_an_image_without_a_place_goes_in_front(model):
    placed = model.prompt(IMAGE, "<image>\nIs it normal?")
    np.testing.assert_array_equal(model.prompt(IMAGE, "Is it normal?").ids, placed.ids)


def test_what_is_generated_does_not_depend_on_the_batch(model):
    prompts = [QUESTION, "What is a hernia?", "<image>\nIs it normal?"]
    images = [IMAGE, None, np.load(IMAGE, allow_pickle=False)["arr"]]
    together = model.generate(images, prompts, max_new_tokens=12)
    alone = [model.generate([i], [p], max_new_tokens=12, batch=1)[0] for i, p in zip(images, prompts, strict=True)]
    assert together == alone
    assert together[0].finish_reason == "stop" and together[0].token_ids[-1] in model.tokenizer.eos_ids
    assert together[0].text == "Normal.", "no end token in the text"


def test_the_default_dtype_generates_too():
    """bfloat16, where several rows are decoded together and where one is alone."""
    half = jaxmed.load(ADAPTER, base=BASE, mesh=one_device())
    assert half.experiment.model.dtype == "bfloat16"
    together = half.generate([IMAGE, None], [QUESTION, "What is a hernia?"], max_new_tokens=6)
    alone = half.generate([IMAGE], [QUESTION], max_new_tokens=6, batch=1)
    assert together[0].text == alone[0].text == "Normal."
    records = json.loads((GOLDEN / "records_batch.json").read_text())
    assert half.loss(records, embeddings=str(GOLDEN / "embeddings")).loss == pytest.approx(7.455, rel=0.02)


def test_a_mesh_changes_nothing(model):
    wide = jaxmed.load(ADAPTER, base=BASE, mesh=make_mesh(MeshConfig(data=4), jax.devices()[:4]), dtype="float32")
    for ours, theirs in zip(wide.logits([IMAGE], [QUESTION]), model.logits([IMAGE], [QUESTION]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    records = json.loads((GOLDEN / "records_batch.json").read_text())
    folder = str(GOLDEN / "embeddings")
    assert wide.loss(records, embeddings=folder).loss == pytest.approx(model.loss(records, embeddings=folder).loss, rel=1e-6)


def test_a_records_image_may_be_a_path(model):
    records = json.loads((GOLDEN / "records_batch.json").read_text())
    by_name = model.loss(records, embeddings=str(GOLDEN / "embeddings"))
    by_path = model.loss([{**r, "image": str(GOLDEN / "embeddings" / r["image"])} for r in records])
    assert by_path.loss == by_name.loss and by_path["token_count"] == 93


def test_nothing_supervised_costs_nothing(model):
    voided = [r for r in json.loads((GOLDEN / "records_edge.json").read_text()) if r["id"] == "empty_answer"]
    assert model.tokens(voided)[0].voided
    result = model.loss(voided, gradients=True, embeddings=str(GOLDEN / "embeddings"))
    assert result.loss == 0 and result.token_count == 0
    assert len(result.gradients) == 60 and not any(g.any() for g in result.gradients.values())


def test_what_is_cut_off_costs_nothing():
    """The answers lie behind the cut once the image is in; before it, they do not."""
    folder, base = GOLDEN / "llava_lora_z2/checkpoint-16", GOLDEN / "base"
    short = jaxmed.load(folder, base=base, dtype="float32", overrides={"data.max_length": 130})
    records = json.loads((GOLDEN / "records_batch.json").read_text())[:1]
    assert not short.tokens(records)[0].voided
    result = short.loss(records, embeddings=str(GOLDEN / "embeddings"))
    assert (result.loss, result.token_count, result.token_accuracy) == (0, 0, 0)


def test_a_run_gives_the_answers_of_its_last_step(trained, model):
    again = jaxmed.load(str(trained), mesh=one_device(), dtype="float32")
    ours, theirs = again.logits([IMAGE], [QUESTION])[0], model.logits([IMAGE], [QUESTION])[0]
    assert np.abs(ours - theirs).max() > 1e-3, "two steps changed the model"
    with jax.set_mesh(again.mesh):
        held = named(again._halves[0])
    saved = restore_part(str(trained), newest(str(trained)), held)
    assert saved.keys() == held.keys()
    for name, value in held.items():
        np.testing.assert_array_equal(value, saved[name], err_msg=name)


def test_a_run_refuses_another_base(trained, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(BASE, other)
    (other / "model-00002-of-00004.safetensors").chmod(0o644)
    with (other / "model-00002-of-00004.safetensors").open("r+b") as file:
        file.seek(-40, 2)
        file.write(b"\x01" * 8)
    with pytest.raises(UserError, match="other weights than those of"):
        jaxmed.load(str(trained), base=str(other))
    with pytest.raises(UserError, match="not on this machine"):
        jaxmed.load(str(trained), base=str(tmp_path / "nowhere"))


def test_a_plain_language_model_writes_what_transformers_writes():
    ours = jaxmed.load(BASE, mesh=one_device(), dtype="float32")
    theirs = transformers.LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    prompts = ["What is a hernia?", "And the bones? Are there enlarged lymph nodes?"]
    for prompt, made in zip(prompts, ours.generate([None, None], prompts, max_new_tokens=20), strict=True):
        ids = torch.tensor(encode_prompt([("human", prompt), ("gpt", None)], ours.tokenizer, "llama3"))[None].long()
        wanted = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0
        )
        assert made.token_ids == wanted[0, ids.shape[1] :].tolist()


def test_what_no_file_stores_can_be_overridden(model):
    flat = jaxmed.load(ADAPTER, base=BASE, mesh=one_device(), dtype="float32", overrides={"lora.alpha": "3"})
    assert flat.experiment.lora.alpha == 3.0
    assert np.abs(flat.logits([IMAGE], [QUESTION])[0] - model.logits([IMAGE], [QUESTION])[0]).max() > 1e-3
    with pytest.raises(UserError, match=r"lora.alpha is 'abc'; a number"):
        jaxmed.load(ADAPTER, base=BASE, overrides={"lora.alpha": "abc"})
    with pytest.raises(UserError, match=r"no config field 'lora.alpa'"):
        jaxmed.load(ADAPTER, base=BASE, overrides={"lora.alpa": 3})


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"folder": "nowhere"}, "no such folder"),
        ({"folder": ADAPTER, "base": BASE, "tower": "clip"}, "without an image tower"),
        ({"folder": str(GOLDEN / "llava_lora_z2")}, "checkpoint-16"),
    ],
)
def test_unusable_folders_are_told_in_one_line(kwargs, words):
    with pytest.raises(UserError, match=words) as caught:
        jaxmed.load(**kwargs)
    assert "\n" not in str(caught.value)


def test_wrong_calls_are_told(model):
    with pytest.raises(UserError, match="2 images for 1 prompts"):
        model.generate([IMAGE, None], ["a"])
    with pytest.raises(UserError, match="1 <image> and 0 images"):
        model.generate([None], ["<image> a"])
    with pytest.raises(UserError, match="floating point"):
        model.preprocess(np.zeros((18, 2, 3, 4), np.int64))
