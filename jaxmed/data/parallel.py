"""The same function over many items in several processes, with a progress bar."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")
Result = TypeVar("Result")
# Below this many items a process takes longer to start than it saves.
WORTH_STARTING = 4


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_items(
    function: Callable[[Item], Result], items: Sequence[Item], processes: int, label: str, small: bool, bar: bool = True
) -> Iterator[Result]:
    """Results in the order of the items. `processes` 0: one a core; `function` is a module's own or a partial of one.

    `small`: items take milliseconds, so they travel in bundles. `bar`: show the progress on stderr. Closing the iterator
    drops what has not begun.
    Processes are spawned, not forked: the caller may have started JAX, whose threads do not survive a fork.
    """
    processes = min(processes or usable_cores(), -(-len(items) // WORTH_STARTING))
    bundle = max(1, min(32, len(items) // (processes * 4))) if small and processes else 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not items or not bar) as progress:
        task = progress.add_task(label, total=len(items))
        if processes <= 1:
            for item in items:
                yield function(item)
                progress.advance(task)
            return
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
        try:
            for result in pool.map(function, items, chunksize=bundle):
                yield result
                progress.advance(task)
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next item for ever: both ends of that pipe are its own."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
