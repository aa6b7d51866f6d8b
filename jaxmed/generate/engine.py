"""The jitted sampler: prefill of a left-padded bucket, then one while_loop of decode steps.

    engine = Engine(graphdef, params, experiment, mesh, limits)
    tokens, lengths = engine(batch, keys, sampling, max_new_tokens)

Prompts are padded on the left to the bucket, so one cursor serves the whole batch; a row's result depends on that row alone.
Over context shards prompts lie in balanced order, and so does the cache; new tokens go round the shards.
On CPU and GPU the blocks are split (a loop over separate arrays), on TPU stacked (a scan): see jaxmed.models.decoder.

Axis letters: B batch, T bucket, G new tokens at most, V padded vocabulary.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmed.config import Experiment
from jaxmed.generate.prompts import balanced, put
from jaxmed.generate.sampling import NEGATIVE, Sampling, choose
from jaxmed.models.decoder import empty_cache
from jaxmed.models.vlm import Vlm
from jaxmed.nn.attention import layout_for
from jaxmed.nn.cache import last_token
from jaxmed.sharding import Rules, whole_rows
from jaxmed.types import Batch, DecodeState


@dataclasses.dataclass(frozen=True)
class Limits:
    """What may be generated, and what ends an answer."""

    eos_ids: tuple[int, ...]
    blocked: tuple[int, ...] = ()
    """Ids that are never generated: added tokens, whose head rows nobody trained"""


class Engine:
    """Holds the weights of one model and one compiled program per (bucket, number of new tokens, sampling)."""

    def __init__(self, graphdef: nnx.GraphDef, params: Any, experiment: Experiment, mesh: Mesh, rules: Rules, limits: Limits):
        """params: nested dict of arrays that `graphdef` merges into a Vlm; `rules`: see sharding.generation_rules."""
        self.params, self.mesh, self.rules, self.limits = params, mesh, rules, limits
        self.experiment = experiment
        model = (graphdef, experiment, rules, limits)
        self._generate = jax.jit(partial(_generate, *model), static_argnums=(3, 4))
        self._apply = jax.jit(partial(_apply, graphdef, whole_rows(rules)), static_argnums=0)

    def placed(self, batch: Batch) -> Batch:
        """A numpy Batch of left-padded prompts as `__call__` takes it."""
        context = dict(self.mesh.shape)["context"] if self.rules.length else 1
        return put(balanced(batch, context), self.mesh, self.rules)

    def __call__(self, batch: Batch, keys: jax.Array, sampling: Sampling, max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """batch: left-padded prompts, rows without any token are empty; keys [B] typed, one a row, which carry the seed
        -> tokens [B, G] int32, the end token included, and lengths [B]."""
        with jax.set_mesh(self.mesh):
            program = dataclasses.replace(sampling, seed=0)  # one compilation for all seeds
            keys = jax.device_put(keys, self.rules.sharding(self.mesh, "batch"))
            tokens, lengths, _ = self._generate(self.params, batch, keys, program, max_new_tokens)
        return np.asarray(tokens), np.asarray(lengths)

    def apply(self, compute: Callable[[Vlm, Any, Rules], Any], inputs: Any) -> Any:
        """What `compute(model, inputs, rules)` gives (see jaxmed.generate.features), compiled once a function and shape; T of
        `inputs` is not split."""
        with jax.set_mesh(self.mesh):
            return self._apply(compute, self.params, inputs)

    @property
    def compilations(self) -> int:
        return self._generate._cache_size()


def _generate(
    graphdef: nnx.GraphDef,
    experiment: Experiment,
    rules: Rules,
    limits: Limits,
    params: Any,
    batch: Batch,
    keys: jax.Array,
    sampling: Sampling,
    max_new_tokens: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> tokens [B, G], lengths [B], decode steps taken []"""
    model = nnx.merge(graphdef, params)
    decoder, rows = model.decoder, batch.tokens.shape[0]
    row, of_token = rules.spec("batch"), whole_rows(rules)
    table = decoder.head_table(rules)

    def next_tokens(hidden: jax.Array, seen: jax.Array, step: jax.Array) -> jax.Array:
        """hidden [B, D] -> [B]"""
        logits = decoder.logits(hidden[:, None], rules, None, table)[:, 0]
        logits = _block(logits, limits.blocked, rules)
        by_row = rules.spec("batch", None)
        logits = jax.sharding.reshard(logits, by_row)
        pick = jax.shard_map(
            lambda logits, seen, keys, step: choose(
                sampling, logits, seen, jax.vmap(lambda k: jax.random.fold_in(k, step))(keys)
            ),
            in_specs=(by_row, by_row, row, rules.spec()),
            out_specs=row,
        )
        return pick(logits, seen, keys, step)

    def record(state: DecodeState, token: jax.Array) -> DecodeState:
        """Writes a chosen token of every row that is not done."""
        ended = jnp.zeros_like(state.done)
        for end in limits.eos_ids:
            ended |= token == end
        token = jnp.where(state.done, 0, token)
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.steps, axis=1)
        seen = state.seen | (jnp.arange(state.seen.shape[1]) == token[:, None]) if sampling.penalised else state.seen
        return dataclasses.replace(
            state,
            tokens=tokens,
            seen=seen,
            last=token,
            lengths=state.lengths + ~state.done,
            done=state.done | ended,
            steps=state.steps + 1,
        )

    def advance(state: DecodeState) -> DecodeState:
        h = decoder.embed(state.last[:, None], of_token, jnp.dtype(experiment.model.dtype))
        hidden, cache = decoder.step(h, state.position, state.cache, rules)
        state = dataclasses.replace(state, cache=cache, position=state.position + 1)
        return record(state, next_tokens(hidden[:, 0], state.seen, state.steps))

    hidden, cache = _prefill(model, batch, experiment, rules, batch.tokens.shape[1] + max_new_tokens)
    state = DecodeState(
        cache=cache,
        tokens=jnp.zeros((rows, max_new_tokens), jnp.int32, out_sharding=rules.spec("batch", None)),
        lengths=jnp.zeros((rows,), jnp.int32, out_sharding=row),
        last=jnp.zeros((rows,), jnp.int32, out_sharding=row),
        position=jnp.max(batch.positions, axis=1) + 1,
        done=jnp.all(batch.segment_ids == 0, axis=1),
        seen=jnp.zeros((rows, table.shape[0] if sampling.penalised else 0), jnp.bool, out_sharding=rules.spec("batch", None)),
        steps=jnp.int32(0),
    )
    state = record(state, next_tokens(last_token(hidden, batch.order, rules), state.seen, state.steps))
    state = jax.lax.while_loop(lambda s: (s.steps < max_new_tokens) & ~jnp.all(s.done), advance, state)
    return state.tokens, state.lengths, state.steps


def _prefill(model: Vlm, batch: Batch, experiment: Experiment, rules: Rules, slots: int):
    dtype = jnp.dtype(experiment.model.dtype)
    config = model.decoder.config
    cache = empty_cache(config, batch.tokens.shape[0], slots, dtype, model.decoder.split, rules)
    layout = layout_for(experiment.train, batch.order, packed=False)
    h = model.embed(batch, rules)
    return model.decoder.prefill(h, batch.positions, batch.segment_ids, cache, layout, rules)


def _block(logits: jax.Array, blocked: tuple[int, ...], rules: Rules) -> jax.Array:
    """[B, V] with the blocked ids at -1e30"""
    if not blocked:
        return logits
    allowed = np.ones(logits.shape[-1], bool)
    allowed[list(blocked)] = False
    return jnp.where(jax.sharding.reshard(jnp.asarray(allowed), rules.spec("vocab")), logits, NEGATIVE)


def _apply(graphdef: nnx.GraphDef, rules: Rules, compute: Callable[[Vlm, Any, Rules], Any], params: Any, inputs: Any) -> Any:
    return compute(nnx.merge(graphdef, params), inputs, rules)
