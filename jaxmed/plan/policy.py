"""FLOPs of a training step by formula, with what the remat policy computes again: what the program's are held against.

A product with a weight costs 2 FLOPs a parameter and token forward, 2 for its input's gradient, 2 for its own where it is
trained, and 2 more where it is recomputed. Recomputed are, under `full`, all products of a block but its last (nothing needs
the MLP's result again); under `attention` and `offload` those of the output projection, of gate and up; and adapters' A, since
the gradient of B needs A x. Logits are recomputed in every chunk of the loss. Attention has 2 products of queries and keys
forward and 5 backward (the splash kernel 7: it computes scores twice), each on half of the square; `full` adds its forward
once more.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxmed.config import Experiment
from jaxmed.models.decoder import padded_vocab
from jaxmed.plan.counts import tower_flops

AGAIN = {
    "full": {"q", "k", "v", "o", "gate", "up"},
    "attention": {"o", "gate", "up"},
    "offload": {"o", "gate", "up"},
    "none": set(),
}
"""Projections that a policy computes a second time, with their adapters"""


def policy_flops(experiment: Experiment, length: int, trained: Mapping, frozen: Mapping, kernels: list[str]) -> float:
    """Of all devices; rows are taken to be full. `kernels`: those of the program, by name."""
    decoder, data, remat = experiment.model.decoder, experiment.data, experiment.train.remat
    tokens = data.batch * length
    total = sum(_products(path, leaf, True, remat) for path, leaf in trained.items())
    total += sum(_products(path, leaf, False, remat) for path, leaf in frozen.items())
    backward = 7 if any("pallas" in name for name in kernels) else 5
    square = 2.0 * decoder.layers * decoder.heads * decoder.head_dim * length * length / 2 * data.batch
    head_trained = experiment.train.train_head or experiment.train.trainable == "all"
    vocab = padded_vocab(decoder.vocab + len(experiment.model.added_tokens))
    head = (2 + 2 + 2 + 2 * head_trained) * data.batch * data.supervised * vocab * decoder.width
    images = (4 if remat == "full" else 3) if experiment.train.train_tower else 1
    return tokens * total + square * (2 + backward + 2 * (remat == "full")) + head + images * tower_flops(experiment)


def _products(path: tuple, leaf: Any, trained: bool, remat: str) -> float:
    """FLOPs a token of one parameter's products."""
    if path[-1] not in ("weight", "lora_a", "lora_b") or path[0] not in ("decoder", "projector") or "head" in path:
        return 0.0
    block = "blocks" in path
    again = block and (path[-2] in AGAIN[remat] or (path[-1] == "lora_a" and remat != "none"))
    return math.prod(leaf.shape) * 2.0 * (1 + 1 + trained + again)
