"""`jaxmed evaluate` from files to files."""

import json

import nibabel
import numpy as np
import pytest

from jaxmed.cli.evaluate import Args, evaluate, run
from jaxmed.data.records import Reading, load_records
from jaxmed.errors import BadRecords, UserError
from jaxmed.report.evaluation import PageLimits

ANSWERS = ["No <nodule>.", "Small effusion on the left.", "No nodule.", "Heart is enlarged.", "No nodule."]
REFERENCES = ["No nodule.", "Small effusion on the right.", "A nodule of 9 mm.", "Heart is enlarged.", "Clear."]


def entry(i, answer):
    question = "<image>\nReport?"
    return {
        "image": f"v{i}.nii_embedded.npz",
        "conversations_out": [{"id": f"s{i}", "question": question, "answer": f"{answer}<|eot_id|>"}],
    }


@pytest.fixture
def files(tmp_path):
    def turns(i):
        return [{"from": "human", "value": "<image>\nReport?"}, {"from": "gpt", "value": REFERENCES[i]}]

    records = [{"id": f"s{i}", "image": f"v{i}.nii.gz", "conversations": turns(i)} for i in range(len(REFERENCES))]
    contents = {
        "records.json": records,
        "x_vqa.json": [entry(i, answer) for i, answer in enumerate(ANSWERS)],
        "c_vqa.json": [entry(i, "No nodule.") for i in range(len(ANSWERS))],
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def arguments(folder, **more):
    return Args(str(folder / "x_vqa.json"), str(folder / "records.json"), str(folder / "out"), **more)


def test_command_writes_scores_and_page(files, capsys):
    flags = ["--control", f"{files}/c_vqa.json", "--control-kind", "zeros", "--resamples", "40"]
    assert run([f"{files}/x_vqa.json", "--records", f"{files}/records.json", "--out", f"{files}/out", *flags]) == 0
    content = json.loads((files / "out" / "scores.json").read_text())
    assert content["control"]["kind"] == "zeros" and content["control"]["unchanged_share"] == pytest.approx(2 / 5)
    assert content["collapse"]["distinct"] == 4 and content["studies"] == 5
    html = (files / "out" / "report.html").read_text()
    assert html.count("<article") == 5 and "<img" not in html
    assert "&lt;nodule&gt;" in html and "<nodule>" not in html and "eot_id" not in html
    assert '<mark class="ours">left.</mark>' in html and '<mark class="theirs">right.</mark>' in html
    assert "With the wrong image: the same text" in html
    printed = capsys.readouterr().out
    assert "BLEU-4" in printed and f"{content['corpus']['bleu_4']:.3f}" in printed


def test_records_may_be_a_table(tmp_path):
    """What SAMF's questions are scored against: rows without any place for an image."""
    (tmp_path / "mcq.csv").write_text(
        "Question ID,Image,Question,Choice A,Choice B,Choice C,Choice D,Answer Choice,Answer\n"
        "1,a/v.nii.gz,Which side?,Left,Right,Both,None,a,Left\n2,b/v.nii.gz,Is it clear?,Yes,No,Partly,None,b,No\n"
    )
    names = load_records(str(tmp_path / "mcq.csv"), Reading(placeholders=True))[0]
    answers = [{"id": record.id, "question": record.turns[0].value, "answer": "a. Left."} for record in names]
    written = [{"image": r.images[0], "conversations_out": [a]} for r, a in zip(names, answers, strict=True)]
    (tmp_path / "x_vqa.json").write_text(json.dumps(written))
    out = tmp_path / "out"
    assert run([f"{tmp_path}/x_vqa.json", "--records", f"{tmp_path}/mcq.csv", "--out", str(out), "--resamples", "40"]) == 0
    assert 0 < json.loads((out / "scores.json").read_text())["corpus"]["rouge_l"] < 1


def test_reconstructions_of_ct_rate_are_drawn_with_their_patient(tmp_path, capsys):
    names = [f"valid_{patient}_a_{n}" for patient in range(3) for n in (1, 2)]
    rows = "".join(f"{name}.nii.gz,,,The lungs are clear.,\n" for name in names)
    head = "VolumeName,ClinicalInformation_EN,Technique_EN,Findings_EN,Impressions_EN\n"
    (tmp_path / "reports.csv").write_text(head + rows)
    records, _ = load_records(f"{tmp_path}/reports.csv", Reading(placeholders=True))
    turns = [{"id": record.id, "question": record.turns[0].value, "answer": "Clear lungs."} for record in records]
    elements = [{"image": r.images[0], "conversations_out": [turn]} for r, turn in zip(records, turns, strict=True)]
    (tmp_path / "x_vqa.json").write_text(json.dumps(elements))
    assert run([f"{tmp_path}/x_vqa.json", "--records", f"{tmp_path}/reports.csv", "--out", f"{tmp_path}/s"]) == 0
    assert "6 studies of 3 patients: too few" in " ".join(capsys.readouterr().out.split())
    content = json.loads((tmp_path / "s" / "scores.json").read_text())
    assert (content["studies"], content["patients"]) == (6, 3)


def test_page_shows_extra_figures_and_a_capped_even_selection(files):
    extra = {"Findings": {"nodule": {"F1": 0.8125, "shuffled": 0.25}, "studies": 64}}
    evaluate(arguments(files, resamples=5, page=PageLimits(studies=3)), extra)
    html = (files / "out" / "report.html").read_text()
    assert "0.812" in html and "0.250" in html and ">64<" in html.replace(" ", "")
    assert html.count("<article") == 3 and "shows 3 of 5 studies" in html
    assert all(f"<h3>s{i}</h3>" in html for i in (0, 2, 4))


def test_slices_stand_where_the_volume_is_and_a_bad_one_is_noticed(files):
    volumes = files / "volumes"
    volumes.mkdir()
    for name, hu in (("v1", -1000), ("v2", 40), ("v3", -1000)):
        voxels = np.full((12, 10, 9), 50, np.int16)
        voxels[:4] = hu
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2.0, 2, 3, 1])), volumes / f"{name}.nii.gz")
    evaluate(arguments(files, resamples=5, volumes=str(volumes)))
    html = (files / "out" / "report.html").read_text()
    assert html.count("data:image/png") == 6  # v1 and v3; v2 has no air
    assert "Slices of 1 studies cannot be shown" in html and "no reading of its numbers gives air" in html
    evaluate(arguments(files, resamples=5, volumes=str(volumes), page=PageLimits(slices=1)))
    html = (files / "out" / "report.html").read_text()
    assert html.count("data:image/png") == 3 and "first 1 studies" in html


def test_bad_records_stop_or_are_left_out(files):
    path = files / "records.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), {"id": "s9", "conversations": []}]))
    with pytest.raises(BadRecords, match="s9"):
        evaluate(arguments(files))
    assert evaluate(arguments(files, resamples=5, on_bad_record="skip")).answers == 5


def test_headers_name_the_control_and_give_away_a_mistake(files):
    def header(name, kind):
        (files / f"{name}.header.json").write_text(json.dumps({"control": kind}))

    header("c_vqa.json", "shuffled")
    control = str(files / "c_vqa.json")
    assert evaluate(arguments(files, resamples=5, control=control)).control.kind == "shuffled"
    header("c_vqa.json", "")
    header("x_vqa.json", "noise")
    assert evaluate(arguments(files, resamples=5, control=control)).control.kind == ""
    html = (files / "out" / "report.html").read_text()
    assert "it is no control" in html and "itself written with wrong images (noise)" in html


def test_flags_that_cannot_be_used(files):
    with pytest.raises(UserError, match="--resamples is 0"):
        evaluate(arguments(files, resamples=0))
    with pytest.raises(UserError, match="--records"):
        run([f"{files}/x_vqa.json", "--out", "o"])
