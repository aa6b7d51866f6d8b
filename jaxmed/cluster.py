"""This process's place in its job: from flags, from the variables of a launcher, or from a TPU VM's metadata server.

What is asked, in this order: the `--distributed` flags; JAX_COORDINATOR_ADDRESS with a count and an index (`launch/local.sh`,
JobSet and indexed jobs of Kubernetes); the variables that GKE gives TPU pods; those that srun gives its tasks; and the metadata
server, which is asked on a machine with TPU chips alone: elsewhere nothing here uses the network.
"""

import glob
import importlib.util
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from jaxmed.config import DistributedConfig
from jaxmed.errors import UserError

Environment = Mapping[str, str]

COUNTS = ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT", "NNODES")
INDICES = ("JAX_PROCESS_ID", "NODE_RANK")
TPU_PORT = 8482
METADATA_SECONDS = 5


@dataclass(frozen=True)
class Place:
    """Where a process stands in a job of several."""

    coordinator: str
    """HOST:PORT of process 0"""
    processes: int
    process: int
    source: str
    """What said so, for messages"""
    devices: tuple[int, ...] = ()
    """GPUs of this host that are this process's (none: all that it sees)"""


def find_place(config: DistributedConfig, environment: Environment) -> Place | None:
    """None where this process is alone. UserError for half a description or one that contradicts itself."""
    given = (bool(config.coordinator), config.processes > 0, config.process >= 0)
    place = _from_flags(config, given) if any(given) else _from_environment(environment)
    if place is None or place.processes <= 1:
        return None
    if not 0 <= place.process < place.processes:
        raise UserError(f"{place.source}: process {place.process} must be below the number of processes, {place.processes}")
    if not re.fullmatch(r".+:\d+", place.coordinator):
        raise UserError(f"{place.source}: the coordinator is {place.coordinator!r}; give HOST:PORT")
    return place


def _from_flags(config: DistributedConfig, given: tuple[bool, ...]) -> Place:
    if not all(given):
        raise UserError(
            "--distributed.coordinator HOST:PORT, --distributed.processes N and --distributed.process I go together; "
            "give all three, or none where SLURM, a TPU pod or GKE sets them"
        )
    return Place(config.coordinator, config.processes, config.process, "--distributed")


def _from_environment(environment: Environment) -> Place | None:
    place = _from_variables(environment) or _from_tpu_variables(environment) or _from_slurm(environment)
    if place is None and environment.get("JAX_COORDINATOR_ADDRESS"):
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS is set and nothing says how many processes there are: set {COUNTS[0]} and {INDICES[0]} "
            "(in an indexed job JOB_COMPLETION_INDEX does), or unset it"
        )
    return place or _from_metadata(environment)


def _from_variables(environment: Environment) -> Place | None:
    """A coordinator, a count and an index; in a job set the index counts through the replicas of the job."""
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS")
    count = next((name for name in COUNTS if name in environment), None)
    if not coordinator or count is None:
        return None
    index = next((name for name in INDICES if name in environment), None)
    if index is not None:
        process = _number(environment, index)
    elif "JOB_COMPLETION_INDEX" in environment:
        index = "JOB_COMPLETION_INDEX"
        before = _number(environment, "JOB_INDEX", 0) * _number(environment, "PROCESSES_IN_JOB", 0)
        process = before + _number(environment, index)
    else:
        raise UserError(f"JAX_COORDINATOR_ADDRESS and {count} are set, {INDICES[0]} is not; set it to this process's index")
    if ":" not in coordinator:
        coordinator += f":{environment.get('JAX_COORDINATOR_PORT', '1234')}"
    return Place(coordinator, _number(environment, count), process, f"JAX_COORDINATOR_ADDRESS, {count}, {index}")


def _from_tpu_variables(environment: Environment) -> Place | None:
    """A slice's hosts in the order of their indices; of several slices, those of slice 0 come first."""
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if not names:
        return None
    hosts = [name.strip() for name in names.split(",")]
    return _in_slices(environment, environment, hosts, _number(environment, "TPU_WORKER_ID", 0), "TPU_WORKER_HOSTNAMES")


