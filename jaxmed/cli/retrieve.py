"""`jaxmed retrieve RUN_OR_FOLDER --records J --volumes DIR --out F.json`: who finds its partner, volumes and reports."""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from jaxmed.cli import common
from jaxmed.errors import UserError
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
    """JSON file for recalls, and for each pair its ranks and what came first"""
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
    """A record that is no pair of a volume and a report: stop and list them all, or go on without"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE for what no file says, such as vision.heads=12 (repeatable)"""


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
    samples = pairs.samples[: args.limit or None]
    texts = [pairs.text(index, (-1, index, 0)) for index in range(len(samples))]
    images, vectors = _vectors(args, model, pairs.experiment.data.max_length, samples, texts)
    found = {"": retrieval(images, vectors, args.places)}
    words = [pair.text for pair in samples]
    if len({text.strip() for text in words}) < len(words):
        found["same_"] = retrieval(images, vectors, args.places, words)
    _show(args, found, words, len(pairs.problems))
    recalls = {f"{k[:4]}{name}{k[4:]}": v for name, result in found.items() for k, v in result.recalls.items()}
    _write(args.out, recalls, found[""], [pair.record.id for pair in samples])
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


def _vectors(args: Args, model: Any, length: int, samples: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of volumes and of texts, [N, P] each, with a line of progress."""
    images, vectors = [], []
    step = args.batch * model.rows
    for start in range(0, len(samples), step):
        rows = slice(start, start + step)
        images += model.image_features([pair.path for pair in samples[rows]])
        vectors += model.text_features(texts[rows], max_length=length)
        if len(samples) > 10 * step:
            common.notice(f"{min(start + step, len(samples)):,} of {len(samples):,} pairs")
    return np.stack(images), np.stack(vectors)


def _show(args: Args, found: dict[str, Retrieval], words: list[str], left_out: int) -> None:
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
    if left_out:
        common.notice(f"{left_out} record{'s' * (left_out > 1)} left out, which are no pairs")


def _write(path: str, recalls: dict[str, float], found: Retrieval, ids: list[str]) -> None:
    rows = []
    for number, name in enumerate(ids):
        row: dict[str, Any] = {"id": name}
        for direction, ranking in (("i2t", found.ranking_i2t), ("t2i", found.ranking_t2i)):
            row[f"rank_{direction}"] = 1 + int(np.flatnonzero(ranking[number] == number)[0])
            row[f"nearest_{direction}"] = [ids[i] for i in ranking[number, :NEAREST]]
        rows.append(row)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump({"recalls": recalls, "pairs": rows}, file, indent=1, ensure_ascii=False)
            file.write("\n")
        os.replace(f"{path}.part", path)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); give another file") from error
