"""`model.adapter`: a folder whose weights a run goes on from, whoever wrote it.

An upstream folder (LoRA, projector, perhaps the embedding table) is one more source of tensors beside the base
(`jaxmed.checkpoint.sources`). A run of ours
is overlaid from its newest checkpoint; what that leaves out comes from the adapter which the run itself went on from.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from jaxmed.checkpoint import manager
from jaxmed.checkpoint.decoder_tables import EMBED
from jaxmed.checkpoint.folders import detect
from jaxmed.checkpoint.hf_io import TensorFolder, open_folder
from jaxmed.checkpoint.names import canonical_names
from jaxmed.checkpoint.projector_tables import PROJECTOR
from jaxmed.config import Experiment, from_dict
from jaxmed.errors import UserError

Path = tuple[str | int, ...]


def run_experiment(run: str) -> Experiment:
    """The resolved config of a run."""
    path = os.path.join(run, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            return from_dict(Experiment, json.load(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as the config of a run ({error})") from error


def upstream_folder(experiment: Experiment) -> TensorFolder | None:
    """The upstream folder at the root of `model.adapter`; what it must hold is checked."""
    folder = next((f for f in chain(experiment.model.adapter) if detect(f) != "run"), "")
    if not folder:
        return None
    tensors = open_folder(folder)
    names = canonical_names(tensors.names(), folder)
    has_lora = any(".lora_A." in name for name in names)
    has_projector = any(name.startswith(PROJECTOR) for name in names)
    kind = detect(folder)
    if not has_lora and kind in ("llava_lora", "peft"):
        raise UserError(f"{folder}: holds no LoRA weights; put its adapter_model.safetensors (or .bin) back there")
    if not has_projector and kind == "llava_lora" and experiment.visual.kind != "none":
        raise UserError(f"{folder}: holds no projector; put its non_lora_trainables.bin back there")
    if has_lora and not experiment.lora.rank:
        raise UserError(f"{folder}: holds LoRA weights and lora.rank is 0; leave --lora.rank out, and the folder decides")
    return tensors


def chain(adapter: str) -> Iterator[str]:
    """The adapter, then the one it went on from, and so on. Ends where nothing older can matter."""
    while adapter:
        yield adapter
        if detect(adapter) != "run":
            return
        experiment = run_experiment(adapter)
        older = experiment.model.adapter
        adapter = older if older and _needs(adapter, experiment, older) else ""


def _needs(run: str, experiment: Experiment, older: str) -> bool:
    """Whether a run's checkpoint leaves out anything that it took from the adapter before it."""
    trained = experiment.train
    if trained.trainable == "all":
        return False
    if trained.trainable == "projector":
        return experiment.lora.rank > 0 or bool(experiment.model.added_tokens)
    if detect(older) == "run":
        before = manager.trainable_shapes(older, manager.newest(older))
        return not before.keys() <= manager.trainable_shapes(run, manager.newest(run)).keys()
    return not trained.train_embed_tokens and EMBED in canonical_names(open_folder(older).names(), older)


def overlay_runs(experiment: Experiment, values: dict[Path, Any], complete: bool) -> dict[Path, Any]:
    """`values` with what the runs of `model.adapter` trained laid over them, the newest last.

    `complete`: `values` are a whole model; whatever a run holds must then have a place in it.
    """
    runs = [folder for folder in chain(experiment.model.adapter) if detect(folder) == "run"]
    for run in reversed(runs):
        values = values | _from_run(run, values, complete)
    return values


def _from_run(run: str, values: Mapping[Path, Any], complete: bool) -> dict[Path, Any]:
    """Arrays of a run's newest checkpoint for the paths of `values`, in their dtypes and shardings."""
    step = manager.newest(run)
    saved = manager.trainable_shapes(run, step)
    names = {"/".join(str(part) for part in path): path for path in values}
    lost = sorted(saved.keys() - names.keys()) if complete else []
    if lost:
        raise UserError(
            f"{run}: holds {', '.join(lost[:3])}, for which this model has no place; leave the run its own settings"
        )
    for name in sorted(saved.keys() & names.keys()):
        if saved[name] != tuple(values[names[name]].shape):
            raise UserError(f"{run}: {name} has shape {saved[name]}, this model needs {tuple(values[names[name]].shape)}")
    wanted = {name: values[path] for name, path in names.items() if name in saved}
    found = manager.restore_part(run, step, wanted) if wanted else {}
    return {names[name]: array for name, array in found.items()}
