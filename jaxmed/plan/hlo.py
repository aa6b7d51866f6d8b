"""The text of a compiled module, parsed: computations, instructions, how often each runs, and which line it comes from.

A loop's trip count is the backend's `known_trip_count` where it says one, else the bound in its condition (TPU modules do not
say).
"""

import math
import re
from dataclasses import dataclass, field

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
    path = path[path.rfind("jaxmed/") :] if "jaxmed/" in path else path.rpartition("site-packages/")[2]
    return f"{path}:{line}"


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
    return name[1].replace("\\'", "'") if name else "the compiler's own"


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
