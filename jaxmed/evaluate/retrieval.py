"""Retrieval among pairs of volumes and reports: who finds its partner among the first k.

Volume i and text i are a pair. Both directions are ranked by the similarity, equal ones in the order of their numbers, so that
a model that sees nothing does not find everything. With identities, candidates whose text is the query's own are as good as its
partner: several volumes of a study share a report.

Axis letters: N pairs, K places of a ranking that are kept, P width of the shared space.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROWS = 1024
"""Queries whose similarities are looked at together"""
PLACES = (1, 5, 10)


@dataclass(frozen=True)
class Retrieval:
    recalls: dict[str, float]
    """`i2t_r1` the share of volumes whose report comes first, `t2i_r5` of reports whose volume is among the first five, ..."""
    ranking_i2t: np.ndarray
    """[N, K] texts for each volume, the nearest first"""
    ranking_t2i: np.ndarray
    """[N, K] volumes for each text"""


def retrieval(
    images: np.ndarray, texts: np.ndarray, places: Sequence[int] = PLACES, same: Sequence[str] = (), keep: int = 0
) -> Retrieval:
    """Vectors of pairs, images and texts [N, P]. `same`: each pair's text, where equal texts shall count as one; `keep`: places
    of the rankings to be kept (0: all)."""
    identity = identities(same) if len(same) else np.arange(len(images))
    recalls: dict[str, float] = {}
    rankings = []
    for name, one, other in (("i2t", images, texts), ("t2i", texts, images)):
        ranks, ranking = _ranks(one, other, identity, keep or len(images))
        recalls |= {f"{name}_r{k}": float(np.mean(ranks < k)) for k in places}
        rankings.append(ranking)
    return Retrieval(recalls, *rankings)


def identities(texts: Sequence[str]) -> np.ndarray:
    """[N] a number for each text, the same for the same words (blanks at the ends aside)."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(text.strip(), len(numbers)) for text in texts])


def _ranks(queries: np.ndarray, candidates: np.ndarray, identity: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """[N] how many candidates come before a query's first right one, and the first places of its ranking [N, keep]."""
    ranks, rankings = [], []
    for start in range(0, len(queries), _ROWS):
        rows = slice(start, start + _ROWS)
        order = np.argsort(-(queries[rows] @ candidates.T), axis=1, kind="stable")
        ranks.append(np.argmax(identity[order] == identity[rows, None], axis=1))
        rankings.append(order[:, :keep])
    return np.concatenate(ranks), np.concatenate(rankings)
