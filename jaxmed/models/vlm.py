"""The vision-language model: image tokens projected and merged into the text by `image_index`, then the decoder.

Axis letters: B batch, T text, I images a row, N tokens an image, C features of a token, D decoder width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmed.config import Experiment, VisualConfig
from jaxmed.models.decoder import Decoder
from jaxmed.models.projector import Projector
from jaxmed.nn.attention import Layout
from jaxmed.nn.dropout import Dropout
from jaxmed.sharding import Rules
from jaxmed.types import Batch

CODE_BITS = 18


class Vlm(nnx.Module):
    def __init__(self, experiment: Experiment, key: jax.Array, split: bool):
        """`split`: separate arrays a layer (generation on CPU and GPU) instead of stacked ones."""
        key_decoder, key_projector = jax.random.split(key)
        model = experiment.model
        self.decoder = Decoder(model.decoder, experiment.lora, len(model.added_tokens), key_decoder, split)
        if experiment.visual.kind != "none":
            self.projector = Projector(model.projector, experiment.visual, model.decoder.width, key_projector)
        self.visual, self.dtype = experiment.visual, model.dtype
        self.remat, self.chunk = experiment.train.remat, experiment.train.attention_chunk

    def __call__(self, batch: Batch, rules: Rules, dropout: Dropout | None) -> jax.Array:
        """-> hidden states after the final norm [B, T, D]"""
        layout = Layout(batch.order, self.chunk)
        h = self.embed(batch, rules)
        return self.decoder(h, batch.positions, batch.segment_ids, layout, rules, self.remat, dropout)

    def embed(self, batch: Batch, rules: Rules) -> jax.Array:
        """Text embeddings with the image tokens in their places, [B, T, D]."""
        h = self.decoder.embed(batch.tokens, rules, jnp.dtype(self.dtype))
        if self.visual.kind == "none" or batch.images.shape[1] == 0:
            return h
        features = self.features(batch)
        if self.projector.position_wise:
            # gather, then project: each context shard projects only its own places
            count = features.shape[2]
            picked = gather_tokens(features, batch.image_index, rules)
            tokens = self.projector.project(picked, jnp.maximum(batch.image_index, 0) % count, rules, "length")
        else:
            projected = self.projector(features, batch.image_token_mask, batch.image_grid, rules)
            tokens = gather_tokens(projected[:, None], batch.image_index, rules)
        return jnp.where(batch.image_index[..., None] >= 0, tokens, h)

    def features(self, batch: Batch) -> jax.Array:
        """The projector's input [B, I, N, C], in the dtype of the computation."""
        images = unpack_codes(batch.images, self.visual) if self.visual.kind == "codes" else batch.images
        return self.projector.normalised(images.astype(self.dtype))

    def image_tokens(self, batch: Batch, rules: Rules) -> jax.Array:
        """Every image of the batch after the projector, [B, I * N, D] (pooled: [B, I * queries, D])."""
        return self.projector(self.features(batch), batch.image_token_mask, batch.image_grid, rules)


def gather_tokens(features: jax.Array, image_index: jax.Array, rules: Rules) -> jax.Array:
    """features [B, I, N, C], image_index [B, T] -> [B, T, C]. Each row gathers from its own images: nothing is communicated."""

    def pick(features: jax.Array, index: jax.Array) -> jax.Array:
        flat = features.reshape(features.shape[0], -1, features.shape[-1])
        return jnp.take_along_axis(flat, jnp.maximum(index, 0)[..., None], axis=1)

    specs = (rules.spec("batch", None, None, None), rules.spec("batch", "length"))
    return jax.shard_map(pick, in_specs=specs, out_specs=rules.spec("batch", "length", None))(features, image_index)


def unpack_codes(codes: jax.Array, visual: VisualConfig) -> jax.Array:
    """uint32 codes [B, I, N'] of the file's grid, channel 0 the highest bit -> ±1 [B, I, N, C], ordered and merged."""
    shifts = jnp.arange(CODE_BITS - 1, -1, -1, dtype=jnp.uint32)
    bits = (codes[..., None] >> shifts) & 1
    x = jnp.where(bits == 1, 1.0, -1.0)
    if visual.channel_order == "reverse":
        x = x[..., ::-1]
    (t, h, w), (p, q, r) = visual.grid, visual.merge
    if visual.merge == (1, 1, 1):
        return x
    lead = x.shape[:2]
    x = x.reshape(*lead, t, p, h, q, w, r, CODE_BITS)
    return x.transpose(0, 1, 2, 4, 6, 8, 3, 5, 7).reshape(*lead, t * h * w, CODE_BITS * p * q * r)
