"""`jaxmed inspect FOLDER_OR_CONFIG [--mesh.fsdp N ...]`: what a model consists of, and what of it one device would hold."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from jaxmed.cli import common
from jaxmed.config import Experiment, MeshConfig, replace_field

if TYPE_CHECKING:
    from jaxmed.train.parts import Inventory

HELP = "Show a model's parameters by part: trainable or frozen, bytes, and bytes a device"

DESCRIPTION = """Show what a model consists of: parameters by part, trainable or frozen, dtype, bytes, and what one device of a
mesh would hold. No weights are read, and the devices of the mesh need not be there.

FOLDER_OR_CONFIG is any folder that `jaxmed convert` reads (with --base or --tower where it needs another), an image tower,
M3D-CLIP, a shipped config ({configs}), or the path of a Python file with get_config().

    jaxmed inspect btb3d --mesh.fsdp 8"""


@dataclass(frozen=True)
class Args:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="folder-or-config")]
    """A folder or a config"""
    base: str = ""
    """The language model's folder"""
    tower: str = ""
    """The image tower's folder, where it is apart"""
    dtype: Literal["", "bfloat16", "float32"] = ""
    """Dtype of the frozen weights; "": the config's, bfloat16 for a folder that has none"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE for a field of the config, such as lora.rank=64"""
    mesh: MeshConfig = field(default_factory=MeshConfig)


def run(argv: list[str]) -> int:
    description = DESCRIPTION.format(configs=", ".join(common.shipped_configs()))
    args = common.parse(Args, argv, prog="jaxmed inspect", description=description)
    show(inventory(args))
    return 0


def inventory(args: Args) -> "Inventory":
    """What a folder or a config consists of."""
    # imported late: --help and flags that are wrong need no JAX
    from jaxmed.checkpoint.folder_kinds import detect
    from jaxmed.checkpoint.open_part import open_part, part_of_model
    from jaxmed.train.parts import encoder_inventory, take_inventory

    given = common.settings(args.set)
    there = os.path.exists(args.model) and not args.model.endswith(".py")
    if there and not is_run(args.model) and part_of_model(args.model):
        part = open_part(args.model, given)
        return encoder_inventory(part.build, part.widths, args.dtype or "bfloat16", args.mesh)
    kind = detect(args.model) if there and not is_run(args.model) else ""
    experiment = describe(args, kind, given)
    if args.dtype:
        experiment = replace_field(experiment, "model.dtype", args.dtype)
    return take_inventory(experiment, args.mesh if args.mesh != MeshConfig() else experiment.mesh)


def describe(args: Args, kind: str, given: dict[str, str]) -> Experiment:
    """The experiment of a folder (`kind` "": a run) or a config."""
    from jaxmed.api import resolve
    from jaxmed.checkpoint.adapter import run_experiment
    from jaxmed.checkpoint.hf_config import decoder_of

    if kind:
        return resolve(args.model, args.base, "bfloat16", given, args.tower)
    # a run needs neither its base nor a checkpoint to be described
    experiment = run_experiment(args.model) if os.path.isdir(args.model) else common.load_experiment(args.model)
    if args.base:
        model = dataclasses.replace(experiment.model, decoder=decoder_of(args.base), base=args.base)
        experiment = dataclasses.replace(experiment, model=model)
    for name, value in given.items():
        experiment = replace_field(experiment, name, value)
    return experiment


def is_run(folder: str) -> bool:
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            return {"model", "visual", "train"} <= set(json.load(file))
    except (OSError, ValueError, TypeError):
        return False  # whatever it is, the next reader has the words for it


def show(inventory: "Inventory") -> None:
    mesh = ", ".join(f"{name} {size}" for name, size in inventory.mesh.items())
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part")
    table.add_column("")
    table.add_column("dtype")
    for name in ("parameters", "bytes", "bytes a device"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in inventory.parts:
        numbers = (part.parameters, part.bytes, part.device_bytes)
        table.add_row(part.name, part.fate, part.dtype, *(f"{n:,}" for n in numbers))
    table.add_section()
    for fate in ("trainable", "frozen"):
        of_fate = [part for part in inventory.parts if part.fate == fate]
        sums = (sum(getattr(part, name) for part in of_fate) for name in ("parameters", "bytes", "device_bytes"))
        table.add_row("all", fate, "", *(f"{n:,}" for n in sums))
    sums = (sum(getattr(part, name) for part in inventory.parts) for name in ("parameters", "bytes", "device_bytes"))
    table.add_row("all", "", "", *(f"{n:,}" for n in sums), style="bold")
    if inventory.optimizer_bytes:
        sizes = (inventory.optimizer_bytes, inventory.optimizer_device_bytes)
        table.add_row("optimizer state", "", "float32", "", *(f"{n:,}" for n in sizes))
    console = Console(highlight=False)
    console.width = max(console.width, 110)  # numbers are shown whole, in a pipe too
    console.print(table)
    console.print(f"mesh: {mesh}; bytes include the rows that pad a vocabulary to a multiple of 256, parameters do not")
