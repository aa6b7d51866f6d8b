"""Folders without a language model: a CLIP, SigLIP, DINO or ViT3D tower alone, and M3D-CLIP with its text encoder.

Files of others, or our own form: a `PartConfig` for a tower, a run (`task` contrastive) for M3D-CLIP.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from flax import nnx

from jaxmed.checkpoint.adapter import run_experiment
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.hf_config import read_config
from jaxmed.checkpoint.hf_io import TensorFolder, open_folder, read_json
from jaxmed.checkpoint.part_folders import PartConfig, PartFolder, read_part_config
from jaxmed.checkpoint.sources import WeightSources, part_of
from jaxmed.checkpoint.tower_config import text_encoder_config, tower_config
from jaxmed.checkpoint.tower_tables import (
    M3D_IMAGE_PREFIX,
    contrastive_rows,
    surplus_reason,
    text_surplus_reason,
    tower_rows,
)
from jaxmed.config import (
    ContrastiveConfig,
    DataConfig,
    Experiment,
    LoraConfig,
    ModelConfig,
    TextEncoderConfig,
    TowerConfig,
    TrainConfig,
    VisualConfig,
    replace_field,
    to_dict,
    to_json,
)
from jaxmed.data.images import default_pixels, pixel_config
from jaxmed.data.tokenizer import has_tokenizer
from jaxmed.distributed import say
from jaxmed.errors import UserError
from jaxmed.models.contrastive import Contrastive
from jaxmed.models.presets import NO_DECODER
from jaxmed.models.vit import Vit

_HEADS = ("vision.heads", "slice_encoder.heads", "text.heads")
_VISUAL = "visual."


class Tower(nnx.Module):
    """Gives a tower the path that the table has for it."""

    def __init__(self, tower: Vit):
        self.tower = tower


@dataclass(frozen=True, kw_only=True)
class EncoderFolder(PartFolder):
    tower: TowerConfig
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """Of contrastive folders"""
    features: int = 0
    """Width of the shared space (contrastive folders)"""
    exp_scale: bool = False
    """Whether cosines are multiplied by the exponential of `logit_scale` (runs of ours alone)"""

    @property
    def contrastive(self) -> bool:
        return self.kind == "m3d_clip"

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.tower.width, self.text.width, self.features) if self.contrastive else (self.tower.width,)

    def build(self) -> nnx.Module:
        key = jax.random.key(0)
        return Contrastive(self.tower, self.text, self.features, key) if self.contrastive else Tower(Vit(self.tower, key))

    @property
    def native_config(self) -> tuple[str, dict[str, Any]]:
        if not self.contrastive:
            config = PartConfig("tower", self.visual, self.tower)
            return to_json(config), {"config": to_dict(config)}
        experiment = contrastive_experiment(self)
        return to_json(experiment), {"config": to_dict(experiment)}


def contrastive_experiment(folder: EncoderFolder) -> Experiment:
    """The config of a run that would train the same model. (The decoder is never built.)"""
    return Experiment(
        model=ModelConfig(decoder=NO_DECODER, tower=folder.tower, dtype="float32"),
        visual=folder.visual,
        lora=LoraConfig(rank=0),
        train=TrainConfig(trainable="all", train_tower=True),
        data=DataConfig(max_length=folder.text.positions),
        task="contrastive",
        contrastive=ContrastiveConfig(text=folder.text, features=folder.features, exp_scale=folder.exp_scale),
    )


def open_encoder(path: str, overrides: Mapping[str, Any]) -> EncoderFolder:
    """What the folder's files say, heads from `overrides` where no file does; fields of `visual` as `overrides` say.
    Assumptions are told on stderr."""
    visual = {name: value for name, value in overrides.items() if name.startswith(_VISUAL)}
    unknown = sorted(set(overrides) - set(_HEADS) - set(visual))
    if unknown:
        known = ", ".join((*_HEADS, f"{_VISUAL}*"))
        raise UserError(f"{path}: holds encoders alone, {', '.join(unknown)} cannot be set; known are {known}")
    found = _open(path, {name: _whole(name, overrides[name]) for name in _HEADS if name in overrides})
    for name, value in visual.items():
        found = replace(found, visual=replace_field(found.visual, name.removeprefix(_VISUAL), value, _VISUAL))
    return found


def _open(path: str, heads: Mapping[str, int]) -> EncoderFolder:
    image_heads, text_heads = heads.get("vision.heads", heads.get("slice_encoder.heads", 0)), heads.get("text.heads", 0)
    kind = detect(path)
    if kind in ("run", "part"):
        return _own(path, kind == "run")
    contrastive = kind == "m3d_clip"
    tensors = open_folder(path) if contrastive else replace(open_folder(path), role="tower")
    where = os.path.join(path, "config.json")
    config = read_config(path) if os.path.exists(where) else {}
    feature = "cls_patch" if contrastive else "patch"
    found = tower_config(config, where, tensors, -1 if contrastive else _last_of(tensors), feature, image_heads)
    text = _text(path, config, tensors, text_heads) if contrastive else None
    for what, assumed in (("tower", found.assumed), ("text encoder", text.assumed if text else ())):
        if assumed:
            say(f"{path}: no file says the {what}'s {', '.join(assumed)}; published values are assumed")
    visual = _visual(path, found.config)
    if not text:
        return EncoderFolder(
            path=path, kind="tower", sources=_tower(found.config, [tensors]), visual=visual, settings=config, tower=found.config
        )
    return EncoderFolder(
        path=path,
        kind="m3d_clip",
        sources=_pair(found.config, text.config, [tensors]),
        visual=visual,
        settings=config,
        tower=found.config,
        text=text.config,
        features=tensors.shape("mm_vision_proj.weight")[0],
        tokenizer=_tokenizer(path, config),
    )


def _own(path: str, is_run: bool) -> EncoderFolder:
    """A folder of our own form."""
    if not is_run:
        config = read_part_config(path)
        if config.part != "tower":
            raise UserError(f"{path}: holds a {config.part} and no image tower; go on from it with --model.adapter")
        sources = _tower(config.tower, [])
        return EncoderFolder(path=path, kind="tower", sources=sources, visual=config.visual, run=path, tower=config.tower)
    experiment = run_experiment(path)
    tower, pair = experiment.model.tower, experiment.contrastive
    return EncoderFolder(
        path=path,
        kind="m3d_clip",
        sources=_pair(tower, pair.text, []),
        visual=experiment.visual,
        run=path,
        tower=tower,
        text=pair.text,
        features=pair.features,
        exp_scale=pair.exp_scale,
        tokenizer=os.path.join(path, "tokenizer"),
    )


def _tower(tower: TowerConfig, folders: list[TensorFolder]) -> WeightSources:
    return WeightSources(tower_rows(tower), folders, frozenset({"tower"}), lambda name: surplus_reason(name, tower))


def _pair(tower: TowerConfig, text: TextEncoderConfig, folders: list[TensorFolder]) -> WeightSources:
    rows = contrastive_rows(tower, text)

    def surplus(name: str) -> str:
        return surplus_reason(name, tower, M3D_IMAGE_PREFIX) or text_surplus_reason(name)

    return WeightSources(rows, folders, frozenset(part_of(row.ours) for row in rows), surplus)


def _whole(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {value!r}; a whole number is needed") from None


def _last_of(tensors: TensorFolder) -> int:
    """ViT3D and DINO give their last block's output, CLIP and SigLIP the one before it, as LLaVA reads them."""
    marks = ("patch_embedding.position_embeddings", "pos_embed")
    return -1 if any(name.endswith(marks) for name in tensors.names()) else -2


