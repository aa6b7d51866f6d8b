"""The loop on the golden base: resuming, refusing, evaluating, stopping; all in this process (kills: test_kill.py)."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_runs import GOLDEN, experiment

from jaxmed.checkpoint import manager
from jaxmed.checkpoint.adapter import chain
from jaxmed.cli.validate import resolve
from jaxmed.config import Experiment, LoraConfig, to_dict
from jaxmed.data.embeddings import load_tokens, npz_path, write_npz
from jaxmed.errors import BadRecords, UserError
from jaxmed.sharding import make_mesh
from jaxmed.train import loop, writer
from jaxmed.train.init import blueprint, start
from jaxmed.train.loop import Summary
from jaxmed.train.writer import read_rows

STEPS = 6


def fit(e: Experiment, out: str) -> Summary:
    return loop.fit(e, out, jax.devices()[:1])


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Most runs here are of the same program."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten records: two lengths, several rounds, one of text alone."""
    folder = tmp_path_factory.mktemp("records")
    rows = [
        r for name in ("records", "records_batch", "records_tasks") for r in json.loads((GOLDEN / f"{name}.json").read_text())
    ]
    rows += [r for r in json.loads((GOLDEN / "records_edge.json").read_text()) if r["id"] == "text_only"]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def change(e: Experiment, **changes: dict) -> Experiment:
    """change(e, train={"steps": 3}) and so on."""
    return dataclasses.replace(e, **{room: dataclasses.replace(getattr(e, room), **fields) for room, fields in changes.items()})


@pytest.fixture(scope="module")
def base_case(records: Path) -> Experiment:
    """Two buckets, two rows, dropout, shuffling; a checkpoint every other step."""
    return change(
        experiment("train_zero2"),
        data={"records": str(records), "buckets": (192, 256), "batch": 2, "shuffle": True, "supervised": 64},
        train={"steps": STEPS, "save_every": 2, "seed": 11},
        lora={"dropout": 0.1},
        optim={"learning_rate": 1e-3},
    )


@pytest.fixture(scope="module")
def undisturbed(base_case: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return out, fit(base_case, str(out))


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(str(out / "metrics.jsonl")) if "loss" in row]


