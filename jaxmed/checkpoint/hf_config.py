"""From a Hugging Face config.json to our decoder's fields, one function per family.

Both spellings of the rope settings are read: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters`
(transformers 5). What our decoder does not compute (other activations, other rope scalings, biases elsewhere, weights that
are quantised already) is refused here, before any weight is read; nothing is dropped silently.
"""

import difflib
import os
from collections.abc import Callable
from typing import Any

from jaxmed.checkpoint.hf_io import read_json
from jaxmed.config import ConfigError, DecoderConfig, RopeConfig
from jaxmed.errors import UserError

_ABSENT = object()


def read_config(folder: str) -> dict[str, Any]:
    """The folder's config.json."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder (jaxmed downloads nothing; give the path of a folder on this machine)")
    return read_json(os.path.join(folder, "config.json"))


def decoder_config(config: dict[str, Any], where: str) -> DecoderConfig:
    """The decoder that a config.json describes. `where` names the file in messages."""
    model_type = config.get("model_type", "")
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.0)[0]
        known = ", ".join(FAMILIES)
        raise UserError(f"{where}: model_type {model_type!r} is not supported; known are {known} (the nearest: {near})")
    if config.get("quantization_config"):
        raise UserError(f"{where}: the weights are quantised already (quantization_config); give the unquantised model")
    try:
        return FAMILIES[model_type](config, where)
    except ConfigError as error:  # sizes that are each a number, but don't go together
        raise UserError(f"{where}: {error}") from error


def decoder_of(folder: str) -> DecoderConfig:
    """The decoder of a folder."""
    return decoder_config(read_config(folder), os.path.join(folder, "config.json"))


def _number(config: dict[str, Any], name: str, where: str, default: Any = _ABSENT) -> Any:
    """A number from the config. Null counts as absent, as transformers has it."""
    value = config.get(name)
    if value is None:
        if default is _ABSENT:
            raise UserError(f"{where}: has no {name}; is this the config.json of a language model?")
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {name} is {value!r}, a number is needed")
    return value


def _rope(config: dict[str, Any], where: str, theta: float) -> RopeConfig:
    """`theta` is the family's default, for files that say nothing."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
        raise UserError(f"{where}: rope settings differ by layer type; one rope for all layers is supported")
    theta = _number(settings, "rope_theta", where, _number(config, "rope_theta", where, theta))
    if _number(settings, "partial_rotary_factor", where, _number(config, "partial_rotary_factor", where, 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not 1; rope over the whole head is supported")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=float(theta))
    if kind != "llama3":
        raise UserError(f"{where}: rope type {kind!r} is not supported; known are default and llama3")
    return RopeConfig(
        theta=float(theta),
        scaling="llama3",
        factor=float(_number(settings, "factor", where)),
        low_freq_factor=float(_number(settings, "low_freq_factor", where)),
        high_freq_factor=float(_number(settings, "high_freq_factor", where)),
        original_positions=int(_number(settings, "original_max_position_embeddings", where)),
    )


def _decoder(config: dict[str, Any], where: str, kv_heads: int, window: int, max_positions: int) -> DecoderConfig:
    """What LLaMA and Mistral share; the last arguments are what the family takes where the file is silent."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"{where}: hidden_act is {activation!r}; the gated MLP with silu is supported")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name, False):
            raise UserError(f"{where}: {name} is true; projections with a bias on every matrix are not supported")
    width, heads = _number(config, "hidden_size", where), _number(config, "num_attention_heads", where)
    if config.get("head_dim") is None and width % heads:
        raise UserError(
            f"{where}: hidden_size {width} is no multiple of num_attention_heads {heads}, and head_dim is not given"
        )
    return DecoderConfig(
        vocab=_number(config, "vocab_size", where),
        width=width,
        layers=_number(config, "num_hidden_layers", where),
        heads=heads,
        kv_heads=_number(config, "num_key_value_heads", where, kv_heads or heads),
        head_dim=_number(config, "head_dim", where, width // heads),
        mlp=_number(config, "intermediate_size", where),
        norm_eps=_number(config, "rms_norm_eps", where, 1e-6),
        rope=_rope(config, where, 10000.0),
        max_positions=_number(config, "max_position_embeddings", where, max_positions),
        tied=bool(config.get("tie_word_embeddings", False)),
        window=window,
        initializer_range=_number(config, "initializer_range", where, 0.02),
    )


def _llama(config: dict[str, Any], where: str) -> DecoderConfig:
    """LLaMA 2, 3, 3.1, 3.2, TinyLlama, and LLaVA models on top of them."""
    return _decoder(config, where, kv_heads=0, window=0, max_positions=2048)


def _mistral(config: dict[str, Any], where: str) -> DecoderConfig:
    """Mistral: a null `sliding_window` means none, an absent one the 4096 of the first release."""
    window = _number(config, "sliding_window", where, 0) if "sliding_window" in config else 4096
    return _decoder(config, where, kv_heads=8, window=window, max_positions=4096 * 32)


FAMILIES: dict[str, Callable[[dict[str, Any], str], DecoderConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "llava_llama": _llama,
    "llava_mistral": _mistral,
}
