"""A head that is trained, on a mesh: its gradient, and how often it is sent."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from mesh_case import EXPERIMENT, make_batch, train

from jaxmed.config import MeshConfig, TrainConfig
from jaxmed.sharding import make_mesh
from jaxmed.train.init import abstract_state, blueprint, flatten
from jaxmed.train.optim import make_optimizer
from jaxmed.train.step import TokenCrossEntropy, make_step

HEAD = dataclasses.replace(
    EXPERIMENT,
    train=TrainConfig(steps=2, attention_chunk=6, loss_chunk=3, train_head=True, train_embed_tokens=True),
)
HEAD_PATH = ("decoder", "head", "weight")


pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.mark.parametrize("shape", [(2, 2, 1, 2), pytest.param((1, 2, 2, 2), marks=pytest.mark.slow)], ids=str)
def test_its_updates_agree_with_one_device(shape):
    found, alone = train(shape, HEAD), train((1, 1, 1, 1), HEAD)
    assert found.losses == pytest.approx(alone.losses, abs=2e-5)
    ours, theirs = (np.asarray(flatten(o.state.trainable)[HEAD_PATH]) for o in (found, alone))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_its_gradient_is_summed_once_not_in_every_chunk():
    """Seven labels in chunks of three: three runs of the loss's loop, none of which sends an array of the head's size."""
    mesh = make_mesh(MeshConfig(2, 2, 1, 2))
    with jax.set_mesh(mesh):
        model = blueprint(HEAD, mesh)
        step = make_step(
            TokenCrossEntropy(model.graphdef, model.rules, HEAD), HEAD, make_optimizer(HEAD.optim, 9, model.trainable)
        )
        text = step.lower(abstract_state(model), model.frozen, make_batch(model)).compile().as_text()
        rows, width = model.trainable["decoder"]["head"]["weight"].shape
    bodies, where, sent = set(re.findall(r"body=%?([\w.\-]+)", text)), "", []
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        where = head[1] if head else where
        if re.search(r" (all-reduce|reduce-scatter)(-start)?\(", line) and f"[{rows // 2},{width}]" in line:
            sent.append(where in bodies)
    assert sent and not any(sent)