def final_arrays(out: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, parameters and moments."""
    found = {}
    for item in ("trainable", "opt"):
        with manager.ocp.StandardCheckpointer() as reader:
            values = reader.restore(out.absolute() / "checkpoints" / str(step) / item)
        found |= {f"{item}/{name}": np.asarray(x) for name, x in values.items()}
    return found


def assert_same_end(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    ours, theirs = final_arrays(one), final_arrays(two)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_the_folder_of_a_run(undisturbed: tuple[Path, Summary], base_case: Experiment) -> None:
    out, summary = undisturbed
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "tokenizer",
        "skipped.jsonl",
        "tensorboard",
    }
    assert json.loads((out / "config.json").read_text()) == json.loads(json.dumps(to_dict(base_case)))
    rows = read_rows(str(out / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    wanted = {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "supervised_tokens", "data_wait", "seconds"}
    assert all(set(row) == wanted for row in rows)
    assert rows[0]["learning_rate"] == pytest.approx(1e-3) and rows[-1]["learning_rate"] < 1e-3
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["2", "4", "6"]
    assert (out / "tokenizer" / "tokenizer.json").exists()
    assert list((out / "tensorboard").iterdir())
    assert summary.loss == rows[-1]["loss"] and summary.compilations == 2  # one for each bucket


def test_a_checkpoint_says_what_it_belongs_to(undisturbed: tuple[Path, Summary], base_case: Experiment) -> None:
    meta = manager.read_meta(str(undisturbed[0] / "checkpoints"), 4)
    assert (meta["step"], meta["total_steps"], meta["base"]) == (4, STEPS, base_case.model.base)
    assert meta["config"] == json.loads(json.dumps(to_dict(base_case)))
    assert len(meta["base_fingerprint"]) == 64 and meta["encoder"] == ""


def test_a_finished_run_says_so(
    undisturbed: tuple[Path, Summary], base_case: Experiment, capsys: pytest.CaptureFixture
) -> None:
    before = (undisturbed[0] / "metrics.jsonl").read_bytes()
    assert fit(base_case, str(undisturbed[0])).steps == STEPS
    assert "finished already" in capsys.readouterr().err
    assert (undisturbed[0] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("newest", [2, 4])
def test_going_on_ends_where_the_undisturbed_run_ends(
    newest: int, undisturbed: tuple[Path, Summary], base_case: Experiment, tmp_path: Path
) -> None:
    """Another log and save cadence, other threads; rows beyond the checkpoint and half a row are written again."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed[0], out)
    for step in (4, 6):
        if step > newest:
            shutil.rmtree(out / "checkpoints" / str(step))
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    other = change(base_case, train={"save_every": 5, "keep": 9}, data={"threads": 1, "prefetch": 1})
    summary = fit(other, str(out))
    assert summary.resumed_from == newest
    assert summary.compilations <= 2
    assert_same_end(out, undisturbed[0])


def test_a_damaged_last_checkpoint_is_made_again(
    undisturbed: tuple[Path, Summary], base_case: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed[0], out)
    for file in (out / "checkpoints" / "6").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    assert fit(base_case, str(out)).resumed_from == 4
    assert "checkpoint 6 cannot be read" in capsys.readouterr().err
    assert_same_end(out, undisturbed[0])


def test_another_config_is_refused_by_the_fields_that_differ(undisturbed: tuple[Path, Summary], base_case: Experiment) -> None:
    other = change(base_case, optim={"learning_rate": 5e-4}, data={"threads": 3}, train={"seed": 12})
    with pytest.raises(
        UserError, match=r"another config.*optim.learning_rate was 0.001, is 0.0005; train.seed was 11, is 12\."
    ):
        fit(other, str(undisturbed[0]))


def test_changed_records_are_refused(undisturbed: tuple[Path, Summary], base_case: Experiment, tmp_path: Path) -> None:
    """The same path with other contents would silently shift the order of the data."""
    out, path = tmp_path / "run", Path(base_case.data.records)
    shutil.copytree(undisturbed[0], out)
    shutil.rmtree(out / "checkpoints" / "6")
    text = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(text)[:-1]))
        with pytest.raises(UserError, match="records or the sizes of their token files have changed"):
            fit(base_case, str(out))
    finally:
        path.write_text(text)


def test_a_folder_that_is_no_run_is_left_alone(base_case: Experiment, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="not the config of a run"):
        fit(base_case, str(tmp_path))
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


def test_evaluation_rows_and_epochs(base_case: Experiment, tmp_path: Path) -> None:
    """ceil(0.9 x 5) steps; evaluation in between and at the end, over all held-out samples, without dropout."""
    held_out = str(GOLDEN / "records_batch.json")
    e = change(base_case, train={"steps": 0, "epochs": 0.7, "eval_every": 3}, data={"eval_records": held_out})
    e = change(e, optim={"learning_rate": 0.0, "projector_learning_rate": 0.0}, data={"buckets": (256,)})
    summary = fit(e, str(tmp_path / "run"))
    rows = read_rows(str(tmp_path / "run" / "metrics.jsonl"))
    evaluations = [row for row in rows if "eval_loss" in row]
    assert summary.steps == 4  # 10 records, 2 a step
    assert [row["step"] for row in evaluations] == [3, 4]
    assert all(row["eval_tokens"] == 93 for row in evaluations)
    # with both rates at 0 the weights stay: the golden loss of this very batch
    golden = json.loads((GOLDEN / "golden" / "train_zero2.json").read_text())["loss"]
    np.testing.assert_allclose([row["eval_loss"] for row in evaluations], golden, rtol=1e-5)
    assert summary.eval_loss == evaluations[-1]["eval_loss"]


@pytest.fixture
def poisonable(base_case: Experiment, tmp_path: Path) -> tuple[Experiment, Path]:
    """A copy of the token files, and the one that two of the ten records use."""
    folder = tmp_path / "embeddings"
    shutil.copytree(base_case.data.embeddings, folder)
    e = change(base_case, data={"embeddings": str(folder), "shuffle": False, "buckets": (256,)}, train={"save_every": 1})
    return e, folder / "valid_21_a_2.nii_embedded.npz"


