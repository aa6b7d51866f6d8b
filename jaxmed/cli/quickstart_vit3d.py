"""`jaxmed quickstart --system vit3d`: a ViT3D pretrained by contrast, retrieval, and what that pretraining is worth.

    phantoms ─> prepared volumes ─┬─> pretraining by contrast with reports ─> retrieval among held-out pairs
                                  │            │ tower
                                  ├─> fine-tuning from it on few reports ─┐
                                  └─> the same from a random tower ───────┴─> reports, own and shuffled volumes ─> scores

Every stage is a command's own function; what is finished is not done again.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from jaxmed.cli import common, compare, evaluate
from jaxmed.cli.quickstart_folder import Clock, findings, open_folder, words_of, write_reports
from jaxmed.config import Experiment
from jaxmed.data.phantom import sample_study
from jaxmed.data.phantom_dataset import PhantomDataset, make_dataset
from jaxmed.errors import UserError
from jaxmed.generate.journal import write_json

DESCRIPTION = """Pretrain a small 3-D vision transformer on phantom CTs by contrast with their reports, look whether it finds
the report that belongs to a held-out volume, and train a small language model on a few other reports twice: from the pretrained
transformer and, for as many steps, from one that starts at random. Both write reports for held-out phantoms, with their own
volumes and with shuffled ones, and are scored by finding. Needs no network, no data and no accelerator; up to 25 minutes on two
cores. Interrupted, the same command goes on where it stopped."""

RUNS = {"pretrained": "from the pretrained ViT", "scratch": "from scratch"}
KINDS = ("", "shuffled")
MOST_DIFFERENT = 120
"""Sets of findings beyond which one that is new takes very many phantoms; there are 162 in all"""
PROMISED_RECALL, PROMISED_GAP = 0.5, 0.1


@dataclass(frozen=True)
class Args:
    system: Literal["vit3d"] = "vit3d"
    """Without it: the quickstart of the other system, tokens from files"""
    out: str = "quickstart_vit3d"
    """Folder for everything that is made"""
    pairs: int = 4000
    """Phantoms with reports to pretrain on"""
    pretrain_steps: int = 3000
    """Steps of the pretraining"""
    retrieval: int = 100
    """Held-out pairs to tell from each other, all with other findings"""
    studies: int = 1000
    """Phantoms with reports to fine-tune on, all others than those"""
    steps: int = 400
    """Steps of each fine-tuning"""
    held_out: int = 256
    """Phantoms to write reports for"""
    seed: int = 0
    """Seed of phantoms and models"""

    def __post_init__(self):
        least = {"pairs": 64, "pretrain_steps": 1, "retrieval": 2, "studies": 32, "steps": 1, "held_out": 2}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {bound}")
        if self.retrieval > MOST_DIFFERENT:
            raise UserError(
                f"--retrieval is {self.retrieval}; more than {MOST_DIFFERENT} phantoms with different findings are rare"
            )


def run(argv: list[str]) -> int:
    args: Args = common.parse(Args, argv, prog="jaxmed quickstart --system vit3d", description=DESCRIPTION)
    out = args.out
    open_folder(out, {k: v for k, v in dataclasses.asdict(args).items() if k != "out"})
    print(
        f"jaxmed quickstart: a ViT3D pretrained on {args.pairs:,} phantom chest CTs by contrast with their reports, then a\n"
        f"small language model that learns from {args.studies:,} others to report what it sees, from that ViT and from a\n"
        f"random one. Up to 25 minutes on two cores; all goes to {out}/.",
        flush=True,
    )
    clock = Clock(out)
    data = make_dataset(os.path.join(out, "data"), sizes(args), args.seed)
    retrieved = write_retrieval(data, args.retrieval)
    clock.done("phantoms")
    experiments = describe(args, data, retrieved)
    for name, experiment in experiments.items():
        say_stage(name, args)
        train(experiment, os.path.join(out, name))
        clock.done({"clip": "pretraining"}.get(name, f"fine-tuning {RUNS.get(name)}"))
    recalls = retrieval_of(os.path.join(out, "clip"))
    answers = {(name, kind): reports_of(out, data, name, kind) for name in RUNS for kind in KINDS}
    clock.done("reports")
    scores = {key: findings(path, data) for key, path in answers.items()}
    f1 = {key: scores[key].f1 for key in scores}
    table = by_finding({key: found.by_finding for key, found in scores.items()})
    bleu_4 = write_pages(out, data, answers, {"F1 by finding and side": table, retrieval_title(args): retrieval_rows(recalls)})
    clock.done("scores")
    summary = {
        "recall_at_1": {"volume_to_report": recalls["i2t_r1"], "report_to_volume": recalls["t2i_r1"]},
        "recalls": recalls,
        "retrieval_pairs": args.retrieval,
        "finding_f1": f1["pretrained", ""],
        "finding_f1_from_scratch": f1["scratch", ""],
        "finding_f1_shuffled": f1["pretrained", "shuffled"],
        "finding_f1_from_scratch_shuffled": f1["scratch", "shuffled"],
        "f1_by_finding": scores["pretrained", ""].by_finding,
        "f1_by_finding_from_scratch": scores["scratch", ""].by_finding,
        "bleu_4": bleu_4,
        "seconds": clock.total,
        "seconds_by_stage": clock.stages,
        "studies": args.held_out,
    }
    write_json(os.path.join(out, "summary.json"), summary)
    report(args, summary, table)
    return 0


def sizes(args: Args) -> dict[str, int]:
    """Studies of each split. Behind those for reports come as many as it takes to find pairs that all differ."""
    splits = {"pairs": args.pairs, "train": args.studies, "test": args.held_out}
    first, seen, more = args.pairs + args.studies, set(), 0
    while len(seen) < args.retrieval:
        seen.add(_key(sample_study(args.seed, first + more).findings))
        more += 1
    return splits | {"others": max(more - args.held_out, 0)}


def _key(findings: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(findings.items()))


def write_retrieval(data: PhantomDataset, count: int) -> str:
    """The first `count` held-out studies whose findings no earlier one has: captions that differ in what they say."""
    with open(data.labels, encoding="utf-8") as file:
        labels = json.load(file)
    chosen: dict[Any, Any] = {}
    for split in ("test", "others"):
        with open(data.records[split], encoding="utf-8") as file:
            for record in json.load(file):
                chosen.setdefault(_key(labels[record["id"]]), record)
    path = os.path.join(data.folder, "retrieval.json")
    write_json(path, list(chosen.values())[:count])
    return path


def describe(args: Args, data: PhantomDataset, retrieved: str) -> dict[str, Experiment]:
    """The shipped configs with this folder's files, by the name of the run; one tokenizer serves all."""
    clip, tuned = (common.load_experiment(name) for name in ("quickstart_clip", "quickstart_vit3d"))
    folder = os.path.join(args.out, "tokenizer")
    words = words_of(data.records["pairs"], folder)
    text = dataclasses.replace(clip.contrastive.text, vocab=words)
    clip = dataclasses.replace(clip, contrastive=dataclasses.replace(clip.contrastive, text=text))
    decoder = dataclasses.replace(tuned.model.decoder, vocab=words)
    tuned = dataclasses.replace(tuned, model=dataclasses.replace(tuned.model, decoder=decoder))
    places = {"volumes": data.volumes, "cache": os.path.join(args.out, "prepared"), "tokenizer": folder}
    pretrained = os.path.join(args.out, "clip")
    return {
        "clip": _placed(clip, args.pretrain_steps, args.seed, data.records["pairs"], places, eval_records=retrieved),
        **{
            name: _placed(tuned, args.steps, args.seed, data.records["train"], places, **tower)
            for name, tower in {"pretrained": {"tower_folder": pretrained}, "scratch": {"tower_source": "random"}}.items()
        },
    }


