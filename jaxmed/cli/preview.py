"""`jaxmed preview CONFIG --data.records J --out page.html`: shows training samples as the model gets them, before training."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxmed.cli import common
from jaxmed.cli.configured import with_hounsfield
from jaxmed.cli.validate import given_flags, resolve
from jaxmed.config import Experiment
from jaxmed.data.dataset import sample_draw
from jaxmed.data.inputs import FOLDERS, input_folder
from jaxmed.data.metadata import Metadata
from jaxmed.data.sizes import Progress as Callback
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.data.volumes import Override, read_volume
from jaxmed.errors import Problem, UserError
from jaxmed.report import preview, preview_pairs
from jaxmed.report.slices import VolumeFolder
from jaxmed.report.survey import Survey, check_values, survey
from jaxmed.report.survey_pairs import PairSurvey, survey_pairs

HELP = "Show training samples as the model gets them: tokens, labels, buckets, slices, Hounsfield units; or pairs; as a page"


@dataclass(frozen=True)
class Args(Experiment):
    out: str = "preview.html"
    """The page"""
    rows: str = ""
    """Records to show, by their index in the file: 0,3,7 or 10-14; "": some by lot"""
    random: int = 8
    """Records chosen by lot where --rows is not given"""
    seed: int = 0
    """Seed of the lot"""
    volumes: str = ""
    """Folder of the volumes (else --data.volumes), beside token files: shows slices, histogram and the Hounsfield rule, or what
    the tower got that made the tokens"""
    metadata: str = ""
    """CT-RATE's metadata CSV: spacing and rescale of the volumes"""
    hu: Override = "auto"
    """Which rule gives the Hounsfield units: the one that has air, or this"""
    check_values: bool = False
    """Read every image's file (and volume) for NaN and other damage that headers do not show; exit code 1 if there is any"""


def parse_rows(text: str) -> tuple[int, ...]:
    """`0,3,10-14` -> (0, 3, 10, 11, 12, 13, 14)"""
    rows: list[int] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last.isdigit() or part.isdigit())):
            raise UserError(f"--rows is {text!r}; give indices and ranges, such as 0,3,10-14")
        rows += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(rows))


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Callback]:
    """A bar on stderr that is there only while there is something to wait for."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _tokenizer(args: Args) -> Tokenizer:
    folder = args.model.tokenizer or args.model.base
    if not folder:
        raise UserError("preview needs a tokenizer: give --model.base DIR (or --model.tokenizer DIR, its folder)")
    return Tokenizer.from_folder(folder, args.model.added_tokens, args.model.pad_token)


def _volumes(args: Args) -> preview.Volumes | None:
    folder = args.volumes or args.data.volumes
    # What a tower reads, or has read, is shown as it gets it, not as the CT that `encode` describes.
    if not folder or args.model.tower.kind != "none" or args.visual.kind in ("volumes", "slices"):
        return None
    return preview.Volumes(VolumeFolder(folder), Metadata(args.metadata) if args.metadata else None, args.hu)


def _check(args: Args, found: Survey | PairSurvey, volumes: preview.Volumes | None) -> list[Problem]:
    def fault(image: str) -> str:
        path = volumes.folder.find(image)
        try:
            if path:
                read_volume(path, volumes.metadata.of(path) if volumes.metadata else None, volumes.hu)
        except UserError as error:
            return str(error)
        return "" if path else f"{image} is not in {volumes.folder.folder}"

    with _progress("values") as progress:
        return check_values(found, args, fault if volumes else None, progress)


def run(argv: list[str]) -> int:
    config, flags = common.split_config(argv, "preview")
    experiment = common.load_experiment(config)
    known = {field.name: getattr(experiment, field.name) for field in dataclasses.fields(Experiment)}
    args = common.parse(
        Args, common.long_forms(flags), prog=f"jaxmed preview {config}", description=HELP, default=Args(**known)
    )
    if not args.data.records:
        raise UserError("preview needs records: give --data.records FILE.json")
    pairs = args.task == "contrastive"
    if pairs or args.model.base or args.model.adapter:  # what folders decide in training; without one, the config alone
        args, notices = resolve(args, given_flags(common.long_forms(flags)))
        for text in notices:
            common.notice(text)
    folder = input_folder(args.data, args.visual)
    if folder and not os.path.isdir(folder):
        raise UserError(f"--data.{FOLDERS[args.visual.kind]} {folder}: no such folder")
    wanted = parse_rows(args.rows)
    if args.random < 0:
        raise UserError(f"--random is {args.random}; it must not be negative")
    tokenizer, volumes = _tokenizer(args), _volumes(args)
    if args.volumes and not volumes:
        args = dataclasses.replace(args, data=dataclasses.replace(args.data, volumes=args.volumes))
    if args.model.tower.kind != "none":
        args = dataclasses.replace(args, visual=with_hounsfield(args.visual, args.metadata, args.hu))
    with _progress("records") as progress:
        found = (survey_pairs if pairs else survey)(args, tokenizer, args.data.records, progress)
    rows = preview.choose(found, wanted, args.random, args.seed)
    values = _check(args, found, volumes) if args.check_values else None
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        if pairs:
            preview_pairs.write_page(args.out, args, tokenizer, found, rows, values, config)
        else:
            preview.write_page(args.out, args, tokenizer, found, rows, volumes, values, config)
    except OSError as error:
        raise UserError(f"{args.out} cannot be written ({error.strerror}); choose another --out or free space") from error
    _report(args, found, values)
    return 1 if values else 0


def _report(args: Args, found: Survey | PairSurvey, values: list[Problem] | None) -> None:
    total = len(found.rows) + len(found.unreadable)
    usable = total - len(found.refused) - len(found.voided)
    print(f"{usable:,} of {total:,} records can be trained on")
    if draw := sample_draw([row.record for row in found.rows if row.usable], args.data.records, args):
        print(draw.describe())
    for line in found.described() if isinstance(found, PairSurvey) else ():
        print(line)
    sections = [("voided (no token is supervised)", found.voided), ("cannot be used", found.refused)]
    sections += [("with damaged files", values)] if values is not None else []
    for label, problems in sections:
        if problems:
            print(f"{len(problems):,} {label}:")
            for problem in problems[: preview.LISTED]:
                print(f"  {problem}")
            if len(problems) > preview.LISTED:
                print(f"  and {len(problems) - preview.LISTED:,} more")
    if values == []:
        print("the values of all files are sound")
    print(f"Wrote {args.out}")
