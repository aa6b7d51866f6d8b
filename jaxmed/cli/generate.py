"""`jaxmed generate FOLDER --records J --embeddings DIR --out X_vqa.json`: reports for a whole data set, resumable."""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxmed.cli import common
from jaxmed.config import Experiment, MeshConfig
from jaxmed.data.conversation import reading_of
from jaxmed.data.inputs import FOLDERS, input_folder
from jaxmed.data.record_files import records_file
from jaxmed.data.records import Reading, Record, load_records, where
from jaxmed.errors import UserError
from jaxmed.preemption import Preemption, listening

HELP = "Write reports and answers for a data set"

DESCRIPTION = """Write an answer for every human turn of every record, greedily unless --temperature is above 0.

FOLDER is a run of `jaxmed train`, an upstream folder (LLaVA, TinyLLaVA, M3D-LaMed, SAMF; merged, or an adapter with --base), or
a Hugging Face language model. The folder of the image files is --embeddings, --images or --volumes, as the model reads.

Records about the same images are answered together: the images, and what the prompts begin with alike, go through the model
once for up to --batch of them. The counts at the end say what that saved.

Each finished record is on disk at once; started again, the same command does only what is missing. Asked to end (SIGTERM), it
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
    answers: Literal["generated", "likelihood"] = "generated"
    """How questions with options are answered: by writing, or by the likelihood of each option (nothing is generated for them,
    and the result has their probabilities)"""
    likelihood: Literal["letters", "options", "texts"] = "letters"
    """With --answers likelihood, of what: the letter, letter and text as in M3D's targets, or the option's text alone"""
    per_token: bool = False
    """With --answers likelihood: the mean over an option's tokens in place of their sum, so that long ones do not lose"""
    calibration: Literal["none", "batch"] = "none"
    """With --answers likelihood: divide each letter's probability by its mean over the set (batch calibration, arXiv
    2309.17249). It is applied to the finished file alone: the same command with another choice only writes that anew"""
    submission: str = ""
    """AMOS-MM: the challenge's file, --records' entries with the findings written here and a prediction a question"""
    submission_with: tuple[str, ...] = ()
    """Results of earlier runs over the same entries that go into --submission too, such as the other task's"""
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
    from jaxmed.generate.engine import counted
    from jaxmed.generate.journal import Journal
    from jaxmed.generate.request import Request, check_records
    from jaxmed.generate.sampling import Sampling
    from jaxmed.generate.studies import Writer, finish, studies_of
    from jaxmed.generate.submission import write_submission
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
        args.likelihood if args.answers == "likelihood" else None,
        args.per_token,
    )
    skip = args.on_bad_record == "skip"
    usable, problems = check_records(records, problems, request, model, skip)
    journal = Journal(args.out, request.header(model), args.process)
    # shares of all studies, not of the missing ones: another process may have begun a while ago
    share = studies_of(usable, request)[args.process :: args.processes]
    missing = sum(record.id not in journal.done for study in share for record in study)
    done = sum(record.id in journal.done for record in usable)
    common.notice(f"{args.out}: {done} of {len(usable)} records are done, {missing} are this process's")
    try:
        if missing:
            writer = Writer(model, request, args.batch)
            with _progress(missing) as advance, preemption.holding():
                leave = partial(preemption.leave_if_reached, ASKED_TO_END)
                problems += writer.run(share, usable, journal, skip, advance, leave)
            common.notice(counted(model.engine.counts))
    finally:
        journal.close()
    bad = {problem.where for problem in problems}
    kept = [record for record in usable if where(record) not in bad]
    written = finish(journal, kept, partial(_calibrated, args, kept))
    _report(args, problems, written is not None)
    if written is not None and args.submission:
        write_submission(args.submission, args.records, [*args.submission_with, args.out], records)
        print(args.submission)
    return 0


def _calibrated(args: Args, records: Sequence[Record], entries: list[Any]) -> list[Any]:
    from jaxmed.generate.choices import calibrate

    if args.calibration == "none":
        return entries
    made, notices = calibrate(entries, {record.id: record.options for record in records})
    for text in notices:
        common.notice(text)
    return made


def _reading(experiment: Experiment, defects: Collection[str]) -> Reading:
    """Upstream's scripts for 2-D images show the image whether or not the question names its place."""
    reading = reading_of(experiment, frozenset(defects))
    reading = replace(reading, unanswered=reading.placeholders)  # a test set has no reports
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
    if not os.path.isfile(records_file(args.records)):
        raise UserError(f"--records {args.records}: no such file")
    for name in ("embeddings", "images", "volumes"):
        if getattr(args, name) and not os.path.isdir(getattr(args, name)):
            raise UserError(f"--{name} {getattr(args, name)}: no such folder")
    if not 0 <= args.process < args.processes:
        raise UserError(f"--process {args.process} must be at least 0 and below --processes {args.processes}")
    if args.answers != "likelihood" and (args.per_token or args.calibration != "none" or args.likelihood != "letters"):
        raise UserError("--likelihood, --per-token and --calibration belong to --answers likelihood; add that")
    if args.submission_with and not args.submission:
        raise UserError("--submission-with: belongs to --submission, the file to be written")
    for path in args.submission_with:
        if not os.path.isfile(path):
            raise UserError(f"--submission-with {path}: no such file")
    if args.batch < 1 or args.max_new_tokens < 1:
        raise UserError("--batch and --max-new-tokens must be at least 1")
    parent = os.path.dirname(os.path.abspath(args.out))
    os.makedirs(parent, exist_ok=True)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Record], None]]:
    """A bar on stderr that advances by a record."""
    columns = (TextColumn("records"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
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
