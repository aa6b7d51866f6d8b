"""Names of slices and clusters, and their devices without having them.

v5p:2x2x4   v5e:4x8   v6e:4x4      TPU slices, as libtpu names them
4xv5p:2x2x4                        four of them, joined by the data-centre network
h100:2x8    h200:1x8               nodes x GPUs of a node
cpu:8                              fake devices of this host (XLA_FLAGS must say so before JAX starts)
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from jaxmed.errors import UserError
from jaxmed.plan.chips import CHIPS, Chip

EXAMPLES = {
    "v4": "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8",
    "v5p": "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8",
    "v5e": "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    "v6e": "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    "tpu7x": "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4",
    "h100": "1x1, 1x2, 1x4, 1x8, 2x8, 4x8, 8x8",
    "h200": "1x1, 1x2, 1x4, 1x8, 2x8, 4x8, 8x8",
    "cpu": "1, 2, 4, 8, 16",
}
"""Usual sizes of each family, ascending: what an error lists, and where the smallest slice that fits is looked for"""


@dataclass(frozen=True)
class Topology:
    name: str
    chip: Chip
    sides: tuple[int, ...]
    """Sides of a TPU's torus; nodes and GPUs a node; fake devices"""
    slices: int = 1
    """TPU slices of these sides"""

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.sides)

    @property
    def count(self) -> int:
        """JAX devices."""
        return self.chips * self.chip.devices

    @property
    def domain(self) -> int:
        """Devices that fast links join; beyond it is the data-centre network."""
        return self.sides[1] if self.chip.platform == "cuda" else self.count // self.slices


def known() -> str:
    return "; ".join(f"{family}: {sizes}" for family, sizes in EXAMPLES.items())


def parse_topology(name: str) -> Topology:
    """UserError with the list where the name is none."""
    several, whole = re.fullmatch(r"(?:(\d+)x)?(.*)", name.strip().lower()).groups()
    family, _, size = whole.partition(":")
    if family not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", size):
        raise UserError(
            f"unknown topology {name!r}; give FAMILY:SIZE, or 2xFAMILY:SIZE for two TPU slices. Known are {known()}"
        )
    chip, sides = CHIPS[family], tuple(int(n) for n in size.split("x"))
    wanted = chip.dimensions if chip.platform == "tpu" else 2 if chip.platform == "cuda" else 1
    if len(sides) != wanted or min(sides) < 1:
        raise UserError(f"topology {name!r}: {family} sizes have {wanted} number(s), such as {EXAMPLES[family]}")
    if several is None:
        return Topology(f"{family}:{size}", chip, sides)
    if chip.platform != "tpu" or int(several) < 1:
        raise UserError(f"topology {name!r}: only TPUs have slices; sizes of {family} are such as {EXAMPLES[family]}")
    return Topology(f"{several}x{family}:{size}", chip, sides, int(several))


def siblings(topology: Topology) -> list[Topology]:
    """The usual sizes of the same family, ascending."""
    family = topology.chip.family
    return sorted((parse_topology(f"{family}:{s.strip()}") for s in EXAMPLES[family].split(",")), key=lambda t: t.count)


def environment(topology: Topology) -> dict[str, str]:
    """What a process that compiles for the topology must have in its environment before it imports JAX."""
    settings = {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "default"}
    if topology.chip.platform == "tpu":
        # the lock file guards the chips of a machine that has some; compiling touches none
        settings |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if topology.chip.platform == "cpu":
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        settings["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={topology.count}".strip()
    return settings


def check_compiler(topology: Topology) -> None:
    """UserError that says what to install where this machine cannot compile for the topology."""
    needed = {"tpu": {"libtpu": "libtpu"}, "cuda": {"jax_cuda12_plugin": "jax-cuda12-plugin", "jax_plugins": "jax-cuda12-pjrt"}}
    missing = [p for m, p in needed.get(topology.chip.platform, {}).items() if importlib.util.find_spec(m) is None]
    if missing:
        extra = "plan" if topology.chip.platform == "tpu" else "plan-gpu"
        size = " (Linux x86-64)" if extra == "plan" else " (about 1.3 GB, Linux x86-64)"
        raise UserError(f"compiling for {topology.name} needs {', '.join(missing)}: pip install 'jaxmed[{extra}]'{size}")


def devices_of(topology: Topology) -> list[Any]:
    """Descriptions of the devices; to be called in a process with `environment(topology)`."""
    import jax
    from jax.experimental import topologies

    platform = topology.chip.platform
    if platform == "cpu":
        return list(jax.devices())
    if platform == "tpu":
        megacore = {"chip_config_name": "megacore"} if topology.chip.family == "v4" else {}  # one device a chip, as it runs
        slice_name = f"{topology.chip.family}:{'x'.join(map(str, topology.sides))}"
        settings = megacore | ({"num_slices": topology.slices} if topology.slices > 1 else {})
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=slice_name, **settings).devices)
        except Exception as error:
            sizes = EXAMPLES[topology.chip.family]
            raise UserError(f"libtpu knows no topology {slice_name}; usual ones are {sizes} ({_first(error)})") from error
    nodes, gpus = topology.sides
    described = topologies.get_topology_desc(
        platform="cuda", target_config=_gpu_target(topology.chip.family), topology=f"1x{nodes}x{gpus}"
    )
    return list(described.devices)


def _first(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


_GPUS = {  # name, bytes of memory and bytes a second as the driver reports them
    "h100": ("NVIDIA H100 80GB HBM3", 84929347584, 3352320000000),
    "h200": ("NVIDIA H200", 150754820096, 4814000000000),
}
_HOPPER = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_core": 233472,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "l2_cache_size": 52428800,
    "clock_rate_ghz": 1.98,
    "shared_memory_per_block_optin": 232448,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
"""CUDA's device properties of compute capability 9.0"""


def _gpu_target(family: str) -> str:
    """XLA's GpuTargetConfigProto as text."""
    name, memory, bandwidth = _GPUS[family]
    fields = _HOPPER | {"device_memory_size": memory, "memory_bandwidth": bandwidth}
    body = " ".join(f"{k}: {v}" for k, v in fields.items())
    return (
        f"gpu_device_info {{ {body} cuda_compute_capability {{ major: 9 minor: 0 }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 } '
        f'device_description_str: "{name}"'
    )
