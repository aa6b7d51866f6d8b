"""The jitted sampler: prefill of a left-padded bucket, then one while_loop of decode steps; and the same cache scored.

    engine = Engine(graphdef, params, experiment, mesh, rules, limits)
    tokens, lengths = engine(batch, keys, sampling, max_new_tokens)              one prompt a row
    tokens, lengths = engine.branched(batch, rest, keys, sampling, ...)          prompts of one study, whose prefix is a row
    scores = engine.score(batch, rest, continuations)                            log-likelihoods of given answers

Prompts are padded on the left to the bucket, so one cursor serves the whole batch; an answer depends on its own prompt alone.
Over context shards prompts lie in balanced order, and so does the cache; new tokens go round the shards.
The mesh may span processes (jax.distributed): all call the engine together with the same prompts, and all get the answers.
On CPU and GPU the blocks are split (a loop over separate arrays), on TPU stacked (a scan): see jaxmed.models.decoder.

Axis letters: B batch, T bucket, R branches a row, G new tokens at most, C continuations of a branch, M tokens of one, D width,
V padded vocabulary.
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
from jaxmed.generate.begin import begin
from jaxmed.generate.likelihood import log_likelihoods
from jaxmed.generate.placement import fetched, placed
from jaxmed.generate.prompts import Rest, balanced, put
from jaxmed.generate.sampling import NEGATIVE, Sampling, choose
from jaxmed.models.vlm import Vlm
from jaxmed.sharding import Rules, whole_rows
from jaxmed.types import Batch, DecodeState


@dataclasses.dataclass(frozen=True)
class Limits:
    """What may be generated, and what ends an answer."""

    eos_ids: tuple[int, ...]
    blocked: tuple[int, ...] = ()
    """Ids that are never generated: added tokens, whose head rows nobody trained"""


@dataclasses.dataclass
class Counts:
    """What an engine has done so far, in real tokens (padding does not count)."""

    prefilled: int = 0
    """Tokens of prompts, image places included, that went through the decoder; a prefix that prompts share counts once"""
    prompted: int = 0
    """Tokens of all prompts, as if each had gone through by itself"""
    generated: int = 0
    scored: int = 0
    """Tokens whose likelihood was asked for"""
    answers: int = 0
    """Prompts that were answered"""

    def prompts(self, batch: Batch, rest: Rest | None) -> None:
        """Counts the prompts of a numpy batch."""
        prefix = (batch.segment_ids != 0).sum(axis=1)
        self.prefilled += int(prefix.sum())
        if rest is None:
            self.prompted += int(prefix.sum())
            self.answers += int((prefix > 0).sum())
            return
        more = rest.valid.sum(axis=2)
        self.prefilled += int(more.sum())
        self.prompted += int(more.sum() + (prefix[:, None] * (more > 0)).sum())
        self.answers += int((more > 0).sum())


def counted(counts: Counts) -> str:
    """For the person: what was computed, and what sharing saved."""
    text = f"{counts.answers} prompts of {counts.prompted} tokens; {counts.prefilled} were prefilled"
    if counts.prefilled < counts.prompted:
        text += f", {counts.prompted - counts.prefilled} shared with a prompt about the same images"
    made = [f"{counts.generated} tokens generated"] * bool(counts.generated)
    made += [f"{counts.scored} tokens of options judged"] * bool(counts.scored)
    return "; ".join([text, *made])


class Engine:
    """Holds the weights of one model and one compiled program per (bucket, number of new tokens, sampling)."""

    def __init__(self, graphdef: nnx.GraphDef, params: Any, experiment: Experiment, mesh: Mesh, rules: Rules, limits: Limits):
        """params: nested dict of arrays that `graphdef` merges into a Vlm; `rules`: see sharding.generation_rules."""
        self.params, self.mesh, self.rules, self.limits = params, mesh, rules, limits
        self.experiment, self.counts = experiment, Counts()
        model = (graphdef, experiment, rules, limits)
        self._generate = jax.jit(partial(_generate, *model), static_argnums=(4, 5))
        self._score = jax.jit(partial(log_likelihoods, graphdef, experiment, rules))
        self._apply = jax.jit(partial(_apply, graphdef, whole_rows(rules)), static_argnums=0)

    def placed(self, batch: Batch) -> Batch:
        """A numpy Batch of left-padded prompts as `__call__` takes it."""
        context = dict(self.mesh.shape)["context"] if self.rules.length else 1
        return put(balanced(batch, context), self.mesh, self.rules)

    def __call__(self, batch: Batch, keys: jax.Array, sampling: Sampling, max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """batch: left-padded prompts, rows without any token are empty; keys [B] typed, one a row, which carry the seed
        -> tokens [B, G] int32, the end token included, and lengths [B]."""
        tokens, lengths = self.branched(batch, None, keys[:, None], sampling, max_new_tokens)
        return tokens[:, 0], lengths[:, 0]

    def branched(
        self, batch: Batch, rest: Rest | None, keys: jax.Array, sampling: Sampling, max_new_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """batch: what the prompts of a row have in common, `rest`: how each goes on (None: not at all, R = 1); keys [B, R]
        -> tokens [B, R, G] int32, the end token included, and lengths [B, R] (0 where there is no prompt)."""
        with jax.set_mesh(self.mesh):
            program = dataclasses.replace(sampling, seed=0)  # one compilation for all seeds
            rest, keys = self._placed_rest(rest), self._placed_keys(keys)
            tokens, lengths, _ = self._generate(self.params, batch, rest, keys, program, max_new_tokens)
            return fetched(tokens), fetched(lengths)

    def score(self, batch: Batch, rest: Rest | None, continuations: np.ndarray) -> np.ndarray:
        """continuations [B, R, C, M] int32, -1 beyond their end -> log-likelihood of each token, given the prompt and those
        before it, [B, R, C, M] float32 (0 beyond the end)."""
        with jax.set_mesh(self.mesh):
            sharding = self.rules.sharding(self.mesh, "batch", None, None, None)
            wanted = placed(continuations.astype(np.int32), sharding)
            return fetched(self._score(self.params, batch, self._placed_rest(rest), wanted))

    def _placed_keys(self, keys: jax.Array) -> jax.Array:
        """Typed keys [B, R], as numbers on their way."""
        words = placed(np.asarray(jax.random.key_data(keys)), self.rules.sharding(self.mesh, "batch", None, None))
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(keys))

    def _placed_rest(self, rest: Rest | None) -> Rest | None:
        if rest is None:
            return None
        rows = rest.tokens.shape[0]
        flat = {name: getattr(rest, name).reshape(rows, -1) for name in ("tokens", "positions", "valid")}
        row = self.rules.sharding(self.mesh, "batch", None)
        reach = placed(rest.reach, self.rules.sharding(self.mesh, "batch"))
        return Rest(**{name: placed(x, row) for name, x in flat.items()}, reach=reach, branches=rest.branches)

    def apply(self, compute: Callable[[Vlm, Any, Rules], Any], inputs: Any) -> Any:
        """What `compute(model, inputs, rules)` gives (see jaxmed.generate.features), compiled once a function and shape; T of
        `inputs` is not split."""
        with jax.set_mesh(self.mesh):
            return self._apply(compute, self.params, inputs)

    @property
    def compilations(self) -> int:
        return self._generate._cache_size() + self._score._cache_size()


def _generate(
    graphdef: nnx.GraphDef,
    experiment: Experiment,
    rules: Rules,
    limits: Limits,
    params: Any,
    batch: Batch,
    rest: Rest | None,
    keys: jax.Array,
    sampling: Sampling,
    max_new_tokens: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> tokens [B, R, G], lengths [B, R], decode steps taken []"""
    model = nnx.merge(graphdef, params)
    decoder, (rows, branches) = model.decoder, keys.shape
    row, by_row, of_token = rules.spec("batch", None), rules.spec("batch", None, None), whole_rows(rules)
    table = decoder.head_table(rules)

    def next_tokens(hidden: jax.Array, seen: jax.Array, step: jax.Array) -> jax.Array:
        """hidden [B, R, D] -> [B, R]"""
        logits = decoder.logits(hidden, rules, None, table)
        logits = jax.sharding.reshard(_block(logits, limits.blocked, rules), by_row)

        def pick(logits: jax.Array, seen: jax.Array, keys: jax.Array, step: jax.Array) -> jax.Array:
            folded = jax.vmap(lambda k: jax.random.fold_in(k, step))(keys.reshape(-1))
            flat = (x.reshape(keys.size, x.shape[-1]) for x in (logits, seen))
            return choose(sampling, *flat, folded).reshape(keys.shape)

        return jax.shard_map(pick, in_specs=(by_row, by_row, row, rules.spec()), out_specs=row)(logits, seen, keys, step)

    def record(state: DecodeState, token: jax.Array) -> DecodeState:
        """Writes a chosen token of every answer that is not done."""
        ended = jnp.zeros_like(state.done)
        for end in limits.eos_ids:
            ended |= token == end
        token = jnp.where(state.done, 0, token)
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[..., None], state.steps, axis=2)
        seen = state.seen | (jnp.arange(state.seen.shape[2]) == token[..., None]) if sampling.penalised else state.seen
        return dataclasses.replace(
            state,
            tokens=tokens,
            seen=seen,
            last=token,
            lengths=state.lengths + ~state.done,
            done=state.done | ended,
            steps=state.steps + 1,
        )

    room = branches * max_new_tokens
    begun = begin(model, batch, rest, experiment, rules, room, max_new_tokens)

    def advance(state: DecodeState) -> DecodeState:
        h = decoder.embed(state.last, of_token, jnp.dtype(experiment.model.dtype))
        hidden, cache = decoder.extend(h, state.position, None, state.cache, begun.lineages, rules)
        state = dataclasses.replace(state, cache=cache, position=state.position + 1)
        return record(state, next_tokens(hidden, state.seen, state.steps))

    state = DecodeState(
        cache=begun.cache,
        tokens=jnp.zeros((rows, branches, max_new_tokens), jnp.int32, out_sharding=by_row),
        lengths=jnp.zeros((rows, branches), jnp.int32, out_sharding=row),
        last=jnp.zeros((rows, branches), jnp.int32, out_sharding=row),
        position=begun.position,
        done=begun.empty,
        seen=jnp.zeros((rows, branches, table.shape[0] if sampling.penalised else 0), jnp.bool, out_sharding=by_row),
        steps=jnp.int32(0),
    )
    state = record(state, next_tokens(begun.last, state.seen, state.steps))
    state = jax.lax.while_loop(lambda s: (s.steps < max_new_tokens) & ~jnp.all(s.done), advance, state)
    return state.tokens, state.lengths, state.steps


def _block(logits: jax.Array, blocked: tuple[int, ...], rules: Rules) -> jax.Array:
    """[B, R, V] with the blocked ids at -1e30"""
    if not blocked:
        return logits
    allowed = np.ones(logits.shape[-1], bool)
    allowed[list(blocked)] = False
    return jnp.where(jax.sharding.reshard(jnp.asarray(allowed), rules.spec("vocab")), logits, NEGATIVE)


def _apply(graphdef: nnx.GraphDef, rules: Rules, compute: Callable[[Vlm, Any, Rules], Any], params: Any, inputs: Any) -> Any:
    return compute(nnx.merge(graphdef, params), inputs, rules)
