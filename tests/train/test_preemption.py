"""Asked to end at chosen moments, in this process (real signals and several processes: tests/multiprocess)."""

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from golden_runs import GOLDEN, experiment

from jaxmed.checkpoint.manager import complete_steps
from jaxmed.config import Experiment
from jaxmed.errors import Preempted
from jaxmed.preemption import Preemption, listening
from jaxmed.train import loop
from jaxmed.train.writer import read_rows

STATIONS = 3
"""Where `fit` asks before the first step"""


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def case() -> Experiment:
    """Four steps, evaluated (one batch) after the second and the fourth."""
    e = experiment("train_zero2")
    return dataclasses.replace(
        e,
        data=dataclasses.replace(e.data, batch=2, shuffle=True, eval_records=str(GOLDEN / "records_batch.json")),
        train=dataclasses.replace(e.train, steps=4, save_every=100, eval_every=2, seed=5),
        optim=dataclasses.replace(e.optim, learning_rate=1e-3),
    )


def fit(case: Experiment, out: Path) -> None:
    loop.fit(case, str(out), jax.devices()[:1])


def rows(out: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row.get("loss", 0.0), row.get("eval_loss", 0.0)) for row in read_rows(str(out / "metrics.jsonl"))]


@pytest.fixture
def end_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The times of asking at which the answer is yes; one list for all lives of a run, a life counts from 1."""
    times = [10**6]
    asked = {"life": None, "count": 0}

    def reached(self: Preemption) -> bool:
        if asked["life"] is not self:
            asked.update(life=self, count=0)
        asked["count"] += 1
        return asked["count"] >= times[0]

    monkeypatch.setattr(Preemption, "reached", reached)
    return times


def test_a_run_that_is_ended_anywhere_is_the_undisturbed_one(case: Experiment, end_at: list[int], tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    fit(case, whole)
    assert [step for step, *_ in rows(whole)] == [1, 2, 2, 3, 4, 4]
    lives = (
        (2, "before a step", []),  # while it loads
        (STATIONS + 3, "step 2 of 4 is saved", [2]),  # two steps, and within the evaluation
        (STATIONS + 1, "before a step", [2]),  # within the evaluation that is owed
        (STATIONS + 2, "step 3 of 4 is saved", [2, 3]),  # after it and one step
    )
    for time_of_asking, words, saved in lives:
        end_at[0] = time_of_asking
        with pytest.raises(Preempted, match=words):
            fit(case, out)
        assert complete_steps(str(out / "checkpoints")) == saved
    end_at[0] = 10**6
    fit(case, out)
    assert rows(out) == rows(whole)


def test_the_last_step_is_no_preemption(case: Experiment, end_at: list[int], tmp_path: Path) -> None:
    """All is done but for an evaluation: it is made."""
    end_at[0] = STATIONS + 5  # steps 1, 2, evaluation, step 3, step 4
    fit(case, tmp_path / "out")
    assert [step for step, *_ in rows(tmp_path / "out")] == [1, 2, 2, 3, 4, 4]


def test_a_process_alone_hears_the_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with listening() as preemption:
        assert not preemption.reached()
        with preemption.nothing_to_lose("at once"), preemption.holding():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert preemption.reached()
        with pytest.raises(Preempted, match="at once"), preemption.nothing_to_lose("at once"):
            raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGTERM) is before


def test_with_nothing_to_lose_it_leaves_at_once() -> None:
    with pytest.raises(Preempted, match="loading"), listening() as preemption, preemption.nothing_to_lose("loading"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("not reached")
