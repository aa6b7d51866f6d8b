"""Upstream's own numbers for SAMF (tests/golden/samf) through jaxmed.load, in both fusions: slice features, aggregator, fusion,
logits, greedy ids, a training batch, the same on a mesh that splits the text. Head counts and alpha stand in no file.

Axis letters: S slices, T text.
"""

import csv

import jax
import numpy as np
import pytest
from golden_case import Case, norms

import jaxmed
from jaxmed.config import MeshConfig
from jaxmed.data.placeholders import PLACEHOLDER
from jaxmed.data.records import Reading, load_records
from jaxmed.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("compiled_quickly")
CASE = Case("samf")
HEADS = {"samf": {"slice_encoder.heads": 5}, "ao2d": {}}
TRAINED = {"slice_encoder.heads": 5, "lora.alpha": 15, "data.max_length": CASE.about["runs"]["train"]["max_length"]}


@pytest.fixture(scope="module", params=["samf", "ao2d"])
def merged(request):
    return request.param, CASE.load(f"{request.param}_merged", overrides=HEADS[request.param])


@pytest.fixture(scope="module")
def adapted():
    """The state dict with adapters in it, at the training's length."""
    return CASE.load("samf_lora", base="base", overrides=TRAINED)


def asked(run: str) -> tuple[list, list]:
    """The volumes and questions of all seven prompts."""
    return CASE.asked(CASE.about["prompts"][run])


def test_greedy_answers(merged):
    run, model = merged
    CASE.answers(f"generate_{run}", model)


def test_logits_of_every_prompt(merged):
    run, model = merged
    found = model.logits(*asked(run))
    CASE.close(f"logits_prefill_choice_0_{run}", found[4])
    CASE.close(f"logits_last_{run}", np.stack([x[-1] for x in found]))


def test_logits_with_the_adapter_merged_here(adapted):
    """Upstream's own merge is what its numbers come from."""
    images, questions = asked("samf")
    found = np.stack([x[-1] for x in adapted.logits(images[:4], questions[:4])])
    np.testing.assert_allclose(found, CASE.golden("logits_last_samf")[:4], atol=2e-4, rtol=1e-5)


def test_features_of_slices_and_volumes(merged):
    run, model = merged
    volumes = asked(run)[0][:4]
    features, blocks = model.image_features(volumes, hidden=True)
    CASE.close(f"slice_features_{run}", np.stack(features))
    layers = CASE.about["sizes"][run]["dino"]["depth"]
    assert all(b.shape == (layers, 24, 197, features[0].shape[-1]) for b in blocks)
    CASE.close(f"volume_features_{run}", np.stack(model.volume_features(volumes)))


def test_tower_alone_on_smaller_images(merged):
    """The position table is resized; three equal channels."""
    run, model = merged
    crops = model.preprocess(asked(run)[0][2])[::6, 40:136, 64:128]
    CASE.close(f"dino_crop_{run}", model.tower(np.repeat(crops[..., None], 3, axis=-1))[:, 0])


def test_fusion(merged):
    """Its weights, and the one vector that stands at all 256 places."""
    run, model = merged
    weights = model.fusion_weights(*asked(run))
    names = [f"text_weights_{prompt['id']}" for prompt in CASE.about["prompts"][run]]
    by_name = {name: text for name, (_, text) in zip(names, weights, strict=True)}
    CASE.close(f"fusion_weights_{run}", by_name | {"slice_weights": np.stack([slices for slices, _ in weights])})
    tokens = np.stack(model.image_tokens(*asked(run)))
    CASE.close(f"image_token_{run}", tokens[:, 0])
    assert tokens.shape[1] == 256 and (tokens == tokens[:, :1]).all()


# -- training --------------------------------------------------------------------------------------------------------------


def training_rows() -> list:
    """A caption with the question that was drawn for it, a choice whose last is missing for upstream, a caption."""
    rows = CASE.about["runs"]["train"]["rows"]
    choices = load_records(CASE.path("mcq.csv"), Reading(placeholders=True, upstream_exact=frozenset({"na_choices"})))[0]
    with open(CASE.path("reports.csv"), encoding="utf-8", newline="") as file:
        reports = list(csv.DictReader(file))
    return [
        choices[row["row"]] if row["csv"] == "mcq.csv" else reports[row["row"]] | {"question": row["question"]} for row in rows
    ]


@pytest.fixture(scope="module")
def trained(adapted):
    return adapted.loss(training_rows(), gradients=True, folder=CASE.path("data"))


def test_loss_and_gradients(trained):
    """The padding that the fusion reads is an end token, whose row torch gives no gradient."""
    CASE.values("train_loss", loss=trained.loss)
    CASE.values("train_grad_norms", grad_norms=norms(trained.gradients))
    CASE.close("train_grads", trained.gradients)
    CASE.close("train_grads_tables", trained.gradients)
    table = trained.gradients["base_model.model.model.embed_tokens.weight"]
    assert not table[CASE.about["end_ids"]["samf"][0]].any()


def test_ids_labels_and_image_tokens(adapted, trained):
    """The fusion of a training row reads its answer and padding."""
    golden, found = CASE.golden("train_tokens"), adapted.tokens(training_rows())
    placeholder = adapted.tokenizer.token_id(PLACEHOLDER)
    given = [[placeholder if token == -200 else token for token in ours.token_ids] for ours in found]
    assert given == golden["input_ids"]
    assert [ours.labels for ours in found] == golden["labels"]
    assert trained.token_count == golden["supervised_tokens"]
    volumes = [CASE.path("data", row["image"] if isinstance(row, dict) else row.images[0]) for row in training_rows()]
    tokens = adapted.image_tokens(volumes, [np.asarray(ours.token_ids) for ours in found])
    CASE.close("train_image_token", np.stack(tokens)[:, 0])


def test_loss_on_a_mesh_that_splits_the_text(trained):
    """The fusion reads the whole text, of which each device has a half."""
    mesh = make_mesh(MeshConfig(context=2), jax.devices()[:2])
    model = jaxmed.load(CASE.path("samf_lora"), CASE.path("base"), mesh=mesh, dtype="float32", overrides=TRAINED)
    found = model.loss(training_rows(), gradients=True, folder=CASE.path("data"))
    assert found.loss == pytest.approx(trained.loss, rel=1e-6)
    assert found.gradients.keys() == trained.gradients.keys()
    for name, gradient in trained.gradients.items():
        np.testing.assert_allclose(found.gradients[name], gradient, atol=2e-5, rtol=1e-3, err_msg=name)