def _placed(
    experiment: Experiment, steps: int, seed: int, records: str, places: Mapping[str, str], eval_records: str = "", **tower: str
) -> Experiment:
    visual = experiment.visual
    return dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, tokenizer=places["tokenizer"], **tower),
        visual=dataclasses.replace(visual, prepare=dataclasses.replace(visual.prepare, cache=places["cache"])),
        train=dataclasses.replace(experiment.train, steps=steps, seed=seed),
        data=dataclasses.replace(experiment.data, records=records, eval_records=eval_records, volumes=places["volumes"]),
    )


def say_stage(name: str, args: Args) -> None:
    if name == "clip":
        print(
            f"\nPretraining by contrast, {args.pretrain_steps:,} steps; then retrieval among {args.retrieval} held-out pairs",
            flush=True,
        )
    else:
        print(f"\nFine-tuning {RUNS[name]}, {args.steps:,} steps on {args.studies:,} reports", flush=True)


def train(experiment: Experiment, out: str) -> None:
    # imported late: --help needs no JAX
    import jax

    from jaxmed.cli.validate import resolve
    from jaxmed.train.loop import fit

    fit(resolve(experiment, ())[0], out, jax.local_devices()[:1])


def retrieval_of(run: str) -> dict[str, float]:
    """Recalls of the run's last evaluation."""
    from jaxmed.train.writer import read_rows

    rows = [row for row in read_rows(os.path.join(run, "metrics.jsonl")) if "eval_i2t_r1" in row]
    return {name: rows[-1][f"eval_{name}"] for name in (f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))}


