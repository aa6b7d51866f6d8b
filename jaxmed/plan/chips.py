"""What the makers' sheets say of a chip. Nothing here is measured.

Bandwidths are bytes a second. A TPU's links go to its neighbours on a torus; a GPU's NVLink goes through a switch and counts as
one link. `dcn` is what one device has for talking to other slices or nodes.

Sources: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x (HBM, peak, HBM bandwidth, interchip interconnect in Gbit/s over
all links, both ways; data-centre network a host); nvidia.com, data sheets of H100 SXM and H200 SXM (dense bfloat16, NVLink 900
GB/s both ways) and of DGX H100 / H200 (one 400 Gbit/s ConnectX-7 a GPU).
`host` is the link to the host's memory: PCIe 5 x16 of H100's and H200's sheets; TPUs by jax-ml.github.io/scaling-book/tpus.
`matmul` alone is no sheet's: it is what published training runs of 7B to 70B models leave for products (MaxText: 67 to 72% on
v5e and v5p, 46% on v6e, 50% on H100, all of it together).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Chip:
    family: str
    """As a topology's name starts"""
    kind: str
    """As a person calls it"""
    platform: Literal["tpu", "cuda", "cpu"]
    hbm: float
    """Bytes of memory of one device"""
    flops: float
    """Dense bfloat16 FLOP/s of one device"""
    hbm_bandwidth: float
    """Of one device"""
    link: float
    """One link of a device, one way"""
    dimensions: int
    """Of the torus (0: a switch)"""
    wraps: int
    """Sides of the torus that are a multiple of this are rings (0: none are)"""
    dcn: float
    """Of one device, one way"""
    on_chip: float
    """Bytes that inner loops can keep beside the compute units (a TPU's VMEM, a GPU's L2)"""
    host: float
    """Bytes a second between one device and its host's memory, one way"""
    devices: int = 1
    """JAX devices a chip; the figures above are a device's"""
    matmul: float = 0.75
    """Share of `flops` that large products are expected to reach"""


CHIPS = {
    chip.family: chip
    for chip in (
        # 32 GB, 275 TFLOP/s, 1,228 GB/s, 2,400 Gbit/s over six links; 200 Gbit/s a host of four chips
        Chip("v4", "TPU v4", "tpu", 32e9, 275e12, 1228e9, 2400e9 / 8 / 6, 3, 4, 200e9 / 8 / 4, 128e6, 16e9),
        # 95 GB, 459 TFLOP/s, 2,765 GB/s, 4,800 Gbit/s over six links; 200 Gbit/s a host of four chips
        Chip("v5p", "TPU v5p", "tpu", 95e9, 459e12, 2765e9, 4800e9 / 8 / 6, 3, 4, 200e9 / 8 / 4, 128e6, 16e9),
        # 16 GB, 197 TFLOP/s, 819 GB/s, 1,600 Gbit/s over four links
        Chip("v5e", "TPU v5e", "tpu", 16e9, 197e12, 819e9, 1600e9 / 8 / 4, 2, 16, 100e9 / 8 / 4, 128e6, 16e9),
        # 32 GB, 918 TFLOP/s, 1,640 GB/s, 3,584 Gbit/s over four links; half of the peak is what published runs reach
        Chip("v6e", "TPU v6e", "tpu", 32e9, 918e12, 1640e9, 3584e9 / 8 / 4, 2, 16, 200e9 / 8 / 4, 128e6, 16e9, matmul=0.6),
        # a chip has 192 GB, 2,307 TFLOP/s, 7,380 GB/s, 9,600 Gbit/s over six links, and is two devices
        Chip("tpu7x", "TPU7x", "tpu", 96e9, 1153.5e12, 3690e9, 9600e9 / 8 / 6 / 2, 3, 4, 100e9 / 8 / 2, 64e6, 16e9, devices=2),
        # 80 GB, 989 TFLOP/s, 3,350 GB/s, NVLink 450 GB/s each way, 400 Gbit/s a GPU
        Chip("h100", "NVIDIA H100 SXM", "cuda", 80e9, 989e12, 3350e9, 450e9, 0, 0, 50e9, 50e6, 64e9, matmul=0.7),
        # 141 GB, otherwise as H100 with 4,800 GB/s
        Chip("h200", "NVIDIA H200 SXM", "cuda", 141e9, 989e12, 4800e9, 450e9, 0, 0, 50e9, 50e6, 64e9, matmul=0.7),
        # fake devices of a host: for trying the command out; the figures are a small server core's
        Chip("cpu", "CPU", "cpu", 4e9, 1e11, 2e10, 1e10, 0, 0, 1e9, 1e6, 1e10),
    )
}
