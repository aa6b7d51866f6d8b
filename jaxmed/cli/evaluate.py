"""`jaxmed evaluate X_vqa.json --records J --out DIR`: scores.json, scores.csv, report.html and a table on the terminal."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import rich
import rich.box
import rich.markup
import tyro
from rich.table import Table

from jaxmed.cli import common
from jaxmed.data.records import Reading, load_records
from jaxmed.data.volumes import Override
from jaxmed.errors import BadRecords, UserError
from jaxmed.evaluate import scores as scoring
from jaxmed.evaluate import studies as pairing
from jaxmed.evaluate import text
from jaxmed.report import evaluation

HELP = "Score generated reports against the references; writes scores.json, scores.csv and report.html"

SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class Args:
    answers: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="X_vqa.json")]
    """The file that `jaxmed generate` wrote"""
    records: str
    """JSON of the records it was written from; their answers are the references"""
    out: str
    """Folder for scores.json, scores.csv and report.html"""
    control: str = ""
    """A second *_vqa.json: the same studies written with wrong images (`jaxmed generate … --control shuffled`)"""
    control_kind: Literal["", "shuffled", "zeros", "noise"] = ""
    """What the control's images were; "": as the header beside its file says"""
    volumes: str = ""
    """Folder of NIfTI volumes; the page then shows three slices of a study"""
    metadata: str = ""
    """CT-RATE's metadata CSV, for the slices' Hounsfield units"""
    hu: Override = "auto"
    """Which rule gives the slices' Hounsfield units"""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A record that cannot be used: stop and list them all, or go on without (listed in OUT/skipped.jsonl)"""
    resamples: int = scoring.RESAMPLES
    """Resamples of the studies behind the 95% intervals"""
    seed: int = 0
    """Seed of the resamples"""
    page: evaluation.PageLimits = field(default_factory=evaluation.PageLimits)


def written_with(path: str) -> str | None:
    """What the header beside a file of `jaxmed generate` says: the kind of control, "" for none, None without a header."""
    try:
        kind = json.loads(Path(f"{path}.header.json").read_text(encoding="utf-8"))["control"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kind if isinstance(kind, str) else None


def _control(args: Args, studies: list[pairing.Study], notices: list[str]) -> tuple[list[tuple[str, ...]] | None, str]:
    """The control's answers and its kind; what the headers say against it becomes a notice."""
    if scored := written_with(args.answers):
        notices.append(f"{args.answers} was itself written with wrong images ({scored}), says its header")
    if not args.control:
        return None, ""
    found = written_with(args.control)
    if found == "":
        notices.append(f"{args.control} was written with the right images, says its header: it is no control")
    return pairing.control_answers(args.control, studies), args.control_kind or found or ""


def evaluate(args: Args, extra: Mapping[str, Mapping[str, Any]] | None = None) -> scoring.Scores:
    """Scores, writes the three files and prints the table. `extra`: named figures that the page shows as further tables,
    {title: {row: number or text, or {column: number or text}}}."""
    if args.resamples < 1:
        raise UserError(f"--resamples is {args.resamples}; give at least 1")
    # where an image would stand in the text is nothing to a score
    table = args.records.lower().endswith(".csv")
    records, problems = load_records(args.records, Reading("prepend", placeholders=table))
    if problems and args.on_bad_record == "stop":
        raise BadRecords(problems)
    studies, notices = pairing.pair(pairing.read_answers(args.answers), records, args.answers)
    if problems:
        count = f"{len(problems)} record{'s' if problems[1:] else ''}"
        notices.append(f"{count} cannot be used, {Path(args.out) / SKIPPED} says which and why; the first: {problems[0]}")
    control, kind = _control(args, studies, notices)
    if not text.meteor_available():
        notices.append("METEOR is left out: nltk's WordNet is not installed here, and nothing is downloaded.")
    scores = scoring.score(studies, control, kind, args.resamples, args.seed)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        scoring.write_json(out / "scores.json", scores)
        scoring.write_csv(out / "scores.csv", studies, scores)
        if problems:
            rows = (json.dumps({"where": problem.where, "what": problem.what}) + "\n" for problem in problems)
            (out / SKIPPED).write_text("".join(rows), encoding="utf-8")
        facts = [("Studies", f"{len(studies):,}"), ("Answers", args.answers), ("Records", args.records)]
        facts += [("Control", f"{args.control}{f' ({kind})' if kind else ''}")] if args.control else []
        options = evaluation.PageOptions(args.volumes, args.metadata, args.hu, args.page)
        title = f"Evaluation of {Path(args.answers).name}"
        notices += evaluation.write_page(out / "report.html", studies, scores, title, facts, notices, options, extra)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out or free space") from error
    _print(scores, notices, out)
    return scores


def _print(scores: scoring.Scores, notices: list[str], out: Path) -> None:
    control = scores.control
    table = Table(title=f"{len(scores.per_study):,} studies", title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("score", no_wrap=True)
    for name in ("corpus", "95% interval", "always the\ncommonest"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("wrong\nimages", "drop", "95% interval") if control else ():
        table.add_column(name, justify="right", no_wrap=True)
    for name, value in scores.corpus.items():
        low, high = scores.intervals[name]
        row = [evaluation.LABELS[name], f"{value:.3f}", f"{low:.2f} to {high:.2f}", f"{scores.always_commonest[name]:.3f}"]
        if control:
            d_low, d_high = control.intervals[name]
            row += [f"{control.corpus[name]:.3f}", f"{control.drop[name]:.3f}", f"{d_low:.2f} to {d_high:.2f}"]
        table.add_row(*row)
    rich.print(table)
    for line in evaluation.verdicts(scores):
        rich.print(f"[bold]{line.head}[/bold]", line.text)
    for notice in notices:
        rich.print("[dim]Notice:[/dim]", rich.markup.escape(notice))
    rich.print(f"Wrote {rich.markup.escape(str(out))}/scores.json, scores.csv and report.html")


def run(argv: list[str]) -> int:
    evaluate(common.parse(Args, argv, prog="jaxmed evaluate", description=HELP))
    return 0
