"""The settings of exported vision-language models: config.json of upstream's layouts, and all that transformers' Llava reads.

What a source of the same layout says is kept as it stands there; only what the export changes is set.
"""

import json
import os
from typing import Any

from jaxmed.checkpoint.export_config import (
    LLAVA_DEFAULTS,
    TOWER_FOLDER,
    fresh_config,
    hf_documents,
    llava_image_fields,
    token_ids,
    tokenizer_folder,
)
from jaxmed.checkpoint.folder_kinds import detect_base
from jaxmed.checkpoint.hf_config import read_config
from jaxmed.config import Experiment, PixelConfig, TowerConfig
from jaxmed.data.images import BICUBIC, RESCALE
from jaxmed.data.tokenizer import Tokenizer

IMAGE, PAD = "<image>", "<pad>"

Document = dict[str, Any]

_CLASSES = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "lamed_llama": "LamedLlamaForCausalLM",
    "lamed_phi3": "LamedPhi3ForCausalLM",
    "llava_phi3": "LlavaPhi3ForCausalLM",
}
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def upstream_documents(
    experiment: Experiment, to: str, dtype: str, adapters: bool, layers: int = -1, head: bool = False
) -> dict[str, Document]:
    """config.json (and generation_config.json where the base has one) of LLaVA's, LaMed's or SAMF's layout.

    `adapters`: they stand in the file of weights, whose config upstream writes before the model has its own class. `layers`,
    `head`: of the tower, where LLaVA's layout gets a folder for it.
    """
    model = experiment.model
    own = bool(model.base) and detect_base(model.base) == to
    config = dict(read_config(model.base)) if own and _has_config(model.base) else _fresh(experiment, to)
    config["vocab_size"] = model.decoder.vocab + len(model.added_tokens)
    if own and not adapters and config.get("architectures") and config["model_type"] in _CLASSES:
        config["architectures"] = [_CLASSES[config["model_type"]]]
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    config |= token_ids(experiment, config)
    documents = {"config.json": config}
    if config.get("mm_vision_tower") == TOWER_FOLDER:
        layers = experiment.model.tower.layers if layers < 0 else layers
        settings = vision_config(experiment.model.tower, layers, head)
        documents |= {
            f"{TOWER_FOLDER}/config.json": settings,
            f"{TOWER_FOLDER}/preprocessor_config.json": preprocessor(experiment.visual.pixels),
        }
    path = os.path.join(model.base, "generation_config.json")
    if model.base and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            documents["generation_config.json"] = json.load(file)
    elif model.end_ids and not adapters:  # those of the base's file, which upstream's merging copies
        documents["generation_config.json"] = {"eos_token_id": list(model.end_ids)}
    return documents


def _has_config(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "config.json"))


def _fresh(experiment: Experiment, to: str) -> Document:
    """config.json of a layout for a model whose source has another."""
    model = experiment.model
    decoder = fresh_config(model.decoder)
    if to == "llava":
        mistral = experiment.data.template == "mistral_instruct" or decoder["model_type"] == "mistral"
        family = "llava_mistral" if mistral else "llava_llama"
        config = LLAVA_DEFAULTS | llava_image_fields(experiment)
    else:
        family = f"lamed_{decoder['model_type']}" if to == "lamed" else "llava_phi3"
        config = _m3d_fields(experiment, to)
    decoder["sliding_window"] = model.decoder.window or None
    projector = {"mm_projector_type": model.projector.kind, "mm_hidden_size": experiment.visual.features}
    projector["tie_word_embeddings"] = model.decoder.tied
    return decoder | config | projector | {"model_type": family, "architectures": [_CLASSES[family]]}


def _m3d_fields(experiment: Experiment, to: str) -> Document:
    model, tower = experiment.model, experiment.model.tower
    fields: Document = {
        "vision_tower": "vit3d" if to == "lamed" else "dino",
        "vision_select_layer": tower.select_layer,
        "vision_select_feature": tower.select_feature,
        "image_channel": tower.channels if to == "lamed" else 1,
    }
    if to == "lamed":
        spp = model.projector
        fields |= {"image_size": list(tower.image), "patch_size": list(tower.patch)}
        fields |= {"proj_layer_type": spp.spp_head, "proj_layer_num": spp.spp_depth}
        fields |= {"proj_pooling_type": spp.spp_pooling, "proj_pooling_size": spp.spp_size}
    return fields | ({"mm_fuse_type": model.fusion.kind} if to == "samf" else {})


