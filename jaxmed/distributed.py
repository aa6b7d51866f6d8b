"""Processes of one job: joined once, and who speaks for them.

`initialise` comes before anything touches a device. Its errors are fatal: a job that goes on in pieces trains pieces.
Where the flags say nothing, the variables of SLURM, of a TPU pod or of a GKE job set decide; without any of them there is
one process.
"""

import os
import sys
import traceback
from collections.abc import Mapping
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from jaxmed.config import DistributedConfig
from jaxmed.errors import UserError

INITIALISATION_SECONDS = 50
HEARTBEAT_SECONDS = 50
SHUTDOWN_SECONDS = 30
REQUEUE = 75
"""Exit code of a process that lost its peers: started again, the job goes on"""


def initialise(config: DistributedConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Joins this process to its job, if there is one of several processes. Called once, before the first use of a device."""
    if not wanted(config, environment):
        return
    # CPU processes talk over gloo; accelerators bring their own collectives and do not read this.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    explicit = {}
    if config.coordinator:
        explicit = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.process,
        }
    jax.distributed.initialize(
        **explicit,
        initialization_timeout=INITIALISATION_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


def wanted(config: DistributedConfig, environment: Mapping[str, str]) -> bool:
    """Whether the flags or the environment describe a job of several processes. UserError for half a description."""
    given = [bool(config.coordinator), config.processes > 0, config.process >= 0]
    if any(given):
        if not all(given):
            raise UserError(
                "--distributed.coordinator HOST:PORT, --distributed.processes N and --distributed.process I go together; "
                "give all three, or none where SLURM, a TPU pod or GKE sets them"
            )
        if not config.process < config.processes:
            raise UserError(f"--distributed.process {config.process} must be below --distributed.processes {config.processes}")
        return config.processes > 1
    # a batch script has SLURM_NTASKS too; only what srun starts is one process of a step
    started_by_srun = {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys()
    slurm = started_by_srun and int(environment.get("SLURM_NTASKS", "1")) > 1
    tpu_pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    job_set = bool(environment.get("JAX_COORDINATOR_ADDRESS"))
    return slurm or tpu_pod or job_set


def leave(error: BaseException) -> NoReturn:
    """Ends this process of several at once, after telling why: 2 for what a person must mend, else `REQUEUE`.

    An ordinary exit would wait for the others in a barrier that they never reach; they fail in their next collective, and
    leave as well. Nothing is saved: the last complete checkpoint is where the job goes on.
    """
    mendable = isinstance(error, UserError)
    text = str(error) if mendable else "".join(traceback.format_exception(error))
    print(f"process {jax.process_index()} of {jax.process_count()}: {text.rstrip()}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2 if mendable else REQUEUE)


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
