"""The quickstart of the 3-D system: what its stages are given, what it says of what comes out, and that it goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmed.cli import quickstart, quickstart_vit3d
from jaxmed.cli.quickstart_vit3d import Args
from jaxmed.cli.validate import resolve
from jaxmed.data.phantom_dataset import make_dataset
from jaxmed.data.phantom_reports import findings_in
from jaxmed.errors import UserError

SMALL = ["--pairs", "64", "--retrieval", "14", "--studies", "32", "--held-out", "9", "--pretrain-steps", "3", "--steps", "2"]
EMPTY = "Heart: normal size of the heart. Pleura: no effusion is seen."


def read(path: Path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms, drawn once; every run below finds them there."""
    folder = tmp_path_factory.mktemp("quick") / "q"
    args = Args(out=str(folder), pairs=64, retrieval=14, studies=32, held_out=9)
    make_dataset(str(folder / "data"), quickstart_vit3d.sizes(args), 0, processes=1)
    return folder


@pytest.fixture
def stages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """Training and writing as they would be, without a model: what they were asked for. The pretrained one sees everything,
    the other nothing."""
    asked: list[tuple[str, object]] = []

    def train(experiment, out):
        asked.append((os.path.basename(out), experiment))
        os.makedirs(out, exist_ok=True)
        ways = {f"eval_{way}_r{k}": share for way, share in (("i2t", 0.25), ("t2i", 0.75)) for k in (1, 5, 10)}
        rows = [{"step": 1} | dict.fromkeys(ways, 0.0), {"step": 2} | ways, {"step": 3, "loss": 1.0}]
        Path(out, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write_reports(run, records, inputs, path, control):
        asked.append((os.path.basename(run), control))
        studies = read(Path(records))
        sees = os.path.basename(run) == "pretrained" and not control
        texts = [study["conversations"][1]["value"] if sees else EMPTY for study in studies]
        answers = [
            {"id": study["id"], "image": study["image"], "conversations_out": [answer(study, text)]}
            for study, text in zip(studies, texts, strict=True)
        ]
        Path(path).write_text(json.dumps(answers))
        return path

    def answer(study, text):
        question = study["conversations"][0]["value"]
        return {"id": study["id"], "question": question, "answer": text}

    monkeypatch.setattr(quickstart_vit3d, "train", train)
    monkeypatch.setattr(quickstart_vit3d, "write_reports", write_reports)
    return asked


def test_everything_in_its_order_and_what_it_says(folder: Path, stages, capsys: pytest.CaptureFixture[str]):
    assert quickstart.run(["--system", "vit3d", "--out", str(folder), *SMALL]) == 0
    order = [("pretrained", ""), ("pretrained", "shuffled"), ("scratch", ""), ("scratch", "shuffled")]
    assert [name for name, _ in stages[:3]] == ["clip", "pretrained", "scratch"] and stages[3:] == order
    summary, text = read(folder / "summary.json"), capsys.readouterr().out
    assert summary["recall_at_1"] == {"volume_to_report": 0.25, "report_to_volume": 0.75}
    assert (summary["finding_f1"], summary["finding_f1_from_scratch"], summary["finding_f1_shuffled"]) == (1.0, 0.0, 0.0)
    assert summary["retrieval_pairs"] == 14 and summary["studies"] == 9 and summary["bleu_4"] == 1.0
    assert "does not find what belongs together: recall@1 0.25 from volume to report, 0.75 back" in text
    assert "Pretraining pays: F1 1.000 from the pretrained ViT, 0.000 from scratch, each 2 steps on 32 reports" in text
    page = (folder / "scores" / "report.html").read_text()
    assert "Retrieval, 14 held-out pairs" in page and "ViT from scratch" in page
    assert (folder / "comparison" / "comparison.html").exists()


def test_both_models_differ_in_their_tower_alone(folder: Path, stages):
    quickstart.run(["--system=vit3d", "--out", str(folder), *SMALL])
    clip, pretrained, scratch = (experiment for _, experiment in stages[:3])
    model = dataclasses.replace(scratch.model, tower_folder=str(folder / "clip"), tower_source="checkpoint")
    assert dataclasses.replace(scratch, model=model) == pretrained
    assert scratch.model.tower_folder == "" and scratch.train.train_tower and clip.train.train_tower
    assert (clip.train.steps, scratch.train.steps) == (3, 2)
    assert clip.visual.prepare == scratch.visual.prepare and clip.visual.prepare.cache == str(folder / "prepared")
    assert clip.contrastive.text.vocab == scratch.model.decoder.vocab < 100
    for experiment in (clip, scratch):  # what the shipped configs say fits together
        found, _ = resolve(experiment, ())
        assert found == experiment
    sizes = {name: len(read(Path(experiment.data.records))) for name, experiment in (("clip", clip), ("scratch", scratch))}
    assert sizes == {"clip": 64, "scratch": 32}


def test_retrieved_pairs_differ_in_what_they_say_and_nothing_is_in_two_parts(folder: Path, stages):
    quickstart.run(["--system", "vit3d", "--out", str(folder), *SMALL])
    parts = {name: read(folder / "data" / f"{name}.json") for name in ("pairs", "train", "test", "retrieval")}
    said = [frozenset(findings_in(record["conversations"][1]["value"])) for record in parts["retrieval"]]
    assert len(set(said)) == len(said) == 14
    ids = {name: {record["id"] for record in records} for name, records in parts.items()}
    assert not ids["pairs"] & ids["train"] and not (ids["pairs"] | ids["train"]) & (ids["test"] | ids["retrieval"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_as_many_phantoms_as_it_takes(seed: int):
    """100 pairs that differ need some 400 held-out phantoms, of which most serve for reports too."""
    found = quickstart_vit3d.sizes(Args(seed=seed))
    assert (found["pairs"], found["train"]) == (Args.pairs, Args.studies)
    assert 300 < found["test"] + found["others"] < 700


def test_a_folder_belongs_to_one_system_and_one_set_of_flags(folder: Path, stages, tmp_path: Path):
    quickstart.run(["--system", "vit3d", "--out", str(folder), *SMALL])
    with pytest.raises(UserError, match="--steps 2 there, 5 now"):
        quickstart.run(["--system", "vit3d", "--out", str(folder), *SMALL[:-1], "5"])
    with pytest.raises(UserError, match="--system vit3d there"):
        quickstart.run(["--out", str(folder)])
    for flags, message in ((["--retrieval", "130"], "more than 120"), (["--pairs", "3"], "at least 64")):
        with pytest.raises(UserError, match=message):
            quickstart.run(["--system", "vit3d", "--out", str(tmp_path), *flags])
    with pytest.raises(UserError, match="vit4d"):
        quickstart.run(["--system", "vit4d"])


REDUCED = ["--pairs", "2000", "--pretrain-steps", "700", "--retrieval", "60", "--studies", "500", "--steps", "250"]
REDUCED += ["--held-out", "96", "--seed", "2"]


@pytest.mark.slow
def test_pretraining_pays_and_a_killed_quickstart_goes_on(tmp_path: Path):
    """A quarter of the steps, on half the phantoms: retrieval well above chance, F1 from the pretrained ViT above that from
    scratch by what the whole promises, nothing seen in another's volume. Killed in the pretraining and in a fine-tuning."""
    out = tmp_path / "q"
    command = [sys.executable, "-m", "jaxmed.cli.main", "quickstart", "--system", "vit3d", "--out", str(out), *REDUCED]
    for run, step in (("clip", 200), ("pretrained", 200)):
        killed_after(command, out / run / "checkpoints" / str(step))
    subprocess.run(command, check=True)
    steps = [json.loads(line) for line in (out / "clip" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == [*range(20, 701, 20)]
    summary = read(out / "summary.json")
    print(summary)
    assert min(summary["recall_at_1"].values()) >= 5 / 60
    assert summary["finding_f1"] - summary["finding_f1_from_scratch"] >= 0.1
    assert max(summary["finding_f1_shuffled"], summary["finding_f1_from_scratch_shuffled"]) <= 0.35


def killed_after(command: list[str], checkpoint: Path) -> None:
    """Kills it, and whatever it started, once the checkpoint is whole."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        while not checkpoint.exists():
            assert process.poll() is None, "it ended before there was anything to kill"
            time.sleep(0.2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
