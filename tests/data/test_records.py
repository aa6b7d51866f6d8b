"""Records: what is read, what is refused, and that every refusal says where and what to do."""

import json

import pytest

from jaxmed.data.records import Turn, load_records, record_from_dict, where
from jaxmed.errors import UserError


def talk(*values, first="human"):
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


def write(tmp_path, value):
    path = tmp_path / "train.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def test_a_record_keeps_its_texts_and_other_keys(tmp_path):
    turns = talk("  Is it <image> ü?\n", "No. ")
    turns[0]["type"] = "short_answer"
    good = {"id": "valid_7", "image": "a.nii.gz", "conversations": turns, "split": 3}
    path = write(tmp_path, [{"conversations": talk("Q", "A")}, good])
    (text_only, record), problems = load_records(path)
    assert problems == []
    assert record.turns == (Turn("human", "  Is it <image> ü?\n"), Turn("gpt", "No. "))
    assert (record.id, record.images, record.row, record.extra) == ("valid_7", ("a.nii.gz",), 1, {"split": 3})
    assert where(record) == f"{path}: record 1 (id 'valid_7')"
    assert (text_only.id, text_only.images) == ("0", ())


def test_several_images_and_an_unanswered_question():
    record = record_from_dict({"id": 5, "image": ["a.npz", "b.npz"], "conversations": talk("<image> and <image>?")})
    assert (record.id, record.images, len(record.turns)) == ("5", ("a.npz", "b.npz"), 1)


def test_a_leading_answer_is_dropped():
    record = record_from_dict({"conversations": talk("Hello.", "Q", "A", first="gpt")})
    assert [turn.value for turn in record.turns] == ["Q", "A"]


def test_several_places_of_a_turn_become_one_with_one_image():
    assert record_from_dict({"image": "a.npz", "conversations": talk("<image> <image> Q", "A")}).images == ("a.npz",)


BAD = [
    ("text", "str", "JSON object"),
    ({"id": "x"}, "no turns", "conversations"),
    ({"conversations": []}, "no turns", "conversations"),
    ({"conversations": talk("Hello.", first="gpt")}, "no human turn", "add the question"),
    ({"conversations": [{"from": "user", "value": "Q"}]}, "turn 1 is from 'user'", "'human' and 'gpt'"),
    ({"conversations": [*talk("Q", "A"), {"from": "gpt", "value": "B"}]}, "turn 3 is from 'gpt'", "merge neighbouring"),
    ({"conversations": talk("Hi", "Q", first="gpt") + talk("Q2")}, "turn 3 is from 'human'", "'gpt' expected"),
    ({"conversations": talk("Q", ["3"])}, "turn 2 has the value ['3']", "a string"),
    ({"conversations": talk("Q", True)}, "turn 2 has the value True", "a string"),
    ({"conversations": talk("Q", float("nan"))}, "turn 2 has the value nan", "a string"),
    ({"conversations": ["Q"]}, "turn 1 is str", "from"),
    ({"conversations": talk("Q", "A \ud83d")}, "surrogate", "character 2"),
    ({"image": 7, "conversations": talk("<image>", "A")}, "`image` is 7", "file name"),
    ({"image": ["a", ""], "conversations": talk("<image>", "A")}, "`image` is", "file name"),
    ({"conversations": talk("<image> Q", "A")}, "names no image", "remove <image>"),
    ({"image": "a.npz", "conversations": talk("Q", "A")}, "1 image but its turns have 0 places", "one <image>"),
    ({"image": ["a", "b"], "conversations": talk("<image> Q", "A")}, "2 images but its turns have 1 place ", "one <image>"),
]


@pytest.mark.parametrize(("bad", "what", "fix"), BAD)
def test_an_unusable_record_is_a_problem_and_the_others_are_read(tmp_path, bad, what, fix):
    path = write(tmp_path, [{"id": "ok", "conversations": talk("Q", "A")}, bad, {"conversations": talk("Q", "A")}])
    records, problems = load_records(path)
    assert [record.row for record in records] == [0, 2]
    assert len(problems) == 1
    assert problems[0].where.startswith(f"{path}: record 1")
    assert what in problems[0].what
    assert fix in problems[0].what
    with pytest.raises(UserError, match="^" + problems[0].what[:8].replace("(", r"\(")):
        record_from_dict(bad)


FILES = [
    ("{}", "JSON dict", "list"),
    ("[]", "no records", "at least one"),
    ("[1,", "not JSON at line 1, column 4", "train.json"),
    ('{"id": 1}\n{"id": 2}\n', "one object a line", "one JSON list"),
]


@pytest.mark.parametrize(("text", "what", "fix"), FILES)
def test_an_unusable_file_is_named(tmp_path, text, what, fix):
    with pytest.raises(UserError) as caught:
        load_records(write(tmp_path, text))
    message = str(caught.value)
    assert "train.json" in message
    assert what in message
    assert fix in message
    assert "\n" not in message


def test_a_missing_file_and_a_wrong_encoding(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        load_records(str(tmp_path / "none.json"))
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 at byte 2"):
        load_records(str(tmp_path / "latin.json"))
