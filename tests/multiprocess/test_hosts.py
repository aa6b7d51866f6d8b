"""What processes compare before they train: pure parts, and two real processes that differ."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmed.distributed import in_one
from jaxmed.train.hosts import check_hosts, differing_configs, fields_of, unequal_devices

HOSTS = ["process 0 (on a)", "process 1 (on b)", "process 2 (on c)"]


@pytest.mark.parametrize(
    ("owners", "problem"),
    [
        ([0, 0, 1, 1, 2, 2], ""),
        ([0, 0, 1, 2, 2], "process 1 has 1, the other processes have 2 devices each"),
        ([0] * 4 + [1] * 3 + [2] * 4 + [3] * 2, "process 1 has 3, process 3 has 2, the other processes have 4"),
    ],
)
def test_unequal_devices_are_named(owners: list[int], problem: str) -> None:
    found = unequal_devices(owners)
    assert found.startswith(problem) and bool(found) == bool(problem)


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        (
            (1, 1, 2),
            "the config of process 2 (on c) is another one: train.seed is 2 on process 2 (on c) and 1 on process 0 (on a);",
        ),
        (
            (9, 1, 1),
            "the config of process 0 (on a) is another one: train.seed is 9 on process 0 (on a) and 1 on process 1 (on b);",
        ),
        ((1, 2, 3), "the config of process 1 (on b), process 2 (on c) is another one: train.seed is 2"),
    ],
)
def test_the_processes_and_the_field_that_differ_are_named(seeds: tuple[int, ...], words: str) -> None:
    configs = [{"train.seed": seed, "lora.rank": 8} for seed in seeds]
    assert differing_configs(configs, HOSTS).startswith(words)
    more = [{"a": 0}, {"a": 0, "b": 1, "c": 2}]
    assert "b is 1 on process 1 (on b) and None on process 0 (on a), and 1 more fields differ" in differing_configs(more, HOSTS)


def test_what_each_host_may_have_for_itself_is_not_compared() -> None:
    from jaxmed._configs import quickstart

    names = fields_of(quickstart.get_config()).keys()
    assert {"train.seed", "mesh.fsdp", "data.batch", "train.save_every", "JAX's version"} <= names
    assert not [name for name in names if name.startswith("distributed.")]


def test_a_problem_of_all_is_told_once() -> None:
    assert in_one(["no file"] * 3) == "no file"
    assert in_one(["", "no file", ""]) == "process 1: no file"


def test_a_process_alone_has_nobody_to_differ_from(tmp_path: Path) -> None:
    from jaxmed._configs import quickstart

    check_hosts(quickstart.get_config(), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


PROGRAM = """
import dataclasses, os, sys
import jax
from jaxmed._configs import quickstart
from jaxmed.config import DistributedConfig
from jaxmed.distributed import SharedError, initialise, leave, together
from jaxmed.errors import UserError
from jaxmed.train import hosts

process, address = int(sys.argv[1]), sys.argv[2]
told_at = os.path.abspath(f"told-{process}")
initialise(DistributedConfig(address, 2, process))
config = quickstart.get_config()
other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=10 + process))
hosts.FOLDER_SECONDS = 0.5

def told(call):
    # into a file: gloo writes its own lines to stdout, in the middle of others
    with open(told_at, "a") as file:
        try:
            call()
        except SharedError as error:
            print(error, file=file)
        else:
            print("nothing", file=file)

def one_sided():
    with together():
        if process == 1:
            raise UserError("no such file")

told(lambda: hosts.check_hosts(config, "shared"))
told(lambda: hosts.check_hosts(other, "shared"))
os.chdir(str(process))
told(lambda: hosts.check_hosts(config, "apart"))
told(lambda: hosts.check_hosts(config, "file/below"))
told(one_sided)
leave(SharedError("the end"))
"""


def test_two_processes_that_differ(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    (tmp_path / "0" / "file").write_text("")
    # a proxy that is not there: the processes must not ask it for each other
    proxy = {"http_proxy": "http://localhost:1", "no_proxy": ""}
    environment = os.environ | proxy | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), address],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2], said
    first, second = ((tmp_path / f"told-{i}").read_text().splitlines() for i in range(2))
    assert first == second and len(first) == 5
    equal, config, folder, unwritable, one = first
    assert equal == "nothing"
    assert "the config of process 1 (on " in config and "train.seed is 11 on" in config and "and 10 on" in config
    assert folder.startswith("--out apart: what process 0 (on ") and f"({tmp_path}/1/apart)" in folder
    assert unwritable.startswith("process 0: --out file/below: the folder cannot be made or written")
    assert one == "process 1: no such file"
    assert "all 2 processes: the end" in said[0][1] and "the end" not in said[1][1]
    assert list((tmp_path / "shared").iterdir()) == []  # no token is left
