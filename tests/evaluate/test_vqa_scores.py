"""Multiple choice: what an answer names, upstream's rules, calibration."""

import math

import pytest

from jaxmed.evaluate import parts, scores, vqa
from jaxmed.evaluate.studies import Likelihood, Study

OPTIONS = {"A": "Left lung", "B": "Right lung", "C": "A cyst", "D": "NA"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" (C) because", "C"),
        ("D. NA", "D"),
        ("B: the right side", "B"),
        ("b", "B"),
        ("(b) right", "B"),
        ("a nodule in the right lung", "B"),  # a small letter may be the article
        ("A nodule in the right lung", "A"),  # a capital at the beginning is taken at its word
        ("A cyst", "C"),  # the whole text of an option
        ("A cyst.", "C"),
        ("The left lung is affected.", "A"),
        ("left lung and right lung", ""),
        ("Both", ""),
        ("Become worse", ""),
        ("E", ""),
        ("", ""),
        ("The answer is na", "D"),
        ("vitamin D", ""),
    ],
)
def test_the_option_that_an_answer_names(answer, letter):
    assert vqa.parse(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("letter", "answers"),
    [
        ("A", "Choice A. | It is A. | Answer:A | the answer is (a lung); Left lung"),
        (
            "B",
            '( B ) | [B] | **B** | **B.** Left | `B` | "B" | \\boxed{B} | $\\boxed{B}$ | <answer>B</answer> | Answer: B | Ｂ．',
        ),
        ("B", "answer: b | The answer is B. | Final answer: **B** | Option B | Option B: left | I choose B, as it is big"),
        ("B", "The correct option is B because of the hilum | My answer would be option B | It's B. | B\nis seen"),
        ("B", "the answer is b. | I would choose (b)."),
        ("C", "The answer is a cyst | The answer is A cyst. | 'A cyst' | The best choice is (C), a cyst; not B"),
        ("", "A or B | (A) or (B) | A and C | A/B | A, B | A & D | The answer is B or C | B, C and D | Answer: A, B"),
        (
            "",
            "Option B is wrong | The answer is B. No, the answer is C. | It is a lesion | Answer: unclear | C5 vertebra",
        ),
        ("", "I would not choose between them | The answer is E | [ ] | ... | Answer: | option | vitamin B or D"),
        ("", "It is b dominant | Option B was wrong"),
        ("B", "B, a common one | B and nothing else | B/lung | B-sided"),
    ],
)
def test_answers_that_say_which_is_theirs(letter, answers):
    found = {answer: vqa.parse(answer, OPTIONS) for answer in answers.split(" | ")}
    assert found == dict.fromkeys(found, letter)


def test_options_of_other_letters_and_options_within_options():
    assert vqa.parse("e. spleen", {"d": "liver", "e": "spleen"}) == "e"
    assert vqa.parse("it is the left kidney", {"A": "kidney", "B": "left kidney"}) == "B"
    assert vqa.parse("7", {"A": "7", "B": "17"}) == "A" and vqa.parse("17 mm", {"A": "7", "B": "17"}) == "B"
    assert vqa.parse("it is the same", {"A": "the same", "B": "the same"}) == ""


def study(answer, letter, likelihood=None, name="q", kind="", options=OPTIONS):
    likelihoods = (likelihood,) if likelihood else ()
    return Study(name, name, ("q",), (answer,), (letter,), "", kind, options, letter, likelihoods)


def test_upstreams_rules_and_ours():
    made = [study("contains vitamin A. and more", "A"), study("b is it", "B"), study("Right lung", "B"), study("B", "B")]
    assert vqa.closed(made).correct.tolist() == [0, 0, 1, 1]
    assert vqa.closed(made).unparsable.tolist() == [1, 1, 0, 0]
    assert vqa.closed(made, "vqa_substring").correct.tolist() == [1, 0, 0, 0]
    assert vqa.closed(made, "vqa_first_letter").correct.tolist() == [0, 1, 0, 1]
    assert vqa.closed([Study("a", "", ("q",), ("x",), ("y",))]) is None


