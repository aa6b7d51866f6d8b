"""`jaxmed evaluate` on AMOS-MM's files: regions, multiple choice, a judge by file exchange, runs against each other."""

import csv
import json

import pytest

from jaxmed.cli.evaluate import run
from jaxmed.errors import BadRecords, UserError

FINDINGS = {
    "chest": ["Clear lungs.", "", "A nodule."],
    "abdomen": ["Normal liver.", "A renal cyst on the left.", "Ascites."],
    "pelvis": ["", "Normal bladder.", ""],
}
TYPE = "organ [/i]"  # what the terminal would take for an end of italics
JUDGED = "[Clinically Significant Errors]:\n(b) Missing: {}. x\n\n[Matched Findings]:\n1. y"


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    entries = []
    for i in range(3):
        findings = {region: texts[i] for region, texts in FINDINGS.items()}
        options = {"A": "Left kidney", "B": "Right kidney", "C": "Liver", "D": "Spleen"}
        qa = [
            {"question": "Where?", "type": kind, "options": options, "answer": "BC"[n]} for n, kind in enumerate(("site", TYPE))
        ]
        entries.append({"image": f"./a/amos_{i}.nii.gz", "labels": {"report": {"findings": findings}, "qa": qa}})
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [], "validation": entries}))
    return tmp_path


def write(path, rows):
    """`rows`: (case, what, answer, further fields)."""
    elements = []
    for case, what, answer, more in rows:
        turn = {"id": f"amos_{case}/{what}", "question": "?", "answer": f"{answer}<|end_of_text|>"} | more
        elements.append({"image": f"a/amos_{case}.nii.gz", "conversations_out": [turn]})
    path.write_text(json.dumps(elements))


def reports(path, wrong=()):
    rows = [(i, region, texts[i], {}) for region, texts in FINDINGS.items() for i in range(3) if texts[i]]
    write(path, [(i, r, "Nothing to see." if (i, r) in wrong else text, more) for i, r, text, more in rows])


def letters(path, said, shares=None):
    more = {"prediction": "B", "probabilities": {"A": 0.1, "B": 0.7, "C": 0.1, "D": 0.1}} if shares else {}
    write(path, [(i, f"qa{n}", said[2 * i + n], more) for i in range(3) for n in range(2)])


def content(out, name="scores.json"):
    return json.loads((out / name).read_text())


