"""From a Hugging Face config.json to our decoder's fields, one function per family.

Both spellings of the rope settings are read: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters`
(transformers 5). What our decoder does not compute (other activations, other rope scalings, biases elsewhere, weights that
are quantised already) is refused here, before any weight is read; nothing is dropped silently.
"""

import difflib
import math
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


def _rope_settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
        raise UserError(f"{where}: rope settings differ by layer type; one rope for all layers is supported")
    return settings


def _theta(config: dict[str, Any], settings: dict[str, Any], where: str, default: Any = _ABSENT) -> float:
    """Beside the other rope settings (transformers 5), or at the top."""
    if settings.get("rope_theta") is not None:
        return float(_number(settings, "rope_theta", where))
    return float(_number(config, "rope_theta", where, default))


def _rope(config: dict[str, Any], where: str, theta: float, head_dim: int, max_positions: int) -> RopeConfig:
    """`theta` and `max_positions` are the family's defaults, for files that say nothing."""
    settings = _rope_settings(config, where)
    theta = _theta(config, settings, where, theta)
    if _number(settings, "partial_rotary_factor", where, _number(config, "partial_rotary_factor", where, 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not 1; rope over the whole head is supported")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind in ("longrope", "su"):  # `su` in the first files of Phi-3
        longest = _number(config, "max_position_embeddings", where, max_positions)
        return _longrope(config, settings, where, theta, head_dim, longest)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=float(_number(settings, "factor", where)))
    if kind != "llama3":
        raise UserError(f"{where}: rope type {kind!r} is not supported; known are default, linear, llama3 and longrope")
    return RopeConfig(
        theta=theta,
        scaling="llama3",
        factor=float(_number(settings, "factor", where)),
        low_freq_factor=float(_number(settings, "low_freq_factor", where)),
        high_freq_factor=float(_number(settings, "high_freq_factor", where)),
        original_positions=int(_number(settings, "original_max_position_embeddings", where)),
    )


def _longrope(
    config: dict[str, Any], settings: dict[str, Any], where: str, theta: float, head_dim: int, longest: int
) -> RopeConfig:
    """The length before scaling stands at the top, or beside the factors; the factor of cosines and sines follows from it."""
    name = "original_max_position_embeddings"
    original = int(_number(settings if config.get(name) is None else config, name, where))
    if original < 2:
        raise UserError(f"{where}: {name} is {original}; the context length of the pretraining is needed")
    stretch = _number(settings, "factor", where, longest / original)
    lists = {name: settings.get(name) for name in ("short_factor", "long_factor")}
    for name, factors in lists.items():
        numbers = isinstance(factors, list) and all(isinstance(f, int | float) and f > 0 for f in factors)
        if not numbers or len(factors) != head_dim // 2:
            raise UserError(
                f"{where}: rope's {name} must be {head_dim // 2} numbers above 0, one a pair of dimensions of a head"
            )
    return RopeConfig(
        theta=theta,
        scaling="longrope",
        original_positions=original,
        short_factors=tuple(float(f) for f in lists["short_factor"]),
        long_factors=tuple(float(f) for f in lists["long_factor"]),
        attention_factor=float(_number(settings, "attention_factor", where, attention_factor(stretch, original))),
    )


def attention_factor(stretch: float, original: int) -> float:
    """Of longrope, where the file gives none: from how many times longer than `original` positions a context became."""
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _decoder(
    config: dict[str, Any], where: str, kv_heads: int, max_positions: int, norm_eps: float = 1e-6, **more: Any
) -> DecoderConfig:
    """What the families share; kv_heads (0: as many as heads), max_positions and norm_eps where the file is silent."""
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
    head_dim = _number(config, "head_dim", where, width // heads)
    vocab, padding = _number(config, "vocab_size", where), _number(config, "pad_token_id", where, -1)
    return DecoderConfig(
        vocab=vocab,
        width=width,
        layers=_number(config, "num_hidden_layers", where),
        heads=heads,
        kv_heads=_number(config, "num_key_value_heads", where, kv_heads or heads),
        head_dim=head_dim,
        mlp=_number(config, "intermediate_size", where),
        norm_eps=_number(config, "rms_norm_eps", where, norm_eps),
        rope=_rope(config, where, 10000.0, head_dim, max_positions),
        max_positions=_number(config, "max_position_embeddings", where, max_positions),
        tied=bool(config.get("tie_word_embeddings", False)),
        initializer_range=_number(config, "initializer_range", where, 0.02),
        padding_row=padding if 0 <= padding < vocab else -1,
        **more,
    )


def _llama(config: dict[str, Any], where: str) -> DecoderConfig:
    """LLaMA 2, 3, 3.1, 3.2, TinyLlama, and vision-language models on top of them."""
    return _decoder(config, where, kv_heads=0, max_positions=2048)


def _mistral(config: dict[str, Any], where: str) -> DecoderConfig:
    """Mistral. What differs between its releases must be stated: transformers' defaults are those of no release as a whole."""
    absent = [] if "sliding_window" in config else ["sliding_window (null: no window)"]
    absent += ["rms_norm_eps"] if config.get("rms_norm_eps") is None else []
    if config.get("rope_theta") is None and _rope_settings(config, where).get("rope_theta") is None:
        absent.append("rope_theta")
    if absent:
        raise UserError(
            f"{where}: has no {', no '.join(absent)}; releases of Mistral differ in it, so it is not guessed: "
            "add it from the model's original config.json"
        )
    window = _number(config, "sliding_window", where, 0)
    return _decoder(config, where, kv_heads=8, max_positions=4096 * 32, window=window)


def _phi3(config: dict[str, Any], where: str) -> DecoderConfig:
    """Phi-3-mini, 4k and 128k: q, k, v are one matrix in its files, gate and up another."""
    window = _number(config, "sliding_window", where, 0)
    return _decoder(config, where, kv_heads=0, max_positions=4096, norm_eps=1e-5, window=window, fused=True)


FAMILIES: dict[str, Callable[[dict[str, Any], str], DecoderConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "phi3": _phi3,
    "llava_llama": _llama,
    "llava_mistral": _mistral,
    "llava_phi3": _phi3,
    "lamed_llama": _llama,
    "lamed_phi3": _phi3,
    "tiny_llava": _llama,
    "tinyllava": _llama,
}

ARCHITECTURES = {_llama: ("llama", "LlamaForCausalLM"), _mistral: ("mistral", "MistralForCausalLM")}
ARCHITECTURES |= {_phi3: ("phi3", "Phi3ForCausalLM")}


def language_model(model_type: str) -> tuple[str, str]:
    """model_type and class in transformers of the language model that a family, such as `llava_mistral`, is built on."""
    return ARCHITECTURES[FAMILIES[model_type]]
