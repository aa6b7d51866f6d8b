"""The conversion table of image towers, of the text encoder and of M3D-CLIP.

Names are canonical (see `jaxmed.checkpoint.names`): a prefix, then the tower's own. Only the blocks that are run have rows;
what else upstream's files hold is known by `surplus_reason`.

Shapes of upstream's kernels: CLIP, SigLIP and DINO convolve patches, [D, C, rows, columns]; ViT3D has a matrix over voxels in
raster order, channels fastest, which is ours already.
"""

import dataclasses

from jaxmed.checkpoint.row import LAYER, Row
from jaxmed.checkpoint.transforms import Identity, Kernel, Leading, Part, Transform
from jaxmed.model_config import TextEncoderConfig, TowerConfig

TOWER_PREFIX = "model.vision_tower.vision_tower."
M3D_IMAGE_PREFIX = "vision_encoder."
M3D_TEXT_PREFIX = "language_encoder."

Path = tuple[str, ...]

_NORMS = ("norm", "norm1", "norm2", "pre_norm")

# Our part of a block -> their module.
_HF_BLOCK = {
    ("norm1",): "layer_norm1",
    ("attn", "q"): "self_attn.q_proj",
    ("attn", "k"): "self_attn.k_proj",
    ("attn", "v"): "self_attn.v_proj",
    ("attn", "o"): "self_attn.out_proj",
    ("norm2",): "layer_norm2",
    ("mlp", "up"): "mlp.fc1",
    ("mlp", "down"): "mlp.fc2",
}
_DINO_BLOCK = {
    ("norm1",): "norm1",
    ("attn", "o"): "attn.proj",
    ("norm2",): "norm2",
    ("mlp", "up"): "mlp.fc1",
    ("mlp", "down"): "mlp.fc2",
}
_VIT3D_BLOCK = _DINO_BLOCK | {("attn", "o"): "attn.out_proj", ("mlp", "up"): "mlp.linear1", ("mlp", "down"): "mlp.linear2"}
_BERT_BLOCK = {
    ("attn", "q"): "attention.self.query",
    ("attn", "k"): "attention.self.key",
    ("attn", "v"): "attention.self.value",
    ("attn", "o"): "attention.output.dense",
    ("norm1",): "attention.output.LayerNorm",
    ("mlp", "up"): "intermediate.dense",
    ("mlp", "down"): "output.dense",
    ("norm2",): "output.LayerNorm",
}

_LATER = "a block after the one whose output is taken; it is never run"
_UNUSED_NORM = "normalises the last block's output, which is not what is taken"
_POOLING = "pools the tokens into one, which is not what is taken"


def tower_rows(config: TowerConfig, prefix: str = TOWER_PREFIX) -> list[Row]:
    """Every tensor of a tower that is run; none for the kind `none`."""
    if config.kind == "none":
        return []
    rows = {"clip": _hf_rows, "siglip": _hf_rows, "dino": _dino_rows, "vit3d": _vit3d_rows}[config.kind](config, prefix)
    return [dataclasses.replace(row, ours=("tower", *row.ours)) for row in rows]


def text_encoder_rows(config: TextEncoderConfig, prefix: str = M3D_TEXT_PREFIX) -> list[Row]:
    """BERT's. A folder of its own has no prefix, or `bert.`."""
    tables = {"words": "word_embeddings", "positions": "position_embeddings", "types": "token_type_embeddings"}
    rows = [Row(f"{prefix}embeddings.{theirs}.weight", (ours,)) for ours, theirs in tables.items()]
    rows += _module(f"{prefix}embeddings.LayerNorm", ("norm",))
    rows += _blocks(f"{prefix}encoder.layer.{LAYER}.", _BERT_BLOCK, config.layers)
    return [dataclasses.replace(row, ours=("text", *row.ours)) for row in rows]


def contrastive_rows(tower: TowerConfig, text: TextEncoderConfig) -> list[Row]:
    """M3D-CLIP's, under its own names."""
    rows = tower_rows(tower, M3D_IMAGE_PREFIX) + text_encoder_rows(text)
    rows += _module("mm_vision_proj", ("vision_projection",)) + _module("mm_language_proj", ("text_projection",))
    return [*rows, Row("logit_scale", ("logit_scale",))]


def surplus_reason(name: str, config: TowerConfig, prefix: str = TOWER_PREFIX) -> str:
    """Why a tower's tensor (canonical name) is not needed; "" if it is, or if nothing here knows it."""
    if config.kind == "none" or not name.startswith(prefix):
        return ""
    if name in _names(tower_rows(config, prefix)):
        return ""
    # as if the last block's output were taken: these are all the tensors that the tower's own code has
    every = dataclasses.replace(config, select_layer=-1, final_norm=config.kind in ("dino", "vit3d"))
    rest = name.removeprefix(prefix)
    if name in _names(tower_rows(every, prefix)):
        return _UNUSED_NORM if rest.startswith("norm.") else _LATER
    if config.kind in ("clip", "siglip"):
        return _hf_surplus(rest.removeprefix("vision_model."), config)
    return ""