def test_regions_and_green_by_file_exchange(files, capsys):
    reports(files / "x_vqa.json", wrong=[(1, "abdomen")])
    flags = ["x_vqa.json", "--records", "dataset.json:validation", "--out", "out", "--resamples", "60"]
    assert run([*flags, "--judge-requests", "asked.jsonl", "--green-version", "current"]) == 0
    assert "green" not in content(files / "out") and "6 questions for a judge" in capsys.readouterr().out
    asked = [json.loads(line) for line in (files / "asked.jsonl").read_text().splitlines()]
    assert [row["study"] for row in asked][:2] == ["amos_0/chest", "amos_2/chest"]
    said = [{"key": row["key"], "answer": JUDGED.format(i), "judge": "me"} for i, row in enumerate(asked)]
    (files / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    assert run([*flags, "--judge-answers", "said.jsonl", "--green-version", "current"]) == 0
    found = content(files / "out")
    by_region = {name: group["scores"]["green"] for name, group in found["regions"]["groups"].items()}
    assert by_region == pytest.approx({"chest": (1 + 1 / 2) / 2, "abdomen": (1 / 3 + 1 / 4 + 1 / 5) / 3, "pelvis": 1 / 6})
    assert found["regions"]["mean"]["scores"]["green"] == pytest.approx(sum(by_region.values()) / 3)
    green = found["green"]
    assert (green["version"], green["words"], green["judge"], green["wording"]) == ("current", 300, "me", "jaxmed")
    assert green["asked"] == green["answered"] == 6 and green["errors"]["significant"]["b"] == pytest.approx(2.5)
    assert found["studies"] == 3 and found["records"] == 6
    with open(files / "out" / "scores.csv", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert (
        float(rows["amos_1/abdomen"]["green_current"]) == pytest.approx(1 / 4) and rows["amos_1/abdomen"]["region"] == "abdomen"
    )
    html = (files / "out" / "report.html").read_text()
    assert "By region" in html and "current (reports cut to 300 words)" in html and '<span class="tag">pelvis</span>' in html
    # another version cuts differently, but these reports are short: the questions are the same
    assert run([*flags, "--judge-answers", "said.jsonl"]) == 0 and content(files / "out")["green"]["words"] == 200


def test_answers_that_are_missing_stop_or_are_left_out(files):
    reports(files / "x_vqa.json")
    flags = ["x_vqa.json", "--records", "dataset.json:validation", "--out", "out", "--resamples", "5"]
    run([*flags, "--judge-requests", "asked.jsonl"])
    asked = [json.loads(line) for line in (files / "asked.jsonl").read_text().splitlines()]
    said = [{"key": row["key"], "answer": JUDGED.format(1) if i else "no idea"} for i, row in enumerate(asked[:-1])]
    (files / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    with pytest.raises(BadRecords, match=r"amos_0/chest.*no judgment"):
        run([*flags, "--judge-answers", "said.jsonl"])
    assert run([*flags, "--judge-answers", "said.jsonl", "--on-bad-record", "skip"]) == 0
    assert content(files / "out")["green"]["answered"] == 4
    skipped = [json.loads(line)["where"] for line in (files / "out" / "skipped.jsonl").read_text().splitlines()]
    assert skipped == ["x_vqa.json: study 'amos_0/chest'", "x_vqa.json: study 'amos_1/pelvis'"]


def test_multiple_choice_with_likelihoods_and_upstreams_rule(files):
    letters(files / "x_vqa.json", ["B", "C. Liver", "(B)", "unsure", "A", "liver"], shares=True)
    flags = ["x_vqa.json", "--records", "dataset.json:validation:vqa", "--out", "out", "--resamples", "40"]
    assert run(flags) == 0
    closed = content(files / "out")["closed"]
    assert closed["scores"]["accuracy"] == pytest.approx(4 / 6) and closed["scores"]["unparsable_share"] == pytest.approx(1 / 6)
    assert closed["scores"]["likelihood_accuracy"] == 0.5 and closed["scores"]["calibration_error"] == pytest.approx(0.2)
    types = content(files / "out")["question_types"]["groups"]
    assert types["site"]["scores"]["accuracy"] == pytest.approx(2 / 3) == types[TYPE]["scores"]["accuracy"]
    html = (files / "out" / "report.html").read_text()
    assert "Multiple choice" in html and "Is its confidence deserved?" in html and "By type of question" in html
    with open(files / "out" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["named"] for row in rows] == ["B", "C", "B", "", "A", "C"] and rows[0]["confidence"] == "0.700000"
    letters(files / "c_vqa.json", ["B", "A", "A", "A", "A", "A"])
    assert run([*flags, "--control", "c_vqa.json", "--control-kind", "zeros"]) == 0
    control = content(files / "out")["closed"]["control"]
    assert control["accuracy"] == pytest.approx(1 / 6) and control["drop"] == pytest.approx(3 / 6)
    assert "accuracy goes from 0.667 to 0.167" in (files / "out" / "report.html").read_text()
    assert run([*flags, "--upstream-exact", "vqa_substring"]) == 0
    closed = content(files / "out")["closed"]
    assert closed["rule"] == "vqa_substring" and closed["scores"]["accuracy"] == pytest.approx(1 / 6)


def test_runs_against_each_other(files, capsys):
    reports(files / "before_vqa.json", wrong=[(0, "chest"), (1, "abdomen"), (2, "abdomen")])
    reports(files / "after_vqa.json", wrong=[(2, "chest")])
    (files / "more").mkdir()
    reports(files / "more" / "after_vqa.json")
    paths = ["before_vqa.json", "after_vqa.json", "more/after_vqa.json"]
    assert run([*paths, "--records", "dataset.json:validation", "--out", "out", "--resamples", "99"]) == 0
    found = content(files / "out", "comparison.json")
    names = [one["name"] for one in found["runs"]]
    assert len(set(names)) == 3 and names[2] == "more/after" and found["studies"] == 3
    first = found["comparisons"][0]["differences"]["rouge_l"]
    assert (first["wins"], first["losses"], first["ties"]) == (3, 1, 2)
    values = [run["scores"]["rouge_l"] for run in found["runs"]]
    assert first["difference"] == pytest.approx(values[1] - values[0]) and 0 < first["p"] <= 1
    assert found["comparisons"][0]["regions"]["abdomen"]["rouge_l"]["wins"] == 2
    assert found["comparisons"][1]["differences"]["rouge_l"]["losses"] == 0
    html = (files / "out" / "comparison.html").read_text()
    assert html.index("amos_1/abdomen</h3>") < html.index("amos_0/abdomen</h3>")  # those that differ come first
    assert html.count("<article") == 6 and "the same text" in html
    told = " ".join(capsys.readouterr().out.split())
    assert "ROUGE-L" in told and "3 studies: too few for intervals" in told
    assert "before. ROUGE-L differs by" in told and "That few studies decide nothing." in told
    assert "On the whole" not in html
    with open(files / "out" / "comparison.csv", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["id"] == "amos_0/chest")
    assert float(row[f"rouge_l {names[0]}"]) == 0 and float(row["rouge_l more/after"]) == 1


def test_letters_of_runs_against_each_other(files, capsys, monkeypatch):
    letters(files / "a_vqa.json", ["A"] * 6, shares=True)
    letters(files / "b_vqa.json", ["B", "C"] * 3, shares=True)
    monkeypatch.setenv("COLUMNS", "80")
    assert (
        run(["a_vqa.json", "b_vqa.json", "--records", "dataset.json:validation:vqa", "--out", "out", "--resamples", "30"]) == 0
    )
    found = content(files / "out", "comparison.json")["comparisons"][0]
    assert found["differences"]["accuracy"] == {"difference": 1, "interval": [1, 1], "p": pytest.approx(2 / 31)} | {
        "wins": 6,
        "losses": 0,
        "ties": 0,
    }
    assert found["question_types"][TYPE]["accuracy"]["difference"] == 1
    assert "…" not in capsys.readouterr().out, "80 columns hold all figures"


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--judge", "http://localhost:1/v1"], "--judge-model"),
        (["--judge-requests", "a", "--judge-answers", "b"], "one way"),
        (["--upstream-exact", "vqa_substring,vqa_first_letter"], "one of them"),
        (["--upstream-exact", "history_eot"], "unknown history_eot"),
        (["--wordnet", "nowhere"], r"no data\.noun"),
        (["--bertscore", "nowhere"], "no BERT"),
        (["--judge", "nowhere"], "no such folder"),
    ],
)
def test_flags_that_cannot_be_used(files, flags, match):
    reports(files / "x_vqa.json")
    with pytest.raises(UserError, match=match):
        run(["x_vqa.json", "--records", "dataset.json:validation", "--out", "out", *flags])


def test_probabilities_that_are_none_are_told(files):
    write(files / "x_vqa.json", [(0, "qa0", "B", {"prediction": "B", "probabilities": {"A": 0.9, "B": 0.9}})])
    asked = ["x_vqa.json", "--records", "dataset.json:validation:vqa", "--out", "out"]
    with pytest.raises(UserError, match=r"element 0: its probabilities must be shares"):
        run(asked)
    for prediction, letters in (("E", "ABCD"), ("A", "ABCE"), ("A", "ABC")):
        shares = dict.fromkeys(letters, 1 / len(letters))
        write(files / "x_vqa.json", [(0, "qa0", "B", {"prediction": prediction, "probabilities": shares})])
        with pytest.raises(
            UserError, match=f"'amos_0/qa0' chooses {prediction} among .* its record has the options A, B, C, D"
        ):
            run(asked)


def test_questions_asked_openly_are_scored_as_texts_by_type(files):
    head = "Image Path,Text,Question Type,Question,Choice A,Choice B,Choice C,Choice D,Answer,Answer Choice\n"
    rows = [f"v/{i}.npy,t,{1 + i % 2},Which?,Left,Right,NA,None,{('Left', 'Right')[i % 2]},{'AB'[i % 2]}\n" for i in range(4)]
    (files / "m3d.csv").write_text(head + "".join(rows))
    for name, said in (("closed", "A. Left"), ("open", "left")):
        turns = [{"id": str(i), "question": "?", "answer": said} for i in range(4)]
        elements = [{"image": f"v/{i}.npy", "conversations_out": [turn]} for i, turn in enumerate(turns)]
        (files / f"{name}_vqa.json").write_text(json.dumps(elements))
        flags = [f"{name}_vqa.json", "--records", f"m3d.csv:{name}", "--out", name, "--resamples", "20"]
        assert run(flags) == 0
    assert content(files / "closed")["closed"]["scores"]["accuracy"] == 0.5
    groups = content(files / "open")["question_types"]["groups"]
    assert "closed" not in content(files / "open") and "accuracy" not in groups["1"]["scores"]
    assert (groups["1"]["scores"]["rouge_l"], groups["2"]["scores"]["rouge_l"]) == (1, 0)


def test_a_judge_on_another_machine_is_said_before_it_is_asked(files, capsys, monkeypatch):
    reports(files / "x_vqa.json")
    flags = ["x_vqa.json", "--records", "dataset.json:validation", "--out", "out", "--resamples", "5", "--judge-model", "m"]
    seen = []

    def complete(judge, prompts):
        seen.append("leave this machine" in capsys.readouterr().err)
        return [JUDGED.format(1)] * len(prompts)

    monkeypatch.setattr("jaxmed.evaluate.endpoint.EndpointJudge.complete", complete)
    assert run([*flags, "--judge", "https://judge.example/v1", "--judge-parallel", "1"]) == 0
    assert seen == [True] + [False] * 5 and content(files / "out")["green"]["judge"] == "m at judge.example"
    assert run([*flags, "--judge", "http://localhost:8000/v1", "--judge-parallel", "1"]) == 0
    assert seen[6:] == [False] * 6
