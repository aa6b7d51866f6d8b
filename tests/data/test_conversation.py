"""Prompts, ids and labels against what the original code produced, and the mask rules against a second writing of them."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import vocabularies

from jaxmed.data.conversation import (
    IGNORE,
    IMAGE_ID,
    TEMPLATES,
    TextOptions,
    check_template,
    encode_prompt,
    encode_text,
    encode_training,
    normalise,
    render,
    required_tokens,
    strip_terminal,
)
from jaxmed.data.records import Record, Turn, load_records, record_from_dict
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"
ADDED = ("<pad>", "<multiple_choice>", "<long_answer>", "<short_answe>", "<report_generation>")
FOLDERS = {
    "zero2": "llava_lora_z2/checkpoint-16",
    "zero3": "llava_lora_z3/checkpoint-10",
    "m72": "llava_lora_8x8x8/checkpoint-9",
}
BATCHES = {"zero2": "records_batch", "zero3": "records_tasks_batch", "m72": "records_8x8x8_batch"}


def golden(name):
    return json.loads((GOLDEN / "golden" / f"{name}.json").read_text())


def adapter(run="zero2", added=()):
    return Tokenizer.from_folder(str(GOLDEN / FOLDERS[run]), added)


def record(*values, image=True):
    roles = ("human", "gpt")
    talk = [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]
    return record_from_dict({"conversations": talk} | ({"image": "a.npz"} if image else {}))


def supervised_text(example, tokenizer):
    return tokenizer.decode(example.labels[example.labels != IGNORE])


PROMPTS = {
    "llama3": "4b753c1d3c7da48a",
    "v1": "080b3549d584eff2",
    "vicuna_v1": "080b3549d584eff2",
    "llava_v1": "ff54643a6973c941",
    "llama_2": "ce0da33a83abb4df",
    "llava_llama_2": "5853d830822fd163",
    "mistral_instruct": "b89525f983145741",
    "chatml_direct": "654dfeac3e00574b",
    "mistral_direct": "654dfeac3e00574b",
    "mpt": "45965cc860c15870",
}


@pytest.mark.parametrize("key", PROMPTS)
def test_prompts_are_the_published_ones(key):
    turns = [("human", "<image>\nQ1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", None)]
    assert hashlib.sha256(render(TEMPLATES[key], turns).encode()).hexdigest()[:16] == PROMPTS[key]


def test_short_templates():
    turns = [("human", "<image>\nQ1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", None)]
    minimal = "<|user|><image>\nQ1<|end|><|assistant|>A1<|end|><|user|>Q2<|end|><|assistant|>"
    assert render(TEMPLATES["minimal"], turns) == minimal
    assert render(TEMPLATES["plain"], [("human", "<image>"), ("gpt", "A1")]) == "<image>\nA1\n"
    assert TEMPLATES["v0_plain"] == TEMPLATES["plain"]
    assert hashlib.sha256(TEMPLATES["llama_2"].system.encode()).hexdigest()[:16] == "d52c188a3c969c4e"


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("Is it <image> normal? ", 1, "<image>\nIs it  normal?"),
        ("Q\n<image>", 1, "<image>\nQ"),
        ("<image>", 1, "<image>"),
        ("<image> a <image>", 1, "<image>\na"),
        ("<image> a <image>", 2, "<image>\n<image>\na"),
        (" no image ", 1, " no image "),
    ],
)
def test_training_moves_the_image_to_the_front_of_its_turn(text, images, expected):
    assert normalise(text, images) == expected


def test_edge_cases_of_the_original_system():
    records, problems = load_records(str(GOLDEN / "records_edge.json"))
    tokenizer, expected = adapter(), golden("edge_tokens")
    assert problems == []
    assert [r.id for r in records] == list(expected["input_ids"])
    for r in records:
        example = encode_training(r, tokenizer, "llama3")
        assert example.ids.dtype == example.labels.dtype == np.int32
        assert example.ids.tolist() == expected["input_ids"][r.id], r.id
        assert example.labels.tolist() == expected["labels"][r.id], r.id
        assert int((example.labels != IGNORE).sum()) == expected["supervised_tokens"][r.id]
        assert (example.voided != "") == (expected["supervised_tokens"][r.id] == 0)


@pytest.mark.parametrize("run", BATCHES)
def test_training_batches_of_the_original_system(run):
    records, _ = load_records(str(GOLDEN / f"{BATCHES[run]}.json"))
    tokenizer, expected = adapter(run), golden(f"train_{run}")
    supervised = 0
    for r, ids, labels in zip(records, expected["input_ids"], expected["labels"], strict=True):
        example = encode_training(r, tokenizer, "llama3")
        size = len(example.ids)
        supervised += int((example.labels != IGNORE).sum())
        assert (example.ids.tolist(), example.labels.tolist()) == (ids[:size], labels[:size])
        assert set(ids[size:]) <= {tokenizer.pad_id}
        assert set(labels[size:]) <= {IGNORE}
    assert supervised == expected["supervised_tokens"]


@pytest.mark.parametrize(
    ("name", "run", "keep"),
    [("zero2", "zero2", True), ("zero2_stripped_history", "zero2", False), ("zero3", "zero3", True), ("m72", "m72", False)],
)
def test_prompts_of_the_original_system(name, run, keep):
    tokenizer, turns, study = adapter(run), [], ""
    for entry in golden(f"generate_{name}"):
        turns = turns if entry["id"] == study else []
        study = entry["id"]
        turns += [("human", entry["question"]), ("gpt", None)]
        prompt = encode_prompt(turns, tokenizer, "llama3")
        assert prompt.dtype == np.int32
        assert prompt.tolist() == entry["prompt_ids"], (entry["id"], entry["turn"])
        stripped = strip_terminal(entry["answer"], tokenizer, "llama3")
        assert stripped == entry["answer_stripped"]
        turns[-1] = ("gpt", entry["answer"] if keep else stripped)


def test_an_answer_loses_its_final_end_tokens_only():
    tokenizer = adapter()

    def strip(text: str) -> str:
        return strip_terminal(text, tokenizer, "llama3")

    assert strip(" A <|eot_id|> B . <|end_of_text|> <|eom_id|>\n<|eot_id|> ") == "A <|eot_id|> B ."
    assert strip("<|eot_id|>") == ""
    assert strip("A <|start_header_id|>") == "A <|start_header_id|>"
    assert strip_terminal("A <|end|>", tokenizer, "minimal") == "A"
    assert strip_terminal("A\n", tokenizer, "plain") == "A"


def llama3(added=ADDED):
    raw = tokenizers.Tokenizer.from_str(vocabularies.llama3().to_str())
    return Tokenizer(raw, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, (128001, 128008, 128009), added)


PREFIX = """128000 128000 128006 9125 128007 271 13 362 6369 1990 264 22999 1217 323 459 21075 11478 18328 13 578 18328
6835 11190 11 11944 11 323 48887 11503 311 279 1217 596 4860 13 220 128009 128006 882 128007 271"""
QUESTION = "-200 198 32215 12164 2508 1934 369 279 19084 13 128260 128009 128006 78191 128007 271"
ANSWER = "10086 826 25 18944 13 14727 11433 25 2290 13 128009"


def numbers(text):
    return [int(number) for number in text.split()]


def test_ids_with_the_real_llama3_vocabulary():
    tokenizer = llama3()
    question = "Generate radiology report for the CT.<report_generation>\n<image>"
    example = encode_training(record(question, "Findings: Normal. Impression: None."), tokenizer, "llama3")
    context, answer = numbers(PREFIX + " " + QUESTION), numbers(ANSWER)
    assert len(numbers(PREFIX)) == 41
    assert example.ids.tolist() == context + answer
    assert example.labels.tolist() == [IGNORE] * len(context) + answer
    assert len(example.ids) == 68
    assert encode_prompt([("human", "<image>\nQ"), ("gpt", None)], tokenizer, "llama3").tolist()[:43] == [
        *numbers(PREFIX),
        -200,
        198,
    ]

    caption = encode_training(record("Anything?\n<image>", "No effusion."), tokenizer, "plain")
    assert caption.ids.tolist() == [128000, -200, 2822, 3369, 7713, 627]
    assert caption.labels.tolist() == [IGNORE, IGNORE, 2822, 3369, 7713, 627]
    assert encode_text("<image>", tokenizer) == [128000, -200]
    assert encode_text("a<image><image>b", tokenizer) == [128000, 64, -200, -200, 65]


def test_newlines_at_the_start_of_an_answer_with_the_real_vocabulary():
    tokenizer = llama3()
    one = encode_training(record("<image>\nQ", "\nNo."), tokenizer, "llama3")
    two = encode_training(record("<image>\nQ", "\n\nNo."), tokenizer, "llama3")
    assert supervised_text(one, tokenizer) == "No.<|eot_id|>"
    assert one.ids[one.labels == IGNORE][-1] == tokenizer.token_id("ĊĊĊ")
    # Four newlines are one token of this vocabulary too, so both of the answer's count as instruction.
    assert supervised_text(two, tokenizer) == "No.<|eot_id|>"
    assert two.ids[two.labels == IGNORE][-1] == tokenizer.token_id("ĊĊĊĊ")


def test_plain_takes_one_round_with_an_image():
    tokenizer = adapter()
    for bad, reason in ((record("<image>", "A", "B", "C"), "4 turns"), (record("Q", "A", image=False), "needs <image>")):
        example = encode_training(bad, tokenizer, "plain")
        assert reason in example.voided
        assert set(example.labels.tolist()) == {IGNORE}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (("<image>", "Yes.<|eot_id|>No."), r"turn 2 \(gpt\) holds '<\|eot_id\|>'.* take it out"),
        (("<image>", ""), r"turn 2 \(gpt\) is empty; write"),
        (("<image>", "A", "Q"), "turn 3 is a question without an answer; add"),
    ],
)
def test_a_sample_that_cannot_be_aligned_says_why(values, reason):
    import re

    example = encode_training(record(*values), adapter(), "llama3")
    assert re.search(reason, example.voided)
    assert set(example.labels.tolist()) == {IGNORE}


def test_text_only_records_are_taken_as_they_are():
    tokenizer = adapter()
    example = encode_training(record(" What is a hernia? ", "Sliding.", image=False), tokenizer, "llama3")
    assert IMAGE_ID not in example.ids
    assert " What is a hernia? <|eot_id|>" in tokenizer.decode(example.ids)
    assert supervised_text(example, tokenizer) == "Sliding.<|eot_id|>"
    spelled = Record("x", (), (Turn("human", "What is <image> ?"), Turn("gpt", "A place.")))
    example = encode_training(spelled, tokenizer, "llama3")
    assert IMAGE_ID not in example.ids
    assert "What is <image>?" in tokenizer.decode(example.ids)


@pytest.mark.parametrize("bos", [True, False])
def test_minimal_supervises_every_answer_with_its_end(bos):
    tokenizer = adapter(added=required_tokens("minimal"))
    if not bos:
        state = json.loads(tokenizer._backend.state()) | {"post_processor": None}
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)))
    assert tokenizer.prefix == ((421,) if bos else ())
    example = encode_training(record("<image>\nQ", "Normal.", "And now?", "\nNo."), tokenizer, "minimal")
    assert example.voided == ""
    assert supervised_text(example, tokenizer) == "Normal.<|end|>\nNo.<|end|>"
    whole = tokenizer.decode(example.ids[example.ids != IMAGE_ID])
    assert whole.removeprefix("<|begin_of_text|>").startswith("<|user|>\nQ<|end|><|assistant|>Normal.<|end|><|user|>And")


@pytest.mark.parametrize("image", [True, False])
def test_v1_supervises_answers_and_their_end(image):
    tokenizer = Tokenizer(vocabularies.pieces(True), {"legacy": True, "bos_token": "<s>", "eos_token": "</s>"})
    talk = ("<image>\nIs it?" if image else "Is it?", "No nodule.", "So?", "Normal")
    example = encode_training(record(*talk, image=image), tokenizer, "v1")
    expected = [*tokenizer.encode("No nodule.", False), 2, *tokenizer.encode("Normal", False), 2]
    assert example.labels[example.labels != IGNORE].tolist() == expected
    first = example.ids.tolist().index(tokenizer.token_id("▁ASSISTANT")) + 2  # the piece ":" comes between
    assert (example.labels[:first] == IGNORE).all()
    assert example.labels[first] == example.ids[first]


# The rules as the specification words them, over lengths alone: (first masked, per round (masked, length)).
def spans_v1(prompt, length, legacy):
    for i, text in enumerate(prompt.split("</s>")):
        if text.count(" ASSISTANT: ") != 1:
            return
        less = int(i > 0 and not legacy)
        yield length(text[: text.index(" ASSISTANT: ") + 12]) - 2 - less, length(text) - less


def spans_llama_2(prompt, length, legacy):
    for text in prompt.split("</s>"):
        if text.count("[/INST] ") != 1:
            return
        yield length(text[: text.index("[/INST] ") + 8]) - 2, length(text)


def spans_mpt(prompt, length, legacy):
    header, turns = "<|im_end|><|im_start|>assistant\n", prompt.split("<|im_end|>")
    for i, start in enumerate([0, *range(3, len(turns), 2)]):
        text = "<|im_end|>".join(turns[start : start + (2 if start else 3)])
        if text.count(header) != 1:
            return
        more = int(i > 0 and legacy)
        yield length(text[: text.index(header) + len(header)]) - 1 + more, length(text) + more


STYLES = {
    "v1": (1, spans_v1),
    "llava_v1": (1, spans_v1),
    "llama_2": (1, spans_llama_2),
    "mistral_instruct": (1, spans_llama_2),
    "mpt": (0, spans_mpt),
    "chatml_direct": (0, spans_mpt),
}
WORDS = ["the lung", " nodule", "\n", " ", "No.", "9 mm", "USER", "", "</s>", " ASSISTANT: ", "[/INST] ", "<|im_end|>", "é"]
WEIGHTS = [9, 9, 2, 4, 9, 5, 2, 3, 0.4, 0.3, 0.3, 0.3, 0.3]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("key", STYLES)
def test_masks_of_the_older_templates(key, legacy):
    raw = vocabularies.pieces(legacy, ("<|im_start|>", "<|im_end|>"))
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(raw.to_str()), {"legacy": legacy, "bos_token": "<s>"})
    draw = random.Random(key)
    voided = 0

    def text():
        return "".join(draw.choices(WORDS, WEIGHTS, k=draw.randint(0, 5)))

    def length(piece):
        chunks = [raw.encode(chunk).ids for chunk in piece.split("<image>")]
        return 1 + sum(len(ids) - 1 for ids in chunks) + len(chunks) - 1

    for _ in range(60):
        values = [value for _ in range(draw.randint(1, 3)) for value in (text() or "Q", text())]
        values[0] = "<image>\n" + values[0].strip()
        example = encode_training(record(*values), tokenizer, key)
        turns = [(("human", "gpt")[i % 2], value.strip() if i == 0 else value) for i, value in enumerate(values)]
        prompt = render(TEMPLATES[key], turns)
        cursor, spans = STYLES[key]
        labels = encode_text(prompt, tokenizer)
        filled = cursor == 1 and tokenizer.token_id("<unk>") in labels  # what rows are filled with is not counted
        labels[:cursor] = [IGNORE] * cursor
        for masked, total in spans(prompt, length, legacy):
            labels[cursor : cursor + masked] = [IGNORE] * len(labels[cursor : cursor + masked])
            cursor += total
        labels[cursor:] = [IGNORE] * len(labels[cursor:])
        if cursor != len(labels) or filled:
            labels = [IGNORE] * len(labels)
        assert example.labels.tolist() == labels
        assert (example.voided != "") == (set(labels) == {IGNORE})
        voided += example.voided != ""
    assert voided > 0


def test_v1_of_a_vocabulary_that_joins_rounds():
    """legacy = False: "USER" after an end token is one piece shorter than at the start of a text, which the rule undoes."""
    config = {"legacy": False, "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer(vocabularies.pieces(False), config)
    example = encode_training(record("<image>\nIs it?", "No nodule.", "So?", "Normal"), tokenizer, "v1")
    expected = [*tokenizer.encode("No nodule.", False), 2, *tokenizer.encode("Normal", False), 2]
    assert example.voided == ""
    assert example.labels[example.labels != IGNORE].tolist() == expected
    wrong = Tokenizer(vocabularies.pieces(False), config | {"legacy": True})
    assert encode_training(record("<image>\nIs it?", "No nodule.", "So?", "Normal"), wrong, "v1").voided != ""


@pytest.mark.parametrize(
    ("folder", "template"), [("tinyllava/tinyllava_mini", "v1"), ("mistral_llava/llava_mistral_base", "mistral_instruct")]
)
def test_the_unknown_token_voids_its_sample(folder, template):
    """Upstream fills rows with it, and counts the others; it does not count what is cut."""
    tokenizer = Tokenizer.from_folder(str(GOLDEN.parent / folder))
    for talk in (("<image>\nIs <unk> it?", "No."), ("<image>\nIs it?", "No <unk>."), ("<image>\nIs it?", "No.", "Q", "<unk>")):
        example = encode_training(record(*talk), tokenizer, template)
        assert "holds <unk>" in example.voided and set(example.labels.tolist()) == {IGNORE}
        cut = encode_training(record(*talk), tokenizer, template, TextOptions(max_length=len(example.ids)))
        assert cut.voided == "" and (cut.labels != IGNORE).any()
        assert encode_training(record(*talk), tokenizer, template, TextOptions(max_length=len(example.ids) + 1)).voided
    assert encode_training(record("<image>\nIs it?", "No."), tokenizer, template).voided == ""


def test_a_tokenizer_without_the_templates_tokens_is_refused():
    tokenizer = adapter()
    check_template("llama3", tokenizer)
    check_template("plain", tokenizer)
    check_template("minimal", adapter(added=required_tokens("minimal")))
    with pytest.raises(UserError, match=r"lacks </s>, which the template 'v1' needs"):
        check_template("v1", tokenizer)
    with pytest.raises(UserError, match=r"lacks <\|user\|>, <\|assistant\|>, <\|end\|>"):
        check_template("minimal", tokenizer)
    with pytest.raises(UserError, match="'llama3_1'; known are llama3, v1"):
        required_tokens("llama3_1")
