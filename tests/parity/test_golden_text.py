"""Texts, ids and labels of the original code (tests/golden): M3D-LaMed, M3D-CLIP, SAMF, TinyLLaVA-Med-F, LLaVA-Med.

Axis letters: B rows, T positions.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest

from jaxmed.data.conversation import TextOptions, answer_text, check_template, encode_prompt_example, encode_training
from jaxmed.data.examples import spliced_counts
from jaxmed.data.placeholders import PLACEHOLDER
from jaxmed.data.records import Reading, Record, Turn, load_records, record_from_dict
from jaxmed.data.tables import parse_report
from jaxmed.data.tokenizer import IGNORE, IMAGE_ID, Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
M3D_TOKENS = (PLACEHOLDER, "<bx_start>", "<bx_end>", "[SEG]")
PLAIN = Reading(placeholders=True)
NAN = dataclasses.replace(PLAIN, upstream_exact=frozenset({"na_choices"}))
REPORTS = {case: GOLDEN / "vit3d" / "raw" / "ct_case" / case / "text.txt" for case in ("000086", "000459", "004217", "013305")}


@functools.cache
def read(path: str):
    return json.loads((GOLDEN / path).read_text())


@functools.cache
def tokenizer(folder: str, added: tuple[str, ...] = ()) -> Tokenizer:
    return Tokenizer.from_folder(str(GOLDEN / folder), added)


def plain(question: str, answer: str, image: str = "a.npy") -> Record:
    return Record("x", (image,), (Turn("human", question), Turn("gpt", answer)))


# ---- M3D

M3D_FOLDERS = [("vit3d/base", M3D_TOKENS), ("vit3d/lamed_lora", ()), ("vit3d/lamed_merged", ())]
M3D = TextOptions(places=18, max_length=152, splice="offset", fill=True)


@pytest.mark.parametrize(("folder", "added"), M3D_FOLDERS)
def test_m3d_training_ids_and_labels(folder, added):
    golden, found = read("vit3d/golden/train.json"), tokenizer(folder, added)
    check_template("m3d", found)
    captions, _ = load_records(str(GOLDEN / "vit3d/data/M3D_Cap_npy/M3D_Cap.json"), dataclasses.replace(PLAIN, split="test"))
    csv = str(GOLDEN / "vit3d/data/M3D-VQA/M3D_VQA_test.csv")
    closed, opened = (load_records(csv, dataclasses.replace(PLAIN, questions=q))[0] for q in ("closed", "open"))
    asked = [question.removeprefix(PLACEHOLDER * 18) for question in golden["questions"]]
    records = [plain(asked[0], captions[1].turns[1].value), closed[1], opened[2], plain(asked[3], captions[0].turns[1].value)]
    assert [record.turns[1].value for record in records] == golden["answers"]
    for row, record in enumerate(records):
        example = encode_training(record, found, "m3d", M3D)
        assert example.ids.tolist() == golden["input_ids"][row]
        assert example.labels.tolist() == golden["labels"][row]
        assert (example.image_start, example.voided) == (1, "")
        short = encode_training(record, found, "m3d", dataclasses.replace(M3D, fill=False))
        valid = golden["valid"][row]
        assert short.ids.tolist() == golden["input_ids"][row][: valid + 1]
        assert short.labels.tolist() == golden["labels"][row][: valid + 1]
        assert (short.labels[-1] == 174) == (valid < 152)
    counted = sum(int((np.array(labels)[1:] != IGNORE).sum()) for labels in golden["labels"])
    assert counted == golden["supervised_tokens"]


@pytest.mark.parametrize("splice", ["offset", "placeholders"])
@pytest.mark.parametrize(("folder", "added"), M3D_FOLDERS)
def test_m3d_prompts_and_answers(folder, added, splice):
    found = tokenizer(folder, added)
    for row in read("vit3d/golden/generate.json"):
        options = TextOptions(places=18, splice=splice)
        asked = encode_prompt_example([("human", "<image>\n" + row["question"]), ("gpt", None)], found, "m3d", options)
        assert asked.ids.tolist() == row["prompt_ids"]
        assert asked.image_start == 1
        assert answer_text(row["token_ids"], found, "m3d") == row["answer"]
        assert answer_text(row["token_ids"], found, "m3d", keep_special=True) == row["answer"]


def test_m3d_decoding_leaves_out_the_placeholders_and_keeps_seg():
    for folder, added in M3D_FOLDERS:
        found = tokenizer(folder, added)
        assert [found.token_id(token) for token in M3D_TOKENS] == [175, 176, 177, 178]
        assert found.decode([48, 175, 176, 177, 178, 174], keep_special=False).strip().endswith("[SEG]")
        assert "[SEG]" in answer_text([48, 178, 174], found, "m3d")
        assert "im_patch" not in answer_text([48, 175, 178, 174], found, "m3d")


@pytest.mark.parametrize(("reading", "rows", "key"), [(PLAIN, slice(0, 4), "{}"), (NAN, slice(4, 5), "{}_na_row")])
def test_m3d_questions_and_answers_of_the_table(reading, rows, key):
    golden, path = read("vit3d/golden/vqa_text.json"), str(GOLDEN / "vit3d/data/M3D-VQA/M3D_VQA_test.csv")
    for questions in ("closed", "open"):
        records, problems = load_records(path, dataclasses.replace(reading, questions=questions))
        assert problems == []
        assert [r.turns[0].value for r in records[rows]] == golden[key.format(f"{questions}_questions")]
        assert [r.turns[1].value for r in records[rows]] == golden[key.format(f"{questions}_answers")]
    assert load_records(path, PLAIN)[0][4].turns[0].value == " Is the spinal canal narrowed? Choices: A. No B. Yes C. NA D. NA"


def test_m3d_reports_as_the_preparation_wrote_them():
    captions, problems = load_records(
        str(GOLDEN / "vit3d/data/M3D_Cap_npy/M3D_Cap.json"), dataclasses.replace(PLAIN, split="test")
    )
    assert problems == []
    assert [record.turns[1].value for record in captions] == read("vit3d/golden/clip.json")["texts"]
    for record in captions:
        case = record.images[0].split("/")[2]
        assert parse_report(REPORTS[case].read_text()) == record.turns[1].value


@pytest.mark.parametrize("folder", ["vit3d/bert_tiny", "vit3d/m3d_clip"])
def test_m3d_clip_tokens(folder, tmp_path):
    golden, found = read("vit3d/golden/clip.json"), tokenizer(folder)
    found.save(str(tmp_path))
    for each in (found, Tokenizer.from_folder(str(tmp_path))):
        ids, mask = each.encode_batch(golden["texts"], max_length=64)
        assert (ids.dtype, mask.dtype) == (np.int32, bool)
        np.testing.assert_array_equal(ids, golden["input_ids"])
        np.testing.assert_array_equal(mask, np.array(golden["attention_mask"], bool))
    assert found.encode("KIDNEY") == found.encode("kidney")


# ---- SAMF

SAMF = TextOptions(places=256, max_length=384, splice="offset", fill=True)
PLACEHOLDERS = M3D_TOKENS[:3]


def samf_records():
    """The batch's rows: a caption with the question that was drawn for it, a choice, a caption."""
    rows = read("samf/case.json")["runs"]["train"]["rows"]
    tables = {name: load_records(str(GOLDEN / "samf" / name), NAN)[0] for name in ("reports.csv", "mcq.csv")}
    records = [tables[row["csv"]][row["row"]] for row in rows]
    for record, row in zip(records, rows, strict=True):
        assert record.turns[1].value == row["answer"]
        if row["csv"] == "mcq.csv":
            assert record.turns[0].value == row["question"]
    return [
        record_from_dict({"image": record.images[0], "question": row["question"], "caption": row["answer"]}, reading=PLAIN)
        if row["csv"] == "reports.csv"
        else record
        for record, row in zip(records, rows, strict=True)
    ]


