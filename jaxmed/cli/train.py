"""`jaxmed train CONFIG [flags] --out RUN`: fine-tune as a config says; started again, it goes on where it stopped."""

from dataclasses import dataclass
from typing import Annotated

import jax
import tyro

from jaxmed.cli import common
from jaxmed.cli.validate import given_flags, resolve
from jaxmed.config import Experiment
from jaxmed.distributed import initialise, leave, say, together
from jaxmed.errors import REQUEUE, Preempted, UserError
from jaxmed.train.loop import fit

HELP = "Fine-tune a model on records and their images; the same command goes on after an interruption"

DESCRIPTION = """Train what CONFIG describes: a shipped config by name ({configs})
or the path of a Python file with get_config(). Every field of the config is a flag; the defaults below are those of {config}.
Killed at any moment, the same command goes on. Asked to end (SIGTERM), it saves and exits with 75.
Short forms: --on-bad-record for --data.on-bad-record, --set KEY=VALUE for --KEY VALUE (--set lora.alpha=12), --upstream-exact
NAME,... for the flags that reproduce an upstream defect ({defects}).

    jaxmed train btb3d --model.base Llama-3.1-8B-Instruct --data.records train.json --data.embeddings encoded/ --out runs/1"""


_SHIFTED = ("<unk>", "<im_patch>", "<bx_start>", "<bx_end>", "[SEG]")
UPSTREAM_DEFECTS = {
    "stage1_embeddings": ("--train.no-keep-embed-tokens",),
    "unk_pad": ("--model.added-tokens", *_SHIFTED, "--model.pad-token", "<unk>"),
}
"""--upstream-exact NAME -> the flags that it stands for"""


@dataclass(frozen=True)
class Args:
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    out: str
    """Folder of the run: config.json, metrics.jsonl, checkpoints/, tokenizer/, skipped.jsonl, tensorboard/"""


def run(argv: list[str]) -> int:
    config, flags = common.split_config(argv, "train")
    flags = without_defects(common.long_forms(flags))
    if not any(f in ("-h", "--help") or f.partition("=")[0] == "--out" for f in flags):
        raise UserError("no --out: give the folder of the run (a new one, or the one to go on with)")
    default = Args(common.load_experiment(config), out=tyro.MISSING)
    description = DESCRIPTION.format(
        configs=", ".join(common.shipped_configs()), config=config, defects=", ".join(UPSTREAM_DEFECTS)
    )
    args = common.parse(Args, flags, prog="jaxmed train CONFIG", description=description, default=default)
    initialise(args.experiment.distributed)
    try:
        train(args, given_flags(flags))
    except Preempted as stop:  # in all processes, at the same step
        say(f"jaxmed train: {stop}")
        return REQUEUE
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        leave(error)
    return 0


def without_defects(flags: list[str]) -> list[str]:
    """The flags with those that --upstream-exact stands for in its place."""
    found, rest = [], iter(flags)
    for flag in rest:
        name, equals, value = flag.partition("=")
        if name not in ("--upstream-exact", "--upstream_exact"):
            found.append(flag)
            continue
        for defect in sorted(common.names(value if equals else next(rest, ""), tuple(UPSTREAM_DEFECTS), "--upstream-exact")):
            found += UPSTREAM_DEFECTS[defect]
    return found


def train(args: Args, given: frozenset[str]) -> None:
    with together():
        experiment, notices = resolve(args.experiment, given)
    for text in notices:
        say(text)
    fit(experiment, args.out)
