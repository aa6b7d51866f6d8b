"""What a folder is: told from the fields of its config.json and from the names of its tensors, never from the folder's name."""

import difflib
import os
from collections.abc import Mapping
from typing import Any, Literal

from jaxmed.checkpoint.decoder_tables import EMBED
from jaxmed.checkpoint.hf_config import FAMILIES, read_config
from jaxmed.checkpoint.hf_io import open_folder, weight_files
from jaxmed.checkpoint.names import canonical_names
from jaxmed.checkpoint.projector_tables import FUSION, PROJECTOR
from jaxmed.checkpoint.tower_config import FAMILIES as TOWERS
from jaxmed.checkpoint.tower_shapes import LANDMARKS
from jaxmed.checkpoint.tower_tables import TOWER_PREFIX
from jaxmed.errors import UserError

FolderKind = Literal[
    "run", "part", "hf", "llava", "llava_hf", "llava_lora", "lamed", "samf", "peft", "mm_projector", "m3d_clip", "tower"
]

KINDS: dict[FolderKind, str] = {
    "run": "a run of jaxmed (config.json and checkpoints/)",
    "part": "a tower or a projector in jaxmed's own form (config.json with `part`, and checkpoints/)",
    "hf": "a Hugging Face language model (config.json with a model_type, and its weights)",
    "llava": "a whole LLaVA or TinyLLaVA model (config.json with mm_* fields, its weights with the projector's)",
    "llava_hf": "a LlavaForConditionalGeneration of transformers (config.json with text_config and vision_config)",
    "llava_lora": "an upstream LoRA folder (adapter_config.json, adapter_model, config.json with mm_* fields)",
    "lamed": "an M3D-LaMed model (config.json with vision_tower vit3d; merged weights or model_with_lora.bin)",
    "samf": "a SAMF model (config.json with mm_fuse_type; merged weights or model_with_lora.bin)",
    "peft": "a PEFT adapter (adapter_config.json and adapter_model)",
    "mm_projector": "a projector alone (mm_projector.bin)",
    "m3d_clip": "an M3D-CLIP model (config.json with model_type m3d_clip)",
    "tower": "an image tower alone (weights of CLIP, SigLIP, M3D's ViT3D or DINO)",
}

WHOLE: tuple[FolderKind, ...] = ("llava", "llava_hf", "lamed", "samf")
"""Folders of whole vision-language models."""

_SIDE = ("adapter_model.", "non_lora_trainables.", "mm_projector.")


def detect(path: str) -> FolderKind:
    """What a folder (or a single file) is. UserError if it is nothing that is known."""
    if os.path.isfile(path):
        return _of_file(path)
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder (jaxmed downloads nothing; give the path of a folder on this machine)")
    present = set(os.listdir(path))
    config = read_config(path) if "config.json" in present else {}
    if {"model", "visual", "train"} <= set(config):
        if "checkpoints" in present:
            return "run"
        raise UserError(f"{path}: is a run that has saved no checkpoint yet; go on with it by `jaxmed train ... --out {path}`")
    if {"part", "visual"} <= set(config) and "checkpoints" in present:
        return "part"
    if "adapter_config.json" in present:
        return "llava_lora" if any(key.startswith("mm_") for key in config) else "peft"
    nested = sorted(name for name in present if name.startswith("checkpoint-"))
    files = weight_files(path)
    if any(not name.startswith(_SIDE) for name in files):
        return _of_config(path, config) if "model_type" in config else _of_tensors(path, "config.json" in present)
    if "mm_projector.bin" in files:
        return "mm_projector"
    if nested:
        raise UserError(f"{path}: holds {', '.join(nested)} but no model of its own; give the folder of one of them")
    if "preprocessor_config.json" in present or config.get("model_type"):
        raise UserError(f"{path}: holds settings and no weights; download the rest of the folder")
    raise UserError(f"{path}: is none of {'; '.join(KINDS.values())}")


def is_run(path: str) -> bool:
    """Whether a folder is a run of jaxmed that has saved a checkpoint; "" is none."""
    return bool(path) and detect(path) == "run"


