"""What the mathematics of a step needs at least: FLOPs of the model, and bytes that its sharding must send.

Nothing here looks at the program: these are the figures that the program's are held against.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxmed.config import Experiment
from jaxmed.models.decoder import padded_vocab
from jaxmed.train.flops import pair_flops, step_flops, tower_flops, weight_counts

TABLES = ("words", "positions", "types")
"""Parameters of encoders of which rows are taken"""


def model_flops(experiment: Experiment, step: str, length: int, trained: dict, frozen: dict) -> float:
    """Of all devices, without recomputation; rows are taken to be full."""
    if experiment.task == "contrastive":
        return experiment.data.batch * pair_flops(experiment)
    decoder, rows = experiment.model.decoder, experiment.data.batch
    images = rows * experiment.visual.images
    in_trained, in_frozen = weight_counts(trained, frozen)
    if step == "train":
        supervised = rows * experiment.data.supervised
        return step_flops(experiment, in_trained, in_frozen, [length] * rows, supervised, images)
    wide = decoder.layers * decoder.heads * decoder.head_dim
    adapters = sum(math.prod(x.shape) for half in (trained, frozen) for p, x in half.items() if p[-1] in ("lora_a", "lora_b"))
    matrices = 2.0 * (in_trained + in_frozen - adapters)
    head = 2.0 * padded_vocab(decoder.vocab) * decoder.width
    if step == "prefill":
        return rows * (length * matrices + 2.0 * wide * length * length + head) + tower_flops(experiment, images)
    return rows * (matrices + 4.0 * wide * length + head)


def least_sent(experiment: Experiment, step: str, length: int, trained: dict, frozen: dict) -> dict[str, float]:
    """Bytes that one device must send in one step, by mesh axis.

    fsdp      every split frozen weight once a pass (forward and backward; the embedding forward alone), and once more a
              microbatch; every adapter and its gradient likewise
    context   keys and values of a layer once a pass that computes attention, and their gradients back
    tensor    sums over [B, T, D] a layer: two forward, two backward, one more where attention's output is recomputed
    data      gradients of the trainables

    Of pairs every weight is trained, and comes once more where vectors are made without gradients first (a table of tokens or
    positions is not needed backward).
    """
    mesh, decoder, data = experiment.mesh, experiment.model.decoder, experiment.data
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "context": mesh.context, "tensor": mesh.tensor}
    share = {axis: (n - 1) / n for axis, n in sizes.items()}
    training, pairs = step == "train", experiment.task == "contrastive"
    passes = (3 if pairs and data.microbatches > 1 else 2) if training else 1
    sent: Counter[str] = Counter()
    for path, leaf in frozen.items():
        if _split(leaf, "fsdp"):
            gathered = _local(leaf) * sizes["fsdp"]
            sent["fsdp"] += share["fsdp"] * gathered * (1 if path[-1] == "table" else passes) * data.microbatches
    recomputed = training and experiment.train.remat == "full"
    rows, width = data.batch / (sizes["data"] * sizes["fsdp"]), jnp.dtype(experiment.model.dtype).itemsize
    if training:
        for path, leaf in trained.items():
            whole = _local(leaf) * (sizes["fsdp"] if _split(leaf, "fsdp") else 1)
            if _split(leaf, "fsdp"):  # gathered in the computation's dtype forward and backward, gradients scattered
                times = (passes - (path[-1] in TABLES)) * data.microbatches
                sent["fsdp"] += share["fsdp"] * whole * (times * width / 4 + 1)
            else:
                sent["fsdp"] += 2 * share["fsdp"] * whole
            for axis in ("data", "context"):
                sent[axis] += 2 * share[axis] * _local(leaf)
    if pairs:
        return {axis: sent[axis] for axis in ("data", "fsdp") if sizes[axis] > 1}
    if training:
        keys = 2 * rows * length * decoder.kv_heads * decoder.head_dim / sizes["tensor"] * width
        sent["context"] += share["context"] * keys * decoder.layers * (2 + recomputed)
    tokens = rows * (length if step != "decode" else 1) / (sizes["context"] if training else 1)
    sums = decoder.layers * (4 + (experiment.train.remat != "none") if training else 2)
    sent["tensor"] += 2 * share["tensor"] * tokens * decoder.width * width * sums
    return {axis: sent[axis] for axis in sizes if sizes[axis] > 1}


def frozen_twice(experiment: Experiment, step: str, frozen: dict) -> float:
    """(n - 1) / n of the frozen bytes that fsdp splits, forward and backward (generation: forward), every microbatch."""
    n, training = experiment.mesh.fsdp, step == "train"
    passes = 2 * experiment.data.microbatches if training else 1
    return passes * (n - 1) / n * sum(_local(leaf) * n for leaf in frozen.values() if _split(leaf, "fsdp"))


def _split(leaf: Any, axis: str) -> bool:
    return any(axis in ((e,) if isinstance(e, str) else e or ()) for e in leaf.sharding.spec)


def _local(leaf: Any) -> float:
    return float(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)


def gathered_shapes(leaves: Mapping[tuple, Any]) -> set[tuple]:
    """Shapes in which parameters appear when they are gathered: whole, and one layer's."""
    shapes = {tuple(leaf.shape) for leaf in leaves.values()}
    return shapes | {shape[1:] for shape in shapes if len(shape) > 2}
