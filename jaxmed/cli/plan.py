"""`jaxmed plan CONFIG --topology NAME`: does it fit, where does memory go, what is sent, how fast is it, what costs it."""

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from jaxmed.cli import common
from jaxmed.config import Experiment
from jaxmed.errors import UserError
from jaxmed.plan.topology import known, parse_topology

HELP = "Before you pay: does a run fit a slice, what does it send, how fast should it be, which mesh is best"

DESCRIPTION = """Compiles the real train, prefill or decode step for devices that this machine need not have, and says whether
it fits, where the memory goes, what is sent over which links, how long a step should take and what the run costs. Nothing is
read but CONFIG: a shipped config by name ({configs}), a Python file with get_config(), or a model's folder. Every field of the
config is a flag.

Topologies: {known}.

    jaxmed plan btb3d --topology v5p:2x2x4 --mesh.fsdp 8 --mesh.context 2 --out plans/btb3d
    jaxmed plan btb3d --topology h100:2x8 --sweep --prices prices.yaml
    jaxmed plan m3d_clip --topology v5e:2x4 --mesh.fsdp 8 --data.microbatches 8 --samples 115000"""


@dataclass(frozen=True)
class Args:
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    topology: str
    """FAMILY:SIZE, such as v5p:2x2x4, v6e:4x4, 2xv5p:2x2x4 (two slices), h100:2x8 (nodes x GPUs) or cpu:8"""
    step: Literal["train", "prefill", "decode"] = "train"
    """What is planned: an optimizer step, or (with a decoder) generation's prompt or one token of data.batch rows"""
    length: int = 0
    """Tokens of a row, or slots of the cache (0: the first bucket in training, the last in generation)"""
    samples: int = 0
    """Records of the data set, for hours and money where the config counts epochs (0: unknown)"""
    prices: str = ""
    """YAML file with the price of one chip's hour by family, such as `v5p: 4.2`"""
    out: str = ""
    """Folder for plan.json and plan.html"""
    sweep: bool = False
    """Try all legal meshes, remat policies and microbatches, and name the best with the flags to paste"""
    compile: bool = True
    """Ask the compiler (minutes); without it the plan's own model of memory and traffic decides (a second)"""
    timeout: float = 3600.0
    """Seconds after which compiling is given up"""


def run(argv: list[str]) -> int:
    config, flags = common.split_config(argv, "plan")
    flags = common.long_forms(flags)
    helping = any(f in ("-h", "--help") for f in flags)
    if not helping and not any(f.partition("=")[0] == "--topology" for f in flags):
        raise UserError(f"no --topology: give what the run is to be planned for. Known are {known()}")
    default = Args(describe(config), topology=tyro.MISSING)
    description = DESCRIPTION.format(configs=", ".join(common.shipped_configs()), known=known())
    args: Args = common.parse(Args, flags, prog="jaxmed plan CONFIG", description=description, default=default)
    topology = parse_topology(args.topology)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the plan itself computes nothing; the child that compiles has its own

    from jaxmed.plan.prices import price_of, read_prices

    price = price_of(read_prices(args.prices), topology, args.prices) if args.prices else 0.0
    if args.experiment.task == "contrastive":
        check_pairs(args, config)
    found = make(args, topology, with_folders(args.experiment), price)
    show(found)
    if args.out:
        save(found, args.out)
    return 0


def describe(config: str) -> Experiment:
    """The experiment of a config, or of a model's folder."""
    if not os.path.isdir(config):
        return common.load_experiment(config)
    from jaxmed.cli import inspect

    return inspect.describe(inspect.Args(config))


def check_pairs(args: Args, config: str) -> None:
    """UserError where a flag asks for what a model without a language model does not have."""
    if args.step != "train":
        raise UserError(f"--step {args.step}: {config} has no language model and writes nothing; its one step is train")
    if args.length:
        raise UserError(f"--length {args.length}: {config} has texts of one length alone, that of --data.max-length")


def with_folders(experiment: Experiment) -> Experiment:
    """The decoder of `model.base`, where there is one; the sizes of the two encoders from their folders."""
    if experiment.task == "contrastive":
        from jaxmed.cli.validate_pairs import encoders_of

        return encoders_of(experiment, frozenset())
    if not experiment.model.base:
        return experiment
    from jaxmed.checkpoint.hf_config import decoder_of

    model = dataclasses.replace(experiment.model, decoder=decoder_of(experiment.model.base))
    return dataclasses.replace(experiment, model=model)


