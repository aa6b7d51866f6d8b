"""Opens any folder (or file) that holds a part of a model, whoever wrote it."""

from collections.abc import Mapping
from typing import Any

from jaxmed.checkpoint.adapter import run_experiment
from jaxmed.checkpoint.encoder_folders import open_encoder
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.part_folders import PartFolder, read_part_config
from jaxmed.checkpoint.projector_folders import open_projector


def part_of_model(path: str) -> str:
    """`tower`, `m3d_clip` or `projector`; "" for anything else. UserError for what is nothing that is known."""
    kind = detect(path)
    if kind == "part":
        return read_part_config(path).part
    if kind == "run":
        return "m3d_clip" if run_experiment(path).task == "contrastive" else ""
    return {"tower": "tower", "m3d_clip": "m3d_clip", "mm_projector": "projector"}.get(kind, "")


def open_part(path: str, overrides: Mapping[str, Any]) -> PartFolder:
    """`overrides`: what no file stores (`--set`)."""
    return open_projector(path, overrides) if part_of_model(path) == "projector" else open_encoder(path, overrides)
