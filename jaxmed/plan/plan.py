"""A plan as plain data: what `jaxmed plan` prints, saves as plan.json and draws."""

import math
from collections import Counter
from typing import Any

from jaxmed.config import Experiment, to_dict
from jaxmed.plan import sent, verdict
from jaxmed.plan.analysis import Analysis, analyse, by_axis
from jaxmed.plan.collectives import from_rows
from jaxmed.plan.lowering import Compiled, compile_step
from jaxmed.plan.roofline import dcn_share
from jaxmed.plan.sent import Collective
from jaxmed.plan.topology import Topology
from jaxmed.sharding import AXES, mesh_notices


def make_plan(
    experiment: Experiment,
    topology: Topology,
    step: str,
    length: int,
    samples: int,
    price: float,
    compiles: bool,
    timeout: float,
) -> dict[str, Any]:
    """`samples`: records of the data set, where the config counts epochs (0: unknown); `price`: a chip's hour (0: unknown)."""
    found = analyse(experiment, topology, step, length)
    compiled = compile_step(experiment, topology, step, length, timeout) if compiles else None
    used = compiled.used if compiled else found.memory.total
    fits = used <= topology.chip.hbm and (compiled is None or compiled.fits)
    help_ = None if fits else verdict.best_help(experiment, topology, step, length)
    small = verdict.smallest(experiment, topology, step, length)
    largest = next((what for _, label, what in found.memory.largest if label == found.memory.worst), "")
    return {
        "verdict": verdict.sentence(used, topology, found.memory.worst, largest, help_, small),
        "fits": fits,
        "topology": {"name": topology.name, "chip": topology.chip.kind, "chips": topology.chips, "devices": topology.count},
        "step": step,
        "unit": unit(experiment),
        "length": length,
        "mesh": dict(zip(AXES, _mesh(experiment), strict=True)),
        "memory": memory_part(found, compiled, topology),
        "flops": flops_part(found, compiled, topology),
        "sent": sent_part(experiment, topology, found, compiled),
        "time": time_part(experiment, topology, step, found, samples, price),
        "warnings": warnings(experiment, topology, found, compiled),
        "config": to_dict(experiment),
    }


def unit(experiment: Experiment) -> str:
    """What a step's speed counts."""
    return "pairs" if experiment.task == "contrastive" else "tokens"


def _mesh(experiment: Experiment) -> tuple[int, int, int, int]:
    mesh = experiment.mesh
    return mesh.data, mesh.fsdp, mesh.context, mesh.tensor


def memory_part(found: Analysis, compiled: Compiled | None, topology: Topology) -> dict[str, Any]:
    part: dict[str, Any] = {
        "capacity": topology.chip.hbm,
        "classes": found.memory.classes,
        "total": found.memory.total,
        "host": found.memory.host,
        "largest": [{"bytes": b, "class": c, "what": w} for b, c, w in found.memory.largest[:20]],
    }
    if compiled:
        part["compiler"] = {"total": compiled.used, "fits": compiled.fits, "seconds": compiled.seconds, **compiled.memory}
        part["model_over_compiler"] = found.memory.total / compiled.used
    return part


def flops_part(found: Analysis, compiled: Compiled | None, topology: Topology) -> dict[str, Any]:
    part = {
        "step": found.flops,
        "model": found.model_flops,
        "ratio": found.flops / found.model_flops,
        "over_policy": found.flops / found.policy_flops if found.policy_flops else 0.0,
        "device": found.flops / topology.count,
        "kernels_by_formula": found.kernels,
    }
    if not compiled:
        return part
    read = {"compiled_over_traced": compiled.products * topology.count / found.products} if compiled.products else {}
    return part | {"compiler_loops_once": compiled.flops} | read


def sent_part(experiment: Experiment, topology: Topology, found: Analysis, compiled: Compiled | None) -> dict[str, Any]:
    rows, why = found.sent, compiled.text if compiled else "nothing was compiled"
    if compiled and not why:
        rows, why = _checked(from_rows(compiled.collectives), found)
    read = rows is not found.sent
    mesh = dict(zip(AXES, _mesh(experiment), strict=True))
    return {
        "from": "the compiled module" if read else "the traced program",
        "why": why,
        "axes": by_axis(rows),
        "stated": by_axis(found.sent),
        "least": found.least,
        "dcn": sum(c.total * _far(c, topology, mesh, read) for c in rows),
        "weights": sum(c.total for c in rows if "fsdp" in c.axes and c.kind in ("all-gather", "permute", "all-to-all")),
        "frozen_twice": found.frozen_twice,
        "rows": [
            {"kind": c.kind, "axes": list(c.axes), "bytes": c.bytes, "source": c.source, "array": f"{c.dtype}{list(c.shape)}"}
            for c in sent.merged(rows)
        ],
    }


def _far(c: Collective, topology: Topology, mesh: dict[str, int], compiled: bool) -> float:
    """The share of a collective's bytes that leaves its slice or node; a compiled TPU module has those apart."""
    if compiled and topology.chip.platform == "tpu":
        return float(c.far)
    return dcn_share(topology, mesh, c.axes)


def _checked(rows: list[Collective], found: Analysis) -> tuple[list[Collective], str]:
    """The compiled module's rows, unless they lack bytes of weights that must be sent: then there are forms of collectives in
    it that are not read (a compiler may hide them in kernels), and the traced program's rows with what was seen."""
    over_fsdp = sum(c.total for c in rows if "fsdp" in c.axes)
    wanted = sum(c.total for c in found.sent if c.weight)
    if over_fsdp >= 0.8 * wanted:
        return rows, ""
    seen = f"{verdict.gigabytes(over_fsdp)} of the {verdict.gigabytes(wanted)} of weights"
    return found.sent, f"the compiled module shows {seen}: it sends the others in a form that is not read here"


def time_part(
    experiment: Experiment, topology: Topology, step: str, found: Analysis, samples: int, price: float
) -> dict[str, Any]:
    line = found.roofline
    part: dict[str, Any] = {
        "seconds": line.seconds,
        "bound": line.bound,
        "least": line.least,
        "expected": line.expected,
        "mfu": found.mfu(topology),
        f"{unit(experiment)}_per_second": found.units / line.expected,
        f"{unit(experiment)}_per_second_chip": found.units / line.expected / topology.chips,
    }
    train, data = experiment.train, experiment.data
    steps = train.steps or math.ceil(train.epochs * samples / data.batch)
    if step == "train" and steps:
        hours = steps * line.expected / 3600
        part |= {"steps": steps, "hours": hours, "chip_hours": hours * topology.chips}
        if price:
            part |= {"price": price, "money": hours * topology.chips * price}
    return part


def warnings(experiment: Experiment, topology: Topology, found: Analysis, compiled: Compiled | None) -> list[str]:
    notes = list(compiled.notes) if compiled else []
    notes += mesh_notices(experiment, dict(zip(AXES, _mesh(experiment), strict=True)))
    if not found.counted_loops:
        notes.append("the program has a loop whose length is not known; it is counted once")
    if topology.slices > experiment.mesh.data:
        notes.append(
            f"mesh.data {experiment.mesh.data} is smaller than the {topology.slices} slices: fsdp spans slices, and gathers "
            "weights over the data-centre network"
        )
    whole = found.memory.total
    repeated = Counter(what for _, label, what in found.memory.largest if label in ("working set", "activations"))
    sizes = {what: b for b, _, what in found.memory.largest}
    for what, times in repeated.items():
        if sizes[what] > 0.2 * whole and times > 1:
            notes.append(f"{times} arrays {what} of {verdict.gigabytes(sizes[what])} each live at once")
    return notes
