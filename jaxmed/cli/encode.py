"""`jaxmed encode CONFIG --volumes DIR --out DIR`: CT volumes to token files with the config's weight-free Haar encoder."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jaxmed.cli import common
from jaxmed.config import EncodeConfig, Experiment
from jaxmed.data import haar
from jaxmed.data.encode import EncodeSummary, encode_folder
from jaxmed.data.volumes import Override
from jaxmed.errors import UserError

HELP = "Turn CT volumes (NIfTI) into token files with the config's weight-free 3-D Haar encoder"


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
    """Volumes encoded at once; each takes the memory of one volume"""


def check_grid(experiment: Experiment) -> None:
    """Whether training with this config could read the files: better said before the encoding than after."""
    features, *grid = haar.token_shape(experiment.encode)
    visual = experiment.visual
    if visual.kind == "none":
        return
    if visual.kind == "codes":
        raise UserError("visual.kind is codes, which this encoder does not write; set visual.kind to embeddings")
    if features != visual.file_features:
        raise UserError(
            f"encode.bands gives {features} features a token, visual.features {visual.features} with visual.merge "
            f"{visual.merge} takes {visual.file_features}; make them agree"
        )
    merged = tuple(n // m for n, m in zip(grid, visual.merge, strict=True))
    if any(n % m for n, m in zip(grid, visual.merge, strict=True)) or merged != tuple(visual.grid):
        raise UserError(
            f"encode.canvas and encode.levels give a token grid {tuple(grid)}, which visual.merge {visual.merge} does not "
            f"turn into visual.grid {tuple(visual.grid)}; make them agree"
        )


def describe(config: EncodeConfig) -> str:
    """The way of one volume, in numbers."""
    voxels, size = " x ".join(map(str, config.canvas)), " x ".join(f"{s:g}" for s in config.spacing)
    shape = ", ".join(map(str, (1, *haar.token_shape(config))))
    return f"Each volume: {voxels} voxels of {size} mm to tokens ({shape})"


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
    check_grid(experiment)
    common.notice(describe(experiment.encode))
    summary = encode_folder(
        args.volumes, args.out, experiment.encode, args.metadata, args.hu, args.on_bad_record, args.processes
    )
    report(summary, args.out)
    return 0
