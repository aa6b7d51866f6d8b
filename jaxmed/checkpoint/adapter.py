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
from jaxmed.checkpoint.folder_kinds import WHOLE, detect, detect_base, is_own
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
    folder = next((f for f in chain(experiment.model.adapter) if not is_own(f)), "")
    if not folder:
        return None
    tensors = open_folder(folder)
    names = canonical_names(tensors.names(), folder)
    has_lora = any(".lora_A." in name for name in names)
    has_projector = any(name.startswith(PROJECTOR) for name in names)
    kind = detect(folder)
    if not has_lora and kind in ("llava_lora", "peft"):
        raise UserError(f"{folder}: holds no LoRA weights; put its adapter_model.safetensors (or .bin) back there")
    projects = experiment.visual.kind != "none" and experiment.model.projector.kind != "identity"
    if projects and not has_projector and kind == "llava_lora":
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
    if trained.trainable == "all" and (trained.train_tower or not experiment.has_tower):
        return False
    if is_own(older):
        return not _shapes(older).keys() <= _shapes(run).keys()
    if trained.trainable == "all":
        return False
    if trained.trainable == "projector":
        return experiment.lora.rank > 0 or bool(experiment.model.added_tokens)
    return not trained.train_embed_tokens and EMBED in canonical_names(open_folder(older).names(), older)


def _shapes(run: str) -> dict[str, tuple[int, ...]]:
    """{path as text: shape} of what a run's newest checkpoint holds."""
    return manager.trainable_shapes(run, manager.newest(run))


def runs_of(experiment: Experiment) -> list[str]:
    """The folders of our own form among those of `model.adapter`, the newest first: runs, a projector alone."""
    return [folder for folder in chain(experiment.model.adapter) if is_own(folder)]


def tower_run(experiment: Experiment) -> str:
    """The folder of ours that the image tower comes from: a run of contrastive pretraining, a tower alone; "" for none."""
    model = experiment.model
    if not experiment.has_tower or model.tower_source == "random" or not is_own(model.tower_folder):
        return ""
    # a whole vision-language model holds a tower of its own
    own = model.tower_source == "checkpoint" and model.base and detect_base(model.base) in WHOLE
    return "" if own else model.tower_folder


def held_by_runs(experiment: Experiment) -> set[str]:
    """Paths, as texts, of the parameters that come from a run: no folder need hold them, nothing need draw them."""
    held = {name for run in runs_of(experiment) for name in _shapes(run)}
    run = tower_run(experiment)
    return held | ({name for name in _shapes(run) if name.startswith("tower/")} if run else set())


def overlay_runs(experiment: Experiment, values: dict[Path, Any], complete: bool) -> dict[Path, Any]:
    """`values` with what the runs of `model.adapter` hold in place of theirs; those may be jax.ShapeDtypeStructs.

    `complete`: `values` are a whole model; whatever a run holds must then have a place in it.
    """
    found: dict[Path, Any] = {}
    for run in runs_of(experiment):
        if complete:
            _check_places(run, values, experiment)
        found |= _from_run(run, {path: value for path, value in values.items() if path not in found})
    if run := tower_run(experiment):
        found |= _from_run(run, {path: value for path, value in values.items() if path[0] == "tower" and path not in found})
    return values | found


def _check_places(run: str, values: Mapping[Path, Any], experiment: Experiment) -> None:
    """A tower that the run trained has no place where files hold its tokens, and needs none."""
    unneeded = () if experiment.has_tower else ("tower/",)
    lost = sorted(name for name in _shapes(run).keys() - {text(path) for path in values} if not name.startswith(unneeded))
    if lost:
        raise UserError(
            f"{run}: holds {', '.join(lost[:3])}, for which this model has no place; leave the run its own settings"
        )


def text(path: Path) -> str:
    """A path as checkpoints name it."""
    return "/".join(str(part) for part in path)


def _from_run(run: str, values: Mapping[Path, Any]) -> dict[Path, Any]:
    """Arrays of a run's newest checkpoint for the paths of `values`, in their dtypes and shardings."""
    saved, names = _shapes(run), {text(path): path for path in values}
    for name in sorted(saved.keys() & names.keys()):
        if saved[name] != tuple(values[names[name]].shape):
            raise UserError(f"{run}: {name} has shape {saved[name]}, this model needs {tuple(values[names[name]].shape)}")
    wanted = {name: values[path] for name, path in names.items() if name in saved}
    found = manager.restore_part(run, manager.newest(run), wanted) if wanted else {}
    return {names[name]: array for name, array in found.items()}
