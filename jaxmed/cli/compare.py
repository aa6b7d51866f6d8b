"""`jaxmed evaluate A.json B.json ... --records J --out DIR`: comparison.json, comparison.csv, comparison.html and a table."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import rich
import rich.markup

from jaxmed.cli import scoring
from jaxmed.cli.evaluate import Args, read_records, score_table, skipped_notices, write_skipped
from jaxmed.data.records import Record
from jaxmed.errors import Problem, UserError
from jaxmed.evaluate import compare as comparing
from jaxmed.evaluate import parts as parting
from jaxmed.evaluate import scores as scored
from jaxmed.evaluate import studies as pairing
from jaxmed.evaluate.compare import Comparison, Run
from jaxmed.report import comparison, evaluation

_LABEL = 12
"""Characters of a score's name in a line of the table, which then fits into 80 columns"""


def compare(args: Args) -> list[Comparison]:
    """Scores all files on the studies that they share, writes three files and prints a table a comparison."""
    if args.resamples < 1:
        raise UserError(f"--resamples is {args.resamples}; give at least 1")
    if args.control:
        raise UserError("--control goes with one file of answers; to see what a wrong image costs, evaluate each by itself")
    out, paths = Path(args.out), [args.answers, *args.others]
    records, problems = read_records(args)
    runs, notices = _score(args, paths, records, problems, out)
    found = [comparing.compare(runs[0], run) for run in runs[1:]]
    try:
        out.mkdir(parents=True, exist_ok=True)
        content = comparing.to_json(runs, found, args.resamples)
        (out / "comparison.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _write_csv(out / "comparison.csv", runs)
        write_skipped(out, problems)
        facts = [("Scored", scored.counted(runs[0].scores)), ("Records", args.records)]
        facts += [(run.name, run.path) for run in runs]
        options = evaluation.PageOptions(args.volumes, args.metadata, args.hu, args.page)
        comparison.write_page(out / "comparison.html", runs, found, facts, notices, options, args.resamples)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out or free space") from error
    _print(runs, found, notices, out)
    return found


def _score(
    args: Args, paths: Sequence[str], records: list[Record], problems: list[Problem], out: Path
) -> tuple[list[Run], list[str]]:
    """Every file scored alike, and notices; problems of the judge join `problems`."""
    paired = [pairing.pair(pairing.read_answers(path), records, path) for path in paths]
    studies, notices = comparing.shared([(path, found) for path, (found, _) in zip(paths, paired, strict=True)])
    notices = list(dict.fromkeys([notice for _, more in paired for notice in more] + notices))
    unusable = len(problems)
    judging = scoring.Judging(args.scores, out, args.on_bad_record == "skip", notices)
    scorers, _ = scoring.scorers(args.scores, notices)
    runs = []
    for name, path, own in zip(names(paths), paths, studies, strict=True):
        judged, unjudged = judging.of(own, path)
        problems += unjudged
        scores = scored.score(own, None, "", args.resamples, args.seed, scorers)
        rule = scoring.choice_rule(args.scores)
        parts = parting.parts(own, scores.statistics, judged, rule, args.resamples, args.seed)
        runs.append(Run(name, path, own, scores, parts))
    judging.finish()
    notices += scored.few_notice(runs[0].scores)
    notices += skipped_notices(problems[:unusable], problems[unusable:], out)
    return runs, notices


def names(paths: Sequence[str]) -> list[str]:
    """What files are called: their own names, with their folders' where those are the same, else numbered."""
    short = [Path(path).name.removesuffix(".json").removesuffix("_vqa") for path in paths]
    if len(set(short)) < len(short):
        short = [f"{Path(path).resolve().parent.name}/{name}" for path, name in zip(paths, short, strict=True)]
    if len(set(short)) < len(short):
        short = [f"{name} ({place})" for place, name in enumerate(short, 1)]
    return short


def _write_csv(path: Path, runs: Sequence[Run]) -> None:
    """One row a study, each score of every run."""
    tables = [comparing.per_study(run) for run in runs]
    columns = [(f"{name} {run.name}", table[name]) for name in tables[0] for run, table in zip(runs, tables, strict=True)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["id", "image", "region", "question_type", *(head for head, _ in columns), "reference", *(r.name for r in runs)]
        )
        for i, study in enumerate(runs[0].studies):
            row = [study.id, study.image, study.region, study.question_type]
            row += [f"{values[i]:.6f}" if values[i] == values[i] else "" for _, values in columns]
            writer.writerow([*row, "\n".join(study.references), *("\n".join(run.studies[i].answers) for run in runs)])


def _print(runs: Sequence[Run], found: Sequence[Comparison], notices: list[str], out: Path) -> None:
    first = runs[0]
    for one in found:
        title = rich.markup.escape(f"B {one.run.name} against A {first.name}, {scored.counted(first.scores)}")
        table = score_table(title, "score", "A", "B", "B − A", "95% interval", "p", "won/even/lost")
        for name in comparison.shown(first, one):
            difference = one.all[name]
            low, high = difference.interval
            values = [f"{run.parts.figures[name].value:.3f}" for run in (first, one.run)]
            counts = [difference.wins, difference.ties, difference.losses]
            row = [*values, f"{difference.value:+.3f}", f"{low:+.3f} to {high:+.3f}", comparison.p_value(difference.p)]
            label = evaluation.LABELS[name]  # long ones in two lines: a narrow terminal would cut figures off
            table.add_row(
                label if len(label) <= _LABEL else label.replace(" ", "\n"),
                *row,
                "/".join(map(str, counts)) if sum(counts) else "",
            )
        rich.print(table)
    for line in comparison.verdicts(runs, found):
        rich.print(f"[bold]{rich.markup.escape(line.head)}[/bold]", rich.markup.escape(line.text))
    for notice in notices:
        rich.print("[dim]Notice:[/dim]", rich.markup.escape(notice))
    rich.print(f"Wrote {rich.markup.escape(str(out))}/comparison.json, comparison.csv and comparison.html")
