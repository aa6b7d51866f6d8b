"""The JSON files of exported folders: config.json and generation_config.json for transformers, adapter_config.json for PEFT,
config.json with upstream's `mm_*` fields; and the tokenizer that goes along.

What the source folder says is kept as it stands there; only what the export changes is set.
"""

import os
import shutil
from typing import Any

import tokenizers

from jaxmed.checkpoint.decoder_tables import peft_modules
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.hf_config import attention_factor, language_model, read_config
from jaxmed.checkpoint.hf_io import read_json
from jaxmed.config import DecoderConfig, Experiment
from jaxmed.data.tokenizer import Tokenizer, has_tokenizer
from jaxmed.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILES += ("added_tokens.json", "vocab.json", "merges.txt", *CHAT_TEMPLATES)

TOWER_FOLDER = "vision_tower"
"""Where an exported LLaVA folder has its tower by itself, if no other folder holds it"""

_ADAPTER_DEFAULTS = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "revision": None,
    "task_type": "CAUSAL_LM",
}

# What upstream's training writes beside the fields that describe the model; its loader asks for some of them.
LLAVA_DEFAULTS = {
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "square",
    "mm_patch_merge_type": "flat",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "tokenizer_padding_side": "right",
    "tune_mm_mlp_adapter": False,
    "use_cache": False,
    "use_mm_proj": True,
}


# Fields of upstream's config.json that speak of the image side, by their beginning.
_IMAGE_FIELDS = ("mm_", "image_", "vision_", "proj_", "patch_size", "tune_", "freeze_mm_", "use_mm_", "seg_token_id")


def tokenizer_folder(experiment: Experiment) -> str:
    """Where the model's tokenizer is; "" if there is none."""
    places = [place for place in (experiment.model.tokenizer, experiment.model.base) if place]
    return next((place for place in places if has_tokenizer(place)), "")


def hf_documents(experiment: Experiment, dtype: str) -> dict[str, dict[str, Any]]:
    """config.json and generation_config.json of a language model in `dtype`, for transformers 4 and 5."""
    model = experiment.model
    config = base_config(experiment)
    config = {name: value for name, value in config.items() if not name.startswith(_IMAGE_FIELDS) and name != "_name_or_path"}
    config["model_type"], architecture = language_model(config["model_type"])
    config["architectures"] = [architecture]
    config["vocab_size"] = model.decoder.vocab + len(model.added_tokens)
    config["tie_word_embeddings"] = model.decoder.tied
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    config |= token_ids(experiment, config)
    path = os.path.join(model.base, "generation_config.json")
    generation = read_json(path) if model.base and os.path.exists(path) else {}
    generation |= token_ids(experiment, generation)
    return {"config.json": config, "generation_config.json": generation}


def base_config(experiment: Experiment) -> dict[str, Any]:
    """The language model's, from the base's config.json as far as one speaks of it."""
    model = experiment.model
    config = read_config(model.base) if model.base and os.path.exists(os.path.join(model.base, "config.json")) else {}
    if "text_config" in config:  # transformers' Llava leaves defaults out
        return fresh_config(model.decoder) | config["text_config"]
    return config if "hidden_size" in config else fresh_config(model.decoder)


def fresh_config(decoder: DecoderConfig) -> dict[str, Any]:
    """config.json of a decoder that was trained from scratch, in the spelling that transformers 4 and 5 both read."""
    if decoder.qkv_bias:
        raise UserError("model.decoder.qkv_bias: neither LLaMA nor Mistral has biases in q, k and v alone; no HF model fits")
    config = {
        "model_type": "phi3" if decoder.fused else "mistral" if decoder.window else "llama",
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "intermediate_size": decoder.mlp,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm_eps,
        "rope_theta": decoder.rope.theta,
        "rope_scaling": _rope_scaling(decoder),
        "max_position_embeddings": decoder.max_positions,
        "initializer_range": decoder.initializer_range,
        "attention_bias": False,
        "mlp_bias": False,
        **({"sliding_window": decoder.window or None} if decoder.window or decoder.fused else {}),
    }
    if decoder.rope.scaling == "longrope":
        config["original_max_position_embeddings"] = decoder.rope.original_positions
    if decoder.fused:  # or transformers takes the published model's, which a smaller vocabulary lacks
        config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return config


