"""`jaxmed convert SRC --to FORMAT --out DIR`: a trained model as a folder that transformers, PEFT or upstream's LLaVA reads."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxmed.cli import common
from jaxmed.errors import UserError

if TYPE_CHECKING:
    from jaxmed.checkpoint.export import Plan

HELP = "Write a model as a Hugging Face, PEFT or LLaVA folder"

DESCRIPTION = """Write a model as others read it. SRC is a run of `jaxmed train`, an upstream LoRA folder, a PEFT adapter or a
Hugging Face language model; which, is told from its files.

  hf      adapters merged into the base (in float32), for transformers and what builds on it; the projector stands beside it
  peft    the adapter alone, for `peft` on the base
  llava   upstream's LoRA layout: adapter, non_lora_trainables.bin, config.json with mm_* fields, tokenizer

DIR appears when it is complete, with a manifest.json of where everything came from.

    jaxmed convert runs/btb3d --to hf --out btb3d-merged"""


@dataclass(frozen=True)
class Args:
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="src")]
    """A run, an upstream LoRA folder, a PEFT adapter, or a Hugging Face language model"""
    to: Literal["hf", "peft", "llava"]
    """Layout to write"""
    out: str = ""
    """Folder to write; must not exist"""
    base: str = ""
    """The language model's folder, where SRC does not find it by itself"""
    merge: bool = False
    """Merge adapters into the base; --to hf always does"""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Dtype of what is written; "": as the source has it"""
    dry_run: bool = False
    """Show the table of tensors and what is left out, and write nothing"""
    shard_size: str = "5GB"
    """Size of a weight file at most"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE for what no file stores, such as lora.alpha=12 (repeatable)"""


def run(argv: list[str]) -> int:
    args = common.parse(Args, argv, prog="jaxmed convert", description=DESCRIPTION)
    # imported late: --help and flags that are wrong need no JAX
    from jaxmed.api import resolve
    from jaxmed.checkpoint.export import plan_export
    from jaxmed.checkpoint.export_folder import check_out, write_export
    from jaxmed.checkpoint.folder_kinds import KINDS, detect
    from jaxmed.checkpoint.tensor_files import parse_size

    shard_size = parse_size(args.shard_size, "--shard-size")
    if args.merge and args.to != "hf":
        raise UserError(f"--merge: {args.to} is a layout of adapters; leave --merge out, or give --to hf")
    if not args.dry_run:
        if not args.out:
            raise UserError("no --out: give the folder to write (or --dry-run, to see what it would hold)")
        check_out(args.out)
    kind = detect(args.source)
    common.notice(f"{args.source}: {KINDS[kind]}")
    experiment = resolve(args.source, args.base, "float32", common.settings(args.set))
    plan = plan_export(experiment, args.to, args.dtype)
    if args.dry_run:
        show(plan)
        return 0
    write_export(plan, args.source, args.out, shard_size, common.notice)
    for note in plan.notes:
        common.notice(note)
    print(args.out)
    return 0


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
