"""`jaxmed convert SRC --to FORMAT --out DIR`: any model as a folder of ours, or as one that other programs read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxmed.cli import common
from jaxmed.config import DistributedConfig, MeshConfig
from jaxmed.errors import UserError

if TYPE_CHECKING:
    from jaxmed.checkpoint.export_parts import PartPlan
    from jaxmed.checkpoint.export_plan import Plan

HELP = "Write a model as a run of ours, or as a Hugging Face, PEFT, LLaVA, M3D-LaMed or SAMF folder"

DESCRIPTION = """Write a model as others read it, or as our own folder. SRC is a run of `jaxmed train`, a model or an adapter
as Hugging Face, PEFT, LLaVA, M3D or SAMF wrote it, or a part of one: M3D-CLIP, an image tower, a projector (mm_projector.bin);
which, is told from its files.

  orbax   a run that needs no other folder: every parameter in one checkpoint, read slice by slice onto --mesh; adapters stay
          apart unless --merge is given. `jaxmed generate`, `jaxmed train --model.adapter` and jaxmed.load take it
  hf      adapters merged into the base (in float32), for transformers and what builds on it; the projector stands beside it
          (CLIP or SigLIP, mlp2x_gelu and LLaMA or Mistral: all of it, as LlavaForConditionalGeneration)
  peft    the adapter alone, for `peft` on the base
  llava   upstream's layout: the whole model; adapter, non_lora_trainables.bin and config.json for LoRA unless --merge is given;
          mm_projector.bin where the projector alone was trained
  lamed   M3D-LaMed's layout; adapters apart in model_with_lora.bin unless --merge is given
  samf    SAMF's layout, likewise

Of parts: a CLIP or SigLIP tower can be hf, a ViT3D hf or lamed (pretrained_ViT.bin), a DINO hf or samf (a .pth), M3D-CLIP hf or
lamed (its tower), a projector llava, lamed or samf (mm_projector.bin), whose kind it is; each can be orbax, which --tower,
--model.tower-folder and (projectors) --model.adapter take.

DIR appears when it is complete and verified, with a manifest.json of where everything came from.

    jaxmed convert runs/btb3d --to hf --out btb3d-merged"""


@dataclass(frozen=True)
class Args:
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="src")]
    """A run, a model's folder, or an adapter's"""
    to: Literal["orbax", "hf", "peft", "llava", "lamed", "samf"]
    """Layout to write"""
    out: str = ""
    """Folder to write; must not exist"""
    base: str = ""
    """The language model's folder, where SRC does not find it by itself"""
    tower: str = ""
    """The image tower's folder, where it is apart"""
    merge: bool = False
    """Merge adapters into the base; --to hf always does"""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Dtype of what is written; "": as the source has it"""
    dry_run: bool = False
    """Show the table of tensors and what is left out, and write nothing"""
    verify: bool = True
    """Run one prompt and one image through both sides before DIR appears, where torch and transformers are installed and both
    sides fit into memory"""
    shard_size: str = "5GB"
    """Size of a weight file at most"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE for what no file stores, such as lora.alpha=12"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def run(argv: list[str]) -> int:
    args = common.parse(Args, argv, prog="jaxmed convert", description=DESCRIPTION)
    # imported late: --help and flags that are wrong need no JAX
    import jax

    from jaxmed.distributed import initialise, leave

    initialise(args.distributed)
    try:
        convert(args)
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        leave(error)
    return 0


def convert(args: Args) -> None:
    from jaxmed.api import resolve
    from jaxmed.checkpoint.export import plan_export
    from jaxmed.checkpoint.export_folder import check_out, write_export
    from jaxmed.checkpoint.export_plan import DTYPES
    from jaxmed.checkpoint.folder_kinds import KINDS, detect
    from jaxmed.checkpoint.open_part import part_of_model
    from jaxmed.checkpoint.orbax_export import plan_native
    from jaxmed.checkpoint.tensor_files import parse_size
    from jaxmed.distributed import is_first, say, together

    shard_size = parse_size(args.shard_size, "--shard-size")
    if args.merge and args.to == "peft":
        raise UserError("--merge: peft is a layout of adapters; leave --merge out, or give --to hf")
    if not (args.dry_run or args.out):
        raise UserError("no --out: give the folder to write (or --dry-run, to see what it would hold)")
    overrides = common.settings(args.set)
    with together():
        if not args.dry_run:
            check_out(args.out)
        kind = detect(args.source)
        say(f"{args.source}: {KINDS[kind]}")
        if part_of_model(args.source):
            plan = plan_alone(args, overrides)
        else:
            experiment = resolve(args.source, args.base, "float32", overrides, args.tower)
            if args.to == "orbax":
                plan = plan_native(experiment, DTYPES[args.dtype] if args.dtype else None, args.merge)
            else:
                plan = plan_export(experiment, args.to, args.dtype, args.merge)
    if args.dry_run:
        if is_first():
            show(plan)
        return
    write_export(plan, args.source, args.out, shard_size, args.mesh, say, verifier(args, plan, overrides))
    for note in plan.notes:
        say(note)
    if is_first():
        print(args.out)


def plan_alone(args: Args, overrides: dict[str, str]) -> "PartPlan":
    """Of a part of a model."""
    from jaxmed.checkpoint.export_parts import plan_part
    from jaxmed.checkpoint.open_part import open_part

    given = [name for name in ("base", "tower", "merge") if getattr(args, name)]
    if given:
        raise UserError(f"--{given[0]}: {args.source} is a part of a model alone, which needs none; leave it out")
    return plan_part(open_part(args.source, overrides), args.to, args.dtype)


def verifier(args: Args, plan: "Plan", overrides: dict[str, str]) -> Callable[[str], None]:
    """What is done with the folder before it gets its name."""
    from jaxmed import verify, verify_parts
    from jaxmed.checkpoint.export_parts import PartPlan
    from jaxmed.distributed import say

    if isinstance(plan, PartPlan):
        reason, check = verify_parts.reason_not_to(plan), lambda folder: verify_parts.verify(plan, overrides, folder, say)
    else:
        source = verify.Source(args.source, args.base, args.tower, overrides)
        reason, check = verify.reason_not_to(plan), lambda folder: verify.verify(plan, source, folder, say)
    if not args.verify:
        reason = "not verified: --no-verify"
    return (lambda folder: say(reason)) if reason else check


def show(plan: "Plan") -> None:
    """The table on stdout; each tensor on one line, however narrow the terminal."""
    console = Console(width=240, soft_wrap=True, highlight=False)
    for file, tensors in plan.files.items():
        size = sum(tensor.nbytes for tensor in tensors)
        table = Table(title=f"{file}: {len(tensors)} tensors, {size:,} bytes", title_justify="left", box=None, pad_edge=False)
        for name in ("theirs", "ours", "shape", "dtype", "transform"):
            table.add_column(name, no_wrap=True)
        for t in tensors:
            cells = (t.name, t.ours, str(list(t.shape)), t.dtype.name, t.rule)
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
    console.print("ignored:" if plan.ignored else "ignored: nothing")
    for name, reason in plan.ignored.items():
        console.print(Text(f"  {name}: {reason}"))
    for note in plan.notes:
        console.print(Text(note))
