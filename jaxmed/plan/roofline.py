"""How long a step takes at best, what holds it up, and what it is expected to take; from counts, never from a clock.

    compute    FLOPs of one device / the chip's peak
    HBM        bytes that products and kernels read and write / the memory's bandwidth
    ICI        bytes sent over each mesh axis / what the links along it carry (NVLink within a node counts here)
    DCN        the part of it that leaves the slice or the node
    host       what remat `offload` writes to the host's memory and fetches again / the link to it

The roofline is the largest of them, as if all else were hidden behind it. What is expected gives each its usual share of
the sheet's figure.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxmed.plan.topology import Topology

MEMORY_SHARE = LINK_SHARE = 0.85
"""Of the sheet's bandwidth that streaming reads and large collectives reach"""


@dataclass(frozen=True)
class Roofline:
    seconds: dict[str, float]
    """compute, HBM, ICI, DCN, host: of one step at the sheet's figures"""
    bound: str
    """The largest of them"""
    least: float
    """Seconds of one step at best"""
    expected: float
    """Seconds of one step with the usual shares"""


def roofline(
    topology: Topology,
    flops: float,
    traffic: float,
    host: float,
    sent: Mapping[tuple[str, ...], float],
    mesh: Mapping[str, int],
) -> Roofline:
    """flops, traffic (of its memory, and to and from the host's) and sent (bytes by mesh axes): of one device in one step."""
    chip = topology.chip
    seconds = {"compute": flops / chip.flops, "HBM": traffic / chip.hbm_bandwidth, "ICI": 0.0, "DCN": 0.0}
    if host:
        seconds["host"] = host / 2 / chip.host  # half of it goes each way
    for axes, amount in sent.items():
        far = dcn_share(topology, mesh, axes)
        seconds["ICI"] += amount * (1 - far) / link(topology)
        seconds["DCN"] += amount * far / chip.dcn
    bound = max(seconds, key=lambda name: seconds[name])
    shares = {"compute": chip.matmul, "HBM": MEMORY_SHARE, "ICI": LINK_SHARE, "DCN": LINK_SHARE, "host": LINK_SHARE}
    return Roofline(seconds, bound, seconds[bound], max(s / shares[name] for name, s in seconds.items()))


def dcn_share(topology: Topology, mesh: Mapping[str, int], axes: tuple[str, ...]) -> float:
    """The share of what one device sends along these mesh axes that leaves its slice or node.

    Of n devices in d slices, a collective that first works within each slice sends (d - 1) / (n - 1) of its bytes between them.
    """
    numbers = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    group = numbers[tuple(slice(None) if name in axes else 0 for name in mesh)].reshape(-1)
    domains = len(set((group // topology.domain).tolist()))
    return (domains - 1) / (len(group) - 1) if len(group) > 1 else 0.0


def link(topology: Topology) -> float:
    """Bytes a second that one device sends along a mesh axis within a slice or node. On a torus the axis is taken to run along
    one side: both directions of a ring, one of a line that does not close."""
    chip = topology.chip
    if not chip.dimensions:
        return chip.link
    closes = chip.wraps and any(side % chip.wraps == 0 for side in topology.sides)
    return chip.link * (2 if closes else 1)
