"""Collectives of a compiled module: kind, mesh axes, bytes, how often, and the source line.

Asynchronous halves count once, at their start; those hidden in async wrappers and fusions are found inside them. Mesh axes
follow from replica groups or permute pairs: device numbers become coordinates, the axes are those that vary in a group. What
goes between slices of TPUs is handed to the host (`send` to the megascale runtime), and counts as `far`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxmed.plan import hlo
from jaxmed.plan.sent import Collective, wire_bytes

KINDS = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "collective-permute": "permute",
    "ragged-all-to-all": "all-to-all",
    "collective-broadcast": "permute",
}
FAR = {"ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter", "ALL_TO_ALL": "all-to-all"}
"""Kinds of transfers between slices; others are between two of them"""


def groups_of(instruction: hlo.Instruction) -> list[tuple[int, ...]]:
    """Sets of devices that a collective joins; pairs for a permute."""
    rest = instruction.rest
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    if pairs:
        return [tuple(int(n) for n in p) for p in re.findall(r"\{?(\d+),(\d+)", pairs[1])]
    by_axis = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? ?\{([^}]*)\}", rest)
    if by_axis:
        return _mesh_groups(by_axis[1], by_axis[3], by_axis[2])
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if listed:
        return [tuple(int(n) for n in g.split(",")) for g in re.findall(r"\{([\d,]+)\}", listed[1])]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if iota:
        return [tuple(int(n) for n in row) for row in _numbers(iota[3]).reshape(int(iota[1]), int(iota[2]))]
    return []


def _numbers(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers 0..7 in that shape, transposed -> flat"""
    shape, _, order = text.strip("[)").partition("]")
    sizes = [int(n) for n in shape.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return (numbers.transpose([int(n) for n in order[2:].split(",")]) if order else numbers).reshape(-1)


def _mesh_groups(mesh: str, axes: str, devices: str | None) -> list[tuple[int, ...]]:
    """`'a'=1,'b'=4,'c'=2` and `'b','c':(1)2`: the axes that a group spans; `:(m)n` is the n-fold part after an m-fold one.
    `devices`: those of the mesh in its order, such as `[4,2]T(1,0)` or `3,1,0,2`; None: 0, 1, 2, ..."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = {name: (int(m or 1), int(n or sizes[name])) for name, m, n in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    shape, spanned = [], []
    for name, size in sizes.items():
        before, inside = parts.get(name, (size, 1))
        for part, inner in ((before, False), (inside, True), (size // before // inside, False)):
            shape.append(part)
            spanned.append(inner)
    numbers = np.arange(math.prod(shape))
    if devices:
        numbers = _numbers(devices) if devices.startswith("[") else np.array([int(n) for n in devices.split(",")])
    numbers = numbers.reshape(shape)
    order = [i for i, inner in enumerate(spanned) if not inner] + [i for i, inner in enumerate(spanned) if inner]
    count = math.prod(n for n, inner in zip(shape, spanned, strict=True) if inner)
    return [tuple(int(n) for n in row) for row in numbers.transpose(order).reshape(-1, count)]


def axes_of(groups: Iterable[tuple[int, ...]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ. Device numbers count along the mesh, last axis fastest."""
    varying: set[str] = set()
    names, shape = list(sizes), list(sizes.values())
    for group in groups:
        coordinates = np.array(np.unravel_index(np.array(group), shape))
        varying |= {name for name, row in zip(names, coordinates, strict=True) if len(set(row.tolist())) > 1}
    return tuple(n for n in names if n in varying)


def found(module: hlo.Module, sizes: Mapping[str, int]) -> list[Collective]:
    """Every collective of the module with the bytes that one device sends."""
    times = hlo.runs(module)
    everyone = [tuple(range(math.prod(sizes.values())))]
    result = []
    for name, body in module.computations.items():
        for instruction in body:
            if times.get(name) and "_xla_megascale_transfer_type" in instruction.rest and instruction.opcode == "send":
                result.append(_between_slices(module, instruction, times[name], sizes))
                continue
            kind = KINDS.get(instruction.opcode.removesuffix("-start"))
            if kind is None or not times.get(name) or _goes_on(body, instruction):
                continue
            groups = groups_of(instruction) or everyone
            axes, n = axes_of(groups, sizes), 2 if kind == "permute" else len(groups[0])
            for whole, array, source in _arrays(module, body, instruction, kind, n):
                if n > 1 and whole:
                    sent = whole if kind == "permute" else wire_bytes(kind, n, whole)
                    dtype, dims = _shape(array)
                    result.append(Collective(kind, axes, sent, times[name], source, dtype, dims))
    return result


def _between_slices(module: hlo.Module, send: hlo.Instruction, times: float, sizes: Mapping[str, int]) -> Collective:
    """What one device hands to the host for the devices in its place in the other slices."""
    kind = FAR.get(re.search(r'_xla_megascale_transfer_type="(\w+)"', send.rest)[1], "permute")
    members = re.search(r'_xla_megascale_target="\{([^}]*)\}', send.rest)
    n = sum(_members(part) for part in members[1].split(",")) if members else 2
    own = hlo.bytes_of(send.result)[0]
    whole = own * n if kind in ("all-gather", "reduce-scatter") else own
    axes = ("data",) if sizes["data"] % n == 0 else ("data", "fsdp") if sizes["data"] > 1 else ("fsdp",)
    dtype, shape = _shape(re.search(r"\b[a-z]\w*\[[\d,]*\]", send.result)[0])
    return Collective(kind, axes, wire_bytes(kind, n, whole), times, hlo.place(module, send), dtype, shape, far=True)


def _members(part: str) -> int:
    """`3` or `0:3` -> how many numbers that is"""
    first, _, last = part.partition(":")
    return int(last or first) - int(first) + 1


def _goes_on(body: list[hlo.Instruction], instruction: hlo.Instruction) -> bool:
    """Whether this is a later link of a TPU's fused asynchronous collective: a chain of fusions holds it once in each link (its
    start, the work that it hides behind, its end)."""
    starts = any("AsyncCollectiveStart" in other.rest for other in body)
    return "chain_id=" in instruction.rest and not starts


def _arrays(
    module: hlo.Module, body: list[hlo.Instruction], instruction: hlo.Instruction, kind: str, n: int
) -> Iterator[tuple[float, str, str]]:
    """Of each array that a collective carries (compilers combine several): bytes of the larger of operand and result on one
    device, the result's type, and the source line. `n`: devices in a group."""
    made = re.findall(r"\b[a-z]\w*\[[\d,]*\]", instruction.result)
    results = made
    if instruction.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, handles)
        count = len(instruction.operands)
        made, results = made[:count], made[count : 2 * count]
    for index, array in enumerate(results):
        whole = max(sum(hlo.bytes_of(text)) for text in (array, made[index]))
        if kind == "permute":
            whole = sum(hlo.bytes_of(made[index]))
        elif kind == "reduce-scatter" and results is made:
            whole *= n
        alone = len(results) == 1
        yield float(whole), array, hlo.place(module, instruction if alone else _maker(body, instruction, index) or instruction)


