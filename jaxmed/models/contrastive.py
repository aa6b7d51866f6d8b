"""M3D-CLIP: an image tower and a text encoder whose projected, normalised tokens share one space.

The contrastive vector is the first token of each: the tower's class token, the text's [CLS]. The loss is that of the global
batch, whatever the mesh. The scale multiplies the cosine as it is: upstream has no exponential, and no bound.

Axis letters: B pairs, N image tokens with the class token, T text, P projected width, G groups of pairs, n pairs of a group.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import reshard

from jaxmed.config import AttentionBackend
from jaxmed.model_config import TextEncoderConfig, TowerConfig
from jaxmed.models.text_encoder import TextEncoder
from jaxmed.models.vit import Vit
from jaxmed.nn.attention_mask import NEGATIVE
from jaxmed.nn.dropout import Dropout
from jaxmed.nn.encoder_block import encoder_rules
from jaxmed.nn.linear import Linear
from jaxmed.nn.param import constant
from jaxmed.sharding import Rules

_SMALLEST_NORM = 1e-12
_INITIAL_SCALE = math.log(1 / 0.07)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Which pairs are told from each other, and by what the cosines are multiplied."""

    group: int
    """Consecutive pairs that are told from each other (0: all)"""
    exp_scale: bool
    """By the exponential of `logit_scale` instead of by itself"""


PUBLISHED = Contrast(group=0, exp_scale=False)


class Contrastive(nnx.Module):
    def __init__(self, tower: TowerConfig, text: TextEncoderConfig, features: int, key: jax.Array):
        """`features`: P, upstream's width of the tower. The tower gives its class token too (`select_feature` cls_patch)."""
        if tower.select_feature == "patch":
            raise ValueError("a contrastive model's tower gives its class token: select_feature is 'cls' or 'cls_patch'")
        keys = jax.random.split(key, 4)
        self.tower = Vit(tower, keys[0])
        self.text = TextEncoder(text, keys[1])
        axes = (None, "tower")
        self.vision_projection = Linear(features, tower.width, axes, keys[2], std=-1.0, bias=True)
        self.text_projection = Linear(features, text.width, axes, keys[3], std=-1.0, bias=True)
        self.logit_scale = constant((), _INITIAL_SCALE, ())

    def encode_image(
        self, volumes: jax.Array, rules: Rules, remat: str = "none", attention: AttentionBackend = "auto"
    ) -> jax.Array:
        """volumes [B, depth, rows, columns, 1] in the dtype of the computation -> [B, N, P] float32, every token of length 1"""
        h = self.tower(volumes, rules, remat, attention)
        return normalised(self.vision_projection(h, encoder_rules(rules), ("batch", "length", None), None))

    def encode_text(
        self,
        ids: jax.Array,
        mask: jax.Array,
        rules: Rules,
        dtype: jnp.dtype,
        remat: str = "none",
        dropout: Dropout | None = None,
    ) -> jax.Array:
        """ids and mask [B, T] (1 text, 0 padding) -> [B, T, P] float32, every token of length 1"""
        h = self.text(ids, mask, rules, dtype, remat, dropout)
        return normalised(self.text_projection(h, encoder_rules(rules), ("batch", "length", None), None))

    def loss(self, image: jax.Array, text: jax.Array, rules: Rules) -> jax.Array:
        """The vectors of B pairs, image and text [B, P] float32 -> [] float32, mean over pairs and both directions."""
        there = jnp.ones(image.shape[:1], bool, out_sharding=rules.spec("batch"))
        return jnp.mean(self.losses(image, text, there, PUBLISHED, rules)[0])

    def losses(
        self, image: jax.Array, text: jax.Array, there: jax.Array, contrast: Contrast, rules: Rules
    ) -> tuple[jax.Array, jax.Array]:
        """image and text [B, P] float32, there [B] bool (rows without a pair take no part) -> of each pair [B]: its loss, mean
        of both directions, float32 and 0 where there is none; and whether its own partner has the largest of the logits
        averaged over both directions, as upstream counts accuracy."""
        scale = self.logit_scale[...].astype(jnp.float32)
        scale = jnp.exp(scale) if contrast.exp_scale else scale
        own = scale * jnp.sum(image * text, axis=-1)
        by_image, columns = products(image, text, there, contrast.group, rules)
        by_text, _ = products(text, image, there, contrast.group, rules)
        by_image, by_text = (jnp.where(columns, scale * x, NEGATIVE) for x in (by_image, by_text))
        logs = jax.nn.logsumexp(by_image, axis=-1) + jax.nn.logsumexp(by_text, axis=-1)
        best = jnp.argmax(0.5 * (by_image + by_text), axis=-1)
        right = there & (best == reshard(jnp.arange(len(best)), rules.spec("batch")))
        return jnp.where(there, 0.5 * logs - own, 0.0), right


def products(one: jax.Array, other: jax.Array, there: jax.Array, group: int, rules: Rules) -> tuple[jax.Array, jax.Array]:
    """one and other [B, P], there [B], rows split over the mesh -> one other^T [B, B], and which of it counts [B, B].

    Each shard has its own rows and all columns. `group` n > 0: columns of other groups of n rows do not count.
    """
    every, here = reshard(other, rules.spec(None, None)), reshard(there, rules.spec(None))
    found = jnp.einsum("bp,cp->bc", one, every, out_sharding=rules.spec("batch", None))
    columns = jnp.arange(len(other))
    counts = here[None, :]
    if group:
        rows = jax.lax.iota(jnp.int32, len(one)) // group
        counts = counts & (rows[:, None] == columns[None, :] // group)
    counts = reshard(jnp.broadcast_to(counts, found.shape), rules.spec("batch", None))
    return found, counts


def normalised(x: jax.Array) -> jax.Array:
    """Each token over its length, which counts as 1e-12 at least; float32."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, _SMALLEST_NORM**2))
