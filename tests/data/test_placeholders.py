"""Text behind placeholders: what is supervised, where a sample is cut, where images go, and what is refused."""

import dataclasses
import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from jaxmed.data import sizes as sizes_module
from jaxmed.data.conversation import (
    TextOptions,
    answer_text,
    as_upstream,
    check_template,
    encode_prompt_example,
    encode_training,
    placeholder_warning,
)
from jaxmed.data.examples import Example, spliced_counts
from jaxmed.data.placeholders import PLACEHOLDER, question_text
from jaxmed.data.records import Reading, Record, RecordError, Turn, load_records, record_from_dict
from jaxmed.data.sizes import measure, text_sizes
from jaxmed.data.tokenizer import IGNORE, IMAGE_ID, Tokenizer
from jaxmed.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
ADDED = (PLACEHOLDER, "<bx_start>", "<bx_end>", "[SEG]")
NO_BOS, BOS, JSON = "samf/base", "samf/ao2d_merged", "vit3d/base"
PLACES = 7
QUESTIONS = ["Describe the findings.", " Where is it? Choices: a. left b. NA", "", "1", " ", "Is it\nlarge?", "ä?", "<"]
ANSWERS = ["No nodule.", " Left, 3 mm.", "a", "12", "\nx", "é µm", "?", "n't"]


@functools.cache
def tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.from_folder(str(GOLDEN / folder), ADDED)


def record(*texts: str, images: int = 1) -> Record:
    turns = tuple(Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts))
    return Record("r", ("a.npy",) * images, turns)


def options(**changed) -> TextOptions:
    return dataclasses.replace(TextOptions(places=PLACES), **changed)


@pytest.mark.parametrize("folder", [NO_BOS, BOS, JSON])
def test_the_answer_and_its_end_are_supervised_and_nothing_else(folder):
    found = tokenizer(folder)
    placeholder = found.token_id(PLACEHOLDER)
    for question in QUESTIONS:
        for answer in ANSWERS:
            asked = encode_prompt_example([("human", f"<image>\n{question}!"), ("gpt", None)], found, "m3d", options()).ids
            example = encode_training(record(f"{question}!", answer), found, "m3d", options())
            # the text of the question is a prefix of the whole, in tokens too
            assert example.ids[: len(asked)].tolist() == asked.tolist()
            assert example.ids.tolist() == [*found.encode(PLACEHOLDER * PLACES + f"{question}! {answer}"), found.eos_ids[0]]
            supervised = example.labels != IGNORE
            np.testing.assert_array_equal(supervised, np.arange(len(example.ids)) >= len(asked))
            np.testing.assert_array_equal(example.labels[supervised], example.ids[supervised])
            assert not supervised[example.ids == placeholder].any()
            assert (example.ids == placeholder).sum() == PLACES
            assert example.voided == ""


def two_blanks() -> Tokenizer:
    """A vocabulary that joins blanks, as LLaMA-2's does."""
    letters = {letter: place for place, letter in enumerate(" .:?,39ILabeefhimnorst\nE")}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE({**letters, "  ": 40}, [(" ", " ")]))
    return Tokenizer(raw, {"eos_token": "E"}, added_tokens=ADDED)


@pytest.mark.parametrize("folder", [NO_BOS, BOS, JSON, ""])
def test_a_question_that_grows_into_its_answer_is_refused(folder):
    """Where the question's tokens end inside of a token of the whole, it cannot be said which tokens are the answer's."""
    found, joined = tokenizer(folder) if folder else two_blanks(), []
    for question in ("Is it", "Is it:", "Is it. ", "Is it  ", "Is it\n", " Is it?", ""):
        whole, alone = (found.encode(PLACEHOLDER * PLACES + text) for text in (f"{question} rib 3.", question))
        example = encode_training(record(question, "rib 3."), found, "m3d", options(splice="placeholders"))
        if whole[: len(alone)] == alone:
            assert example.voided == "" and (example.labels == IGNORE).sum() == len(alone)
        else:
            joined.append(question)
            assert "joins the end of its question" in example.voided and (example.labels == IGNORE).all()
    assert joined == ([] if folder else ["Is it. "])


