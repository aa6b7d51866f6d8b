"""A trained model in three lines, for notebooks and scripts; the commands call the same functions.

    model = jaxmed.load("runs/btb3d")                                  # or an upstream folder, with base=... where it needs one
    answers = model.generate(["scan.nii_embedded.npz"], ["<image>\\nWrite the report."])
    print(answers[0].text)

    model.reports(["scan.nii.gz"])[0]["chest"].text                      # a report of each region, the volume read in once
    model.answer(["scan.nii.gz"], ["Which phase?"], [{"A": "arterial", "B": "venous"}])[0].probabilities

See jaxmed.text_model and jaxmed.vlm_model for all that a vision-language model does, jaxmed.encoders for towers and
contrastive models.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from jaxmed.checkpoint import manager
from jaxmed.checkpoint.adapter import run_experiment
from jaxmed.checkpoint.folder_kinds import detect
from jaxmed.checkpoint.multimodal_folders import resolve_folder
from jaxmed.checkpoint.open_part import part_of_model
from jaxmed.checkpoint.sources import weights_identity
from jaxmed.config import Experiment, replace_field
from jaxmed.distributed import say
from jaxmed.encoders import ContrastiveModel, TowerModel, encoder_model
from jaxmed.errors import UserError
from jaxmed.generate.encode_tower import SIGNED, seen_as_trained
from jaxmed.generate.tower import reads_tower_tokens
from jaxmed.text_model import Choice, Generation
from jaxmed.vlm_model import Model, Result

__all__ = ["Choice", "ContrastiveModel", "Generation", "Model", "Result", "TowerModel", "load", "resolve"]


def load(
    folder: str,
    base: str | None = None,
    tower: str | None = None,
    mesh: Mesh | None = None,
    dtype: str = "bfloat16",
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """A model from any folder that `jaxmed convert` reads: a Model; a ContrastiveModel for M3D-CLIP, a TowerModel for a tower.

    base: the language model's folder, where `folder` holds an adapter alone and does not find it by itself.
    tower: the image tower's folder, for models that have one apart. A run that was trained on the tokens of that tower reads
        volumes with it (token files still, with overrides={"visual.kind": "embeddings"}).
    mesh: None: every device of this process on the data axis. Over several processes, all of them call the model together.
    overrides: config fields that no file stores or that shall differ, such as {"lora.alpha": 15, "vision.heads": 3}.
    Nothing is read from the network. Raises UserError for a folder that cannot be used.
    """
    path = os.fspath(folder)
    if part_of_model(path) in ("m3d_clip", "tower"):
        return encoder_model(path, mesh, dtype, dict(overrides or {}))
    return Model(resolve(path, os.fspath(base or ""), dtype, overrides or {}, os.fspath(tower or "")), mesh)


def resolve(folder: str, base: str, dtype: str, overrides: Mapping[str, Any], tower: str = "") -> Experiment:
    """The experiment that a folder describes, its weights named by `model.base`, `model.tower_folder` and `model.adapter`.

    What no file says and a published default stands for is told on stderr.
    """
    kind = detect(folder)
    if kind == "run":
        found, notices = _of_run(folder, base, tower), []
    else:
        found, notices = resolve_folder(kind, folder, base, tower, overrides)
    for notice in notices:
        say(notice)
    found = replace_field(found, "model.dtype", dtype)
    for name, value in overrides.items():
        found = replace_field(found, name, value)
    if kind == "run" and found.has_tower and found.visual.encoder:
        prepared = any(name.startswith(tuple(f"visual.prepare.{field}" for field in SIGNED)) for name in overrides)
        found = seen_as_trained(found, folder, prepared)
    return found


def _of_run(folder: str, base: str, tower: str) -> Experiment:
    """A run's own config, its newest checkpoint as the adapter, base and tower where they are now. One that was trained on the
    tokens of a tower, and gets that tower, reads volumes."""
    found = run_experiment(folder)
    if found.task == "contrastive":
        raise UserError(
            f"{folder}: is a run that trained encoders, no language model; jaxmed.load opens it, --tower takes its tower"
        )
    meta = manager.read_meta(os.path.join(folder, manager.FOLDER), manager.newest(folder))
    places = {"base": base or found.model.base, "tower_folder": tower or found.model.tower_folder}
    for name, place in places.items():
        if place and not os.path.isdir(place):
            what, flag = ("base model", "base (--base)") if name == "base" else ("image tower", "tower (--tower)")
            raise UserError(f"{folder}: its {what} {place!r} is not on this machine; give its folder as {flag}")
    model = dataclasses.replace(found.model, adapter=folder, tokenizer=os.path.join(folder, "tokenizer"), **places)
    to_volumes = bool(tower) and reads_tower_tokens(folder)
    # the frozen weights of training; its config need not have named the tower, which files stood for
    trained_with = dataclasses.replace(model, tower_folder=model.tower_folder if found.model.tower_folder else "")
    if weights_identity(trained_with if to_volumes else model) != meta["base_fingerprint"]:
        given = " and ".join(place for place in places.values() if place)
        raise UserError(
            f"{folder}: was trained on other weights than those of {given}; give the right folders as base and tower "
            "(--base, --tower)"
        )
    visual = dataclasses.replace(found.visual, encoder=found.visual.encoder or meta["encoder"])
    train = found.train
    if to_volumes:
        visual, train = dataclasses.replace(visual, kind=model.tower.reads), dataclasses.replace(train, train_tower=False)
        model = dataclasses.replace(model, tower_source="folder")
        if not visual.encoder:
            say(f"{folder}: its token files were not signed, so nothing shows whether the tower in {tower} wrote them")
    return dataclasses.replace(found, model=model, visual=visual, train=train)
