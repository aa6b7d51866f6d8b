"""What a model computes on the way, as functions that the engine compiles: (model, batch, rules) -> arrays.

Axis letters: B batch, T bucket, V padded vocabulary, I images a row, N tokens an image, C features, S slices, F features of a
volume, L blocks of the tower, M inputs of the tower (B * I, for slices B * I * S), D decoder width.
"""

import jax
import jax.numpy as jnp

from jaxmed.models.vlm import Vlm
from jaxmed.sharding import Rules
from jaxmed.types import Batch


def logits(model: Vlm, batch: Batch, rules: Rules) -> jax.Array:
    """[B, T, V] float32 at every position of the prompts; padding of the vocabulary is at -1e30."""
    return model.decoder.logits(model(batch, rules, None), rules, None)


def image_features(model: Vlm, batch: Batch, rules: Rules) -> jax.Array:
    """Before projector or fusion [B, I, N, C]."""
    return model.features(batch, rules)


def image_tokens(model: Vlm, batch: Batch, rules: Rules) -> jax.Array:
    """As the decoder reads them [B, I * places, D]."""
    return model.image_tokens(batch, rules)


def hidden_states(model: Vlm, batch: Batch, rules: Rules) -> jax.Array:
    """Every block's output of the tower [L, M, N', C]."""
    return jnp.stack(model.tower.hidden_states(model.tower_inputs(batch.images, rules), rules))


def tower(model: Vlm, inputs: jax.Array, rules: Rules) -> jax.Array:
    """inputs [M, *image, channels] -> [M, N, C]"""
    return model.tower(inputs.astype(model.dtype), rules)


def volume_features(model: Vlm, batch: Batch, rules: Rules) -> jax.Array:
    """[B, I, F]"""
    return model.volume_features(model.features(batch, rules), rules)


def fusion_weights(model: Vlm, batch: Batch, rules: Rules) -> tuple[jax.Array, jax.Array]:
    """Slices [B, I, S], text [B, I, T]."""
    slices = model.features(batch, rules)
    text = model.decoder.embed(batch.tokens, rules, jnp.dtype(model.dtype))
    return model.fusion.weights(model.volume_features(slices, rules), slices, text, model.text_mask(batch, rules), rules)
