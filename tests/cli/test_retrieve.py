"""`jaxmed retrieve` on upstream's own M3D-CLIP, and what it refuses."""

import json
from pathlib import Path

import numpy as np
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


def test_a_volume_whose_values_fail_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = json.loads(Path(RECORDS).read_text())["test"]
    volume = np.load(Path(VOLUMES) / rows[1]["image"])
    volume[0, 3, 5, 7] = np.nan
    np.save(tmp_path / "nan.npy", volume)
    rows = [
        {"image": str(tmp_path / "nan.npy"), "text": "A nodule."},
        *({**row, "text": f"No {n}."} for n, row in enumerate(rows)),
    ]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    flags = ["--records", str(tmp_path / "r.json"), "--out", str(tmp_path / "o.json"), "--batch", "2"]
    assert retrieve(*flags) == 2
    assert "record 0" in (said := capsys.readouterr().err) and "nan.npy: 1 of 4032 values" in said and "skip" in said
    assert retrieve(*flags, "--on-bad-record", "skip") == 0
    found = json.loads((tmp_path / "o.json").read_text())
    assert [row["id"] for row in found["pairs"]] == ["1", "2", "3", "4"]
    assert [row["where"].rpartition(": ")[2] for row in found["left_out"]] == ["record 0 (id '0')"]
    assert sorted(found["pairs"][2]["nearest_t2i"]) == ["1", "2", "3", "4"] and "1 record left out" in capsys.readouterr().err
    without = tmp_path / "w.json"
    without.write_text(json.dumps(rows[1:]))
    flags[1], flags[3] = str(without), str(tmp_path / "o2.json")
    assert retrieve(*flags) == 0
    assert json.loads((tmp_path / "o2.json").read_text())["recalls"] == found["recalls"]


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
