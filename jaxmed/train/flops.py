"""Model FLOPs of a training step, for MFU: what the mathematics needs, recomputation not counted.

A product with a weight costs 2 FLOPs a parameter and token forward, 2 for the gradient of its input, 2 more for its own
gradient if it is trained. Causal attention over T costs 2 T D a layer and token forward, 2.5 times that backward (with the
recomputation that every flash kernel does).
"""

import math
from typing import Any

import jax

from jaxmed.config import Experiment

PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Dense bfloat16 FLOPs a second, from the makers' sheets"""


def peak_flops(device: jax.Device) -> float:
    """Of one device; 0 where it is not known (a CPU)."""
    kinds = sorted((name for name in PEAKS if name in device.device_kind), key=len)
    return PEAKS[kinds[-1]] if kinds else 0.0


def weight_counts(trainable: dict[tuple, Any], frozen: dict[tuple, Any]) -> tuple[int, int]:
    """(trained, frozen) parameters of matrices that multiply every token of the text: embedding and head are left out, and so
    is what works on images alone (tower, aggregator, fusion)."""

    def count(leaves: dict[tuple, Any]) -> int:
        return sum(
            math.prod(x.shape)
            for path, x in leaves.items()
            if path[-1] in ("weight", "lora_a", "lora_b") and path[0] in ("decoder", "projector") and "head" not in path
        )

    return count(trainable), count(frozen)


def step_flops(experiment: Experiment, trained: int, frozen: int, lengths: list[int], supervised: int, images: int) -> float:
    """Of one optimizer step over samples of these lengths, with so many supervised tokens and images."""
    decoder = experiment.model.decoder
    tokens = sum(lengths)
    matrices = tokens * (6.0 * trained + 4.0 * frozen)
    attention = 3.5 * 2.0 * decoder.layers * decoder.heads * decoder.head_dim * sum(n * n for n in lengths)
    head = 4.0 * supervised * decoder.vocab * decoder.width
    return matrices + attention + head + tower_flops(experiment, images) * (3 if experiment.train.train_tower else 1)


def tower_flops(experiment: Experiment, images: int) -> float:
    """Of the image tower, forward; 0 where token files stand in its place. A volume of slices is as many inputs."""
    tower, visual = experiment.model.tower, experiment.visual
    if not experiment.has_tower:
        return 0.0
    inputs = images * (visual.slices if visual.kind == "slices" else 1)
    tokens = math.prod(tower.grid) + tower.class_token
    layer = 2.0 * tokens * (4 * tower.width**2 + 2 * tower.width * tower.mlp) + 4.0 * tokens * tokens * tower.width
    return inputs * (tower.blocks * layer + 2.0 * tokens * tower.patch_features * tower.width)


def pair_flops(experiment: Experiment) -> float:
    """Of a volume and its report in contrastive pretraining: every matrix is trained, attention goes over all of the tokens."""
    tower, text, contrast = experiment.model.tower, experiment.contrastive.text, experiment.contrastive
    patches = math.prod(tower.grid)

    def encoder(tokens: int, width: int, mlp: int, layers: int) -> float:
        matrices = layers * (4 * width * width + 2 * width * mlp) + width * contrast.features
        return 6.0 * tokens * matrices + 3.5 * 4.0 * layers * width * tokens * tokens

    image = encoder(patches + tower.class_token, tower.width, tower.mlp, tower.blocks)
    image += 6.0 * patches * tower.patch_features * tower.width
    return image + encoder(experiment.data.max_length, text.width, text.mlp, text.layers)