def poison(file: Path, value: float) -> None:
    with np.load(file) as archive:
        array = archive["arr"][0].copy()
    array[:, 1] = value
    write_npz(str(file), array, "")


def test_a_loss_that_is_no_number_stops_the_run(poisonable: tuple[Experiment, Path], tmp_path: Path) -> None:
    e, file = poisonable
    users = [r["id"] for r in json.loads(Path(e.data.records).read_text()) if "valid_21" in str(r.get("image", ""))]
    first_batch = [r["id"] for r in json.loads(Path(e.data.records).read_text())][:2]
    poison(file, 3e38)  # finite, and overflows in the projector
    with pytest.raises(UserError, match=r"step \d: the loss is not finite") as caught:
        fit(e, str(tmp_path / "run"))
    message = str(caught.value)
    assert users[0] in message and users[0] in first_batch
    assert not any(name in message for name in first_batch if name not in users)
    assert "the input is finite" in message and "\n" not in message
    assert manager.complete_steps(str(tmp_path / "run" / "checkpoints")) == []
    assert losses(tmp_path / "run") == []


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(poisonable: tuple[Experiment, Path], tmp_path: Path) -> None:
    e = change(poisonable[0], optim={"learning_rate": 1e30, "max_grad_norm": 0.0})
    with pytest.raises(UserError, match=r"training has diverged, lower optim.learning_rate"):
        fit(e, str(tmp_path / "run"))
    steps = manager.complete_steps(str(tmp_path / "run" / "checkpoints"))
    assert steps == [step for step, _ in losses(tmp_path / "run")]


def test_nan_in_a_file_is_told_as_such(poisonable: tuple[Experiment, Path], tmp_path: Path) -> None:
    e, file = poisonable
    poison(file, float("nan"))
    with pytest.raises(UserError, match=r"valid_21_a_2.*NaN"):
        fit(e, str(tmp_path / "run"))


