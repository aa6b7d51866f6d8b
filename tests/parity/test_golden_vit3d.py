"""Upstream's own numbers for M3D-LaMed and M3D-CLIP (tests/golden/vit3d) through jaxmed.load: tower, image tokens, logits,
greedy ids, a training batch, the contrastive model. Head counts and alpha stand in no file."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from golden_case import Case, norms
from safetensors.numpy import load_file, save_file

from jaxmed.data.placeholders import PLACEHOLDER
from jaxmed.data.records import Reading, Record, Turn, load_records
from jaxmed.errors import UserError

pytestmark = pytest.mark.usefixtures("compiled_quickly")
CASE = Case("vit3d")
PROMPTS = CASE.about["prompts"]
TWO_VOLUMES = CASE.asked([PROMPTS[0], PROMPTS[2]])[0]


@pytest.fixture(scope="module")
def merged():
    return CASE.load("lamed_merged", overrides={"vision.heads": 3})


@pytest.fixture(scope="module")
def adapted():
    """The state dict with adapters in it, at the training's length."""
    given = {"vision.heads": 3, "lora.alpha": CASE.about["runs"]["lora"]["lora_alpha"]}
    given["data.max_length"] = CASE.about["runs"]["train"]["max_length"]
    return CASE.load("lamed_lora", base="base", overrides=given)


def test_greedy_answers(merged):
    answers = CASE.answers("generate", merged)
    assert [a.text for a in answers] == [row["answer"] for row in CASE.golden("generate")]


def test_logits_of_every_prompt(merged):
    found = merged.logits(*CASE.asked(PROMPTS))
    CASE.close("logits_prefill", found[0])
    CASE.close("logits_last", np.stack([x[-1] for x in found]))


def test_logits_with_the_adapter_merged_here(adapted):
    """Upstream's own merge and its unmerged model agree to 1.1e-5."""
    found = adapted.logits(*CASE.asked(PROMPTS))
    CASE.close("logits_last", np.stack([x[-1] for x in found]))


def test_tower_and_projector(merged):
    features, blocks = merged.image_features(TWO_VOLUMES, hidden=True)
    CASE.close("image_features", np.stack(features))
    for number, block in enumerate(np.stack(blocks, axis=1)):
        CASE.close(f"vit_hidden_{number}", block)
    assert len(blocks[0]) == 3
    CASE.close("image_tokens", np.stack(merged.image_tokens(TWO_VOLUMES)))


@pytest.mark.parametrize("changed", [{"activation": "gelu_tanh"}, {"norm_eps": 1e-6}, {"heads": 4}], ids=str)
def test_another_activation_epsilon_or_head_count_is_another_tower(changed):
    overrides = {"vision.heads": 3} | {f"model.tower.{name}": value for name, value in changed.items()}
    found = CASE.load("lamed_merged", overrides=overrides).image_features(TWO_VOLUMES)
    with pytest.raises(AssertionError):
        CASE.close("image_features", np.stack(found))


def test_class_token_of_the_tower_alone():
    """With the class token: from the tower's weights in the model's folder."""
    model = CASE.load("lamed_merged", overrides={"vision.heads": 3, "model.tower.select_feature": "cls_patch"})
    CASE.close("vit_last", model.tower(np.stack([model.preprocess(path) for path in TWO_VOLUMES])))


def test_a_voxel_of_two_numbers(tmp_path):
    """Files have the channel first, patches last. Upstream's own numbers, where either channel holds what it would read."""
    tensors, name = load_file(CASE.path("lamed_merged/model.safetensors")), "patch_embedding.patch_embeddings.1.weight"
    tower = "model.vision_tower.vision_tower."
    tensors[tower + name] = np.stack([tensors[tower + name], tensors[tower + name] / 4], axis=-1).reshape(36, 48)
    shutil.copytree(CASE.path("lamed_merged"), tmp_path / "lamed", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, tmp_path / "lamed" / "model.safetensors")
    config = json.loads((tmp_path / "lamed" / "config.json").read_text()) | {"image_channel": 2}
    (tmp_path / "lamed" / "config.json").write_text(json.dumps(config))
    model = CASE.load(str(tmp_path / "lamed"), overrides={"vision.heads": 3})
    first, second = (np.load(path) for path in TWO_VOLUMES)
    images = [np.concatenate([first, 0 * first]), np.concatenate([0 * second, 4 * second])]
    CASE.close("image_tokens", np.stack(model.image_tokens(images)))
    with pytest.raises(UserError, match=r"shape \(1, 8, 24, 21\); the model reads \(2, 8, 24, 21\)$"):
        model.preprocess(TWO_VOLUMES[0])
    with pytest.raises(UserError, match=r"one number a voxel, the model reads 2; give prepared \.npy files \(2, 8, 24, 21\)"):
        model.preprocess(CASE.path("raw/volume_17.nii.gz"))


