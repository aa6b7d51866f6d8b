"""The vision transformer of every system: CLIP, SigLIP, DINO over 2-D images and M3D-CLIP's ViT3D over volumes.

x [M, rows, columns, C] or [M, depth, rows, columns, C] -> tokens [M, N, D], in x's dtype. Rows M are split over the mesh as a
batch's rows are; nothing else is. Only the blocks up to the one whose output is taken exist.

Axis letters: M images, C channels, P numbers of a patch, N tokens (the class token among them where there is one), D width.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmed.config import AttentionBackend
from jaxmed.model_config import TowerConfig
from jaxmed.models.decoder import rematerialised
from jaxmed.models.position_table import resized
from jaxmed.nn.encoder_block import BlockConfig, EncoderAttend, EncoderBlock, attend_all, encoder_rules, stacked_blocks
from jaxmed.nn.linear import Linear
from jaxmed.nn.norm import LayerNorm
from jaxmed.nn.param import constant, gathered, normal
from jaxmed.sharding import Rules

_INITIAL_STD = 0.02
_ROWS = ("batch", "length", None)


def block_config(config: TowerConfig) -> BlockConfig:
    return BlockConfig(
        width=config.width,
        heads=config.heads,
        mlp=config.mlp,
        norm_eps=config.norm_eps,
        activation=config.activation,
        post_norm=False,
        qkv_bias=config.qkv_bias,
    )


class Vit(nnx.Module):
    def __init__(self, config: TowerConfig, key: jax.Array):
        config.check_heads()
        key_patch, key_positions, key_blocks = jax.random.split(key, 3)
        axes, std = ("tower", None), _INITIAL_STD
        self.patch = Linear(config.width, config.patch_features, axes, key_patch, std=std, bias=config.patch_bias)
        if config.class_token:
            self.class_token = constant((config.width,), 0.0, ("tower",))
        rows = math.prod(config.grid) + config.class_position
        self.positions = normal(key_positions, (rows, config.width), std, (None, "tower"))
        if config.pre_norm:
            self.pre_norm = LayerNorm(config.width, config.norm_eps)
        self.blocks = stacked_blocks(block_config(config), config.blocks, key_blocks)
        if config.final_norm:
            self.norm = LayerNorm(config.width, config.norm_eps)
        self.config = config

    def __call__(self, x: jax.Array, rules: Rules, remat: str = "none", attention: AttentionBackend = "auto") -> jax.Array:
        """-> the tokens that go on [M, N, D]; `remat` and `attention` as in TrainConfig"""
        rules = encoder_rules(rules)
        h = self.embed(x, rules)
        attend = attend_all(h, rules, attention)

        def body(h: jax.Array, block: EncoderBlock) -> tuple[jax.Array, None]:
            return block(h, attend, rules, None), None

        h, _ = jax.lax.scan(rematerialised(body, remat), h, self.blocks)
        if self.config.final_norm:
            h = self.norm(h)
        return self.selected(h)

    def hidden_states(self, x: jax.Array, rules: Rules) -> list[jax.Array]:
        """Every kept block's output [M, N, D], all tokens, before selection and norm."""
        rules = encoder_rules(rules)
        h = self.embed(x, rules)
        attend = attend_all(h, rules, "auto")
        return list(_outputs(h, self.blocks, attend, rules))

    def embed(self, x: jax.Array, rules: Rules) -> jax.Array:
        """Patches, class token and positions, [M, N, D]."""
        config = self.config
        patches = cut_patches(x, config, rules)
        h = self.patch(patches, rules, _ROWS, None)
        table = self.position_table(x.shape[1:-1], rules)
        if config.class_token:
            token = gathered(self.class_token, rules).astype(jnp.float32)[None]
            first = table[:1] + token if config.class_position else token
            # a row of zeros in front, to which the table brings the class token
            h = jnp.pad(h, ((0, 0), (1, 0), (0, 0)))
            table = jnp.concatenate([first, table[1:] if config.class_position else table])
        h = h + table.astype(h.dtype)
        return self.pre_norm(h) if config.pre_norm else h

    def position_table(self, size: tuple[int, ...], rules: Rules) -> jax.Array:
        """[N, D] float32 for inputs of `size`; the class token's row, where it has one, comes first and is never resized."""
        config = self.config
        table = gathered(self.positions, rules).astype(jnp.float32)
        grid = tuple(n // p for n, p in zip(size, config.patch, strict=True))
        # DINO's code takes the table as it is only for square inputs
        if grid == config.grid and (config.kind != "dino" or len(set(size)) == 1):
            return table
        own = int(config.class_position)
        return jnp.concatenate([table[:own], resized(table[own:], config.grid, grid, config.kind == "dino")])

    def selected(self, h: jax.Array) -> jax.Array:
        """All tokens [M, N, D] -> those that go on."""
        if self.config.select_feature == "cls":
            return h[:, :1]
        return h[:, 1:] if self.config.class_token and self.config.select_feature == "patch" else h


def cut_patches(x: jax.Array, config: TowerConfig, rules: Rules) -> jax.Array:
    """x [M, *image, C] -> [M, N, P]: patches in raster order, in each its pixels in raster order, channels fastest.

    What is left over at the end of an axis is not seen.
    """
    size, channels = x.shape[1:-1], x.shape[-1]
    axes = len(config.patch)
    short = len(size) != axes or any(n < p for n, p in zip(size, config.patch, strict=False))
    if short or channels != config.channels:
        raise ValueError(
            f"images of size {size} with {channels} channels for a tower with patches {config.patch} of {config.channels}"
        )
    grid = [n // p for n, p in zip(size, config.patch, strict=True)]
    x = x[(slice(None), *(slice(g * p) for g, p in zip(grid, config.patch, strict=True)))]
    pairs = [n for pair in zip(grid, config.patch, strict=True) for n in pair]
    x = x.reshape(len(x), *pairs, channels, out_sharding=rules.spec("batch", *[None] * (2 * axes + 1)))
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1]
    x = x.transpose(order)
    return x.reshape(len(x), math.prod(grid), config.patch_features, out_sharding=rules.spec("batch", None, None))


def _outputs(h: jax.Array, blocks: EncoderBlock, attend: EncoderAttend, rules: Rules) -> jax.Array:
    """[L, M, N, D], the output of every block."""

    def body(h: jax.Array, block: EncoderBlock) -> tuple[jax.Array, jax.Array]:
        h = block(h, attend, rules, None)
        return h, h

    return jax.lax.scan(body, h, blocks)[1]
