"""The experiments of M3D-LaMed's and SAMF's folders: merged weights, or the state dict that upstream's training writes.

That state dict (model_with_lora.bin) is whole: language model, adapters, tower, projector and fusion. Upstream writes neither
config nor tokenizer beside it; they come from the base then, and the sizes of the image side are the published ones.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxmed.checkpoint.folder_parts import (
    Found,
    Given,
    Selection,
    Source,
    cut_vocabulary,
    find_tower,
    json_of,
    lora_of_tensors,
    table_rows,
    visual_config,
)
from jaxmed.checkpoint.folders import check_same_model
from jaxmed.checkpoint.hf_config import decoder_config, decoder_of, language_model
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.projector_tables import FUSION, SLICE_POSITIONS, aggregator_from, fusion_from, projector_from
from jaxmed.config import DataConfig, DecoderConfig, Experiment, ModelConfig, PixelConfig, TrainConfig, replace_field
from jaxmed.data.tokenizer import Tokenizer, has_tokenizer, read_end_ids
from jaxmed.errors import UserError
from jaxmed.models.presets_towers import VIT3D

M3D_TOKENS = ("<im_patch>", "<bx_start>", "<bx_end>", "[SEG]")
"""Tokens that M3D's training adds, in this order; SAMF's adds the first three."""
PADDING = "<unk>"
"""Padding of M3D's training over LLaMA-2; a token more in front of the four where the base has none of this name"""
M3D_LENGTH = 512
"""Tokens of a row in M3D's and SAMF's training, image places included."""

# What M3D's and SAMF's configs add to the language model's, for a model_with_lora.bin that came without one.
_PUBLISHED = {
    "lamed": {"vision_tower": "vit3d", "image_channel": 1, "image_size": [32, 256, 256], "patch_size": [4, 16, 16]},
    "samf": {"vision_tower": "dino_large", "model_type": "llava_phi3"},
}


def m3d_experiment(folder: str, base: str, tower: str, given: Given) -> Found:
    """Merged weights, or the state dict with adapters in it that upstream's training writes, which is whole too."""
    source, notices = _m3d_source(folder, base, given)
    config, samf = source.config, source.config["vision_tower"] != "vit3d"
    layer, feature = config.get("vision_select_layer", -1), config.get("vision_select_feature") or "patch"
    select = Selection(layer, feature, ("dino",) if samf else ("vit3d",), "", given.heads)
    found = find_tower(source, tower, select)
    _check_volume(source, found.config.image, found.config.patch)
    fusion = fusion_from(config, source.shapes, source.where)
    lora = lora_of_tensors(source)
    words, decoder, added = _m3d_vocabulary(source, base)
    model = ModelConfig(
        decoder=decoder,
        tower=found.config,
        tower_folder=found.folder,
        projector=projector_from(config, source.shapes, source.where),
        fusion=fusion,
        base=folder,
        tokenizer="" if words == folder else words,
        added_tokens=added,
        end_ids=_end_ids(folder, base),
    )
    if model.projector.kind == "aggregator":
        model = replace(model, aggregator=aggregator_from(source.shapes, source.where))
    adapter = lora.rank > 0
    train = TrainConfig(
        trainable="adapter" if adapter else "all", train_tower=True, train_embed_tokens=adapter, train_head=adapter
    )
    data = DataConfig(template="m3d", max_length=M3D_LENGTH, buckets=(M3D_LENGTH,))
    if samf:
        data = replace(data, pad_id=_pad_id(config, words))
    visual = visual_config(found.config, PixelConfig("crop", found.config.image[-1], found.config.image[-1]))
    if places := source.shapes.get(SLICE_POSITIONS):
        visual = replace(visual, slices=places[0], tokens=places[0], grid=(places[0], 1, 1))
    experiment = Experiment(model=model, visual=visual, lora=lora, train=train, data=data)
    return experiment, [*notices, *found.notices, *_assumed(experiment, given)]


def _assumed(experiment: Experiment, given: Given) -> list[str]:
    """Notices of what no file stores, where nobody has said it."""
    lora, model, notices = experiment.lora, experiment.model, []
    if lora.rank and "lora.alpha" not in given.fields:
        notices.append(
            f"lora: rank {lora.rank} as the tensors have it, alpha {lora.alpha:g} assumed (no file says); --set lora.alpha=N"
        )
    if model.projector.kind == "aggregator" and "model.aggregator.heads" not in given.fields:
        notices.append(f"aggregator: {model.aggregator.heads} heads assumed (no file says); --set aggregator.heads=N")
    return notices