# -- training --------------------------------------------------------------------------------------------------------------


def training_rows() -> list[dict | Record]:
    """A caption, a closed and an open question, another caption; the captions' questions were drawn at random."""
    golden, plain = CASE.golden("train_loss"), Reading(placeholders=True)
    table = CASE.path("data/M3D-VQA/M3D_VQA_test.csv")
    with open(table, encoding="utf-8", newline="") as file:
        closed = list(csv.DictReader(file))[1]
    opened = load_records(table, dataclasses.replace(plain, questions="open"))[0][2]
    reports = load_records(CASE.path("data/M3D_Cap_npy/M3D_Cap.json"), dataclasses.replace(plain, split="test"))[0]

    def caption(number: int, row: int) -> Record:
        question = Turn("human", golden["questions"][row].removeprefix(PLACEHOLDER * 18))
        return dataclasses.replace(reports[number], turns=(question, reports[number].turns[1]))

    return [caption(1, 0), closed, opened, caption(0, 3)]


@pytest.fixture(scope="module")
def trained(adapted):
    return adapted.loss(training_rows(), gradients=True, folder=CASE.path("data"))


def test_loss_and_gradients(trained):
    CASE.values("train_loss", loss=trained.loss)
    CASE.values("train_token_accuracy", token_accuracy=trained.token_accuracy)
    CASE.values("train_grad_norms", grad_norms=norms(trained.gradients))
    CASE.close("train_grads", trained.gradients)
    CASE.close("train_grads_vocab", trained.gradients)


def test_loss_without_gradients(adapted, trained):
    loss = adapted.loss(training_rows(), folder=CASE.path("data"))
    CASE.values("train_loss", loss=loss.loss)
    assert (loss.token_count, loss.token_accuracy) == (trained.token_count, trained.token_accuracy)


def test_ids_and_labels(adapted, trained):
    """Placeholders as -200; what follows the end token is padding, which is the end token too."""
    golden, found = CASE.golden("train_tokens"), adapted.tokens(training_rows())
    placeholder = adapted.tokenizer.token_id(PLACEHOLDER)
    for ours, ids, labels in zip(found, golden["input_ids"], golden["labels"], strict=True):
        n = len(ours.token_ids)
        assert [placeholder if token == -200 else token for token in ours.token_ids] == ids[:n]
        assert ours.labels == labels[:n]
        assert set(ids[n:]) <= {174} and set(labels[n:]) <= {-100}
    assert trained.token_count == golden["supervised_tokens"]


# -- M3D-CLIP --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    return CASE.load("m3d_clip")


VOLUMES = [CASE.path(path) for path in CASE.about["runs"]["clip"]["images"]]
TEXTS = CASE.golden("clip_tokens")["texts"]


def test_contrastive_volumes(clip):
    found = clip.image_features(VOLUMES, tokens=True)
    CASE.close("clip_image_features_all_tokens", found[0])
    CASE.close("clip_image_features", np.stack(clip.image_features(VOLUMES)))
    CASE.close("clip_vit_last", np.stack(clip.tower_features(VOLUMES)[:2]))


def test_contrastive_texts(clip):
    ids, mask = clip.text_ids(TEXTS)
    golden = CASE.golden("clip_tokens")
    np.testing.assert_array_equal(ids, golden["input_ids"])
    np.testing.assert_array_equal(mask, golden["attention_mask"])
    CASE.close("clip_text_features_all_tokens", clip.text_features(TEXTS, tokens=True)[-1])
    CASE.close("clip_text_features", np.stack(clip.text_features(TEXTS)))
    CASE.close("clip_bert_last", np.stack(clip.text_hidden(TEXTS)[:2]))


def test_contrastive_similarity_and_ranks(clip):
    found = clip.similarity(VOLUMES, TEXTS)
    CASE.close("clip_similarity", found)
    golden = CASE.golden("clip_retrieval")
    for name, scores in (("i2t", found), ("t2i", found.T)):
        order = np.argsort(-scores, axis=1)
        np.testing.assert_array_equal(order, golden[f"ranking_{name}"])
    ranked = clip.retrieval(VOLUMES, TEXTS, ks=(1, 2, 3))
    CASE.values("clip_retrieval", **{name: np.asarray(value).tolist() for name, value in ranked.items()})


def test_contrastive_loss_and_gradients(clip):
    found = clip.loss(VOLUMES, TEXTS, gradients=True)
    sizes = norms(found.gradients)
    CASE.values(
        "clip_loss",
        loss=found.loss,
        grad_logit_scale=found.gradients["logit_scale"],
        grad_norm_mm_vision_proj=sizes["mm_vision_proj.weight"],
        grad_norm_mm_language_proj=sizes["mm_language_proj.weight"],
    )
    CASE.values("clip_loss_gather", loss_gather=found.loss)
    CASE.close("clip_grads", found.gradients)
