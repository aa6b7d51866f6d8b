"""`jaxmed retrieve` on upstream's own M3D-CLIP, and what it refuses."""

import json
from pathlib import Path

import pytest

from jaxmed.cli import main

GOLDEN = Path(__file__).parents[1] / "golden" / "vit3d"
RECORDS, VOLUMES = str(GOLDEN / "data" / "M3D_Cap_npy" / "M3D_Cap.json"), str(GOLDEN / "data")


def retrieve(*flags: str, model: Path = GOLDEN / "m3d_clip") -> int:
    return main.run(["retrieve", str(model), "--volumes", VOLUMES, "--dtype", "float32", *flags])


def test_recalls_and_rankings_are_upstreams(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "r.json"
    assert retrieve("--records", f"{RECORDS}:test", "--places", "1", "2", "3", "--batch", "1", "--out", str(out)) == 0
    golden, found = json.loads((GOLDEN / "golden" / "clip.json").read_text()), json.loads(out.read_text())
    assert found["recalls"] == pytest.approx({f"{d}_r{k}": golden[f"{d}_r{k}"] for d in ("i2t", "t2i") for k in (1, 2, 3)})
    for row, i2t, t2i in zip(found["pairs"], golden["ranking_i2t"], golden["ranking_t2i"], strict=True):
        assert (row["nearest_i2t"], row["nearest_t2i"]) == ([str(i) for i in i2t], [str(i) for i in t2i])
        assert row["rank_t2i"] == 1 + t2i.index(int(row["id"]))
    shown = capsys.readouterr().out
    assert "4 pairs" in shown and "0.750" in shown and "same words" not in shown


def test_texts_that_repeat_are_counted_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = json.loads(Path(RECORDS).read_text())["test"]
    rows = [
        {"image": row["image"], "text": text} for row, text in zip(rows, ("No cyst.", "A stone.", "No cyst."), strict=False)
    ]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    assert retrieve("--records", str(tmp_path / "r.json"), "--places", "2", "--out", str(tmp_path / "o.json")) == 0
    found = json.loads((tmp_path / "o.json").read_text())["recalls"]
    assert found["i2t_same_r2"] >= found["i2t_r2"] and found["t2i_same_r2"] >= found["t2i_r2"]
    assert "any with the same words" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "model", "message"),
    [
        (["--records", f"{RECORDS}:test"], "lamed_merged", "is no contrastive model"),
        (["--records", f"{RECORDS}:test", "--places", "0"], "m3d_clip", "--places (0,)"),
        (["--records", RECORDS], "m3d_clip", "say which one is meant"),
    ],
)
def test_refusals(flags, model, message, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert retrieve(*flags, "--out", str(tmp_path / "o.json"), model=GOLDEN / model) == 2
    error = capsys.readouterr().err
    assert message in error and not (tmp_path / "o.json").exists()


@pytest.mark.parametrize("command", ["plan", "preview"])
def test_commands_about_language_models_say_so(command: str, capsys: pytest.CaptureFixture[str]):
    flags = ["--topology", "v5p:2x2x1", "--no-compile"] if command == "plan" else []
    assert main.run([command, "m3d_clip", *flags]) == 2
    assert "m3d_clip: has no language model" in capsys.readouterr().err
