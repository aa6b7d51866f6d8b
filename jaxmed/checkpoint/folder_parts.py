"""Parts of an experiment that a whole vision-language folder decides: tower, image input, vocabulary, adapters in a state dict.

What no file says is the published default; a notice names it, and the flag that says otherwise.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jaxmed.checkpoint.decoder_tables import EMBED, MODULES
from jaxmed.checkpoint.encoder_folders import open_encoder
from jaxmed.checkpoint.folder_kinds import is_own
from jaxmed.checkpoint.hf_io import TensorFolder, open_folder, read_json, weight_files
from jaxmed.checkpoint.names import canonical_names
from jaxmed.checkpoint.tower_config import tower_config
from jaxmed.checkpoint.tower_tables import TOWER_PREFIX
from jaxmed.config import LORA_TARGETS, DecoderConfig, Experiment, LoraConfig, PixelConfig, TowerConfig, VisualConfig
from jaxmed.data.images import default_pixels, pixel_config
from jaxmed.data.tokenizer import Tokenizer, has_tokenizer
from jaxmed.errors import UserError

PUBLISHED_ALPHA = 32.0
"""LoRA's alpha with which M3D and SAMF were trained (rank 16); their files do not store it."""

Found = tuple[Experiment, list[str]]
"""An experiment, and what the log should say of how it came about"""

_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Given:
    """What a person says by flags where files may be silent."""

    fields: Mapping[str, Any]
    """By the fields' full names"""

    @property
    def heads(self) -> int:
        """Attention heads of the image tower (0: not said)."""
        said = self.fields.get("model.tower.heads", 0)
        try:
            return int(said)
        except (TypeError, ValueError):
            raise UserError(f"model.tower.heads is {said!r}; a whole number is needed") from None


@dataclass(frozen=True)
class Source:
    """A folder with its config."""

    folder: str
    config: Mapping[str, Any]
    where: str
    """File of the config, for messages"""
    tensors: TensorFolder

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape."""
        names = canonical_names(self.tensors.names(), self.folder)
        return {key: self.tensors.shape(name) for key, name in names.items()}

    @property
    def has_tower(self) -> bool:
        return any(name.startswith(TOWER_PREFIX) for name in self.shapes)


@dataclass(frozen=True)
class Selection:
    """What upstream takes from a tower, and what the person says of it."""

    layer: Any
    feature: Any
    kinds: tuple[str, ...]
    """Kinds of tower that the model can have"""
    named: str
    """The tower's folder as the model's config names it, "" where the config names none"""
    heads: int = 0
    """Attention heads, where a flag says them (0: files or the published number)"""


@dataclass(frozen=True)
class FoundTower:
    config: TowerConfig
    folder: str
    """Folder (or file) with the tower's weights, "" where the model's own are the only ones"""
    settings: str
    """Folder in which its settings are, "" for none"""
    notices: tuple[str, ...]
    pixels: PixelConfig = field(default_factory=PixelConfig)
    """How images become its input, where `own`"""
    own: bool = False
    """Whether it is a folder of our own form"""


def json_of(folder: str, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of a folder, {} if there is none (or if it is no folder)."""
    path = os.path.join(folder, name)
    return read_json(path) if folder and os.path.isfile(path) else {}


def find_tower(source: Source, tower: str, select: Selection) -> FoundTower:
    """The tower of a model. `tower`: its folder or file as given; "": the one that the config names, if it is here."""
    if tower and not os.path.exists(tower):
        raise UserError(f"{tower}: no such folder or file; give the image tower's with --tower")
    place = tower or named_folder(select.named, source.folder)
    if place and is_own(place):
        return _own_tower(place, select)
    if not place and not source.has_tower:
        raise UserError(
            f"{source.folder}: the weights of its image tower ({select.named or select.kinds[0]}) are neither in it nor on "
            "this machine; give the tower's folder with --tower"
        )
    if not isinstance(select.layer, int) or not isinstance(select.feature, str):
        raise UserError(
            f"{source.where}: one layer of the tower and its tokens are taken, not {select.layer!r}, {select.feature!r}"
        )
    config, where, tensors = dict(source.config), source.where, source.tensors
    weights = place if os.path.isfile(place) or (place and weight_files(place)) else ""
    if weights:
        tensors = open_folder(weights)
    if own := json_of(place):
        config, where = own, os.path.join(place, "config.json")
    holds = weights or (source.has_tower and not own)
    found = tower_config(config, where, tensors if holds else None, select.layer, select.feature, select.heads)
    if found.config.kind not in select.kinds:
        raise UserError(f"{place or source.folder}: is a {found.config.kind} tower, this model has {' or '.join(select.kinds)}")
    if not weights and not source.has_tower:
        raise UserError(f"{place}: holds no weights of the image tower; download the rest of the folder")
    width = source.config.get("mm_hidden_size", found.config.width)
    if width != found.config.width:
        raise UserError(
            f"{place or source.folder}: the image tower is {found.config.width} wide, {source.where} has mm_hidden_size "
            f"{width}; give this model's own tower with --tower"
        )
    notices = [_assumed(found.config, found.assumed)] if found.assumed else []
    if weights and source.has_tower:
        notices.append(
            f"image tower: {source.folder} holds it too, and that one is used (--model.tower-source folder: {weights})"
        )
    return FoundTower(found.config, weights, place if own or os.path.isdir(place) else "", tuple(notices))


