"""Word-level differences of two texts, for showing them side by side.

Words are compared without case and without the punctuation around them, so that a moved comma does not light up; what is
shown is the text as it stands, spaces and line breaks included. Both sides come as runs (marked, text).
"""

import difflib
import itertools
import re

_SPACE = re.compile(r"(\s+)")
_EDGES = re.compile(r"^\W+|\W+$")

Run = tuple[bool, str]


def _key(word: str) -> str:
    """What is compared; a word of punctuation alone is itself."""
    return _EDGES.sub("", word).lower() or word


def _runs(pieces: list[str], marked: list[bool]) -> list[Run]:
    """`pieces` alternate word, space, word …; a space is marked where both its neighbours are, a line break never."""
    spaces = [a and b and "\n" not in space for a, b, space in zip(marked, marked[1:], pieces[1::2], strict=False)]
    marks = [spaces[i // 2] if i % 2 else marked[i // 2] for i in range(len(pieces))]
    groups = itertools.groupby(zip(marks, pieces, strict=True), key=lambda pair: pair[0])
    runs = [(mark, "".join(piece for _, piece in group)) for mark, group in groups]
    return [(mark, text) for mark, text in runs if text]


def differences(ours: str, theirs: str) -> tuple[list[Run], list[Run]]:
    """Runs of both texts; marked are the words that the other one lacks at that place."""
    a, b = _SPACE.split(ours.strip()), _SPACE.split(theirs.strip())
    words_a, words_b = [_key(w) for w in a[::2]], [_key(w) for w in b[::2]]
    matcher = difflib.SequenceMatcher(None, words_a, words_b, autojunk=False)
    mark_a, mark_b = [True] * len(words_a), [True] * len(words_b)
    for block in matcher.get_matching_blocks():
        mark_a[block.a : block.a + block.size] = [False] * block.size
        mark_b[block.b : block.b + block.size] = [False] * block.size
    return _runs(a, mark_a), _runs(b, mark_b)
