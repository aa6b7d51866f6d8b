"""Two processes on this machine, joined by the context axis over gloo: one job, the losses of one process."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmed.checkpoint.manager import complete_steps
from jaxmed.errors import REQUEUE
from jaxmed.train.writer import read_rows

GOLDEN = Path(__file__).parent.parent / "golden" / "btb3d"
STEPS = 4
ENVIRONMENT = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


def command(out: Path, flags: dict[str, object]) -> list[str]:
    shared = {
        "model.base": GOLDEN / "base",
        "model.adapter": GOLDEN / "llava_lora_z2" / "checkpoint-16",
        "model.dtype": "float32",
        "data.records": GOLDEN / "records.json",
        "data.eval-records": GOLDEN / "records_batch.json",
        "data.embeddings": GOLDEN / "embeddings",
        "data.buckets": 256,
        "data.batch": 2,
        "data.supervised": 64,
        "visual.tokens": 30,
        "train.steps": STEPS,
        "train.save-every": 2,
        "train.attention-chunk": 64,
        "lora.dropout": 0.1,
        "optim.learning-rate": 1e-3,
        "out": out,
    }
    program = "from jaxmed.cli.main import main; main()"
    both = (shared | flags).items()
    return [sys.executable, "-c", program, "train", "btb3d", *(f"--{name}={value}" for name, value in both)]


def run_one(out: Path) -> str:
    done = subprocess.run(command(out, {}), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def start_two(out: Path, flags: dict[str, object]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = {"distributed.coordinator": address, "distributed.processes": 2, "mesh.context": 2} | flags
    return [
        subprocess.Popen(command(out, joined | {"distributed.process": i}), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]


def run_two(out: Path) -> list[str]:
    """What each of the two processes said."""
    processes = start_two(out, {})
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    return said


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    run_one(out)
    return out


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("two") / "run"
    return out, run_two(out)


def column(out: Path, name: str) -> list[float]:
    return [row[name] for row in read_rows(str(out / "metrics.jsonl")) if name in row]


def test_two_processes_give_the_losses_of_one(alone: Path, together: tuple[Path, list[str]]) -> None:
    for name in ("loss", "eval_loss", "grad_norm"):
        assert len(column(alone, name)) == (1 if name == "eval_loss" else STEPS)
        np.testing.assert_allclose(column(together[0], name), column(alone, name), rtol=2e-5, err_msg=name)
    assert column(together[0], "supervised_tokens") == column(alone, "supervised_tokens")


def test_the_first_process_speaks_for_both(together: tuple[Path, list[str]]) -> None:
    first, second = together[1]
    assert "done: 4 steps" in first
    assert "step" not in second and "done" not in second


def test_one_process_goes_on_from_a_checkpoint_of_two(alone: Path, together: tuple[Path, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(together[0], out)
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    # the folder of the copy is another, its config the same
    assert json.loads((out / "config.json").read_text())["mesh"]["context"] == 2
    assert "going on after step 2" in run_one(out)
    np.testing.assert_allclose(column(out, "loss"), column(alone, "loss"), rtol=2e-5)


@pytest.mark.slow
def test_a_process_that_loses_its_peer_leaves_for_the_queue(tmp_path: Path) -> None:
    """Soon, with the code that asks for a restart, and with whole checkpoints alone."""
    processes = start_two(tmp_path / "run", {"train.steps": 5000, "train.save-every": 5})
    try:
        deadline = time.monotonic() + 240
        while not complete_steps(str(tmp_path / "run" / "checkpoints")):
            assert time.monotonic() < deadline and processes[1].poll() is None
            time.sleep(0.05)
        processes[1].kill()
        said = processes[0].communicate(timeout=120)[1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == REQUEUE, said
    assert "process 0 of 2" in said
