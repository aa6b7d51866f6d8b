"""Frozen dataclasses of the architectures: decoder, image tower, projector, aggregator and fusion, text encoder.

A folder's config.json fills them (`jaxmed.checkpoint`); presets are values of them (`jaxmed.models.presets`). `__post_init__`
checks values alone. No field is Optional.
"""

import math
from dataclasses import dataclass
from typing import Literal

from jaxmed.errors import UserError


class ConfigError(UserError, ValueError):
    """A configuration value that cannot be used. The message names the field and the fix."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; angles are computed in float32."""

    theta: float
    """Base of the geometric sequence of wavelengths."""
    scaling: Literal["none", "linear", "llama3", "longrope"] = "none"
    """`linear`: all wavelengths are stretched by `factor`; `llama3`: those beyond `original_positions / low_freq_factor` are
    (Llama 3.1 and later); `longrope`: each frequency has a factor of its own (Phi-3 128k)."""
    factor: float = 8.0
    """Stretch of the longest wavelengths (llama3), or of all (linear)."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_positions / low_freq_factor are stretched in full (llama3 scaling alone)."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_positions / high_freq_factor stay as they are (llama3 scaling alone)."""
    original_positions: int = 8192
    """Context length of the pretraining before scaling (llama3 and longrope)."""
    short_factors: tuple[float, ...] = ()
    """Divisor of each frequency for sequences up to `original_positions` (longrope alone)."""
    long_factors: tuple[float, ...] = ()
    """The same for longer sequences (longrope alone)."""
    attention_factor: float = 1.0
    """Factor of cosines and sines (longrope alone)."""

    def __post_init__(self):
        require(self.theta > 1, f"rope.theta is {self.theta}; it must be above 1")
        if self.scaling in ("linear", "llama3"):
            require(self.factor > 0, f"rope.factor is {self.factor}; it must be above 0")
        if self.scaling == "llama3":
            ordered = 0 < self.low_freq_factor < self.high_freq_factor
            require(ordered, "rope: llama3 scaling needs 0 < low_freq_factor < high_freq_factor")
        if self.scaling == "longrope":
            same = len(self.short_factors) == len(self.long_factors) > 0
            require(same, "rope: longrope needs as many short_factors as long_factors, one a pair of dimensions")


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-family decoder. With `--model.base DIR` the folder's config.json fills every field here."""

    vocab: int
    """Rows of the embedding table as the base has them, without added tokens or padding."""
    width: int
    """Width of the residual stream (D)."""
    layers: int
    """Number of blocks (L)."""
    heads: int
    """Query heads (Q)."""
    kv_heads: int
    """Key and value heads (K); must divide the query heads."""
    head_dim: int
    """Width of one head (H)."""
    mlp: int
    """Hidden width of the gated MLP (F)."""
    norm_eps: float
    """Epsilon of every RMSNorm."""
    rope: RopeConfig
    max_positions: int
    """Longest sequence the base was made for."""
    tied: bool = False
    """Whether the head reads the embedding table."""
    qkv_bias: bool = False
    """Whether the q, k and v projections have a bias."""
    fused: bool = False
    """Whether upstream's files hold q, k, v as one matrix and gate, up as one (Phi-3): their adapters then share one A."""
    window: int = 0
    """Sliding-window attention: a query sees the last `window` positions (0: all)."""
    initializer_range: float = 0.02
    """Standard deviation of freshly initialised weights."""
    surplus: int = 0
    """Rows of the base's tables after `vocab`, which no token of its tokenizer has; they are left out."""
    padding_row: int = -1
    """Row of the embedding table that lookups give no gradient, as torch has it (`pad_token_id` of the config); -1: none.
    Phi-3's padding is an end token of answers, too."""

    def __post_init__(self):
        require(self.surplus >= 0, f"decoder.surplus is {self.surplus}; it must not be negative")
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "mlp"):
            require(getattr(self, name) > 0, f"decoder.{name} is {getattr(self, name)}; it must be at least 1")
        divides = self.heads % self.kv_heads == 0
        require(divides, f"decoder.kv_heads is {self.kv_heads}, which does not divide decoder.heads {self.heads}")
        require(self.head_dim % 2 == 0, f"decoder.head_dim is {self.head_dim}; rotary embeddings need an even one")


