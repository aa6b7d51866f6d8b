"""The jitted train step. It takes an `Objective` and knows neither its loss nor its batch.

    state, metrics = step(state, frozen, batch)

`state.trainable` and `frozen` are nested dicts of arrays; they become a module inside the jitted function.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxmed.config import Experiment
from jaxmed.nn.dropout import Draws
from jaxmed.sharding import Rules, join_rows, split_rows
from jaxmed.train.loss import token_losses
from jaxmed.train.optim import Path, clip
from jaxmed.types import Batch, TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Of one step, on the device until logged."""

    loss: jax.Array
    """[] float32, as `train.loss_reduction` defines it"""
    grad_norm: jax.Array
    """[] float32, before clipping"""
    count: jax.Array
    """[] int32, supervised tokens, or pairs"""
    row_loss: jax.Array
    """[B] float32, each row's part (summed over its supervised tokens): names the sample behind a NaN"""
    right: jax.Array
    """[] int32, those of `count` that have the largest logit"""


class Objective(Protocol):
    """What a step minimises."""

    def value_and_grad(self, trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[Metrics, Any]:
        """-> metrics (grad_norm still 0) and gradients shaped as `trainable`; goes over microbatches by itself."""

    def evaluate(self, trainable: Any, frozen: Any, batch: Any) -> Any:
        """What an evaluation is made of (see jaxmed.train.tasks), whole on every process; without dropout."""


@dataclasses.dataclass(frozen=True)
class TokenCrossEntropy:
    """Next-token loss on supervised positions."""

    graphdef: nnx.GraphDef
    rules: Rules
    experiment: Experiment

    def _sums(self, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, ...]:
        """Of each row [B]: summed loss, supervised tokens, those with the largest logit."""
        model = nnx.merge(self.graphdef, trainable, frozen)
        draws, config = None, self.experiment
        if key is not None:
            rate = config.lora.dropout if config.lora.rank else 0.0
            images = config.model.fusion.kind != "none" and config.model.aggregator.dropout > 0
            draws = Draws.of_step(key, batch.segment_ids, batch.positions, rate, images)
        return token_losses(model, batch, self.rules, draws, config.train.loss_chunk)

    def evaluate(self, trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """-> summed loss [] and supervised tokens []"""
        return self.totals(trainable, frozen, batch)[:2]

    def totals(self, trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, ...]:
        """Summed loss [] float32, supervised tokens [] int32, those with the largest logit [] int32; without dropout."""
        loss, count, right = (jnp.sum(x) for x in self._sums(trainable, frozen, batch, None))
        return loss, count, right

    def value_and_grad(self, trainable: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[Metrics, Any]:
        pieces = self.experiment.data.microbatches
        by_token = self.experiment.train.loss_reduction == "token"
        total_count = jnp.maximum(jnp.sum(batch.supervised >= 0), 1)

        def loss(trainable: Any, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            rows, counts, right = self._sums(trainable, frozen, batch, key)
            divisor = total_count if by_token else jnp.maximum(jnp.sum(counts), 1) * pieces
            return jnp.sum(rows) / divisor, (rows, jnp.sum(counts), jnp.sum(right))

        grad = jax.value_and_grad(loss, has_aux=True)
        if pieces == 1:
            (value, (rows, count, right)), grads = grad(trainable, batch)
            return Metrics(value, jnp.float32(0), count, rows, right), grads

        def add(sums: tuple, piece: Batch) -> tuple[tuple, jax.Array]:
            (value, (rows, count, right)), grads = grad(trainable, piece)
            return jax.tree.map(jnp.add, sums, (value, count, right, grads)), rows

        start = (jnp.float32(0), jnp.int32(0), jnp.int32(0), jax.tree.map(jnp.zeros_like, trainable))
        (value, count, right, grads), rows = jax.lax.scan(add, start, microbatches(batch, pieces))
        return Metrics(value, jnp.float32(0), count, joined(rows), right), grads


def microbatches(batch: Any, pieces: int) -> Any:
    """Arrays [B, ...] -> [pieces, B / pieces, ...]: microbatch j holds rows j, j + pieces, ..., so that no row changes its
    device."""

    def cut(x: jax.Array) -> jax.Array:
        spec = split_rows(jax.typeof(x).sharding.spec, x.ndim)
        return jnp.moveaxis(x.reshape(-1, pieces, *x.shape[1:], out_sharding=spec), 1, 0)

    return jax.tree.map(cut, batch)


def rows_of_piece(batch: Any, pieces: int, number: jax.Array) -> Any:
    """`microbatches(batch, pieces)[number]`, without a copy of the whole batch."""

    def cut(x: jax.Array) -> jax.Array:
        spec = split_rows(jax.typeof(x).sharding.spec, x.ndim)
        by_piece = x.reshape(-1, pieces, *x.shape[1:], out_sharding=spec)
        return jax.lax.dynamic_index_in_dim(by_piece, number, axis=1, keepdims=False)

    return jax.tree.map(cut, batch)


def joined(x: jax.Array) -> jax.Array:
    """The inverse for one array, rows split over the mesh: [pieces, B / pieces, ...] -> [B, ...]."""
    spec = join_rows(jax.typeof(x).sharding.spec, x.ndim)
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:], out_sharding=spec)


def is_trainable(experiment: Experiment) -> Callable[[Path], bool]:
    """Which parameters are trained (and saved); decided once. Fixed statistics of the visual input travel with them."""
    train = experiment.train

    def trainable(path: Path) -> bool:
        if experiment.task == "contrastive":
            return True
        if path[0] == "tower":
            return train.train_tower
        if train.trainable == "all" or path[0] in ("projector", "aggregator", "fusion"):
            return True
        if path == ("decoder", "head", "weight"):
            return train.train_head
        if path[-1] == "table":
            return train.train_embed_tokens
        if path[-1] == "added":
            return train.train_embed_tokens or (train.trainable == "adapter" and train.train_added_rows)
        return train.trainable == "adapter" and path[-1] in ("lora_a", "lora_b")

    return trainable


def make_step(
    objective: Objective, experiment: Experiment, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]:
    """-> jitted (state, frozen, batch) -> (state, metrics); the state is donated. Dropout depends on (seed, step) alone."""

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(experiment.train.seed), state.step)
        metrics, grads = objective.value_and_grad(state.trainable, frozen, batch, key)
        grads, norm = clip(grads, experiment.optim.max_grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, opt_state), dataclasses.replace(metrics, grad_norm=norm)

    return jax.jit(step, donate_argnums=0)


def make_eval_step(objective: Objective) -> Callable[[Any, Any, Any], Any]:
    """-> jitted (trainable, frozen, batch) -> what the objective's evaluation of a batch gives"""
    return jax.jit(objective.evaluate)
