"""Canonical names of tensors: every spelling that upstream's files have, brought to the one that the conversion table uses.

Canonical are the names of a LLaVA model: the decoder's as in a plain language model (`model.layers.3.self_attn.q_proj.weight`),
`model.mm_projector.` before a projector's, `model.mm_fusion.` before a fusion's, `model.vision_tower.vision_tower.` before a
tower's, and there `vision_model.` before CLIP's and SigLIP's. `PEFT_PREFIX` before a canonical name is PEFT's spelling.

Spellings of files:
- PEFT: `base_model.model.` before all; `.base_layer.`, `.default.` and `.modules_to_save.` within.
- transformers' Llava: `language_model.model.`, `language_model.lm_head.`, `multi_modal_projector.linear_{1,2}.` and
  `vision_tower.`; since version 5 also `model.language_model.`, `lm_head.`, `model.multi_modal_projector.linear_{1,2}.` and
  `model.vision_tower.`, the tower with or without its `vision_model.`.
- A tower alone: `vision_model.`, nothing at all (transformers 5, DINO, ViT3D), M3D-CLIP's `vision_encoder.`, and `module.` or
  `backbone.` before them.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from jaxmed.checkpoint.projector_tables import FUSION, PROJECTOR
from jaxmed.checkpoint.tower_tables import TOWER_PREFIX
from jaxmed.errors import UserError

Role = Literal["model", "tower"]

PEFT_PREFIX = "base_model.model."

# Tensors that need no place, by the end of their names ...
IGNORED = {
    ".rotary_emb.inv_freq": "rope's frequencies; computed from the config",
    ".embeddings.position_ids": "0, 1, 2, ...; no weights",
    ".original_module.weight": "as it was before training; PEFT keeps the trained copy beside it",
}
# ... and by their beginning.
BESIDE = "beside_the_tower."
IGNORED_PREFIXES = {
    BESIDE: "no part of the image tower, for which alone the folder is read",
    "model.seg_module.": "M3D's segmentation, which is not computed here",
    "model.seg_projector.": "M3D's segmentation, which is not computed here",
}

# What the tensors of a transformers CLIP or SigLIP tower begin with, after `vision_model.` or without it.
_HF_TOWER = ("embeddings.", "encoder.layers.", "pre_layrnorm.", "post_layernorm.", "head.")
# What stands beside the tower in a contrastive model.
_CONTRASTIVE = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "logit_bias",
    "language_encoder.",
    "mm_vision_proj.",
    "mm_language_proj.",
)
_MODEL_PREFIXES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "multi_modal_projector.linear_1.": f"{PROJECTOR}0.",
    "multi_modal_projector.linear_2.": f"{PROJECTOR}2.",
    "model.multi_modal_projector.linear_1.": f"{PROJECTOR}0.",
    "model.multi_modal_projector.linear_2.": f"{PROJECTOR}2.",
    "mm_projector.": PROJECTOR,
    "mm_fusion.": FUSION,
}
_PEFT_INSIDE = re.compile(r"\.base_layer(?=\.)|(?<=\.lora_[AB])\.default(?=\.)|\.modules_to_save(\.default)?(?=\.)")
_VISION_TOWER = re.compile(r"(model\.)?vision_tower\.(vision_tower\.)?")


def canonical_names(names: Iterable[str], where: str, role: Role = "model") -> dict[str, str]:
    """Canonical name -> the name in the file.

    `role` "tower": the folder is read for its image tower alone, whatever else it holds; the rest gets names under `BESIDE`.
    """
    names = list(names)
    plain = _without_peft(names)
    keys = _tower_alone(plain) if role == "tower" else _of_model(plain)
    found: dict[str, str] = {}
    for name, key in zip(names, keys, strict=True):
        if key in found:
            raise UserError(f"{where}: {found[key]} and {name} are the same tensor; remove the stale file")
        found[key] = name
    return found


def ignored_reason(name: str) -> str:
    """Why a tensor of theirs (canonical name) needs no place, whatever the model; "" if it does."""
    reasons = [reason for end, reason in IGNORED.items() if name.endswith(end)]
    reasons += [reason for start, reason in IGNORED_PREFIXES.items() if name.startswith(start)]
    return next(iter(reasons), "")


def _without_peft(names: Sequence[str]) -> list[str]:
    """PEFT puts `base_model.` before a name; if then any starts with `model.model.`, one `model.` goes from all."""
    short = [name.removeprefix("base_model.") for name in names]
    if any(name.startswith(("model.model.", "model.language_model.model.")) for name in short):
        short = [name.removeprefix("model.") for name in short]
    return [_PEFT_INSIDE.sub("", name) for name in short]


def _of_model(names: Sequence[str]) -> list[str]:
    bare = any(_VISION_TOWER.sub("", name, count=1).startswith("embeddings.") for name in names if _VISION_TOWER.match(name))
    return [_model_name(name, bare) for name in names]


def _model_name(name: str, bare: bool) -> str:
    """`bare`: the tower is one of transformers', without its `vision_model.`."""
    if tower := _VISION_TOWER.match(name):
        return TOWER_PREFIX + _with_vision_model(name[tower.end() :], bare)
    theirs = next((prefix for prefix in _MODEL_PREFIXES if name.startswith(prefix)), "")
    return _MODEL_PREFIXES[theirs] + name.removeprefix(theirs) if theirs else name


def _with_vision_model(name: str, bare: bool) -> str:
    return f"vision_model.{name}" if bare and name.startswith(_HF_TOWER) else name


def _tower_alone(names: Sequence[str]) -> list[str]:
    """The names of a folder of which the tower alone is wanted: a tower's own, a contrastive model's, or a whole model's."""
    if any(_VISION_TOWER.match(name) for name in names):
        return [name if name.startswith(TOWER_PREFIX) else BESIDE + name for name in _of_model(names)]
    short = [name.removeprefix("module.").removeprefix("backbone.") for name in names]
    bare = any(name.startswith("embeddings.") for name in short)
    dino = any(name.startswith("patch_embed.") for name in short)
    beside = (*_CONTRASTIVE, "head.") if dino else _CONTRASTIVE  # DINO's is the projection head of its training
    keys = []
    for name in short:
        if name.startswith(beside):
            keys.append(BESIDE + name)
        else:
            keys.append(TOWER_PREFIX + _with_vision_model(name.removeprefix("vision_encoder."), bare))
    return keys