def test_accuracy_by_type_with_its_mean_and_baselines():
    made = [study(a, "B", name=f"q{i}", kind="organ") for i, a in enumerate(["B", "B", "A", "B", "A"])]
    made += [
        study(a, r, name=f"p{i}", kind="plane", options={"A": "axial", "B": "coronal"}) for i, (a, r) in enumerate(["AA", "AB"])
    ]
    made.append(Study("text", "t", ("q",), ("left",), ("left",)))
    stats = scores.statistics([s.answers for s in made], [s.references for s in made])
    found = parts.parts(made, stats, resamples=300)
    content = parts.to_json(found)
    closed = content["closed"]
    assert closed["questions"] == 7 and closed["rule"] == "letter"
    assert closed["scores"]["accuracy"] == pytest.approx(4 / 7) and closed["scores"]["unparsable_share"] == 0
    assert closed["scores"]["chance"] == pytest.approx((5 / 4 + 2 / 2) / 7)
    assert closed["scores"]["always_commonest"] == pytest.approx(1 / 7)  # A is given four times and right once
    assert "brier" not in closed["scores"] and "likelihood_accuracy" not in closed["scores"]
    types = content["question_types"]
    assert types["groups"]["organ"]["scores"]["accuracy"] == pytest.approx(3 / 5)
    assert types["groups"]["plane"]["records"] == 2
    assert types["mean"]["scores"]["accuracy"] == pytest.approx((3 / 5 + 1 / 2) / 2)
    low, high = types["groups"]["organ"]["intervals"]["accuracy"]
    assert low < 3 / 5 < high


def test_calibration_by_hand():
    said = [("A", 0.7), ("B", 0.6), ("A", 0.65), ("B", 0.95)]
    made = []
    for i, (letter, share) in enumerate(said):
        other = "B" if letter == "A" else "A"
        shares = {letter: share, other: 1 - share}
        made.append(study("unclear", "A", Likelihood(letter, shares), f"q{i}", options={"A": "x", "B": "y"}))
    stats = scores.statistics([s.answers for s in made], [s.references for s in made])
    content = parts.to_json(parts.parts(made, stats, resamples=50))["closed"]
    assert content["scores"]["accuracy"] == 0 and content["scores"]["unparsable_share"] == 1
    assert content["scores"]["likelihood_accuracy"] == pytest.approx(0.5)
    assert content["scores"]["brier"] == pytest.approx(2 * (0.3**2 + 0.6**2 + 0.35**2 + 0.95**2) / 4)
    # bins 0.6 to 0.7 (two answers: 0.6 wrong, 0.65 right), 0.7 to 0.8 (one right), 0.9 to 1 (one wrong)
    error = 2 / 4 * abs(0.625 - 0.5) + 1 / 4 * 0.3 + 1 / 4 * 0.95
    assert content["scores"]["calibration_error"] == pytest.approx(error)
    assert [(b["low"], b["count"]) for b in content["reliability"]] == [(0.6, 2), (0.7, 1), (0.9, 1)]


def test_wrong_images_cost_accuracy_in_pairs():
    made = [study("B", "B", name=f"q{i}") for i in range(12)]
    stats = scores.statistics([s.answers for s in made], [s.references for s in made])
    found = parts.parts(made, stats, resamples=80)
    wrong = [("B",)] * 6 + [("A",)] * 6
    control = parts.control_of(made, found, wrong, 80, 0)
    assert control.accuracy == control.drop == pytest.approx(0.5)
    assert 0 < control.interval[0] < 0.5 < control.interval[1] < 1
    assert parts.to_json(found, control)["closed"]["control"]["drop"] == pytest.approx(0.5)
    assert not any(math.isnan(side) for side in control.interval)