@pytest.mark.parametrize(("folder", "added"), [("samf/base", PLACEHOLDERS), ("samf/samf_lora", ())])
def test_samf_training_ids_and_labels(folder, added):
    golden, found = read("samf/golden/train_samf.json"), tokenizer(folder, added)
    check_template("m3d", found)
    examples = [encode_training(record, found, "m3d", SAMF) for record in samf_records()]
    assert [e.ids.tolist() for e in examples] == golden["input_ids"]
    assert [e.labels.tolist() for e in examples] == golden["labels"]
    assert [e.image_start for e in examples] == [1, 1, 1]
    assert sum(spliced_counts(e, [256], 384)[1] for e in examples) == golden["supervised_tokens"]
    at_placeholders = dataclasses.replace(SAMF, splice="placeholders")
    assert encode_training(samf_records()[0], found, "m3d", at_placeholders).image_start == 0


@pytest.mark.parametrize(
    ("run", "folder"), [("samf", "samf/samf_lora"), ("samf", "samf/samf_merged"), ("ao2d", "samf/ao2d_merged")]
)
def test_samf_prompts_and_answers(run, folder):
    found, options = tokenizer(folder), TextOptions(places=256)
    for row in read(f"samf/golden/generate_{run}.json"):
        asked = encode_prompt_example([("human", "<image>\n" + row["question"]), ("gpt", None)], found, "m3d", options)
        assert asked.ids.tolist() == row["prompt_ids"]
        assert answer_text(row["token_ids"], found, "m3d", keep_special=True) == row["answer"]
        stripped = row["answer"].removesuffix(" <|end|>").removesuffix(" <|assistant|>")
        assert answer_text(row["token_ids"], found, "m3d") == stripped


