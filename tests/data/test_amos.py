"""AMOS-MM: regions and questions as records, bad entries by name, the submission."""

import copy
import dataclasses
import json

import pytest

from jaxmed.data.amos import submission
from jaxmed.data.captions import Prompts
from jaxmed.data.records import Reading, Turn, known_records, load_records
from jaxmed.errors import BadRecords, UserError
from jaxmed.evaluate.studies import pair, read_answers

PLAIN = Reading(placeholders=True, prompts=Prompts(("Whole?",), ("about {region}?", "and the {region}?")))


def entry(number: int, findings=None, qa=None, **more):
    labels = {} if findings is None else {"report": {"findings": findings, "impressions": "ignored"}}
    labels |= {} if qa is None else {"qa": qa}
    return {"image": f"./imagesTr/amos_{number:04d}.nii.gz", "meta": {"sex": "F"}, "labels": labels, **more}


def qa(question="Which organ?", answer="B", kind="Organ", **more):
    options = {"A": "Liver", "B": "Spleen", "C": "Left kidney", "D": "None of these"}
    return {"question": question, "type": kind, "options": options, "answer": answer, **more}


def write(tmp_path, **lists):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(lists))
    return str(path)


GOOD = [
    entry(1, {"chest": "", "abdomen": " Fatty liver.\n", "pelvis": "Normal."}, [qa()]),
    entry(2, {"abdomen": "Cyst."}, [qa(answer="d", reasoning="Because."), qa("Where?", "Left kidney", None)]),
    entry(3, {"chest": "Clear.", "abdomen": None, "Pelvis": "Mass."}),
]


def test_absent_regions_stay_absent(tmp_path):
    path = write(tmp_path, training=GOOD, validation=GOOD[:1], testing=[])
    records, problems = load_records(f"{path}:training", PLAIN)
    assert problems == []
    assert [(r.id, r.region, r.turns[0].value, r.turns[1].value, r.row) for r in records] == [
        ("amos_0001/abdomen", "abdomen", "about abdomen?", "Fatty liver.", 0),
        ("amos_0001/pelvis", "pelvis", "about pelvis?", "Normal.", 0),
        ("amos_0002/abdomen", "abdomen", "about abdomen?", "Cyst.", 1),
        ("amos_0003/chest", "chest", "about chest?", "Clear.", 2),
        ("amos_0003/pelvis", "pelvis", "about pelvis?", "Mass.", 2),
    ]
    assert records[0].images == ("imagesTr/amos_0001.nii.gz",)
    assert records[3].prompts == ("about chest?", "and the chest?")
    assert records[0].extra == {"meta": {"sex": "F"}}
    chest, _ = load_records(f"{path}:training:chest", PLAIN)
    assert [record.id for record in chest] == ["amos_0003/chest"]
    assert [record.turns for record in load_records(f"{path}:report:training", PLAIN)[0]] == [r.turns for r in records]
    with pytest.raises(UserError, match=r"holds the lists training, validation, testing, and none is named; .*json:training"):
        load_records(path, PLAIN)
    with pytest.raises(UserError, match=r"not 'train'"):
        load_records(f"{path}:train", PLAIN)
    with pytest.raises(UserError, match="one of them may name a list"):
        load_records(f"{path}:training:validation", PLAIN)


def test_questions(tmp_path):
    path = write(tmp_path, training=GOOD)
    choices = " Choices: A. Liver B. Spleen C. Left kidney D. None of these"
    targets = {"": ["B", "D", "C"], ":letter_text": ["B. Spleen", "D. None of these", "C. Left kidney"], ":open": None}
    for word, wanted in targets.items():
        records, problems = load_records(f"{path}:vqa{word}", PLAIN)
        assert problems == []
        assert [r.id for r in records] == ["amos_0001/qa0", "amos_0002/qa0", "amos_0002/qa1"]
        assert [(r.answer, r.question_type) for r in records] == [("B", "Organ"), ("D", "Organ"), ("C", "")]
        assert records[0].options["C"] == "Left kidney"
        if wanted:
            assert [r.turns[1].value for r in records] == wanted
            assert [r.turns[0].value for r in records] == [f" Which organ?{choices}"] * 2 + [f" Where?{choices}"]
        else:
            assert [(r.turns[0].value, r.turns[1].value) for r in records[1:]] == [
                (" Which organ?", "None of these"),
                (" Where?", "Left kidney"),
            ]
    assert records[1].extra["reasoning"] == "Because."
    listed = qa(options=["Yes", "No"], answer="A")
    assert known_records([entry(9, None, [listed])], Reading(placeholders=True, task="vqa"))[0].options == {
        "A": "Yes",
        "B": "No",
    }


