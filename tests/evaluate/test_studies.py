"""Pairing of generated answers with records."""

import json

import pytest

from jaxmed.data.records import load_records
from jaxmed.errors import UserError
from jaxmed.evaluate import studies


def record(name, image, *texts):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": name, "image": image, "conversations": turns}


def element(name, image, *pairs):
    return {"image": image, "conversations_out": [{"id": name, "question": q, "answer": a} for q, a in pairs]}


RECORDS = [
    record("r_3", "scan_3.nii.gz", "<image>\nReport?", " Clear lungs. "),
    record("q_8", "scan_8.nii.gz", "<image>\nNodule?", "Yes.", "Where?", "Left.", "Size?"),
]
ANSWERS = [
    element(
        "q_8", "scan_8.nii_embedded.npz", ("<image>\nNodule?", "No.<|eot_id|>"), ("Where?", "Right </s>"), ("Size?", "9 mm")
    ),
    element("r_3", "scan_3.nii_embedded.npz", ("<image>\nReport?", "Clear. <|eot_id|> \n<|end_of_text|>\n")),
]


def pair(tmp_path, answers, records):
    (tmp_path / "r.json").write_text(json.dumps(records))
    path = tmp_path / "x_vqa.json"
    path.write_text(json.dumps(answers))
    loaded, problems = load_records(str(tmp_path / "r.json"))
    assert not problems
    return studies.pair(studies.read_answers(str(path)), loaded, str(path))


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Normal.<|eot_id|>", "Normal."),
        ("Normal. </s></s> ", "Normal."),
        (" a <|eot_id|> b", "a <|eot_id|> b"),
        ("x < 5 mm", "x < 5 mm"),
        ("<|im_end|>", ""),
    ],
)
def test_end_tokens_are_stripped_at_the_end_alone(raw, clean):
    assert studies.strip_end(raw) == clean


def test_answers_meet_their_references_by_id_and_turn(tmp_path):
    found, notices = pair(tmp_path, ANSWERS, RECORDS)
    assert [s.id for s in found] == ["q_8", "r_3"]
    assert found[0].answers == ("No.", "Right")  # the third question has no reference
    assert found[0].references == ("Yes.", "Left.")
    assert found[1].answers == ("Clear.",) and found[1].references == ("Clear lungs.",) and found[1].image == "scan_3.nii.gz"
    assert notices == []


def test_half_characters_can_be_written(tmp_path):
    """JSON holds halves of surrogate pairs, a file of UTF-8 and a hash do not."""
    half = "\udc00"
    records = [record(f"r{half}", f"scan{half}.nii.gz", "<image>\nReport?", "Clear.")]
    found, _ = pair(tmp_path, [element(f"r{half}", f"scan{half}.npz", (f"q{half}", f"Normal{half}"))], records)
    texts = [found[0].id, found[0].image, *found[0].questions, *found[0].answers]
    assert all(text.encode("utf-8").count(rb"\udc00") == 1 for text in texts)


def test_records_without_answer_and_changed_questions_are_noticed(tmp_path):
    changed = [element("r_3", "scan_3.npz", ("<image>\nFindings?", "Clear."))]
    found, notices = pair(tmp_path, changed, RECORDS)
    assert len(found) == 1
    assert "1 of 2 records have no answer" in notices[0] and "other questions" in notices[1]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([element("r_9", "scan_3.npz", ("q", "a"))], "1 studies .r_9. are not in the records"),
        ([element("r_3", "scan_4.npz", ("q", "a"))], "written for scan_4.npz, its record names scan_3.nii.gz"),
        ([element("r_3", "scan_3.npz", ("q", "a"), ("q", "a"))], "2 answers, its record 1 questions"),
        ([ANSWERS[1], ANSWERS[1]], "'r_3' occurs 2 times here and 1 times"),
        ([{"image": "x"}], "element 0 has no .conversations_out."),
        ([{"image": "x", "conversations_out": [{"id": "r_3", "question": "q"}]}], "without the texts"),
        ([{"image": "x", "conversations_out": [{"question": "q", "answer": "a"}]}], "must carry the one id"),
        ({}, "holds no list of studies"),
    ],
)
def test_files_that_do_not_fit_say_so_in_one_line(tmp_path, answers, message):
    with pytest.raises(UserError, match=message) as caught:
        pair(tmp_path, answers, RECORDS)
    assert "\n" not in str(caught.value)


def test_jsonl_of_a_process_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"not the \.jsonl"):
        studies.read_answers(str(path))


def test_an_id_that_occurs_twice_is_matched_in_order(tmp_path):
    records = [record("x", "a.nii.gz", "<image>\nq", "first"), record("x", "b.nii.gz", "<image>\nq", "second")]
    answers = [element("x", "a.npz", ("<image>\nq", "one")), element("x", "b.npz", ("<image>\nq", "two"))]
    found, _ = pair(tmp_path, answers, records)
    assert [(s.answers[0], s.references[0]) for s in found] == [("one", "first"), ("two", "second")]


def test_control_follows_the_order_of_the_studies_and_must_be_whole(tmp_path):
    found, _ = pair(tmp_path, ANSWERS, RECORDS)
    path = tmp_path / "c_vqa.json"
    path.write_text(json.dumps(ANSWERS[::-1]))
    assert studies.control_answers(str(path), found) == [("No.", "Right"), ("Clear.",)]
    path.write_text(json.dumps(ANSWERS[:1]))
    with pytest.raises(UserError, match="lacks 1 of the studies, 'r_3'"):
        studies.control_answers(str(path), found)
