"""What a person may get wrong on the command line or in a folder: one line that says what, where and what to do."""

import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxmed.checkpoint import manager
from jaxmed.cli import main
from jaxmed.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "btb3d"
BASE, EMBEDDINGS, RECORDS = (str(GOLDEN / name) for name in ("base", "embeddings", "records_batch.json"))
UPSTREAM = GOLDEN / "llava_lora_z2" / "checkpoint-16"
SMALL = ["--data.buckets", "256", "--visual.tokens", "64", "--lora.rank", "3", "--data.batch", "8", "--train.steps", "1"]
Told = Callable[..., list[str]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture) -> Told:
    """Runs a command that must be refused; -> the lines of its complaint."""

    def run(*argv: str) -> list[str]:
        assert main.run([str(a) for a in argv]) == 2
        lines = capsys.readouterr().err.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith(f"jaxmed {argv[0]}: "))
        return lines[start:]

    return run


def training(out: Path, *more: str, records: str = RECORDS) -> list[str]:
    where = ["--model.base", BASE, "--data.records", records, "--data.embeddings", EMBEDDINGS, "--out", str(out)]
    return ["train", "btb3d", *where, *SMALL, *more]


def generation(folder: Path, out: Path, *more: str, records: str = RECORDS) -> list[str]:
    where = ["--base", BASE, "--records", records, "--embeddings", EMBEDDINGS, "--out", str(out)]
    return ["generate", str(folder), *where, "--dtype", "float32", "--max-new-tokens", "2", *more]


def write(path: Path, records: list) -> str:
    path.write_text(json.dumps(records))
    return str(path)


def writable_copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, copy_function=shutil.copyfile)
    to.chmod(0o755)
    return to


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--data.recrds", "x"], "unrecognized options: --data.recrds, x (perhaps you meant --data.records"),
        (["--foo"], "unrecognized options: --foo; see jaxmed train CONFIG --help"),
        (["--lora.alpha", "abc"], "--lora.alpha: could not convert string to float: 'abc'; see jaxmed train CONFIG --help"),
        (["--data.microbatches", "3"], "data.batch 8 is not a multiple of data.microbatches 3; see jaxmed train CONFIG --help"),
        (["--train.remat", "some"], "invalid choice 'some' for argument '--train.remat'. Expected one of ('none', 'full', "),
        (["--set"], "--set at the end of the line: give KEY=VALUE, such as lora.alpha=12"),
        (["--set", "lora.alpha"], "--set lora.alpha: give KEY=VALUE, such as lora.alpha=12"),
    ],
    ids=["unknown", "nothing-near", "number", "value", "choice", "set-nothing", "set-half"],
)
def test_a_wrong_flag_is_told_without_the_parsers_frame(flags: list[str], line: str, told: Told, tmp_path: Path) -> None:
    [message] = told(*training(tmp_path / "run", *flags))
    assert message.startswith(f"jaxmed train: {line}")
    assert "---" not in message and "Argument helptext" not in message


def test_missing_flags_are_named_with_their_meaning(told: Told) -> None:
    [message] = told("evaluate")
    assert message.startswith("jaxmed evaluate: missing X_vqa.json The file that `jaxmed generate` wrote")
    assert "--records" in message and message.count("jaxmed evaluate --help") == 1