def test_samf_questions_of_the_tables():
    choices, problems = load_records(str(GOLDEN / "samf/mcq.csv"), NAN)
    captions, more = load_records(str(GOLDEN / "samf/reports.csv"), NAN)
    assert problems == more == []
    rows = {row["id"]: row for row in read("samf/golden/generate_samf.json")}
    for number, record in enumerate(choices):
        row = rows[f"choice_{number}"]
        assert (record.turns[0].value, record.turns[1].value) == (row["question"], row["reference"])
        assert "data/" + record.images[0] == row["image"]
    for number, record in enumerate(captions):
        assert record.turns[1].value == rows[f"caption_{number}"]["reference"]
    assert load_records(str(GOLDEN / "samf/mcq.csv"), PLAIN)[0][0].turns[0].value.endswith(" c. Lingula. d. None")


# ---- LLaVA's way


def padded(rows, fill):
    """[B, T] of rows, filled on the right."""
    width = max(map(len, rows))
    return [[*row, *[fill] * (width - len(row))] for row in rows]


def spliced(example, places, max_length):
    """[T] labels once an image takes `places` positions and the row is cut: the rule, written again."""
    labels = []
    for token, label in zip(example.ids.tolist(), example.labels.tolist(), strict=True):
        labels += [IGNORE] * places if token == IMAGE_ID else [label]
    return labels[:max_length]


TINYLLAVA = TextOptions(places=729, max_length=960, missing_image_token="text_only")


@pytest.mark.parametrize("name", ["train", "train_odd"])
def test_tinyllava_training(name):
    golden, found = read(f"tinyllava/golden/{name}.json"), tokenizer("tinyllava/tinyllava_mini")
    records, problems = load_records(str(GOLDEN / f"tinyllava/{name}.json"), Reading(missing_image_token="text_only"))
    assert problems == []
    examples = [encode_training(record, found, "v1", TINYLLAVA) for record in records]
    assert padded([e.ids.tolist() for e in examples], found.pad_id) == golden["input_ids"]
    assert padded([e.labels.tolist() for e in examples], IGNORE) == golden["labels"]
    assert padded([spliced(e, 729, 960) for e in examples], IGNORE) == golden["spliced_labels"]
    counts = [spliced_counts(e, [729] * int((e.ids == IMAGE_ID).sum()), 960) for e in examples]
    assert [length for length, _ in counts] == [sum(mask) for mask in golden["spliced_attention_mask"]]
    assert [supervised for _, supervised in counts] == golden["supervised_per_row"]


