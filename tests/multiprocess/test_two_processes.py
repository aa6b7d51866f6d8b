"""Processes on this machine, joined over gloo: one job, the losses of one process, whatever becomes of the processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxmed.checkpoint.manager import complete_steps
from jaxmed.errors import REQUEUE
from jaxmed.train.writer import read_rows

GOLDEN = Path(__file__).parent.parent / "golden" / "btb3d"
STEPS = 8
LAUNCH = Path(__file__).parents[2] / "launch" / "local.sh"


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


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Without a cache of compiled programs: process 0 alone would find its own, and gloo waits for the others for 30 s only."""
    return os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


def start(out: Path, environment: dict[str, str], processes: int, flags: dict[str, object]) -> list[subprocess.Popen]:
    """Two are joined by the context axis, more by the data axis too."""
    joined: dict[str, object] = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        joined = {"distributed.coordinator": address, "distributed.processes": processes, "mesh.context": 2}
    places = [{"distributed.process": i} if processes > 1 else {} for i in range(processes)]
    return [
        subprocess.Popen(command(out, joined | flags | place), env=environment, stderr=subprocess.PIPE, text=True)
        for place in places
    ]


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """What each process said."""
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), said
    return said


def train(out: Path, environment: dict[str, str], processes: int) -> list[str]:
    return finish(start(out, environment, processes, {}))


def until(there: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    """Waits for something that the processes do."""
    deadline = time.monotonic() + 240
    while not there():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            raise AssertionError(finish(processes, -1))
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    train(out, environment, 1)
    return out


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("two") / "run"
    return out, train(out, environment, 2)


def column(out: Path, name: str) -> list[float]:
    return [row[name] for row in read_rows(str(out / "metrics.jsonl")) if name in row]


def test_two_processes_give_the_losses_of_one(alone: Path, together: tuple[Path, list[str]]) -> None:
    for name in ("loss", "eval_loss", "grad_norm"):
        assert len(column(alone, name)) == (1 if name == "eval_loss" else STEPS)
        np.testing.assert_allclose(column(together[0], name), column(alone, name), rtol=2e-5, err_msg=name)
    assert column(together[0], "supervised_tokens") == column(alone, "supervised_tokens")


def test_the_first_process_speaks_for_both(together: tuple[Path, list[str]]) -> None:
    first, second = together[1]
    assert f"done: {STEPS} steps" in first
    assert "step" not in second and "done" not in second


def check_losses(out: Path, alone: Path) -> None:
    """Every step once, with the loss of the undisturbed run."""
    rows = [row["step"] for row in read_rows(str(out / "metrics.jsonl")) if "loss" in row]
    assert rows == list(range(1, STEPS + 1))
    for name in ("loss", "eval_loss"):
        np.testing.assert_allclose(column(out, name), column(alone, name), rtol=2e-5, err_msg=name)


def test_one_process_goes_on_from_a_checkpoint_of_two(
    alone: Path, together: tuple[Path, list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(together[0], out)
    shutil.rmtree(out / "checkpoints" / str(STEPS))
    # the folder of the copy is another, its config the same
    assert json.loads((out / "config.json").read_text())["mesh"]["context"] == 2
    assert f"going on after step {STEPS - 2}" in train(out, environment, 1)[0]
    check_losses(out, alone)


def test_asked_to_end_all_save_at_the_same_step(alone: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """One of two processes is asked, then the process that goes on alone; two do the rest."""
    out = tmp_path / "run"
    metrics, checkpoints = out / "metrics.jsonl", str(out / "checkpoints")
    two = start(out, environment, 2, {"train.save-every": 100})
    until(metrics.exists, two)  # it is about to compile the step; JAX hears of the signal within a second
    two[1].send_signal(signal.SIGTERM)
    first, second = finish(two, REQUEUE)
    (saved,) = complete_steps(checkpoints)
    assert 1 <= saved < STEPS - 3, "the steps were too fast for this test"
    assert f"asked to end: step {saved} of {STEPS} is saved" in first and "Traceback" not in first + second
    assert [row["step"] for row in read_rows(str(metrics))] == list(range(1, saved + 1))

    one = start(out, environment, 1, {"train.save-every": 100})
    until(lambda: len(read_rows(str(metrics))) > saved, one)
    one[0].send_signal(signal.SIGTERM)
    finish(one, REQUEUE)
    assert complete_steps(checkpoints)[-1] > saved

    train(out, environment, 2)
    check_losses(out, alone)


@pytest.mark.slow
def test_a_process_that_loses_its_peer_leaves_for_the_queue(environment: dict[str, str], tmp_path: Path) -> None:
    """Soon, with the code that asks for a restart, and with whole checkpoints alone."""
    checkpoints = str(tmp_path / "run" / "checkpoints")
    processes = start(tmp_path / "run", environment, 2, {"train.steps": 5000, "train.save-every": 5})
    until(lambda: bool(complete_steps(checkpoints)), processes)
    processes[1].kill()
    try:
        said = processes[0].communicate(timeout=120)[1]
    finally:
        processes[0].kill()
        processes[1].communicate()
    assert processes[0].returncode == REQUEUE, said
    assert "process 0 of 2" in said


@pytest.mark.slow
@pytest.mark.parametrize(("before", "killed", "after"), [(4, 2, 2), (2, 0, 4)])
def test_killed_a_job_goes_on_with_another_number_of_processes(
    alone: Path, environment: dict[str, str], tmp_path: Path, before: int, killed: int, after: int
) -> None:
    """Through launch/local.sh, which says who died, and whose restarts go on."""
    out, logs = tmp_path / "run", tmp_path / "logs"
    program = {"JAXMED": f"{sys.executable} -m jaxmed.cli.main", "GRACE": "60"}

    def launch(processes: int) -> subprocess.Popen:
        arguments = command(out, {"mesh.context": 2, "train.save-every": 1})[3:]
        script = [str(LAUNCH), "--logs", str(logs), str(processes), "1", *arguments]
        return subprocess.Popen(script, env=environment | program, stderr=subprocess.PIPE, text=True)

    job = launch(before)
    until(lambda: bool(complete_steps(str(out / "checkpoints"))), [job])
    children = subprocess.run(["pgrep", "-P", str(job.pid), "-f", "jaxmed.cli.main"], capture_output=True, text=True).stdout
    os.kill(sorted(map(int, children.split()))[killed], signal.SIGKILL)
    (said,) = finish([job], REQUEUE)
    assert f"process {killed} was the first to end, with code 137 (signal 9)" in said
    assert complete_steps(str(out / "checkpoints"))[-1] < STEPS, "the job was too fast for this test"
    finish([launch(after)])
    check_losses(out, alone)
