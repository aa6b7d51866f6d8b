"""BERT, as M3D-CLIP reads reports with it: embeddings, then post-norm blocks. The pooler is not kept.

In training dropout falls where BERT has it: on the embeddings, the attention weights, and the outputs of attention and MLP.

ids and mask [B, T] -> hidden states [B, T, D]. Axis letters: B rows, T text, D width, V rows of the word table.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmed.model_config import TextEncoderConfig
from jaxmed.models.decoder import rematerialised
from jaxmed.nn.attention import Mask
from jaxmed.nn.dropout import Dropout
from jaxmed.nn.encoder_block import BlockConfig, EncoderBlock, attend_dropped, attend_within, encoder_rules, stacked_blocks
from jaxmed.nn.norm import LayerNorm
from jaxmed.nn.param import gathered, normal
from jaxmed.sharding import Rules

_INITIAL_STD = 0.02
_ON_WEIGHTS = 3
"""Number of the attention weights among a block's places for dropout"""


@dataclasses.dataclass(frozen=True)
class KeyPadding(Mask):
    """Padding is attended by nothing, but attends as text does: upstream's features of padding can then be compared too."""

    def __call__(self, position_q: jax.Array, position_k: jax.Array, segment_q: jax.Array, segment_k: jax.Array) -> jax.Array:
        there = (segment_k != 0)[..., None, :]
        return jnp.broadcast_to(there, (*segment_q.shape, segment_k.shape[-1]))


class TextEncoder(nnx.Module):
    def __init__(self, config: TextEncoderConfig, key: jax.Array):
        keys = jax.random.split(key, 4)
        axes, std = (None, "tower"), _INITIAL_STD
        self.words = normal(keys[0], (config.vocab, config.width), std, axes)
        self.positions = normal(keys[1], (config.positions, config.width), std, axes)
        self.types = normal(keys[2], (config.types, config.width), std, axes)
        self.norm = LayerNorm(config.width, config.norm_eps)
        block = BlockConfig(
            width=config.width,
            heads=config.heads,
            mlp=config.mlp,
            norm_eps=config.norm_eps,
            activation="gelu",
            post_norm=True,
            qkv_bias=True,
            drop_hidden=False,
        )
        self.blocks = stacked_blocks(block, config.layers, keys[3])
        self.config = config

    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array,
        rules: Rules,
        dtype: jnp.dtype,
        remat: str = "none",
        dropout: Dropout | None = None,
    ) -> jax.Array:
        """ids [B, T] int32, mask [B, T] (1 text, 0 padding) -> [B, T, D] in `dtype`; every token is of the first type.

        `dropout`: bits of every (sample, position), None where nothing is dropped.
        """
        rules = encoder_rules(rules)
        h = self.embed(ids, rules, dtype)
        if dropout is not None:
            h = dropout.fold(self.config.layers)(h, rules, None)
        segments, rule = mask.astype(jnp.int32), KeyPadding(causal=False, window=0)
        attend = attend_within(segments, rules, rule)

        def body(h: jax.Array, layer: tuple[EncoderBlock, jax.Array]) -> tuple[jax.Array, None]:
            block, number = layer
            if dropout is None:
                return block(h, attend, rules, None), None
            own = dropout.fold(number)
            return block(h, attend_dropped(segments, own.fold(_ON_WEIGHTS), rules, rule), rules, own), None

        layers = (self.blocks, jnp.arange(self.config.layers, dtype=jnp.uint32))
        h, _ = jax.lax.scan(rematerialised(body, remat), h, layers)
        return h

    def hidden_states(self, ids: jax.Array, mask: jax.Array, rules: Rules, dtype: jnp.dtype) -> jax.Array:
        """Every block's output [L, B, T, D], the last one included."""
        rules = encoder_rules(rules)
        attend = attend_within(mask.astype(jnp.int32), rules, KeyPadding(causal=False, window=0))

        def body(h: jax.Array, block: EncoderBlock) -> tuple[jax.Array, jax.Array]:
            h = block(h, attend, rules, None)
            return h, h

        return jax.lax.scan(body, self.embed(ids, rules, dtype), self.blocks)[1]

    def embed(self, ids: jax.Array, rules: Rules, dtype: jnp.dtype) -> jax.Array:
        """Words, positions and the first type's row, normalised: ids [B, T] -> [B, T, D]."""
        length = ids.shape[1]
        if length > self.config.positions:
            raise ValueError(f"texts of {length} tokens, the text encoder's position table has {self.config.positions} rows")
        words = gathered(self.words, rules).astype(dtype)
        h = words.at[ids].get(out_sharding=rules.spec("batch", None, None))
        same = gathered(self.positions, rules)[:length] + gathered(self.types, rules)[0]
        return self.norm(h + same.astype(dtype))
