"""Upstream's own numbers for TinyLLaVA-Med-F (tests/golden/tinyllava) through jaxmed.load: tower, projector, logits, greedy ids
in two templates, training batches; and four optimizer steps over the files as `jaxmed train` reads them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from golden_case import Case, norm, norms

from jaxmed.api import resolve
from jaxmed.checkpoint.load import export_names
from jaxmed.config import Experiment, MeshConfig
from jaxmed.data.dataset import scan
from jaxmed.data.pipeline import batches
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.sharding import make_mesh
from jaxmed.train.init import blueprint, first_state, start
from jaxmed.train.optim import make_optimizer, schedule
from jaxmed.train.step import TokenCrossEntropy, make_step

pytestmark = pytest.mark.usefixtures("compiled_quickly")
CASE = Case("tinyllava")
PROMPTS = CASE.about["prompts"]
IMAGES = CASE.path("images")


@pytest.fixture(scope="module")
def model():
    return CASE.load("tinyllava_mini", tower="siglip_mini")


def test_greedy_answers(model):
    CASE.answers("generate", model)
    CASE.answers("generate_llava_v1", model, template="llava_v1")


def test_logits_of_every_prompt(model):
    found = model.logits(*CASE.asked(PROMPTS))
    CASE.close("logits_prefill_q-07", found[0])
    CASE.close("logits_last", np.stack([x[-1] for x in found]))


def test_logits_that_chose_each_new_token(model):
    row = next(row for row in CASE.golden("generate") if row["id"] == 88)
    images, questions = CASE.asked([row])
    ids = np.concatenate([model.prompt(images[0], questions[0]).ids, row["token_ids"]])
    (found,) = model.logits(images, [ids])
    CASE.close("logits_step_88", found[row["sequence_length"] - 1 : -1])


@pytest.mark.parametrize("name", ["wide_452x301", "tall_88x139", "gray_117x66", "rgba_70x93"])
def test_tower_and_projector(model, name):
    """The tower's fifth layer and pooling head are not run."""
    path = CASE.path("images", f"{name}.png")
    (features,), (blocks,) = model.image_features([path], hidden=True)
    CASE.close(f"image_features_{name}", features)
    assert len(blocks) == 4
    np.testing.assert_array_equal(features, blocks[-1])
    CASE.close(f"image_tokens_{name}", model.image_tokens([path])[0])


# -- training --------------------------------------------------------------------------------------------------------------


def test_loss_and_gradients(model):
    found = model.loss(CASE.json("train.json"), gradients=True, folder=IMAGES)
    golden, trained = CASE.golden("train_loss"), sum(gradient.size for gradient in found.gradients.values())
    assert (found.token_count, trained) == (golden["supervised_tokens"], golden["trainable_parameters"])
    CASE.values("train_loss", loss=found.loss)
    CASE.values("train_grad_norms", grad_norms=norms(found.gradients), grad_norm_total=norm(found.gradients))
    CASE.close("train_grads", found.gradients)


def test_loss_of_odd_records(model):
    """A first turn of gpt, an answer that is a number, an image without `<image>`, an answer with the separator in it."""
    records = CASE.json("train_odd.json")
    found = model.loss(records, folder=IMAGES)
    CASE.values("train_odd_loss", loss=found.loss, supervised_tokens=found.token_count)
    assert [ours.voided for ours in model.tokens(records)] == [False, False, True]


def recipe(records: str) -> Experiment:
    """Upstream's: two microbatches a step, a mean of means, AdamW without clipping."""
    about = CASE.about["runs"]["train_steps"]
    found = resolve(CASE.path("tinyllava_mini"), "", "float32", {}, CASE.path("siglip_mini"))
    assert found.data.max_length == about["model_max_length"] and found.data.buckets == (960,)
    pieces = about["accumulation"]
    return dataclasses.replace(
        found,
        optim=dataclasses.replace(
            found.optim,
            learning_rate=about["learning_rate"],
            projector_learning_rate=0.0,
            schedule=about["schedule"],
            warmup_ratio=about["warmup_ratio"],
            warmup_steps=0,
            weight_decay=about["weight_decay"],
            max_grad_norm=0.0,
        ),
        train=dataclasses.replace(found.train, steps=about["epochs"], remat="none", loss_reduction="microbatch"),
        data=dataclasses.replace(
            found.data, records=records, images=IMAGES, batch=4, microbatches=pieces, supervised=256, shuffle=False
        ),
    )


def in_order(order: list, records: list[dict]) -> list[dict]:
    """The rows of every step as a file; row k of a step belongs to its microbatch k % 2."""
    rows = [micro[place] for step in order for place in range(2) for micro in step]
    return [records[row] for row in rows]


def test_four_optimizer_steps(tmp_path):
    golden = CASE.golden("train_steps")
    file = tmp_path / "records.json"
    file.write_text(json.dumps(in_order(golden["order"], CASE.json("train.json"))))
    experiment = recipe(str(file))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        plan = blueprint(experiment, mesh)
        trainable, frozen = start(plan)
        assert "tower" in frozen and "tower" not in trainable
        before = export_names(trainable, experiment)
        data = scan(experiment, Tokenizer.from_folder(experiment.model.base), experiment.data.records)
        loader = batches(data, data.plan(), 0, mesh, plan.rules, 4)
        optimizer = make_optimizer(experiment.optim, 4, trainable)
        step = make_step(TokenCrossEntropy(plan.graphdef, plan.rules, experiment), experiment, optimizer)
        state, losses, micro = first_state(plan, trainable), [], []
        for _, batch in loader:
            counts = (np.asarray(batch.supervised) >= 0).sum(axis=1)
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics.loss))
            sums = np.asarray(metrics.row_loss)
            micro += [sums[piece::2].sum() / counts[piece::2].sum() for piece in range(2)]
        loader.close()
        after = export_names(state.trainable, experiment)
    rates = schedule(experiment.optim, experiment.optim.learning_rate, 4)(np.arange(4))
    CASE.values("train_steps", losses=losses, micro_losses=micro, learning_rates=rates)
    CASE.values("train_steps_moved", moved=norms({n: after[n] - before[n] for n in after}), tower_moved=0.0)
    CASE.close("train_steps_params", after)