def _in_slices(environment: Environment, slices: Environment, hosts: list[str], worker: int, source: str) -> Place:
    """`slices` has MEGASCALE_*, where there are several."""
    process = worker + _number(slices, "MEGASCALE_SLICE_ID", 0) * len(hosts)
    address = environment.get("JAX_COORDINATOR_ADDRESS") or slices.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    port = environment.get("JAX_COORDINATOR_PORT", TPU_PORT)
    coordinator = f"{address.split(':')[0]}:{port}"
    return Place(coordinator, len(hosts) * _number(slices, "MEGASCALE_NUM_SLICES", 1), process, source)


def _from_slurm(environment: Environment) -> Place | None:
    """What srun starts is a task of a step. A batch script has SLURM_NTASKS too, and is no task."""
    if not {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys():
        return None
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    # a port of the job's own, so that two jobs on a node do not meet
    port = environment.get("JAX_COORDINATOR_PORT") or 61440 + _number(environment, "SLURM_JOB_ID", 0) % 4096
    address = environment.get("JAX_COORDINATOR_ADDRESS") or f"{first_host(environment['SLURM_STEP_NODELIST'])}:{port}"
    process = _number(environment, "SLURM_PROCID")
    return Place(address, _number(environment, count, 1), process, "SLURM", _slurm_devices(environment))


def _slurm_devices(environment: Environment) -> tuple[int, ...]:
    """The GPUs of a task that shares a node's with other tasks: an equal part, by its index on the node."""
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    tasks = _tasks_here(environment)
    if tasks <= 1 or len(visible) <= 1:  # alone on the node, or SLURM has given each task its own
        return ()
    if len(visible) % tasks:
        raise UserError(f"SLURM: {tasks} tasks on this node share {len(visible)} GPUs; choose --ntasks-per-node to divide them")
    each = len(visible) // tasks
    first = _number(environment, "SLURM_LOCALID") * each
    return tuple(range(first, first + each))


def _tasks_here(environment: Environment) -> int:
    """Tasks of the step on this node, from SLURM's `4(x2),3`."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(found[1])] * int(found[2] or 1)
    node = _number(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 1


def first_host(nodes: str) -> str:
    """`rack[1-2]n[007-015],other` -> `rack1n007`"""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _from_metadata(environment: Environment) -> Place | None:
    """A TPU VM knows its slice from the metadata server of its host."""
    if not has_tpu_chips(environment):
        return None
    try:
        worker = int(_metadata(environment, "agent-worker-number"))
        # either names, or NAME:ID:ADDRESS
        hosts = [end.split(":")[-1] for end in _metadata(environment, "worker-network-endpoints").split(",")]
        lines = (line.partition(":") for line in _metadata(environment, "tpu-env").splitlines())
        slices = {name.strip(): value.strip().strip("'") for name, _, value in lines}
    except (OSError, ValueError) as error:
        raise UserError(
            f"this machine has TPU chips, and its metadata server does not say which slice they belong to ({error}); give the "
            "--distributed flags, or set TPU_SKIP_MDS_QUERY=1 to use this host alone"
        ) from error
    return _in_slices(environment, slices, hosts, worker, "the TPU VM's metadata")


def has_tpu_chips(environment: Environment) -> bool:
    """Whether the metadata server may be asked. Importing JAX sets TPU_SKIP_MDS_QUERY where the PCI bus has no TPU."""
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    wanted = "TPU_SKIP_MDS_QUERY" not in environment and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return bool(chips) and wanted and importlib.util.find_spec("libtpu") is not None


def _metadata(environment: Environment, name: str) -> str:
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    # not through a proxy: the server is the host's own
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=METADATA_SECONDS) as answer:
        return answer.read(1 << 20).decode()


def _number(environment: Environment, name: str, absent: int | None = None) -> int:
    """A variable that is a number; `absent` where it is not set."""
    text = environment.get(name, "")
    if not text and absent is not None:
        return absent
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}, not a number; set it, or unset the other variables of the job")
    return int(text)
