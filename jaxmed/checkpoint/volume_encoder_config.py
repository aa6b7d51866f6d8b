"""From upstream's YAML to the sizes of the volume encoder; and which files of a folder they are.

What the file says beyond the sizes must be what we compute (lookup-free quantization into 18 bits, 3-D); else it is refused
here, before a weight is read. Unused at inference and not looked at: encoder.filters, data, discriminator, seed.
"""

import os
from typing import Any

import yaml

from jaxmed.checkpoint.volume_encoder_tables import EncoderTensors
from jaxmed.config import ConfigError
from jaxmed.errors import UserError
from jaxmed.models.volume_encoder import BITS, PUBLISHED, VolumeEncoderConfig

_KNOWN = f"or {' or '.join(PUBLISHED)} for the published sizes"
# Section and name -> what it must be; absent is taken for that.
_FIXED = {
    ("model.quantize_model", "quantizer_type"): ("lfq",),
    ("model.quantize_model", "skip_quantize"): (False,),
    ("model.quantize_model", "codebook_size"): (2**BITS,),
    ("model.quantize_model", "token_size"): (BITS,),
    ("model.quantize_model", "use_l2_norm"): (False,),
    ("", "modal"): ("video", "nii"),
    ("", "architecture"): ("magvit2",),
}


def find_files(encoder: str, config: str) -> tuple[str, str]:
    """The checkpoint and its config, from a folder or a file; `config` may be a path, a published name, or "" (look beside)."""
    if os.path.isfile(encoder):
        checkpoint, folder = encoder, os.path.dirname(encoder) or "."
    elif os.path.isdir(encoder):
        folder = encoder
        checkpoint = os.path.join(folder, _only(folder, (".ckpt",), "checkpoint", "give the file itself as --encoder"))
    else:
        raise UserError(f"{encoder}: no such file or folder (jaxmed downloads nothing); --encoder takes BTB3D's 3rd_stage.ckpt")
    if config in PUBLISHED:
        return checkpoint, config
    if config:
        if not os.path.isfile(config):
            raise UserError(f"{config}: no such file; --encoder-config takes upstream's model config (YAML), {_KNOWN}")
        return checkpoint, config
    advice = f"pass --encoder-config with upstream's model config (YAML), {_KNOWN}"
    return checkpoint, os.path.join(folder, _only(folder, (".yaml", ".yml"), "config", advice))


def _only(folder: str, endings: tuple[str, ...], what: str, advice: str) -> str:
    found = sorted(name for name in os.listdir(folder) if name.endswith(endings))
    if len(found) != 1:
        listed = f"{len(found)} files could be the {what} ({', '.join(found)})" if found else f"no {what} (*{endings[0]}) in it"
        raise UserError(f"{folder}: {listed}; {advice}")
    return found[0]


def read_config(path: str) -> VolumeEncoderConfig:
    """A published name, or upstream's model config."""
    if path in PUBLISHED:
        return PUBLISHED[path]
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    for (section, name), allowed in _FIXED.items():
        value = _section(content, section, path).get(name, allowed[0])
        value = value.lower() if isinstance(value, str) else value
        if value not in allowed:
            where = f"{section}.{name}".lstrip(".")
            raise UserError(f"{path}: {where} is {value!r}; this encoder needs {' or '.join(map(repr, allowed))}")
    encoder, decoder = (_section(content, f"model.{name}", path) for name in ("encoder", "decoder"))
    multipliers = _list(encoder, "encoder", "channel_multipliers", int, path)
    halvings = len(_list(decoder, "decoder", "channel_multipliers", int, path))
    if halvings != len(multipliers):
        raise UserError(
            f"{path}: {len(multipliers)} encoder.channel_multipliers but {halvings} decoder.channel_multipliers; "
            "the shape of the codes is taken from the decoder's, they must be as many"
        )
    filters = _whole(decoder, "decoder", "filters", path)
    blocks = _whole(encoder, "encoder", "num_res_blocks", path)
    temporal = _list(encoder, "encoder", "temporal_downsample", bool, path)
    try:
        return VolumeEncoderConfig(filters, blocks, multipliers, temporal)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None


def check_fits(config: VolumeEncoderConfig, tensors: EncoderTensors, where: str) -> None:
    """The commonest mistake, the config of the other published encoder, in one line and not tensor by tensor."""
    steps = sum(
        name.startswith("encoder.conv_downsample_blocks.") and name.endswith(".weight") for name in tensors.source.arrays
    )
    width = tensors.source.shape("encoder.conv_first.conv.weight")[0]
    if (steps, width) != (len(config.strides), config.filters):
        raise UserError(
            f"{tensors.source.path}: the checkpoint has {width} filters and {steps} downsampling steps, {where} says "
            f"{config.filters} and {len(config.strides)}; pass the config of this checkpoint as --encoder-config"
        )


def _section(content: Any, dotted: str, path: str) -> dict[str, Any]:
    for name in ("", *(part for part in dotted.split(".") if part)):
        content = content.get(name) if name else content
        if not isinstance(content, dict):
            raise UserError(f"{path}: has no section {dotted or 'model'}; is this upstream's model config of the tokenizer?")
    return content


def _whole(section: dict[str, Any], where: str, name: str, path: str) -> int:
    value = section.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{path}: {where}.{name} is {value!r}, a whole number is needed")
    return value


def _list(section: dict[str, Any], where: str, name: str, kind: type, path: str) -> tuple[Any, ...]:
    value = section.get(name)
    if not isinstance(value, list) or not value or not all(type(item) is kind for item in value):
        words = "whole numbers" if kind is int else "true and false"
        raise UserError(f"{path}: {where}.{name} is {value!r}, a list of {words} is needed")
    return tuple(value)