def test_skipped_records_are_listed(poisonable: tuple[Experiment, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Those known beforehand and those found while training; a rerun does not list them twice."""
    e, file = poisonable
    poison(file, float("nan"))
    rows = json.loads(Path(e.data.records).read_text())
    rows.append(rows[0] | {"id": "without_turns", "conversations": []})
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows))
    e = change(e, data={"records": str(path)}, train={"steps": 3})
    with pytest.raises(BadRecords, match="without_turns"):
        fit(e, str(tmp_path / "strict"))
    e = change(e, data={"on_bad_record": "skip"})
    summary = fit(e, str(tmp_path / "run"))
    listed = read_rows(str(tmp_path / "run" / "skipped.jsonl"))
    assert summary.skipped == 3
    assert {"without_turns" in row["where"] for row in listed if row["step"] == 0} == {True}
    found = [(row["step"], row["where"].split("'")[1]) for row in listed if "NaN" in row["what"]]
    assert found == [(1, "report_generation_21"), (3, "batch_three_rounds")]
    assert "3 records left out" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    fit(e, str(tmp_path / "run"))
    assert len(read_rows(str(tmp_path / "run" / "skipped.jsonl"))) == len(listed)


def test_statistics_of_the_visual_input_are_fixed(base_case: Experiment, tmp_path: Path) -> None:
    """Mean and deviation at every place, over the files of the training set; no step changes them."""
    e = change(base_case, visual={"norm": True}, train={"steps": 2}, optim={"weight_decay": 0.3})
    e = dataclasses.replace(e, model=dataclasses.replace(e.model, adapter=""), lora=LoraConfig(rank=2, alpha=3.0))
    fit(e, str(tmp_path / "run"))
    saved = final_arrays(tmp_path / "run", 2)
    rows = json.loads(Path(e.data.records).read_text())
    paths = {npz_path(e.data.embeddings, row["image"]) for row in rows if row.get("image")}
    values = [load_tokens(path, e.visual)[0] for path in paths]
    assert len(values) == 5 and len({len(v) for v in values}) == 2
    for place in (0, 23, 29):  # not every volume has so many tokens
        there = np.stack([v[place] for v in values if len(v) > place])
        np.testing.assert_allclose(saved["trainable/projector/norm_mean"][place], there.mean(0), atol=1e-6)
        np.testing.assert_allclose(saved["trainable/projector/norm_sd"][place], there.std(0) + 0.01, atol=1e-6)


def test_going_on_from_a_run_as_adapter(undisturbed: tuple[Path, Summary], base_case: Experiment) -> None:
    """The run's newest weights over the base; the upstream adapter that it went on from is not needed any more."""
    e = dataclasses.replace(base_case, model=dataclasses.replace(base_case.model, adapter=str(undisturbed[0])))
    saved, asked, mesh = final_arrays(undisturbed[0]), to_dict(base_case), make_mesh(e.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainable, frozen = start(blueprint(e, mesh))
        _, frozen_before = start(blueprint(base_case, mesh))
    for name, value in manager.named(trainable).items():
        np.testing.assert_array_equal(np.asarray(value), saved[f"trainable/{name}"], err_msg=name)
    for one, two in zip(jax.tree.leaves(frozen), jax.tree.leaves(frozen_before), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    resolved, notices = resolve(change(e, lora={"rank": 99}), frozenset())
    assert resolved.lora.rank == asked["lora"]["rank"] == 7
    assert any("lora.rank 7 (the config says 99)" in line for line in notices)
    assert list(chain(str(undisturbed[0]))) == [str(undisturbed[0])]


def test_tokens_of_another_encoder_are_refused(
    undisturbed: tuple[Path, Summary], base_case: Experiment, tmp_path: Path
) -> None:
    """Held-out files beside signed training files; and a run that went on from another's tokens."""
    folders = {name: tmp_path / name for name in ("haar", "magvit")}
    for name, folder in folders.items():
        folder.mkdir()
        for file in (GOLDEN / "embeddings").iterdir():
            with np.load(file) as archive:
                write_npz(str(folder / file.name), archive["arr"][0], name)
    rows = [r | {"image": f"magvit/{r['image']}"} for r in json.loads((GOLDEN / "records_batch.json").read_text())]
    (tmp_path / "held_out.json").write_text(json.dumps(rows))
    train_rows = [r | {"image": f"haar/{r['image']}"} for r in json.loads((GOLDEN / "records_batch.json").read_text())]
    (tmp_path / "train.json").write_text(json.dumps(train_rows))
    paths = {
        "records": str(tmp_path / "train.json"),
        "eval_records": str(tmp_path / "held_out.json"),
        "embeddings": str(tmp_path),
    }
    with pytest.raises(BadRecords, match=r"written by encoder 'magvit', expected 'haar'"):
        fit(change(base_case, data=paths), str(tmp_path / "run"))
    run = tmp_path / "signed"
    shutil.copytree(undisturbed[0], run)
    meta = run / "checkpoints" / "6" / "meta" / "metadata"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"encoder": "magvit"}))
    e = dataclasses.replace(base_case, model=dataclasses.replace(base_case.model, adapter=str(run)))
    resolved, _ = resolve(change(e, data=paths | {"eval_records": ""}), frozenset())
    assert resolved.visual.encoder == "magvit"
    with pytest.raises(BadRecords, match=r"written by encoder 'haar', expected 'magvit'"):
        fit(resolved, str(tmp_path / "other"))


def test_nothing_to_train_is_an_error(base_case: Experiment, tmp_path: Path) -> None:
    e = dataclasses.replace(base_case, model=dataclasses.replace(base_case.model, adapter=""), lora=LoraConfig(rank=0))
    text = change(e, visual={"kind": "none"})
    text = dataclasses.replace(text, model=dataclasses.replace(text.model, added_tokens=()))
    with pytest.raises(UserError, match=r"nothing would be trained; set lora.rank"):
        fit(text, str(tmp_path / "run"))


class FullFile:
    """A file on a full disk."""

    def write(self, text: str) -> None:
        raise OSError(28, "No space left on device")

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_a_disk_that_fills_is_one_line(
    undisturbed: tuple[Path, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it hits metrics.jsonl; what was complete stays."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed[0], out)
    lines = writer.JsonLines(str(out / "metrics.jsonl"))
    monkeypatch.setattr(lines, "_file", FullFile())
    with pytest.raises(UserError, match=r"metrics.jsonl: the disk is full; free some space and run the same command again"):
        lines.add({"step": 3})
    assert manager.complete_steps(str(out / "checkpoints")) == [2, 4, 6]
