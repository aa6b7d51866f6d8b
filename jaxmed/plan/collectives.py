"""Collectives of a compiled module, read from its text: kind, mesh axes, bytes, how often, and the source line.

A loop's trip count is the backend's `known_trip_count` where it says one, else the bound in its condition (TPU modules do
not say). Asynchronous halves count once, at their start; those hidden in async wrappers and fusions are found inside them. Mesh
axes follow from replica groups or permute pairs: device numbers become coordinates, the axes are those that vary in a group.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
_ITEM = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_OPENING = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")


@dataclass
class Instruction:
    name: str
    opcode: str
    result: str
    """Type text of the result"""
    operands: list[str]
    rest: str
    """Everything after the operands"""


@dataclass
class Module:
    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""
    frames: dict[int, str] = field(default_factory=dict)
    """stack_frame_id -> file:line, where the module has such a table"""


def parse(text: str) -> Module:
    module, lines = Module(frames=_frames(text)), None
    for line in text.splitlines():
        opening = _OPENING.match(line)
        if opening and not line.startswith(" "):
            name, lines = opening[2], []
            module.entry = name if opening[1] else module.entry
        elif lines is None:
            continue
        elif line.startswith(" "):
            lines.append(line)
        elif line == "}" or line.startswith("}, "):
            found = (_LINE.match(whole) for whole in lines)
            module.computations[name] = [_instruction(m[1], m[2]) for m in found if m]
            lines = None
        elif lines:  # an attribute that goes on: Pallas writes a kernel's metadata over several lines
            lines[-1] += line
    return module


def _instruction(name: str, text: str) -> Instruction:
    result, rest = _take_type(text)
    opcode, _, tail = rest.partition("(")
    inside, after = _take_parens(tail)
    operands = re.findall(r"%([\w.\-]+)", inside) or [o.strip().split(" ")[-1] for o in inside.split(",") if o.strip()]
    return Instruction(name, opcode.strip(), result, operands, f"({inside}){after}")


def _take_type(text: str) -> tuple[str, str]:
    if text.startswith("("):
        inside, after = _take_parens(text[1:])
        return inside, after.lstrip()
    head, _, tail = text.partition(" ")
    return head, tail


def _take_parens(text: str) -> tuple[str, str]:
    """Text up to the parenthesis that closes one opened before it, and the text after that."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:index], text[index + 1 :]
    return text, ""


def _frames(text: str) -> dict[int, str]:
    """The module's tables FileNames, FileLocations and StackFrames, if it has them: innermost line of each frame."""
    tables: dict[str, dict[int, str]] = {}
    current: dict[int, str] | None = None
    for line in text.splitlines():
        if line.strip() in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables.setdefault(line.strip(), {})
        elif current is not None and (found := re.match(r"^(\d+) (.*)$", line)):
            current[int(found[1])] = found[2]
        elif line.startswith(("ENTRY", "%")):
            break
    places = {}
    for number, frame in tables.get("StackFrames", {}).items():
        at = re.search(r"file_location_id=(\d+)", frame)
        place = tables.get("FileLocations", {}).get(int(at[1]), "") if at else ""
        file, line_ = re.search(r"file_name_id=(\d+)", place), re.search(r"line=(\d+)", place)
        if file and line_:
            places[number] = _short(tables["FileNames"].get(int(file[1]), "").strip('"'), line_[1])
    return places


def _short(path: str, line: str) -> str:
    return f"{path[path.rfind('jaxmed/') :] if 'jaxmed/' in path else path}:{line}"


def bytes_of(result: str) -> list[int]:
    """Bytes of every array in a type's text."""
    sizes = []
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", result):
        if dtype in _ITEM or dtype.startswith("f8"):
            sizes.append(math.prod(int(d) for d in dims.split(",") if d) * _ITEM.get(dtype, 1))
    return sizes


def place(module: Module, instruction: Instruction) -> str:
    """The source line of an instruction, else the name of the operation that it came from."""
    direct = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.rest)
    if direct:
        return _short(direct[1], direct[2])
    frame = re.search(r"stack_frame_id=(\d+)", instruction.rest)
    if frame and int(frame[1]) in module.frames:
        return module.frames[int(frame[1])]
    name = re.search(r'op_name="([^"]*)"', instruction.rest)
    return name[1] if name else "the compiler's own"


def runs(module: Module) -> dict[str, float]:
    """How often each computation runs in one run of the module."""
    times: dict[str, float] = {}

    def visit(name: str, factor: float) -> None:
        times[name] = times.get(name, 0.0) + factor
        for instruction in module.computations.get(name, []):
            trips = trip_count(module, instruction) if instruction.opcode == "while" else 1.0
            for called in _called(instruction):
                if called in module.computations:
                    visit(called, factor * trips)

    visit(module.entry, 1.0)
    return times


def _called(instruction: Instruction) -> list[str]:
    names = []
    for group in re.findall(
        r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)", instruction.rest
    ):
        names.append(group)
    for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", instruction.rest):
        names += [n.strip().lstrip("%") for n in group.split(",")]
    return names


