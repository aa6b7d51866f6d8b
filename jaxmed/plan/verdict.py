"""Does it fit, what breaks it, which flag helps most, and what is the smallest slice that does. Nothing is compiled here."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from jaxmed.config import Experiment, replace_field
from jaxmed.errors import UserError
from jaxmed.plan.analysis import analyse
from jaxmed.plan.meshes import Shape, flags, legal_meshes, with_mesh
from jaxmed.plan.topology import Topology, siblings

COMFORT = 0.85
"""Share of a chip's memory up to which a plan is comfortable: what no plan sees is fragmentation and the runtime's own"""


@dataclass(frozen=True)
class Help:
    flags: str
    bytes: int
    """Of one device, with them"""


def changes(experiment: Experiment, topology: Topology, step: str) -> Iterator[tuple[str, Experiment]]:
    """One change each that a person could make with a flag and that leaves the mathematics as it is."""
    data, remat = experiment.data, experiment.train.remat
    if step == "train":
        for policy in ("full", "attention"):
            if remat not in (policy, "full"):
                yield f"--train.remat {policy}", replace_field(experiment, "train.remat", policy)
        # of pairs any number of pieces but one costs the same FLOPs
        for pieces in [data.microbatches * n for n in ((2, 8, 32) if experiment.task == "contrastive" else (2,))]:
            if data.batch % pieces == 0:
                yield f"--data.microbatches {pieces}", replace_field(experiment, "data.microbatches", pieces)
    elif data.batch > 1:
        yield f"--data.batch {data.batch // 2}", replace_field(experiment, "data.batch", data.batch // 2)
    for shape in likely_meshes(experiment, topology, step):
        if shape != dataclasses.astuple(experiment.mesh):
            yield flags(shape), with_mesh(experiment, shape)


def likely_meshes(experiment: Experiment, topology: Topology, step: str) -> list[Shape]:
    """The legal meshes that split most of the weights and rows, and then most of the sequence, or of heads and vocabulary."""
    legal = legal_meshes(experiment, topology)
    keys = [lambda m: (m[1] * m[3], m[1]), lambda m: (m[1], m[3])]
    if step == "train":
        keys.insert(0, lambda m: (m[1], m[2]))
    return list(dict.fromkeys(max(legal, key=key) for key in keys)) if legal else []


def best_help(experiment: Experiment, topology: Topology, step: str, length: int) -> Help | None:
    """The flag that leaves the least memory."""
    found = []
    for text, changed in changes(experiment, topology, step):
        try:
            found.append(Help(text, analyse(changed, topology, step, length).memory.total))
        except UserError:
            continue
    return min(found, key=lambda h: h.bytes, default=None)


def smallest(experiment: Experiment, topology: Topology, step: str, length: int) -> tuple[Topology, Shape, int] | None:
    """The smallest usual size of the family that fits comfortably, with a mesh and its bytes a device."""
    for other in siblings(topology):
        for shape in likely_meshes(experiment, other, step):
            try:
                total = analyse(with_mesh(experiment, shape), other, step, length).memory.total
            except UserError:
                continue
            if total <= COMFORT * other.chip.hbm:
                return other, shape, total
    return None


def gigabytes(amount: float) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 1e8 else f"{amount / 1e6:.0f} MB"


def sentence(used: float, topology: Topology, worst: str, largest: str, help_: Help | None, small: tuple | None) -> str:
    """The first line of a plan."""
    room, chip = topology.chip.hbm, topology.chip.kind
    smallest_text = ""
    if small:
        other, shape, total = small
        smallest_text = (
            f"smallest {topology.chip.family} slice that fits: {other.name} ({gigabytes(total)} a device, {flags(shape)})"
        )
    if used <= room:
        tight = "" if used <= COMFORT * room else f", but tightly (over {COMFORT:.0%})"
        text = f"fits{tight}: {gigabytes(used)} of {gigabytes(room)} a device ({used / room:.0%} of a {chip})"
        return f"{text}; {smallest_text}" if smallest_text else text
    amount = f"{gigabytes(used)} of {gigabytes(room)}"
    text = f"does not fit by {gigabytes(used - room)} a device: {amount}; most is {worst} ({largest})"
    if help_ and help_.bytes < used:
        text += f"; {help_.flags} helps most ({gigabytes(help_.bytes)})"
    return text + (f"; {smallest_text}" if smallest_text else f"; no usual {topology.chip.family} slice fits")