def _text(path: str, config: dict[str, Any], tensors: TensorFolder, heads: int) -> Any:
    """From the BERT folder that the config names, where it is here; else from the shapes."""
    bert = text_folder(path, config)
    where = os.path.join(bert or path, "config.json")
    return text_encoder_config(read_json(where) if bert else {}, where, tensors, heads)


def text_folder(path: str, config: Mapping[str, Any]) -> str:
    """The BERT folder that M3D-CLIP's config names, "" where it is not on this machine."""
    return _beside(path, config.get("language_model_name_or_path") or "")


def _beside(path: str, named: str) -> str:
    """A folder that a config names: as it stands, inside the folder, or beside it; "" where it is not on this machine."""
    places = [named, os.path.join(path, named), os.path.join(os.path.dirname(os.path.abspath(path)), named)] if named else []
    return next((place for place in places if os.path.exists(os.path.join(place, "config.json"))), "")


def _tokenizer(path: str, config: dict[str, Any]) -> str:
    return path if has_tokenizer(path) else text_folder(path, config) or path


def _visual(path: str, tower: TowerConfig) -> VisualConfig:
    """How files become the tower's input."""
    grid = tower.grid if len(tower.grid) == 3 else (1, *tower.grid)
    sizes = {"tokens": tower.tokens, "features": tower.width, "grid": grid}
    if len(tower.grid) == 3:
        return VisualConfig(kind="volumes", volume=tower.image, channels=tower.channels, **sizes)
    where = os.path.join(path, "preprocessor_config.json")
    if os.path.exists(where):
        pixels = pixel_config(read_json(where), where, tower.image[0], "pad")
    else:
        pixels = default_pixels("siglip" if tower.kind == "siglip" else "clip", tower.image[0], "pad")
    return VisualConfig(kind="pixels", pixels=pixels, **sizes)
