"""The processes that hold one model together: all do the same, in the same order; the first of them has the journal.

A process alone is its own first; nothing here then costs anything.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from jaxmed.distributed import gather_texts, in_one, is_first, together
from jaxmed.generate.journal import Journal


class Follower:
    """What a process that is not the first has for a journal: it knows what is done, and writes nothing."""

    def __init__(self, done: Sequence[str]):
        self.done: dict[str, Any] = dict.fromkeys(done)

    def append(self, key: str, entry: Any) -> None:
        self.done[key] = entry

    def close(self) -> None:
        pass


def open_journal(out: str, header: dict[str, Any], share: int, names: Sequence[str]) -> Journal | Follower:
    """The first process's journal of share `share`, and followers that know of the same records of `names` as done: others may
    be at work on the same result, and what each process saw of it need not be the same."""
    journal = None
    with together():
        if is_first():
            journal = Journal(out, header, share)
    known = np.asarray([journal is not None and name in journal.done for name in names])
    known = np.asarray(multihost_utils.broadcast_one_to_all(known))
    return journal or Follower([name for name, done in zip(names, known, strict=True) if done])


def shared_fault(fault: str) -> str:
    """What any process found wrong with the same thing, "" if none did: all of them must leave it out."""
    return in_one(gather_texts(fault))