def text_surplus_reason(name: str, prefix: str = M3D_TEXT_PREFIX) -> str:
    """Why a tensor of BERT's (canonical name) is not needed; "" if it is, or if nothing here knows it."""
    if not name.startswith(prefix):
        return ""
    rest = name.removeprefix(prefix)
    if rest in ("pooler.dense.weight", "pooler.dense.bias"):
        return "BERT's pooler; the text's vector is the hidden state of [CLS]"
    if rest in ("embeddings.position_ids", "embeddings.token_type_ids"):
        return "counts positions or is zero; no weights"
    if rest.startswith(("cls.predictions.", "cls.seq_relationship.")):
        return "a head of BERT's pre-training"
    return ""


def _names(rows: list[Row]) -> set[str]:
    return {name for row in rows for name in row.names()}


def _hf_surplus(rest: str, config: TowerConfig) -> str:
    """`rest`: the name after `vision_model.`"""
    if rest == "embeddings.position_ids":
        return "counts positions; no weights"
    if rest in ("post_layernorm.weight", "post_layernorm.bias"):
        return _UNUSED_NORM
    linear = ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
    head = {f"head.{module}.{part}" for module in linear for part in ("weight", "bias")}
    head |= {"head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias"}
    return _POOLING if config.kind == "siglip" and rest in head else ""


def _module(theirs: str, ours: Path, layers: int = 0, bias: bool = True, weight: Transform = Identity()) -> list[Row]:
    """The weight and bias of a Linear or of a LayerNorm."""
    name = "scale" if ours[-1] in _NORMS else "weight"
    rows = [Row(f"{theirs}.weight", (*ours, name), layers, weight)]
    return [*rows, Row(f"{theirs}.bias", (*ours, "bias"), layers)] if bias else rows


def _blocks(stem: str, names: dict[Path, str], layers: int, qkv_bias: bool = True) -> list[Row]:
    rows = []
    for ours, theirs in names.items():
        bias = qkv_bias or ours not in (("attn", "q"), ("attn", "k"), ("attn", "v"))
        rows += _module(f"{stem}{theirs}", ("blocks", LAYER, *ours), layers, bias)
    return rows


def _fused_qkv(stem: str, config: TowerConfig) -> list[Row]:
    """q, k and v are the three thirds of one matrix."""
    rows = []
    for i, name in enumerate(("q", "k", "v")):
        part = Part(i * config.width, 3 * config.width)
        for end in ("weight", "bias") if config.qkv_bias else ("weight",):
            rows.append(Row(f"{stem}attn.qkv.{end}", ("blocks", LAYER, "attn", name, end), config.blocks, part))
    return rows


def _hf_rows(config: TowerConfig, prefix: str) -> list[Row]:
    stem = f"{prefix}vision_model."
    patch = Kernel(config.channels, config.patch)
    rows = _module(f"{stem}embeddings.patch_embedding", ("patch",), bias=config.patch_bias, weight=patch)
    if config.class_token:
        rows.append(Row(f"{stem}embeddings.class_embedding", ("class_token",)))
    rows.append(Row(f"{stem}embeddings.position_embedding.weight", ("positions",)))
    if config.pre_norm:
        rows += _module(f"{stem}pre_layrnorm", ("pre_norm",))  # transformers spells it so
    return rows + _blocks(f"{stem}encoder.layers.{LAYER}.", _HF_BLOCK, config.blocks, config.qkv_bias)


def _dino_rows(config: TowerConfig, prefix: str) -> list[Row]:
    patch = Kernel(config.channels, config.patch)
    rows = _module(f"{prefix}patch_embed.proj", ("patch",), bias=config.patch_bias, weight=patch)
    return rows + _timm_rows(config, prefix, "pos_embed", _DINO_BLOCK)


def _vit3d_rows(config: TowerConfig, prefix: str) -> list[Row]:
    rows = _module(f"{prefix}patch_embedding.patch_embeddings.1", ("patch",), bias=config.patch_bias)
    return rows + _timm_rows(config, prefix, "patch_embedding.position_embeddings", _VIT3D_BLOCK)


def _timm_rows(config: TowerConfig, prefix: str, positions: str, block: dict[Path, str]) -> list[Row]:
    """What DINO's and M3D's code have in common, after timm's."""
    rows = [Row(f"{prefix}cls_token", ("class_token",), transform=Leading(2))] if config.class_token else []
    rows.append(Row(f"{prefix}{positions}", ("positions",), transform=Leading(1)))
    stem = f"{prefix}blocks.{LAYER}."
    rows += _fused_qkv(stem, config) + _blocks(stem, block, config.blocks)
    return rows + (_module(f"{prefix}norm", ("norm",)) if config.final_norm else [])
