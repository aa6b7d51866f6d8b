"""`jaxmed quickstart`: the whole path on phantom chest CTs, through the very functions that real data goes through."""

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxmed.cli import common, evaluate, generate
from jaxmed.cli.encode import check_grid
from jaxmed.config import Experiment
from jaxmed.data.encode import encode_folder
from jaxmed.data.phantom_dataset import PhantomDataset, make_dataset
from jaxmed.data.phantom_reports import FindingScores, build_tokenizer, score_findings
from jaxmed.data.records import load_records
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import UserError
from jaxmed.generate.journal import write_json

HELP = "The whole path on a laptop: phantom CTs, tokens, training, reports, scores"

DESCRIPTION = """Make phantom chest CTs and reports, encode them, train a small model from scratch, write reports for held-out
phantoms, with their own volumes and with shuffled ones, and score both. Needs no network, no data and no accelerator.
Interrupted, the same command goes on where it stopped."""


@dataclass(frozen=True)
class Args:
    out: str = "quickstart"
    """Folder for everything that is made"""
    studies: int = 4000
    """Phantoms to train on"""
    held_out: int = 256
    """Phantoms to write reports for"""
    steps: int = 800
    """Training steps"""
    seed: int = 0
    """Seed of phantoms and model"""

    def __post_init__(self):
        for name, least in (("studies", 32), ("held_out", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")


class Clock:
    """Seconds of all calls together: those of earlier, interrupted ones are kept beside the data."""

    def __init__(self, out: str):
        self.path, self.last = os.path.join(out, "seconds.json"), time.monotonic()
        self.stages: dict[str, float] = {}
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                self.stages = json.load(file)

    def done(self, stage: str) -> None:
        now = time.monotonic()
        self.stages[stage] = round(self.stages.get(stage, 0.0) + now - self.last, 1)
        self.last = now
        write_json(self.path, self.stages)

    @property
    def total(self) -> float:
        return round(sum(self.stages.values()), 1)


def run(argv: list[str]) -> int:
    args: Args = common.parse(Args, argv, prog="jaxmed quickstart", description=DESCRIPTION)
    out = args.out
    finished = os.path.join(out, "summary.json")
    _open(args)
    print(
        f"jaxmed quickstart: {args.studies:,} phantom chest CTs with reports, a small model trained on them from scratch,\n"
        f"reports for {args.held_out} held-out phantoms, scored by finding. A few minutes on two cores; all goes to {out}/.",
        flush=True,
    )
    clock = Clock(out)
    data = make_dataset(os.path.join(out, "data"), {"train": args.studies, "test": args.held_out}, args.seed)
    clock.done("phantoms")
    experiment = describe(args, data)
    check_grid(experiment)
    encode_folder(data.volumes, experiment.data.embeddings, experiment.encode, data.metadata)
    clock.done("encoding")
    train(experiment, os.path.join(out, "run"))
    clock.done("training")
    answers = {kind: write_reports(out, experiment, data, kind) for kind in ("", "shuffled")}
    clock.done("reports")
    scores = {kind: findings(path, data) for kind, path in answers.items()}
    table = {
        name: {"own volume": f1, "shuffled volumes": scores["shuffled"].by_finding.get(name, 0.0)}
        for name, f1 in scores[""].by_finding.items()
    }
    asked = evaluate.Args(answers[""], data.records["test"], os.path.join(out, "scores"), control=answers["shuffled"])
    text = evaluate.evaluate(
        dataclasses.replace(asked, volumes=data.volumes, metadata=data.metadata), extra={"F1 by finding and side": table}
    )
    clock.done("scores")
    summary = {
        "finding_f1": scores[""].f1,
        "finding_f1_shuffled": scores["shuffled"].f1,
        "f1_by_finding": scores[""].by_finding,
        "bleu_4": text.corpus["bleu_4"],
        "seconds": clock.total,
        "seconds_by_stage": clock.stages,
        "studies": args.held_out,
    }
    write_json(finished, summary)
    report(out, summary, table)
    return 0


def _open(args: Args) -> None:
    """The folder belongs to one set of flags."""
    path = os.path.join(args.out, "quickstart.json")
    wanted = {k: v for k, v in dataclasses.asdict(args).items() if k != "out"}
    try:
        os.makedirs(args.out, exist_ok=True)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
            differ = [k for k in wanted if found.get(k) != wanted[k]]
            if differ:
                pairs = ", ".join(f"--{k.replace('_', '-')} {found.get(k)} there, {wanted[k]} now" for k in differ)
                raise UserError(f"{args.out} was begun with other flags ({pairs}); give another --out, or the same flags")
        else:
            write_json(path, wanted)
    except OSError as error:
        raise UserError(f"{args.out}: cannot be made or read ({error.strerror}); give another --out") from error


def describe(args: Args, data: PhantomDataset) -> Experiment:
    """The shipped config with this folder's files; the tokenizer is made of the training reports' words."""
    experiment = common.load_experiment("quickstart")
    folder = os.path.join(args.out, "tokenizer")
    if not os.path.exists(os.path.join(folder, "tokenizer.json")):
        records, _ = load_records(data.records["train"])
        build_tokenizer([turn.value for record in records for turn in record.turns], folder)
    decoder = dataclasses.replace(experiment.model.decoder, vocab=Tokenizer.from_folder(folder).size)
    return dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, decoder=decoder, tokenizer=folder),
        train=dataclasses.replace(experiment.train, steps=args.steps, seed=args.seed),
        data=dataclasses.replace(experiment.data, records=data.records["train"], embeddings=os.path.join(args.out, "tokens")),
    )


