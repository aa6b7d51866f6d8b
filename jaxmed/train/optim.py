"""AdamW as torch and Hugging Face's trainer have it: groups, schedules and clipping.

Sources: torch.optim.AdamW; huggingface/transformers, src/transformers/optimization.py; torch.nn.utils.clip_grad_norm_.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmed.config import OptimConfig

Path = tuple[str | int, ...]
NO_DECAY = ("bias", "scale")
"""Last names of parameters that weight decay leaves alone: biases and the scales of norms."""
FIXED = ("norm_mean", "norm_sd")
"""Saved with the trainable half, never updated."""


def schedule(optim: OptimConfig, peak: float, steps: int) -> Callable[[Any], jax.Array]:
    """Learning rate of update k = 0, 1, ... With warm-up the first update has rate 0, without one it has the peak."""
    warmup = optim.warmup_steps or math.ceil(optim.warmup_ratio * steps)
    decay = max(1, steps - warmup)

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(1, warmup)
        # 1 - progress and 1 + cos(pi * progress) would cancel near the end; what is left of the steps is exact
        left = jnp.clip((warmup + decay - step) / decay, 0.0, 1.0)
        shapes = {"cosine": jnp.sin(jnp.pi / 2 * left) ** 2, "linear": left, "constant": jnp.ones_like(left)}
        floor = optim.final_fraction if optim.schedule != "constant" else 0.0
        falling = floor + (1 - floor) * shapes[optim.schedule]
        return peak * jnp.where(step < warmup, rising, falling)

    return rate


def own_rates(optim: OptimConfig) -> dict[str, float]:
    """Peak learning rate of each part of the model that has a group of its own."""
    given = {"tower": optim.tower_learning_rate, "embed": optim.embed_learning_rate}
    base = optim.learning_rate
    return {"projector": optim.projector_learning_rate or base} | {part: rate for part, rate in given.items() if rate}


def label(path: Path, parts: Collection[str]) -> str:
    """The optimizer group of a parameter: {part, other} x {decay, no_decay}, or `fixed`."""
    if path[-1] in FIXED:
        return "fixed"
    embeds = path[:2] in (("decoder", "embed"), ("decoder", "head"))
    part = "embed" if embeds else path[0]
    return f"{part if part in parts else 'other'}_{'no_decay' if path[-1] in NO_DECAY else 'decay'}"


def tree_paths(tree: Any) -> Any:
    """A nested dict like `tree` whose leaves are their paths."""
    return jax.tree_util.tree_map_with_path(lambda path, _: tuple(k.key for k in path), tree)


def make_optimizer(optim: OptimConfig, steps: int, trainable: Any) -> optax.GradientTransformation:
    """For a nested dict of trainable arrays (or their shapes). Moments are float32."""
    rates = own_rates(optim) | {"other": optim.learning_rate}
    labels = jax.tree.map(lambda path: label(path, rates), tree_paths(trainable), is_leaf=lambda x: isinstance(x, tuple))

    def adamw(peak: float, decay: float) -> optax.GradientTransformation:
        return optax.adamw(schedule(optim, peak, steps), b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=decay)

    groups = {"fixed": optax.set_to_zero()}
    for part, peak in rates.items():
        groups |= {f"{part}_decay": adamw(peak, optim.weight_decay), f"{part}_no_decay": adamw(peak, 0.0)}
    return optax.multi_transform(groups, labels)


def clip(grads: Any, max_norm: float) -> tuple[Any, jax.Array]:
    """-> gradients scaled so that their global norm is at most `max_norm` (0: as they are), and the norm before."""
    norm = optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    if not max_norm:
        return grads, norm
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, grads), norm
