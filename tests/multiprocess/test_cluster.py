"""Where a process stands in its job, from flags, variables and a metadata server of our own."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from jaxmed import cluster
from jaxmed.cluster import find_place, first_host
from jaxmed.config import DistributedConfig
from jaxmed.errors import UserError

SRUN = {
    "SLURM_STEP_NODELIST": "node[07-09],other",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_ID": "4099",
}
JOB_SET = {"JAX_COORDINATOR_ADDRESS": "job-0-0.job:1234", "JAX_NUM_PROCESSES": "6", "JOB_COMPLETION_INDEX": "1"}
GKE = {"TPU_WORKER_HOSTNAMES": "a.tpu,b.tpu", "TPU_WORKER_ID": "1"}

SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "s-0-0.s:9", "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}


def test_half_a_job_description_is_refused() -> None:
    with pytest.raises(UserError, match="go together"):
        find_place(DistributedConfig(coordinator="localhost:1234"), {})
    with pytest.raises(UserError, match="must be below"):
        find_place(DistributedConfig("localhost:1234", processes=2, process=2), {})
    with pytest.raises(UserError, match="HOST:PORT"):
        find_place(DistributedConfig("localhost", processes=2, process=1), {})
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        find_place(DistributedConfig(), {"JAX_COORDINATOR_ADDRESS": "job-0:1234"})
    with pytest.raises(UserError, match="JAX_PROCESS_ID is not"):
        find_place(DistributedConfig(), {"JAX_COORDINATOR_ADDRESS": "job-0:1234", "NNODES": "2"})
    with pytest.raises(UserError, match="JAX_PROCESS_ID is 'two', not a number"):
        find_place(DistributedConfig(), JOB_SET | {"JAX_PROCESS_ID": "two"})


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (SRUN | {"SLURM_NTASKS": "1"}, None),
        (SRUN | {"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, ("node07:61443", 4, 3)),
        (SRUN | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, ("node07:61443", 2, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script, before srun
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (GKE, ("a.tpu:8482", 2, 1)),
        (GKE | {"TPU_PROCESS_ADDRESSES": "c:8476,d:8476,e:8476"}, ("c:8482", 3, 1)),
        (GKE | SLICES, ("s-0-0.s:8482", 6, 5)),
        (GKE | {"JAX_COORDINATOR_ADDRESS": "x:9"}, ("x:8482", 2, 1)),
        (JOB_SET, ("job-0-0.job:1234", 6, 1)),
        (JOB_SET | {"JOB_INDEX": "2", "PROCESSES_IN_JOB": "2"}, ("job-0-0.job:1234", 6, 5)),
        ({"JAX_COORDINATOR_ADDRESS": "h", "JAX_COORDINATOR_PORT": "77", "NNODES": "2", "NODE_RANK": "1"}, ("h:77", 2, 1)),
        ({"JOB_COMPLETION_INDEX": "1"}, None),  # the pods of an indexed job may be runs of their own
    ],
    ids=str,
)
def test_the_environment_decides_where_the_flags_are_silent(environment: dict[str, str], place: tuple | None) -> None:
    found = find_place(DistributedConfig(), environment)
    assert (found and (found.coordinator, found.processes, found.process)) == place
    assert find_place(DistributedConfig("localhost:1", processes=1, process=0), environment) is None
    assert find_place(DistributedConfig("localhost:1", processes=3, process=2), environment).coordinator == "localhost:1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node001", "node001"), ("node001,b", "node001"), ("n[001,007-015],b", "n001"), ("rack[1-2]n[07-09]", "rack1n07")],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("tasks", "local", "visible", "devices"),
    [
        ("1(x2)", 0, "0,1,2,3", ()),  # one process for all GPUs of the node
        ("4(x2)", 3, "0,1,2,3", (3,)),
        ("2(x2)", 1, "0,1,2,3", (2, 3)),
        ("4(x2)", 3, "0", ()),  # SLURM shows each task its own
        ("4(x2)", 3, "", ()),
    ],
)
def test_tasks_of_a_node_share_its_gpus(tasks: str, local: int, visible: str, devices: tuple[int, ...]) -> None:
    variables = {"SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": str(local), "SLURM_NODEID": "1"}
    found = find_place(DistributedConfig(), SRUN | variables | {"CUDA_VISIBLE_DEVICES": visible})
    assert found.devices == devices


def test_gpus_that_do_not_divide_are_refused() -> None:
    variables = {"SLURM_NTASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "3", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    with pytest.raises(UserError, match="3 tasks on this node share 4 GPUs"):
        find_place(DistributedConfig(), SRUN | variables)


ATTRIBUTES = {
    "agent-worker-number": "1",
    "worker-network-endpoints": "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3",
    "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
}


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The variables that lead to a metadata server of a TPU VM, and what it was asked."""
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            asked.append(name)
            self.send_response(200 if self.headers["Metadata-Flavor"] == "Google" and name in ATTRIBUTES else 404)
            self.end_headers()
            self.wfile.write(ATTRIBUTES.get(name, "").encode())

        def log_message(self, *args: object) -> None: ...

    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name == "libtpu")
    with http.server.ThreadingHTTPServer(("localhost", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield {"GCE_METADATA_IP": f"localhost:{server.server_port}"}, asked
        server.shutdown()


def test_a_tpu_vm_asks_its_metadata_server(metadata: tuple[dict[str, str], list[str]]) -> None:
    found = find_place(DistributedConfig(), metadata[0])
    assert (found.coordinator, found.processes, found.process) == ("10.0.0.2:8482", 4, 3)


@pytest.mark.parametrize("variables", [{"TPU_SKIP_MDS_QUERY": "1"}, {"JAX_PLATFORMS": "cpu"}, GKE, JOB_SET], ids=str)
def test_nobody_else_is_asked(metadata: tuple[dict[str, str], list[str]], variables: dict[str, str]) -> None:
    find_place(DistributedConfig(), metadata[0] | variables)
    assert not metadata[1]


def test_machines_without_chips_ask_nobody(metadata: tuple[dict[str, str], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: [])
    assert find_place(DistributedConfig(), metadata[0]) is None
    assert not metadata[1]


def test_a_silent_metadata_server_is_named(metadata: tuple[dict[str, str], list[str]]) -> None:
    with pytest.raises(UserError, match=r"TPU chips.*TPU_SKIP_MDS_QUERY=1"):
        find_place(DistributedConfig(), {"GCE_METADATA_IP": "localhost:1"})
