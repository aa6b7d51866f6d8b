"""SIGTERM: the machine is about to be taken away. All processes save at the same step, and leave with `REQUEUE`.

Among several processes JAX's runtime catches the signal, tells the others, and picks a point that none of them has passed; for
that, all ask `reached` equally often and in the same order. A process alone has a handler of its own that behaves the same.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from jaxmed.errors import Preempted


class Preemption:
    """Whether this job has been asked to end."""

    def __init__(self):
        self._several = jax.process_count() > 1
        self._asked, self._points = False, 0
        self._words = ""

    def reached(self) -> bool:
        """True where all processes save and leave. Among several they ask at the same places, nowhere else."""
        if not self._several:
            return self._asked
        # counted from the start of the process: steps of a run that goes on begin anywhere, and the point must still be ahead
        self._points += 1
        self._asked = self._asked or multihost_utils.reached_preemption_sync_point(self._points)
        return self._asked

    def leave_if_reached(self, words: str) -> None:
        """A place where nothing is to be saved: raises Preempted with these words."""
        if self.reached():
            raise Preempted(words)

    @contextlib.contextmanager
    def nothing_to_lose(self, words: str) -> Iterator[None]:
        """Within it a process alone leaves at once, with these words."""
        before, self._words = self._words, words
        try:
            if self._asked and words:
                raise Preempted(words)
            yield
        finally:
            self._words = before

    def holding(self) -> contextlib.AbstractContextManager[None]:
        """Within `nothing_to_lose`, a part in which there is something, and which asks for itself."""
        return self.nothing_to_lose("")

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._words:
            raise Preempted(self._words)


@contextlib.contextmanager
def listening() -> Iterator[Preemption]:
    """Within it SIGTERM does not end the process; whoever is within asks, and ends it."""
    preemption = Preemption()
    # only a process alone, and only its main thread, may have a handler
    own = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, preemption.on_signal) if own else None
    try:
        yield preemption
    finally:
        if own:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