# -- transformers' Llava -----------------------------------------------------------------------------------------------------


def extra_tokens(experiment: Experiment) -> tuple[str, ...]:
    """Tokens that transformers' Llava needs and the vocabulary lacks: the image's, and one for padding."""
    folder = tokenizer_folder(experiment)
    if not folder:
        return (IMAGE,)
    tokenizer = Tokenizer.from_folder(folder, experiment.model.added_tokens)
    return tuple(token for token in (IMAGE, PAD) if tokenizer.token_id(token) is None)


def _id(experiment: Experiment, token: str, rows: int, extra: tuple[str, ...]) -> int:
    if token in extra:
        return rows + extra.index(token)
    folder = tokenizer_folder(experiment)
    found = Tokenizer.from_folder(folder, experiment.model.added_tokens).token_id(token) if folder else None
    return rows if found is None else found


def llava_hf_documents(
    experiment: Experiment, dtype: str, size: int, extra: tuple[str, ...], layers: int, head: bool
) -> dict[str, Document]:
    """Every JSON file of a LlavaForConditionalGeneration folder. `size`: rows of the tables; `layers`: blocks of the tower that
    are written; `head`: whether its pooling head is."""
    tower, documents = experiment.model.tower, hf_documents(experiment, dtype)
    rows = experiment.model.decoder.vocab + len(experiment.model.added_tokens)
    text = documents["config.json"] | {"vocab_size": size}
    strategy = "default" if tower.class_token and tower.select_feature == "patch" else "full"
    pad = {"pad_token_id": _id(experiment, PAD, rows, extra)} if tokenizer_folder(experiment) else {}
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text | pad,
        "vision_config": vision_config(tower, layers, head),
        "image_token_index": _id(experiment, IMAGE, rows, extra),
        "image_seq_length": tower.tokens,
        "vision_feature_layer": tower.select_layer if layers == tower.layers else -1,
        "vision_feature_select_strategy": strategy,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": experiment.model.decoder.tied,
        "torch_dtype": dtype,
        **pad,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": tower.patch[0],
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(tower.class_token),
        "image_token": IMAGE,
    }
    return {
        "config.json": config,
        "generation_config.json": documents["generation_config.json"] | pad,
        "preprocessor_config.json": preprocessor(experiment.visual.pixels),
        "processor_config.json": processor,
    }


def vision_config(tower: TowerConfig, layers: int, head: bool) -> Document:
    """A CLIP or SigLIP tower as transformers describes it."""
    config = {
        "model_type": f"{tower.kind}_vision_model",
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": tower.heads,
        "num_channels": tower.channels,
        "image_size": tower.image[0],
        "patch_size": tower.patch[0],
        "hidden_act": _ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_eps,
    }
    return config | ({"vision_use_head": head} if tower.kind == "siglip" else {})


def preprocessor(pixels: PixelConfig) -> Document:
    """preprocessor_config.json of the image processor that does what the model's images go through."""
    kind = {"pad": "LlavaImageProcessor", "crop": "CLIPImageProcessor", "squash": "SiglipImageProcessor"}[pixels.aspect]
    square = {"height": pixels.shortest, "width": pixels.shortest}
    common = {
        "image_processor_type": kind,
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.sd),
        "resample": BICUBIC,
        "rescale_factor": RESCALE,
        "size": square if pixels.aspect == "squash" else {"shortest_edge": pixels.shortest},
    }
    if pixels.aspect == "squash":
        return common
    common |= {"do_center_crop": pixels.crop > 0, "crop_size": {"height": pixels.side, "width": pixels.side}}
    return common | ({"do_pad": True} if pixels.aspect == "pad" else {})
