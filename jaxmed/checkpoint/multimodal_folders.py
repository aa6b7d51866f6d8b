"""The experiments that folders describe: whole vision-language models, upstream's LoRA folders over them, language models.

    resolve_folder(kind, folder, base, tower, overrides) -> (experiment, notices)

All that files say is read from them; what none says is the published default, and a notice names it. Upstream's: LLaVA,
LLaVA-Med and TinyLLaVA (`llava`), transformers' Llava (`llava_hf`); M3D-LaMed (`lamed`) and SAMF (`samf`) are in `m3d_folders`,
BTB3D's LoRA folders and plain PEFT adapters in `folders`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jaxmed.checkpoint.decoder_tables import EMBED
from jaxmed.checkpoint.folder_kinds import KINDS, WHOLE, FolderKind, detect_base
from jaxmed.checkpoint.folder_parts import (
    Found,
    Given,
    Selection,
    Source,
    cut_vocabulary,
    find_tower,
    json_of,
    pixels_of,
    visual_config,
)
from jaxmed.checkpoint.folders import (
    added_tokens,
    base_end_ids,
    base_of,
    check_same_model,
    llava_experiment,
    lora_config,
    peft_experiment,
    row_length,
)
from jaxmed.checkpoint.hf_config import decoder_config, decoder_of, read_config
from jaxmed.checkpoint.hf_io import open_folder
from jaxmed.checkpoint.m3d_folders import m3d_experiment
from jaxmed.config import (
    SHORT_NAMES,
    DataConfig,
    DecoderConfig,
    Experiment,
    LoraConfig,
    ModelConfig,
    ProjectorConfig,
    TrainConfig,
    VisualConfig,
)
from jaxmed.data.tokenizer import Tokenizer, has_tokenizer
from jaxmed.errors import UserError

# What transformers takes where the text_config of a Llava is silent (files of version 4 leave defaults out).
_TEXT_DEFAULTS = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def resolve_folder(
    kind: FolderKind, folder: str, base: str = "", tower: str = "", overrides: Mapping[str, Any] | None = None
) -> Found:
    """The experiment of a folder of `kind` (see `detect`), and what the log should say of how it came about.

    `base`: the language model of an adapter, or where a state dict came without config or tokenizer. `tower`: the image
    tower's folder. `overrides`: by short or full names; only those are used here without which no experiment can be made
    (head counts), the caller sets them all in the end.
    """
    given = Given({SHORT_NAMES.get(name, name): value for name, value in (overrides or {}).items()})
    if kind in _MAKERS:
        return _MAKERS[kind](folder, base, tower, given)
    hint = "give it as the tower (--tower)" if kind in ("tower", "m3d_clip") else "go on from it with --model.adapter"
    hint = "give a tower as --tower, a projector as --model.adapter" if kind == "part" else hint
    raise UserError(f"{folder}: is {KINDS[kind]}, which is no whole model; {hint}")


def _language_model(folder: str, base: str, tower: str, given: Given) -> Found:
    """Text alone."""
    _no_tower(folder, tower)
    model = ModelConfig(decoder=decoder_of(folder), base=folder)
    return Experiment(model=model, visual=VisualConfig(kind="none", images=0, tokens=0), lora=LoraConfig(rank=0)), []


def _peft(folder: str, base: str, tower: str, given: Given) -> Found:
    """A PEFT adapter over a language model."""
    _no_tower(folder, tower)
    base = base or base_of(folder, json_of(folder, "adapter_config.json"))
    return peft_experiment(folder, base, Experiment(model=ModelConfig(decoder=decoder_of(base)))), []


def _no_tower(folder: str, tower: str) -> None:
    if tower:
        raise UserError(f"tower {tower!r}: {folder} is a model without an image tower; leave it out")


# -- LLaVA, LLaVA-Med, TinyLLaVA ---------------------------------------------------------------------------------------------


def _llava(folder: str, base: str, tower: str, given: Given) -> Found:
    """A whole model with `mm_*` fields."""
    config = read_config(folder)
    source = Source(folder, _as_llava(config), os.path.join(folder, "config.json"), open_folder(folder))
    return _with_tower(source, decoder_config(dict(source.config), source.where), _selection(source.config, given), base, tower)


def _as_llava(config: Mapping[str, Any]) -> dict[str, Any]:
    """LLaVA's first release calls itself `llava`."""
    return dict(config) | ({"model_type": "llava_llama"} if config["model_type"] == "llava" else {})


def _selection(config: Mapping[str, Any], given: Given) -> Selection:
    layer, feature = config.get("mm_vision_select_layer", -2), config.get("mm_vision_select_feature") or "patch"
    return Selection(layer, feature, ("clip", "siglip"), str(config.get("mm_vision_tower") or ""), given.heads)


