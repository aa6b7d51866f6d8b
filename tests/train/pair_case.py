"""A tiny contrastive experiment, its batches and its steps, for tests of the objective."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxmed.config import (
    ContrastiveConfig,
    DataConfig,
    Experiment,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TextEncoderConfig,
    TrainConfig,
    VisualConfig,
)
from jaxmed.models.presets import NO_DECODER
from jaxmed.models.presets_towers import VIT3D
from jaxmed.sharding import make_mesh, pair_specs, to_shardings
from jaxmed.train.contrastive import PairContrast
from jaxmed.train.init import blueprint, flatten, unflatten
from jaxmed.types import PairBatch

ROWS, LENGTH, FEATURES = 16, 11, 6
TOWER = dataclasses.replace(
    VIT3D, image=(4, 6, 10), patch=(2, 3, 5), width=24, layers=2, heads=3, mlp=14, select_feature="cls_patch"
)
TEXT = TextEncoderConfig(vocab=29, width=40, layers=2, heads=5, mlp=18, norm_eps=1e-3, positions=LENGTH, types=2)
EXPERIMENT = Experiment(
    model=ModelConfig(decoder=NO_DECODER, tower=TOWER, dtype="float32"),
    visual=VisualConfig("volumes", tokens=TOWER.tokens, features=24, grid=TOWER.grid, volume=TOWER.image),
    lora=LoraConfig(rank=0),
    optim=OptimConfig(learning_rate=3e-3, weight_decay=0.1, max_grad_norm=0.5),
    train=TrainConfig(steps=3, remat="none", trainable="all", train_tower=True),
    data=DataConfig(batch=ROWS, max_length=LENGTH),
    task="contrastive",
    contrastive=ContrastiveConfig(text=TEXT, features=FEATURES, dropout=0.15),
)


def changed(pieces: int = 1, batch: int = ROWS, **contrastive: Any) -> Experiment:
    return dataclasses.replace(
        EXPERIMENT,
        data=dataclasses.replace(EXPERIMENT.data, microbatches=pieces, batch=batch),
        contrastive=dataclasses.replace(EXPERIMENT.contrastive, **contrastive),
    )


def arrays(rows: int = ROWS, absent: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Texts of all lengths; rows of `absent` hold no pair."""
    rng = np.random.default_rng(4)
    samples = np.arange(1, rows + 1)
    samples[list(absent)] = 0
    return {
        "images": rng.normal(size=(rows, 4, 6, 10, 1)).astype(np.float32),
        "tokens": rng.integers(0, 29, (rows, LENGTH)).astype(np.int32),
        "mask": (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (rows, 1))).astype(np.int32),
        "samples": samples.astype(np.int32),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """On a mesh, which must be entered."""

    objective: PairContrast
    params: Any
    run: Any
    """The jitted value_and_grad"""
    shardings: PairBatch

    def batch(self, values: dict[str, np.ndarray]) -> PairBatch:
        return PairBatch(**{name: jax.device_put(x, getattr(self.shardings, name)) for name, x in values.items()})


@functools.cache
def case(experiment: Experiment, shape: tuple[int, ...]) -> Case:
    """Compiled once an experiment, mesh and batch."""
    mesh = mesh_of(shape)
    model = blueprint(experiment, mesh)
    leaves = flatten(model.trainable)
    rng = np.random.default_rng(9)
    params = {
        path: jax.device_put(rng.normal(1 if path[-1] == "scale" else 0, 0.3, leaf.shape).astype(np.float32), leaf.sharding)
        for path, leaf in leaves.items()
    }
    params["logit_scale",] = jax.device_put(np.float32(4.37), leaves["logit_scale",].sharding)
    objective = PairContrast(model.graphdef, model.rules, experiment)
    shardings = to_shardings(pair_specs(model.rules), mesh)
    return Case(objective, unflatten(params), jax.jit(objective.value_and_grad), shardings)


def mesh_of(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


def step(experiment: Experiment, shape: tuple[int, ...], values: dict[str, np.ndarray], seed: int = 3) -> tuple[Any, Any]:
    """(metrics, gradients) on the host"""
    with jax.set_mesh(mesh_of(shape)):
        found = case(experiment, shape)
        metrics, grads = found.run(found.params, {}, found.batch(values), jax.random.key(seed))
        assert jax.tree.map(lambda g: g.sharding.spec, grads) == jax.tree.map(lambda p: p.sharding.spec, found.params)
        return jax.device_get((metrics, grads))
