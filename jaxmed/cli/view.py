"""`jaxmed view VOLUME --config CONFIG_OR_FOLDER --out sheet.png`: what the model will see of a volume, as a contact sheet."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro
from PIL import Image

from jaxmed.cli import common
from jaxmed.cli.configured import Configured, configured, split_fields
from jaxmed.data.hounsfield import Override
from jaxmed.data.metadata import Metadata
from jaxmed.errors import Problem, UserError
from jaxmed.report import view_input, view_sheet
from jaxmed.report.view_features import components, patch_place, similarity
from jaxmed.report.view_planes import Seen
from jaxmed.report.view_sheet import Features

if TYPE_CHECKING:
    from jaxmed.generate.tower import Tower

HELP = "Show what a model will see of a volume as a picture: planes, window, HU rule, and what its tower tells apart"

DESCRIPTION = """Show what a model will see of a volume, as a picture: slices of three planes after preparation, with preset,
window, HU rule and orientation. --features shows beside each slice the tower's patch tokens: red, green and blue are the first
three principal components of this volume's tokens, the same in all planes; --patch D,H,W shows how like one patch all others
are. How volumes are prepared is the config's to say; its fields are flags here too.

    jaxmed view case.nii.gz --config vit3d_amos --visual.prepare.preset hu_window --visual.prepare.window -160 240
    jaxmed view case.nii.gz --config runs/amos --features --patch 3,8,5 --out features.png"""


SHEET = "sheet.png"


@dataclass(frozen=True)
class Args:
    volumes: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="VOLUME...", help_behavior_hint="")]]
    """NIfTI files, folders with a DICOM series or with PNG or JPEG slices, prepared .npy; also images and token files (.npz)"""
    config: Annotated[str, tyro.conf.arg(help_behavior_hint="(needed)")] = ""
    """A shipped config, a Python file, or the folder of a run, a model or a tower: what it says of the image input counts"""
    out: str = SHEET
    """The picture; with several volumes a folder of pictures"""
    slices: Annotated[int, tyro.conf.arg(help_behavior_hint="(default: 8, with --features 4)")] = 0
    """Slices of the axial plane; the other two planes show half as many"""
    features: bool = False
    """Show the tower's tokens beside the slices"""
    patch: str = ""
    """Place D,H,W of a patch on the tower's grid, from 0: shows every patch's likeness to it (with --features)"""
    tower: str = ""
    """Folder of the tower's weights, where the config does not hold them (with --features)"""
    base: str = ""
    """Folder of the language model, where --config is an adapter that does not find it by itself"""
    tokens: str = ""
    """Token file (.npz) of the volume, for models that read tokens from files (with --features)"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE for what no file stores, such as vision.heads=12"""
    metadata: str = ""
    """CT-RATE's metadata CSV: spacing and rescale by VolumeName (a tower's preset hu_window: rescale alone)"""
    hu: Override = "auto"
    """Which rule gives the Hounsfield units: the one that has air, or this"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the tower's computation"""


def run(argv: list[str]) -> int:
    fields, others = split_fields(argv)
    args: Args = common.parse(Args, others, prog="jaxmed view", description=DESCRIPTION)
    _check(args)
    found = configured(args.config, args.base, args.tower, common.settings(args.set), fields, "view")
    found = found.with_hounsfield(args.metadata, args.hu)
    tower = _tower(args, found) if args.features and _runs_tower(args, found) else None
    problems, written = [], 0
    for volume, out in _outs(args).items():
        try:
            seen, tokens = _seen(volume, args, found, tower)
            features = _features(tokens, seen, args) if args.features else None
            _write(out, view_sheet.draw(seen, features, args.slices))
        except UserError as error:
            problems.append(Problem(volume, str(error).removeprefix(f"{volume}: ")))
            continue
        written += 1
        print(f"Wrote {out}")
    if problems:
        raise UserError(str(problems[0]) if len(args.volumes) == 1 else _listed(problems, written))
    return 0


def _listed(problems: list[Problem], written: int) -> str:
    lines = "".join(f"\n  {problem}" for problem in problems)
    return f"{len(problems)} of {len(problems) + written} volumes cannot be shown:{lines}"