def _m3d_source(folder: str, base: str, given: Given) -> tuple[Source, list[str]]:
    """The folder with its config; where training wrote none, the base's with what is published of the rest, or said."""
    tensors = open_folder(folder)
    config, where = json_of(folder), os.path.join(folder, "config.json")
    source = Source(folder, config, where, tensors)
    samf = any(name.startswith(FUSION) for name in source.shapes) or "mm_fuse_type" in config
    published = _PUBLISHED["samf"] if samf else _PUBLISHED["lamed"] | _sizes_said(given)
    if config:
        if json_of(base):
            check_same_model(decoder_of(base), decoder_config(config, where), base, folder)
        named = config | {"vision_tower": config.get("vision_tower") or published["vision_tower"]}
        if "vit3d" in str(named["vision_tower"]).lower():  # upstream looks no closer
            named["vision_tower"] = "vit3d"
        return replace(source, config=named), []
    if not json_of(base):
        raise UserError(
            f"{folder}: has no config.json; give the folder of the language model that it was trained from with --base"
        )
    own = json_of(base)
    own["model_type"] = f"lamed_{language_model(own['model_type'])[0]}"
    where = f"{os.path.join(base, 'config.json')} and the published image side"
    notice = f"{folder}: has no config.json; the language model is that of {base}, the image side as published"
    notice += "" if samf else " (--set model.tower.image=D,H,W, model.tower.patch=D,H,W say otherwise)"
    return Source(folder, own | published | {"vocab_size": table_rows(source)}, where, tensors), [notice]


def _sizes_said(given: Given) -> dict[str, Any]:
    """Sizes that no tensor has, and what is taken from the tower, as M3D's config names them."""
    names = {"image": "image_size", "patch": "patch_size", "channels": "image_channel"}
    names |= {"select_feature": "vision_select_feature", "select_layer": "vision_select_layer"}
    any_size = replace(VIT3D, image=(2**20,) * 3, patch=(1, 1, 1))  # each is read by itself
    found = {}
    for ours, theirs in names.items():
        if (name := f"model.tower.{ours}") in given.fields:
            value = getattr(replace_field(any_size, ours, given.fields[name], "model.tower."), ours)
            found[theirs] = list(value) if isinstance(value, tuple) else value
    return found


def _check_volume(source: Source, image: tuple[int, ...], patch: tuple[int, ...]) -> None:
    """A tower's own folder against the model's config; SAMF's config repeats M3D's sizes and means nothing by them."""
    for name, found in {"image_size": image, "patch_size": patch}.items():
        stated = source.config.get(name)
        if source.config["vision_tower"] == "vit3d" and stated is not None and tuple(stated) != found:
            raise UserError(
                f"{source.where}: {name} is {stated}, the image tower's is {list(found)}; give this model's own with --tower"
            )


def _m3d_vocabulary(source: Source, base: str) -> tuple[str, DecoderConfig, tuple[str, ...]]:
    """(tokenizer's folder, decoder, tokens that its training added to the base's tokenizer, where only that is here)."""
    folder, decoder = source.folder, decoder_config(dict(source.config), source.where)
    if has_tokenizer(folder) or not base:
        return folder, cut_vocabulary(decoder, folder), ()
    rows = decoder.vocab
    words = Tokenizer.from_folder(base) if has_tokenizer(base) else None
    size, added = (words.size if words else rows), M3D_TOKENS
    if words and rows - size > len(M3D_TOKENS) and words.token_id(PADDING) is None:
        added = (PADDING, *M3D_TOKENS)  # trained as if over LLaMA-2, whose padding is new to LLaMA-3: other ids are one up
    if not 0 <= rows - size <= len(added):
        raise UserError(
            f"{folder}: has {rows} rows of tokens, the tokenizer of {base} has {size}; give the model's own base, or copy its "
            "tokenizer there"
        )
    return base, replace(decoder, vocab=size), added[: rows - size]


def _end_ids(folder: str, base: str) -> tuple[int, ...]:
    """Upstream generates with the base's generation_config.json where training wrote none."""
    if json_of(folder, "generation_config.json") or not json_of(base, "generation_config.json"):
        return ()
    return read_end_ids(base)


def _pad_id(config: Mapping[str, Any], tokenizer: str) -> int:
    """SAMF's fusion reads the padding: the end token, as its training sets it."""
    stated = config.get("pad_token_id")
    if isinstance(stated, int):
        return stated
    return Tokenizer.from_folder(tokenizer).pad_id if has_tokenizer(tokenizer) else -1
