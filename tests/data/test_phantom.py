"""Phantoms show what their labels say, reports say what their labels say, and the vocabulary gives the reports back."""

import json
import os
from collections import Counter

import nibabel
import numpy as np
import pytest
import tokenizers

from jaxmed.data import phantom_dataset
from jaxmed.data.metadata import Metadata
from jaxmed.data.phantom import SHAPE, Study, draw, sample_study
from jaxmed.data.phantom_dataset import make_dataset, study_id
from jaxmed.data.phantom_reports import (
    FINDINGS,
    MIDLINE,
    REQUESTS,
    build_tokenizer,
    findings_in,
    score_findings,
    write_report,
)
from jaxmed.data.volumes import read_volume
from jaxmed.errors import UserError


def half(volume, side):
    """x grows from the patient's right to left."""
    return volume[SHAPE[0] // 2 :] if side == "left" else volume[: SHAPE[0] // 2]


def lung_voxels(volume):
    """Aerated voxels within the body: away from the border, where air is outside."""
    inside = volume[10:-10, 14:-14, 4:-4]
    return inside[inside < -700]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("finding", FINDINGS)
def test_finding_is_drawn_on_its_side(finding, side):
    other = "left" if side == "right" else "right"
    side = MIDLINE if finding == "cardiomegaly" else side
    for index in range(6):
        # The same seed draws the same patient; only the finding differs (and the noise, once its numbers have been used).
        ill = draw(Study({finding: side}, (5, index))).astype(np.float32)
        well = draw(Study({}, (5, index))).astype(np.float32)
        if finding == "cardiomegaly":
            assert lung_voxels(ill).size < lung_voxels(well).size * 0.95
            continue
        if finding == "emphysema":
            darker = [lung_voxels(half_only(well, s)).mean() - lung_voxels(half_only(ill, s)).mean() for s in (side, other)]
            assert darker[0] > 60 and abs(darker[1]) < 10
            continue
        denser = ill - well > 400
        assert half(denser, side).sum() > 4 * half(denser, other).sum() + 8


def half_only(volume, side):
    kept = np.zeros_like(volume)
    half(kept, side)[...] = half(volume, side)
    return kept


def test_study_is_a_function_of_seed_and_index():
    assert sample_study(3, 8) == sample_study(3, 8)
    np.testing.assert_array_equal(draw(sample_study(3, 8)), draw(sample_study(3, 8)))
    assert not np.array_equal(draw(sample_study(3, 8)), draw(sample_study(3, 9)))
    assert not np.array_equal(draw(sample_study(3, 8)), draw(sample_study(4, 8)))


def test_findings_are_as_frequent_as_said():
    studies = [sample_study(11, i).findings for i in range(4000)]
    counts = Counter((name, side) for findings in studies for name, side in findings.items())
    assert abs(sum(not findings for findings in studies) / 4000 - 0.08) < 0.015
    for name in FINDINGS:
        sides = (MIDLINE,) if name == "cardiomegaly" else ("left", "right")
        shares = [counts[name, side] / 4000 for side in sides]
        assert 0.33 < sum(shares) < 0.4
        assert max(shares) - min(shares) < 0.04
    assert len(counts) == 9


def test_reports_read_back_as_their_labels():
    rng = np.random.default_rng(0)
    wordings = set()
    for i in range(3000):
        findings = sample_study(1, i).findings
        report = write_report(findings, rng)
        assert findings_in(report) == set(findings.items()), report
        wordings.add(report)
    assert len(wordings) > 2500


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", set()),
        ("Pleura: there is a LEFT pleural\neffusion.", set()),
        ("Pleura: there is a LEFT pleural effusion", {("effusion", "left")}),
        ("No nodule, but effusion on the right.", {("effusion", "right")}),
        ("The heart is not enlarged; a right nodule.", {("nodule", "right")}),
        ("Bilateral effusions are seen.", {("effusion", "left"), ("effusion", "right")}),
        ("Nodules: a nodule is seen.", {("nodule", "unstated")}),
        ("Heart: enlarged heart. Nodules: no lung nodule on the left.", {("cardiomegaly", MIDLINE)}),
    ],
)
def test_reader_of_other_wordings(text, found):
    got = findings_in(text)
    assert got == found or (text.count("\n") and got == {("effusion", "unstated")})


