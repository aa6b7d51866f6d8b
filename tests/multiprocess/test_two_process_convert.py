"""Two processes convert one model together, each its slices; one process reads it back to the bit."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from jaxmed.api import resolve
from jaxmed.checkpoint.values import Values

BASE = str(Path(__file__).parent.parent / "golden" / "btb3d" / "base")
PROGRAM = "from jaxmed.cli.main import main; main()"
ENVIRONMENT = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


def test_two_processes_write_what_one_reads(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    out = tmp_path / "out"
    flags = ["--to", "orbax", "--out", str(out), "--mesh.fsdp", "2", "--distributed.coordinator", address]
    command = [sys.executable, "-c", PROGRAM, "convert", BASE, *flags, "--distributed.processes", "2", "--distributed.process"]
    processes = [
        subprocess.Popen([*command, str(i)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert [str(out) in lines[0].splitlines() for lines in said] == [True, False]  # one of them speaks
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (out / "checkpoints" / "0" / "trainable").glob("ocdbt.*")} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
    ours, theirs = (Values(resolve(folder, "", "float32", {})) for folder in (str(out), BASE))
    for path in theirs.shapes:
        for layer in range(theirs.shapes[path].shape[0] if theirs.is_stacked(path) else 1):
            np.testing.assert_array_equal(ours.read(path, layer), theirs.read(path, layer), err_msg=str(path))