def is_own(path: str) -> bool:
    """Whether a folder holds a checkpoint of jaxmed's: a run, or a part of a model; "" is none."""
    return bool(path) and detect(path) in ("run", "part")


def detect_base(path: str) -> FolderKind | Literal[""]:
    """As `detect`, "" for a folder of settings and tokenizer alone (the base of a model whose own file is complete)."""
    return detect(path) if os.path.isdir(path) and weight_files(path) else ""


def _of_file(path: str) -> FolderKind:
    names = open_folder(path).names()
    keys = canonical_names(names, path)
    projector = [key for key in keys if key.startswith((PROJECTOR, FUSION))]
    if projector and all(key in projector or key == EMBED for key in keys):
        return "mm_projector"
    if _is_tower(names):
        return "tower"
    raise UserError(
        f"{path}: a single file is read only where it holds a projector (mm_projector.bin) or an image tower; give the folder"
    )


def _is_tower(names: list[str]) -> bool:
    """Whether tensors are those of an image tower, whatever else they hold beside a language model's."""
    keys = canonical_names(names, "the file", "tower")
    inner = {key.removeprefix(TOWER_PREFIX).removeprefix("vision_model.") for key in keys if key.startswith(TOWER_PREFIX)}
    return EMBED not in canonical_names(names, "the file") and not inner.isdisjoint(LANDMARKS)


def _of_config(path: str, config: Mapping[str, Any]) -> FolderKind:
    """A folder that holds a model's weights, by its config.json; by its tensors where the config leaves it open."""
    family = config["model_type"]
    if {"text_config", "vision_config"} <= set(config) and family == "llava":
        return "llava_hf"
    if family == "m3d_clip":
        return "m3d_clip"
    if family in TOWERS:
        return "tower"
    if family in FAMILIES or family == "llava":
        return _of_language_model(path, config)
    near = difflib.get_close_matches(str(family), [*FAMILIES, *TOWERS, "llava"], n=1, cutoff=0.0)[0]
    raise UserError(
        f"{path}: model_type {family!r} is not supported (the nearest that is: {near}); a folder may be "
        f"{'; '.join(KINDS.values())}"
    )


def _of_language_model(path: str, config: Mapping[str, Any]) -> FolderKind:
    """A language model, with an image side or without."""
    family = config["model_type"]
    keys = canonical_names(open_folder(path).names(), path)
    projects, fuses = (any(key.startswith(prefix) for key in keys) for prefix in (PROJECTOR, FUSION))
    says = any(name.startswith("mm_") for name in config)
    if "mm_fuse_type" in config or fuses:
        return "samf"
    if config.get("vision_tower") == "vit3d" or family.startswith("lamed_"):
        return "lamed"
    if projects and says:
        return "llava"
    if projects:
        raise UserError(f"{path}: the weights hold a projector, config.json has no mm_* fields; copy the model's own one")
    if says and config.get("mm_projector_type") != "identity":
        raise UserError(
            f"{path}: config.json speaks of an image side (mm_projector_type {config.get('mm_projector_type')!r}), but no "
            f"tensor {PROJECTOR}... is there; download the rest of the folder"
        )
    if family == "llava_phi3":
        raise UserError(f"{path}: model_type llava_phi3 is supported as SAMF's alone, and there is no fusion in it")
    return "llava" if says else "hf"


def _of_tensors(path: str, has_config: bool) -> FolderKind:
    """A folder whose config.json is not there or says nothing: what upstream's training writes, or a tower's weights."""
    names = open_folder(path).names()
    keys = canonical_names(names, path)
    if EMBED in keys and any(key.startswith(FUSION) for key in keys):
        return "samf"
    if EMBED in keys and any(key.startswith(f"{TOWER_PREFIX}patch_embedding.") for key in keys):
        return "lamed"
    if _is_tower(names):
        return "tower"
    what = "config.json has no model_type" if has_config else "there is no config.json"
    raise UserError(f"{path}: {what}, and the tensors are no image tower's; copy the model's config.json there")
