"""Tables of questions and captions: what becomes of a row, and that every refusal says where and what to do."""

import json

import pytest

from jaxmed.data.captions import CAPTION_PROMPTS, Prompts, read_prompts
from jaxmed.data.record_files import records_file
from jaxmed.data.records import Reading, known_records, load_records, record_from_dict
from jaxmed.data.tables import draft_of, kind_of, parse_report
from jaxmed.errors import UserError

PLAIN = Reading(placeholders=True)
M3D = "Image Path,Text,Question Type,Question,Choice A,Choice B,Choice C,Choice D,Answer,Answer Choice"
SAMF = "Question ID,Image,Question,Choice A,Choice B,Choice C,Choice D,Answer Choice,Answer"


def write(tmp_path, text, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def texts(records):
    return [tuple(turn.value for turn in record.turns) for record in records]


def test_rows_of_each_table(tmp_path):
    m3d = write(tmp_path, f'\ufeff{M3D}\na.npy,a.txt,3,"Which, now?",Liver,NA,,"Left ""k""",Liver,A\n', "m.csv")
    (record,), problems = load_records(m3d, PLAIN)
    assert problems == []
    assert texts([record]) == [(' Which, now? Choices: A. Liver B. NA C.  D. Left "k"', "A. Liver")]
    assert (record.id, record.images, record.row, record.source) == ("0", ("a.npy",), 0, m3d)
    assert record.extra["Question Type"] == "3"
    assert record.extra["Answer Choice"] == "A"
    (opened,), _ = load_records(m3d, Reading(placeholders=True, questions="open"))
    assert texts([opened]) == [(" Which, now?", "Liver")]
    samf = write(tmp_path, f"{SAMF}\nq,b.nii.gz,Is it?,Yes,No,None,<NA>,b,No.\r\n\r\nq,c.nii.gz,Is it?,x,y,z,w,D,w\n", "s.csv")
    records, problems = load_records(samf, PLAIN)
    assert problems == []
    assert texts(records) == [
        (" Is it? Choices: a. Yes b. No c. None d. <NA>", "b. No.."),
        (" Is it? Choices: a. x b. y c. z d. w", "D. w."),
    ]
    named = load_records(samf, Reading(placeholders=True, upstream_exact=frozenset({"na_choices"})))[0]
    assert texts(named)[0] == (" Is it? Choices: a. Yes b. No c. nan d. nan", "b. No..")
    reports = write(tmp_path, 'image,caption\na.nii.gz," Clear, both ""sides""."\nb.nii.gz,None\n', "r.csv")
    assert texts(load_records(reports, PLAIN)[0]) == [
        (CAPTION_PROMPTS[0], ' Clear, both "sides".'),
        (CAPTION_PROMPTS[0], "None"),
    ]


def test_numbers_that_pandas_writes_in_front_and_empty_rows_do_not_count(tmp_path):
    rows = [f",{M3D},", "0,a.npy,t,3,Q,1,2,3,4,2,B,", "", "  ", ",,,,,,,,,,,", "1,b.npy,t,3,R,1,2,3,4,4,D,"]
    records, problems = load_records(write(tmp_path, "\r\n".join(rows)), PLAIN)
    assert problems == []
    assert [(record.row, record.answer, record.turns[1].value) for record in records] == [(0, "B", "B. 2"), (1, "D", "D. 4")]
    assert "" not in records[0].extra
    reports = write(tmp_path, ",VolumeName,Findings_EN\n7,valid_1_a_1.nii.gz,Clear.\n", "ct.csv")
    assert [record.patient for record in load_records(reports, PLAIN)[0]] == ["valid_1"]


def test_entries_of_a_list_without_an_image_or_a_text(tmp_path):
    entries = [
        {"image": None, "text": "Clear lungs."},
        {"image": "a.npy", "text": float("nan")},
        {"image": "b.npy", "text": "B"},
    ]
    path = write(tmp_path, json.dumps({"train": entries}), "cap.json")
    records, problems = load_records(path, PLAIN)
    assert [record.images for record in records] == [("b.npy",)]
    assert [problem.what.split(";")[0] for problem in problems] == ["its image is null", "its text is empty"]
    with pytest.raises(UserError, match="holds no records"):
        load_records(write(tmp_path, '{"train": []}', "none.json"), PLAIN)


def test_a_caption_has_its_own_question_or_those_of_a_list_of_which_the_first_is_asked():
    rows = [{"image": "a", "caption": "A."}, {"image": "b", "caption": "B.", "question": "What is it?"}] * 2
    prompts = ("One.", "Two.", "Three.")
    records = known_records(rows, Reading(placeholders=True, prompts=Prompts(prompts)))
    assert texts(records) == [("One.", "A."), ("What is it?", "B.")] * 2
    assert [record.prompts for record in records] == [prompts, ()] * 2
    assert len(set(CAPTION_PROMPTS)) == len(CAPTION_PROMPTS) >= 40


def test_rows_from_python_are_known_by_their_columns():
    row = {"image": "a.npy", "question": " Is it?", "answer": "Yes", "id": 7}
    record = record_from_dict(row, reading=PLAIN)
    assert (record.id, texts([record])) == ("7", [(" Is it?", "Yes")])
    opened = {"Image Path": "a.npy", "Question": "Is it?", "Answer": 3}
    assert texts([record_from_dict(opened, reading=PLAIN)]) == [(" Is it?", "3")]
    assert kind_of({"image": "", "conversations": []}) == ""
    with pytest.raises(UserError, match="its columns are image; known tables have"):
        draft_of({"image": "a"})


def test_with_other_templates_an_image_goes_in_front():
    record = record_from_dict({"image": "a.png", "question": "Is it?", "answer": "No"}, reading=Reading("prepend"))
    assert texts([record]) == [("<image>\nIs it?", "No")]


BAD = [
    (f"{M3D}\na.npy,t,3,Q,1,2,3,4,2,E\n", "answer choice is 'E'", "one of A, B, C, D"),
    (f"{M3D}\na.npy,t,3, ,1,2,3,4,2,B\n", "question is empty", "take the row out"),
    (f"{M3D}\na.npy,t,3,Q,1,2,3,4,,B\n", "answer is empty", "take the row out"),
    (f"{M3D}\n,t,3,Q,1,2,3,4,2,B\n", "`image` is ''", "file name"),
    (f"{M3D}\na.npy,t,3,Q,1,2,3,4,2\n", "9 values, more or fewer", "quote texts"),
    (f"{M3D}\na.npy,t,3,Q,1,Left  lung,3,left lung,1,a\n", "choices repeat: B and D are both 'left lung'", "mend the choices"),
    (f"{M3D}\na.npy,t,4,Is it?,NA,NA,NA,NA,Yes,NA\n", "answer choice is 'NA'", ":open behind the file's name"),
    (f"{M3D}\na.npy,t,4,Is it?,x,y,z,w,x,\n", "answer choice is empty", ":open behind the file's name"),
    ("image,caption\na.npy, \n", "caption is empty", "write one"),
    ("image,text\na.npy,none.txt\n", "'none.txt' is not there", "looked in"),
]


@pytest.mark.parametrize(("text", "what", "fix"), BAD)
def test_an_unusable_row_is_a_problem_and_the_others_are_read(tmp_path, text, what, fix):
    header = text.split("\n")[0]
    good = {"image,caption": "b.npy,B.", "image,text": "b.npy,B."}.get(header, "b.npy,t,3,Q,1,2,3,4,2,b")
    records, problems = load_records(write(tmp_path, f"{text}{good}\n"), PLAIN)
    assert [record.row for record in records] == [1]
    assert len(problems) == 1
    assert "record 0" in problems[0].where
    assert what in problems[0].what
    assert fix in problems[0].what


FILES = [
    ("", "holds no rows", "at least one row"),
    ("a,b\n1,2\n", "its columns are a, b", "known tables have"),
    (b"image,caption\na,\xff\n", "not UTF-8 at byte 16", "as UTF-8"),
    (f"{M3D}\n", "holds no rows", "at least one row"),
    (f"{M3D}, question\na,t,3,Q,1,2,3,4,2,B,Q2\n", "the column 'Question' twice", "leave one of them out"),
]


@pytest.mark.parametrize(("text", "what", "fix"), FILES)
def test_an_unusable_table_is_named(tmp_path, text, what, fix):
    with pytest.raises(UserError) as caught:
        load_records(write(tmp_path, text), PLAIN)
    message = str(caught.value)
    assert "t.csv" in message
    assert what in message
    assert fix in message
    with pytest.raises(UserError, match=r"no\.csv: cannot be read"):
        load_records(str(tmp_path / "no.csv"))


REPORTS = [
    ("study_findings: Clear.\nNo effusion.\n", "Clear. No effusion."),
    ("age: 3\nstudy_findings:\nClear lungs.\ndiscussion: None of note.", "Clear lungs. discussion: None of note."),
    ("discussion: A long one.\nstudy_findings: n/a", "A long one. study_findings: n/a"),
    ("study_findings: n/a\ndiscussion: ok", "n/a discussion: ok"),
    ("title: x\nstudy_findings: n/a\n", "title: x study_findings: n/a"),
    ("discussion: Not without findings.", "discussion: Not without findings."),
    ("study_findings: a b c d", "study_findings: a b c d"),
    ("study_findings: a b c d e", "a b c d e"),
    ("study_findings: \ta\tb\t c\xa0\n", "a\tb\t c"),  # blanks and line breaks alone do not count, tabs within do
]


@pytest.mark.parametrize(("text", "report"), REPORTS)
def test_the_report_in_a_text_of_m3d(text, report):
    assert parse_report(text) == report


def test_a_report_that_was_prepared_is_not_cut_again(tmp_path):
    """Upstream cuts a text at the first mark, once, as it prepares the volume."""
    raw = "title: x\nstudy_findings: At the lobe.\nstudy_findings: as before, unchanged"
    (tmp_path / "a.txt").write_text(raw)
    (tmp_path / "b.txt").write_text(parse_report(raw))
    rows = [{"image": image, "text": text} for image, text in [("a.nii.gz", "a.txt"), ("b.npy", "b.txt"), ("a.npy", "a.txt")]]
    records, _ = load_records(write(tmp_path, json.dumps(rows), "cap.json"), PLAIN)
    assert {record.turns[1].value for record in records} == {"At the lobe. study_findings: as before, unchanged"}


def test_lists_of_several_and_texts_in_files(tmp_path):
    (tmp_path / "cases" / "lists").mkdir(parents=True)
    (tmp_path / "cases" / "7.txt").write_text("study_findings: Clear lungs.\n")
    (tmp_path / "cases" / "lists" / "8.txt").write_text("\ufeffSmall stone.")
    rows = [{"image": "7.npy", "text": "7.txt"}, {"image": "8.npy", "text": "8.txt"}, {"image": "9.npy", "text": "In short."}]
    path = write(tmp_path / "cases" / "lists", json.dumps({"train": rows[:1], "test": rows}), "cap.json")
    records, problems = load_records(path, Reading(placeholders=True, split="test"))
    assert problems == []
    assert [record.turns[1].value for record in records] == ["Clear lungs.", "Small stone.", "In short."]
    with pytest.raises(UserError, match=r"holds the lists train, test, and none is named; say .*cap\.json:train"):
        load_records(path, PLAIN)


def test_how_a_file_is_named_says_how_it_is_read(tmp_path):
    lists = {"train": [{"image": "7.npy", "text": "In short."}], "test": [{"image": "8.npy", "text": "At length."}], "none": []}
    path = write(tmp_path, json.dumps(lists), "cap.json")
    (record,), problems = load_records(f"{path}:test", PLAIN)
    assert (problems, record.images, record.source) == ([], ("8.npy",), f"{path}:test")
    assert load_records(f"{path}:test", Reading(placeholders=True, split="train"))[0] == [record]
    table = write(tmp_path, f"{M3D}\na.npy,t,3,Where?,Left,Right,NA,NA,Right,B\n")
    (closed,), _ = load_records(f"{table}:closed", PLAIN)
    assert (closed.options, closed.answer, closed.question_type) == ({"A": "Left", "B": "Right"}, "B", "3")
    (opened,), _ = load_records(f"{table}:open", PLAIN)
    assert (texts([opened]), opened.answer) == ([(" Where?", "Right")], "B")
    faulty = write(tmp_path, f"{M3D}\na.npy,t,3,Where?,Left,left,NA,NA,Right,E\n", "f.csv")
    (opened,), problems = load_records(f"{faulty}:open", PLAIN)  # its choices are not shown
    assert (texts([opened]), opened.options, problems) == ([(" Where?", "Right")], {}, [])
    odd = write(tmp_path, json.dumps(lists["test"]), "a:train.json")
    assert records_file(odd) == odd and load_records(odd, PLAIN)[0][0].images == ("8.npy",)
    assert records_file(f"{path}:open:test") == path and records_file("none.json:test") == "none.json:test"
    for words in ("test:train", "open:closed", "chest:pelvis", ":"):
        with pytest.raises(UserError, match=r"leave one of them out|one of them may name"):
            load_records(f"{path}:{words}", PLAIN)
    with pytest.raises(UserError, match="holds the lists train, test, none, not 'tset'"):
        load_records(f"{path}:tset", PLAIN)


def test_prompts_of_a_file(tmp_path):
    assert read_prompts("") == Prompts()
    path = write(tmp_path, "\ufeff One? \n\nThe {region}?\nTwo?\n", "p.txt")
    assert read_prompts(path) == Prompts(("One?", "Two?"), ("The {region}?",))
    assert Prompts(("a",), ("{region}: {region}",)).of("chest") == ("chest: chest",)
    listed = write(tmp_path, '["Only this?"]', "p.json")
    assert read_prompts(listed) == Prompts(("Only this?",))
    for text, name in (("\n", "p.txt"), (b"\xff", "p.txt"), ("[1]", "p.json"), ("{}", "p.json"), ("[", "p.json")):
        with pytest.raises(UserError, match=rf"{name}.*"):
            read_prompts(write(tmp_path, text, name))
    with pytest.raises(UserError, match=r"none\.txt: cannot be read.*data\.prompts"):
        read_prompts(str(tmp_path / "none.txt"))


def test_lines_of_json(tmp_path):
    rows = [{"image": "a", "question": "Q", "answer": str(n)} for n in range(3)]
    path = write(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n", "r.jsonl")
    records, problems = load_records(path, PLAIN)
    assert (problems, [record.turns[1].value for record in records]) == ([], ["0", "1", "2"])
    with pytest.raises(UserError, match="line 2 is not JSON"):
        load_records(write(tmp_path, '{"image": "a"}\n[1,\n', "b.jsonl"), PLAIN)
