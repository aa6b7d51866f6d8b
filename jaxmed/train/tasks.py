"""What the loop does not know of the task it runs: the objective, what a row of metrics.jsonl says, what an evaluation is."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jaxmed.data.plan import GlobalBatch, SampleSize
from jaxmed.evaluate.retrieval import retrieval
from jaxmed.train.contrastive import PairContrast
from jaxmed.train.flops import pair_flops, step_flops, weight_counts
from jaxmed.train.init import Blueprint, flatten
from jaxmed.train.step import Metrics, Objective, TokenCrossEntropy


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A batch of held-out records and what the objective found, on the device."""

    plan: GlobalBatch
    found: Any


class Task(Protocol):
    objective: Objective
    speed: str
    """Name of the speed in a row"""

    def units(self, sizes: Sequence[SampleSize]) -> int:
        """Of what `speed` counts, in a step with these samples."""

    def flops(self, sizes: Sequence[SampleSize], metrics: Metrics) -> float:
        """Model FLOPs of a step."""

    def row(self, metrics: Metrics) -> dict[str, float]:
        """What a step's row has beside loss, rate, norm and times."""

    def evaluation(self, batches: Sequence[Evaluated], dataset: Any) -> dict[str, float]:
        """What an evaluation's row has; `eval_loss` is in it."""


class TokenTask:
    """Texts, token by token."""

    speed = "tokens_per_second"

    def __init__(self, model: Blueprint):
        self.experiment = model.experiment
        self.objective = TokenCrossEntropy(model.graphdef, model.rules, model.experiment)
        self._counts = weight_counts(flatten(model.trainable), flatten(model.frozen))

    def units(self, sizes: Sequence[SampleSize]) -> int:
        return sum(size.length for size in sizes)

    def flops(self, sizes: Sequence[SampleSize], metrics: Metrics) -> float:
        lengths, images = [size.length for size in sizes], sum(size.images for size in sizes)
        return step_flops(self.experiment, *self._counts, lengths, int(metrics.count), images)

    def row(self, metrics: Metrics) -> dict[str, float]:
        return {"supervised_tokens": int(metrics.count)}

    def evaluation(self, batches: Sequence[Evaluated], dataset: Any) -> dict[str, float]:
        """The loss over all supervised tokens."""
        total, count = (sum(float(batch.found[i]) for batch in batches) for i in range(2))
        return {"eval_loss": total / max(count, 1.0), "eval_tokens": int(count)}


class PairTask:
    """Volumes and reports, told from each other."""

    speed = "pairs_per_second"

    def __init__(self, model: Blueprint):
        self.experiment = model.experiment
        self.objective = PairContrast(model.graphdef, model.rules, model.experiment)

    def units(self, sizes: Sequence[SampleSize]) -> int:
        return len(sizes)

    def flops(self, sizes: Sequence[SampleSize], metrics: Metrics) -> float:
        return len(sizes) * pair_flops(self.experiment)

    def row(self, metrics: Metrics) -> dict[str, float]:
        count = int(metrics.count)
        return {"accuracy": int(metrics.right) / max(count, 1), "pairs": count}

    def evaluation(self, batches: Sequence[Evaluated], dataset: Any) -> dict[str, float]:
        """The mean of the losses, each within its batch, and retrieval among all pairs: `eval_i2t_r1`, ... of partners, and
        where texts repeat `eval_i2t_same_r1`, ...: any text with the same words counts."""
        images, texts, losses, there = (np.concatenate([np.asarray(batch.found[i]) for batch in batches]) for i in range(4))
        samples = np.array([row[0] if row else -1 for batch in batches for row in batch.plan.rows])
        row: dict[str, float] = {
            "eval_loss": float(losses[there].mean()) if there.any() else 0.0,
            "eval_pairs": int(there.sum()),
        }
        if not there.any():
            return row
        words = [dataset.samples[i].text for i in samples[there]]
        pairs = images[there], texts[there]
        row |= {f"eval_{key}": value for key, value in retrieval(*pairs, keep=1).recalls.items()}
        if len(set(words)) < len(words):
            same = retrieval(*pairs, same=words, keep=1).recalls
            row |= {f"eval_{key[:4]}same_{key[4:]}": value for key, value in same.items()}
        return row


def task_of(model: Blueprint) -> Task:
    return PairTask(model) if model.experiment.task == "contrastive" else TokenTask(model)
