"""Processes of one job: joined once, who speaks for them, and how they end together.

`initialise` comes before anything touches a device. Its errors are fatal: a job that goes on in pieces trains pieces.
Where the flags say nothing, the variables of SLURM, of a TPU pod or of a GKE job set decide (see `jaxmed.cluster`); without any
of them there is one process.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmed.cluster import find_place
from jaxmed.config import DistributedConfig
from jaxmed.errors import REQUEUE, UserError
from jaxmed.roll_call import roll_call

INITIALISATION_SECONDS = 50
HEARTBEAT_SECONDS = 50
SHUTDOWN_SECONDS = 30
DEFECTS = (NameError, TypeError, AttributeError, ImportError, AssertionError, LookupError, NotImplementedError, SyntaxError)
"""Errors that no lost peer causes: started again, they come again"""
LONGEST = 1 << 16
"""Bytes of a text that processes exchange"""


class SharedError(UserError):
    """Raised by all processes at the same place, with the same text: one of them tells it, and they part in peace."""


def initialise(config: DistributedConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Joins this process to its job, if there is one of several processes. Called once, before the first use of a device."""
    place = find_place(config, environment)
    if place is None:
        return
    roll_call(place, INITIALISATION_SECONDS)
    _past_proxies(place.coordinator.rpartition(":")[0])
    # CPU processes talk over gloo; accelerators bring their own collectives and do not read this.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=place.coordinator,
        num_processes=place.processes,
        process_id=place.process,
        local_device_ids=list(place.devices) or None,
        cluster_detection_method="deactivate",
        initialization_timeout=INITIALISATION_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


def _past_proxies(host: str) -> None:
    """The runtime's calls would go to the proxy that many clusters set for the internet, and hang there."""
    if any(name in os.environ for name in ("http_proxy", "https_proxy", "grpc_proxy")):
        others = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""  # noqa: SIM112 (gRPC reads these alone)
        os.environ["no_grpc_proxy"] = ",".join(name for name in (others, host) if name)  # noqa: SIM112


def leave(error: BaseException) -> NoReturn:
    """Ends this process of several at once, after telling why: 2 for what a person must mend, 1 for an error of the program's
    own, else `REQUEUE`.

    An ordinary exit would wait for the others in a barrier that they never reach; they fail in their next collective, and
    leave as well. Nothing is saved: the last complete checkpoint is where the job goes on.
    """
    shared, mendable = isinstance(error, SharedError), isinstance(error, UserError)
    if is_first() or not shared:
        text = str(error) if mendable else "".join(traceback.format_exception(error))
        who = f"all {jax.process_count()} processes" if shared else f"process {jax.process_index()} of {jax.process_count()}"
        print(f"{who}: {text.rstrip()}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if shared:  # all are here; were process 0 gone first, the runtime of the others would add its own complaints
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
    os._exit(error.code if mendable else 1 if isinstance(error, DEFECTS) else REQUEUE)


def is_first() -> bool:
    """Whether this process speaks and writes for the job."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """A line on stderr, once for the whole job."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def barrier(name: str) -> None:
    """All processes get here before any goes on."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(here: bool) -> bool:
    """Whether every process says yes."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(here).all())


def gather_texts(text: str) -> list[str]:
    """Every process's text, in the order of the processes. All call it together."""
    if jax.process_count() == 1:
        return [text]
    here = np.frombuffer(text.encode()[:LONGEST], np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(here.size)))
    if not lengths.any():
        return [""] * len(lengths)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: here.size] = here
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:length].tobytes().decode(errors="replace") for row, length in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What one process finds wrong within ends all of them, in one line that names it. Nothing within may be collective."""
    if jax.process_count() == 1:
        yield
        return
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error) or type(error).__name__
    problems = gather_texts(problem)
    if any(problems):
        raise SharedError(in_one(problems))


def in_one(problems: list[str]) -> str:
    """Problems by process ("" for none) as one text; one that all have is told once."""
    if len(set(problems)) == 1:
        return problems[0]
    return "; ".join(f"process {process}: {problem}" for process, problem in enumerate(problems) if problem)