def make(args: Args, topology: Any, experiment: Experiment, price: float) -> dict[str, Any]:
    from jaxmed.plan.analysis import first_length
    from jaxmed.plan.lowering import check_compiler
    from jaxmed.plan.meshes import check_mesh
    from jaxmed.plan.plan import make_plan
    from jaxmed.plan.sweep import chosen, sweep

    length = args.length or first_length(experiment, args.step)
    if args.length:
        experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, buckets=(args.length,)))
    if args.compile:
        check_compiler(topology)  # better said before than after a sweep
    candidates = []
    if args.sweep:
        candidates = sweep(experiment, topology, args.step, length, _progress(time.monotonic()))
        experiment = chosen(experiment, candidates[0])
    experiment = check_mesh(experiment, topology)
    if args.compile:
        common.notice(f"compiling the {args.step} step for {topology.name}; this takes from seconds to minutes")
    found = make_plan(experiment, topology, args.step, length, args.samples, price, args.compile, args.timeout)
    if candidates:
        found["sweep"] = [dataclasses.asdict(c) | {"flags": c.flags} for c in candidates]
        found["flags"] = candidates[0].flags
    return found


def _progress(began: float) -> Any:
    def say(done: int, total: int) -> None:
        if done % 10 == 0:
            left = f", {(time.monotonic() - began) / done * (total - done):.0f} s left" if done else ""
            common.notice(f"sweep: {done} of {total}{left}")

    return say


# -- printing --------------------------------------------------------------------------------------------------------------


def show(found: dict[str, Any]) -> None:
    from jaxmed.plan.verdict import gigabytes

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{found['topology']['name']}[/bold]: {_plain(found['verdict'])}")
    if "flags" in found:
        console.print(f"best of {len(found['sweep'])} (by the plan's own model, not compiled each): {found['flags']}")
    memory, flops, sent, seconds, unit = (found[name] for name in ("memory", "flops", "sent", "time", "unit"))
    table = _table("memory of one device", "bytes", "share")
    for name, size in memory["classes"].items():
        if size:
            table.add_row(name, f"{size:,}", f"{size / memory['total']:.1%}")
    table.add_section()
    table.add_row("sum", f"{memory['total']:,}", f"{memory['total'] / memory['capacity']:.0%} of the chip's")
    if "compiler" in memory:
        table.add_row(
            "the compiler's own account",
            f"{memory['compiler']['total']:,}",
            f"sum is {memory['model_over_compiler']:.2f} of it",
        )
    console.print(table)
    if memory["host"]:
        console.print(f"  and {gigabytes(memory['host'])} of the host's memory for each device")
    table = _table("sent by one device in a step", "bytes", "least possible")
    for axis, size in sorted(sent["axes"].items(), key=lambda item: -item[1]):
        table.add_row(axis, f"{size:,.0f}", f"{sent['least'][axis]:,.0f}" if axis in sent["least"] else "")
    console.print(table)
    if sent["dcn"]:
        console.print(f"  {gigabytes(sent['dcn'])} of it between slices or nodes, over the data-centre network")
    console.print(f"  counted in {sent['from']}" + (f" ({_plain(sent['why'])})" if sent["why"] else ""))
    for row in sent["rows"][:6]:
        what = f"{row['kind']} over {', '.join(row['axes'])}: {_plain(row['array'])} at {row['source']}"
        console.print(f"  {gigabytes(row['bytes']):>9}  {what}")
    table = _table("a step", "seconds", "")
    for name, value in seconds["seconds"].items():
        table.add_row(name, f"{value:.3f}", "the bound" if name == seconds["bound"] else "")
    table.add_section()
    table.add_row("expected", f"{seconds['expected']:.3f}", f"MFU {seconds['mfu']:.0%}")
    console.print(table)
    console.print(
        f"FLOPs a step {flops['step']:.3e}, the model's {flops['model']:.3e}, ratio {flops['ratio']:.2f}; "
        f"{seconds[f'{unit}_per_second']:,.0f} {unit}/s, {seconds[f'{unit}_per_second_chip']:,.0f} a chip"
    )
    if "hours" in seconds:
        money = f", {seconds['money']:,.2f} at {seconds['price']:g} a chip-hour" if "money" in seconds else ""
        console.print(
            f"{seconds['steps']:,} steps: {seconds['hours']:,.1f} hours, {seconds['chip_hours']:,.1f} chip-hours{money}"
        )
    elif found["step"] == "train":
        console.print("hours: give --samples (records of the data set) or --train.steps")
    for warning in found["warnings"]:
        console.print(f"warning: {_plain(warning)}")


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def save(found: dict[str, Any], out: str) -> None:
    from jaxmed.report.plan import write_plan

    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "plan.json")
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(found, file, indent=2)
    os.replace(path + ".part", path)
    write_plan(os.path.join(out, "plan.html"), found)
    common.notice(f"saved {path} and {os.path.join(out, 'plan.html')}")
