"""Folders without a language model: a CLIP, SigLIP, DINO or ViT3D tower alone, and M3D-CLIP with its text encoder."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.hf_config import read_config
from jaxmed.checkpoint.hf_io import TensorFolder, open_folder, read_json
from jaxmed.checkpoint.row import Row
from jaxmed.checkpoint.tower_config import text_encoder_config, tower_config
from jaxmed.checkpoint.tower_tables import (
    M3D_IMAGE_PREFIX,
    contrastive_rows,
    surplus_reason,
    text_surplus_reason,
    tower_rows,
)
from jaxmed.config import TextEncoderConfig, TowerConfig, VisualConfig
from jaxmed.data.images import default_pixels, pixel_config
from jaxmed.data.tokenizer import has_tokenizer
from jaxmed.distributed import say
from jaxmed.errors import UserError

_HEADS = ("vision.heads", "slice_encoder.heads", "text.heads")


@dataclass(frozen=True)
class EncoderFolder:
    path: str
    contrastive: bool
    tower: TowerConfig
    text: TextEncoderConfig
    """Of contrastive folders"""
    features: int
    """Width of the shared space (contrastive folders)"""
    visual: VisualConfig
    tensors: TensorFolder
    rows: list[Row]
    tokenizer: str
    """Folder of the text encoder's tokenizer"""

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that are split over fsdp."""
        return (self.tower.width, self.text.width, self.features) if self.contrastive else (self.tower.width,)

    def surplus(self, name: str) -> str:
        """Why a tensor that no row names is not needed; "" if nothing here knows it."""
        if not self.contrastive:
            return surplus_reason(name, self.tower)
        return surplus_reason(name, self.tower, M3D_IMAGE_PREFIX) or text_surplus_reason(name)


def open_encoder(path: str, overrides: Mapping[str, Any]) -> EncoderFolder:
    """What the folder's files say, heads from `overrides` where no file does. Assumptions are told on stderr."""
    unknown = sorted(set(overrides) - set(_HEADS))
    if unknown:
        raise UserError(f"{path}: holds encoders alone, {', '.join(unknown)} cannot be set; known are {', '.join(_HEADS)}")
    heads = {name: _whole(name, value) for name, value in overrides.items()}
    image_heads, text_heads = heads.get("vision.heads", heads.get("slice_encoder.heads", 0)), heads.get("text.heads", 0)
    contrastive = detect(path) == "m3d_clip"
    tensors = open_folder(path) if contrastive else replace(open_folder(path), role="tower")
    where = os.path.join(path, "config.json")
    config = read_config(path) if os.path.exists(where) else {}
    feature = "cls_patch" if contrastive else "patch"
    layer = -1 if contrastive or config.get("model_type") == "m3d_clip" else -2
    found = tower_config(config, where, tensors, _last_of(config, tensors, layer), feature, image_heads)
    text = _text(path, config, tensors, text_heads) if contrastive else None
    for what, assumed in (("tower", found.assumed), ("text encoder", text.assumed if text else ())):
        if assumed:
            say(f"{path}: no file says the {what}'s {', '.join(assumed)}; published values are assumed")
    rows = contrastive_rows(found.config, text.config) if text else tower_rows(found.config)
    features = tensors.shape("mm_vision_proj.weight")[0] if contrastive else 0
    return EncoderFolder(
        path,
        contrastive,
        found.config,
        text.config if text else TextEncoderConfig(),
        features,
        _visual(path, found.config),
        tensors,
        rows,
        _tokenizer(path, config) if contrastive else "",
    )


def _whole(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {value!r}; a whole number is needed") from None


def _last_of(config: Mapping[str, Any], tensors: TensorFolder, layer: int) -> int:
    """ViT3D and DINO give their last block's output, CLIP and SigLIP the one before it, as LLaVA reads them."""
    plain = not config or config.get("model_type") == "m3d_clip"
    one_of_ours = any(name.endswith(("patch_embedding.position_embeddings", "pos_embed")) for name in tensors.names())
    return -1 if plain and one_of_ours else layer


def _text(path: str, config: dict[str, Any], tensors: TensorFolder, heads: int) -> Any:
    """From the BERT folder that the config names, where it is here; else from the shapes."""
    bert = _beside(path, config.get("language_model_name_or_path") or "")
    where = os.path.join(bert or path, "config.json")
    return text_encoder_config(read_json(where) if bert else {}, where, tensors, heads)


def _beside(path: str, named: str) -> str:
    """A folder that a config names: as it stands, inside the folder, or beside it; "" where it is not on this machine."""
    places = [named, os.path.join(path, named), os.path.join(os.path.dirname(os.path.abspath(path)), named)] if named else []
    return next((place for place in places if os.path.exists(os.path.join(place, "config.json"))), "")


def _tokenizer(path: str, config: dict[str, Any]) -> str:
    return path if has_tokenizer(path) else _beside(path, config.get("language_model_name_or_path") or "") or path


def _visual(path: str, tower: TowerConfig) -> VisualConfig:
    """How files become the tower's input."""
    grid = tower.grid if len(tower.grid) == 3 else (1, *tower.grid)
    sizes = {"tokens": tower.tokens, "features": tower.width, "grid": grid}
    if len(tower.grid) == 3:
        return VisualConfig(kind="volumes", volume=tower.image, **sizes)
    where = os.path.join(path, "preprocessor_config.json")
    if os.path.exists(where):
        pixels = pixel_config(read_json(where), where, tower.image[0], "pad")
    else:
        pixels = default_pixels("siglip" if tower.kind == "siglip" else "clip", tower.image[0], "pad")
    return VisualConfig(kind="pixels", pixels=pixels, **sizes)