def _check(args: Args) -> None:
    if not args.volumes:
        raise UserError("give a volume: a NIfTI file, a folder of slices, or a prepared .npy")
    if not args.config:
        known = ", ".join(common.shipped_configs())
        raise UserError(f"give --config: one of {known}; the path of a .py file; or the folder of a run, a model or a tower")
    if args.slices < 0:
        raise UserError(f"--slices is {args.slices}; give the slices of the axial plane, or 0")
    needs = [flag for flag, given in (("--patch", args.patch), ("--tokens", args.tokens)) if given]
    if needs and not args.features:
        raise UserError(f"{', '.join(needs)}: shows tokens; give --features as well")
    if args.tokens and len(args.volumes) > 1:
        raise UserError("--tokens is the token file of one volume; give one volume")


def _outs(args: Args) -> dict[str, str]:
    """Volume -> its picture."""
    if len(args.volumes) == 1:
        return {args.volumes[0]: args.out}
    if args.out != SHEET and args.out.lower().endswith(".png"):
        raise UserError(f"--out {args.out}: {len(args.volumes)} volumes give a picture each; name a folder")
    folder = "sheets" if args.out == SHEET else args.out
    volumes = list(dict.fromkeys(args.volumes))
    stems = [_stem(view_input.name_of(volume)) for volume in volumes]
    if len(set(stems)) < len(stems):  # then folders tell them apart
        whole = [os.path.abspath(volume) for volume in volumes]
        above = os.path.commonpath(whole)
        stems = [_stem(os.path.relpath(path, above).replace(os.sep, "_")) for path in whole]
    return {volume: os.path.join(folder, f"{stem}.png") for volume, stem in zip(volumes, stems, strict=True)}


def _stem(name: str) -> str:
    for ending in (".nii.gz", ".nii", ".npy", ".npz"):
        name = name.removesuffix(ending)
    return name


def _runs_tower(args: Args, found: Configured) -> bool:
    """Whether tokens come from a tower; else they stand in files."""
    if all(volume.endswith(".npz") for volume in args.volumes) or args.tokens:
        return False
    if not found.has_tower:
        raise UserError(
            f"{args.config}: has no image tower, its tokens stand in files; give the volume's with --tokens FILE.npz, or view "
            "that file itself"
        )
    return True


def _tower(args: Args, found: Configured) -> "Tower":
    # JAX takes a second to import, and pictures alone do without.
    from jaxmed.generate.tower import Tower, check_signature, check_weights

    check_weights(found.experiment, args.config)
    tower = Tower(found.experiment, args.dtype)
    check_signature(tower, found.experiment, args.config)
    common.notice(f"Tower {tower.name}: {tower.parameters:,} parameters")
    return tower


def _seen(volume: str, args: Args, found: Configured, tower: "Tower | None") -> tuple[Seen, np.ndarray | None]:
    """What is seen of a volume, and its tokens [N, C]."""
    if volume.endswith(".npz"):
        if not args.features:
            raise UserError("token files have no picture but that of their tokens; give --features")
        return view_input.of_tokens(volume, found.experiment.visual)
    visual = found.experiment.visual
    tokens, grid = view_input.tokens_of(args.tokens, visual) if args.tokens else (None, visual.grid)
    if found.has_tower:
        seen, values = view_input.of_tower(volume, found.tower_visual)
        if tokens is not None and grid != seen.grid:
            raise UserError(f"{args.tokens}: tokens on a grid {grid}, the tower of {args.config} gives {seen.grid}")
        return seen, _tokens(tower, values, seen) if tower else tokens
    if visual.kind == "none":
        raise UserError(f"{args.config} reads no images (visual.kind is none)")
    metadata = Metadata(args.metadata) if args.metadata else None
    return view_input.of_canvas(volume, found.experiment.encode, metadata, args.hu, grid), tokens


def _tokens(tower: "Tower", values: np.ndarray, seen: Seen) -> np.ndarray:
    """[N, C], N as many as the grid has places"""
    if tower.visual.kind == "slices":
        return tower(values)[:, 0]
    return tower(values[None])[0][-int(np.prod(seen.grid)) :]


def _features(tokens: np.ndarray, seen: Seen, args: Args) -> Features:
    found = components(tokens, seen.grid)
    if not args.patch:
        return Features(found, None)
    place = patch_place(args.patch, seen.grid)
    return Features(found, similarity(tokens, seen.grid, place), place)


def _write(out: str, sheet: np.ndarray) -> None:
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(out, "PNG")
    except (OSError, ValueError) as error:
        raise UserError(f"{out} cannot be written ({error}); choose another --out or free space") from error