def test_a_test_set_is_asked_for_everything_without_answers(tmp_path):
    asked = qa()
    del asked["answer"]
    rows = [{"image": "imagesTs/t1.nii.gz"}, entry(2, {"chest": "", "abdomen": "", "pelvis": ""}, [asked])]
    path = write(tmp_path, training=[], testing=rows)
    records, problems = load_records(f"{path}:testing", PLAIN)
    assert problems == []
    assert [r.id for r in records] == [f"{c}/{r}" for c in ("t1", "amos_0002") for r in ("chest", "abdomen", "pelvis")]
    assert {len(record.turns) for record in records} == {1}
    (question,), _ = load_records(f"{path}:testing:vqa", PLAIN)
    assert (question.answer, len(question.turns), len(question.options)) == ("", 1, 4)


BAD = [
    (entry(1, {"chest": "", "abdomen": " "}), "report has no text in any region"),
    (entry(1, "text"), "findings are str"),
    (entry(1, {"head": "x", "chest": "y"}), "the region 'head'"),
    (entry(1, {"chest": 7}), "findings of the chest are 7"),
    (entry(1, {"Chest": "x", "chest": "y"}), "findings have the chest twice"),
    (entry(1, {"chest": "x"}, image=""), "image is ''"),
]
BAD_QUESTIONS = [
    (qa(answer="E"), "answer is 'E', which is none of its options A, B, C, D"),
    (qa(options={"A": "Yes", "B": "No", "C": " yes"}), "options repeat: A and C are both 'yes'"),
    (qa(options={"A": "Yes", "a.": "No"}), "options repeat: A and A"),
    (qa(options={"A": "Yes"}), "the one option"),
    (qa(options={"A": "Yes", "B": ""}), "texts by letter"),
    (qa(options={"A": "Yes", "B": float("nan")}), "texts by letter"),
    (qa(options={"A": "Yes", "No": "No"}), "the name 'NO'"),
    (qa(question=" "), "question is ' '"),
    ("Is it?", "it is str"),
]


@pytest.mark.parametrize(("bad", "what"), BAD)
def test_a_bad_entry_is_named_and_the_others_are_read(tmp_path, bad, what):
    records, problems = load_records(write(tmp_path, training=[GOOD[1], bad]), PLAIN)
    assert [record.id for record in records] == ["amos_0002/abdomen"]
    assert len(problems) == 1 and what in problems[0].what
    assert problems[0].where.startswith(f"{tmp_path}/dataset.json: record 1") and "\n" not in str(problems[0])
    assert "amos_0001" in problems[0].where or "image" in what


@pytest.mark.parametrize(("bad", "what"), BAD_QUESTIONS)
def test_a_bad_question_is_named_and_the_others_of_its_entry_are_read(tmp_path, bad, what):
    path = write(tmp_path, training=[entry(5, None, [qa(), bad, qa("Last?")])])
    records, problems = load_records(f"{path}:vqa", PLAIN)
    assert [record.id for record in records] == ["amos_0005/qa0", "amos_0005/qa2"]
    assert len(problems) == 1 and problems[0].what.startswith("question 2 of 3: ") and what in problems[0].what
    assert "amos_0005" in problems[0].where


