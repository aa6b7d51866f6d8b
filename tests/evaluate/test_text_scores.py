"""Scores of single texts against the packages that define them."""

import nltk
import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

from jaxmed.evaluate import scores, text
from jaxmed.evaluate.studies import Study

PAIRS = [
    ("Trachea is open. No nodule, no effusion was detected.", "The trachea is open; no nodules or effusions were detected."),
    ("A 7 mm nodule (right lower lobe) is observed.", "A 7.5 mm nodule is observed in the right-lower lobe, e.g. segment 9."),
    ("Normal.", "Findings within normal limits."),
    ("no no no no effusion effusion", "no effusion"),
    ("", "Normal chest."),
    ("Heart size is normal", ""),
    ("xyz", "Lungs are clear."),
    ("Lungs are", "Lungs are clear"),
    ("lungs ARE clear\nand aerated", "Lungs are clear and aerated &quot;fully&quot;"),
    ("Ödem — çok büyük", "Ödem büyük"),
]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_one_text_is_sacrebleus_sentence_bleu(order):
    scorer = BLEU(max_ngram_order=order, effective_order=True)
    ours = [float(text.bleu_from_statistics(text.bleu_statistics(a, r), order, single=True)) for a, r in PAIRS]
    theirs = [scorer.sentence_score(a, [r]).score / 100 for a, r in PAIRS]
    np.testing.assert_allclose(ours, theirs, atol=1e-9)
    assert len({round(score, 6) for score in ours}) > 4


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("chosen", [slice(None), slice(4, 8), slice(2, 3), slice(6, 7)])
def test_summed_statistics_are_sacrebleus_corpus_bleu(order, chosen):
    pairs = PAIRS[chosen]
    total = np.sum([text.bleu_statistics(a, r) for a, r in pairs], axis=0)
    answers, references = zip(*pairs, strict=True)
    theirs = BLEU(max_ngram_order=order).corpus_score(list(answers), [list(references)]).score / 100
    assert float(text.bleu_from_statistics(total, order, single=False)) == pytest.approx(theirs, abs=1e-9)
    if order == 4:
        assert theirs == sacrebleu.corpus_bleu(list(answers), [list(references)]).score / 100


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_rouge_is_rouge_scores(answer, reference):
    theirs = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, answer)
    expected = [theirs[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")]
    np.testing.assert_allclose(text.rouge(answer, reference), expected, atol=1e-12)


def test_longest_common_subsequence_against_the_quadratic_table():
    random = np.random.default_rng(5)
    for size_a, size_b, letters in [(0, 7, 3), (41, 67, 3), (130, 90, 11), (64, 64, 2), (5, 0, 2)]:
        a, b = ([str(x) for x in random.integers(0, letters, n)] for n in (size_a, size_b))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        assert text.common_subsequence(a, b) == table[-1, -1]


class NoSynonyms:
    """WordNet with no entries: METEOR by exact words and stems alone."""

    @staticmethod
    def ensure_loaded():
        pass

    @staticmethod
    def synsets(word):
        return []


@pytest.fixture
def wordnet(monkeypatch):
    monkeypatch.setattr(nltk.corpus, "wordnet", NoSynonyms)
    text.meteor_available.cache_clear()
    yield
    text.meteor_available.cache_clear()


def test_meteor_is_there_where_wordnet_is(wordnet):
    assert text.meteor_available()
    assert text.meteor("", "a") == text.meteor("a", "") == text.meteor("rib", "lung") == 0
    # 4 of 5 and 4 of 4 words match in one chunk: F = 10 P R / (R + 9 P), penalty 0.5 (1/4)^3.
    precision, recall = 4 / 5, 1.0
    expected = 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 / 4**3)
    assert text.meteor("Nodules seen on left now", "nodule seen on left") == pytest.approx(expected)


def test_meteor_joins_the_other_scores(wordnet):
    study = Study("a", "", ("q",), ("left lung clear",), ("left lung clear",))
    content = scores.to_json(scores.score([study], [("left",)], "zeros", resamples=5))
    assert content["corpus"]["meteor"] == pytest.approx(1 - 0.5 / 3**3)
    assert content["control"]["drop"]["meteor"] > 0 and "meteor" in content["collapse"]["always_commonest"]


def test_without_wordnet_meteor_is_absent(monkeypatch):
    def missing():
        raise LookupError("corpora/wordnet")

    monkeypatch.setattr(nltk.corpus, "wordnet", type("Absent", (), {"ensure_loaded": staticmethod(missing)}))
    monkeypatch.setattr(nltk, "download", None)
    text.meteor_available.cache_clear()
    study = Study("a", "", ("q",), ("left lung",), ("left lung",))
    assert "meteor" not in scores.to_json(scores.score([study], resamples=2))["corpus"]
    text.meteor_available.cache_clear()