@pytest.mark.parametrize("folder", [NO_BOS, JSON])
def test_a_sample_that_reaches_the_limit_has_no_end(folder):
    found = tokenizer(folder)
    whole = encode_training(record("What?", "Nothing at all."), found, "m3d", options())
    valid = len(whole.ids) - 1
    end = found.eos_ids[0]
    for limit in (valid - 2, valid, valid + 1, valid + 4):
        for fill in (False, True):
            example = encode_training(record("What?", "Nothing at all."), found, "m3d", options(max_length=limit, fill=fill))
            assert (end in example.labels) == (limit > valid)
            assert len(example.ids) == (limit if fill else min(limit, valid + 1))
            kept = min(limit, valid + 1)
            assert example.ids[:kept].tolist() == whole.ids[:kept].tolist()
            assert example.labels[:kept].tolist() == whole.labels[:kept].tolist()
            assert (example.labels[kept:] == IGNORE).all()
            assert (example.ids[kept:] == found.pad_id).all()


@pytest.mark.parametrize("pad", [2, -1])
def test_padding_of_its_own_fills_rows_and_is_never_a_target(pad):
    found = tokenizer(NO_BOS)
    inside = found.pad_id if pad < 0 else pad
    answer = f"No {found.piece(inside)} nodule."
    example = encode_training(record("What?", answer), found, "m3d", options(max_length=60, fill=True, pad_id=pad))
    valid = len(found.encode(f"{PLACEHOLDER * PLACES}What? {answer}"))
    assert inside in example.ids[:valid]
    assert inside not in example.labels[:valid]
    assert example.labels[valid] == example.ids[valid] == found.eos_ids[0]
    assert example.ids[valid + 1 :].tolist() == [inside] * (60 - valid - 1)


def test_a_limit_that_leaves_no_answer_is_said():
    found = tokenizer(NO_BOS)
    asked = len(found.encode(PLACEHOLDER * PLACES + "What?"))
    cut = encode_training(record("What?", "No."), found, "m3d", options(max_length=asked))
    assert "before its answer" in cut.voided
    assert (cut.labels == IGNORE).all()
    assert encode_training(record("What?", "No."), found, "m3d", options(max_length=asked + 1)).voided == ""
    assert "do not fit into 7" in encode_training(record("What?", "No."), found, "m3d", options(max_length=7)).voided
    assert "no answer" in encode_training(record("What?"), found, "m3d", options()).voided
    assert "visual.kind is none" in encode_training(record("What?", "No."), found, "m3d", TextOptions()).voided


def test_where_images_go():
    for folder, first in ((NO_BOS, 0), (BOS, 1), (JSON, 1)):
        found = tokenizer(folder)
        assert encode_training(record("Q?", "A"), found, "m3d", options()).image_start == 1
        assert encode_training(record("Q?", "A"), found, "m3d", options(splice="placeholders")).image_start == first
        alone = encode_training(record("Q?", "A", images=0), found, "m3d", options())
        assert alone.image_start == -1
        assert alone.ids.tolist() == [*found.encode("Q? A"), found.eos_ids[0]]
        turns = [("human", "Q?"), ("gpt", None)]
        assert encode_prompt_example(turns, found, "m3d", options()).ids.tolist() == found.encode("Q?")


def test_a_missing_bos_is_warned_of():
    for folder, warned in ((NO_BOS, True), (BOS, False), (JSON, False)):
        found = tokenizer(folder)
        turns = [("human", "<image>\nPlease look."), ("gpt", None)]
        text = placeholder_warning(encode_prompt_example(turns, found, "m3d", options()).ids, found)
        assert bool(text) == warned
        assert not text or f"{found.piece(found.encode(PLACEHOLDER + 'Please look.')[1])!r}" in text
        assert placeholder_warning(found.encode("Please look."), found) == ""
    assert "the last image token" in placeholder_warning([tokenizer(NO_BOS).token_id(PLACEHOLDER)] * 3, tokenizer(NO_BOS))


