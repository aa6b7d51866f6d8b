"""Two processes hold one model: upstream's answers, one journal, and a restart after a death or a request to end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmed.errors import REQUEUE

GOLDEN = Path(__file__).parent.parent / "golden"
BTB3D, VIT3D = GOLDEN / "btb3d", GOLDEN / "vit3d"
PROGRAM = "from jaxmed.cli.main import main; main()"
ENVIRONMENT = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def start(*arguments: str, processes: int = 2) -> list[subprocess.Popen]:
    """Processes with two devices each, in one job."""
    command = [sys.executable, "-c", PROGRAM, "generate", *arguments, "--dtype=float32"]
    if processes == 1:
        return [subprocess.Popen(command, env=ENVIRONMENT, **PIPES)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command += ["--distributed.coordinator", address, f"--distributed.processes={processes}"]
    return [subprocess.Popen([*command, f"--distributed.process={i}"], env=ENVIRONMENT, **PIPES) for i in range(processes)]


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[tuple[str, str]]:
    """What each process said."""
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


def done(out: Path) -> dict[str, list[str]]:
    """Ids of the finished records, by the file that they stand in."""
    files = sorted(Path(f"{out}.parts").glob("*.jsonl"))
    return {path.name: [json.loads(line)["key"] for line in path.read_bytes().splitlines()] for path in files}


def test_one_model_over_two_processes_answers_as_upstream_did(tmp_path: Path) -> None:
    """Weights, tower included, are split over both; a volume that turns out to be unusable is left out by both."""
    golden = json.loads((VIT3D / "golden" / "generate.json").read_text())[:4]
    records = [
        {"id": g["id"], "image": g["image"], "conversations": [{"from": "human", "value": f"<image>{g['question']}"}]}
        for g in golden
    ]
    np.save(tmp_path / "bad.npy", np.full((1, 8, 24, 21), np.nan, np.float32))
    bad = {"id": "bad", "image": str(tmp_path / "bad.npy"), "conversations": records[0]["conversations"]}
    (tmp_path / "records.json").write_text(json.dumps([bad, *records]))
    out = tmp_path / "x_vqa.json"
    flags = ["--set=vision.heads=3", "--volumes", str(VIT3D), "--records", str(tmp_path / "records.json"), "--out", str(out)]
    flags += ["--mesh.fsdp=2", "--mesh.context=2", "--token-ids", "--max-new-tokens=24", "--batch=3", "--on-bad-record=skip"]
    first, second = finish(start(str(VIT3D / "lamed_merged"), *flags))
    answers = [answer for study in json.loads(out.read_text()) for answer in study["conversations_out"]]
    assert {a["id"]: a["token_ids"] for a in answers} == {g["id"]: g["token_ids"] for g in golden}
    ((name, ids),) = done(out).items()
    assert name == "0.jsonl" and sorted(ids) == sorted(g["id"] for g in golden)
    assert [str(out) in said[0].splitlines() for said in (first, second)] == [True, False]  # one of them speaks
    assert "0 of 5 records are done, 5 are this job's" in first[1] and "records" not in second[1]
    assert "1 record was skipped" in first[1]


def btb3d(out: Path) -> list[str]:
    """A run with an adapter, whose answers are upstream's own file; a batch for each study."""
    flags = {
        "base": BTB3D / "base",
        "records": BTB3D / "records.json",
        "embeddings": BTB3D / "embeddings",
        "max-new-tokens": 21,
        "out": out,
    }
    upstream = ("--keep-special-tokens", "--upstream-exact=history_eot", "--batch=1", "--mesh.context=2", "--mesh.tensor=1")
    return [str(BTB3D / "llava_lora_z2" / "checkpoint-16"), *(f"--{name}={value}" for name, value in flags.items()), *upstream]


OWN = BTB3D / "golden" / "16_preprocessed_encoded_attnpool_1node_16it_node0_vqa.json"


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_job_left_undone_is_done_by_another_number_of_processes(tmp_path: Path, end: signal.Signals) -> None:
    """The second process dies, or is asked to end; its peer leaves for the queue as well; one process does the rest."""
    out = tmp_path / "x_vqa.json"
    two = start(*btb3d(out))
    deadline = time.monotonic() + 240
    while not (Path(f"{out}.parts").exists() and any(done(out).values())):
        assert time.monotonic() < deadline and all(process.poll() is None for process in two), finish(two)
        time.sleep(0.01)
    two[1].send_signal(end)
    said = [process.communicate(timeout=120) for process in two]
    assert two[0].returncode == REQUEUE and two[1].returncode in (REQUEUE, -signal.SIGKILL), said
    assert ("process 0 of 2" if end == signal.SIGKILL else "the same command does the rest") in said[0][1]
    before = done(out)["0.jsonl"]
    assert 1 <= len(before) < 4 and not out.exists(), "the job was too fast for this test"
    finish(start(*btb3d(out), processes=1))
    assert json.loads(out.read_text()) == json.loads(OWN.read_text())
    assert done(out)["0.jsonl"][: len(before)] == before and len(done(out)["0.jsonl"]) == 4
