"""Prompts into a cache: what those of a row have in common once, then how each goes on. Sampling and scoring start from here.

Axis letters: B batch, T bucket, R branches a row, U tokens of a branch's rest, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxmed.config import Experiment
from jaxmed.generate.prompts import Rest
from jaxmed.models.decoder import empty_cache
from jaxmed.models.vlm import Vlm
from jaxmed.nn.attention import layout_for
from jaxmed.nn.cache import ROOT, Lineages, fork, last_token
from jaxmed.sharding import Rules, whole_rows
from jaxmed.types import Batch, KVCache


@dataclasses.dataclass(frozen=True)
class Begun:
    """Prompts in the cache, nothing written yet."""

    cache: KVCache
    lineages: Lineages
    last: jax.Array
    """[B, R, D] hidden states of the prompts' last tokens"""
    position: jax.Array
    """[B, R] int32, of the token to come"""
    empty: jax.Array
    """[B, R] bool, whether there is no prompt"""


def begin(model: Vlm, batch: Batch, rest: Rest | None, experiment: Experiment, rules: Rules, room: int, ahead: int) -> Begun:
    """Prefills what the prompts of a row share, then the rest of each; `room`: slots to be left;
    `ahead`: tokens that may follow a prompt."""
    decoder, rows, of_token = model.decoder, batch.tokens.shape[0], whole_rows(rules)
    dtype = jnp.dtype(experiment.model.dtype)
    slots = batch.tokens.shape[1] + room + (rest.tokens.shape[1] if rest is not None else 0)
    cache = empty_cache(decoder.config, rows, slots, dtype, decoder.split, rules)
    layout = layout_for(experiment.train, batch, packed=False)
    reach = rest.reach if rest is not None else jnp.max(batch.positions, axis=1) + ahead
    h = model.embed(batch, rules)
    hidden, cache = decoder.prefill(h, batch.positions, batch.segment_ids, cache, layout, rules, reach)
    if rest is None:
        position = jnp.max(batch.positions, axis=1, keepdims=True) + 1
        empty = jnp.all(batch.segment_ids == 0, axis=1, keepdims=True)
        row = rules.spec("batch", None)
        position, empty = (jax.sharding.reshard(x, row) for x in (position, empty))
        return Begun(cache, ROOT, last_token(hidden, batch.order, rules)[:, None], position, empty)
    lineages = fork(ROOT, rest.branches)
    h = decoder.embed(rest.tokens, of_token, dtype)
    hidden, cache = decoder.extend(h, rest.positions, rest.valid, cache, lineages, rules)

    def last(x: jax.Array) -> jax.Array:
        tail = x.shape[2:]
        split = x.reshape(rows, rest.branches, -1, *tail, out_sharding=rules.spec("batch", *[None] * (2 + len(tail))))
        return split[:, :, -1]

    return Begun(cache, lineages, last(hidden), last(rest.positions) + 1, ~last(rest.valid))