def test_as_upstream_writes_placeholders_as_images():
    found = tokenizer(BOS)
    example = encode_training(record("Q?", "A"), found, "m3d", options())
    ids, labels = as_upstream(example, found)
    assert ids[:9].tolist() == [1, *[IMAGE_ID] * PLACES, example.ids[8]]
    assert (len(ids), labels.tolist()) == (len(example.ids), example.labels.tolist())
    other = Example(np.array([1, IMAGE_ID, 5], np.int32), np.array([IGNORE, IGNORE, 5], np.int32), "")
    assert as_upstream(other, found)[0].tolist() == [1, IMAGE_ID, 5]


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("<image>\n Q", " Q"),
        ("Q\n<image>", "Q"),
        ("<image>Q", "Q"),
        (" Q\n", " Q\n"),
        ("<image>\n\nQ", "\nQ"),
        ("a <image> b", "a  b"),
    ],
)
def test_the_question_is_taken_as_it_stands(text, question):
    assert question_text(text) == question


def test_what_does_not_fit_the_layout_is_refused(tmp_path):
    found = tokenizer(BOS)
    with pytest.raises(RecordError, match=r"4 turns; split"):
        encode_training(record("Q", "A", "Q2", "A2"), found, "m3d", options())
    with pytest.raises(RecordError, match=r"has 2; split"):
        encode_training(record("Q", "A", images=2), found, "m3d", options())
    with pytest.raises(UserError, match=r"no history, this conversation has 2"):
        encode_prompt_example([("human", "Q"), ("gpt", "A"), ("human", "Q"), ("gpt", None)], found, "m3d", options())
    with pytest.raises(UserError, match=r"takes one image"):
        encode_prompt_example([("human", "<image><image>Q"), ("gpt", None)], found, "m3d", options())
    with pytest.raises(UserError, match=r"question is empty"):
        encode_prompt_example([("human", "<image>"), ("gpt", None)], tokenizer(NO_BOS), "m3d", options())
    with pytest.raises(UserError, match=r"lacks <im_patch>"):
        check_template("m3d", Tokenizer.from_folder(str(GOLDEN / NO_BOS)))
    for folder in (NO_BOS, BOS, JSON):
        check_template("m3d", tokenizer(folder))
    talk = [{"from": role, "value": "x"} for role in ("human", "gpt", "human", "gpt")]
    with pytest.raises(RecordError, match="split the record"):
        record_from_dict({"image": "a.npy", "conversations": talk}, reading=Reading(placeholders=True))
    with pytest.raises(RecordError, match="split the record"):
        record_from_dict({"image": ["a", "b"], "conversations": talk[:2]}, reading=Reading(placeholders=True))
    alone = record_from_dict({"image": "a.npy", "conversations": talk[:2]}, reading=Reading(placeholders=True))
    assert (alone.images, alone.turns[0].value) == (("a.npy",), "x")


def test_seg_stays_in_answers_and_other_added_tokens_go():
    for folder in (NO_BOS, JSON):
        found = tokenizer(folder)
        ids = [*found.encode("No.", False), *(found.token_id(token) for token in ADDED), found.eos_ids[0]]
        text = answer_text(ids, found, "m3d")
        assert text.startswith("No.")
        assert text.endswith("[SEG]")
        assert not any(token in text for token in ADDED[:3])


def test_seg_is_saved_as_the_ordinary_token_it_is(tmp_path):
    for folder in (NO_BOS, JSON):
        path = tmp_path / folder
        tokenizer(folder).save(str(path))
        saved = Tokenizer.from_folder(str(path))
        ids = [saved.token_id(token) for token in ADDED]
        assert ids == [tokenizer(folder).token_id(token) for token in ADDED]
        assert ids == list(range(saved.size - 4, saved.size))
        assert "[SEG]" in saved.decode(ids, keep_special=False)
        assert "[SEG]" not in saved.special_tokens
        assert PLACEHOLDER in saved.special_tokens


# ---- what every template shares


def test_a_record_without_a_place_for_its_image():
    value = {"image": "a.png", "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": 2}]}
    with pytest.raises(RecordError, match="missing-image-token"):
        record_from_dict(value)
    front = record_from_dict(value, reading=Reading(missing_image_token="prepend"))
    assert (front.images, front.turns) == (("a.png",), (Turn("human", "<image>\nQ?"), Turn("gpt", "2")))
    alone = record_from_dict(value, reading=Reading(missing_image_token="text_only"))
    assert (alone.images, alone.turns[0].value) == ((), "Q?")
    # whoever builds records by hand gets the same from the options
    raw = record("Q?", "2")
    found = tokenizer(JSON)
    assert IMAGE_ID in encode_training(raw, found, "plain", TextOptions(missing_image_token="prepend")).ids
    assert IMAGE_ID not in encode_training(raw, found, "plain", TextOptions(missing_image_token="text_only")).ids


