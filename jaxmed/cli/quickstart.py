"""`jaxmed quickstart`: the whole path on phantom chest CTs, through the very functions that real data goes through."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from jaxmed.cli import common, evaluate
from jaxmed.cli.encode import check_grid
from jaxmed.cli.quickstart_folder import Clock, findings, open_folder, words_of, write_reports
from jaxmed.config import Experiment
from jaxmed.data.encode import encode_folder
from jaxmed.data.phantom_dataset import PhantomDataset, make_dataset
from jaxmed.errors import UserError
from jaxmed.generate.journal import write_json

HELP = "The whole path on a laptop: phantom CTs, tokens, training, reports, scores"

DESCRIPTION = """Make phantom chest CTs and reports, encode them, train a small model from scratch, write reports for held-out
phantoms, with their own volumes and with shuffled ones, and score both. Needs no network, no data and no accelerator.
Interrupted, the same command goes on where it stopped.

    jaxmed quickstart                  # tokens of a fixed encoder, a language model: a few minutes
    jaxmed quickstart --system vit3d   # a 3-D transformer pretrained by contrast, retrieval, fine-tuning: up to 25 minutes"""


@dataclass(frozen=True)
class Args:
    system: Literal["btb3d", "vit3d"] = "btb3d"
    """`btb3d`: tokens from files, as here; `vit3d`: a 3-D transformer pretrained by contrast (--system vit3d --help)"""
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


def run(argv: list[str]) -> int:
    if asked_system(argv) == "vit3d":
        # imported late: it imports more
        from jaxmed.cli import quickstart_vit3d

        return quickstart_vit3d.run(argv)
    args: Args = common.parse(Args, argv, prog="jaxmed quickstart", description=DESCRIPTION)
    out = args.out
    finished = os.path.join(out, "summary.json")
    open_folder(out, {k: v for k, v in dataclasses.asdict(args).items() if k not in ("system", "out")})
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
    embeddings = ["--embeddings", experiment.data.embeddings]
    answers = {
        kind: write_reports(
            os.path.join(out, "run"), data.records["test"], embeddings, os.path.join(out, f"{kind or 'reports'}_vqa.json"), kind
        )
        for kind in ("", "shuffled")
    }
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


def asked_system(argv: list[str]) -> str:
    """The last --system, each of which has flags of its own."""
    found = Args.system
    for place, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name == "--system":
            found = value if equals else "".join(argv[place + 1 : place + 2])
    return found


def describe(args: Args, data: PhantomDataset) -> Experiment:
    """The shipped config with this folder's files; the tokenizer is made of the training reports' words."""
    experiment = common.load_experiment("quickstart")
    folder = os.path.join(args.out, "tokenizer")
    decoder = dataclasses.replace(experiment.model.decoder, vocab=words_of(data.records["train"], folder))
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
