"""Reading records: a JSON list (or JSON lines) of {"id", "image", "conversations": [{"from", "value"}, ...]}, as LLaVA has
them, or of its questions {"question_id", "image", "text"}; a table of questions or captions (jaxmed.data.tables, ct_rate),
AMOS-MM's dataset.json (amos), or a mixture of such files (mixture): whatever it is, records come out. How a file is named says
how it is read (record_files).

What can be wrong with a record is found here, once, with a sentence that says where and what to do. The texts stay as
the file has them; templates, image places and label masks are jaxmed.data.conversation's matter.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxmed.data import amos, ct_rate
from jaxmed.data.drafts import Draft
from jaxmed.data.mixture import Member, read_mixture
from jaxmed.data.record_files import MissingImageToken, Reading, parse
from jaxmed.data.record_lists import TURNS, check_keys, read_values
from jaxmed.data.tables import RAGGED, draft_of, kind_of, ragged
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
    prompts: tuple[str, ...] = ()
    """Questions that training draws among; the first of them is the turn's. (): the record has a question of its own"""
    region: str = ""
    """Of a region's report: chest, abdomen or pelvis"""
    options: dict[str, str] = field(default_factory=dict)
    """Of a question with choices: {letter: text}"""
    answer: str = ""
    """The letter of the right option"""
    question_type: str = ""
    patient: str = ""
    """Whom the volume shows, where the data set says so"""
    dataset: str = ""
    """The set of a mixture that it is from"""


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
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
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


def records_from_dict(d: Any, row: int = 0, source: str = "", reading: Reading = AS_LLAVA) -> list[Record | UserError]:
    """The records of one JSON object or of one row of a table, in their order, and in place of a record that cannot be used
    what is wrong with it: an entry of AMOS-MM has several."""
    try:
        _require(isinstance(d, Mapping), f"it is {type(d).__name__}; a record must be a JSON object")
        found = _drafts(d, source, reading)
    except UserError as error:
        return [error]
    records: list[Record | UserError] = []
    for draft in found:
        try:
            if isinstance(draft, UserError):
                raise draft
            records.append(_record(draft, row, source, reading))
        except UserError as error:
            records.append(error)
    return records


def record_from_dict(d: Any, row: int = 0, source: str = "", reading: Reading = AS_LLAVA) -> Record:
    """The same of what is one record; UserError otherwise. A leading gpt turn is dropped: nothing precedes it that it could
    answer."""
    found = records_from_dict(d, row, source, reading)
    fault = next((each for each in found if isinstance(each, UserError)), None)
    if fault is not None:
        raise fault
    _require(len(found) == 1, f"it makes {len(found)} records; read it with its file, or with records_from_dict")
    return found[0]


def _drafts(d: Mapping[str, Any], source: str, reading: Reading) -> Sequence[Draft | Mapping[str, Any] | UserError]:
    """What becomes a record each; conversations as they are."""
    if RAGGED in d:
        raise RecordError(ragged(d))
    check_keys(d)
    if any(name in d for name in TURNS):
        return [d]
    if "question_id" in d and isinstance(d.get("text"), str):
        return [_asked(d)]
    if amos.is_amos(d) or (reading.unanswered and "image" in d and not kind_of(d)):
        return amos.drafts(d, reading)
    if ct_rate.is_ct_rate(d):
        return ct_rate.drafts(d, reading)
    return [draft_of(d, parse(source).path if source else "", reading)] if kind_of(d) else [d]


def _asked(d: Mapping[str, Any]) -> dict[str, Any]:
    """A line of LLaVA's question files: `text` asks about `image`, which LLaVA's evaluation puts in front."""
    question = d["text"].replace(IMAGE_TOKEN, "").strip()
    turn = {"from": "human", "value": f"{IMAGE_TOKEN}\n{question}" if d.get("image") else question}
    rest = {key: value for key, value in d.items() if key not in ("question_id", "text")}
    return rest | {"id": d["question_id"], TURNS[0]: [turn]}


def _record(draft: Draft | Mapping[str, Any], row: int, source: str, reading: Reading) -> Record:
    d = draft.json() if isinstance(draft, Draft) else draft
    images = _images(d.get("image"))
    turns = _turns(d.get(next((name for name in TURNS if name in d), TURNS[0])))
    name = d.get("id")
    extra = {key: value for key, value in d.items() if key not in ("id", "image", *TURNS)}
    record = Record(str(row) if name is None else str(name), images, turns, row, source, extra)
    if isinstance(draft, Draft):
        record = dataclasses.replace(record, prompts=draft.prompts, **draft.fields)
    if reading.placeholders:
        _check_plain(turns, len(images))
        return record
    record = settle(record, reading.missing_image_token)
    _check_places(record.turns, len(record.images))
    return record


def known_records(values: Sequence[Mapping[str, Any] | Record], reading: Reading = AS_LLAVA) -> list[Record]:
    """The records of rows or JSON objects (an entry of AMOS-MM makes several), and such as are records already; RecordError or
    UserError for one that cannot be used."""
    records: list[Record] = []
    for row, value in enumerate(values):
        for each in [value] if isinstance(value, Record) else records_from_dict(value, row, "", reading):
            if isinstance(each, UserError):
                raise each
            records.append(each)
    return records


def load_records(path: str, reading: Reading = AS_LLAVA) -> tuple[list[Record], list[Problem]]:
    """All usable records of a .json, .jsonl or .csv file, or of a mixture of them, in file order, and a Problem for each of the
    others. `path` may say how the file is read (jaxmed.data.record_files), and wins over `reading`."""
    mixture, file = read_mixture(path), parse(path)
    if mixture is None and file.path != path and read_mixture(file.path):
        raise UserError(f"{path}: {file.path} is a mixture; how a set is read stands behind its own `records`, inside")
    if mixture is None:
        return _load(path, reading)
    records, problems = [], []
    for member in mixture.members:
        found, bad = _load(member.records, reading)
        records += [_of_member(record, member) for record in found]
        problems += bad
    return records, problems


def _of_member(record: Record, member: Member) -> Record:
    """A record whose name says its set and whose images do not need the set's folder any more."""
    images = tuple(member.image(image) for image in record.images)
    return dataclasses.replace(record, id=f"{member.name}/{record.id}", images=images, dataset=member.name)


def _load(name: str, reading: Reading) -> tuple[list[Record], list[Problem]]:
    file = parse(name)
    reading = dataclasses.replace(reading, split=file.split or reading.split, **file.fields)
    values = read_values(file.path, reading.split)
    # Entries of a test set have no labels by which they could be told.
    if reading.split.lower().startswith("test"):
        reading = dataclasses.replace(reading, unanswered=True)
    kept = [True] * len(values)
    if reading.first_reconstruction and isinstance(values[0], Mapping) and ct_rate.is_ct_rate(values[0]):
        kept = ct_rate.first_reconstructions(values)
    records: list[Record] = []
    problems: list[Problem] = []
    for row, (value, keep) in enumerate(zip(values, kept, strict=True)):
        for each in records_from_dict(value, row, name, reading) if keep else ():
            if isinstance(each, Record):
                records.append(each)
            else:
                problems.append(Problem(place(row, _name(value), name), str(each)))
    if not records and not problems:
        raise UserError(f"{name}: holds no records of the kind that is asked for; look at what stands behind the file's name")
    return records, problems


def _name(value: Any) -> Any:
    """What a message calls an entry that is no record."""
    if not isinstance(value, Mapping):
        return None
    image = value.get("image")
    return ct_rate.case_name(image) if amos.is_amos(value) and isinstance(image, str) else value.get("id")
