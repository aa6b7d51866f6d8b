"""METEOR without synonyms: words match that are the same or have the same Porter stem. Needs no WordNet.

The constants are those of Banerjee and Lavie (2005): the harmonic mean weighs recall 9 to 1 (alpha 0.9), and an alignment in
c chunks of m matched words loses half of (c / m)^3 (gamma 0.5, beta 3). Among the alignments that match the most words, the
one with the fewest chunks counts, as METEOR is defined; nltk takes the first that it comes across, so that its figure is
lower where words repeat.

How many words match does not depend on the alignment: as many of each stem as the text has that has fewer of them (words that
are the same have the same stem). Chunks are matches less *links*, a link being two neighbours of one text that are matched
with two neighbours of the other. So the most links are sought, and words outside links match whatever is left.
The search goes from left to right over the answer and keeps the `BEAM` best beginnings; it is exact while no more than these
are undecided at once. For texts that repeat themselves more than that, a narrower search or taking the longest common run
first, again and again, may find more, and the best of them counts.
"""

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5
BEAM = 64
_NARROW = 8

_FREE, _ENDED = -1, -2
"""The last word has no link; it has one, and the next word cannot have one with it"""
_States = dict[tuple[int, int], int]
"""(bits of the places taken, place of the last word, `_FREE` or `_ENDED`) -> links so far"""


def matches(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """How many words of two lists of stems match."""
    return (Counter(ours) & Counter(theirs)).total()


def chunks(ours: Sequence[str], theirs: Sequence[str], beam: int = BEAM) -> int:
    """The fewest chunks of an alignment that matches the most words."""
    runs = _common_runs(ours, theirs)
    return matches(ours, theirs) - max(*(_links(ours, theirs, runs, b) for b in (beam, _NARROW)), _longest_first(runs))


def _longest_first(runs: list[list[int]]) -> int:
    """Links, if the longest common run that is left is taken until there is none."""
    starts = [
        (-length, i, j)
        for i, row in enumerate(runs)
        for j, length in enumerate(row)
        if length and not (i and j and runs[i - 1][j - 1] > length)
    ]
    heapq.heapify(starts)
    links, ours, theirs = 0, set[int](), set[int]()
    while starts:
        length, i, j = heapq.heappop(starts)
        places = range(1 - length)  # a run of n links has n + 1 words
        free = [i + k not in ours and j + k not in theirs for k in places]
        if all(free):
            links -= length
            ours.update(i + k for k in places)
            theirs.update(j + k for k in places)
            continue
        edges = [-1, *(k for k in places if not free[k]), len(places)]
        for a, b in itertools.pairwise(edges):  # what is free between two places that are taken
            if b - a > 2:
                heapq.heappush(starts, (a + 2 - b, i + a + 1, j + a + 1))
    return links


def _links(ours: Sequence[str], theirs: Sequence[str], runs: list[list[int]], beam: int) -> int:
    """The most links that a search with so many beginnings finds."""
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    for j in range(len(theirs) - 1):
        places[theirs[j], theirs[j + 1]].append(j)
    pairs = [(ours[i], ours[i + 1]) for i in range(len(ours) - 1)]
    relevant = _relevant(pairs, places)
    states: _States = {(0, _FREE): 0}
    for i, pair in enumerate(pairs):
        states = _advance(states, places.get(pair, []), runs[i + 1], relevant[i])
        if len(states) > beam:
            ahead = runs[i + 1]  # what the last word's own run will surely add
            best = sorted(states, key=lambda state: -states[state] - (ahead[state[1]] if state[1] >= 0 else 0))
            states = {state: states[state] for state in best[:beam]}
    return max(states.values())


def _relevant(pairs: list[tuple[str, str]], places: dict[tuple[str, str], list[int]]) -> list[int]:
    """By place in the answer, bits of the reference's places that a link further on could take."""
    bits, found = 0, []
    for pair in reversed(pairs):
        found.append(bits)
        for j in places.get(pair, ()):
            bits |= 3 << j
    return found[::-1]


def _common_runs(ours: Sequence[str], theirs: Sequence[str]) -> list[list[int]]:
    """[i][j]: how many words after ours[i] and theirs[j] are the same, if these two are; else 0."""
    runs = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i in range(len(ours) - 1, -1, -1):
        word, row, below = ours[i], runs[i], runs[i + 1]
        for j, other in enumerate(theirs):
            if word == other:
                row[j] = below[j + 1] + (i + 1 < len(ours) and j + 1 < len(theirs) and ours[i + 1] == theirs[j + 1])
    return runs


def _advance(states: _States, places: list[int], ahead: list[int], relevant: int) -> _States:
    """The next two words linked, or not. `places`: where the two stand side by side; states with the same future become one:
    places that no link can take any more are forgotten, and the last place where nothing can follow on it."""
    found: _States = {}

    def keep(taken: int, last: int, links: int) -> None:
        state = (taken & relevant, last if last < 0 or ahead[last] else _ENDED)
        found[state] = max(links, found.get(state, 0))

    for (taken, last), links in states.items():
        keep(taken, _FREE, links)
        starts = places if last == _FREE else [last] if last >= 0 else []
        for j in starts:
            both = 3 << j if last == _FREE else 2 << j
            if not taken & both:
                keep(taken | both, j + 1, links + 1)
    return found


def from_matches(matched: int, chunks: int, ours: int, theirs: int) -> float:
    """METEOR of an answer of `ours` words to a reference of `theirs`."""
    if not matched:
        return 0.0
    precision, recall = matched / ours, matched / theirs
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    return mean * (1 - GAMMA * (chunks / matched) ** BETA)


def meteor_exact(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """METEOR of two lists of stems."""
    return from_matches(matches(ours, theirs), chunks(ours, theirs), len(ours), len(theirs))