def _maker(body: list[hlo.Instruction], instruction: hlo.Instruction, index: int) -> hlo.Instruction | None:
    """What computed an operand of a combined collective, which itself names one source line at most."""
    by_name = {other.name: other for other in body}
    found = by_name.get(instruction.operands[index])
    while found is not None and found.opcode in _PASSED_ON and found.operands:
        place = re.search(r"index=(\d+)", found.rest) if found.opcode == "get-tuple-element" else None
        found = by_name.get(found.operands[0])
        if place and found is not None and found.opcode in KINDS and int(place[1]) < len(found.operands):
            found = by_name.get(found.operands[int(place[1])])
    return found


_PASSED_ON = ("get-tuple-element", "bitcast", "copy", "reshape", "transpose", "convert")


def _shape(array: str) -> tuple[str, tuple[int, ...]]:
    """`bf16[2,3]` -> its type and shape"""
    dtype, _, dims = array.rstrip("]").partition("[")
    return dtype, tuple(int(d) for d in dims.split(",") if d)


def as_rows(module: hlo.Module, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """As JSON."""
    keys = ("kind", "axes", "bytes", "times", "source", "dtype", "shape", "far")
    return [{k: getattr(c, k) for k in keys} for c in found(module, sizes)]


def from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Collective]:
    return [Collective(**{**r, "axes": tuple(r["axes"]), "shape": tuple(r["shape"])}) for r in rows]


def notes(module: hlo.Module, least: int = 1 << 26, most: int = 8) -> list[str]:
    """Copies of whole arrays that only change their layout, over 64 MB: those that move most, one line a shape and place."""
    times = hlo.runs(module)
    moved: Counter[tuple[str, str, float]] = Counter()
    for name, body in module.computations.items():
        for instruction in body:
            size = sum(hlo.bytes_of(instruction.result))
            if instruction.opcode == "copy" and size >= least and times.get(name):
                moved[instruction.result.split("{")[0], hlo.place(module, instruction), times[name]] += size * times[name]
    return [f"copy of {shape}, {n:.0f} times, at {place}" for (shape, place, n), _ in moved.most_common(most)]
