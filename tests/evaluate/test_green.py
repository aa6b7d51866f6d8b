"""GREEN: prompt, replies and score; the percentage judge."""

import pytest

from jaxmed.errors import UserError
from jaxmed.evaluate import green, percentage


def reply(matched, significant, insignificant=""):
    return (
        "[Explanation]:\nThe candidate differs.\n\n"
        f"[Clinically Significant Errors]:\n{significant}\n\n"
        f"[Clinically Insignificant Errors]:\n{insignificant}\n\n"
        f"[Matched Findings]:\n{matched}"
    )


@pytest.mark.parametrize(
    ("matched", "errors", "score"),
    [(0, (6,), 0), (1, (3, 2), 1 / 6), (2, (4,), 1 / 3), (1, (0, 1), 1 / 2), (1, (1, 1, 1), 1 / 4)],
)
def test_score_of_published_vectors(matched, errors, score):
    lines = "\n".join(f"({letter}) Kind of error: {count}. one; two" for letter, count in zip("abc", errors, strict=False))
    found = green.parse(reply(f"{matched}. clear lungs; no effusion", lines, "(d) Severity: 9. mild"))
    assert found.score == pytest.approx(score) and sum(found.significant) == sum(errors)
    assert found.insignificant == (0, 0, 0, 9, 0, 0)


@pytest.mark.parametrize(
    ("text", "matched", "significant"),
    [
        ("nothing of the kind", 0, (0,) * 6),
        ("[Matched Findings]:\n3. a; b; c", 3, (0,) * 6),
        ("[Matched Findings]:\n3 findings", 0, (0,) * 6),  # no full stop behind the number
        ("[Matched Findings]:\nThere are 3. a", 0, (0,) * 6),  # the number does not lead
        (reply("No matched findings.", "No errors: 4."), 0, (0,) * 6),
        (reply("2. a; b", "(a) Kind: none.\n(b) Kind: 2. x; y"), 2, (0, 2, 0, 0, 0, 0)),
        (reply("2. a; b", "(1) Kind: 1. x\n(6) Kind: 3. y"), 2, (1, 0, 0, 0, 0, 3)),
        (reply("2. a", "(1) Kind: 5. x\n(c) Kind: 2. y"), 2, (0, 0, 2, 0, 0, 0)),  # numbers only where no letter is
        (reply("2. a", "(a) Kind: 1. x\n(a) Kind: 4. y\n(a) Kind: some"), 2, (4, 0, 0, 0, 0, 0)),  # the last count wins
        (reply("2. a", "(a) Of 3. kinds: 2. size of 7 mm: 9. x"), 2, (2, 0, 0, 0, 0, 0)),  # the first after a colon
        (reply("2. a", "(a) Kind: 1. x\n   \n(b) Kind: 3. y"), 2, (1, 0, 0, 0, 0, 0)),  # a blank line ends the section
        (
            "**[Clinically Significant Errors]**:\n- **(b) Kind**: **2**. x\n\n### **[Matched Findings]:**\n**4**. x",
            4,
            (0, 2, 0, 0, 0, 0),
        ),
        ("[Matched Findings]:\n9. x\n<|assistant|>\n" + reply("2. a</s>", "(b) Kind: 1. x"), 2, (0, 1, 0, 0, 0, 0)),
    ],
)
def test_odd_replies(text, matched, significant):
    found = green.parse(text)
    assert (found.matched, found.significant) == (matched, significant)


def test_a_reply_without_the_sections_is_none():
    assert not green.is_reply("I cannot judge medical reports.") and not green.is_reply("[Explanation]: they differ")
    assert green.is_reply("[Matched Findings]:\n0.") and green.is_reply("[Clinically Significant Errors]:\nNo")


def test_prompt_has_its_parts_in_order_and_cuts_both_reports_alike():
    prompt = green.OUR_WORDING.prompt("R1  R2\nR3 R4 {candidate}", "C1 C2 C3", 3)
    places = [
        prompt.index(part) for part in ("Objective", "Overview", "a) ", "f) ", "R1 R2 R3\n", "C1 C2 C3", "[Explanation]:")
    ]
    assert places == sorted(places) and "R4" not in prompt
    sections = [
        "[Explanation]:",
        "[Clinically Significant Errors]:",
        "[Clinically Insignificant Errors]:",
        "[Matched Findings]:",
    ]
    assert [prompt.count(section) for section in sections] == [1] * 4
    assert prompt.index(sections[1]) < prompt.index(sections[2]) < prompt.index(sections[3])
    long = " ".join(map(str, range(500)))
    kept = {version: green.cut(long, words).split() for version, words in green.WORDS.items()}
    assert {version: len(words) for version, words in kept.items()} == {"challenge": 200, "uncut": 500, "current": 300}
    assert green.cut("two  spaces\nkept", 0) == "two  spaces\nkept"


def test_wording_of_a_file_or_of_the_packages_source(tmp_path):
    (tmp_path / "plain.txt").write_text("Compare {reference} with {candidate}!")
    plain = green.read_wording(str(tmp_path / "plain.txt"))
    assert plain.prompt("r", "c {reference}", 0) == "Compare r with c {reference}!" and plain.hash != green.OUR_WORDING.hash
    body = 'def make_prompt(a, b):\n    """Doc."""\n    prompt = f"Judge {{x}}:\\n{a}\\nby\\n{b}"\n    return prompt\n'
    source = f'raise SystemExit("never run")\n{body}'
    (tmp_path / "utils.py").write_text(source)
    assert green.read_wording(str(tmp_path / "utils.py")).prompt("r", "c", 0) == "Judge {x}:\nr\nby\nc"


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.txt", "only {reference}", "each once"),
        ("a.txt", "{candidate} then {reference}", "each once"),
        ("a.py", "def other(): pass", "no function make_prompt"),
        ("a.py", "def make_prompt(a, b:", "no Python file"),
    ],
)
def test_wordings_that_cannot_be_used(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=match):
        green.read_wording(str(tmp_path / name))


def test_chat_is_a_users_turn_an_empty_reply_and_a_head():
    assert green.chat("P\nQ", "</s>") == "<|user|>\nP\nQ</s>\n<|assistant|>\n</s>\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Score: 85.", 0.85),
        ("score: 62.5", 0.625),
        ("Score: 30. No, Score: **40**.", 0.4),
        ("SCORE = 100", 1.0),
        ("85", None),
        ("Score: 140", None),
        ("Score: none", None),
    ],
)
def test_percentage_reads_whole_numbers_and_decimals(text, value):
    assert percentage.parse(text) == value


def test_percentage_prompt_holds_the_three_texts_as_they_are():
    prompt = percentage.prompt("Q {reference}", "R {candidate}", "C")
    assert "Question: Q {reference}\nReference: R {candidate}\nAnswer: C" in prompt
