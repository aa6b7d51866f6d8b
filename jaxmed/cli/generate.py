"""`jaxmed generate FOLDER --records J --embeddings DIR --out X_vqa.json`: reports for a whole data set, resumable."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxmed.cli import common
from jaxmed.cli.generate_args import Args, Asked, asked, check
from jaxmed.config import DistributedConfig
from jaxmed.data.records import Record, where
from jaxmed.distributed import initialise, is_first, leave, say, together
from jaxmed.errors import REQUEUE, Preempted, Problem
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

With --join the processes of a job hold one model together, which the devices of one host cannot: --mesh.* goes over the devices
of all. They find each other as those of `jaxmed train` do (SLURM, a TPU slice, JobSet, or the --distributed flags, which mean
--join). The death of one ends all, with 75; the same command, with as many processes as there are then, does the rest. Several
such jobs share the studies with --process and --processes, one index a job.

    jaxmed generate runs/btb3d --records valid.json --embeddings encoded/ --out reports_vqa.json"""

ASKED_TO_END = "asked to end; finished studies are on disk, the same command does the rest"


def run(argv: list[str]) -> int:
    args = common.parse(Args, argv, prog="jaxmed generate", description=DESCRIPTION)
    joined = args.join or args.distributed != DistributedConfig()
    if joined:
        initialise(args.distributed)
    try:
        with together():
            check(args)
        with listening() as preemption, preemption.nothing_to_lose(ASKED_TO_END):
            _run(args, preemption, jax.devices() if joined else jax.local_devices())
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if not isinstance(error, Preempted):
            leave(error)
        say(f"jaxmed generate: {error}")  # in all processes, before the same batch
        return REQUEUE
    return 0


def _run(args: Args, preemption: Preemption, devices: Sequence[jax.Device]) -> None:
    """`devices`: those that hold the model."""
    # imported late: --help and wrong flags need none of it
    from jaxmed.generate.engine import counted
    from jaxmed.generate.group import open_journal
    from jaxmed.generate.studies import Writer, studies_of
    from jaxmed.train.hosts import check_processes, fields_of

    with together():
        found = asked(args, devices)
    usable, problems = found.usable, found.problems
    read = found.header | {"ids": hashlib.sha256("\n".join(record.id for record in usable).encode()).hexdigest()}
    check_processes(fields_of(args) | {f"{name} (as read)": value for name, value in read.items()}, f"{args.out}.parts")
    journal = open_journal(args.out, found.header, args.process, [record.id for record in usable])
    # shares of all studies, not of the missing ones: another process may have begun a while ago
    share = studies_of(usable, found.request)[args.process :: args.processes]
    missing = sum(record.id not in journal.done for study in share for record in study)
    done = sum(record.id in journal.done for record in usable)
    who = "process" if jax.process_count() == 1 else "job"
    say(f"{args.out}: {done} of {len(usable)} records are done, {missing} are this {who}'s")
    try:
        if missing:
            writer = Writer(found.model, found.request, args.batch)
            with _progress(missing) as advance, preemption.holding():
                leave_here = partial(preemption.leave_if_reached, ASKED_TO_END)
                problems = problems + writer.run(share, usable, journal, args.on_bad_record == "skip", advance, leave_here)
            say(counted(found.model.engine.counts))
    finally:
        journal.close()
    with together():
        if is_first():
            _finish(args, found, journal, problems)


def _finish(args: Args, found: Asked, journal: Any, problems: Sequence[Problem]) -> None:
    """Writes the result where all studies are done, and tells what was skipped."""
    from jaxmed.generate.studies import finish
    from jaxmed.generate.submission import write_submission

    bad = {problem.where for problem in problems}
    kept = [record for record in found.usable if where(record) not in bad]
    written = finish(journal, kept, partial(_calibrated, args, kept))
    _report(args, problems, written is not None)
    if written is not None and args.submission:
        results, skip = [*args.submission_with, args.out], args.on_bad_record == "skip"
        empty = write_submission(args.submission, args.records, results, found.records, skip)
        if empty:
            _list_skipped(args, [*problems, *empty])
            common.notice(
                f"{args.submission} is not whole, {args.out}.skipped.jsonl lists {len(empty)} gaps; first: {empty[0]}"
            )
        print(args.submission)


def _calibrated(args: Args, records: Sequence[Record], entries: list[Any]) -> list[Any]:
    from jaxmed.generate.choices import calibrate

    if args.calibration == "none":
        return entries
    made, notices = calibrate(entries, {record.id: record.options for record in records})
    for text in notices:
        common.notice(text)
    return made


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Record], None]]:
    """A bar on stderr that advances by a record."""
    columns = (TextColumn("records"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not is_first()) as progress:
        task = progress.add_task("", total=total)
        yield lambda record: progress.advance(task)


def _list_skipped(args: Args, problems: Sequence[Problem]) -> str:
    path = f"{args.out}.skipped.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"where": p.where, "what": p.what}) + "\n" for p in problems)
    return path


def _report(args: Args, problems: Sequence[Problem], complete: bool) -> None:
    if problems:
        path = _list_skipped(args, problems)
        skipped = len({problem.where for problem in problems})
        common.notice(f"{skipped} record{'s were' if skipped != 1 else ' was'} skipped; {path} says which and why")
    if complete:
        print(args.out)
    else:
        common.notice(f"this process is done; {args.out} is written by the last process to finish")
