"""From logits to the next token. A row's draw depends on its own key alone, never on the batch it is in.

Axis letters: B batch, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxmed.errors import UserError

NEGATIVE = -1e30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the order of the filters is that of Hugging Face's generate."""

    temperature: float = 0.0
    """0: greedy"""
    top_k: int = 0
    """Draw among the k most likely tokens (0: all)"""
    top_p: float = 1.0
    """Draw among the fewest tokens that together have this probability (1: all)"""
    repetition_penalty: float = 1.0
    """Logits of tokens that the answer already has are divided (if positive) or multiplied by this (1: off). The prompt
    does not count, as in upstream, where it is embedded before `generate` sees it."""
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise UserError(f"--temperature is {self.temperature}; it must not be negative (0 is greedy)")
        if self.top_k < 0:
            raise UserError(f"--top-k is {self.top_k}; it must not be negative (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise UserError(f"--repetition-penalty is {self.repetition_penalty}; it must be above 0 (1: off)")

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0


def choose(sampling: Sampling, logits: jax.Array, seen: jax.Array, keys: jax.Array) -> jax.Array:
    """logits [B, V] float32, seen [B, V] bool (read only if a penalty is on), keys [B] typed -> tokens [B] int32"""
    if sampling.penalised:
        factor = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if sampling.top_k or sampling.top_p < 1:
        logits, ids = jax.lax.top_k(logits, count)
    else:
        ids = None
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(before < sampling.top_p, logits, NEGATIVE)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    if ids is not None:
        drawn = jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]
    return drawn.astype(jnp.int32)
