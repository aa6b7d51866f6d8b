"""`jaxmed generate FOLDER --records J --embeddings DIR --out X_vqa.json`: reports for a whole data set, resumable."""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxmed.cli import common
from jaxmed.config import Experiment, MeshConfig
from jaxmed.data.conversation import reading_of
from jaxmed.data.inputs import FOLDERS, input_folder
from jaxmed.data.records import Reading, Record, load_records, where
from jaxmed.errors import UserError
from jaxmed.preemption import Preemption, listening

HELP = "Write reports and answers for a data set"

DESCRIPTION = """Write an answer for every human turn of every record, greedily unless --temperature is above 0.

FOLDER is a run of `jaxmed train`, an upstream folder (LLaVA, TinyLLaVA, M3D-LaMed, SAMF; merged, or an adapter with --base), or
a Hugging Face language model. The folder of the image files is --embeddings, --images or --volumes, as the model reads.

Each finished study is on disk at once; started again, the same command does only what is missing. Asked to end (SIGTERM), it
finishes the batch at hand and exits with 75. Several processes share the studies with --process and --processes, each on its
own devices; the one that finds all studies done writes the final file.

    jaxmed generate runs/btb3d --records valid.json --embeddings encoded/ --out reports_vqa.json"""

ASKED_TO_END = "asked to end; finished studies are on disk, the same command does the rest"
UPSTREAM_DEFECTS = ("history_eot", "na_choices", "pad_grey")


@dataclass(frozen=True)
class Args:
    folder: Annotated[str, tyro.conf.Positional]
    """A run, an upstream folder, or a Hugging Face language model"""
    records: str
    """LLaVA-style JSON, or a CSV of M3D or SAMF; its human turns are the questions"""
    out: str
    """Result, by custom named ..._vqa.json"""
    embeddings: str = ""
    """Folder of the .npz token files"""
    base: str = ""
    """The language model's folder, where FOLDER holds an adapter alone"""
    tower: str = ""
    """The image tower's folder, for models that have one apart"""
    volumes: str = ""
    """Folder of volumes, for models that read them directly"""
    images: str = ""
    """Folder of 2-D images, for models that read them"""
    max_new_tokens: int = 512
    """Tokens of an answer at most"""
    temperature: float = 0.0
    """0: greedy"""
    top_p: float = 1.0
    """Draw among the fewest tokens that together have this probability (1: all)"""
    top_k: int = 0
    """Draw among the k most likely tokens (0: all)"""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the answer has already become less likely"""
    seed: int = 0
    """Seed of the draws and of --control"""
    batch: int = 8
    """Prompts decoded together"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of weights and computation"""
    template: str = ""
    """Conversation template; "": the folder's"""
    token_ids: bool = False
    """Add the generated ids to each answer"""
    keep_special_tokens: bool = False
    """Leave end tokens and their like in the printed text, as upstream does"""
    control: Literal["", "shuffled", "zeros", "noise"] = ""
    """Show the wrong image: another study's, zeros, or noise"""
    process: int = 0
    """Index of this process among --processes"""
    processes: int = 1
    """Processes that share the studies"""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A record that cannot be used: list all such records and stop, or go on without them"""
    upstream_exact: str = ""
    """Upstream's defects to reproduce, comma-separated: history_eot, na_choices, pad_grey (see the README)"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE for what no file stores, such as lora.alpha=12 (repeatable)"""
    mesh: MeshConfig = field(default_factory=MeshConfig)


def run(argv: list[str]) -> int:
    args = common.parse(Args, argv, prog="jaxmed generate", description=DESCRIPTION)
    defects = common.names(args.upstream_exact, UPSTREAM_DEFECTS, "--upstream-exact")
    _check(args)
    with listening() as preemption, preemption.nothing_to_lose(ASKED_TO_END):
        return _run(args, defects, preemption)


