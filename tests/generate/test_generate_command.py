"""`jaxmed generate` on upstream's tiny folder: upstream's answers, whatever the batch, the processes and the interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmed.cli import generate as command
from jaxmed.cli.main import run as jaxmed
from jaxmed.data.embeddings import write_npz
from jaxmed.data.inputs import VisualInput
from jaxmed.data.records import load_records
from jaxmed.errors import UserError
from jaxmed.generate.control import controlled, exchanged
from jaxmed.generate.journal import Journal

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"
RUNS = {
    "zero2": ("llava_lora_z2/checkpoint-16", "records.json", "embeddings", 21),
    "zero3": ("llava_lora_z3/checkpoint-10", "records_tasks.json", "embeddings", 17),
    "m72": ("llava_lora_8x8x8/checkpoint-9", "records_8x8x8.json", "embeddings_8x8x8", 19),
}


def arguments(name: str, out: Path, *more: str) -> list[str]:
    folder, records, embeddings, tokens = RUNS[name]
    where = ["--base", str(GOLDEN / "base"), "--records", str(GOLDEN / records), "--embeddings", str(GOLDEN / embeddings)]
    fixed = ["--dtype", "float32", "--max-new-tokens", str(tokens), "--token-ids", "--mesh.data", "8"]
    return [str(GOLDEN / folder), *where, *fixed, "--out", str(out), *more]


def rows(path: Path) -> list[dict]:
    return [answer for study in json.loads(path.read_text()) for answer in study["conversations_out"]]


def golden(name: str) -> list[dict]:
    return json.loads((GOLDEN / "golden" / f"generate_{name}.json").read_text())


@pytest.fixture(scope="module")
def upstream_bytes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bytes") / "zero2_vqa.json"
    assert jaxmed(["generate", *arguments("zero2", out, "--keep-special-tokens", "--upstream-exact", "history_eot")]) == 0
    return out


def test_upstream_bytes_equal_upstreams_own_file(upstream_bytes):
    own = json.loads((GOLDEN / "golden" / "16_preprocessed_encoded_attnpool_1node_16it_node0_vqa.json").read_text())
    ours = json.loads(upstream_bytes.read_text())
    for study in ours:
        for answer in study["conversations_out"]:
            del answer["token_ids"]
    assert ours == own


def test_ids_equal_upstreams(upstream_bytes):
    assert [r["token_ids"] for r in rows(upstream_bytes)] == [g["token_ids"] for g in golden("zero2")]


@pytest.mark.parametrize(("name", "wanted"), [("zero2", "zero2_stripped_history"), ("zero3", "zero3"), ("m72", "m72")])
def test_a_history_turn_loses_its_end_token_by_default(name, wanted, tmp_path):
    out = tmp_path / "x_vqa.json"
    assert jaxmed(["generate", *arguments(name, out)]) == 0
    assert [r["token_ids"] for r in rows(out)] == [g["token_ids"] for g in golden(wanted)]
    assert not any(r["answer"].endswith("<|eot_id|>") for r in rows(out)), "end tokens are not printed by default"


def test_two_processes_and_a_torn_line_give_what_one_gives(upstream_bytes, tmp_path):
    out = tmp_path / "x_vqa.json"
    upstream = ("--keep-special-tokens", "--upstream-exact", "history_eot")
    assert jaxmed(["generate", *arguments("zero2", out, *upstream, "--process", "1", "--processes", "2")]) == 0
    assert not out.exists(), "half of the studies are no result"
    part = tmp_path / "x_vqa.json.parts" / "1.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    part.write_bytes(lines[0] + lines[1][:25])
    assert (
        jaxmed(["generate", *arguments("zero2", out, *upstream, "--batch", "3", "--mesh.data", "1", "--mesh.fsdp", "1")]) == 2
    )
    other = [a if a != "8" else "0" for a in arguments("zero2", out, *upstream)]
    assert jaxmed(["generate", *other]) == 0
    assert out.read_bytes() == upstream_bytes.read_bytes()


def test_other_settings_are_refused_and_name_the_difference(upstream_bytes, tmp_path, capsys):
    for path in (upstream_bytes, Path(f"{upstream_bytes}.header.json")):
        shutil.copy(path, tmp_path)
    out = tmp_path / upstream_bytes.name
    assert jaxmed(["generate", *arguments("zero2", out)]) == 2
    message = capsys.readouterr().err
    assert "history_eot True there, False now" in message


def test_a_killed_process_loses_and_repeats_nothing(upstream_bytes, tmp_path):
    """SIGKILL as soon as the first studies are on disk; the batch of 1 leaves time for it."""
    out = tmp_path / "x_vqa.json"
    args = arguments("zero2", out, "--keep-special-tokens", "--upstream-exact", "history_eot", "--batch", "1")
    args[args.index("8")] = "1"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    part = tmp_path / "x_vqa.json.parts" / "0.jsonl"
    kept = b""
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxmed.cli.main", "generate", *args], env=environment, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and (not part.exists() or len(part.read_bytes().splitlines()) <= len(kept.splitlines())):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert part.read_bytes().startswith(kept), "what was finished is written once"
        kept = part.read_bytes()[: part.read_bytes().rfind(b"\n") + 1]
    subprocess.run(
        [sys.executable, "-m", "jaxmed.cli.main", "generate", *args], env=environment, check=True, capture_output=True
    )
    assert part.read_bytes().startswith(kept)
    assert len(part.read_bytes().splitlines()) == 4
    assert out.read_bytes() == upstream_bytes.read_bytes()


@pytest.mark.parametrize("kind", ["shuffled", "zeros", "noise"])
def test_a_wrong_image_changes_answers(kind, tmp_path):
    out = tmp_path / "x_vqa.json"
    assert jaxmed(["generate", *arguments("zero2", out, "--control", kind)]) == 0
    assert json.loads(Path(f"{out}.header.json").read_text())["control"] == kind
    pairs = list(zip(rows(out), golden("zero2_stripped_history"), strict=True))
    assert all(ours["id"] == theirs["id"] for ours, theirs in pairs)
    assert any(ours["token_ids"] != theirs["token_ids"] for ours, theirs in pairs)


def test_an_image_is_shown_from_its_turn_on(tmp_path):
    """The first question has no `<image>`: it is answered as upstream answers it, from the text alone."""
    record = {
        "id": "late",
        "image": "valid_21_a_2.nii.gz",
        "conversations": [
            {"from": "human", "value": "What is a hernia?"},
            {"from": "gpt", "value": ""},
            {"from": "human", "value": "<image>\nAnd here?"},
        ],
    }
    text = {"id": "text", "conversations": record["conversations"][:1]}
    (tmp_path / "records.json").write_text(json.dumps([record, text]))
    args = arguments("zero2", tmp_path / "x_vqa.json")
    args[args.index("--records") + 1] = str(tmp_path / "records.json")
    assert jaxmed(["generate", *args]) == 0
    first, second, alone = rows(tmp_path / "x_vqa.json")
    assert first["token_ids"] == alone["token_ids"]
    assert second["token_ids"] != first["token_ids"]


def test_exchanged_images_are_never_ones_own():
    records, _ = load_records(str(GOLDEN / "records.json"))
    for seed in range(20):
        other = exchanged(records, seed)
        assert all(other[r.id].images != r.images for r in records)
        assert len({other[r.id].id for r in records}) == len(records)
    with pytest.raises(UserError, match="show the same"):
        exchanged(records[:1], 0)


def test_noise_keeps_each_features_mean_and_spread():
    rng = np.random.default_rng(0)
    image = VisualInput((rng.standard_normal((5000, 3)) * [1, 5, 0.1] + [0, 40, -3]).astype(np.float32), (50, 10, 10))
    noise = controlled(image, "noise", "x", 0).values
    np.testing.assert_allclose(noise.mean(axis=0), image.values.mean(axis=0), atol=0.3)
    np.testing.assert_allclose(noise.std(axis=0), image.values.std(axis=0), rtol=0.05)
    assert (controlled(image, "noise", "y", 0).values != noise).any()


def test_bad_records_are_told_together_and_can_be_skipped(tmp_path, capsys):
    records = json.loads((GOLDEN / "records.json").read_text())
    records[1]["image"] = "absent.nii.gz"
    records[2]["image"] = "nan.nii.gz"
    del records[3]["conversations"]
    for name in ("valid_21_a_2", "valid_34_b_1"):
        shutil.copy(GOLDEN / "embeddings" / f"{name}.nii_embedded.npz", tmp_path)
    write_npz(str(tmp_path / "nan.nii_embedded.npz"), np.full((18, 2, 3, 4), np.nan, np.float32), "")
    (tmp_path / "records.json").write_text(json.dumps(records))
    args = arguments("zero2", tmp_path / "x_vqa.json")
    args[args.index("--records") + 1] = str(tmp_path / "records.json")
    args[args.index("--embeddings") + 1] = str(tmp_path)
    assert jaxmed(["generate", *args]) == 2
    message = capsys.readouterr().err
    assert "record 1" in message and "absent" in message and "record 3" in message
    assert jaxmed(["generate", *args, "--on-bad-record", "skip"]) == 0
    assert [r["id"] for r in rows(tmp_path / "x_vqa.json")] == ["report_generation_21"]
    skipped = [json.loads(line) for line in (tmp_path / "x_vqa.json.skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == 3 and "NaN" in " ".join(s["what"] for s in skipped)


def test_a_file_of_someone_else_is_not_overwritten(tmp_path):
    out = tmp_path / "x_vqa.json"
    out.write_text("[]")
    with pytest.raises(UserError, match="was not written by"):
        Journal(str(out), {"checkpoint": "a"}, 0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--volumes", str(GOLDEN)], "jaxmed encode"),
        (["--temperature", "-1"], "--temperature"),
        (["--process", "2", "--processes", "2"], "below --processes"),
        (["--upstream-exact", "typo"], "known are history_eot"),
        (["--set", "lora.alpha"], "KEY=VALUE"),
        (["--mesh.fsdp", "16"], "with --join the processes of a job hold one model together"),
    ],
)
def test_unusable_flags_get_one_line(flags, words, tmp_path):
    with pytest.raises(UserError, match=words):
        command.run(arguments("zero2", tmp_path / "x_vqa.json", *flags))


def test_encoders_alone_write_no_text(tmp_path):
    clip = Path(__file__).parents[1] / "golden" / "vit3d" / "m3d_clip"
    records = ["--records", str(GOLDEN / "records.json"), "--out", str(tmp_path / "x_vqa.json")]
    with pytest.raises(UserError, match="holds encoders alone"):
        command.run([str(clip), *records])


def test_processes_that_begin_one_after_the_other_leave_no_gap(tmp_path):
    """The second one finds what the first has finished; its own share must not shift by that."""
    out, asked = tmp_path / "x_vqa.json", json.loads((GOLDEN / "records.json").read_text())
    for process in ("0", "1"):
        assert jaxmed(["generate", *arguments("zero2", out, "--process", process, "--processes", "2")]) == 0
    assert [study["conversations_out"][0]["id"] for study in json.loads(out.read_text())] == [r["id"] for r in asked]
    done = [len((tmp_path / "x_vqa.json.parts" / f"{process}.jsonl").read_text().splitlines()) for process in (0, 1)]
    assert done == [2, 2]