def reports_of(out: str, data: PhantomDataset, name: str, kind: str) -> str:
    path = os.path.join(out, f"{'_'.join(filter(None, (name, kind)))}_vqa.json")
    return write_reports(os.path.join(out, name), data.records["test"], ["--volumes", data.volumes], path, kind)


def by_finding(found: Mapping[tuple[str, str], Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Finding -> column -> F1"""
    titles = {
        ("pretrained", ""): "pretrained ViT",
        ("scratch", ""): "ViT from scratch",
        ("pretrained", "shuffled"): "shuffled volumes",
    }
    return {name: {title: found[key].get(name, 0.0) for key, title in titles.items()} for name in found["pretrained", ""]}


def retrieval_title(args: Args) -> str:
    return f"Retrieval, {args.retrieval} held-out pairs (chance {1 / args.retrieval:.2f})"


def retrieval_rows(recalls: Mapping[str, float]) -> dict[str, dict[str, float]]:
    ways = {"volume to report": "i2t", "report to volume": "t2i"}
    return {name: {f"recall@{k}": recalls[f"{way}_r{k}"] for k in (1, 5, 10)} for name, way in ways.items()}


def write_pages(
    out: str, data: PhantomDataset, answers: Mapping[tuple[str, str], str], extra: Mapping[str, Mapping[str, Any]]
) -> float:
    """The pretrained model's page with its control, and the page that compares both models; -> BLEU-4 of the former."""
    asked = evaluate.Args(answers["pretrained", ""], data.records["test"], os.path.join(out, "scores"))
    asked = dataclasses.replace(asked, volumes=data.volumes, metadata=data.metadata)
    text = evaluate.evaluate(dataclasses.replace(asked, control=answers["pretrained", "shuffled"]), extra=extra)
    both = dataclasses.replace(asked, answers=answers["scratch", ""], others=(answers["pretrained", ""],))
    compare.compare(dataclasses.replace(both, out=os.path.join(out, "comparison")))
    return text.corpus["bleu_4"]


def report(args: Args, summary: Mapping[str, Any], table: Mapping[str, Mapping[str, float]]) -> None:
    """What came out, where it lies, and what to run next."""
    out, console = args.out, Console()
    for title, first, rows, last in (
        (retrieval_title(args), "", retrieval_rows(summary["recalls"]), ()),
        (f"F1 over (finding, side), {args.held_out} held-out phantoms", "finding", table, _totals(summary)),
    ):
        console.print(_table(title, first, rows, last))
    recall, f1, scratch = summary["recall_at_1"], summary["finding_f1"], summary["finding_f1_from_scratch"]
    found = min(recall.values()) >= PROMISED_RECALL
    pays = f1 - scratch >= PROMISED_GAP
    shuffled = (summary[f"finding_f1{name}_shuffled"] for name in ("", "_from_scratch"))
    print(
        f"The pretrained ViT {'finds' if found else 'does not find'} what belongs together: recall@1 "
        f"{recall['volume_to_report']:.2f} from volume to report, {recall['report_to_volume']:.2f} back.\n"
        f"{'Pretraining pays' if pays else 'Pretraining does not pay'}: F1 {f1:.3f} from the pretrained ViT, {scratch:.3f} "
        f"from scratch, each {args.steps:,} steps on {args.studies:,} reports;\n"
        f"{' and '.join(f'{value:.3f}' for value in shuffled)} when shown another study's volume. "
        f"{summary['seconds']:.0f} seconds in all.\n"
        f"Look at {out}/scores/report.html (reports beside references, with slices), {out}/comparison/comparison.html\n"
        f"(both models study by study) and {out}/summary.json.\n"
        "Next, on real data:\n"
        "  jaxmed train m3d_clip --contrastive.text-folder bert-base-uncased --data.records M3D_Cap.json \\\n"
        "      --data.volumes M3D_Cap_npy/ --out runs/clip\n"
        "  jaxmed train vit3d_amos --model.base Asclepius-Llama3-8B --model.tower-folder runs/clip \\\n"
        "      --data.records dataset.json:training --data.volumes AMOS-MM/ --out runs/amos"
    )


def _totals(summary: Mapping[str, Any]) -> Sequence[float]:
    return [summary[name] for name in ("finding_f1", "finding_f1_from_scratch", "finding_f1_shuffled")]


def _table(title: str, first: str, rows: Mapping[str, Mapping[str, float]], last: Sequence[float]) -> Table:
    view = Table(title=title, title_justify="left")
    view.add_column(first)
    for name in next(iter(rows.values()), {}):
        view.add_column(name, justify="right")
    for name, row in rows.items():
        view.add_row(name, *(f"{value:.2f}" for value in row.values()))
    if last:
        view.add_row("all", *(f"{value:.3f}" for value in last))
    return view
