"""The LLaMA-family decoder: embedding, blocks, final norm, head.

The blocks are either stacked (every parameter has a leading L; run by a scan, with rematerialisation: training, and
everything on TPU) or split (separate arrays a layer; run by a loop: generation on CPU and GPU, where a scan would copy each
layer's weights in every decode step). It is the same Block.

Vocabulary: the table has the base's rows, then the rows of added tokens, then zeros up to a multiple of 256. Rows of added
tokens are trained as the small array `embed.added`, which is laid over the table's rows at lookup.

Axis letters: B batch, T text, D width, V padded vocabulary, A added tokens, L layers, S cache slots, K kv heads, H head width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmed.config import DecoderConfig, LoraConfig
from jaxmed.nn import attention_cudnn
from jaxmed.nn.attention import Layout, Mask, attention, cached_attention
from jaxmed.nn.block import Block
from jaxmed.nn.cache import ROOT, Lineages, cache_marks, cache_prompt, cache_row, cache_tokens, context_shards
from jaxmed.nn.dropout import Dropout
from jaxmed.nn.linear import product
from jaxmed.nn.norm import RMSNorm
from jaxmed.nn.param import gathered, normal
from jaxmed.nn.rope import is_long, rope_angles
from jaxmed.sharding import Rules, whole_rows
from jaxmed.types import KVCache

VOCAB_MULTIPLE = 256
SCORES = 1 << 20
"""Scores of a row and head that exist at once where a cache is extended by several tokens, about"""


def padded_vocab(size: int) -> int:
    """Rows of the table for `size` tokens, a number that divides over any mesh."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Embedding(nnx.Module):
    def __init__(self, config: DecoderConfig, added: int, key: jax.Array):
        key_table, key_added = jax.random.split(key)
        rows = padded_vocab(config.vocab + added)
        self.table = normal(key_table, (rows, config.width), config.initializer_range, ("vocab", "embed"))
        if added:
            self.added = normal(key_added, (added, config.width), config.initializer_range, (None, "embed"))
        self.base_rows, self.added_rows, self.padding_row = config.vocab, added, config.padding_row

    def __call__(self, tokens: jax.Array, rules: Rules, dtype: jnp.dtype) -> jax.Array:
        """tokens [B, T] -> [B, T, D]. Each tensor shard looks up its own rows of the table; the sum over shards is the row."""
        along_t, out = rules.spec("batch", "length"), rules.spec("batch", "length", None)
        lookup = jax.shard_map(_lookup, in_specs=(rules.spec("vocab", None), along_t), out_specs=out)
        h = lookup(gathered(self.table, rules).astype(dtype), tokens)
        if self.added_rows:
            place = tokens - self.base_rows
            is_added = (place >= 0) & (place < self.added_rows)
            table = gathered(self.added, rules).astype(dtype)
            overlay = table.at[jnp.clip(place, 0, self.added_rows - 1)].get(out_sharding=out)
            h = jnp.where(is_added[..., None], overlay, h)
        if self.padding_row >= 0:
            h = jnp.where((tokens == self.padding_row)[..., None], jax.lax.stop_gradient(h), h)
        return h


