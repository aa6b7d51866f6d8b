"""A tiny model and a batch with everything in it, for tests on meshes: packed rows, two images a row, added tokens, padding."""

import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxmed.config import (
    DataConfig,
    Experiment,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ProjectorConfig,
    RopeConfig,
    TrainConfig,
    VisualConfig,
)
from jaxmed.models.presets import TINY
from jaxmed.sharding import balanced_order, batch_specs, make_mesh
from jaxmed.train.init import Blueprint, blueprint, first_state, start
from jaxmed.train.optim import make_optimizer
from jaxmed.train.step import TokenCrossEntropy, make_step
from jaxmed.types import Batch, TrainState

ROWS, LENGTH, LABELS = 8, 48, 7

EXPERIMENT = Experiment(
    model=ModelConfig(
        decoder=dataclasses.replace(TINY, vocab=290, norm_eps=3e-5, rope=RopeConfig(7000.0, "llama3", original_positions=24)),
        dtype="float32",
        projector=ProjectorConfig("mlp2x_gelu"),
        added_tokens=("<pad>", "<x>"),
    ),
    visual=VisualConfig(images=2, tokens=6, features=18, grid=(1, 2, 3)),
    lora=LoraConfig(rank=4, alpha=6.0, dropout=0.15),
    optim=OptimConfig(learning_rate=3e-3, projector_learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5),
    train=TrainConfig(steps=3, attention_chunk=6, loss_chunk=3, remat="attention"),
    data=DataConfig(batch=ROWS, buckets=(LENGTH,), supervised=LABELS),
)


def arrays(permutation: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of two samples and some padding; the first sample of a row has two images of six tokens (the second: five)."""
    rng = np.random.default_rng(5)
    t = np.arange(LENGTH)
    cut, end = LENGTH // 2 + 5, LENGTH - 4
    positions = np.where(t < cut, t, t - cut)
    image_index = np.where((t >= 2) & (t < 13), t - 2, -1)
    segment = np.where(t < end, 1 + 2 * np.arange(ROWS)[:, None] + (t >= cut), 0)
    supervised = np.sort(rng.permuted(np.tile(np.arange(14, end - 1), (ROWS, 1)), axis=1)[:, :LABELS], axis=1)
    supervised[1, -3:] = -1
    supervised[6] = -1  # a row without any label
    place = np.argsort(permutation)
    mask = np.ones((ROWS, 2, 6), bool)
    mask[:, 1, 5] = False

    def rows(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, (ROWS, LENGTH)).astype(np.int32)[:, permutation]

    return {
        "tokens": rows(rng.integers(0, 292, (ROWS, LENGTH))),
        "positions": rows(positions),
        "segment_ids": rows(segment),
        "image_index": rows(image_index),
        "supervised": np.where(supervised >= 0, place[supervised], -1).astype(np.int32),
        "labels": rng.integers(0, 292, (ROWS, LABELS), dtype=np.int32),
        "images": rng.standard_normal((ROWS, 2, 6, 18), dtype=np.float32),
        "image_token_mask": mask,
        "image_grid": np.tile(np.array([1, 2, 3], np.int32), (ROWS, 2, 1)),
    }


def make_batch(model: Blueprint) -> Batch:
    """The batch on the model's mesh, balanced where the context axis is used."""
    context = model.mesh.shape["context"]
    order = "balanced" if context > 1 else "natural"
    specs = batch_specs(model.rules, order)
    values = arrays(balanced_order(LENGTH, context) if context > 1 else np.arange(LENGTH))
    placed = {name: jax.device_put(x, NamedSharding(model.mesh, getattr(specs, name))) for name, x in values.items()}
    return Batch(**placed, order=order)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Three optimizer steps on one mesh."""

    losses: list[float]
    grad_norms: list[float]
    compilations: int
    model: Blueprint
    state: TrainState
    frozen: dict


def train(shape: tuple[int, int, int, int], experiment: Experiment = EXPERIMENT) -> Outcome:
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = make_mesh(MeshConfig(*shape), devices)
    with jax.set_mesh(mesh):
        model = blueprint(experiment, mesh)
        trainable, frozen = start(model)
        optimizer = make_optimizer(experiment.optim, experiment.train.steps, model.trainable)
        state = first_state(model, trainable)
        step = make_step(TokenCrossEntropy(model.graphdef, model.rules, experiment), experiment, optimizer)
        batch, losses, norms = make_batch(model), [], []
        for _ in range(experiment.train.steps):
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics.loss))
            norms.append(float(metrics.grad_norm))
        return Outcome(losses, norms, step._cache_size(), model, state, frozen)
