"""`jaxmed evaluate X_vqa.json --records J --out DIR`: scores.json, scores.csv, report.html and a table on the terminal.

With several files of answers to the same records, the runs are compared instead (jaxmed.cli.compare).
"""

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

from jaxmed.cli import common, scoring
from jaxmed.data.record_files import records_file
from jaxmed.data.records import Reading, Record, load_records
from jaxmed.data.volumes import Override
from jaxmed.errors import BadRecords, Problem, UserError
from jaxmed.evaluate import parts as parting
from jaxmed.evaluate import scores as scored
from jaxmed.evaluate import studies as pairing
from jaxmed.report import evaluation

HELP = (
    "Score generated reports and answers against the references, or compare runs; writes scores.json, scores.csv, report.html"
)

DESCRIPTION = """Score generated reports and answers; writes scores.json, scores.csv and report.html into --out.

Reports of regions and multiple choice are told from the records; GREEN needs a judge (--judge, --judge-requests), BERTScore an
encoder (--bertscore). With several files of answers to the same records the runs are compared, each with the first:
differences with intervals and p by paired resamples of the studies, wins and losses, and the studies where they differ most
(comparison.json, comparison.csv, comparison.html).

    jaxmed evaluate reports_vqa.json --records valid.json --out scores/
    jaxmed evaluate before_vqa.json after_vqa.json --records dataset.json:validation --out before_after/"""

SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class Args:
    answers: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="X_vqa.json")]
    """The file that `jaxmed generate` wrote"""
    records: str
    """File of the records it was written from, as `jaxmed generate` had it; their answers are the references"""
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
    resamples: int = scored.RESAMPLES
    """Resamples of the studies behind the 95% intervals"""
    seed: int = 0
    """Seed of the resamples"""
    others: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[Y_vqa.json ...]")] = ()
    """More such files, to compare them with the first"""
    page: evaluation.PageLimits = field(default_factory=evaluation.PageLimits)
    scores: Annotated[scoring.ScoringArgs, tyro.conf.arg(name="")] = field(default_factory=scoring.ScoringArgs)


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


def read_records(args: Args) -> tuple[list[Record], list[Problem]]:
    """The records, and those that cannot be used."""
    # where an image would stand in the text is nothing to a score
    table = records_file(args.records).lower().endswith(".csv")
    records, problems = load_records(args.records, Reading("prepend", placeholders=table))
    if problems and args.on_bad_record == "stop":
        raise BadRecords(problems)
    return records, problems


def evaluate(args: Args, extra: Mapping[str, Mapping[str, Any]] | None = None) -> scored.Scores:
    """Scores, writes the three files and prints the table. `extra`: named figures that the page shows as further tables,
    {title: {row: number or text, or {column: number or text}}}."""
    if args.resamples < 1:
        raise UserError(f"--resamples is {args.resamples}; give at least 1")
    out, skip = Path(args.out), args.on_bad_record == "skip"
    records, problems = read_records(args)
    studies, notices = pairing.pair(pairing.read_answers(args.answers), records, args.answers)
    control, kind = _control(args, studies, notices)
    rule = scoring.choice_rule(args.scores)
    judging = scoring.Judging(args.scores, out, skip, notices)
    scorers, encoder = scoring.scorers(args.scores, notices)
    judged, unjudged = judging.of(studies, args.answers)
    judging.finish()
    notices += skipped_notices(problems, unjudged, out)
    scores = scored.score(studies, control, kind, args.resamples, args.seed, scorers)
    notices += scored.few_notice(scores)
    parts = parting.parts(studies, scores.statistics, judged, rule, args.resamples, args.seed)
    choice_control = parting.control_of(studies, parts, control, args.resamples, args.seed) if control else None
    beside = evaluation.Beside(parts, choice_control, encoder, args.resamples)
    try:
        out.mkdir(parents=True, exist_ok=True)
        more = parting.to_json(parts, choice_control) | ({"bertscore": encoder} if encoder else {})
        scored.write_json(out / "scores.json", scores, more)
        scored.write_csv(out / "scores.csv", studies, scores, parting.columns(parts, studies))
        write_skipped(out, [*problems, *unjudged])
        facts = [("Scored", scored.counted(scores)), ("Answers", args.answers), ("Records", args.records)]
        facts += [("Control", f"{args.control}{f' ({kind})' if kind else ''}")] if args.control else []
        options = evaluation.PageOptions(args.volumes, args.metadata, args.hu, args.page)
        title = f"Evaluation of {Path(args.answers).name}"
        notices += evaluation.write_page(out / "report.html", studies, scores, title, facts, notices, options, extra, beside)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out or free space") from error
    _print(scores, beside, notices, out)
    return scores