def _rope_scaling(decoder: DecoderConfig) -> dict[str, Any] | None:
    rope = decoder.rope
    if rope.scaling == "linear":
        return {"rope_type": "linear", "factor": rope.factor}
    if rope.scaling == "llama3":
        return {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_positions,
        }
    if rope.scaling == "longrope":  # transformers 4 takes no fourth field, so the attention factor is left out where it follows
        fields = {"type": "longrope", "short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        follows = attention_factor(decoder.max_positions / rope.original_positions, rope.original_positions)
        return fields if rope.attention_factor == follows else fields | {"attention_factor": rope.attention_factor}
    return None


def token_ids(experiment: Experiment, known: dict[str, Any]) -> dict[str, Any]:
    """Ids that a folder has not stated yet, and a padding token that training named."""
    folder = tokenizer_folder(experiment)
    if not folder:
        return {}
    model = experiment.model
    tokenizer = Tokenizer.from_folder(folder, model.added_tokens)
    ends = list(tokenizer.eos_ids)
    found = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    found = {name: value for name, value in found.items() if value is not None and known.get(name) is None}
    pad = tokenizer.token_id(model.pad_token)
    return found if pad is None else found | {"pad_token_id": pad}


def adapter_config(experiment: Experiment, upstream: str) -> dict[str, Any]:
    """PEFT's; an upstream folder's own where there is one, as far as it holds."""
    path = os.path.join(upstream, "adapter_config.json")
    config = read_json(path) if upstream and os.path.exists(path) else {}
    lora = experiment.lora
    if not config:
        config = _ADAPTER_DEFAULTS | {"base_model_name_or_path": os.path.abspath(experiment.model.base)}
    targets = peft_modules(experiment.model.decoder, lora.targets)
    if {name.rsplit(".", 1)[-1] for name in config.get("target_modules") or ()} != set(targets):
        config["target_modules"] = targets
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    config |= {"use_rslora": False} if config.get("use_rslora") else {}  # its scale is in alpha here
    return config | {"r": lora.rank, "lora_alpha": alpha, "lora_dropout": lora.dropout}


def llava_config(experiment: Experiment, upstream: str) -> dict[str, Any]:
    """Upstream's: the base's fields, the projector's kind and sizes, rows with added tokens."""
    model = experiment.model
    path = os.path.join(upstream, "config.json")
    if upstream and os.path.exists(path) and detect(upstream) == "llava_lora":
        config = read_config(upstream)
    else:
        config = base_config(experiment) | LLAVA_DEFAULTS
        config["mm_projector_lr"] = experiment.optim.projector_learning_rate or None
        if model.tower.kind == "none":
            config["mm_context_size"] = experiment.visual.features
        elif "mm_vision_tower" not in base_config(experiment):
            config |= llava_image_fields(experiment)
        config["model_type"] = f"llava_{config['model_type'].removeprefix('llava_')}"
        config |= token_ids(experiment, config)
    config["vocab_size"] = model.decoder.vocab + len(model.added_tokens)
    return config | {"mm_projector_type": model.projector.kind, "mm_hidden_size": experiment.visual.features}


def llava_image_fields(experiment: Experiment) -> dict[str, Any]:
    """Upstream's fields for the image side of a model with a tower."""
    model, tower = experiment.model, experiment.model.tower
    return {
        "image_aspect_ratio": "pad" if experiment.visual.pixels.aspect == "pad" else "square",
        "mm_vision_select_feature": tower.select_feature,
        "mm_vision_select_layer": tower.select_layer,
        "mm_vision_tower": os.path.abspath(model.tower_folder) if model.tower_folder else TOWER_FOLDER,
        "tokenizer_model_max_length": experiment.data.max_length or model.decoder.max_positions,
    }


def write_tokenizer(experiment: Experiment, folder: str, extra: tuple[str, ...] = ()) -> bool:
    """The tokenizer's own files where they hold the added tokens already, else saved with them (and `extra`, the last for
    padding where it is `<pad>`). False: there is none."""
    source = tokenizer_folder(experiment)
    if not source:
        return False
    added = experiment.model.added_tokens
    if not extra and all(Tokenizer.from_folder(source).token_id(token) is not None for token in added):
        _copy(TOKENIZER_FILES, source, folder)
        return True
    pad = "<pad>" if "<pad>" in extra else experiment.model.pad_token
    Tokenizer.from_folder(source, added + extra, pad).save(folder)
    _add_to_json(os.path.join(source, "tokenizer.json"), os.path.join(folder, "tokenizer.json"), added + extra)
    _copy(CHAT_TEMPLATES, source, folder)
    return True


def _add_to_json(source: str, out: str, tokens: tuple[str, ...]) -> None:
    """A tokenizer.json that lies beside a tokenizer.model: transformers reads it, and would convert the model otherwise."""
    if os.path.exists(source) and not os.path.exists(out):
        tokenizer = tokenizers.Tokenizer.from_file(source)
        tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in tokens])
        tokenizer.save(out)


def write_chat_template(experiment: Experiment, folder: str) -> None:
    """The base's, where it is a file of its own: the tokenizer of a run is saved without it."""
    if experiment.model.base and not any(os.path.exists(os.path.join(folder, name)) for name in CHAT_TEMPLATES):
        _copy(CHAT_TEMPLATES, experiment.model.base, folder)


def _copy(names: tuple[str, ...], source: str, folder: str) -> None:
    for name in names:
        if os.path.exists(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
