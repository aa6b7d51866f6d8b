"""The vision-language model: image tokens merged into the text by `image_index`, then the decoder.

What stands before the merge is a matter of config: token files or a tower (2-D, 3-D, or 2-D over the slices of a volume), a
projector, or SAMF's aggregator and its fusion, which reads the row's text.

Axis letters: B batch, T text, I images a row, N tokens an image, C features of a token, S slices, F features of a volume,
D decoder width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmed.config import Experiment, VisualConfig
from jaxmed.models.aggregator import Aggregator
from jaxmed.models.decoder import Decoder
from jaxmed.models.fusion import Fusion
from jaxmed.models.projector import Projector
from jaxmed.models.vit import Vit
from jaxmed.nn.attention import layout_for
from jaxmed.nn.dropout import Draws, mix
from jaxmed.sharding import Rules
from jaxmed.types import Batch

CODE_BITS = 18


class Vlm(nnx.Module):
    def __init__(self, experiment: Experiment, key: jax.Array, split: bool):
        """`split`: separate arrays a layer (generation on CPU and GPU) instead of stacked ones."""
        key_decoder, key_projector, key_tower, key_fusion = jax.random.split(key, 4)
        model, self.visual, self.has_tower = experiment.model, experiment.visual, experiment.has_tower
        self.decoder = Decoder(model.decoder, experiment.lora, len(model.added_tokens), key_decoder, split)
        if self.has_images:
            if self.has_tower:
                self.tower = Vit(model.tower, key_tower)
            if model.fusion.kind == "none":
                self.projector = Projector(model.projector, experiment.visual, model.decoder.width, key_projector)
            else:
                widths = (model.aggregator.features, model.tower.width, model.decoder.width)
                self.aggregator = Aggregator(model.aggregator, model.tower.width, self.visual.slices, key_projector)
                self.fusion = Fusion(model.fusion, *widths, key_fusion)
        self.model, self.dtype = model, model.dtype
        self.remat, self.train, self.packed = experiment.train.remat, experiment.train, experiment.data.pack

    @property
    def has_images(self) -> bool:
        return self.visual.kind != "none"

    def __call__(self, batch: Batch, rules: Rules, draws: Draws | None) -> jax.Array:
        """-> hidden states after the final norm [B, T, D]"""
        layout = layout_for(self.train, batch, self.packed)
        tokens, samples = (draws.tokens, draws.samples) if draws is not None else (None, None)
        h = self.embed(batch, rules, samples)
        return self.decoder(h, batch.positions, batch.segment_ids, layout, rules, self.remat, tokens)

    def embed(self, batch: Batch, rules: Rules, samples: jax.Array | None = None) -> jax.Array:
        """Text embeddings with the image tokens in their places, [B, T, D]."""
        h = self.decoder.embed(batch.tokens, rules, jnp.dtype(self.dtype))
        if not self.has_images or batch.images.shape[1] == 0:
            return h
        features = self.features(batch, rules)
        if self.model.fusion.kind != "none":
            # one vector an image, whatever the place
            fused = self.fused(features, h, batch, rules, samples)
            index = jnp.where(batch.image_index >= 0, batch.image_index // self.model.fusion.tokens, -1)
            tokens = gather_tokens(fused[:, :, None], index, rules)
        elif self.projector.position_wise:
            # gather, then project: each context shard projects only its own places
            count = features.shape[2]
            picked = gather_tokens(features, batch.image_index, rules)
            tokens = self.projector.project(picked, jnp.maximum(batch.image_index, 0) % count, rules, "length")
        else:
            projected = self.projector(features, batch.image_token_mask, batch.image_grid, rules)
            tokens = gather_tokens(projected[:, None], batch.image_index, rules)
        return jnp.where(batch.image_index[..., None] >= 0, tokens, h)

    def features(self, batch: Batch, rules: Rules) -> jax.Array:
        """What the projector or the fusion reads, [B, I, N, C], in the dtype of the computation."""
        if self.has_tower:
            return self.tower_features(batch.images, rules)
        images = unpack_codes(batch.images, self.visual) if self.visual.kind == "codes" else batch.images
        return self.projector.normalised(images.astype(self.dtype))

    def tower_features(self, images: jax.Array, rules: Rules) -> jax.Array:
        """pixels [B, I, H, W, 3], volumes [B, I, D, H, W, 1] or slices [B, I, S, H, W] -> the tower's tokens [B, I, N, C]"""
        x = self.tower_inputs(images, rules)
        y = self.tower(x, rules, self.remat, self.train.attention)
        row = rules.spec("batch", None, None, None)
        return y.reshape(*images.shape[:2], -1, y.shape[-1], out_sharding=row)

    def tower_inputs(self, images: jax.Array, rules: Rules) -> jax.Array:
        """[B, I, ...] -> the tower's inputs, one after the other; a slice becomes three equal channels."""
        x = images.astype(self.dtype)
        if self.visual.kind == "slices":
            x = jnp.broadcast_to(x[..., None], (*x.shape, self.model.tower.channels))
        inner = x.shape[-(len(self.model.tower.image) + 1) :]
        return x.reshape(-1, *inner, out_sharding=rules.spec("batch", *[None] * len(inner)))

    def fused(
        self, slices: jax.Array, text: jax.Array, batch: Batch, rules: Rules, samples: jax.Array | None = None
    ) -> jax.Array:
        """slices [B, I, S, C], text [B, T, D] -> [B, I, D]"""
        volumes = self.volume_features(slices, rules, samples)
        return self.fusion(volumes, slices, text, self.text_mask(batch, rules), rules)

    def volume_features(self, slices: jax.Array, rules: Rules, samples: jax.Array | None = None) -> jax.Array:
        """[B, I, S, C] -> [B, I, F]; `samples` [B] as in Draws"""
        batch, images, count, width = slices.shape
        flat = slices.reshape(-1, count, width, out_sharding=rules.spec("batch", None, None))
        bits = None
        if samples is not None:
            image = jnp.arange(images, dtype=jnp.uint32)
            bits = mix(samples[:, None] ^ mix(image)[None]).reshape(-1, out_sharding=rules.spec("batch"))
        return self.aggregator(flat, rules, bits).reshape(batch, images, -1, out_sharding=rules.spec("batch", None, None))

    def text_mask(self, batch: Batch, rules: Rules) -> jax.Array:
        """[B, T] bool: the text that the fusion reads."""
        mask = batch.segment_ids != 0
        if self.model.fusion.text_scope == "all":
            return mask
        # The question: what comes behind the placeholders and before the first supervised token. Its first id may have lost its
        # place to an image token, and a placeholder may have kept its own (data.splice offset without a BOS).
        placeholder = jnp.max(jnp.where(batch.image_index == 0, batch.tokens, -1), axis=1, keepdims=True)
        start = jnp.max(jnp.where(batch.tokens == placeholder, batch.positions, -1), axis=1, keepdims=True)
        whole = jax.sharding.reshard(batch.positions, rules.spec("batch", None))
        at = jnp.take_along_axis(whole, jnp.maximum(batch.supervised, 0), axis=1)
        last = jnp.min(jnp.where(batch.supervised >= 0, at, batch.positions.shape[1]), axis=1, keepdims=True)
        return mask & (batch.positions > start) & (batch.positions <= last)

    def image_tokens(self, batch: Batch, rules: Rules) -> jax.Array:
        """Every image of the batch as the decoder reads it, [B, I * places, D]."""
        features = self.features(batch, rules)
        if self.model.fusion.kind == "none":
            return self.projector(features, batch.image_token_mask, batch.image_grid, rules)
        text = self.decoder.embed(batch.tokens, rules, jnp.dtype(self.dtype))
        fused = self.fused(features, text, batch, rules)
        return jnp.repeat(fused, self.model.fusion.tokens, axis=1)


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