def test_scores_by_hand():
    labels = {"a": {"nodule": "left"}, "b": {"nodule": "right", "effusion": "left"}, "c": {}}
    predictions = {
        "a": "Nodules: there is a nodule in the left lung.",
        "b": "Nodules: there is a nodule in the left lung. Pleura: a left effusion is present.",
        "c": "Heart: the heart is enlarged.",
    }
    scores = score_findings(predictions, labels)
    # hits: a nodule, b effusion; claimed 4; real 3
    assert scores.f1 == pytest.approx(4 / 7)
    assert scores.by_finding == {"cardiomegaly": 0.0, "effusion": 1.0, "nodule": 0.5}
    assert scores.studies == 3
    perfect = {i: write_report(sample_study(2, i).findings, np.random.default_rng(i)) for i in range(50)}
    assert score_findings(perfect, {i: sample_study(2, i).findings for i in range(50)}).f1 == 1.0
    exchanged = {i: perfect[(i + 1) % 50] for i in range(50)}
    assert score_findings(exchanged, {i: sample_study(2, i).findings for i in range(50)}).f1 < 0.35


def test_vocabulary_gives_the_text_back(tmp_path):
    reports = [write_report(sample_study(7, i).findings, np.random.default_rng(i)) for i in range(400)]
    build_tokenizer([*reports, *REQUESTS], str(tmp_path))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() < 100
    for report in reports[:50]:
        assert tokenizer.decode(tokenizer.encode(report, add_special_tokens=False).ids) == report
    turn = f"<|user|>\n{REQUESTS[0]}<|end|><|assistant|>{reports[0]}<|end|>"
    encoded = tokenizer.encode(turn)
    assert encoded.ids[0] == tokenizer.token_to_id("<s>")
    assert encoded.ids.count(tokenizer.token_to_id("<|end|>")) == 2
    assert tokenizer.token_to_id("<unk>") not in encoded.ids
    assert tokenizer.decode(encoded.ids) == f"{REQUESTS[0]} {reports[0]}"
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.token_to_id("<|end|>")]


def test_every_study_fits_a_row_of_96(tmp_path):
    """Begin, role, 32 image tokens, request, end, role, the longest report, end: what a config's bucket must hold."""
    reports = [
        write_report(dict.fromkeys(names, "left"), np.random.default_rng(i)) for i in range(600) for names in ((), FINDINGS)
    ]
    build_tokenizer([*reports, *REQUESTS], str(tmp_path))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    length = {text: len(tokenizer.encode(text, add_special_tokens=False).ids) for text in (*reports, *REQUESTS)}
    assert 32 + 5 + max(length[text] for text in reports) + max(length[text] for text in REQUESTS) <= 96


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def test_dataset_is_laid_out_as_a_real_one(tmp_path):
    dataset = make_dataset(str(tmp_path), {"train": 5, "test": 3}, seed=4, processes=1)
    train, test = read_json(dataset.records["train"]), read_json(dataset.records["test"])
    assert [r["id"] for r in train + test] == [study_id(i) for i in range(8)]
    labels = read_json(dataset.labels)
    for index, record in enumerate(train + test):
        human, answer = record["conversations"]
        assert human["from"] == "human" and human["value"].startswith("<image>\n")
        assert findings_in(answer["value"]) == set(labels[record["id"]].items())
        path = os.path.join(dataset.volumes, record["image"])
        volume = read_volume(path, Metadata(dataset.metadata).of(path))
        assert volume.spacing == (8.0, 8.0, 10.5)
        assert volume.reading.name == "header"
        np.testing.assert_array_equal(volume.stored, draw(sample_study(4, index)))
    assert nibabel.aff2axcodes(nibabel.load(path).affine) == ("L", "P", "S")
    assert not [name for name in os.listdir(dataset.volumes) if "partial" in name]


def test_dataset_goes_on_where_it_stopped(tmp_path, monkeypatch):
    make_dataset(str(tmp_path), {"train": 4}, seed=4, processes=1)
    kept = tmp_path / "volumes" / "phantom_00002.nii.gz"
    before = kept.stat().st_mtime_ns
    (tmp_path / "volumes" / "phantom_00003.nii.gz").unlink()
    drawn = []
    draw_one = phantom_dataset.draw
    monkeypatch.setattr(phantom_dataset, "draw", lambda study: drawn.append(study.seed[1]) or draw_one(study))
    dataset = make_dataset(str(tmp_path), {"train": 3, "valid": 3}, seed=4, processes=1)
    assert drawn == [2, 4, 5]
    assert kept.stat().st_mtime_ns == before
    assert [r["id"] for r in read_json(dataset.records["valid"])] == [study_id(i) for i in (3, 4, 5)]
    with pytest.raises(UserError, match="another seed"):
        make_dataset(str(tmp_path), {"train": 4}, seed=5, processes=1)