def test_a_command_names_itself_once(told: Told) -> None:
    assert told("train", "--out", "x")[0].startswith("jaxmed train: give a config first: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "line 1: SyntaxError: invalid syntax"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("from jaxmed.config import LoraConfig\n\ndef get_config():\n    return LoraConfig(rnk=3)\n", "line 4: TypeError"),
    ],
    ids=["syntax", "import", "raise", "field"],
)
def test_a_config_file_that_fails_is_told_by_line(text: str, message: str, told: Told, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    [line] = told("train", str(tmp_path / "mine.py"), "--out", "x")
    assert line.startswith(f"jaxmed train: {tmp_path / 'mine.py'}: {message}")


@pytest.mark.parametrize(
    "flag",
    [
        ("--optim.b1", "1.5"),
        ("--optim.b2", "-0.1"),
        ("--optim.eps", "-1e-8"),
        ("--optim.weight-decay", "-0.3"),
        ("--optim.final-fraction", "1.2"),
        ("--optim.projector-learning-rate", "-1e-4"),
        ("--data.threads", "-1"),
        ("--data.prefetch", "-1"),
    ],
    ids=lambda flag: flag[0],
)
def test_a_setting_that_trains_nothing_sensible_is_refused(flag: tuple[str, str], told: Told, tmp_path: Path) -> None:
    [line] = told(*training(tmp_path / "run", *flag))
    assert flag[0][2:].replace("-", "_") in line and "must" in line


def test_a_folder_that_cannot_be_made_is_told(told: Told, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    [line] = told(*training(tmp_path / "file" / "run"))
    assert "--out" in line and "Not a directory" in line and "give another" in line


def test_faults_of_both_record_files_are_one_list(told: Told, tmp_path: Path) -> None:
    good, bad = json.loads(Path(RECORDS).read_text())[0], {"id": "bad", "conversations": []}
    one, two = write(tmp_path / "train.json", [good, bad]), write(tmp_path / "valid.json", [bad, good, bad])
    head, *rest = told(*training(tmp_path / "run", "--data.eval-records", two, records=one))
    assert head.startswith("jaxmed train: 3 records cannot be used; mend them")
    assert [line.split(":")[0].strip() for line in rest if "it has no turns" in line] == [one, two, two]


@pytest.mark.parametrize("lost", ["non_lora_trainables.bin", "adapter_model.safetensors"])
def test_an_upstream_folder_that_lacks_a_file_is_refused(lost: str, told: Told, tmp_path: Path) -> None:
    """Its projector, or its LoRA, would else be a fresh one, and the answers nonsense."""
    folder = writable_copy(UPSTREAM, tmp_path / "upstream")
    (folder / lost).unlink()
    for command in (generation(folder, tmp_path / "x_vqa.json"), training(tmp_path / "run", "--model.adapter", str(folder))):
        command = [flag for flag in command if flag not in ("--lora.rank", "3")]
        line = told(*command)[0]
        assert str(folder) in line and lost.split(".")[0] in line


@pytest.mark.parametrize(
    ("wrong", "message"), [(["--template", "nothing"], "'nothing'"), (["--control", "shuffled"], "none can be exchanged")]
)
def test_a_refused_generation_leaves_nothing_behind(wrong: list[str], message: str, told: Told, tmp_path: Path) -> None:
    """Or the right command would be refused as one with other settings."""
    records = write(tmp_path / "one.json", json.loads(Path(RECORDS).read_text())[:1])
    assert message in told(*generation(UPSTREAM, tmp_path / "x_vqa.json", *wrong, records=records))[0]
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


@pytest.mark.parametrize("command", [["train", "quickstart"], ["generate"], ["evaluate"], ["encode"], ["preview", "btb3d"]])
def test_every_flag_has_a_help_text(command: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main.run([*command, "--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    flags = [(line, after) for line, after in itertools.pairwise(lines) if line.startswith("--")]
    assert len(flags) > 5
    # a text stands beside a short flag, or begins in the next line
    bare = [flag for flag, text in flags if text.startswith(("(default", "(required")) and "  " not in flag]
    assert bare == []


def test_what_scoring_skips_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = json.loads(Path(RECORDS).read_text())[:1]
    answers = [{"id": rows[0]["id"], "question": "?", "answer": "text"} for _ in rows[0]["conversations"][::2]]
    write(tmp_path / "x_vqa.json", [{"image": rows[0]["image"], "conversations_out": answers}])
    records = write(tmp_path / "records.json", [*rows, {"id": "bad", "conversations": []}])
    flags = ["--records", records, "--out", str(tmp_path / "scores"), "--resamples", "5", "--on-bad-record", "skip"]
    assert main.run(["evaluate", str(tmp_path / "x_vqa.json"), *flags]) == 0
    [row] = [json.loads(line) for line in (tmp_path / "scores" / "skipped.jsonl").read_text().splitlines()]
    assert "'bad'" in row["where"] and "no turns" in row["what"]
    assert "1 record cannot be used" in capsys.readouterr().out


def test_preview_takes_the_flags_that_all_commands_share(told: Told, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    where = ["preview", "btb3d", "--model.base", BASE, "--data.records", RECORDS, "--out", str(tmp_path / "page.html")]
    assert main.run([*where, "--on-bad-record", "skip", "--set", "data.template=plain"]) == 0
    assert "the plain template takes one question" in capsys.readouterr().out
    assert told(*where, "--data.embeddings", tmp_path / "no")[0].endswith(
        f"--data.embeddings {tmp_path / 'no'}: no such folder"
    )


def test_a_damaged_header_of_a_generation_is_told(told: Told, tmp_path: Path) -> None:
    (tmp_path / "x_vqa.json.header.json").write_text("[1]")
    [line] = told(*generation(UPSTREAM, tmp_path / "x_vqa.json"))
    assert "x_vqa.json.header.json: cannot be read" in line and "remove it" in line


def test_a_damaged_config_of_a_run_is_told(told: Told, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text('{"model": 3, "visual": {}, "train": {}}')
    [line] = told(*generation(run, tmp_path / "x_vqa.json"))
    assert f"{run}/config.json: cannot be read as the config of a run (config model is 3" in line


def test_a_damaged_checkpoint_is_told_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "7" / "trainable").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"trainable: cannot be read .*; .* move {tmp_path}/checkpoints/7 away"):
        manager.trainable_shapes(str(tmp_path), 7)


class Interrupted:
    def __del__(self) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_that_python_drops_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", main.send_again)
    with pytest.raises(KeyboardInterrupt):
        Interrupted()
        time.sleep(5)