def _llava_hf(folder: str, base: str, tower: str, given: Given) -> Found:
    """transformers' LlavaForConditionalGeneration: the same model under other names."""
    config, where = read_config(folder), os.path.join(folder, "config.json")
    for name, wanted in {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}.items():
        if config.get(name, wanted) != wanted:
            raise UserError(f"{where}: {name} is {config[name]!r}; {wanted!r} is supported")
    text = config["text_config"]
    family = text.get("model_type", "llama")
    tied = {"tie_word_embeddings": text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))}
    decoder = decoder_config(_TEXT_DEFAULTS.get(family, {}) | {"model_type": family} | text | tied, f"{where} (text_config)")
    about = config | {"mm_projector_type": "mlp2x_gelu", "model_type": f"llava_{family}"}
    layer, feature = config.get("vision_feature_layer", -2), config.get("vision_feature_select_strategy", "default")
    source = Source(folder, about, where, open_folder(folder))
    return _with_tower(source, decoder, Selection(layer, feature, ("clip", "siglip"), "", given.heads), base, tower)


def _with_tower(source: Source, decoder: DecoderConfig, select: Selection, base: str, tower: str) -> Found:
    """A LLaVA model: all trains but the tower, as upstream's full fine-tuning has it."""
    folder = source.folder
    words = folder if has_tokenizer(folder) or not base else base
    decoder = cut_vocabulary(decoder, words)
    image, fields, notices = _image_side(source, select, tower)
    model = ModelConfig(decoder=decoder, base=folder, tokenizer="" if words == folder else words, **fields)
    data = _data(source, words, decoder)
    return Experiment(
        model=model, visual=image, lora=LoraConfig(rank=0), train=TrainConfig(trainable="all"), data=data
    ), notices


def _image_side(source: Source, select: Selection, tower: str) -> tuple[VisualConfig, dict[str, Any], list[str]]:
    """(image input, tower and projector as fields of the model, notices)."""
    projector = ProjectorConfig(kind=source.config.get("mm_projector_type", "linear"))
    if projector.kind.startswith("attn_pool+"):
        raise UserError(
            f"{source.folder}: a whole model that reads image tokens from files is not supported; give its LoRA folder"
        )
    found = find_tower(source, tower, select)
    pixels, more = pixels_of(found, source.folder, source.config.get("image_aspect_ratio") or "")
    fields = {"tower": found.config, "tower_folder": found.folder, "projector": projector}
    return visual_config(found.config, pixels), fields, [*found.notices, *more]


def _data(source: Source, tokenizer: str, decoder: DecoderConfig) -> DataConfig:
    """Template and lengths as the published models of a family were trained."""
    family, length = source.config["model_type"], row_length(source.config, source.where)
    template = "mistral_instruct" if family == "llava_mistral" else "v1"
    if template == "v1" and has_tokenizer(tokenizer) and Tokenizer.from_folder(tokenizer).token_id("<|start_header_id|>"):
        template = "llama3"
    missing = "text_only" if family in ("tiny_llava", "tinyllava") else "refuse"
    buckets = (length or min(decoder.max_positions, 32768),)
    return DataConfig(template=template, max_length=length, buckets=buckets, missing_image_token=missing)


def _llava_lora(folder: str, base: str, tower: str, given: Given) -> Found:
    """Adapter and projector of LLaVA's LoRA training, over a whole LLaVA model or over a language model."""
    config, adapter = read_config(folder), json_of(folder, "adapter_config.json")
    where = os.path.join(folder, "config.json")
    base = base or base_of(folder, adapter)
    kind = detect_base(base)
    if _reads_tokens(config) and kind not in WHOLE:
        _no_tower(folder, tower)
        data = DataConfig(max_length=row_length(config, where))
        return llava_experiment(folder, base, Experiment(model=ModelConfig(decoder=decoder_of(base)), data=data)), []
    source = Source(folder, _as_llava(config), where, open_folder(folder))
    if kind in WHOLE:
        found, notices = _MAKERS[kind](base, "", tower, given)
    else:
        decoder = cut_vocabulary(decoder_of(base), base)
        image, fields, notices = _image_side(source, _selection(config, given), tower)
        found = Experiment(model=ModelConfig(decoder=decoder, base=base, **fields), visual=image)
    decoder = found.model.decoder
    check_same_model(decoder, decoder_config(dict(source.config), where), base, folder)
    rows = decoder.vocab + decoder.surplus
    added = () if config.get("vocab_size", rows) in (rows, decoder.vocab) else added_tokens(folder, rows, config["vocab_size"])
    model = replace(
        found.model,
        adapter=folder,
        added_tokens=added,
        tokenizer=folder if has_tokenizer(folder) else found.model.tokenizer,
        end_ids=base_end_ids(folder, base),
        projector=ProjectorConfig(kind=config.get("mm_projector_type", "linear")),
    )
    train = TrainConfig(trainable="adapter", train_embed_tokens=EMBED in source.shapes)
    data = _data(source, model.tokenizer or base, decoder)
    return replace(found, model=model, lora=lora_config(adapter, folder), train=train, data=data), notices


def _reads_tokens(config: Mapping[str, Any]) -> bool:
    """Whether the image side is a folder of token files, whatever tower the config names (CT-CHAT's and BTB3D's code)."""
    return "mm_context_size" in config or str(config.get("mm_projector_type", "")).startswith("attn_pool+")


_MAKERS: dict[FolderKind, Callable[[str, str, str, Given], Found]] = {
    "hf": _language_model,
    "peft": _peft,
    "llava": _llava,
    "llava_hf": _llava_hf,
    "llava_lora": _llava_lora,
    "lamed": m3d_experiment,
    "samf": m3d_experiment,
}
