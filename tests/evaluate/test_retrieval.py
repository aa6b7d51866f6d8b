"""Recall at k: by hand, ties, texts that repeat."""

import numpy as np
import pytest

from jaxmed.evaluate import retrieval as module
from jaxmed.evaluate.retrieval import retrieval

# rows: what volume i finds; the diagonal is what it should find
SIMILARITY = np.array(
    [
        [0.9, 0.1, 0.2, 0.3, 0.0],
        [0.8, 0.7, 0.1, 0.0, 0.2],
        [0.3, 0.5, 0.4, 0.2, 0.6],
        [0.1, 0.2, 0.6, 0.0, 0.5],
        [0.0, 0.3, 0.2, 0.4, 0.9],
    ]
)


def test_by_hand():
    """Ranks of the partner: volumes 0, 1, 2, 4, 0; texts 0, 0, 1, 3, 0."""
    found = retrieval(SIMILARITY, np.eye(5), places=(1, 2, 3, 5))
    assert found.recalls == pytest.approx(
        {"i2t_r1": 0.4, "i2t_r2": 0.6, "i2t_r3": 0.8, "i2t_r5": 1.0, "t2i_r1": 0.6, "t2i_r2": 0.8, "t2i_r3": 0.8, "t2i_r5": 1.0}
    )
    np.testing.assert_array_equal(found.ranking_i2t[2], [4, 1, 2, 0, 3])
    np.testing.assert_array_equal(found.ranking_t2i[3], [4, 0, 2, 1, 3])
    np.testing.assert_array_equal(retrieval(SIMILARITY, np.eye(5), keep=2).ranking_i2t[2], [4, 1])


def test_in_pieces(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, 37, 6))
    whole = retrieval(images, texts)
    monkeypatch.setattr(module, "_ROWS", 8)
    pieces = retrieval(images, texts)
    assert pieces.recalls == whole.recalls
    np.testing.assert_array_equal(pieces.ranking_t2i, whole.ranking_t2i)


def test_a_model_that_tells_nothing_apart_finds_nothing():
    same = np.ones((50, 4))
    assert retrieval(same, same).recalls == pytest.approx({f"{d}_r{k}": k / 50 for d in ("i2t", "t2i") for k in (1, 5, 10)})


def test_a_text_with_the_same_words_counts():
    """Volume 1 finds text 0, volume 3 text 2; both are its own words. Text 3 finds volume 4, then 0, then 2."""
    texts = ["No lesion.", "No lesion. ", "A cyst.", "A cyst.", "A mass."]
    found = retrieval(SIMILARITY, np.eye(5), places=(1, 2, 3), same=texts)
    assert found.recalls == pytest.approx(
        {"i2t_r1": 0.8, "i2t_r2": 0.8, "i2t_r3": 1.0, "t2i_r1": 0.8, "t2i_r2": 0.8, "t2i_r3": 1.0}
    )
