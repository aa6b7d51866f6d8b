"""3-D convolutions that are causal in time, and the normalisation that stands between them. Channels last.

Axis letters: B windows, T frames, H rows, W columns, C channels.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmed.nn.param import constant, uniform

Triple = tuple[int, int, int]


class CausalConv(nnx.Module):
    """x [B, T, H, W, in] -> [B, T', H', W', out], in x's dtype.

    Frame t sees frames t - kernel + 1 to t alone: all zeros that are padded in time come before the first frame. The weight is
    stored as torch stores it, [out, in, T, H, W].
    """

    def __init__(self, out_features: int, in_features: int, kernel: int, key: jax.Array, *, stride: Triple, bias: bool):
        key_weight, key_bias = jax.random.split(key)
        bound = (in_features * kernel**3) ** -0.5
        self.weight = uniform(key_weight, (out_features, in_features, kernel, kernel, kernel), bound, (None,) * 5)
        if bias:
            self.bias = uniform(key_bias, (out_features,), bound, (None,))
        self.kernel, self.stride, self.has_bias = kernel, stride, bias

    def __call__(self, x: jax.Array) -> jax.Array:
        side = (self.kernel // 2, self.kernel // 2)
        y = jax.lax.conv_general_dilated(
            x,
            self.weight[...].astype(x.dtype),
            self.stride,
            ((self.kernel - 1, 0), side, side),
            dimension_numbers=("NDHWC", "OIDHW", "NDHWC"),
            # float32 means float32: the signs of small outputs depend on it (the default on GPUs is TF32, on TPUs bfloat16)
            precision=jax.lax.Precision.HIGHEST,
        )
        return y + self.bias[...].astype(x.dtype) if self.has_bias else y


class GroupNorm(nnx.Module):
    """x [B, T, H, W, C] -> the same. Statistics, in float32, are of each frame by itself: over H, W and a group's channels."""

    def __init__(self, features: int, groups: int, eps: float):
        self.scale = constant((features,), 1.0, (None,))
        self.bias = constant((features,), 0.0, (None,))
        self.groups, self.eps = groups, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        over = (2, 3, 5)
        count = math.prod(grouped.shape[axis] for axis in over)
        centred = grouped - jnp.sum(grouped, over, keepdims=True) / count
        variance = jnp.sum(centred * centred, over, keepdims=True) / count
        normed = (centred * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)
