"""`jaxmed encode CONFIG --volumes DIR --out DIR [--encoder CKPT | --tower DIR]`: CT volumes to token files.

With the config's weight-free Haar encoder, with BTB3D's learned one, or with the 3-D tower of a config that has one.
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jaxmed.cli import common
from jaxmed.cli.configured import Configured, configured, split_fields
from jaxmed.config import EncodeConfig, Experiment
from jaxmed.data import haar
from jaxmed.data.embeddings import CODE_BITS
from jaxmed.data.encode import EncodeSummary, encode_folder
from jaxmed.data.volumes import Override
from jaxmed.data.windows import token_shape
from jaxmed.errors import UserError

HELP = "Turn CT volumes into token files: with BTB3D's learned encoder, a weight-free 3-D Haar encoder, or a 3-D tower"

DESCRIPTION = """Turn CT volumes into token files. A config without an image tower: with BTB3D's learned encoder (--encoder), or
a weight-free 3-D Haar encoder. A config or a folder with a tower over volumes (vit3d): its patch tokens, so that training with
that tower frozen need not run it; prepared as the config's visual.prepare says (its fields are flags here too, such as
--visual.prepare.window -160 240). What is written is left alone when the command is given again."""
TOWER_FLAGS, LEARNED_FLAGS = ("tower", "base", "store", "set"), ("encoder_config", "batch", "dtype", "codes", "continuous")


@dataclass(frozen=True)
class Args:
    config: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CONFIG")]]
    """A shipped config by name, or the path of a Python file; with a tower also the folder of a run, a model or a tower"""
    volumes: str
    """Folder of .nii or .nii.gz files, with any subfolders; a tower takes .npy and folders of DICOM or image slices too"""
    out: str
    """Folder for the token files; files that are there already are left alone"""
    metadata: str = ""
    """CT-RATE's metadata CSV: spacing (not for a tower) and rescale by VolumeName. "": the files' own headers"""
    hu: Override = "auto"
    """What makes stored numbers Hounsfield units: the header's scaling, the header's and then the CSV's, or nothing.
    `auto`: of header and csv the one reading that has air; a volume where none or both have is refused.
    Of a tower's presets only hu_window depends on it"""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A volume that cannot be used: stop, or go on without it and list it in OUT/skipped.jsonl"""
    processes: Annotated[int, tyro.conf.arg(help_behavior_hint="(default: one a core)")] = 0
    """Volumes encoded (with --encoder or a tower: prepared, 4 at most by default) at once, each in memory"""
    encoder: str = ""
    """BTB3D's tokenizer checkpoint (3rd_stage.ckpt), or the folder that holds it. "": the weight-free Haar encoder"""
    encoder_config: str = ""
    """Upstream's model config (YAML) of that checkpoint, or 16x16x8 or 8x8x8 for the published sizes. "": the YAML beside it"""
    batch: Annotated[int, tyro.conf.arg(help_behavior_hint="(default: 1 on CPU; else 6, of a tower 8)")] = 0
    """Windows (of a tower: volumes) at once on each device; a volume of 241 slices has 30 windows, each takes 0.8 GB"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; upstream's is bfloat16, where some 0.5% of the learned encoder's signs fall differently"""
    codes: bool = False
    """Write codes packed into uint32 (18 times smaller) in place of +1 and -1 as float32"""
    continuous: bool = False
    """Write the encoder's output before the sign is taken"""
    tower: str = ""
    """Folder of the tower's weights, where the config does not hold them"""
    base: str = ""
    """Folder of the language model, where CONFIG is an adapter that does not find it by itself"""
    store: Literal["float32", "float16"] = "float32"
    """How a tower's tokens are stored: as they are, or in half the space and rounded to 3 digits"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE for what no file stores, such as vision.heads=12"""


def check_grid(experiment: Experiment) -> None:
    """Whether training with this config could read the files: better said before the encoding than after."""
    if experiment.visual.kind == "codes":
        raise UserError("visual.kind is codes, which this encoder does not write; set visual.kind to embeddings")
    _check_shape(experiment, haar.token_shape(experiment.encode), "encode.bands gives", "encode.canvas and encode.levels give")