def test_the_misspelt_key_is_read():
    talk = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}]
    found = record_from_dict({"conversatons": talk, "domain": {"chest_xray": True}})
    assert (len(found.turns), found.extra) == (2, {"domain": {"chest_xray": True}})


def test_counts_after_both_cuts():
    ids = np.array([1, IMAGE_ID, 5, 6, IMAGE_ID, 7, 8], np.int32)
    labels = np.array([1, IGNORE, 5, IGNORE, IGNORE, 7, 8], np.int32)
    example = Example(ids, labels, "")
    expected = {0: (11, 3), 100: (11, 3), 11: (11, 3), 10: (10, 2), 9: (9, 1), 6: (6, 1), 5: (5, 1), 4: (4, 0), 2: (2, 0)}
    for limit, counts in expected.items():
        assert spliced_counts(example, [3, 3], limit) == counts
    behind = dataclasses.replace(example, ids=np.arange(7, dtype=np.int32), image_start=1)
    assert spliced_counts(behind, [3], 6) == (6, 2)


def test_a_cut_conversation_keeps_its_first_ids():
    found = tokenizer(JSON)
    whole = encode_training(record("<image>", "No nodule is seen."), found, "plain", TextOptions())
    cut = encode_training(record("<image>", "No nodule is seen."), found, "plain", TextOptions(max_length=5))
    assert (cut.ids.tolist(), cut.labels.tolist()) == (whole.ids[:5].tolist(), whole.labels[:5].tolist())
    assert cut.voided == ""
    assert (
        "before its first answer" in encode_training(record("<image>", "No."), found, "plain", TextOptions(max_length=2)).voided
    )


def test_sizes_hold_the_cut_and_the_placeholders():
    found, whole = tokenizer(JSON), record("Where?", "No nodule is seen.")
    size = measure(whole, found, "m3d", options())
    example = encode_training(whole, found, "m3d", options())
    assert (size.length + size.places * PLACES, size.places) == (len(example.ids), 1)
    assert size.supervised == (example.labels != IGNORE).sum()
    limit = len(example.ids) - 3
    size = measure(whole, found, "m3d", options(max_length=limit))
    assert (size.length + PLACES, size.supervised) == (limit, (example.labels[:limit] != IGNORE).sum())
    talk = record("<image>", "No nodule is seen.")
    text = measure(talk, found, "plain", TextOptions(places=PLACES))
    cut = measure(talk, found, "plain", TextOptions(places=PLACES, max_length=text.length + PLACES - 2))
    assert (cut.length, cut.supervised, cut.places) == (text.length - 2, text.supervised - 2, 1)
    inside = measure(talk, found, "plain", TextOptions(places=PLACES, max_length=PLACES))
    assert (inside.length, inside.supervised) == (0, 0)
    assert "data.max_length" in inside.voided
    refused = measure(record("Q", "A", "Q", "A"), found, "m3d", options())
    assert "split the record" in refused.voided


def test_stored_lengths_belong_to_their_options_and_texts(tmp_path, monkeypatch):
    path = str(tmp_path / "r.csv")
    shutil.copy(GOLDEN / "samf/mcq.csv", path)
    found = tokenizer(NO_BOS)
    reading = Reading(placeholders=True)
    records, _ = load_records(path, reading)

    def read(records, template="m3d", **changed):
        return text_sizes(records, path, found, template, options=options(**changed))

    first = read(records)
    counted = []
    monkeypatch.setattr(sizes_module, "measure", lambda *args: counted.append(1) or measure(*args))
    assert read(records) == first
    assert counted == []
    assert read(records, max_length=30) != first
    assert len(counted) == 3
    named = load_records(path, dataclasses.replace(reading, upstream_exact=frozenset({"na_choices"})))[0]
    read(named)
    assert len(counted) == 6
    # the number of an image's tokens does not matter where they are counted apart
    read(records, template="plain", places=3)
    read(records, template="plain", places=4)
    assert len(counted) == 9
