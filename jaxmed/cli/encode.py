"""`jaxmed encode CONFIG --volumes DIR --out DIR [--encoder CKPT]`: CT volumes to token files.

With the config's weight-free Haar encoder, or with BTB3D's learned one.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jaxmed.cli import common
from jaxmed.config import EncodeConfig, Experiment
from jaxmed.data import haar
from jaxmed.data.embeddings import CODE_BITS
from jaxmed.data.encode import EncodeSummary, encode_folder
from jaxmed.data.volumes import Override
from jaxmed.data.windows import token_shape
from jaxmed.errors import UserError

HELP = "Turn CT volumes (NIfTI) into token files: with BTB3D's learned encoder, or a weight-free 3-D Haar encoder"


@dataclass(frozen=True)
class Args:
    config: tyro.conf.Positional[str]
    """A shipped config by name, or the path of a Python file; its `encode` fields decide"""
    volumes: str
    """Folder of .nii or .nii.gz files, with any subfolders"""
    out: str
    """Folder for the token files; files that are there already are left alone"""
    metadata: str = ""
    """CT-RATE's metadata CSV: spacing and rescale by VolumeName. "": the files' own headers"""
    hu: Override = "auto"
    """What makes stored numbers Hounsfield units: the header's scaling, the header's and then the CSV's, or nothing.
    `auto`: of header and csv the one reading that has air; a volume where none or both have is refused"""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A volume that cannot be used: stop, or go on without it and list it in OUT/skipped.jsonl"""
    processes: Annotated[int, tyro.conf.arg(help_behavior_hint="(default: one a core)")] = 0
    """Volumes encoded (with --encoder: prepared, 4 at most by default) at once; each takes the memory of one volume"""
    encoder: str = ""
    """BTB3D's tokenizer checkpoint (3rd_stage.ckpt), or the folder that holds it. "": the weight-free Haar encoder"""
    encoder_config: str = ""
    """Upstream's model config (YAML) of that checkpoint, or 16x16x8 or 8x8x8 for the published sizes. "": the YAML beside it"""
    batch: Annotated[int, tyro.conf.arg(help_behavior_hint="(default: 1 on CPU, 6 on GPU and TPU)")] = 0
    """Windows encoded at once on each device; a volume of 241 slices has 30, each takes 0.8 GB"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the learned encoder's computation; upstream's is bfloat16, where some 0.5% of the signs fall differently"""
    codes: bool = False
    """Write codes packed into uint32 (18 times smaller) in place of +1 and -1 as float32"""
    continuous: bool = False
    """Write the encoder's output before the sign is taken"""


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


def report(summary: EncodeSummary, out: str) -> None:
    already = f", {summary.present:,} were there already" if summary.present else ""
    print(f"{summary.written:,} volumes encoded in {summary.seconds:.1f} s{already}: {out}")
    for rule, count in sorted(summary.readings.items()):
        print(f"  Hounsfield units of {count:,}: {rule}")
    if summary.skipped:
        print(f"  {len(summary.skipped):,} volumes skipped, listed in {out}/skipped.jsonl; the first: {summary.skipped[0]}")


def run(argv: list[str]) -> int:
    args: Args = common.parse(Args, argv, prog="jaxmed encode", description=HELP)
    experiment = common.load_experiment(args.config)
    summary = _learned(args, experiment) if args.encoder else _haar(args, experiment)
    report(summary, args.out)
    return 0


def _haar(args: Args, experiment: Experiment) -> EncodeSummary:
    names = ("encoder_config", "batch", "dtype", "codes", "continuous")
    defaults = {field.name: field.default for field in dataclasses.fields(Args)}
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != defaults[name]]
    if given:
        raise UserError(f"{', '.join(given)} belong{'s' * (len(given) == 1)} to the learned encoder; pass --encoder as well")
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
    if args.batch < 0:
        raise UserError(f"--batch is {args.batch}; give the windows encoded at once, or 0")
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
