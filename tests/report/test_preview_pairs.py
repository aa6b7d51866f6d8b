"""Preview of pairs: what the text encoder gets of a report, whose words repeat, and the command."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from jaxmed.cli import common
from jaxmed.cli import preview as command
from jaxmed.cli.validate import resolve
from jaxmed.config import PrepareConfig
from jaxmed.data.pairs import scan_pairs
from jaxmed.data.plan import GlobalBatch
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import UserError
from jaxmed.report.preview_pairs import histogram, left_out, runs
from jaxmed.report.survey_pairs import survey_pairs, with_twins

GOLDEN = Path(__file__).parents[1] / "golden" / "vit3d"
CLIP = str(GOLDEN / "m3d_clip")
LIMIT = 24
LONG = "large mass on the right. the trachea is displaced. the carotid arteries are patent. no fracture is seen. burst of l1."


@pytest.fixture
def records(tmp_path):
    """Five usable pairs, two of them with one text and one with a sign that no word holds; in between what cannot be used."""
    volume = sorted((GOLDEN / "data" / "M3D_Cap_npy").glob("*/*/*.npy"))[0]
    image = tmp_path / "volume.npy"
    image.write_bytes(volume.read_bytes())
    texts = [
        ("short", "no fracture"),
        ("empty", ""),
        ("long", LONG),
        ("odd", "no fracture \u6771"),
        ("twin", "no fracture"),
        ("last", LONG[:-1] + " of l2."),
    ]
    pairs = [
        {"id": name, "image": str(image), "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": text}]}
        for name, text in texts
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([*pairs, {**pairs[0], "id": "lost", "image": str(tmp_path / "lost.npy")}]))
    return path


def run(records, *flags):
    given = [
        "--model.base",
        CLIP,
        "--set",
        "vision.heads=5",
        "--visual.prepare.augment",
        "none",
        "--data.records",
        str(records),
    ]
    given += ["--data.max-length", str(LIMIT), "--out", str(records.parent / "page.html")]
    return command.run(["m3d_clip", *given, *flags])


def test_texts_are_those_of_the_first_epoch(records):
    asked = common.load_experiment("m3d_clip")
    data = dataclasses.replace(asked.data, records=str(records), max_length=LIMIT, on_bad_record="skip")
    visual = dataclasses.replace(asked.visual, prepare=PrepareConfig())
    model = dataclasses.replace(asked.model, base=CLIP, tower=dataclasses.replace(asked.model.tower, heads=5))
    asked = resolve(dataclasses.replace(asked, data=data, visual=visual, model=model), {"model.tower.heads"})[0]
    tokenizer = Tokenizer.from_folder(CLIP)
    found, dataset = survey_pairs(asked, tokenizer, str(records)), scan_pairs(asked, tokenizer, str(records))
    assert [row.record.id for row in found.usable] == [pair.record.id for pair in dataset.samples]
    rows = tuple((index,) for index in range(len(found.usable)))
    arrays, _ = dataset.build_rows(GlobalBatch(LIMIT, rows, epoch=0), range(len(rows)))
    for place, row in enumerate(found.usable):
        assert row.given == dataset.text(place, (0, place, 0))
        given = arrays["tokens"][place][arrays["mask"][place] == 1].tolist()
        shown = [piece for run in runs(row, tokenizer, LIMIT) for piece in run["pieces"]]
        kept = [int(piece["tip"].split()[1].rstrip(",")) for piece in shown if "cut off" not in piece["tip"]]
        assert kept == given and [p["tip"].split("place ")[1] for p in shown if "place" in p["tip"]] == [
            *map(str, range(len(given)))
        ]
        words = "".join(
            piece["text"] for run in runs(row, tokenizer, LIMIT) if run["kind"] == "text" for piece in run["pieces"]
        )
        assert words.strip() in row.given.replace("\u6771", "").lower()
    long = found.usable[1]
    pieces = {*long.given.split("."), *left_out(long).split(".")}
    assert {piece.strip() for piece in pieces} >= {piece.strip() for piece in LONG.split(".")}
    assert [row.record.id for row in found.long] == ["long", "last"] and left_out(long)


def test_twins_in_a_batch_are_counted_as_drawing_says():
    groups = [0, 0, 0, 1, 1, 2, 3]
    for batch in (2, 4, 7):
        draws = list(itertools.combinations(groups, batch))
        expected = np.mean([sum(draw.count(group) > 1 for group in draw) for draw in draws])
        assert with_twins([3, 2], len(groups), batch) == pytest.approx(expected)
    assert with_twins([3], 3, 1) == with_twins([], 9, 4) == 0


@pytest.mark.parametrize(("lengths", "limit"), [([1, 39, 40, 41, 97], 40), ([2, 2], 512), ([512, 513, 4001], 512), ([], 7)])
def test_no_bar_holds_reports_on_both_sides_of_the_limit(lengths, limit):
    bars = histogram(lengths, limit)["bars"]
    assert sum(bar["count"] for bar in bars) == len(lengths)
    assert sum(bar["count"] for bar in bars if bar["long"]) == sum(length > limit for length in lengths)
    for bar in bars:
        assert bar["count"] == sum(bar["from"] <= length <= bar["to"] for length in lengths)


def test_the_page_shows_what_is_cut_what_repeats_and_what_cannot_be_used(records, capsys):
    assert run(records, "--rows", "0-6") == 0
    out, html = capsys.readouterr().out, (records.parent / "page.html").read_text()
    assert "5 of 7 records can be trained on" in out and f"2 reports have more than {LIMIT} tokens" in out
    assert "2 pairs share their words with another (1 texts): of 5 told from each other 2.0 on average" in out
    assert "'empty'" in out and "no report" in out and "lost.npy" in out
    assert html.count("<article") == 7 and html.count("data:image/png") == 6 * 4
    assert html.count("Not alone.") == 2 and html.count("Left out in the first epoch") == 2 and 'class="tok unknown"' in html


def test_values_are_checked_where_asked(records, capsys):
    kept = json.loads(records.read_text())[:1]
    records.write_text(json.dumps(kept))
    assert run(records, "--check-values", "--random", "0") == 0
    assert "values of all files are sound" in capsys.readouterr().out
    values = np.load(kept[0]["image"])
    values.reshape(-1)[5] = np.nan
    np.save(kept[0]["image"], values)
    assert run(records, "--check-values", "--random", "0") == 1
    assert "NaN" in capsys.readouterr().out


def test_a_tokenizer_is_asked_for(records):
    with pytest.raises(UserError, match="text-folder, a BERT"):
        command.run(["m3d_clip", "--data.records", str(records)])