def _run(args: Args, defects: frozenset[str], preemption: Preemption) -> int:
    # imported late: --help and the errors above need none of it
    from jaxmed.api import Model, load
    from jaxmed.generate.journal import Journal
    from jaxmed.generate.sampling import Sampling
    from jaxmed.generate.studies import Request, Writer, check_records, finish
    from jaxmed.sharding import make_mesh, mesh_notices

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed)
    mesh = make_mesh(args.mesh, jax.local_devices())
    overrides = common.settings(args.set) | ({"visual.pixels.pad_grey": True} if "pad_grey" in defects else {})
    model = load(args.folder, args.base, args.tower, mesh, args.dtype, overrides)
    if not isinstance(model, Model):
        raise UserError(f"{args.folder}: holds encoders alone, which write no text; use it from Python (jaxmed.load)")
    for text in mesh_notices(model.experiment, dict(mesh.shape)):
        common.notice(text)
    records, problems = load_records(args.records, _reading(model.experiment, defects))
    template = args.template or model.experiment.data.template
    request = Request(
        args.records,
        _folder(args, model.experiment),
        sampling,
        args.max_new_tokens,
        template,
        args.control,
        "history_eot" in defects,
        args.keep_special_tokens,
        args.token_ids,
    )
    skip = args.on_bad_record == "skip"
    usable, problems = check_records(records, problems, request, model, skip)
    journal = Journal(args.out, request.header(model), args.process)
    # shares of all studies, not of the missing ones: another process may have begun a while ago
    share = [record for record in usable[args.process :: args.processes] if record.id not in journal.done]
    done = sum(record.id in journal.done for record in usable)
    common.notice(f"{args.out}: {done} of {len(usable)} studies are done, {len(share)} are this process's")
    try:
        if share:
            writer = Writer(model, request, args.batch)
            with _progress(len(share)) as advance, preemption.holding():
                leave = partial(preemption.leave_if_reached, ASKED_TO_END)
                problems += writer.run(share, usable, journal, skip, advance, leave)
    finally:
        journal.close()
    bad = {problem.where for problem in problems}
    complete = finish(journal, [record for record in usable if where(record) not in bad])
    _report(args, problems, complete)
    return 0


def _reading(experiment: Experiment, defects: Collection[str]) -> Reading:
    """Upstream's scripts for 2-D images show the image whether or not the question names its place."""
    reading = reading_of(experiment, frozenset(defects))
    return replace(reading, missing_image_token="prepend") if experiment.visual.kind == "pixels" else reading


def _folder(args: Args, experiment: Experiment) -> str:
    """The folder of the image files, from the flag that belongs to what the model reads."""
    visual = experiment.visual
    given = {name: getattr(args, name) for name in ("embeddings", "images", "volumes") if getattr(args, name)}
    wanted = "" if visual.kind == "none" else FOLDERS[visual.kind]
    for name in given:
        if name != wanted:
            reads = f"reads --{wanted}" if wanted else "reads no images"
            hint = "; make them with `jaxmed encode`" if wanted == "embeddings" else ""
            raise UserError(f"--{name}: this model {reads}{hint}")
    return given.get(wanted) or input_folder(experiment.data, visual)


def _check(args: Args) -> None:
    if not os.path.isfile(args.records):
        raise UserError(f"--records {args.records}: no such file")
    for name in ("embeddings", "images", "volumes"):
        if getattr(args, name) and not os.path.isdir(getattr(args, name)):
            raise UserError(f"--{name} {getattr(args, name)}: no such folder")
    if not 0 <= args.process < args.processes:
        raise UserError(f"--process {args.process} must be at least 0 and below --processes {args.processes}")
    if args.batch < 1 or args.max_new_tokens < 1:
        raise UserError("--batch and --max-new-tokens must be at least 1")
    parent = os.path.dirname(os.path.abspath(args.out))
    os.makedirs(parent, exist_ok=True)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Record], None]]:
    """A bar on stderr that advances by a study."""
    columns = (TextColumn("studies"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda record: progress.advance(task)


def _report(args: Args, problems: list, complete: bool) -> None:
    if problems:
        path = f"{args.out}.skipped.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"where": p.where, "what": p.what}) + "\n" for p in problems)
        skipped = len({problem.where for problem in problems})
        common.notice(f"{skipped} record{'s were' if skipped != 1 else ' was'} skipped; {path} says which and why")
    if complete:
        print(args.out)
    else:
        common.notice(f"this process is done; {args.out} is written by the last process to finish")
