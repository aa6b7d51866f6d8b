"""How long a step takes at best, what holds it up, and what it is expected to take; from counts, never from a clock.

    compute    FLOPs of one device / the chip's peak
    HBM        bytes that products and kernels read and write / the memory's bandwidth
    ICI        bytes sent over each mesh axis / what the links along it carry (NVLink within a node counts here)
    DCN        the same for mesh axes that leave the slice or the node

The roofline is the largest of the four, as if all else were hidden behind it. What is expected gives each its usual share of
the sheet's figure.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxmed.plan.topology import Topology

MEMORY_SHARE = LINK_SHARE = 0.85
"""Of the sheet's bandwidth that streaming reads and large collectives reach"""


@dataclass(frozen=True)
class Roofline:
    seconds: dict[str, float]
    """compute, HBM, ICI, DCN: of one step at the sheet's figures"""
    bound: str
    """The largest of them"""
    least: float
    """Seconds of one step at best"""
    expected: float
    """Seconds of one step with the usual shares"""


def roofline(
    topology: Topology, flops: float, traffic: float, sent: Mapping[tuple[str, ...], float], mesh: Mapping[str, int]
) -> Roofline:
    """flops, traffic and sent (bytes by mesh axes): of one device in one step."""
    chip = topology.chip
    seconds = {"compute": flops / chip.flops, "HBM": traffic / chip.hbm_bandwidth, "ICI": 0.0, "DCN": 0.0}
    for axes, amount in sent.items():
        network, bandwidth = link(topology, mesh, axes)
        seconds[network] += amount / bandwidth
    bound = max(seconds, key=lambda name: seconds[name])
    shares = {"compute": chip.matmul, "HBM": MEMORY_SHARE, "ICI": LINK_SHARE, "DCN": LINK_SHARE}
    return Roofline(seconds, bound, seconds[bound], max(s / shares[name] for name, s in seconds.items()))


def link(topology: Topology, mesh: Mapping[str, int], axes: tuple[str, ...]) -> tuple[str, float]:
    """(ICI or DCN, bytes a second that one device sends along these mesh axes).

    On a torus a mesh axis is taken to run along one side: both directions of a ring, one of a line that does not close.
    """
    chip, names = topology.chip, list(mesh)
    span = 1  # devices between the first and the last of a group, counted along the mesh, last axis fastest
    for axis in axes:
        inner = math.prod(mesh[n] for n in names[names.index(axis) + 1 :])
        span += inner * (mesh[axis] - 1)
    if span > topology.domain:
        return "DCN", chip.dcn
    if not chip.dimensions:
        return "ICI", chip.link
    closes = chip.wraps and any(side % chip.wraps == 0 for side in topology.sides)
    return "ICI", chip.link * (2 if closes else 1)
