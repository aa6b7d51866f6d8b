"""METEOR without synonyms: the alignment against an exhaustive matcher, the figure against hand and nltk."""

import random

import pytest
from nltk.translate.meteor_score import meteor_score

from jaxmed.evaluate import meteor, text
from jaxmed.evaluate.text import ExactMeteor


class NoSynonyms:
    @staticmethod
    def synsets(word):
        return []


def exhaustive(ours, theirs):
    """(matches, chunks) by trying every alignment."""
    best = (0, 0)

    def follow(i, used, matched, chunks, last):
        nonlocal best
        if i == len(ours):
            best = max(best, (matched, -chunks))
            return
        follow(i + 1, used, matched, chunks, None)
        for j, word in enumerate(theirs):
            if word == ours[i] and j not in used:
                begins = last is None or j != last + 1
                follow(i + 1, used | {j}, matched + 1, chunks + begins, j)

    follow(0, frozenset(), 0, 0, None)
    return best[0], -best[1]


def test_fewest_chunks_are_those_of_an_exhaustive_matcher():
    draw = random.Random(11)
    for _ in range(400):
        letters = "abcd"[: draw.randint(1, 4)]
        ours, theirs = ([draw.choice(letters) for _ in range(draw.randint(0, 7))] for _ in range(2))
        assert (meteor.matches(ours, theirs), meteor.chunks(ours, theirs)) == exhaustive(ours, theirs), (ours, theirs)


@pytest.mark.parametrize(
    ("ours", "theirs", "chunks"),
    [
        ("the heart is normal . the lung is clear .", "the lung is clear . the heart is normal .", 2),  # nltk: 5
        ("a b c d", "d c b a", 4),
        ("no nodule no effusion", "no effusion", 1),  # the first `no` is left out
        ("b a a b", "a a b a", 1),
    ],
)
def test_repeated_words_are_aligned_with_foresight(ours, theirs, chunks):
    assert meteor.chunks(ours.split(), theirs.split()) == chunks


def test_long_reports_in_another_order_need_at_most_a_chunk_a_sentence():
    things = [(x, y) for x in ("cyst", "stone", "mass") for y in ("left kidney", "right kidney", "liver")]
    sentences = [f"there is a {x} in the {y} ." for x, y in things]
    draw = random.Random(5)
    for _ in range(5):
        ours, theirs = (" ".join(draw.sample(sentences, 9)).split() for _ in range(2))
        assert meteor.matches(ours, theirs) == len(ours)
        assert meteor.chunks(ours, theirs) <= 10


def test_figure_by_hand():
    # 4 of 5 and 4 of 6 words match ("nodules" by its stem) in 2 chunks
    precision, recall = 4 / 5, 4 / 6
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    expected = mean * (1 - 0.5 * (2 / 4) ** 3)
    assert ExactMeteor()("Nodules seen on left now", "nodule seen today on left side") == pytest.approx(expected, abs=1e-12)
    assert ExactMeteor()("lung", "lung") == pytest.approx(0.5)
    assert ExactMeteor()("", "lung") == ExactMeteor()("lung", "") == ExactMeteor()("rib", "lung") == 0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("Trachea is open and no nodule was detected", "The trachea is open; nodules were not detected"),
        ("Small effusion on the left", "small effusions seen left of heart on CT"),
        ("liver normal", "Normal liver"),
    ],
)
def test_where_no_word_repeats_it_is_nltks_without_synonyms(answer, reference):
    ours, theirs = (text.bleu_tokens(x.lower()) for x in (answer, reference))
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
    assert ExactMeteor()(answer, reference) == pytest.approx(meteor_score([theirs], ours, wordnet=NoSynonyms), abs=1e-9)


def write_wordnet(folder):
    """A WordNet of one noun with a synonym, in the layout of its files."""
    folder.mkdir(parents=True)
    for part in ("adj", "adv", "noun", "verb"):
        (folder / f"index.{part}").write_text("")
        (folder / f"data.{part}").write_text("")
        (folder / f"{part}.exc").write_text("")
    (folder / "index.noun").write_text("heart n 1 0 1 0 00000000  \nticker n 1 0 1 0 00000000  \n")
    (folder / "data.noun").write_text("00000000 08 n 02 heart 0 ticker 0 000 | an organ  \n")
    (folder / "lexnames").write_text("".join(f"{n:02}\tname.{n}\t1\n" for n in range(45)))
    (folder / "index.sense").write_text("heart%1:08:00:: 00000000 1 0\n")
    (folder / "cntlist.rev").write_text("")


def test_synonyms_come_from_a_folder_of_wordnet(tmp_path):
    write_wordnet(tmp_path / "corpora" / "wordnet")
    wordnet = text.read_wordnet(str(tmp_path))
    found = {scorer.name: scorer("the ticker is large", "the heart is large") for scorer in text.scorers(wordnet)}
    assert found["meteor"] == pytest.approx(1 - 0.5 * (1 / 4) ** 3)  # one chunk of four words
    assert found["meteor_exact"] == pytest.approx(0.75 * (1 - 0.5 * (2 / 3) ** 3))


def test_a_folder_without_wordnet_is_told(tmp_path):
    with pytest.raises(text.UserError, match=r"has no data\.noun.*--wordnet"):
        text.read_wordnet(str(tmp_path))
