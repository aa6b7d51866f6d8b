"""FLOPs of a training step by formula, with what the remat policy computes again: what the program's are held against.

A product with a weight costs 2 FLOPs a parameter and token forward, 2 for its input's gradient, 2 for its own where it is
trained, and 2 more where it is recomputed. Recomputed are, under `full`, all products of a block but its last (nothing needs
the MLP's result again); under `attention` and `offload` those of the output projection, of gate and up; and adapters' A, since
the gradient of B needs A x. Logits are recomputed in every chunk of the loss. Attention has 2 products of queries and keys
forward and 5 backward (the splash kernel 7: it computes scores twice), each on half of the square; `full` adds its forward
once more.

Of pairs (a volume's tokens, a text) all weights are trained, and attention goes over the whole square. BERT norms each sum: its
MLP's last product is computed again too; with dropout on its weights attention is plain, 4 products backward, and recomputed by
every policy. In several microbatches all is computed forward once more, for the vectors without gradients.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxmed.config import Experiment
from jaxmed.models.decoder import padded_vocab
from jaxmed.nn.attention_splash import padded_length
from jaxmed.nn.encoder_block import CHUNK
from jaxmed.train.flops import tower_flops

AGAIN = {
    "full": {"q", "k", "v", "o", "gate", "up"},
    "attention": {"o", "gate", "up"},
    "offload": {"o", "gate", "up"},
    "none": set(),
}
"""Projections that a policy computes a second time, with their adapters"""


def policy_flops(experiment: Experiment, length: int, trained: Mapping, frozen: Mapping, kernels: list[str]) -> float:
    """Of all devices; rows are taken to be full. `kernels`: those of the program, by name."""
    splash = any("pallas" in name for name in kernels)
    if experiment.task == "contrastive":
        return _of_pairs(experiment, splash)
    decoder, data, remat = experiment.model.decoder, experiment.data, experiment.train.remat
    tokens = data.batch * length
    total = sum(_products(path, leaf, True, remat) for path, leaf in trained.items())
    total += sum(_products(path, leaf, False, remat) for path, leaf in frozen.items())
    square = 2.0 * decoder.layers * decoder.heads * decoder.head_dim * length * length / 2 * data.batch
    head_trained = experiment.train.train_head or experiment.train.trainable == "all"
    vocab = padded_vocab(decoder.vocab + len(experiment.model.added_tokens))
    head = (2 + 2 + 2 + 2 * head_trained) * data.batch * data.supervised * vocab * decoder.width
    passes = (4 if remat == "full" else 3) if experiment.train.train_tower else 1
    images = tower_flops(experiment, data.batch * experiment.visual.images)
    times = 2 + _backward(splash) + 2 * (remat == "full")
    return tokens * total + square * times + head + passes * images


def _backward(splash: bool) -> int:
    """Products of queries and keys."""
    return 7 if splash else 5


def _products(path: tuple, leaf: Any, trained: bool, remat: str) -> float:
    """FLOPs a token of one parameter's products."""
    if path[-1] not in ("weight", "lora_a", "lora_b") or path[0] not in ("decoder", "projector") or "head" in path:
        return 0.0
    block = "blocks" in path
    again = block and (path[-2] in AGAIN[remat] or (path[-1] == "lora_a" and remat != "none"))
    return math.prod(leaf.shape) * 2.0 * (1 + 1 + trained + again)


def _of_pairs(experiment: Experiment, splash: bool) -> float:
    data, tower, contrast = experiment.data, experiment.model.tower, experiment.contrastive
    remat, text, first = experiment.train.remat, contrast.text, experiment.data.microbatches > 1
    again, full = AGAIN[remat], remat == "full"

    def block(tokens: int, width: int, mlp: int, down_again: bool, attended: float) -> float:
        attention = sum(3 + (name in again) + first for name in ("q", "k", "v", "o")) * width * width
        mlps = (3 + ("up" in again) + first + 3 + down_again + first) * width * mlp
        return 2.0 * tokens * (attention + mlps) + 2.0 * attended * width

    patches = math.prod(tower.grid)
    tokens = patches + tower.class_token
    padded = padded_length(tokens, CHUNK, 1) if splash else tokens
    products = (2 + _backward(splash) + 2 * full + 2 * first) * float(padded) ** 2
    image = tower.blocks * block(tokens, tower.width, tower.mlp, False, products)
    image += 2.0 * (2 + first) * patches * tower.patch_features * tower.width  # a volume needs no gradient
    dropped, written = bool(contrast.dropout), data.max_length
    products = (2 + (4 if dropped else 5) + 2 * (remat != "none" if dropped else full) + 2 * first) * float(written) ** 2
    texts = text.layers * block(written, text.width, text.mlp, remat != "none", products)
    projections = 2.0 * (3 + first) * (tokens * tower.width + written * text.width) * contrast.features
    loss = 2 * 2.0 * 3 * data.batch * contrast.features  # each vector with all, both ways, and two gradients
    return data.batch * (image + texts + projections + loss)