def _own_tower(place: str, select: Selection) -> FoundTower:
    """A run that trained the tower, or a tower that was converted."""
    found = open_encoder(place, {})
    if found.tower.kind not in select.kinds:
        raise UserError(f"{place}: is a {found.tower.kind} tower, this model has {' or '.join(select.kinds)}")
    blocks = found.tower.layers + 1 + select.layer if select.layer < 0 else select.layer
    if blocks != found.tower.blocks:
        raise UserError(
            f"{place}: holds {found.tower.blocks} blocks of the tower, this model runs {blocks}; give the tower's own folder"
        )
    feature = select.feature if select.feature in ("patch", "cls_patch", "cls") else found.tower.select_feature
    tower = replace(found.tower, select_feature=feature if found.tower.class_token else "patch")
    return FoundTower(tower, place, "", (), found.visual.pixels, True)


def _assumed(tower: TowerConfig, names: tuple[str, ...]) -> str:
    pairs = ", ".join(f"{name} {getattr(tower, name)}" for name in names)
    hint = "; --set vision.heads=N says otherwise" if "heads" in names else ""
    return f"vision: {pairs} assumed (no file says){hint}"


def named_folder(name: str, folder: str) -> str:
    """A folder that a config names, as it stands there or inside the model's own; "" if it is not on this machine."""
    places = [name, os.path.join(folder, name)] if name else []
    return next((place for place in places if os.path.isdir(place)), "")


def visual_config(tower: TowerConfig, pixels: PixelConfig) -> VisualConfig:
    """The image input of a model with a tower."""
    kind = tower.reads
    visual = VisualConfig(kind=kind, images=1, tokens=tower.tokens, features=tower.width, pixels=pixels)
    if kind == "slices":
        return replace(visual, tokens=visual.slices, grid=(visual.slices, 1, 1))
    if kind == "volumes":
        return replace(visual, grid=tower.grid, volume=tower.image, channels=tower.channels)
    return replace(visual, grid=(1, *tower.grid))


def pixels_of(tower: FoundTower, folder: str, aspect: str) -> tuple[PixelConfig, list[str]]:
    """How image files become the tower's input: the tower folder's settings, else the model folder's, else the published."""
    kind, size = tower.config.kind, tower.config.image[0]
    if tower.own:
        return tower.pixels, []
    for place in (tower.settings, folder):
        for name in _PREPROCESSORS:
            settings = json_of(place, name)
            settings = settings.get("image_processor", settings)  # nested in processor_config.json
            if "image_mean" in settings:
                return pixel_config(settings, os.path.join(place, name), size, aspect), []
    notice = f"images: no preprocessor_config.json; prepared as {kind}'s published models do, at {size} pixels"
    return default_pixels(kind, size, aspect), [notice]


def cut_vocabulary(decoder: DecoderConfig, folder: str) -> DecoderConfig:
    """Rows after the last token of the folder's tokenizer are surplus: upstream cuts them, and no text has their ids."""
    size = Tokenizer.from_folder(folder).size if has_tokenizer(folder) else decoder.vocab
    if size > decoder.vocab:
        raise UserError(
            f"{folder}: its tokenizer has {size} tokens, the model's tables {decoder.vocab} rows; is it this model's tokenizer?"
        )
    return replace(decoder, vocab=size, surplus=decoder.surplus + decoder.vocab - size)


def table_rows(source: Source) -> int:
    """Rows of the embedding table."""
    if EMBED not in source.shapes:
        raise UserError(f"{source.folder}: has no {EMBED}; download the rest of the folder")
    return source.shapes[EMBED][0]


def lora_of_tensors(source: Source) -> LoraConfig:
    """LoRA's settings from the adapters in a state dict; rank 0 where there are none. No file stores alpha and dropout."""
    ranks: dict[str, set[int]] = {}
    for name, shape in source.shapes.items():
        if name.endswith(".lora_A.weight"):
            ranks.setdefault(name.removesuffix(".lora_A.weight").rsplit(".", 1)[-1], set()).add(shape[0])
    if not ranks:
        return LoraConfig(rank=0)
    unknown, several = sorted(set(ranks) - set(MODULES)), set.union(*ranks.values())
    if unknown or len(several) > 1:
        what = f"adapters of {', '.join(unknown)}" if unknown else f"adapters of the ranks {sorted(several)}"
        raise UserError(f"{source.folder}: holds {what}; one rank over {', '.join(MODULES)} is supported")
    targets = {name for module in ranks for name in MODULES[module]}
    ordered = tuple(name for name in LORA_TARGETS if name in targets)
    return LoraConfig(rank=several.pop(), alpha=PUBLISHED_ALPHA, targets=ordered)
