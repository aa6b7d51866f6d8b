"""SAMF's prompt-aware fusion: a volume's features, those of its slices and the text become one vector an image.

The volume's features ask, slices and text answer: softmax over slices and over text of unscaled dot products. `ao2d` projects
the text too, and adds the mean over the text of what each token reads from the slices. The text is the row's embeddings of all
its ids before any image token is spliced in; the masks decide what counts. In training the text is split over context shards:
only scores' maxima and sums and vectors of the projected width are communicated.
Sources: SAMF (MICCAI 2025), serag-ai/SAMF.

Axis letters: B batch, I images, S slices, T text, F features of a volume, C of a slice, P projected width, D decoder width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmed.config import FusionConfig
from jaxmed.model_config import require
from jaxmed.nn.linear import Linear
from jaxmed.sharding import Rules

TORCH_INIT = -1.0
NEGATIVE = -1e30

_ROW = ("batch", None, None)


@dataclasses.dataclass(frozen=True)
class Projected:
    """The three inputs in one width, and who reads whom."""

    volume: jax.Array
    """[B, I, P]"""
    slices: jax.Array
    """[B, I, S, P]"""
    text: jax.Array
    """[B, T, P]"""
    slice_weights: jax.Array
    """[B, I, S] float32, softmax over the slices"""
    text_weights: jax.Array
    """[B, I, T] float32, softmax over the text"""


class Fusion(nnx.Module):
    def __init__(self, config: FusionConfig, d_3d: int, d_2d: int, d_text: int, key: jax.Array):
        """Features of a volume (F), features of a slice (C), width of the decoder (D)."""
        require(config.kind != "none", "model.fusion.kind is none; there is nothing to build")
        fits = config.kind == "ao2d" or config.width == d_text
        require(fits, f"model.fusion.width is {config.width}; samf compares with the text itself, so it must be {d_text}")
        keys = iter(jax.random.split(key, 4))

        def linear(out: int, into: int) -> Linear:
            return Linear(out, into, ("embed", None), next(keys), std=TORCH_INIT, bias=True)

        parts = 3
        self.project_3d = linear(config.width, d_3d)
        self.project_2d = linear(config.width, d_2d)
        if config.kind == "ao2d":
            self.project_text = linear(config.width, d_text)
            parts = 4
        self.out = linear(d_text, parts * config.width)
        self.config = config

    def __call__(
        self,
        f3d: jax.Array,
        f2d: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        rules: Rules,
        slice_mask: jax.Array | None = None,
    ) -> jax.Array:
        """f3d [B, I, F], f2d [B, I, S, C], text [B, T, D], text_mask [B, T] bool, slice_mask [B, I, S] bool (None: all)
        -> [B, I, D]: the one image token, which the caller repeats."""
        found = self.project(f3d, f2d, text, text_mask, rules, slice_mask)
        read = [found.volume, _weighted(found.slice_weights, found.slices)]
        read.append(_product("bit,btp->bip", found.text_weights.astype(found.text.dtype), found.text, rules, _ROW))
        if self.config.kind == "ao2d":
            read.append(_weighted(text_to_slices(found, text_mask, slice_mask, rules), found.slices))
        joined = jnp.concatenate([x.astype(f2d.dtype) for x in read], axis=-1)
        return self.out(joined, rules, _ROW, None)

    def weights(
        self,
        f3d: jax.Array,
        f2d: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        rules: Rules,
        slice_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """What the volume reads, for inspection: weights of the slices [B, I, S] and of the text [B, I, T], float32."""
        found = self.project(f3d, f2d, text, text_mask, rules, slice_mask)
        return found.slice_weights, found.text_weights

    def project(
        self, f3d: jax.Array, f2d: jax.Array, text: jax.Array, text_mask: jax.Array, rules: Rules, slice_mask: jax.Array | None
    ) -> Projected:
        batch, images, slices, features = f2d.shape
        p3 = self.project_3d(f3d, rules, _ROW, None)
        flat = f2d.reshape(batch, images * slices, features, out_sharding=rules.spec(*_ROW))
        p2 = self.project_2d(flat, rules, _ROW, None)
        p2 = p2.reshape(batch, images, slices, -1, out_sharding=rules.spec(*_ROW, None))
        pt = self.project_text(text, rules, ("batch", "length", None), None) if self.config.kind == "ao2d" else text
        slice_scores = jnp.einsum("bip,bisp->bis", p3, p2, preferred_element_type=jnp.float32)
        text_scores = _product("bip,btp->bit", p3, pt, rules, ("batch", None, "length"))
        return Projected(p3, p2, pt, _softmax(slice_scores, slice_mask), _softmax(text_scores, text_mask[:, None]))


def text_to_slices(found: Projected, text_mask: jax.Array, slice_mask: jax.Array | None, rules: Rules) -> jax.Array:
    """Mean over the text of each token's softmax over the slices, [B, I, S] float32."""
    scores = _product("btp,bisp->bits", found.text, found.slices, rules, ("batch", None, "length", None))
    weights = _softmax(scores, slice_mask[:, :, None] if slice_mask is not None else None)
    total = jnp.sum(jnp.where(text_mask[:, None, :, None], weights, 0.0), axis=2)
    count = jnp.sum(text_mask, axis=1, dtype=jnp.float32)
    return total / jnp.maximum(count, 1.0)[:, None, None]


def _softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Over the last axis, where `mask` holds."""
    scores = scores if mask is None else jnp.where(mask, scores, NEGATIVE)
    return jax.nn.softmax(scores, axis=-1)


def _weighted(weights: jax.Array, slices: jax.Array) -> jax.Array:
    """[B, I, S] float32, [B, I, S, P] -> [B, I, P] float32"""
    return jnp.einsum("bis,bisp->bip", weights.astype(slices.dtype), slices, preferred_element_type=jnp.float32)


def _product(formula: str, a: jax.Array, b: jax.Array, rules: Rules, axes: tuple[str | None, ...]) -> jax.Array:
    """Summed in float32, laid out as `axes` say: a sum over the text is one over its shards."""
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32, out_sharding=rules.spec(*axes))