def _check_shape(experiment: Experiment, shape: tuple[int, int, int, int], gives: str, give: str) -> None:
    features, *grid = shape
    visual = experiment.visual
    if visual.kind == "none":
        return
    if features != visual.file_features:
        raise UserError(
            f"{gives} {features} features a token, visual.features {visual.features} with visual.merge "
            f"{visual.merge} takes {visual.file_features}; make them agree"
        )
    merged = tuple(n // m for n, m in zip(grid, visual.merge, strict=True))
    if any(n % m for n, m in zip(grid, visual.merge, strict=True)) or merged != tuple(visual.grid):
        raise UserError(
            f"{give} a token grid {tuple(grid)}, which visual.merge {visual.merge} does not "
            f"turn into visual.grid {tuple(visual.grid)}; make them agree"
        )


def describe(config: EncodeConfig, shape: tuple[int, int, int, int]) -> str:
    """The way of one volume, in numbers."""
    voxels, size = " x ".join(map(str, config.canvas)), " x ".join(f"{s:g}" for s in config.spacing)
    return f"Each volume: {voxels} voxels of {size} mm to tokens ({', '.join(map(str, (1, *shape)))})"


def report(summary: EncodeSummary, out: str, what: str = "Hounsfield units") -> None:
    already = f", {summary.present:,} were there already" if summary.present else ""
    print(f"{summary.written:,} volumes encoded in {summary.seconds:.1f} s{already}: {out}")
    for rule, count in sorted(summary.readings.items()):
        print(f"  {what} of {count:,}: {rule}")
    if summary.skipped:
        print(f"  {len(summary.skipped):,} volumes skipped, listed in {out}/skipped.jsonl; the first: {summary.skipped[0]}")


def run(argv: list[str]) -> int:
    fields, others = split_fields(argv)
    args: Args = common.parse(Args, others, prog="jaxmed encode", description=DESCRIPTION)
    found = configured(args.config, args.base, args.tower, common.settings(args.set), fields, "encode")
    if args.batch < 0:
        raise UserError(f"--batch is {args.batch}; give how many are encoded at once, or 0")
    if found.has_tower:
        return _tower(args, found)
    if os.path.isdir(args.config):
        raise UserError(f"{args.config}: has no image tower; give a config whose `encode` fields say how volumes are encoded")
    _refuse(args, TOWER_FLAGS, f"a config with an image tower, which {args.config} has not")
    summary = _learned(args, found.experiment) if args.encoder else _haar(args, found.experiment)
    report(summary, args.out)
    return 0


def _refuse(args: Args, names: tuple[str, ...], owner: str) -> None:
    """Flags that mean nothing here."""
    defaults = {field.name: field.default for field in dataclasses.fields(Args)}
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != defaults[name]]
    if given:
        raise UserError(f"{', '.join(given)} belong{'s' * (len(given) == 1)} to {owner}")


def _tower(args: Args, found: Configured) -> int:
    _refuse(args, ("encoder", "encoder_config", "codes", "continuous"), f"BTB3D's encoder; {args.config} has an image tower")
    # JAX takes a second to import, and the Haar encoder does without.
    from jaxmed.generate import encode_tower
    from jaxmed.generate.tower import Tower, check_signature, check_weights

    found = found.with_hounsfield(args.metadata, args.hu)
    experiment = dataclasses.replace(found.experiment, visual=found.tower_visual)
    check_weights(found.experiment, args.config)
    encode_tower.check(experiment.model.tower, experiment.visual, args.config)
    encode_tower.names_below(args.volumes)  # a wrong folder is better said before the weights are read
    tower = Tower(experiment, args.dtype, args.batch)
    check_signature(tower, experiment, args.config)
    common.notice(encode_tower.describe(tower, args.store))
    summary = encode_tower.encode_folder(args.volumes, args.out, tower, args.store, args.on_bad_record, args.processes)
    report(summary, args.out, "preparation")
    kept = " --no-train.train-tower" * experiment.train.train_tower
    # a run that knows its tower is asked about volumes without being told of it again
    folder = experiment.model.tower_folder
    named = f" --model.tower-folder {folder}" if folder else ""
    print(f"To train on them, the tower frozen: --visual.kind embeddings --data.embeddings {args.out}{named}{kept}")
    return 0


def _haar(args: Args, experiment: Experiment) -> EncodeSummary:
    _refuse(args, LEARNED_FLAGS, "the learned encoder; pass --encoder as well")
    check_grid(experiment)
    common.notice(describe(experiment.encode, haar.token_shape(experiment.encode)))
    return encode_folder(args.volumes, args.out, experiment.encode, args.metadata, args.hu, args.on_bad_record, args.processes)


def _learned(args: Args, experiment: Experiment) -> EncodeSummary:
    # JAX takes a second to import, and the Haar encoder does without.
    from jaxmed.generate import encode_volumes

    if args.codes and args.continuous:
        raise UserError("--codes and --continuous exclude each other: codes are the signs of the continuous output")
    if args.continuous and experiment.visual.kind == "codes":
        raise UserError("visual.kind is codes, --continuous writes none; leave it out, or set visual.kind to embeddings")
    form: encode_volumes.Form = "codes" if args.codes else "continuous" if args.continuous else "signs"
    config = experiment.encode
    sizes = encode_volumes.encoder_sizes(args.encoder, args.encoder_config)
    shape = token_shape(config, sizes.cell, CODE_BITS)
    _check_shape(experiment, shape, f"the {sizes.name} encoder gives", f"encode.canvas and the {sizes.name} encoder give")
    encoder = encode_volumes.load_encoder(args.encoder, args.encoder_config, args.dtype, args.batch)
    common.notice(describe(config, shape))
    common.notice(encoder.describe(config, form))
    return encode_volumes.encode_folder(
        args.volumes, args.out, config, encoder, form, args.metadata, args.hu, args.on_bad_record, args.processes
    )
