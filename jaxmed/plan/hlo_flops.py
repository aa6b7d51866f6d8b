"""FLOPs of a compiled module: its products and convolutions, times their loops' lengths. The compiler's own figure counts the
body of a loop once, and a GPU's counts nothing. Kernels (splash, cuDNN) are not in it.

A TPU writes products as convolutions whose batch is a spatial dimension, with padding that most taps of the window fall into;
only taps on real elements count.
"""

import math
import re
from functools import cache

from jaxmed.plan.hlo import Instruction, Module, runs


def flops(module: Module) -> float:
    """Of one device in one run of the module."""
    total = 0.0
    for name, times in runs(module).items():
        body = module.computations.get(name, [])
        results = {i.name: i.result for i in body}
        total += times * sum(_product(i, results) for i in body if i.opcode in ("dot", "convolution"))
    return total


def _product(instruction: Instruction, results: dict[str, str]) -> float:
    left, right = (_shape(results.get(name, "")) for name in instruction.operands[:2])
    out = _shape(instruction.result)
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in contracted[1].split(",") if d)
    lhs, rhs, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    spatial = sorted(letter for letter in lhs if letter.isdigit())
    taps = 1
    for n, letter in enumerate(spatial):
        given = _window(window[1] if window else "", n)
        taps *= _taps(left[lhs.index(letter)], out[result.index(letter)], right[rhs.index(letter)], *given)
    rows = math.prod(size for size, letter in zip(out, result, strict=True) if not letter.isdigit())
    return 2.0 * rows * taps * right[rhs.index("i")]


def _shape(text: str) -> tuple[int, ...]:
    found = re.search(r"\[([\d,]*)\]", text)
    return tuple(int(n) for n in found[1].split(",") if n) if found else ()


def _window(text: str, n: int) -> tuple[int, int, int, int]:
    """(stride, padding before, dilation of the input, dilation of the window) of the n-th spatial dimension"""
    fields = dict(part.split("=") for part in text.split())

    def field(name: str, default: str) -> str:
        return fields[name].split("x")[n] if name in fields else default

    before = int(field("pad", "0_0").split("_")[0])
    return int(field("stride", "1")), before, int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))


@cache
def _taps(size: int, out: int, kernel: int, stride: int, before: int, dilated: int, spread: int) -> int:
    """Pairs of output position and window tap that meet a real element of the input."""
    reach = (size - 1) * dilated + 1
    places = (o * stride + t * spread - before for o in range(out) for t in range(kernel))
    return sum(0 <= place < reach and place % dilated == 0 for place in places)
