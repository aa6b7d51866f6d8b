"""Multiple choice by likelihood: continuations as training tokenises them, shares, calibration over the set."""

from pathlib import Path

import numpy as np
import pytest

from jaxmed.data.conversation import encode_prompt_example
from jaxmed.data.examples import TextOptions
from jaxmed.data.placeholders import encode_answered
from jaxmed.data.records import Record, Turn
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import UserError
from jaxmed.generate.choices import batch_calibrated, calibrate, choice_of, continuations, wordings

GOLDEN = Path(__file__).parents[1] / "golden"
OPTIONS = {"A": "left lung", "B": "spleen", "C": "left kidney"}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(str(GOLDEN / "vit3d" / "lamed_merged"))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("letters", ["A", "B", "C"]),
        ("options", ["A. left lung", "B. spleen", "C. left kidney"]),
        ("texts", ["left lung", "spleen", "left kidney"]),
    ],
)
def test_a_continuation_is_what_training_puts_behind_the_prompt(kind, wanted, tokenizer):
    question, given = " Which organ? Choices: A. left lung B. spleen C. left kidney", TextOptions(places=5)
    assert wordings(OPTIONS, kind) == wanted
    prompt = encode_prompt_example([("human", f"<image>{question}"), ("gpt", None)], tokenizer, "m3d", given)
    found = continuations([("human", f"<image>{question}")], wanted, prompt.ids, tokenizer, "m3d", given)
    for text, ids in zip(wanted, found, strict=True):
        record = Record("r", ("x",), (Turn("human", question), Turn("gpt", text)))
        trained = encode_answered(record, tokenizer, given).ids
        np.testing.assert_array_equal(np.concatenate([prompt.ids, ids]), trained[:-1])  # the end token comes behind
        assert tokenizer.decode(ids.tolist()) == f" {text}"


@pytest.mark.parametrize("template", ["llama3", "plain"])
def test_templates_with_headers(template):
    llama = Tokenizer.from_folder(str(GOLDEN / "btb3d" / "base"))
    turns = [("human", "<image>\nWhich organ?")]
    prompt = encode_prompt_example([*turns, ("gpt", None)], llama, template)
    texts = list(OPTIONS.values())
    found = continuations(turns, texts, prompt.ids, llama, template, TextOptions())
    for text, ids in zip(texts, found, strict=True):
        assert llama.decode(ids.tolist()).strip() == text
        assert not set(ids.tolist()) & set(llama.eos_ids)


def test_an_option_that_begins_another_ends_with_its_end_token(tokenizer):
    """Alone, a beginning is always as likely as what goes on from it, or likelier."""
    llama = Tokenizer.from_folder(str(GOLDEN / "btb3d" / "base"))
    given, texts = TextOptions(places=5), ["left lung", "spleen", "left lung and spleen"]
    for tok, template, end in ((tokenizer, "m3d", tokenizer.eos_ids[0]), (llama, "llama3", llama.token_id("<|eot_id|>"))):
        more, turns = given if template == "m3d" else TextOptions(), [("human", "<image> Which?")]
        prompt = encode_prompt_example([*turns, ("gpt", None)], tok, template, more)
        found = continuations(turns, texts, prompt.ids, tok, template, more)
        plain = [continuations(turns, [text], prompt.ids, tok, template, more)[0] for text in texts]
        for ids, alone in zip(found, plain, strict=True):
            assert ids.tolist() == [*alone, end] and ids.dtype == np.int32


def test_options_that_are_the_same_tokens_are_refused(tokenizer):
    given, turns = TextOptions(places=5), [("human", "<image> Which?")]
    prompt = encode_prompt_example([*turns, ("gpt", None)], tokenizer, "m3d", given)
    with pytest.raises(UserError, match="the same tokens"):
        continuations(turns, ["spleen", "lung", "spleen"], prompt.ids, tokenizer, "m3d", given)


def test_sums_and_means_choose_differently():
    """A long option loses by its sum and wins by its mean."""
    tokens = [np.log([0.3]), np.log([0.5, 0.4]), np.log([0.1])]
    by_sum, by_mean = (choice_of(OPTIONS, tokens, per_token) for per_token in (False, True))
    assert (by_sum.letter, by_mean.letter) == ("A", "B")
    np.testing.assert_allclose(list(by_sum.probabilities.values()), np.array([0.3, 0.2, 0.1]) / 0.6)
    means = np.array([0.3, 0.2**0.5, 0.1])
    np.testing.assert_allclose(list(by_mean.probabilities.values()), means / means.sum())
    assert by_mean.log_likelihoods["B"] == pytest.approx(np.log(0.2))


def test_calibration_takes_a_letters_advantage_away():
    """Answers that a constant liking hides: dividing by the mean over the set finds them again."""
    rng = np.random.default_rng(3)
    right = np.tile(np.arange(4), 50)
    clean = np.full((200, 4), 0.15)
    clean[np.arange(200), right] = 0.55
    clean *= rng.uniform(0.9, 1.1, clean.shape)
    biased = clean * np.array([5.0, 1.0, 1.3, 0.4])
    biased /= biased.sum(1, keepdims=True)
    assert (biased.argmax(1) == right).mean() < 0.6
    found = batch_calibrated(biased)
    assert (found.argmax(1) == right).mean() > 0.97
    np.testing.assert_allclose(found.sum(1), 1)
    ratios = biased / biased.mean(0)
    np.testing.assert_allclose(found, ratios / ratios.sum(1, keepdims=True))
    # nothing certain becomes NaN
    sure = batch_calibrated(np.array([[1.0, 0.0], [0.9, 0.1]]))
    assert np.isfinite(sure).all() and sure[0, 0] == 1


def test_a_finished_file_is_calibrated_by_sets_of_letters():
    rng = np.random.default_rng(1)

    def study(n, letters):
        shares = rng.dirichlet(np.ones(len(letters)))
        shares = dict(zip(letters, shares.tolist(), strict=True))
        answer = {"id": str(n), "question": "?", "answer": "A. x", "prediction": "A", "probabilities": shares}
        return {"image": f"{n}.npy", "conversations_out": [answer]}

    letters = ["ABC"] * 9 + ["AB"] * 3
    studies = [study(n, of) for n, of in enumerate(letters)] + [{"conversations_out": [{"id": "r", "answer": "text"}]}]
    before = np.array([list(s["conversations_out"][0]["probabilities"].values()) for s in studies[:9]])
    options = {str(n): {letter: f"text {letter}{n}" for letter in of} for n, of in enumerate(letters)}
    made, notices = calibrate(studies, options)
    assert made[9:] == studies[9:], "three questions say nothing about a liking"
    assert len(notices) == 2 and "3 questions with the options A, B are too few" in " ".join(notices)
    wanted = before / before.mean(0)
    wanted /= wanted.sum(1, keepdims=True)
    for n, share in enumerate(wanted):
        answer = made[n]["conversations_out"][0]
        np.testing.assert_allclose([answer["probabilities"][k] for k in "ABC"], share)
        assert answer["prediction"] == "ABC"[share.argmax()]
        assert answer["answer"] == f"{answer['prediction']}. text {answer['prediction']}{n}"
        assert answer["uncalibrated"] == dict(zip("ABC", before[n], strict=True))
    assert "uncalibrated" not in studies[0]["conversations_out"][0], "what the journal has stays"