def test_a_letter_that_stands_twice_in_the_file_is_seen(tmp_path):
    path = tmp_path / "d.json"
    text = json.dumps({"training": [entry(6, None, [qa()])]})
    path.write_text(text.replace('"C": "Left kidney"', '"B": "Left kidney"'))
    _, problems = load_records(f"{path}:vqa", PLAIN)
    assert len(problems) == 1 and "'B' twice" in problems[0].what
    path.write_text(text.replace('"image"', '"image": "x.nii.gz", "image"'))
    _, problems = load_records(str(path), PLAIN)
    assert len(problems) == 1 and "'image' twice" in problems[0].what


def test_answers_are_paired_with_records_that_are_read_for_another_template(tmp_path):
    records, _ = load_records(f"{write(tmp_path, training=GOOD)}:vqa", PLAIN)
    entries = [
        {"image": r.images[0], "conversations_out": [{"id": r.id, "question": r.turns[0].value, "answer": "A"}]}
        for r in records
    ]
    (tmp_path / "x_vqa.json").write_text(json.dumps(entries))
    written = read_answers(str(tmp_path / "x_vqa.json"))
    again, _ = load_records(f"{tmp_path}/dataset.json:vqa", Reading("prepend"))
    assert again[0].turns[0].value.startswith("<image>")
    studies, notices = pair(written, again, "x")
    assert notices == [] and [study.references for study in studies] == [("B",), ("D",), ("C",)]
    again[1] = dataclasses.replace(again[1], turns=(Turn("human", "<image>\n Else?"), again[1].turns[1]))
    assert "1 studies were asked other questions" in pair(written, again, "x")[1][0]


SKELETON = {"validation": GOOD, "note": "x"}
WRITTEN = {
    "amos_0001/abdomen": "One.",
    "amos_0001/pelvis": "Two.",
    "amos_0002/abdomen": "",
    "amos_0003/chest": "Four.",
    "amos_0003/pelvis": "Five.",
}
LETTERS = {"amos_0001/qa0": "A", "amos_0002/qa0": "c", "amos_0002/qa1": "D"}


def test_the_submission_is_the_skeleton_with_the_models_words():
    before = copy.deepcopy(SKELETON)
    made = submission(SKELETON, WRITTEN | LETTERS)
    assert before == SKELETON and list(made) == ["validation"]
    assert [e["labels"].get("report", {}).get("findings") for e in made["validation"]] == [
        {"chest": "", "abdomen": "One.", "pelvis": "Two."},
        {"chest": "", "abdomen": "", "pelvis": ""},
        {"chest": "Four.", "abdomen": "", "pelvis": "Five."},
    ]
    assert [q["prediction"] for e in made["validation"] for q in e["labels"].get("qa", ())] == ["A", "C", "D"]
    assert [e["image"] for e in made["validation"]] == [e["image"] for e in GOOD]
    reports = submission(SKELETON, WRITTEN)["validation"]
    assert "prediction" not in reports[0]["labels"]["qa"][0]
    letters = submission(SKELETON, LETTERS)["validation"]
    assert letters[0]["labels"]["report"] == GOOD[0]["labels"]["report"]


def test_a_submission_that_is_not_whole_is_refused():
    short = {key: text for key, text in (WRITTEN | LETTERS).items() if key not in ("amos_0003/pelvis", "amos_0002/qa1")}
    with pytest.raises(BadRecords) as caught:
        submission(SKELETON, short | {"amos_0009/chest": "x", "amos_0001/qa0": "E"})
    text = str(caught.value)
    for part in (
        "entry 2 (amos_0003): has no prediction for pelvis",
        "entry 1 (amos_0002): question 2 has no prediction",
        "entry 0 (amos_0001): question 1 is answered 'E', its options are A, B, C, D",
        "'amos_0009/chest': no entry of validation",
    ):
        assert part in text
    assert len(caught.value.problems) == 4
    with pytest.raises(UserError, match="the lists validation, testing"):
        submission({"validation": GOOD, "testing": GOOD}, WRITTEN)
    with pytest.raises(UserError, match="no list 'test'"):
        submission(SKELETON, WRITTEN, "test")
