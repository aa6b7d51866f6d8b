"""Every folder that a model's weights come from, in the order in which one overlays another.

An image tower's own folder, the base (a language model, or a whole vision-language model), and the upstream folder at the root
of `model.adapter`. Which parameters they fill is told part by part from their tensors: a part that is there must be complete.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxmed.checkpoint.adapter import held_by_runs, upstream_folder
from jaxmed.checkpoint.folder_kinds import is_own
from jaxmed.checkpoint.hf_io import TensorFolder, base_fingerprint, open_folder, sample
from jaxmed.checkpoint.hf_tables import Row, experiment_rows
from jaxmed.checkpoint.manager import FOLDER, newest, read_meta
from jaxmed.checkpoint.names import canonical_names
from jaxmed.checkpoint.tower_tables import surplus_reason
from jaxmed.config import Experiment, ModelConfig
from jaxmed.errors import UserError

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class WeightSources:
    rows: list[Row]
    """Of the whole model"""
    folders: list[TensorFolder]
    """The later over the earlier"""
    parts: frozenset[str]
    """Parts of the model (see `part_of`) that the folders hold"""
    surplus: Callable[[str], str]
    """Why a tensor (canonical name) that no row names is not needed; "" if nothing here knows it"""

    def covers(self, path: Path) -> bool:
        """Whether the folders must fill the parameter."""
        return part_of(path) in self.parts

    def names(self, folder: TensorFolder) -> dict[str, str]:
        """Canonical name -> the name in the file."""
        return canonical_names(folder.names(), folder.path, folder.role)


def part_of(path: Path) -> str:
    """`lora`, `decoder`, `tower`, `projector`, ...: what a folder holds whole or not at all."""
    if path[:2] == ("aggregator", "positions"):  # may be added to a model that was trained without
        return "slice positions"
    return "lora" if path[-1] in ("lora_a", "lora_b") else str(path[0])


def weight_sources(experiment: Experiment) -> WeightSources:
    """Opens the folders by their headers; no value is read. UserError where a folder lacks what it should hold."""
    model = experiment.model
    rows = experiment_rows(experiment)
    folders = [open_folder(model.base)] if model.base else []
    if model.tower_folder and experiment.has_tower and not is_own(model.tower_folder):
        tower = replace(open_folder(model.tower_folder), role="tower")
        folders = [*folders, tower] if model.tower_source == "folder" else [tower, *folders]
    adapter = upstream_folder(experiment)
    folders += [adapter] if adapter else []
    found = {name for folder in folders for name in canonical_names(folder.names(), folder.path, folder.role)}
    parts = {part_of(row.ours) for row in rows if row.ours and found & set(row.names())}
    parts |= {"decoder"} if model.base else set()
    if experiment.has_tower and "tower" not in parts and not _tower_elsewhere(experiment):
        raise UserError(_no_tower(experiment, folders))
    return WeightSources(rows, folders, frozenset(parts), lambda name: surplus_reason(name, model.tower))


def _tower_elsewhere(experiment: Experiment) -> bool:
    """Whether a run holds the tower, or it shall start at random."""
    if experiment.train.train_tower and experiment.model.tower_source == "random":
        return True
    return any(name.startswith("tower/") for name in held_by_runs(experiment))


def _no_tower(experiment: Experiment, folders: Sequence[TensorFolder]) -> str:
    places = " and ".join(folder.path for folder in folders) or "model.base"
    named = os.path.basename(experiment.model.tower_folder.rstrip("/"))
    hint = f" ({named})" if named else ""
    return (
        f"{places}: the image tower's weights are not there; give the tower's folder{hint} with --tower (to train it from "
        "scratch: --model.tower-source random --train.train-tower)"
    )


def weights_identity(model: ModelConfig) -> str:
    """Fingerprint of the folders with the frozen weights; "" where there are none. A run is loaded with the same ones."""
    base = base_fingerprint(model.base) if model.base else ""
    if not model.tower_folder:
        return base
    tower = run_fingerprint(model.tower_folder) if is_own(model.tower_folder) else base_fingerprint(model.tower_folder)
    return hashlib.sha256(f"{base} {tower}".encode()).hexdigest()


def run_fingerprint(run: str) -> str:
    """The same of a folder of ours: metadata of its newest checkpoint, sizes of the files, a few bytes from all over each."""
    step = newest(run)
    digest = hashlib.sha256(json.dumps(read_meta(os.path.join(run, FOLDER), step), sort_keys=True).encode())
    root = os.path.join(run, FOLDER, str(step), "trainable")
    for path in sorted(os.path.join(above, name) for above, _, names in os.walk(root) for name in names):
        digest.update(f"{os.path.relpath(path, root)}\0{os.path.getsize(path)}\0".encode())
        sample(path, digest)
    return digest.hexdigest()
