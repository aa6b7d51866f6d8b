"""BTB3D's CT encoder: windows of Haar-patched frames to tokens.

A causal 3-D convolutional network: stages of residual blocks, between them convolutions that halve rows and columns always and
frames where the config says so. A window of 5 patched frames becomes 2 token frames; the sign of each of the 18 outputs is a
bit of the token's code (lookup-free quantization). The paper's factorised convolutions are full 3x3x3 ones in the code.

Sources: BTB3D (arXiv 2510.20639), ibrahimethemhamamci/BTB3D, encoder-decoder/modeling/magvit2.py; its lineage is MAGVIT-v2
(arXiv 2310.05737). Axis letters: B windows, T frames, H rows, W columns, C channels.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmed.config import ConfigError
from jaxmed.nn.conv import CausalConv, GroupNorm

BANDS = 8
BITS = 18
FRAMES = 5
TOKEN_FRAMES = 2
GROUPS = 32
EPS = 1e-5


def token_frames(temporal: tuple[bool, ...]) -> int:
    """Frames that a window's become: a halving keeps the first of every two."""
    frames = FRAMES
    for halve in temporal:
        frames = (frames + 1) // 2 if halve else frames
    return frames


@dataclass(frozen=True)
class VolumeEncoderConfig:
    """Sizes of the network. `filters` is the *decoder* section's number in upstream's files (it builds both halves with it)."""

    filters: int
    blocks: int
    """Residual blocks of each stage, and once more at the end"""
    multipliers: tuple[int, ...]
    """Width of each stage, in filters"""
    temporal: tuple[bool, ...]
    """Whether the step after each stage but the last halves the frames as well"""

    def __post_init__(self):
        wrong = ""
        if self.filters < 1 or self.blocks < 1 or not self.multipliers or min(self.multipliers) < 1:
            wrong = f"filters {self.filters}, num_res_blocks {self.blocks} and channel_multipliers must be at least 1"
        elif self.multipliers[0] != 1:
            wrong = f"channel_multipliers is {list(self.multipliers)}; the first must be 1"
        elif any(width % GROUPS for width in self.widths):
            wrong = f"filters {self.filters} gives stages of {list(self.widths)} channels; each must be a multiple of {GROUPS}"
        elif len(self.temporal) != len(self.multipliers) - 1:
            wrong = (
                f"temporal_downsample has {len(self.temporal)} entries for {len(self.multipliers)} channel_multipliers; "
                "one less than these is needed"
            )
        elif token_frames(self.temporal) != TOKEN_FRAMES:
            wrong = (
                f"temporal_downsample {list(self.temporal)} makes {token_frames(self.temporal)} token frames of a window of "
                f"{FRAMES}; two of its entries must be true"
            )
        if wrong:
            raise ConfigError(wrong)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.filters * m for m in self.multipliers)

    @property
    def strides(self) -> tuple[tuple[int, int, int], ...]:
        return tuple((2 if halve else 1, 2, 2) for halve in self.temporal)

    @property
    def cell(self) -> tuple[int, int, int]:
        """Voxels of a token along depth, rows and columns, the Haar patcher's 2 included."""
        return tuple(2 * math.prod(sizes) for sizes in zip(*self.strides, strict=True))

    @property
    def name(self) -> str:
        """As the published ones are called: rows x columns x depth."""
        depth, rows, columns = self.cell
        return f"{rows}x{columns}x{depth}"


PUBLISHED = {
    "16x16x8": VolumeEncoderConfig(96, 4, (1, 2, 2, 4), (False, True, True)),
    "8x8x8": VolumeEncoderConfig(96, 4, (1, 2, 4), (True, True)),
}


class ResBlock(nnx.Module):
    """[B, T, H, W, in] -> [B, T, H, W, out]"""

    def __init__(self, out_features: int, in_features: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        plain = (1, 1, 1)
        self.norm_0 = GroupNorm(in_features, GROUPS, EPS)
        self.conv_0 = CausalConv(out_features, in_features, 3, keys[0], stride=plain, bias=False)
        self.norm_1 = GroupNorm(out_features, GROUPS, EPS)
        self.conv_1 = CausalConv(out_features, out_features, 3, keys[1], stride=plain, bias=False)
        self.widens = in_features != out_features
        if self.widens:
            self.shortcut = CausalConv(out_features, in_features, 1, keys[2], stride=plain, bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv_0(jax.nn.silu(self.norm_0(x)))
        y = self.conv_1(jax.nn.silu(self.norm_1(y)))
        return y + (self.shortcut(x) if self.widens else x)


class VolumeEncoder(nnx.Module):
    def __init__(self, config: VolumeEncoderConfig, key: jax.Array):
        widths, strides = config.widths, config.strides
        ends = (widths[0], *widths)  # channels before each stage, and after the last
        keys = jax.random.split(key, (len(widths) + 2, config.blocks))
        key_first, key_last, *keys_down = jax.random.split(jax.random.fold_in(key, 1), 2 + len(strides))
        self.conv_first = CausalConv(widths[0], BANDS, 3, key_first, stride=(1, 1, 1), bias=True)
        self.stages = nnx.List([_stage(*sizes, k) for *sizes, k in zip(ends[1:], ends, keys, strict=False)])
        self.downsample = nnx.List(
            [CausalConv(c, c, 3, k, stride=s, bias=True) for c, s, k in zip(widths, strides, keys_down, strict=False)]
        )
        self.final = _stage(widths[-1], widths[-1], keys[-1])
        self.final_norm = GroupNorm(widths[-1], GROUPS, EPS)
        self.conv_last = CausalConv(BITS, widths[-1], 1, key_last, stride=(1, 1, 1), bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Windows [B, 5, H, W, 8] in the dtype of the computation -> z [B, 2, h, w, 18] float32"""
        x = self.conv_first(x)
        for number, stage in enumerate(self.stages):
            if number:
                x = self.downsample[number - 1](x)
            for block in stage:
                x = block(x)
        for block in self.final:
            x = block(x)
        return self.conv_last(jax.nn.silu(self.final_norm(x))).astype(jnp.float32)


def _stage(out_features: int, in_features: int, keys: jax.Array) -> nnx.List:
    """Residual blocks, of which the first changes the width."""
    inputs = [in_features] + [out_features] * (len(keys) - 1)
    return nnx.List([ResBlock(out_features, width, key) for width, key in zip(inputs, keys, strict=True)])