def trip_count(module: Module, loop: Instruction) -> float:
    """Of a while; 1 where neither the backend nor its condition says."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.rest)
    if known:
        return float(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    return _bound(module, condition[1]) if condition else 1.0


def _bound(module: Module, name: str) -> float:
    """The constant that a loop's condition compares its counter with; counters start at 0 and go up by 1."""
    body = module.computations.get(name, [])
    constants = {}
    for instruction in body:
        number = re.match(r"\((\d+)\)", instruction.rest)
        if instruction.opcode == "constant" and number:
            constants[instruction.name] = int(number[1])
    for instruction in body:
        if instruction.opcode == "compare" and re.search(r"direction=(LT|GT|NE)", instruction.rest):
            bounds = [constants[o] for o in instruction.operands if o in constants]
            if bounds:
                return float(bounds[0])
        if instruction.opcode == "fusion" and (inner := re.search(r"calls=%?([\w.\-]+)", instruction.rest)):
            outer = [constants[o] for o in instruction.operands if o in constants]
            found = _bound(module, inner[1])
            if found != 1.0 or outer:
                return found if found != 1.0 else float(outer[0])
    return 1.0


def groups_of(instruction: Instruction) -> list[tuple[int, ...]]:
    """Sets of devices that a collective joins; pairs for a permute."""
    rest = instruction.rest
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    if pairs:
        return [tuple(int(n) for n in p) for p in re.findall(r"\{?(\d+),(\d+)", pairs[1])]
    by_axis = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest)
    if by_axis:
        return _mesh_groups(by_axis[1], by_axis[2])
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if listed:
        return [tuple(int(n) for n in g.split(",")) for g in re.findall(r"\{([\d,]+)\}", listed[1])]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        numbers = np.arange(math.prod(int(n) for n in iota[3].split(","))).reshape([int(n) for n in iota[3].split(",")])
        if iota[4]:
            numbers = numbers.transpose([int(n) for n in iota[4].split(",")])
        return [tuple(int(n) for n in row) for row in numbers.reshape(int(iota[1]), int(iota[2]))]
    return []


def _mesh_groups(mesh: str, axes: str) -> list[tuple[int, ...]]:
    """`'a'=1,'b'=4,'c'=2` and `'b','c':(1)2`: the axes that a group spans; `:(m)n` is the n-fold part after an m-fold one."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = {name: (int(m or 1), int(n or sizes[name])) for name, m, n in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    shape, spanned = [], []
    for name, size in sizes.items():
        before, inside = parts.get(name, (size, 1))
        for part, inner in ((before, False), (inside, True), (size // before // inside, False)):
            shape.append(part)
            spanned.append(inner)
    numbers = np.arange(math.prod(shape)).reshape(shape)
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


def found(module: Module, sizes: Mapping[str, int]) -> list[Collective]:
    """Every collective of the module with the bytes that one device sends."""
    times = runs(module)
    everyone = [tuple(range(math.prod(sizes.values())))]
    result = []
    for name, body in module.computations.items():
        for instruction in body:
            kind = KINDS.get(instruction.opcode.removesuffix("-start"))
            if kind is None or not times.get(name) or _goes_on(body, instruction):
                continue
            groups = groups_of(instruction) or everyone
            axes = axes_of(groups, sizes)
            whole = _whole(module, name, instruction, kind)
            n = 2 if kind == "permute" else len(groups[0])
            shape = re.search(r"\b([a-z]\w*)\[([\d,]*)\]", instruction.result)
            dims = tuple(int(d) for d in shape[2].split(",") if d) if shape else ()
            if n > 1 and whole:
                sent = whole if kind == "permute" else wire_bytes(kind, n, whole)
                result.append(
                    Collective(kind, axes, sent, times[name], place(module, instruction), shape[1] if shape else "", dims)
                )
    return result


def _goes_on(body: list[Instruction], instruction: Instruction) -> bool:
    """Whether this is a later link of a TPU's fused asynchronous collective: a chain of fusions holds it once in each link (its
    start, the work that it hides behind, its end)."""
    starts = any("AsyncCollectiveStart" in other.rest for other in body)
    return "chain_id=" in instruction.rest and not starts


def _whole(module: Module, computation: str, instruction: Instruction, kind: str) -> float:
    """Bytes of the larger of operands and results on one device."""
    made = bytes_of(instruction.result)
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "permute", "all-to-all", "reduce-scatter"):
        # (operands, results, handles): the operands come first
        half = len(instruction.operands)
        before, after = made[:half], made[half : 2 * half]
        return float(max(sum(before), sum(after))) if kind != "permute" else float(sum(before))
    if kind == "reduce-scatter":
        n = len((groups_of(instruction) or [()])[0])
        return float(sum(made) * max(n, 1))
    return float(sum(made))


def as_rows(module: Module, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """As JSON."""
    keys = ("kind", "axes", "bytes", "times", "source", "dtype", "shape")
    return [{k: getattr(c, k) for k in keys} for c in found(module, sizes)]


def from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Collective]:
    return [Collective(**{**r, "axes": tuple(r["axes"]), "shape": tuple(r["shape"])}) for r in rows]


def notes(module: Module, least: int = 1 << 26) -> list[str]:
    """Copies of whole arrays that only change their layout, over 64 MB, once a loop run or more."""
    times = runs(module)
    lines = []
    for name, body in module.computations.items():
        for instruction in body:
            size = sum(bytes_of(instruction.result))
            if instruction.opcode == "copy" and size >= least and times.get(name):
                lines.append(
                    f"copy of {instruction.result.split('{')[0]}, {times[name]:.0f} times, at {place(module, instruction)}"
                )
    return sorted(set(itertools.islice(lines, 50)))
