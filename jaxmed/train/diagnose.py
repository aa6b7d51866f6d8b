"""What to say when a loss is not a number: which step, which samples, and where it came from."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxmed.data.dataset import Dataset
from jaxmed.data.pairs import PairSet
from jaxmed.data.plan import GlobalBatch
from jaxmed.train.step import Metrics
from jaxmed.types import Batch, PairBatch

NAMED = 8
"""Samples whose ids are printed"""


def explain_poison(
    step: int, loss: float, metrics: Metrics, plan: GlobalBatch, batch: Batch | PairBatch, dataset: Dataset | PairSet
) -> str:
    """One line about a step whose loss or gradients are NaN or infinite. All processes call it together."""
    sound = np.isfinite(whole(metrics.row_loss))
    rows = [row for row, fine in enumerate(sound) if not fine and plan.rows[row]]
    kept = "the state was not saved, the last checkpoint is as it was"
    if not rows:
        what = "the gradients are not finite" if math.isfinite(loss) else f"the loss is {loss}"
        names = _names([i for row in plan.rows for i in row], dataset)
        return f"step {step}: {what} though every sample's loss is; samples {names}. Lower optim.learning_rate; {kept}"
    bad = [i for row in rows for i in plan.rows[row]]
    names = _names(bad, dataset)
    poisoned = _rows_with_bad_input(batch)
    if any(row in poisoned for row in rows):
        cause = "their visual tokens hold NaN or infinite values: encode these files again"
    elif len(rows) == sum(1 for row in plan.rows if row):
        cause = "every sample of the batch is: training has diverged, lower optim.learning_rate or set optim.max_grad_norm"
    else:
        cause = "the input is finite: look at these samples, lower optim.learning_rate, or leave them out"
    return f"step {step}: the loss is not finite for {names}; {cause}. Stopped; {kept}"


def _rows_with_bad_input(batch: Batch | PairBatch) -> set[int]:
    if not jnp.issubdtype(batch.images.dtype, jnp.floating):
        return set()
    images = whole(batch.images)
    return {row for row, values in enumerate(images) if not np.isfinite(values).all()}


def _names(samples: list[int], dataset: Dataset | PairSet) -> str:
    ids = [repr(dataset.samples[i].record.id) for i in samples]
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return ", ".join(ids[:NAMED]) + more


def whole(array: jax.Array) -> np.ndarray:
    """A sharded array on the host of every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
