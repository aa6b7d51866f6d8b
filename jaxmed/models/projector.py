"""From image tokens to the decoder's width: linear, MLP, BTB3D's attention pool, M3D's means and groups of neighbours.

BTB3D's pool (left out as published, `bypass_pool`) reads the tokens with learned queries; before it a 3-D sinusoidal position
code is added. M3D's `spp` takes means over cubes of the token grid, or over as many tokens in a row, and projects them;
`minigpt` and `vanilla` join four tokens in a row. Sources: BTB3D (arXiv 2510.20639), ibrahimethemhamamci/BTB3D,
report-generation/llava/model/multimodal_projector; M3D (arXiv 2404.00578), BAAI-DCAI/M3D, LaMed/src/model/multimodal_projector.

Axis letters: B batch, I images, N tokens an image, C features, E tokens after pooling, D decoder width, H head width.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmed.config import ProjectorConfig, VisualConfig
from jaxmed.model_config import GROUP, require
from jaxmed.nn.linear import Linear
from jaxmed.nn.norm import LayerNorm
from jaxmed.nn.param import constant, gathered, normal
from jaxmed.sharding import Rules

TORCH_INIT = -1.0


class Projector(nnx.Module):
    def __init__(self, config: ProjectorConfig, visual: VisualConfig, width: int, key: jax.Array):
        _check(config, visual, width)
        key_pool, key_positions, *keys = jax.random.split(key, 2 + config.depth)
        joined = GROUP if config.kind in ("minigpt", "vanilla") else 1
        sizes = [visual.features * joined] + [width] * config.depth
        make = [
            Linear(out, into, ("embed", None), k, std=TORCH_INIT, bias=True)
            for into, out, k in zip(sizes, sizes[1:], keys, strict=False)
        ]
        self.layers = nnx.List(make)
        if config.pooled:
            self.pool = AttentionPool(visual.features, config.pool_queries, config.pool_heads, key_pool)
            self.pool_norm = LayerNorm(visual.features, 1e-5)
        if visual.norm:
            self.norm_mean = constant((visual.tokens, visual.features), 0.0, (None, None))
            self.norm_sd = constant((visual.tokens, visual.features), 1.0, (None, None))
        if visual.positions:
            rows = config.places(visual.tokens, visual.grid)
            self.positions = normal(key_positions, (rows, width), 0.02, (None, "embed"))
        self.config, self.visual = config, visual
        self.straight = config.kind == "spp" and config.spp_head == "linear"

    @property
    def position_wise(self) -> bool:
        """Whether a token's projection depends on that token alone: then tokens are gathered first and projected after."""
        return self.config.position_wise

    def normalised(self, features: jax.Array) -> jax.Array:
        """[B, I, N, C] -> the same, by the fixed statistics where the model has them. They receive no gradient."""
        if not self.visual.norm:
            return features
        mean, sd = (jax.lax.stop_gradient(p[...]) for p in (self.norm_mean, self.norm_sd))
        return ((features.astype(jnp.float32) - mean) / sd).astype(features.dtype)

    def project(self, x: jax.Array, token: jax.Array, rules: Rules, length_axis: str | None) -> jax.Array:
        """x [B, T, C] -> [B, T, D]; token [B, T], each one's index within its image (for the position table)"""
        axes = ("batch", length_axis, None)
        bend = partial(jax.nn.gelu, approximate=False) if not self.straight else lambda x: x
        for number, layer in enumerate(self.layers):
            x = layer(bend(x) if number else x, rules, axes, None)
        if self.visual.positions:
            table = gathered(self.positions, rules).astype(x.dtype)
            x = x + table.at[token].get(out_sharding=rules.spec(*axes))
        return x

    def __call__(self, features: jax.Array, token_mask: jax.Array, grid: jax.Array, rules: Rules) -> jax.Array:
        """All images whole: features [B, I, N, C], token_mask [B, I, N], grid [B, I, 3] -> [B, I * N (or I * E), D]

        M3D's kinds take the grid of the config, at which every image stands in full.
        """
        batch, images, _, width = features.shape
        if self.config.pooled:
            coded = features + position_code(grid, features.shape[2], width).astype(features.dtype)
            features = self.pool_norm(self.pool(coded, token_mask))
        elif self.config.kind == "spp":
            features = spatial_mean(features, self.visual.grid, self.config.spp_size, self.config.spp_pooling, rules)
        elif not self.config.position_wise:
            features = joined_neighbours(features, self.config.kind == "vanilla", rules)
        count, width = features.shape[2:]
        flat = features.reshape(batch, images * count, width, out_sharding=rules.spec("batch", None, None))
        token = jnp.broadcast_to(jnp.arange(images * count) % count, flat.shape[:2], out_sharding=rules.spec("batch", None))
        return self.project(flat, token, rules, None)


def _check(config: ProjectorConfig, visual: VisualConfig, width: int) -> None:
    """What the projector's and the visual input's settings must agree on."""
    kind, tokens, grid = f"model.projector.kind {config.kind}", visual.tokens, visual.grid
    if config.depth == 0:
        same = visual.features == width
        require(
            same, f"{kind}: visual.features is {visual.features}, the decoder's width {width}; without layers they must agree"
        )
    if config.kind == "spp" and config.spp_pooling == "spatial":
        whole = math.prod(grid) == tokens
        require(whole, f"{kind}: visual.tokens is {tokens}, but visual.grid {grid} has {math.prod(grid)}; select patches alone")
    if config.kind in ("minigpt", "vanilla"):
        require(tokens % GROUP == 0, f"{kind}: visual.tokens is {tokens}; it must be a multiple of {GROUP}")
    if config.kind == "spp":
        left = config.places(tokens, grid)
        require(
            left > 0, f"model.projector.spp_size {config.spp_size} leaves no token of the grid {grid}; choose a smaller one"
        )


