"""The manifests and commands of launch/: fields that Kubernetes asks for, flags that jaxmed knows, every shipped config."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from jaxmed.cli import common, generate, inspect, train
from jaxmed.errors import REQUEUE, UserError

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))


def parse(arguments: list[str]) -> None:
    """As the command does, short of running it."""
    command, *rest = arguments
    if command == "train":
        config, flags = common.split_config(rest, "train")
        default = train.Args(common.load_experiment(config), out=tyro.MISSING)
        common.parse(train.Args, flags, prog="jaxmed train", description="", default=default)
        assert any(flag.partition("=")[0] == "--out" for flag in flags)
    else:
        common.parse({"generate": generate, "inspect": inspect}[command].Args, rest, prog=command, description="")


def readme_commands() -> list[list[str]]:
    """Arguments of jaxmed in the blocks of the README, whichever script stands before them."""
    blocks = re.findall(r"```bash\n(.*?)```", (LAUNCH / "README.md").read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    starts = [next((i for i, word in enumerate(line) if word in ("train", "generate", "inspect")), None) for line in lines]
    return [line[start:] for line, start in zip(lines, starts, strict=True) if start is not None]


@pytest.mark.parametrize("arguments", readme_commands(), ids=lambda arguments: " ".join(arguments[:2]))
def test_commands_of_the_readme_are_understood(arguments: list[str]) -> None:
    parse(arguments)


def test_a_wrong_flag_would_be_seen() -> None:
    with pytest.raises(UserError, match="mesh"):
        parse(["train", "btb3d", "--mesh.fspd", "8", "--out", "x"])


def test_every_shipped_config_has_its_command() -> None:
    trained = {arguments[1] for arguments in readme_commands() if arguments[0] == "train"}
    assert trained == set(common.shipped_configs())


def test_every_file_of_the_folder_is_in_the_readme() -> None:
    readme = (LAUNCH / "README.md").read_text()
    assert [
        path.name for path in LAUNCH.iterdir() if path.name not in ("README.md", "lib.sh") and path.name not in readme
    ] == []


def job_of(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """-> the job set, its replicated job, the container."""
    job_set = yaml.safe_load(path.read_text())
    (replicated,) = job_set["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return job_set, replicated, container


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_job_set_has_what_kubernetes_asks_for(path: Path) -> None:
    job_set, replicated, container = job_of(path)
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(job_set["spec"]) == {"network", "failurePolicy", "replicatedJobs"}
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] > 1
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert container["image"] and len(container["resources"]["limits"]) == 1
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    name = f"{job_set['metadata']['name']}-{replicated['name']}-0-{job['completions']}-xxxxx"
    assert len(name) < 63 and re.fullmatch(r"[a-z0-9-]+", name)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_job_set_starts_again_what_can_go_on(path: Path) -> None:
    job_set, replicated, container = job_of(path)
    job, policy = replicated["template"]["spec"], job_set["spec"]["failurePolicy"]
    rules = {rule["action"]: rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"]}
    assert {rule["containerName"] for rule in rules.values()} == {container["name"]}
    assert {rule["operator"] for rule in rules.values()} == {"In"}
    assert rules["FailJob"]["values"] == [1, 2]
    assert rules["Count"]["values"] == [REQUEUE] and job["backoffLimit"] == 0
    # a pod that counts fails its job, and a failed job restarts the set, unless a person must mend something
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_job_sets_arguments_are_understood_and_its_mesh_fills_the_chips(path: Path) -> None:
    _, replicated, container = job_of(path)
    parse(container["args"])
    chips = int(next(iter(container["resources"]["limits"].values())))
    sizes = [int(a.partition("=")[2]) for a in container["args"] if a.startswith("--mesh.")]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] * job["parallelism"] * chips == sizes[0] * sizes[1] == 16
    selector = job["template"]["spec"]["nodeSelector"]
    topology = selector.get("cloud.google.com/gke-tpu-topology")
    if topology:
        a, b, c = map(int, topology.split("x"))
        assert a * b * c == 16
        return
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    # values of env are text; YAML would make a bare 2 a number, which Kubernetes refuses
    assert variables["JAX_NUM_PROCESSES"] == str(job["parallelism"])
    assert variables["JAX_COORDINATOR_ADDRESS"] == f"jaxmed-hosts-0-0.jaxmed:{container['ports'][0]['containerPort']}"


def test_the_image_is_built_from_what_is_here() -> None:
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    copied = [source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]]
    assert copied and all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["project"]["license-files"], "configs", "jaxmed", "pyproject.toml"}
    assert needed == set(copied)
    (choices,) = re.findall(r"(\w+(?: \| \w+)+)\) extra=\"\[\$PLATFORM\]\"", text)
    assert set(choices.split(" | ")) <= project["project"]["optional-dependencies"].keys()
    assert lines[-1] == 'ENTRYPOINT ["jaxmed"]'  # a shell in between would keep SIGTERM to itself
    assert lines[0].startswith("ARG") and lines[1].startswith("FROM")
