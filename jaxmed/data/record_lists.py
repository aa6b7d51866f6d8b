"""The rows or JSON objects of one file of records, as they stand in it; damage is told with the place."""

import json
from collections.abc import Mapping
from typing import Any

from jaxmed.data.record_files import WORDS
from jaxmed.data.tables import read_csv
from jaxmed.errors import UserError

TURNS = ("conversations", "conversatons")
"""Names of the key that holds the turns; the second is spelt as in TinyLLaVA-Med's own files"""
REPEATED = "\0repeated"
"""Key under which a JSON object holds the name of a key that it has twice"""


def _read_lines(path: str) -> list[Any]:
    values = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    values.append(json.loads(line, object_pairs_hook=_object))
                except (json.JSONDecodeError, RecursionError) as error:
                    raise UserError(f"{path}: line {number} is not JSON ({error}); each line must be one object") from error
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that it has twice would otherwise hide the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        found[REPEATED] = next(name for name in names if names.count(name) > 1)
    return found


def check_keys(values: Mapping[str, Any], who: str = "it has") -> None:
    """UserError for an object whose file has one of its keys twice."""
    if REPEATED in values:
        raise UserError(f"{who} the key {values[REPEATED]!r} twice; leave one of them out")


def _split(path: str, values: dict[str, Any], split: str) -> Any:
    """One of the lists of a JSON object; the only one that holds anything need not be named."""
    names = [name for name, value in values.items() if isinstance(value, list) and all(isinstance(e, dict) for e in value)]
    if not names or any(name in values for name in TURNS):
        return values
    if split in names:
        return values[split]
    filled = [name for name in names if values[name]] or names
    if len(filled) == 1 and not split:
        return values[filled[0]]
    asked = f"not {split!r}" if split else "and none is named"
    raise UserError(f"{path}: holds the lists {', '.join(names)}, {asked}; say which one is meant, such as {path}:{names[0]}")


def read_values(path: str, split: str) -> list[Any]:
    """Rows of a CSV, objects of a JSON list (`split`: of one of several lists) or of JSON lines."""
    if not path.lower().endswith(".csv"):
        return _read_list(path, split)
    if split:
        raise UserError(f"{path}:{split}: a table has no list {split!r}; known words behind a table are {', '.join(WORDS)}")
    return read_csv(path)


def _read_list(path: str, split: str) -> list[Any]:
    try:
        if path.lower().endswith(".jsonl"):
            values = _read_lines(path)
        else:
            with open(path, encoding="utf-8-sig") as file:
                values = json.load(file, object_pairs_hook=_object)
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
