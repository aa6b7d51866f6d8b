"""The contrastive objective: the loss of the global batch, its gradients by way of cached vectors.

The loss is not a sum over microbatches: every pair is told from all others. With `data.microbatches` above 1 the vectors of all
pairs are made first, chunk by chunk and without gradients; then the loss and its gradients by the vectors; then each chunk is
run again, and those gradients are carried back through it. Memory grows with the chunk, and the result is that of one piece:
dropout has the same bits both times, which depend on (step, pair, position) alone. Gao et al., arXiv 2101.06983.

Axis letters: B pairs, P width of the shared space.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard

from jaxmed.config import Experiment
from jaxmed.models.contrastive import Contrast
from jaxmed.nn.dropout import Dropout
from jaxmed.sharding import Rules
from jaxmed.train.step import Metrics, joined, microbatches, rows_of_piece
from jaxmed.types import PairBatch

Vectors = tuple[jax.Array, jax.Array]
"""Of volumes and of texts, both [B, P] float32"""


@dataclasses.dataclass(frozen=True)
class PairContrast:
    """Symmetric cross-entropy of who belongs to whom."""

    graphdef: nnx.GraphDef
    rules: Rules
    experiment: Experiment

    def value_and_grad(self, trainable: Any, frozen: Any, batch: PairBatch, key: jax.Array) -> tuple[Metrics, Any]:
        pieces, there = self.experiment.data.microbatches, batch.samples > 0
        if pieces == 1:

            def whole(trainable: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                return self._loss(trainable, frozen, self._vectors(trainable, frozen, batch, key), there)

            (value, aux), grads = jax.value_and_grad(whole, has_aux=True)(trainable)
            return _metrics(value, aux, there), grads
        vectors = self._all_vectors(trainable, frozen, batch, key)
        by_vectors = jax.value_and_grad(self._loss, argnums=(0, 2), has_aux=True)
        # the scale's gradient is whole already, all others are still 0
        (value, aux), (grads, d_vectors) = by_vectors(trainable, frozen, vectors, there)

        def add(grads: Any, piece: tuple[jax.Array, Vectors]) -> tuple[Any, None]:
            number, d_chunk = piece
            chunk = rows_of_piece(batch, pieces, number)
            back = jax.vjp(lambda trainable: self._vectors(trainable, frozen, chunk, key), trainable)[1]
            return jax.tree.map(jnp.add, grads, back(d_chunk)[0]), None

        grads, _ = jax.lax.scan(add, grads, (jnp.arange(pieces), microbatches(d_vectors, pieces)))
        return _metrics(value, aux, there), grads

    def evaluate(self, trainable: Any, frozen: Any, batch: PairBatch) -> tuple[jax.Array, ...]:
        """-> vectors of volumes and texts, both [B, P], the loss of each pair [B] within this batch, and which pairs are there
        [B]"""
        vectors = self._all_vectors(trainable, frozen, batch, None)
        there = batch.samples > 0
        _, (losses, _) = self._loss(trainable, frozen, vectors, there)
        return tuple(reshard(x, self.rules.spec(*[None] * x.ndim)) for x in (*vectors, losses, there))

    def _all_vectors(self, trainable: Any, frozen: Any, batch: PairBatch, key: jax.Array | None) -> Vectors:
        """Made chunk by chunk."""
        pieces = self.experiment.data.microbatches

        def add(_: None, number: jax.Array) -> tuple[None, Vectors]:
            return None, self._vectors(trainable, frozen, rows_of_piece(batch, pieces, number), key)

        _, (image, text) = jax.lax.scan(add, None, jnp.arange(pieces))
        return joined(image), joined(text)

    def _vectors(self, trainable: Any, frozen: Any, batch: PairBatch, key: jax.Array | None) -> Vectors:
        """`key`: of the step; None: nothing is dropped."""
        model = nnx.merge(self.graphdef, trainable, frozen)
        config, train = self.experiment, self.experiment.train
        dtype, dropout = jnp.dtype(config.model.dtype), None
        if key is not None and config.contrastive.dropout:
            places = jnp.zeros_like(batch.tokens) + jnp.arange(batch.tokens.shape[1])
            pairs = jnp.zeros_like(batch.tokens) + batch.samples[:, None]
            dropout = Dropout.for_tokens(key, pairs, places, config.contrastive.dropout)
        image = model.encode_image(batch.images.astype(dtype), self.rules, train.remat, train.attention)
        text = model.encode_text(batch.tokens, batch.mask, self.rules, dtype, train.remat, dropout)
        return image[:, 0], text[:, 0]

    def _loss(
        self, trainable: Any, frozen: Any, vectors: Vectors, there: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """-> mean over the pairs that are there [], and of each pair [B] its loss and whether it was right."""
        contrast = Contrast(self.experiment.contrastive.group, self.experiment.contrastive.exp_scale)
        losses, right = nnx.merge(self.graphdef, trainable, frozen).losses(*vectors, there, contrast, self.rules)
        return jnp.sum(losses) / jnp.maximum(jnp.sum(there), 1), (losses, right)


def _metrics(value: jax.Array, aux: tuple[jax.Array, jax.Array], there: jax.Array) -> Metrics:
    losses, right = aux
    count, right = (jnp.sum(x.astype(jnp.int32)) for x in (there, right))
    return Metrics(value, jnp.float32(0), count, losses, right)
