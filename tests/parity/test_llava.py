"""The whole tiny model against torch: splice, logits, loss, gradients; padding, several images, text alone, no labels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_llava import DECODER, EXPERIMENT, FEATURES, IMAGES, TOKENS, Torch, length_of
from torch_pair import RULES, Row, array, assert_trees_close, batch_of, decoder_tree, one_device, run_model, structure

from jaxmed.config import DataConfig
from jaxmed.train.init import flatten
from jaxmed.train.step import TokenCrossEntropy

LENGTH = 31


def rows() -> list[Row]:
    """One image in the middle, two of unlike size next to each other, none, one at the end."""
    rng = np.random.default_rng(17)

    def words(n):
        return rng.integers(0, 100, n).tolist()

    def image(n):
        return rng.standard_normal((n, FEATURES)).astype(np.float32)

    pieces = [
        ([*words(4), -200, *words(9)], (image(9),)),
        ([-200, -200, *words(6), *words(2)], (image(4), image(9))),
        (words(17), ()),
        ([*words(8), -200], (image(6),)),
    ]
    made = []
    for ids, images in pieces:
        labels = [t if t != -200 and n and rng.random() < 0.5 else -100 for n, t in enumerate(ids)]
        made.append(Row(ids, labels, images))
    return made


@pytest.fixture(scope="module")
def theirs() -> Torch:
    return Torch()


def batch(samples: list[Row], length: int = LENGTH, left: bool = False):
    return batch_of(samples, length, FEATURES, IMAGES, TOKENS, left)


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
def test_splice(theirs, left):
    with jax.set_mesh(one_device()):
        graphdef, _ = structure(EXPERIMENT)
        embed = jax.jit(lambda params, batch: nnx.merge(graphdef, params).embed(batch, RULES))
        made = batch(rows(), left=left)
        ours = np.asarray(embed(theirs.params(), made))
    for r, row in enumerate(rows()):
        wanted, labels = theirs.splice(row)
        start = LENGTH - len(wanted) if left else 0
        np.testing.assert_allclose(ours[r, start : start + len(wanted)], wanted.detach(), atol=1e-6)
        # a label at t is what the model must say at t - 1
        placed = {
            int(at) - start + 1: int(label) for at, label in zip(made.supervised[r], made.labels[r], strict=True) if at >= 0
        }
        assert placed == {t: int(label) for t, label in enumerate(labels) if label != -100}


@pytest.fixture(scope="module")
def outcome(theirs):
    """Logits, loss and gradients of the whole batch on both sides."""
    logits, total, count = [], 0.0, 0
    for row in rows():
        out, labels = theirs.forward(row)
        logits.append(out.detach().numpy())
        total = total + torch.nn.functional.cross_entropy(out[:-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
    (total / count).backward()
    grads = {name: jnp.asarray(p.grad.numpy()) for name, p in theirs.llama.named_parameters()}
    layers = {n: {k: array(p.grad) for k, p in theirs.projector[2 * n].named_parameters()} for n in (0, 1)}
    wanted = {"decoder": decoder_tree(grads, DECODER), "projector": {"layers": layers}}
    return logits, float(total / count), wanted, run_model(EXPERIMENT, theirs.params(), batch(rows()))


def test_logits_and_loss(outcome):
    logits, loss, _, (_, ours, our_loss, _) = outcome
    for r, wanted in enumerate(logits):
        np.testing.assert_allclose(ours[r, : len(wanted), :100], wanted, atol=1e-4)
    assert our_loss == pytest.approx(loss, abs=1e-5)


def test_gradients(outcome):
    """Of all weights; a row without an image gives the projector none."""
    _, _, wanted, (_, _, _, ours) = outcome
    assert_trees_close(ours, wanted, atol=1e-5, rtol=1e-4)


def test_a_longer_bucket_changes_nothing(theirs, outcome):
    """Rows of 31, of 48 padded on the left, and one alone in a row of its own length."""
    _, ours, loss, _ = outcome[3]
    _, longer, its_loss, _ = run_model(EXPERIMENT, theirs.params(), batch(rows(), 48, left=True), None)
    for r, row in enumerate(rows()):
        n = length_of(row)
        np.testing.assert_allclose(longer[r, 48 - n :, :100], ours[r, :n, :100], atol=1e-5 * np.abs(ours[r, :n, :100]).max())
    assert its_loss == pytest.approx(loss, abs=1e-5)
    exact = rows()[:1]
    _, alone, _, _ = run_model(EXPERIMENT, theirs.params(), batch(exact, length_of(exact[0])), None)
    np.testing.assert_allclose(alone[0, :, :100], ours[0, : alone.shape[1], :100], atol=1e-4)


@pytest.mark.parametrize(("reduction", "pieces"), [("token", 1), ("microbatch", 2)])
def test_a_batch_without_labels_costs_nothing(theirs, reduction, pieces):
    """torch's mean over no tokens is NaN; here it is 0, with gradients of 0 and not of NaN."""
    empty = [dataclasses.replace(row, labels=[-100] * len(row.ids)) for row in rows()]
    torchs, labels = theirs.forward(empty[0])
    assert torch.nn.functional.cross_entropy(torchs[:-1], labels[1:], ignore_index=-100).isnan()
    experiment = dataclasses.replace(
        EXPERIMENT,
        train=dataclasses.replace(EXPERIMENT.train, loss_reduction=reduction),
        data=DataConfig(batch=4, microbatches=pieces),
    )
    with jax.set_mesh(one_device()):
        graphdef, _ = structure(experiment)
        objective = TokenCrossEntropy(graphdef, RULES, experiment)
        grad = jax.jit(objective.value_and_grad)
        metrics, grads = grad(theirs.params(), {}, batch(empty), jax.random.key(0))
        assert float(metrics.loss) == 0.0 and int(metrics.count) == 0
        assert all(not np.any(np.asarray(g)) for g in flatten(grads).values())
        # one microbatch (rows 0 and 2) without labels, the other with: the empty one adds nothing
        half = [dataclasses.replace(r, labels=[-100] * len(r.ids)) if n % 2 == 0 else r for n, r in enumerate(rows())]
        metrics, grads = grad(theirs.params(), {}, batch(half), jax.random.key(0))
    sums, count = 0.0, 0
    for row in half[1::2]:
        out, labels = theirs.forward(row)
        sums += torch.nn.functional.cross_entropy(out[:-1], labels[1:], ignore_index=-100, reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    assert float(metrics.loss) == pytest.approx(sums / count / pieces, rel=1e-5)
    assert all(np.isfinite(np.asarray(g)).all() for g in flatten(grads).values())
