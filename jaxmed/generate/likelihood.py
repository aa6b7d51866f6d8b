"""How likely given answers are: several continuations of every prompt from one cache, none of it repeated.

Axis letters: B batch, R branches a row (prompts), C continuations of a prompt, M tokens of one, D width, V padded vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmed.config import Experiment
from jaxmed.generate.begin import begin
from jaxmed.generate.prompts import Rest
from jaxmed.nn.cache import fork
from jaxmed.sharding import Rules, whole_rows
from jaxmed.types import Batch


def log_likelihoods(
    graphdef: nnx.GraphDef,
    experiment: Experiment,
    rules: Rules,
    params: Any,
    batch: Batch,
    rest: Rest | None,
    continuations: jax.Array,
) -> jax.Array:
    """Log-likelihoods [B, R, C, M] of `continuations` (-1 beyond their end). All grow from the same cache: the first token of
    each is judged by the prompt's last hidden state, the others by those of a branch of their own."""
    model = nnx.merge(graphdef, params)
    decoder, (rows, branches, count, length) = model.decoder, continuations.shape
    table, of_token = decoder.head_table(rules), whole_rows(rules)
    begun = begin(model, batch, rest, experiment, rules, branches * count * (length - 1), length)
    first = _of_tokens(decoder.logits(begun.last, rules, None, table), continuations[..., 0], rules)
    if length == 1:
        return first[..., None]
    whole = {"out_sharding": rules.spec("batch", None)}
    fed = jnp.maximum(continuations[..., :-1], 0)
    positions = begun.position[:, :, None, None] + jnp.broadcast_to(jnp.arange(length - 1), fed.shape)
    h = decoder.embed(fed.reshape(rows, -1, **whole), of_token, jnp.dtype(experiment.model.dtype))
    valid = (continuations[..., :-1] >= 0).reshape(rows, -1, **whole)
    lineages = fork(begun.lineages, count)
    hidden, _ = decoder.extend(h, positions.reshape(rows, -1, **whole), valid, begun.cache, lineages, rules)
    split = rules.spec("batch", None, None, None)
    hidden = hidden.reshape(rows, branches * count, length - 1, -1, out_sharding=split)
    wanted = continuations[..., 1:].reshape(rows, branches * count, length - 1, out_sharding=rules.spec("batch", None, None))

    def of_place(place: jax.Array) -> jax.Array:
        """One token of every continuation at a time: logits of all would not fit."""
        here, token = (jax.lax.dynamic_index_in_dim(x, place, 2, keepdims=False) for x in (hidden, wanted))
        return _of_tokens(decoder.logits(here, rules, None, table), token[..., None], rules)[..., 0]

    others = jnp.moveaxis(jax.lax.map(of_place, jnp.arange(length - 1)), 0, -1)
    others = others.reshape(rows, branches, count, length - 1, out_sharding=split)
    return jnp.concatenate([first[..., None], others], axis=-1)


def _of_tokens(logits: jax.Array, tokens: jax.Array, rules: Rules) -> jax.Array:
    """logits [B, R, V], tokens [B, R, C] (-1: none) -> [B, R, C] float32, 0 where there is none"""
    spec = rules.spec("batch", None, None)

    def pick(logits: jax.Array, tokens: jax.Array) -> jax.Array:
        found = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), jnp.maximum(tokens, 0), axis=-1)
        return jnp.where(tokens >= 0, found, 0.0)

    return jax.shard_map(pick, in_specs=(spec, spec), out_specs=spec)(jax.sharding.reshard(logits, spec), tokens)
