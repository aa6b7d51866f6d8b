"""Corpus scores, intervals, collapse and the control."""

import csv
import json

import numpy as np
import pytest
import sacrebleu

from jaxmed.evaluate import scores, text
from jaxmed.evaluate.studies import Study

WORDS = [
    "no",
    "small",
    "nodule",
    "effusion",
    "in",
    "the",
    "right",
    "left",
    "lower",
    "lobe",
    "is",
    "heart",
    "size",
    "normal",
    ".",
]


def made_up(count, seed, error):
    """References of random words, and answers in which a share `error` of the words is exchanged."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        reference = random.choice(WORDS, random.integers(9, 30))
        answer = np.where(random.random(len(reference)) < error, random.choice(WORDS, len(reference)), reference)
        found.append(Study(f"s{i}", f"v{i}.nii.gz", ("Report?",), (" ".join(answer),), (" ".join(reference),)))
    return found


def test_corpus_is_sacrebleus_and_the_mean_of_rouge():
    studies = made_up(37, 2, 0.4)
    found = scores.score(studies, resamples=20)
    answers, references = [s.answers[0] for s in studies], [s.references[0] for s in studies]
    assert found.corpus["bleu_4"] == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score / 100, abs=1e-9)
    rouge_l = np.mean([text.rouge(a, r)[2] for a, r in zip(answers, references, strict=True)])
    assert found.corpus["rouge_l"] == pytest.approx(rouge_l)
    assert found.per_study[5]["rouge_l"] == pytest.approx(text.rouge(answers[5], references[5])[2])


def test_a_study_of_several_questions_counts_once_in_means():
    one = Study("a", "", ("q",), ("left lung",), ("left lung",))
    two = Study("b", "", ("q", "p"), ("left lung", "heart"), ("right rib", "heart"))
    found = scores.score([one, two], resamples=5)
    assert found.corpus["rouge_1"] == pytest.approx((1 + 0.5) / 2)
    assert found.corpus["bleu_1"] == pytest.approx(3 / 5)
    assert found.answers == 3 and found.distinct == 2


def test_resamples_are_corpus_scores_of_drawn_studies():
    studies = made_up(23, 4, 0.5)
    stats = scores.statistics([s.answers for s in studies], [s.references for s in studies])
    samples = scores.resampled(stats, 120, seed=9)
    weights = np.concatenate(list(scores.draws(23, 120, seed=9)))
    assert (weights.sum(1) == 23).all() and samples["bleu_4"].shape == (120,)
    for row in (0, 49, 50, 119):
        picked = [studies[i] for i in np.repeat(np.arange(23), weights[row])]
        expected = sacrebleu.corpus_bleu([s.answers[0] for s in picked], [[s.references[0] for s in picked]]).score / 100
        assert samples["bleu_4"][row] == pytest.approx(expected, abs=1e-9)


def test_intervals_cover_and_narrow_with_studies_and_repeat_by_seed():
    few, many = made_up(25, 1, 0.4), made_up(400, 1, 0.4)
    a, b, again = scores.score(few), scores.score(many), scores.score(few)
    for found in (a, b):
        assert found.intervals["bleu_2"][0] < found.corpus["bleu_2"] < found.intervals["bleu_2"][1]
    width = [np.ptp(found.intervals["rouge_l"]) for found in (a, b)]
    assert 2.5 < width[0] / width[1] < 6.5  # the root of 16 is 4
    assert a.intervals == again.intervals
    assert scores.score(few, seed=1).intervals != a.intervals


def test_collapse_is_scored_with_the_commonest_generated_answer():
    texts = ["no effusion", "no effusion", "small nodule", "no effusion", "heart size normal"]
    studies = [Study(str(i), "", ("q",), (t,), ("small nodule",)) for i, t in enumerate(texts)]
    content = scores.to_json(scores.score(studies, resamples=5))
    assert content["collapse"]["distinct"] == 3
    assert content["collapse"]["commonest_share"] == pytest.approx(3 / 5)
    assert content["collapse"]["always_commonest"]["rouge_1"] == 0
    assert content["corpus"]["rouge_1"] == pytest.approx(1 / 5)


def test_control_is_paired():
    studies = made_up(60, 3, 0.3)
    same = scores.score(studies, [s.answers for s in studies], "zeros", resamples=100)
    assert same.control.unchanged_share == 1
    assert set(same.control.drop.values()) == {0.0} and set(same.control.intervals.values()) == {(0.0, 0.0)}
    moved = scores.score(studies, [s.answers for s in studies[1:] + studies[:1]], "shuffled", resamples=100)
    low, high = moved.control.intervals["bleu_4"]
    assert 0 < low < moved.control.drop["bleu_4"] < high
    assert moved.control.drop["bleu_4"] == pytest.approx(moved.corpus["bleu_4"] - moved.control.corpus["bleu_4"])
    # Paired: a constant loss a study gives a far narrower interval than the scores themselves have.
    worse = scores.score(studies, [(s.answers[0] + " rib",) for s in studies], "noise", resamples=200)
    assert np.ptp(worse.control.intervals["rouge_1"]) < 0.25 * np.ptp(worse.intervals["rouge_1"])


def test_files(tmp_path):
    studies = made_up(7, 6, 0.3)
    found = scores.score(studies, [s.answers for s in studies[1:] + studies[:1]], "", resamples=50)
    scores.write_json(tmp_path / "scores.json", found)
    content = json.loads((tmp_path / "scores.json").read_text())
    assert set(content) == {"corpus", "intervals", "collapse", "control", "studies"}
    assert set(content["control"]) == {"drop", "intervals", "unchanged_share"}  # the kind is not known, so it is absent
    names = {*text.BLEU, *text.ROUGE, "meteor_exact"} | ({"meteor"} if text.meteor_available() else set())
    assert set(content["corpus"]) == set(content["intervals"]) == set(content["control"]["drop"]) == names
    assert content["studies"] == 7
    scores.write_csv(tmp_path / "scores.csv", studies, found)
    with open(tmp_path / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [s.id for s in studies]
    assert float(rows[3]["rouge_l"]) == pytest.approx(found.per_study[3]["rouge_l"], abs=1e-6)
    assert rows[3]["answer"] == studies[3].answers[0]
