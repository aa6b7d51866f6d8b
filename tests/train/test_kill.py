"""SIGKILL at any moment, a save among them, and the same command again: the undisturbed run, bit for bit.

Each life of the run is a process of its own, started through the command line; their compiled programs are cached on disk.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from golden_runs import GOLDEN

from jaxmed.checkpoint import manager
from jaxmed.train.writer import read_rows

STEPS = 60


def command(out: Path, save_every: int = 1) -> list[str]:
    flags = {
        "model.base": GOLDEN / "base",
        "model.adapter": GOLDEN / "llava_lora_z2" / "checkpoint-16",
        "model.dtype": "float32",
        "data.records": GOLDEN / "records.json",
        "data.embeddings": GOLDEN / "embeddings",
        "data.buckets": 256,
        "data.batch": 2,
        "data.supervised": 64,
        "visual.tokens": 30,
        "lora.dropout": 0.1,
        "optim.learning-rate": 1e-3,
        "train.steps": STEPS,
        "train.save-every": save_every,
        "train.keep": 2,
        "out": out,
    }
    program = "from jaxmed.cli.main import main; main()"
    return [sys.executable, "-c", program, "train", "btb3d", *(f"--{name}={value}" for name, value in flags.items())]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",
    }
    return os.environ | cache


@pytest.fixture(scope="module")
def undisturbed(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run(command(out, save_every=STEPS), env=environment, check=True, capture_output=True, timeout=300)
    return out


def rows_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saving(out: Path) -> bool:
    return any((out / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def live_and_kill(out: Path, environment: dict[str, str], rng: random.Random, in_save: bool) -> bool:
    """Some steps, then SIGKILL, at a random moment or while a checkpoint is half written. True: half written it was."""
    before = rows_of(out)
    process = subprocess.Popen(command(out), env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    try:
        while rows_of(out) < before + 3:  # they shrink first, to the checkpoint's step
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if in_save:
            while not saving(out):
                assert process.poll() is None and time.monotonic() < deadline
        else:
            time.sleep(rng.uniform(0, 0.2))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    return saving(out)


def arrays(out: Path, item: str) -> dict[str, np.ndarray]:
    with manager.ocp.StandardCheckpointer() as reader:
        found = reader.restore(out / "checkpoints" / str(STEPS) / item)
    return {name: np.asarray(value) for name, value in found.items()}


def check_kills(kills: int, out: Path, environment: dict[str, str], undisturbed: Path) -> None:
    rng = random.Random(23)
    torn = [live_and_kill(out, environment, rng, in_save=number % 2 == 0) for number in range(kills)]
    assert any(torn)
    assert rows_of(out) < STEPS
    done = subprocess.run(command(out), env=environment, check=True, capture_output=True, text=True, timeout=300)
    assert "going on after step" in done.stderr
    ours, theirs = ([(r["step"], r["loss"]) for r in read_rows(str(run / "metrics.jsonl"))] for run in (out, undisturbed))
    assert ours == theirs and len(ours) == STEPS
    for item in ("trainable", "opt"):
        ends = [arrays(run, item) for run in (out, undisturbed)]
        assert ends[0].keys() == ends[1].keys()
        for name, value in ends[1].items():
            np.testing.assert_array_equal(ends[0][name], value, err_msg=name)
    assert not saving(out)


def test_two_kills(environment: dict[str, str], undisturbed: Path, tmp_path: Path) -> None:
    check_kills(2, tmp_path / "run", environment, undisturbed)


@pytest.mark.slow
def test_five_kills(environment: dict[str, str], undisturbed: Path, tmp_path: Path) -> None:
    check_kills(5, tmp_path / "run", environment, undisturbed)