@dataclass(frozen=True)
class TowerConfig:
    """A vision transformer over images or volumes: one module, of which CLIP, SigLIP, DINO and M3D-CLIP's ViT3D are values."""

    kind: Literal["none", "clip", "siglip", "dino", "vit3d"] = "none"
    """Whose files hold it, under which names; `none`: no tower, the files of the data set hold image tokens."""
    image: tuple[int, ...] = (336, 336)
    """Input (rows, columns) or (depth, rows, columns) that the position table was made for."""
    patch: tuple[int, ...] = (14, 14)
    """Size of a patch along the same axes; what is left over at the end of an axis is not seen."""
    channels: int = 3
    """Channels of the input."""
    width: int = 1024
    """Width of the residual stream."""
    layers: int = 24
    """Blocks that the files hold."""
    heads: int = 16
    """Attention heads; no file of M3D's or of DINO's says how many."""
    mlp: int = 4096
    """Hidden width of the MLP."""
    norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "quick_gelu"
    """`gelu` is the exact one, `quick_gelu` is x * sigmoid(1.702 x)."""
    class_token: bool = True
    """Whether a class token stands before the patches."""
    class_position: bool = True
    """Whether the position table has a row for the class token (its first)."""
    pre_norm: bool = True
    """A LayerNorm between the embeddings and the first block (CLIP)."""
    final_norm: bool = False
    """Whether the output goes through a LayerNorm; only after the last block."""
    patch_bias: bool = False
    """Whether the patch projection has a bias."""
    qkv_bias: bool = True
    """Whether q, k and v have biases (the other projections always do)."""
    select_layer: int = -2
    """Which block's output is taken: -1 the last, -2 the one before it. Later blocks are neither kept nor run."""
    select_feature: Literal["patch", "cls_patch", "cls"] = "patch"
    """Tokens that go on: the patches, the class token before the patches, the class token alone."""

    def __post_init__(self):
        if self.kind == "none":
            return
        for name in ("channels", "width", "layers", "heads", "mlp"):
            require(getattr(self, name) > 0, f"tower.{name} is {getattr(self, name)}; it must be at least 1")
        same = len(self.image) == len(self.patch) and len(self.image) in (2, 3)
        require(same, f"tower.image {self.image} and tower.patch {self.patch} must both have two entries, or both three")
        fits = all(0 < p <= i for i, p in zip(self.image, self.patch, strict=True))
        require(fits, f"tower.patch {self.patch} does not fit into tower.image {self.image}")
        inside = -self.layers <= self.select_layer <= -1
        require(
            inside, f"tower.select_layer is {self.select_layer}; with {self.layers} layers -1 to {-self.layers} can be selected"
        )
        have = self.class_token or self.select_feature == "patch"
        require(have, f"tower.select_feature is {self.select_feature}, but the tower has no class token")
        last = not self.final_norm or self.select_layer == -1
        require(last, "tower.final_norm: only the last block's output is normalised; set it to false with this select_layer")

    def check_heads(self) -> None:
        """Not before it is used: a flag may give the heads, and a folder the width."""
        require(self.width % self.heads == 0, f"tower.width {self.width} is no multiple of tower.heads {self.heads}")

    @property
    def reads(self) -> Literal["volumes", "slices", "pixels"]:
        """Kind of its input (visual.kind)."""
        return {"vit3d": "volumes", "dino": "slices"}.get(self.kind, "pixels")

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along the axes of `image`."""
        return tuple(i // p for i, p in zip(self.image, self.patch, strict=True))

    @property
    def blocks(self) -> int:
        """Blocks that are kept and run."""
        return self.layers + 1 + self.select_layer

    @property
    def patch_features(self) -> int:
        """Numbers of a patch: its pixels in raster order, channels fastest."""
        return math.prod(self.patch) * self.channels

    @property
    def tokens(self) -> int:
        """Tokens that go on to the projector."""
        if self.select_feature == "cls":
            return 1
        return math.prod(self.grid) + (self.select_feature == "cls_patch")


_TOKENWISE = ("identity", "linear")


@dataclass(frozen=True)
class ProjectorConfig:
    """From image features to the decoder's width."""

    kind: str = "attn_pool+mlp2x_gelu"
    """`identity`, `linear`, `mlpNx_gelu` (N linear layers, exact GELU between), `attn_pool+` one of the last two; M3D's `spp`
    (pooling, then a head), `minigpt` and `vanilla` (four neighbours in a row as one token); SAMF's `aggregator`."""
    bypass_pool: bool = True
    """Leave the attention pool out, as BTB3D published it: every visual token reaches the decoder."""
    pool_queries: int = 256
    """Visual tokens after the attention pool, where it is not bypassed."""
    pool_heads: int = 8
    """Attention heads of the pool."""
    spp_pooling: Literal["spatial", "sequence"] = "spatial"
    """`spatial`: mean over cubes of `spp_size`; `sequence`: over as many tokens in raster order (spp alone)."""
    spp_size: int = 2
    """Edge of the cube (spp alone)."""
    spp_head: Literal["mlp", "linear"] = "mlp"
    """With exact GELUs between its layers, or without (spp alone)."""
    spp_depth: int = 2
    """Linear layers of the head (spp alone)."""

    def __post_init__(self):
        inner = self.kind.removeprefix("attn_pool+")
        known = inner in _TOKENWISE or (inner.startswith("mlp") and inner.endswith("x_gelu") and inner[3:-6].isdigit())
        known = (known and inner[3:-6] != "0") or self.kind in ("spp", "minigpt", "vanilla", "aggregator")
        require(
            known,
            f"model.projector.kind is {self.kind!r}; known are identity, linear, mlpNx_gelu, attn_pool+ before one of them, "
            "spp, minigpt, vanilla and aggregator",
        )
        require(self.spp_size >= 1 and self.spp_depth >= 1, "model.projector: spp_size and spp_depth must be at least 1")

    @property
    def depth(self) -> int:
        """Number of linear layers."""
        inner = self.kind.removeprefix("attn_pool+")
        if inner.startswith("mlp"):
            return int(inner[3:-6])
        return {"identity": 0, "aggregator": 0, "spp": self.spp_depth}.get(inner, 1)

    @property
    def pooled(self) -> bool:
        """Whether an attention pool reduces the visual tokens to `pool_queries`."""
        return self.kind.startswith("attn_pool+") and not self.bypass_pool

    @property
    def position_wise(self) -> bool:
        """Whether a token's projection depends on that token alone."""
        return not self.pooled and self.kind not in ("spp", "minigpt", "vanilla", "aggregator")

    def places(self, tokens: int, grid: tuple[int, ...]) -> int:
        """Tokens after the projector, for an image of `tokens` tokens on a `grid` (depth, rows, columns)."""
        if self.pooled:
            return self.pool_queries
        if self.kind == "spp":
            cube = self.spp_size**3
            return math.prod(n // self.spp_size for n in grid) if self.spp_pooling == "spatial" else tokens // cube
        return tokens // GROUP if self.kind in ("minigpt", "vanilla") else tokens


GROUP = 4
"""Neighbouring tokens that `minigpt` and `vanilla` join."""


@dataclass(frozen=True)
class AggregatorConfig:
    """SAMF's transformer over the features of slices, whose class token describes the volume."""

    layers: int = 2
    """Post-norm blocks with ReLU."""
    heads: int = 8
    """Attention heads; no file says how many."""
    mlp: int = 1024
    """Hidden width of the MLP."""
    features: int = 256
    """Features of a volume."""
    dropout: float = 0.1
    """Of the blocks' outputs, in training."""
    slice_pos: Literal["none", "learned", "sincos"] = "none"
    """What tells slices apart by their place: nothing, as published (the order of the slices makes no difference); a learned
    table that begins with zeros; sines and cosines of the place."""


@dataclass(frozen=True)
class FusionConfig:
    """SAMF's prompt-aware fusion of slice, volume and text features into one vector, repeated `tokens` times."""

    kind: Literal["none", "samf", "ao2d"] = "none"
    """`ao2d` projects the text too and adds what the text reads from the slices."""
    width: int = 3072
    """Width in which the features are compared."""
    tokens: int = 256
    """Image tokens that the decoder reads."""
    text_scope: Literal["all", "prompt"] = "all"
    """Text that is read: every id of the row, answer, end and padding included (upstream), or the question alone."""


@dataclass(frozen=True)
class TextEncoderConfig:
    """BERT, as M3D-CLIP reads reports with it (post-norm, exact GELU)."""

    vocab: int = 30522
    """Rows of the word table."""
    width: int = 768
    """Width of the residual stream."""
    layers: int = 12
    """Number of blocks."""
    heads: int = 12
    """Attention heads."""
    mlp: int = 3072
    """Hidden width of the MLP."""
    norm_eps: float = 1e-12
    """Epsilon of every LayerNorm."""
    positions: int = 512
    """Rows of the position table: the longest text."""
    types: int = 2
    """Rows of the table of token types, of which the first is used."""


@dataclass(frozen=True)
class ContrastiveConfig:
    """Pretraining of an image tower by contrast with reports, as M3D-CLIP was (`--task contrastive` alone)."""

    text: TextEncoderConfig = TextEncoderConfig()
    """The text encoder; `text_folder`'s config.json fills it."""
    text_folder: str = ""
    """Folder of a BERT model: sizes, weights and tokenizer of the text encoder. "": it starts at random."""
    features: int = 768
    """Width of the space that volumes and texts share."""
    dropout: float = 0.1
    """Dropout of the text encoder: embeddings, attention weights, outputs of attention and MLP."""
    truncate: Literal["sentences", "head"] = "sentences"
    """A report longer than `data.max_length` tokens: its first sentence and others drawn anew in each epoch (upstream), or its
    beginning."""
    group: int = 0
    """Pairs that are told from each other: 0 all of the global batch (upstream's default, and its local_loss once labels count
    from the rank's first row); n: each n consecutive rows apart (upstream's gather_loss=False, n rows a device)."""
    exp_scale: bool = False
    """Multiply the cosines by the exponential of `logit_scale`, as CLIP does; M3D-CLIP multiplies by it as it is."""

    def __post_init__(self):
        require(self.features > 0, f"contrastive.features is {self.features}; it must be at least 1")
        require(0 <= self.dropout < 1, f"contrastive.dropout is {self.dropout}; it must be in [0, 1)")
        require(self.group >= 0, f"contrastive.group is {self.group}; it must not be negative (0: the global batch)")
