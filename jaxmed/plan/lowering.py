"""Compiling a step for devices that are not there, in a child process: `compile_step(...)` -> `Compiled`.

A child, because what decides about devices (XLA_FLAGS, JAX_PLATFORMS, libtpu's settings) must stand in the environment before
JAX is imported, and because a compiler that dies must not take the plan with it. The child is this module:

    python -m jaxmed.plan.lowering REQUEST.json ANSWER.json
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxmed.config import Experiment, from_dict, to_dict
from jaxmed.errors import UserError
from jaxmed.plan.topology import Topology, check_compiler, devices_of, environment, parse_topology


@dataclass(frozen=True)
class Compiled:
    """What a compiler said of a step."""

    seconds: float
    """Of lowering and compiling"""
    memory: dict[str, int] = field(default_factory=dict)
    """argument, output, temp, alias: bytes of one device; empty where the program did not fit"""
    used: int = 0
    """Bytes of one device: the account above, or what the compiler says that it would take"""
    fits: bool = True
    """False: the compiler refused for lack of memory"""
    flops: float = 0.0
    """The compiler's own count: loop bodies once"""
    products: float = 0.0
    """FLOPs of the module's products and convolutions on one device, times trip counts (see jaxmed.plan.hlo_flops)"""
    collectives: list[dict[str, Any]] = field(default_factory=list)
    """Of the compiled module, times trip counts (see jaxmed.plan.collectives)"""
    text: str = ""
    """"": the module could be read; else why not"""
    notes: list[str] = field(default_factory=list)
    """What the compiler complained about"""


def compile_step(experiment: Experiment, topology: Topology, step: str, length: int, timeout: float = 3600.0) -> Compiled:
    """UserError where nothing here can compile for the topology, or where the compiler fails for another reason than memory."""
    check_compiler(topology)
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        wanted = {"experiment": to_dict(experiment), "topology": topology.name, "step": step, "length": length}
        request.write_text(json.dumps(wanted), encoding="utf-8")
        command = [sys.executable, "-m", "jaxmed.plan.lowering", str(request), str(answer)]
        try:
            done = subprocess.run(
                command,
                env=os.environ | environment(topology),
                capture_output=True,
                text=True,
                timeout=timeout,
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"compiling for {topology.name} took over {timeout:.0f} s; give up, or raise --timeout") from None
        if not answer.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            said = next(
                (line for line in reversed(lines) if re.match(r"\S*(Error|Exception)\b", line)), lines[-1] if lines else ""
            )
            raise UserError(f"compiling for {topology.name} failed (exit code {done.returncode}): {said[:500]}")
        found = json.loads(answer.read_text(encoding="utf-8"))
        if "error" in found:
            raise UserError(found["error"])
        found["notes"] = sorted({*found["notes"], *compiler_notes(done.stderr)})
        return Compiled(**found)


def compiler_notes(stderr: str) -> list[str]:
    """Complaints of XLA that cost time or memory, one line each."""
    notes = []
    for line in stderr.splitlines():
        if "Involuntary full rematerialization" in line:
            op = re.search(r"HLO operation:? %?([\w.\-]+)", line)
            name = re.search(r'op_name="([^"]*)"', line)
            where = re.search(r'source_file="([^"]*)" source_line=(\d+)', line)
            place = f" at {where[1]}:{where[2]}" if where else f" in {name[1]}" if name else ""
            notes.append(
                f"involuntary full rematerialisation of {op[1] if op else 'an array'}{place}: it is gathered whole, then cut"
            )
    return notes


def _child(request: Path) -> dict[str, Any]:
    import jax

    from jaxmed.plan import collectives, hlo, hlo_flops, programs
    from jaxmed.sharding import make_mesh

    wanted = json.loads(request.read_text(encoding="utf-8"))
    experiment, topology = from_dict(Experiment, wanted["experiment"]), parse_topology(wanted["topology"])
    mesh = make_mesh(experiment.mesh, devices_of(topology))
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as dump:
        program = programs.trace(experiment, mesh, wanted["step"], wanted["length"], topology.chip.platform)
        options = dump_options(dump) if topology.chip.platform == "tpu" else None
        began = time.perf_counter()
        lowered = program.traced.lower()
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            used = out_of_memory(str(error))
            if not used:
                raise
            return {"seconds": time.perf_counter() - began, "used": used, "fits": False, "text": "it does not fit", "notes": []}
        seconds = time.perf_counter() - began
        text = dumped(dump) if options else compiled.as_text()
    stats = compiled.memory_analysis()
    memory = {name: getattr(stats, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")}
    cost = compiled.cost_analysis() or {}
    answer = {"seconds": seconds, "memory": memory, "flops": float(cost.get("flops", 0.0)), "notes": []}
    answer["used"] = memory["argument"] + memory["output"] - memory["alias"] + memory["temp"]
    if not text:
        return answer | {"text": "the compiler left no text of it"}
    module = hlo.parse(text)
    answer["products"] = hlo_flops.flops(module)
    return answer | {"collectives": collectives.as_rows(module, dict(mesh.shape)), "notes": collectives.notes(module)}


def dump_options(folder: str) -> dict[str, Any]:
    """Compiler options that leave a module's text in a folder. libtpu's `as_text()` fails for programs that have work of the
    SparseCore in them (v5p, v6e: "async-update instruction"): it sends the module through a proto. What it dumps is whole."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def dumped(folder: str) -> str:
    """The optimised module among the files of a dump; "" where there is none."""
    found = list(Path(folder).glob("*.after_optimizations.txt"))
    largest = max(found, key=lambda path: path.stat().st_size, default=None)
    return largest.read_text(encoding="utf-8", errors="replace") if largest else ""


def out_of_memory(message: str) -> int:
    """Bytes that a program would take, where an error says that the device has fewer; else 0."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    if found:
        return round(float(found[1]) * units[found[2]])
    found = re.search(r"RESOURCE_EXHAUSTED.*?([\d.]+) ?([KMGT]?)i?B", message, re.DOTALL)
    return round(float(found[1]) * units[found[2]]) if found else 0


def main(request: str, answer: str) -> None:
    try:
        found = _child(Path(request))
    except UserError as error:
        found = {"error": str(error)}
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
