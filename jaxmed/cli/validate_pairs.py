"""What folders decide of an experiment: of contrastive pretraining, and of a tower that a run pretrained."""

import dataclasses
import os

from jaxmed.checkpoint.adapter import run_experiment
from jaxmed.checkpoint.encoder_folders import open_encoder
from jaxmed.checkpoint.folder_kinds import detect, is_own
from jaxmed.checkpoint.hf_io import read_json
from jaxmed.checkpoint.tower_config import text_encoder_config
from jaxmed.config import Experiment, TextEncoderConfig, TowerConfig, VisualConfig
from jaxmed.data.tokenizer import has_tokenizer
from jaxmed.errors import UserError


def encoders_of(experiment: Experiment, given: frozenset[str]) -> Experiment:
    """Sizes of tower and text encoder as the folders have them, the later over the earlier: `model.base`,
    `contrastive.text_folder`, `model.tower_folder`, the run of `model.adapter`."""
    model, found = experiment.model, experiment
    heads = {"vision.heads": model.tower.heads} if "model.tower.heads" in given else {}
    if model.base:
        if detect(model.base) != "m3d_clip":
            raise UserError(
                f"{model.base}: is no M3D-CLIP model; an image tower is --model.tower-folder, BERT --contrastive.text-folder"
            )
        folder = open_encoder(model.base, heads)
        found = _with_tower(_with_text(found, folder.text, folder.features), folder.tower)
    if experiment.contrastive.text_folder:
        found = _with_text(found, _bert(experiment.contrastive.text_folder), found.contrastive.features)
    if model.tower_folder and model.tower_source != "random":
        found = _with_tower(found, _tower_of(model.tower_folder, heads))
    if model.adapter:
        run = _pretrained(model.adapter)
        found = _with_tower(_with_text(found, run.contrastive.text, run.contrastive.features), run.model.tower)
    return dataclasses.replace(found, model=dataclasses.replace(found.model, tokenizer=_tokenizer(experiment)))


def _with_text(experiment: Experiment, text: TextEncoderConfig, features: int) -> Experiment:
    return dataclasses.replace(
        experiment, contrastive=dataclasses.replace(experiment.contrastive, text=text, features=features)
    )


def _with_tower(experiment: Experiment, tower: TowerConfig) -> Experiment:
    """With the class token, which is what is compared."""
    tower = dataclasses.replace(tower, select_feature="cls_patch", select_layer=-1, final_norm=True)
    model = dataclasses.replace(experiment.model, tower=tower)
    return dataclasses.replace(experiment, model=model, visual=_seen_by(tower, experiment.visual))


def _seen_by(tower: TowerConfig, visual: VisualConfig) -> VisualConfig:
    sizes = {"grid": tower.grid, "tokens": tower.tokens, "features": tower.width}
    return dataclasses.replace(visual, kind="volumes", volume=tower.image, channels=tower.channels, **sizes)


def _tower_of(folder: str, heads: dict[str, int]) -> TowerConfig:
    opened = open_encoder(folder, heads)
    if opened.tower.kind != "vit3d":
        raise UserError(f"{folder}: holds a tower of 2-D images; a contrastive model reads volumes, give a ViT3D's folder")
    return opened.tower


def _pretrained(run: str) -> Experiment:
    found = run_experiment(run) if detect(run) == "run" else None
    if found is None or found.task != "contrastive":
        raise UserError(f"{run}: is no run of contrastive pretraining (jaxmed train m3d_clip); M3D-CLIP's own is --model.base")
    return found


def _bert(folder: str) -> TextEncoderConfig:
    where = os.path.join(folder, "config.json")
    return text_encoder_config(read_json(where), where, None).config


def _tokenizer(experiment: Experiment) -> str:
    """Folder of the text encoder's tokenizer."""
    model = experiment.model
    own = os.path.join(model.adapter, "tokenizer") if model.adapter else ""
    places = [model.tokenizer, own, experiment.contrastive.text_folder, model.base]
    return next((place for place in places if place and has_tokenizer(place)), model.tokenizer)


def check_pairs(experiment: Experiment) -> None:
    """Presence of what contrastive pretraining reads; the contents are the readers' to check."""
    if not experiment.model.tokenizer:
        raise UserError(
            "no tokenizer: give --contrastive.text-folder, a BERT model's folder, or --model.tokenizer, one with vocab.txt or "
            "tokenizer.json, to start from random weights"
        )


def with_pretrained_tower(experiment: Experiment, given: frozenset[str]) -> Experiment:
    """A model's experiment whose tower comes from a folder of its own: that says the tower's sizes, and a run of contrastive
    pretraining also how volumes are prepared for it. `given`: fields that the command line sets."""
    folder, own = experiment.model.tower_folder, experiment.model.tower
    found = open_encoder(folder, {"vision.heads": own.heads} if "model.tower.heads" in given else {})
    if found.tower.kind != own.kind:
        raise UserError(
            f"{folder}: its tower is of kind {found.tower.kind}, the config's of kind {own.kind}; give another folder"
        )
    tower = dataclasses.replace(
        found.tower, select_layer=own.select_layer, select_feature=own.select_feature, final_norm=own.final_norm
    )
    asked = experiment.visual
    prepare = found.visual.prepare.for_data_of(asked.prepare) if is_own(folder) else asked.prepare
    kept = {"images": asked.images, "positions": asked.positions, "prepare": prepare}
    if asked.kind == "embeddings":  # the tower's tokens, in files
        kept |= {"kind": asked.kind, "encoder": asked.encoder}
    visual = dataclasses.replace(_seen_by(tower, found.visual), **kept)
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, tower=tower), visual=visual)
