"""Dropout whose bits depend on (seed, step, layer, place, sample, position, feature), never on an array index.

A batch may therefore be sharded, permuted along T, split into microbatches or packed differently, and each token of each
sample keeps the same bits. The generator is a hash (the finaliser of MurmurHash3, Austin Appleby, public domain): a few integer
operations an element, no communication.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxmed.sharding import Rules


def mix(x: jax.Array) -> jax.Array:
    """uint32 -> uint32, MurmurHash3's 32-bit finaliser."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """What a block needs to draw its bits."""

    bits: jax.Array
    """[B, T] uint32, one hash per token"""
    rate: float = dataclasses.field(metadata={"static": True})

    @staticmethod
    def for_tokens(key: jax.Array, segment_ids: jax.Array, positions: jax.Array, rate: float) -> "Dropout":
        """key: a typed key already folded with the step; segment_ids and positions [B, T]."""
        words = jax.random.key_data(key).astype(jnp.uint32)
        bits = mix(segment_ids.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + words[0])
        return Dropout(mix(bits ^ (positions.astype(jnp.uint32) * jnp.uint32(0x27D4EB2F) + words[1])), rate)

    def fold(self, number: jax.Array | int) -> "Dropout":
        """Bits for another layer or another place in a layer."""
        return Dropout(mix(self.bits + jnp.uint32(0x632BE5AB) * (jnp.asarray(number).astype(jnp.uint32) + 1)), self.rate)

    def __call__(self, x: jax.Array, rules: Rules, feature_axis: str | None) -> jax.Array:
        """x [B, T, F], its last axis sharded as `feature_axis` -> x with a share `rate` zeroed, the rest scaled up."""
        feature = jax.lax.broadcasted_iota(
            jnp.uint32, (1, 1, x.shape[-1]), 2, out_sharding=rules.spec(None, None, feature_axis)
        )
        bits = mix(self.bits[..., None] ^ (feature * jnp.uint32(0x165667B1)))
        keep = bits >= jnp.uint32(round(self.rate * 2**32))
        # a product: of a `where` JAX would keep the zeros, as large as x, for all of a loop over layers
        return x / (1.0 - self.rate) * keep.astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """What a training step draws; None where nothing is dropped."""

    tokens: Dropout | None
    """Of the adapters' inputs"""
    samples: jax.Array | None
    """[B] uint32, one hash a row, for what works on a sample's image"""

    @staticmethod
    def of_step(key: jax.Array, segment_ids: jax.Array, positions: jax.Array, adapter_rate: float, images: bool) -> "Draws":
        """key: folded with the step; segment_ids and positions [B, T]; `images`: whether samples' images are drawn for, with
        one sample a row."""
        tokens = Dropout.for_tokens(key, segment_ids, positions, adapter_rate) if adapter_rate else None
        if not images:
            return Draws(tokens, None)
        words = jax.random.key_data(key).astype(jnp.uint32)
        sample = jnp.max(segment_ids, axis=1).astype(jnp.uint32)
        return Draws(tokens, mix(mix(sample * jnp.uint32(0x9E3779B1) + words[1]) ^ words[0]))