def _lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Inside shard_map: table [V / tensor, D], tokens [B, T] -> [B, T, D]"""
    local = tokens - jax.lax.axis_index("tensor") * table.shape[0]
    here = (local >= 0) & (local < table.shape[0])
    rows = table[jnp.clip(local, 0, table.shape[0] - 1)]
    return jax.lax.psum(jnp.where(here[..., None], rows, 0), "tensor")


class Head(nnx.Module):
    """Output projection of an untied model; [V, D]."""

    def __init__(self, config: DecoderConfig, added: int, key: jax.Array):
        rows = padded_vocab(config.vocab + added)
        self.weight = normal(key, (rows, config.width), config.initializer_range, ("vocab", "embed"))


class Decoder(nnx.Module):
    def __init__(self, config: DecoderConfig, lora: LoraConfig, added: int, key: jax.Array, split: bool):
        key_embed, key_blocks, key_head = jax.random.split(key, 3)
        self.embed = Embedding(config, added, key_embed)
        block_keys = jax.random.split(key_blocks, config.layers)
        if split:
            self.blocks = nnx.List([Block(config, lora, k) for k in block_keys])
        else:
            self.blocks = jax.vmap(lambda k: Block(config, lora, k))(block_keys)
        self.norm = RMSNorm(config.width, config.norm_eps)
        if not config.tied:
            self.head = Head(config, added, key_head)
        self.config, self.added, self.split = config, added, split

    @property
    def mask(self) -> Mask:
        return Mask(causal=True, window=self.config.window)

    def _angles(self, positions: jax.Array, long: jax.Array | bool) -> tuple[jax.Array, jax.Array]:
        return rope_angles(positions, self.config.rope, self.config.head_dim, long)

    def _reaches_far(self, reach: jax.Array) -> jax.Array | bool:
        """Which of longrope's lists cached sequences use: [B], up to which position they may grow -> [B, 1] bool.

        Decided once for prompt and answer together: cached keys are never rotated again. (In transformers an answer that
        crosses the limit starts with the short list and is computed anew with the long one there.)
        """
        return reach[:, None] >= self.config.rope.original_positions if self.config.rope.scaling == "longrope" else False

    def __call__(
        self,
        h: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        layout: Layout,
        rules: Rules,
        remat: str,
        dropout: Dropout | None,
    ) -> jax.Array:
        """Embeddings h [B, T, D] -> hidden states after the final norm [B, T, D]; positions and segment_ids [B, T]"""
        angles = self._angles(positions, is_long(positions, segment_ids, self.config.rope))

        def attend(q, k, v):
            return attention(q, k, v, positions, segment_ids, self.mask, layout, rules), None

        def body(h, block_and_index):
            block, index = block_and_index
            bits = dropout.fold(index) if dropout is not None else None
            return block(h, angles, attend, rules, bits)[0], None

        body = rematerialised(body, remat)
        if self.split:
            for index, block in enumerate(self.blocks):
                h, _ = body(h, (block, index))
        else:
            h, _ = jax.lax.scan(body, h, (self.blocks, jnp.arange(self.config.layers)))
        return self.norm(h, rules)

    def prefill(
        self,
        h: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: KVCache,
        layout: Layout,
        rules: Rules,
        reach: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Fills an empty cache with a prompt and returns its hidden states. h [B, T, D], padded on the left (segment 0); over
        context shards T lies as `layout.order` says, and the shards divide it. `reach` [B]: see KVCache (None: to the last
        slot)."""
        if reach is None:
            reach = jnp.max(positions, axis=1) + cache.positions.shape[1] - cache.spare - positions.shape[1]
        angles = self._angles(positions, self._reaches_far(reach))

        def attend(layer_keys, layer_values):
            def inner(q, k, v):
                y = attention(q, k, v, positions, segment_ids, self.mask, layout, rules)
                return y, (cache_prompt(layer_keys, k, rules), cache_prompt(layer_values, v, rules))

            return inner

        h, keys, values = self._run_cached(h, angles, attend, cache, rules)
        seen, valid = (cache_row(*x, rules) for x in ((cache.positions, positions), (cache.valid, segment_ids != 0)))
        cursor = jnp.int32(positions.shape[1])
        return self.norm(h, rules), KVCache(keys, values, seen, valid, cache.branches, reach, cursor, cache.spare)

    def step(self, h: jax.Array, position: jax.Array, cache: KVCache, rules: Rules) -> tuple[jax.Array, KVCache]:
        """One token: h [B, 1, D], position [B] -> hidden states [B, 1, D] and the cache with one more slot."""
        return self.extend(h, position[:, None], None, cache, ROOT, rules)

    def extend(
        self,
        h: jax.Array,
        positions: jax.Array,
        valid: jax.Array | None,
        cache: KVCache,
        lineages: Lineages,
        rules: Rules,
    ) -> tuple[jax.Array, KVCache]:
        """As many more tokens of every branch: h [B, T, D], one branch's after the other, positions and valid (None: all)
        [B, T] -> hidden states [B, T, D] and the cache with T more slots. T is whole and short.

        `lineages`: the row's branches (see nn.cache.fork). A token sees its own branch's slots and those of the branches that
        it comes from.
        """
        rows, length = positions.shape
        of_token, chunk = whole_rows(rules), max(SCORES // cache.positions.shape[1], 16)
        angles = self._angles(positions, self._reaches_far(cache.reach))
        whole = of_token.spec("batch", None)
        own = np.repeat([lineage[-1] for lineage in lineages], length // len(lineages)).astype(np.int32)
        new = {
            "positions": positions,
            "valid": jnp.ones((rows, length), bool, out_sharding=whole) if valid is None else valid,
            "branches": jnp.broadcast_to(own, (rows, length), out_sharding=whole),
        }
        marks = {name: cache_marks(getattr(cache, name), x, cache.cursor, rules) for name, x in new.items()}
        seen = None
        if lineages != ROOT:
            ancestors = np.repeat(np.asarray(lineages, np.int32), length // len(lineages), axis=0)
            by_token = of_token.spec("batch", None, None)
            seen = jnp.broadcast_to(ancestors, (rows, *ancestors.shape), out_sharding=by_token)

        def attend(layer_keys, layer_values):
            def inner(q, k, v):
                kept = tuple(cache_tokens(*x, cache.cursor, rules) for x in ((layer_keys, k), (layer_values, v)))
                pieces = []
                for start in range(0, length, chunk):
                    cut = slice(start, start + chunk)
                    branches = None if seen is None else (seen[:, cut], marks["branches"])
                    where = (positions[:, cut], marks["positions"], marks["valid"])
                    pieces.append(cached_attention(q[:, cut], *kept, *where, self.mask, rules, branches))
                return jnp.concatenate(pieces, axis=1), kept

            return inner

        h, keys, values = self._run_cached(h, angles, attend, cache, of_token)
        state = KVCache(keys, values, **marks, reach=cache.reach, cursor=cache.cursor + length, spare=cache.spare)
        return self.norm(h, of_token), state

    def _run_cached(self, h: jax.Array, angles: Any, attend: Any, cache: KVCache, rules: Rules):
        """All blocks, each with its layer's cache. A stacked cache rides in the carry: elsewhere it would be copied."""
        if self.split:
            kept = []
            for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
                h, layer = block(h, angles, attend(keys, values), rules, None)
                kept.append(layer)
            return h, tuple(k for k, _ in kept), tuple(v for _, v in kept)

        def body(carry, block_and_index):
            h, keys, values = carry
            block, index = block_and_index
            layer = (jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False) for x in (keys, values))
            h, (k, v) = block(h, angles, attend(*layer), rules, None)
            keys, values = (jax.lax.dynamic_update_index_in_dim(x, y, index, 0) for x, y in ((keys, k), (values, v)))
            return (h, keys, values), None

        (h, keys, values), _ = jax.lax.scan(body, (h, cache.keys, cache.values), (self.blocks, jnp.arange(self.config.layers)))
        return h, keys, values

    def head_table(self, rules: Rules) -> jax.Array:
        """[V, D], gathered over fsdp: the head's own, or the embedding's."""
        return gathered(self.embed.table if self.config.tied else self.head.weight, rules)

    def logits(self, hidden: jax.Array, rules: Rules, length_axis: str | None, table: jax.Array | None = None) -> jax.Array:
        """hidden [B, T, D] -> [B, T, V] float32, vocabulary over `tensor`; padding rows are at -1e30.

        `length_axis` is how T is sharded; `table` a `head_table` fetched before a loop.
        """
        table = self.head_table(rules) if table is None else table
        axes = ("batch", length_axis, "vocab")
        logits = product(hidden, table.astype(hidden.dtype), rules, axes, jnp.float32)
        column = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2, out_sharding=rules.spec(None, None, "vocab"))
        size = self.config.vocab + self.added
        if self.config.tied and self.added:
            logits = self._overlay_added(logits, hidden, column, rules)
        return jnp.where(column < size, logits, -1e30) if size < logits.shape[-1] else logits

    def _overlay_added(self, logits: jax.Array, hidden: jax.Array, column: jax.Array, rules: Rules) -> jax.Array:
        """A tied head reads the trained rows of added tokens too."""
        rows = gathered(self.embed.added, rules).astype(hidden.dtype)
        for a in range(self.added):
            logit = jnp.einsum("btd,d->bt", hidden, rows[a], preferred_element_type=jnp.float32)
            logits = jnp.where(column == self.config.vocab + a, logit[..., None], logits)
        return logits


def rematerialised(body: Any, remat: str) -> Any:
    """The scan's body under a policy of TrainConfig.remat."""
    if remat == "none":
        return body
    if remat == "attention":
        policies = jax.checkpoint_policies
        named = policies.save_only_these_names("qkv", "attention_out", "attention_lse")
        policy = policies.save_from_both_policies(named, attention_cudnn.is_forward)
        return jax.checkpoint(body, policy=policy, prevent_cse=False)
    if remat == "offload":
        return jax.checkpoint(body, policy=offloaded, prevent_cse=False)
    return jax.checkpoint(body, prevent_cse=False)


def offloaded(primitive: Any, *arguments: Any, **fields: Any) -> Any:
    """A checkpoint policy: queries, keys, values and attention's output go to the host. Its log-sums are a hundredth of that
    and stay on the device; libtpu 0.0.52 does not compile the fetching of arrays of their shape (splash gives them the output's
    name; they lack its axis of head widths)."""
    policies = jax.checkpoint_policies
    if primitive.name == "name" and arguments[0].ndim < 4:
        return policies.save_only_these_names("attention_out")(primitive, *arguments, **fields)
    policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["attention_lse"],
        names_which_can_be_offloaded=["qkv", "attention_out"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    return policy(primitive, *arguments, **fields)


def empty_cache(config: DecoderConfig, batch: int, slots: int, dtype: jnp.dtype, split: bool, rules: Rules) -> KVCache:
    """Zeros, laid out as the rules say, with at least `slots` slots; made inside a jitted function."""
    spare = -slots % context_shards(rules)
    shape = (batch, config.kv_heads, slots + spare, config.head_dim)
    spec = rules.spec("batch", "kv_heads", "length", None)
    if split:
        layers = [tuple(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(config.layers)) for _ in range(2)]
    else:
        stacked = rules.spec(None, "batch", "kv_heads", "length", None)
        layers = [jnp.zeros((config.layers, *shape), dtype, out_sharding=stacked) for _ in range(2)]
    row = {"shape": (batch, slots + spare), "out_sharding": rules.spec("batch", "length")}
    positions, branches = (jnp.zeros(dtype=jnp.int32, **row) for _ in range(2))
    reach = jnp.zeros((batch,), jnp.int32, out_sharding=rules.spec("batch"))
    return KVCache(*layers, positions, jnp.zeros(dtype=jnp.bool, **row), branches, reach, jnp.int32(0), spare)
