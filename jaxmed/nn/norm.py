"""Normalisations over the last axis, computed in float32. x [..., D] -> [..., D] in x's dtype."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmed.nn.param import constant, gathered
from jaxmed.sharding import Rules


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, as transformers' LlamaRMSNorm: the product with the scale comes after the cast."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = constant((width,), 1.0, ("embed",))

    def __call__(self, x: jax.Array, rules: Rules) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * gathered(self.scale, rules).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = constant((width,), 1.0, (None,))
        self.bias = constant((width,), 0.0, (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)
