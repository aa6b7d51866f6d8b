"""Reading LLaVA-style conversation records: a JSON list of {"id", "image", "conversations": [{"from", "value"}, ...]}.

What can be wrong with a record is found here, once, with a sentence that says where and what to do. The texts stay as
the file has them; templates, image places and label masks are jaxmed.data.conversation's matter.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxmed.data.tokenizer import IMAGE_TOKEN
from jaxmed.errors import Problem, UserError

ROLES = ("human", "gpt")


class RecordError(UserError, ValueError):
    """A record that cannot be used; the message says why and what to do, without its place."""


@dataclass(frozen=True)
class Turn:
    role: str
    """`human` or `gpt`"""
    value: str
    """The text, exactly as the file has it"""


@dataclass(frozen=True)
class Record:
    id: str
    """The record's own `id`; its row number where it has none"""
    images: tuple[str, ...]
    """File names as written; empty for text alone"""
    turns: tuple[Turn, ...]
    """human, gpt, human, gpt, ...; the last answer may be missing where there is none yet"""
    row: int = 0
    """Index in the file"""
    source: str = ""
    """Path of the file"""
    extra: dict[str, Any] = field(default_factory=dict)
    """All other keys"""


def place(row: int, name: Any, source: str) -> str:
    """`train.json: record 17 (id 'x')`"""
    head = f"{source}: " if source else ""
    return f"{head}record {row}" + (f" (id {name!r})" if name is not None else "")


def where(record: Record) -> str:
    return place(record.row, record.id, record.source)


def image_places(text: str, images: int) -> int:
    """Image places that training leaves in a turn. With one image (or none) several `<image>` of a turn become one, as
    LLaVA's normalisation makes them; with several images each keeps its place."""
    count = text.count(IMAGE_TOKEN)
    return count if images > 1 else min(count, 1)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecordError(message)


def _images(value: Any) -> tuple[str, ...]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    usable = isinstance(names, list | tuple) and all(isinstance(name, str) and name for name in names)
    _require(usable, f"`image` is {value!r}; it must be a file name or a list of file names (leave it out for text alone)")
    return tuple(names)


def _turn(turn: Any, number: int) -> Turn:
    _require(isinstance(turn, dict), f'turn {number} is {type(turn).__name__}; it must be {{"from": ..., "value": ...}}')
    role, value = turn.get("from"), turn.get("value")
    _require(role in ROLES, f"turn {number} is from {role!r}; known roles are 'human' and 'gpt'")
    _require(isinstance(value, str), f"turn {number} has the value {value!r}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"turn {number} holds half a surrogate pair at character {error.start}; write the character in full"
        ) from error
    return Turn(role, value)


def _turns(value: Any) -> tuple[Turn, ...]:
    _require(isinstance(value, list | tuple) and len(value) > 0, "it has no turns; give `conversations` a human and a gpt turn")
    turns = tuple(_turn(turn, number) for number, turn in enumerate(value, 1))
    dropped = int(turns[0].role == "gpt")
    for index, turn in enumerate(turns[dropped:]):
        number = index + dropped + 1
        expected = ROLES[index % 2]
        _require(
            turn.role == expected,
            f"roles do not alternate: turn {number} is from {turn.role!r}, {expected!r} expected; "
            "merge neighbouring turns of one role or remove one",
        )
    _require(len(turns) > dropped, "it has no human turn; add the question before the answer")
    return turns[dropped:]


def _check_places(turns: Sequence[Turn], images: int) -> None:
    places = sum(image_places(turn.value, images) for turn in turns)
    if places == images:
        return
    if images == 0:
        raise RecordError(f"its turns hold {IMAGE_TOKEN} but it names no image; add `image` or remove {IMAGE_TOKEN}")
    raise RecordError(
        f"it names {images} image{'s' * (images > 1)} but its turns have {places} place{'s' * (places != 1)} for images; "
        f"write one {IMAGE_TOKEN} for each image"
    )


def record_from_dict(d: Any, row: int = 0, source: str = "") -> Record:
    """The record of one JSON object. A leading gpt turn is dropped: nothing precedes it that it could answer."""
    _require(isinstance(d, dict), f"it is {type(d).__name__}; a record must be a JSON object")
    images = _images(d.get("image"))
    turns = _turns(d.get("conversations"))
    _check_places(turns, len(images))
    name = d.get("id")
    extra = {key: value for key, value in d.items() if key not in ("id", "image", "conversations")}
    return Record(str(row) if name is None else str(name), images, turns, row, source, extra)


def _read_list(path: str) -> list[Any]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            values = json.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the JSON file of the records") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the records as UTF-8") from error
    except json.JSONDecodeError as error:
        hint = "; a file with one object a line must be made one JSON list" if error.msg == "Extra data" else ""
        raise UserError(f"{path}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}){hint}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply; the file must be a JSON list of records") from error
    if not isinstance(values, list):
        raise UserError(f"{path}: holds a JSON {type(values).__name__}; it must be a list of records")
    if not values:
        raise UserError(f"{path}: holds no records; give a list with at least one")
    return values


def load_records(path: str) -> tuple[list[Record], list[Problem]]:
    """All usable records of a file in file order, and a Problem for each of the others."""
    records: list[Record] = []
    problems: list[Problem] = []
    for row, value in enumerate(_read_list(path)):
        try:
            records.append(record_from_dict(value, row, path))
        except RecordError as error:
            name = value.get("id") if isinstance(value, dict) else None
            problems.append(Problem(place(row, name, path), str(error)))
    return records, problems