def skipped_notices(records: list[Problem], judged: list[Problem], out: Path) -> list[str]:
    """What is left out, and where it is told."""
    notices = []
    for found, one, many in (
        (records, "record cannot be used", "records cannot be used"),
        (judged, "answer could not be judged", "answers could not be judged"),
    ):
        if found:
            where = f"{out / SKIPPED} says which and why; the first: {found[0]}"
            notices.append(f"{len(found)} {many if found[1:] else one}, {where}")
    return notices


def write_skipped(out: Path, problems: list[Problem]) -> None:
    if problems:
        rows = (json.dumps({"where": problem.where, "what": problem.what}) + "\n" for problem in problems)
        (out / SKIPPED).write_text("".join(rows), encoding="utf-8")


def _print(scores: scored.Scores, beside: evaluation.Beside, notices: list[str], out: Path) -> None:
    parts = beside.parts
    if parts.closed is None or parts.figures[parting.ACCURACY].studies < len(scores.per_study):
        _print_texts(scores)
    _print_parts(parts)
    for line in evaluation.verdicts(scores, parts=parts, choice_control=beside.choice_control):
        rich.print(f"[bold]{line.head}[/bold]", rich.markup.escape(line.text))
    for notice in notices:
        rich.print("[dim]Notice:[/dim]", rich.markup.escape(notice))
    rich.print(f"Wrote {rich.markup.escape(str(out))}/scores.json, scores.csv and report.html")


def score_table(title: str, *columns: str) -> Table:
    """Names on the left, figures on the right."""
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    return table


def _print_texts(scores: scored.Scores) -> None:
    control = scores.control
    more = ("wrong\nimages", "drop", "95% interval") if control else ()
    table = score_table(
        scored.counted(scores),
        "score",
        "corpus",
        "95% interval",
        "always the\ncommonest",
        *more,
    )
    for name, value in scores.corpus.items():
        low, high = scores.intervals[name]
        row = [evaluation.LABELS[name], f"{value:.3f}", f"{low:.2f} to {high:.2f}", f"{scores.always_commonest[name]:.3f}"]
        if control:
            d_low, d_high = control.intervals[name]
            row += [f"{control.corpus[name]:.3f}", f"{control.drop[name]:.3f}", f"{d_low:.2f} to {d_high:.2f}"]
        table.add_row(*row)
    rich.print(table)


def _print_parts(parts: parting.Parts) -> None:
    """Regions and types as lines, scores as columns; then what judges said of all."""
    for group in evaluation.group_tables(parts):
        columns = (column.replace(" ", "\n") for column in group["columns"])
        table = score_table(group["title"], group["first"].lower(), "n", *columns)
        for name, size, cells in group["rows"]:
            table.add_row(rich.markup.escape(name), f"{size:,}", *(f"{cell['value']:.3f}" if cell else "" for cell in cells))
        rich.print(table)
    for one in parts.judged:
        if one.measure in parts.figures:
            figure = parts.figures[one.measure]
            (low, high), label = figure.interval, evaluation.LABELS[one.measure]
            said = f"{one.answered:,} of {one.asked:,} answers judged by {rich.markup.escape(one.judge)}"
            rich.print(f"[bold]{label}[/bold] {figure.value:.3f}, 95% interval {low:.3f} to {high:.3f}; {said}")


def run(argv: list[str]) -> int:
    args = common.parse(Args, argv, prog="jaxmed evaluate", description=DESCRIPTION)
    if args.others:
        # imported late: it imports this module
        from jaxmed.cli.compare import compare

        compare(args)
    else:
        evaluate(args)
    return 0