def train(experiment: Experiment, out: str) -> None:
    # imported late: --help needs no JAX
    import jax

    from jaxmed.train.loop import fit

    fit(experiment, out, jax.local_devices()[:1])


def write_reports(out: str, experiment: Experiment, data: PhantomDataset, control: str) -> str:
    """One of the two result files; the model's own volumes, or another study's."""
    path = os.path.join(out, f"{control or 'reports'}_vqa.json")
    flags = ["--records", data.records["test"], "--embeddings", experiment.data.embeddings, "--out", path]
    flags += ["--dtype", "float32", "--max-new-tokens", "64", "--batch", "64"]
    flags += ["--control", control] if control else []
    code = generate.run([os.path.join(out, "run"), *flags])
    if code:
        raise UserError(f"reports could not be written to {path}")
    return path


def findings(path: str, data: PhantomDataset) -> FindingScores:
    with open(path, encoding="utf-8") as file:
        studies = json.load(file)
    with open(data.labels, encoding="utf-8") as file:
        labels = json.load(file)
    texts = {answer["id"]: answer["answer"] for study in studies for answer in study["conversations_out"]}
    return score_findings(texts, labels)


def report(out: str, summary: dict[str, Any], table: dict[str, dict[str, float]]) -> None:
    """What came out, where it lies, and what to run next."""
    view = Table(title=f"F1 over (finding, side), {summary['studies']} held-out phantoms", title_justify="left")
    for name in ("finding", "own volume", "shuffled volumes"):
        view.add_column(name, justify="left" if name == "finding" else "right")
    for name, row in table.items():
        view.add_row(name, *(f"{value:.2f}" for value in row.values()))
    view.add_row("all", f"{summary['finding_f1']:.3f}", f"{summary['finding_f1_shuffled']:.3f}")
    Console().print(view)
    f1, control = summary["finding_f1"], summary["finding_f1_shuffled"]
    verdict = "The model sees what is in a volume" if f1 > control + 0.3 else "The model does not see what is in a volume"
    print(
        f"{verdict}: F1 {f1:.3f}, and {control:.3f} when it is shown another study's.\n"
        f"BLEU-4 {summary['bleu_4']:.3f}; {summary['seconds']:.0f} seconds in all.\n"
        f"Look at {out}/scores/report.html (reports beside references, with slices) and {out}/summary.json.\n"
        "Next, on real data:\n"
        "  jaxmed train btb3d --model.base LLAMA_FOLDER --data.records train.json --data.embeddings encoded/ --out runs/1\n"
        "  jaxmed generate runs/1 --records valid.json --embeddings encoded/ --out valid_vqa.json\n"
        "  jaxmed evaluate valid_vqa.json --records valid.json --out scores/"
    )
