"""What `view` and `encode` are told of a model: a shipped config, a Python file or a folder, and fields of it as flags."""

import os
from dataclasses import dataclass, replace

from jaxmed.cli import common
from jaxmed.config import SHORT_NAMES, EncodeConfig, Experiment, VisualConfig, replace_field
from jaxmed.data.hounsfield import Override
from jaxmed.errors import UserError

FIELDS = ("visual", "encode")


@dataclass(frozen=True)
class Fields:
    """Of the config, as `jaxmed train` takes them."""

    visual: VisualConfig
    encode: EncodeConfig


@dataclass(frozen=True)
class Configured:
    name: str
    """How the person named it"""
    experiment: Experiment
    encoder_alone: bool = False
    """A folder of encoders: of the experiment only the tower and its input mean anything"""

    @property
    def has_tower(self) -> bool:
        return self.experiment.model.tower.kind != "none"

    def with_hounsfield(self, metadata: str, hu: Override) -> "Configured":
        visual = with_hounsfield(self.experiment.visual, metadata, hu)
        return replace(self, experiment=replace(self.experiment, visual=visual))

    @property
    def tower_visual(self) -> VisualConfig:
        """What the tower reads, also where the config takes its tokens from files."""
        return replace(self.experiment.visual, kind=self.experiment.model.tower.reads)


def with_hounsfield(visual: VisualConfig, metadata: str, hu: Override) -> VisualConfig:
    """--metadata and --hu over what the preparation for a tower says ("" and auto: as it is)."""
    prepare = visual.prepare
    prepare = replace(prepare, metadata=metadata or prepare.metadata, hu=prepare.hu if hu == "auto" else hu)
    return replace(visual, prepare=prepare)


def split_fields(argv: list[str]) -> tuple[list[str], list[str]]:
    """(flags such as --visual.grid 2 3 4, the others)"""
    fields: list[str] = []
    others: list[str] = []
    place = others
    for argument in argv:
        if argument.startswith("--"):
            head = argument[2:].partition(".")[0].removeprefix("no-")
            place = fields if "." in argument and head in FIELDS else others
        place.append(argument)
    return fields, others


def configured(name: str, base: str, tower: str, overrides: dict[str, str], fields: list[str], command: str) -> Configured:
    """`fields`: flags of `split_fields`. No weight is read."""
    found = (_of_folder if os.path.isdir(name) else _of_config)(name, base, tower, overrides)
    if not fields:
        return found
    default = Fields(found.experiment.visual, found.experiment.encode)
    given = common.parse(Fields, fields, prog=f"jaxmed {command}", description="", default=default)
    return replace(found, experiment=replace(found.experiment, visual=given.visual, encode=given.encode))


def _of_config(name: str, base: str, tower: str, overrides: dict[str, str]) -> Configured:
    experiment = common.load_experiment(name)
    for key, value in overrides.items():
        experiment = replace_field(experiment, key, value)
    folders = {"base": base or experiment.model.base, "tower_folder": tower or experiment.model.tower_folder}
    experiment = replace(experiment, model=replace(experiment.model, **folders))
    if experiment.model.tower.kind == "none":
        return Configured(name, experiment)
    return Configured(name, _sized(experiment, frozenset(SHORT_NAMES.get(key, key) for key in overrides)))


def _sized(experiment: Experiment, given: frozenset[str]) -> Experiment:
    """The tower's sizes, and what it reads, as its folder has them, as in training. `given`: fields that --set sets."""
    model = experiment.model
    # JAX takes a second to import, and configs alone do without.
    if model.base:
        from jaxmed.checkpoint.folder_kinds import WHOLE, detect_base

        if detect_base(model.base) in WHOLE:
            raise UserError(f"{model.base}: is a whole model, with a tower of its own; give it in the config's place")
    if not model.tower_folder:
        return experiment
    from jaxmed.cli.validate_pairs import with_pretrained_tower

    # nothing is changed at random here, and what may be turned in training depends on the sizes
    visual = replace(experiment.visual, prepare=replace(experiment.visual.prepare, augment="none"))
    return with_pretrained_tower(replace(experiment, visual=visual), given)


def _of_folder(name: str, base: str, tower: str, overrides: dict[str, str]) -> Configured:
    """A folder of an encoder, a whole model or a run."""
    # JAX takes a second to import, and configs by name do without.
    from jaxmed import api
    from jaxmed.generate import tower as towers

    if towers.is_encoder(name):
        if tower or base:
            raise UserError(f"{name}: holds an encoder itself; leave {'--tower' if tower else '--base'} out")
        return Configured(name, towers.of_encoder(name, overrides), encoder_alone=True)
    if not (base or tower or overrides) and towers.holds_its_tower(name):
        return Configured(name, towers.of_run(name))
    if towers.reads_tower_tokens(name):
        experiment = towers.of_run(name)
        known = tower or experiment.model.tower_folder
        return Configured(name, replace(experiment, model=replace(experiment.model, tower_folder=known)))
    return Configured(name, api.resolve(name, base, "float32", overrides, tower))