def spatial_mean(features: jax.Array, grid: tuple[int, int, int], size: int, pooling: str, rules: Rules) -> jax.Array:
    """[B, I, N, C] -> [B, I, E, C]: means, in float32, over cubes of `size` of the grid (depth, rows, columns; "spatial"), or
    over size^3 tokens in raster order ("sequence"). What is left over at the end of an axis is dropped."""
    batch, images, tokens, width = features.shape
    if pooling == "sequence":
        count = tokens // size**3
        groups = _reshaped(features[:, :, : count * size**3], (batch, images, count, size**3, width), rules)
        return jnp.mean(groups, axis=3, dtype=jnp.float32).astype(features.dtype)
    d, r, c = (n // size for n in grid)
    x = _reshaped(features, (batch, images, *grid, width), rules)[:, :, : d * size, : r * size, : c * size]
    x = _reshaped(x, (batch, images, d, size, r, size, c, size, width), rules)
    means = jnp.mean(x, axis=(3, 5, 7), dtype=jnp.float32).astype(features.dtype)
    return _reshaped(means, (batch, images, d * r * c, width), rules)


def joined_neighbours(features: jax.Array, by_channel: bool, rules: Rules) -> jax.Array:
    """[B, I, N, C] -> [B, I, N / 4, 4 C]: four tokens in a row, one after the other, or (`by_channel`) interleaved."""
    batch, images, tokens, width = features.shape
    groups = _reshaped(features, (batch, images, tokens // GROUP, GROUP, width), rules)
    groups = groups.swapaxes(-1, -2) if by_channel else groups
    return _reshaped(groups, (batch, images, tokens // GROUP, GROUP * width), rules)


def _reshaped(x: jax.Array, shape: tuple[int, ...], rules: Rules) -> jax.Array:
    """Rows stay where they are."""
    return x.reshape(shape, out_sharding=rules.spec("batch", *[None] * (len(shape) - 1)))


class AttentionPool(nnx.Module):
    """Learned queries that read an image's tokens; no biases. Inner width is (C // heads) * heads."""

    def __init__(self, width: int, queries: int, heads: int, key: jax.Array):
        key_query, key_q, key_kv, key_out = jax.random.split(key, 4)
        inner = width // heads * heads
        self.query = normal(key_query, (queries, width), 1.0, (None, None))
        self.ln_q = LayerNorm(width, 1e-5)
        self.ln_k = LayerNorm(width, 1e-5)
        self.to_q = Linear(inner, width, (None, None), key_q, std=TORCH_INIT)
        self.to_kv = Linear(2 * inner, width, (None, None), key_kv, std=TORCH_INIT)
        self.to_out = Linear(width, inner, (None, None), key_out, std=TORCH_INIT)
        self.heads = heads

    def __call__(self, x: jax.Array, token_mask: jax.Array) -> jax.Array:
        """x [B, I, N, C], token_mask [B, I, N] -> [B, I, E, C]"""
        dtype = x.dtype
        head_dim = self.to_q.weight.shape[0] // self.heads

        def split(y: jax.Array) -> jax.Array:  # heads are the slowest part of the last axis
            return y.reshape(*y.shape[:-1], self.heads, head_dim)

        q = split(self.ln_q(self.query[...].astype(dtype)) @ self.to_q.weight[...].astype(dtype).T) * head_dim**-0.5
        k, v = jnp.split(self.ln_k(x) @ self.to_kv.weight[...].astype(dtype).T, 2, axis=-1)
        k, v = split(k), split(v)
        scores = jnp.einsum("ehd,binhd->bihen", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(token_mask[:, :, None, None], scores, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        out = jnp.einsum("bihen,binhd->biehd", weights, v)
        out = out.reshape(*out.shape[:-2], -1)
        return out @ self.to_out.weight[...].astype(dtype).T


def position_code(grid: jax.Array, tokens: int, width: int) -> jax.Array:
    """3-D sinusoidal code, float32: grid [B, I, 3] (depth, rows, columns), order depth-slowest -> [B, I, N, C].

    A third of the features an axis (depth, row, column): for position p and feature j of n, the angle is
    p / 10000^(2 * floor(j / 2) / n), sine for even j, cosine for odd. Upstream computes it in bfloat16 (error up to 0.009).
    """
    if width % 3:
        raise ValueError(f"the position code needs a feature width divisible by 3, not {width}")
    each = width // 3
    rows, columns = grid[..., 1:2], grid[..., 2:3]
    index = jnp.arange(tokens)
    safe_rows, safe_columns = jnp.maximum(rows, 1), jnp.maximum(columns, 1)  # an absent image has grid 0
    place = (index // (safe_rows * safe_columns), index // safe_columns % safe_rows, index % safe_columns)  # each [B, I, N]
    feature = jnp.arange(each)
    frequency = 10000.0 ** (-2.0 * (feature // 2) / each)
    angles = [p[..., None].astype(jnp.float32) * frequency for p in place]
    return jnp.concatenate([jnp.where(feature % 2 == 0, jnp.sin(a), jnp.cos(a)) for a in angles], axis=-1)
