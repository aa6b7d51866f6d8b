"""`jaxmed retrieve RUN_OR_FOLDER --records J --volumes DIR --out F.json`: who finds its partner, volumes and reports."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from jaxmed.cli import common
from jaxmed.data.records import where
from jaxmed.errors import Problem, UserError
from jaxmed.evaluate.retrieval import PLACES, Retrieval, retrieval

HELP = "Find reports by volumes and volumes by reports with a contrastive model; writes recalls and rankings"

DESCRIPTION = """Rank the reports for every volume and the volumes for every report with a run of contrastive pretraining, or a
folder of M3D-CLIP, and count who finds its partner among the first k. Where texts repeat, a second count takes any candidate
with the query's own words. Chance is what a model finds that sees nothing.

    jaxmed retrieve runs/clip --records M3D_Cap.json:test --volumes M3D/ --limit 2000 --out retrieval.json"""
NEAREST = 10
"""Places of each ranking that are written"""


@dataclass(frozen=True)
class Args:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FOLDER")]
    """A run of `jaxmed train m3d_clip`, or a folder of M3D-CLIP"""
    records: str
    """Records whose image is the volume and whose last answer the report, as training reads them"""
    volumes: str
    """Folder of the volumes"""
    out: str
    """JSON file for recalls, for each pair its ranks and what came first, and what was left out"""
    places: tuple[int, ...] = PLACES
    """The k of recall at k"""
    limit: int = 0
    """Pairs from the beginning of the records (0: all); the more candidates, the harder"""
    max_length: int = 0
    """Tokens at which a report is cut or shortened (0: as the run was trained; of a folder: as many as its text encoder has)"""
    batch: int = 8
    """Volumes at once on each device"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the computation"""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A record that is no pair of a volume and a report, or whose volume cannot be used: stop, or go on without"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE for what no file says, such as vision.heads=12"""


def run(argv: list[str]) -> int:
    retrieve(common.parse(Args, argv, prog="jaxmed retrieve", description=DESCRIPTION))
    return 0


def retrieve(args: Args) -> dict[str, float]:
    """-> the recalls; prints them and writes the file."""
    from jaxmed import api
    from jaxmed.data.pairs import scan_pairs

    if any(k < 1 for k in args.places) or not args.places:
        raise UserError(f"--places {args.places}: give whole numbers from 1 on, such as 1 5 10")
    if not os.path.isdir(args.volumes):
        raise UserError(f"--volumes {args.volumes}: no such folder")
    model = api.load(args.model, dtype=args.dtype, overrides=common.settings(args.set))
    if not isinstance(model, api.ContrastiveModel):
        raise UserError(f"{args.model}: is no contrastive model; give a run of m3d_clip or M3D-CLIP's folder")
    pairs = scan_pairs(_reading(args, model), model.tokenizer, args.records)
    whole = pairs.samples[: args.limit or None]
    texts = [pairs.text(index, (-1, index, 0)) for index in range(len(whole))]
    kept, images, vectors, problems = _vectors(args, model, pairs.experiment.data.max_length, whole, texts)
    samples, problems = [whole[index] for index in kept], [*pairs.problems, *problems]
    if not samples:
        raise UserError(f"{args.records}: no volume can be used; the first: {problems[0]}")
    found = {"": retrieval(images, vectors, args.places)}
    words = [pair.text for pair in samples]
    if len({text.strip() for text in words}) < len(words):
        found["same_"] = retrieval(images, vectors, args.places, words)
    recalls = {f"{k[:4]}{name}{k[4:]}": v for name, result in found.items() for k, v in result.recalls.items()}
    _write(args.out, recalls, found[""], [pair.record.id for pair in samples], problems)
    _show(args, found, words, problems)
    return recalls


def _reading(args: Args, model: Any) -> Any:
    """The experiment as whose held-out set the records are read."""
    from jaxmed.checkpoint.adapter import run_experiment
    from jaxmed.checkpoint.encoder_folders import contrastive_experiment
    from jaxmed.checkpoint.folder_kinds import is_run

    own = run_experiment(args.model) if is_run(args.model) else contrastive_experiment(model.folder)
    data = dataclasses.replace(
        own.data, volumes=args.volumes, on_bad_record=args.on_bad_record, max_length=args.max_length or own.data.max_length
    )
    return dataclasses.replace(own, data=data, visual=model.visual)


def _vectors(
    args: Args, model: Any, length: int, samples: Sequence[Any], texts: list[str]
) -> tuple[list[int], np.ndarray, np.ndarray, list[Problem]]:
    """Indices of the pairs that can be used, vectors of their volumes and of their texts, [N, P] each, and the others, with a
    line of progress."""
    kept: list[int] = []
    images: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    problems: list[Problem] = []
    step = args.batch * model.rows
    for start in range(0, len(samples), step):
        rows = range(start, min(start + step, len(samples)))
        inputs = {index: values for index in rows if (values := _input(args, model, samples[index], problems)) is not None}
        if inputs:
            kept += inputs
            images += model.image_features(list(inputs.values()))
            vectors += model.text_features([texts[index] for index in inputs], max_length=length)
        if len(samples) > 10 * step:
            common.notice(f"{rows.stop:,} of {len(samples):,} pairs")
    return kept, np.array(images), np.array(vectors), problems


def _input(args: Args, model: Any, pair: Any, problems: list[Problem]) -> np.ndarray | None:
    """The volume of a pair [D, H, W]; None, and a problem more, where its values cannot be used."""
    try:
        return model.preprocess(pair.path)[..., 0]
    except UserError as error:
        problem = Problem(where(pair.record), str(error))
        if args.on_bad_record == "stop":
            raise UserError(f"{problem}; or pass --on-bad-record skip to go on without it") from None
        problems.append(problem)
        return None


def _show(args: Args, found: dict[str, Retrieval], words: list[str], problems: list[Problem]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"{len(words):,} pairs", title_justify="left")
    table.add_column("recall")
    for k in args.places:
        table.add_column(f"at {k}", justify="right")
    names = {"i2t": "volume finds its report", "t2i": "report finds its volume"}
    for name, result in found.items():
        for direction, text in names.items():
            label = f"{text}{', any with the same words' if name else ''}"
            table.add_row(label, *(f"{result.recalls[f'{direction}_r{k}']:.3f}" for k in args.places))
    table.add_row("chance", *(f"{min(k / len(words), 1):.3f}" for k in args.places))
    Console(highlight=False).print(table)
    if problems:
        many = len(problems) > 1
        common.notice(f"{len(problems)} record{'s' * many} left out; {args.out} says which; the first: {problems[0]}")


def _write(path: str, recalls: dict[str, float], found: Retrieval, ids: list[str], problems: list[Problem]) -> None:
    rows = []
    for number, name in enumerate(ids):
        row: dict[str, Any] = {"id": name}
        for direction, ranking in (("i2t", found.ranking_i2t), ("t2i", found.ranking_t2i)):
            row[f"rank_{direction}"] = 1 + int(np.flatnonzero(ranking[number] == number)[0])
            row[f"nearest_{direction}"] = [ids[i] for i in ranking[number, :NEAREST]]
        rows.append(row)
    left_out = [dataclasses.asdict(problem) for problem in problems]
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump({"recalls": recalls, "pairs": rows, "left_out": left_out}, file, indent=1, ensure_ascii=False)
            file.write("\n")
        os.replace(f"{path}.part", path)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); give another file") from error
