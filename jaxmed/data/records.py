"""Reading records: a JSON list (or JSON lines) of {"id", "image", "conversations": [{"from", "value"}, ...]}, as LLaVA has
them, or a table of questions or captions (jaxmed.data.tables), whose rows become such records.

What can be wrong with a record is found here, once, with a sentence that says where and what to do. The texts stay as
the file has them; templates, image places and label masks are jaxmed.data.conversation's matter.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxmed.data.tables import CAPTION_PROMPTS, RAGGED, conversation_of, kind_of, read_csv
from jaxmed.data.tokenizer import IMAGE_TOKEN
from jaxmed.errors import Problem, UserError

ROLES = ("human", "gpt")
TURNS = ("conversations", "conversatons")
"""Names of the key that holds the turns; the second is spelt as in TinyLLaVA-Med's own files"""
MissingImageToken = Literal["refuse", "prepend", "text_only"]


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


@dataclass(frozen=True)
class Reading:
    """What a file's records are read for; the defaults are those of LLaVA's conversations."""

    missing_image_token: MissingImageToken = "refuse"
    """What becomes of a record that has an image and no `<image>`: a problem, `<image>` in front, or its text alone"""
    placeholders: bool = False
    """Whether an image stands before the question by itself (template `m3d`), so that `<image>` need not be written"""
    upstream_exact: frozenset[str] = frozenset()
    """Defects to be kept (tables: `na_choices`)"""
    questions: Literal["closed", "open"] = "closed"
    """Whether a table's choices are named"""
    split: str = ""
    """Which list of a JSON object of several (M3D's captions: train, validation, test, ...)"""
    prompts: tuple[str, ...] = CAPTION_PROMPTS[:1]
    """Questions of captions that have none, by row in turn"""


AS_LLAVA = Reading()


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
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # an answer that is a number, written as one
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
        f"write one {IMAGE_TOKEN} for each image" + (" (or see --data.missing-image-token)" if not places else "")
    )


def _check_plain(turns: Sequence[Turn], images: int) -> None:
    """One image, one question, at most one answer: what stands behind placeholders."""
    _require(
        len(turns) <= 2, f"it has {len(turns)} turns; the template m3d takes one question and its answer, split the record"
    )
    _require(images <= 1, f"it names {images} images; the template m3d takes one, split the record")
    places = sum(turn.value.count(IMAGE_TOKEN) for turn in turns)
    _require(
        images > 0 or not places, f"its turns hold {IMAGE_TOKEN} but it names no image; add `image` or remove {IMAGE_TOKEN}"
    )


def settle(record: Record, missing: MissingImageToken) -> Record:
    """The record with a place for its images where it has none at all, or without them (`refuse`: as it is)."""
    if missing == "refuse" or not record.images or any(IMAGE_TOKEN in turn.value for turn in record.turns):
        return record
    if missing == "text_only":
        return dataclasses.replace(record, images=())
    first, *others = record.turns
    first = Turn(first.role, f"{IMAGE_TOKEN}\n" * len(record.images) + first.value)
    return dataclasses.replace(record, turns=(first, *others))


def record_from_dict(d: Any, row: int = 0, source: str = "", reading: Reading = AS_LLAVA) -> Record:
    """The record of one JSON object or of one row of a table. A leading gpt turn is dropped: nothing precedes it that it
    could answer."""
    _require(isinstance(d, Mapping), f"it is {type(d).__name__}; a record must be a JSON object")
    if RAGGED in d:
        raise RecordError(f"it has {len(d[RAGGED])} values, more or fewer than the table has columns; quote texts with commas")
    key = next((name for name in TURNS if name in d), TURNS[0])
    if key not in d and kind_of(d):
        prompt = reading.prompts[row % len(reading.prompts)]
        d = conversation_of(d, source, reading.questions, reading.upstream_exact, prompt)
    images = _images(d.get("image"))
    turns = _turns(d.get(key))
    name = d.get("id")
    extra = {key: value for key, value in d.items() if key not in ("id", "image", *TURNS)}
    record = Record(str(row) if name is None else str(name), images, turns, row, source, extra)
    if reading.placeholders:
        _check_plain(turns, len(images))
        return record
    record = settle(record, reading.missing_image_token)
    _check_places(record.turns, len(record.images))
    return record


def records_from_rows(rows: Sequence[Mapping[str, Any]], source: str = "", reading: Reading = AS_LLAVA) -> list[Record]:
    """All records of rows or JSON objects; RecordError or UserError for one that cannot be used."""
    return [record_from_dict(row, number, source, reading) for number, row in enumerate(rows)]


def _read_lines(path: str) -> list[Any]:
    values = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    values.append(json.loads(line))
                except (json.JSONDecodeError, RecursionError) as error:
                    raise UserError(f"{path}: line {number} is not JSON ({error}); each line must be one object") from error
    return values


def _split(path: str, values: dict[str, Any], split: str) -> Any:
    """One of the lists of a JSON object."""
    names = [name for name, value in values.items() if isinstance(value, list)]
    if split and split in names:
        return values[split]
    if names and len(names) == len(values):
        raise UserError(f"{path}: holds the lists {', '.join(names)}, not {split!r}; write the one that is meant into a file")
    return values


def _read(path: str, split: str) -> list[Any]:
    return read_csv(path) if path.lower().endswith(".csv") else _read_list(path, split)


def _read_list(path: str, split: str) -> list[Any]:
    try:
        if path.lower().endswith(".jsonl"):
            values = _read_lines(path)
        else:
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
    if isinstance(values, dict):
        values = _split(path, values, split)
    if not isinstance(values, list):
        raise UserError(f"{path}: holds a JSON {type(values).__name__}; it must be a list of records")
    if not values:
        raise UserError(f"{path}: holds no records; give a list with at least one")
    return values


def load_records(path: str, reading: Reading = AS_LLAVA) -> tuple[list[Record], list[Problem]]:
    """All usable records of a .json, .jsonl or .csv file in file order, and a Problem for each of the others."""
    records: list[Record] = []
    problems: list[Problem] = []
    for row, value in enumerate(_read(path, reading.split)):
        try:
            records.append(record_from_dict(value, row, path, reading))
        except UserError as error:
            name = value.get("id") if isinstance(value, dict) else None
            problems.append(Problem(place(row, name, path), str(error)))
    return records, problems