def test_tinyllava_answers():
    found = tokenizer("tinyllava/tinyllava_mini")
    for row in read("tinyllava/golden/generate.json"):
        assert answer_text(row["token_ids"], found, "v1") == row["answer"]


def test_tinyllava_reads_the_misspelt_key():
    records, problems = load_records(str(GOLDEN / "tinyllava/test.json"), Reading(missing_image_token="prepend"))
    assert problems == []
    assert len(records) == 6
    assert records[0].extra == {"answer_type": "OPEN"}


def test_mistral_conversations():
    golden, found = read("mistral_llava/golden/conversations.json"), tokenizer("mistral_llava/llava_mistral_base")
    records, problems = load_records(str(GOLDEN / "mistral_llava/train_records.json"))
    assert problems == []
    for record in records:
        example = encode_training(record, found, "mistral_instruct")
        assert example.ids.tolist() == golden[f"{record.id}_input_ids"]
        assert example.labels.tolist() == golden[f"{record.id}_labels"]
        assert bool(example.voided) == (record.id in ("e1", "f3"))
    assert len(records) * 2 == len(golden)


@pytest.mark.parametrize(("name", "cut"), [("train_full", 0), ("train_truncated", 83)])
def test_mistral_batches_before_and_after_the_images(name, cut):
    golden, found = read(f"mistral_llava/golden/{name}.json"), tokenizer("mistral_llava/llava_mistral_base")
    records = {record.id: record for record in load_records(str(GOLDEN / "mistral_llava/train_records.json"))[0]}
    options = TextOptions(places=36, max_length=cut)
    examples = [encode_training(records[name], found, "mistral_instruct", options) for name in ("a7", "b2", "c9", "d4")]
    if not cut:
        assert padded([e.ids.tolist() for e in examples], 0) == golden["input_ids"]
        assert padded([e.labels.tolist() for e in examples], IGNORE) == golden["labels"]
    assert padded([spliced(e, 36, cut or 1000) for e in examples], IGNORE) == golden["spliced_labels"]
    counts = [spliced_counts(e, [36] * int((e.ids == IMAGE_ID).sum()), cut) for e in examples]
    assert [length for length, _ in counts] == [sum(mask) for mask in golden["spliced_attention_mask"]]
    assert sum(supervised for _, supervised in counts) == golden["supervised_tokens"]


def test_a_file_of_llavas_questions(tmp_path):
    """`text` is what is asked, not a caption; the image comes first, wherever `<image>` stands."""
    prompts = read("mistral_llava/case.json")["prompts"]
    lines = [{"question_id": p["id"], "image": p["image"], "text": p["question"], "category": "x"} for p in prompts]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, [*lines, {"question_id": 99, "text": " Why? "}])))
    *found, alone = load_records(str(file))[0]
    asked = {row["id"]: row["prompt_ids"] for row in read("mistral_llava/golden/generate_full.json")}
    words = tokenizer("mistral_llava/llava_mistral_base")
    for record, prompt in zip(found, prompts, strict=True):
        assert (record.id, record.images) == (str(prompt["id"]), (prompt["image"],))
        turns = [(turn.role, turn.value) for turn in record.turns]
        ids = encode_prompt_example([*turns, ("gpt", None)], words, "mistral_instruct", TextOptions()).ids
        assert ids.tolist() == asked[prompt["id"]]
    assert (alone.id, alone.images, alone.turns) == ("99", (), (Turn("human", "Why?"),))
