"""Upstream's own three optimizer steps (torch, peft, its trainer): losses, gradients and parameters of the trainable half."""

import json

import jax
import numpy as np
import pytest
from golden_runs import GOLDEN, experiment

from jaxmed.checkpoint.load import export_names
from jaxmed.data.dataset import scan
from jaxmed.data.pipeline import batches
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.sharding import make_mesh
from jaxmed.train.init import blueprint, first_state, start
from jaxmed.train.optim import make_optimizer
from jaxmed.train.step import TokenCrossEntropy, make_step


@pytest.fixture(scope="module", params=["train_zero2", "train_zero3", "train_m72"])
def steps(request: pytest.FixtureRequest) -> dict:
    """Our side of a run: gradients at the loaded weights, the loss at each of four states, parameters after three updates."""
    e = experiment(request.param)
    mesh = make_mesh(e.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = blueprint(e, mesh)
        trainable, frozen = start(model)
        tokenizer = Tokenizer.from_folder(e.model.tokenizer or e.model.base, e.model.added_tokens)
        data = scan(e, tokenizer, e.data.records)
        loader = batches(data, data.plan(), 0, mesh, model.rules, 1)
        _, batch = next(loader)
        loader.close()
        objective = TokenCrossEntropy(model.graphdef, model.rules, e)
        _, grads = jax.jit(objective.value_and_grad)(trainable, frozen, batch, jax.random.key(0))
        optimizer = make_optimizer(e.optim, e.train.steps, trainable)
        step = make_step(objective, e, optimizer)
        state = first_state(model, trainable)
        losses = []
        grads = export_names(grads, e)
        for number in range(4):
            after = export_names(state.trainable, e) if number == 3 else {}
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics.loss))
        return {
            "golden": json.loads((GOLDEN / "golden" / f"{request.param}.json").read_text()),
            "golden_grads": dict(np.load(GOLDEN / "golden" / f"{request.param}_grads.npz")),
            "losses": losses,
            "grads": grads,
            "after": after,
            "supervised": int(metrics.count),
            "experiment": e,
        }


def test_losses_over_three_updates(steps: dict) -> None:
    np.testing.assert_allclose(steps["losses"], steps["golden"]["steps_loss"], rtol=1e-4)
    assert steps["losses"][0] == pytest.approx(steps["golden"]["loss"], rel=1e-5)
    assert steps["supervised"] == steps["golden"]["supervised_tokens"]


def test_gradients(steps: dict) -> None:
    """Some tensors in full, the norms of all."""
    golden, ours = steps["golden_grads"], steps["grads"]
    norms = steps["golden"]["grad_norms"]
    assert ours.keys() == norms.keys() >= golden.keys()
    for name, theirs in norms.items():
        assert np.linalg.norm(ours[name]) == pytest.approx(theirs, rel=1e-4, abs=1e-6), name
    largest = max(np.abs(g).max() for g in golden.values())
    for name, theirs in golden.items():
        np.testing.assert_allclose(ours[name], theirs, atol=2e-5 * largest, rtol=2e-3, err_msg=name)


def test_norms_of_parameters_after_three_updates(steps: dict) -> None:
    norms = steps["golden"]["param_norms_after_3"]
    assert norms.keys() == steps["after"].keys()
    for name, theirs in norms.items():
        assert np.linalg.norm(steps["after"][name]) == pytest.approx(theirs, rel=1e-4), name


def test_the_adapters_folder_decides(steps: dict) -> None:
    e = steps["experiment"]
    assert (e.lora.rank, e.lora.alpha) in {(7, 12.0), (3, 7.0), (4, 6.0)}
    assert e.train.train_embed_tokens == (e.lora.rank == 3)
    assert e.visual.features == (72 if e.lora.rank == 4 else 18)
    assert e.model.decoder.width == 54 and e.model.decoder.rope.theta == 20000.0
