"""`jaxmed generate` asked to end (SIGTERM): what is in flight is finished, the same command does the rest."""

import json
import os
import signal
from pathlib import Path

import jax
import pytest

from jaxmed.cli.main import run as jaxmed
from jaxmed.errors import REQUEUE
from jaxmed.generate.journal import Journal

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"


def arguments(out: Path) -> list[str]:
    """Two batches: four studies of one turn or more."""
    where = ["--base", str(GOLDEN / "base"), "--records", str(GOLDEN / "records.json"), "--out", str(out)]
    where += ["--embeddings", str(GOLDEN / "embeddings"), "--dtype", "float32", "--max-new-tokens", "5", "--batch", "2"]
    return ["generate", str(GOLDEN / "llava_lora_z2" / "checkpoint-16"), *where]


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)


def ids(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_the_batch_at_hand_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, part = tmp_path / "x_vqa.json", tmp_path / "x_vqa.json.parts" / "0.jsonl"
    append = Journal.append

    def asked(journal: Journal, key: str, entry: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # while the first study of a batch is written
        append(journal, key, entry)

    monkeypatch.setattr(Journal, "append", asked)
    assert jaxmed(arguments(out)) == REQUEUE
    assert "asked to end; finished studies are on disk" in capsys.readouterr().err
    kept = ids(part)
    assert 1 <= len(kept) < 4 and not out.exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.setattr(Journal, "append", append)
    assert jaxmed(arguments(out)) == 0
    assert ids(part)[: len(kept)] == kept and len(set(ids(part))) == len(ids(part)) == 4
    assert len(json.loads(out.read_text())) == 4


def test_while_loading_it_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    monkeypatch.setattr("jaxmed.api.load", asked)
    assert jaxmed(arguments(tmp_path / "x_vqa.json")) == REQUEUE
