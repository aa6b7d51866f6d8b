"""Rows of tables as records: M3D's VQA CSV and caption JSON, SAMF's report and multiple-choice CSVs.

A row (names of columns -> strings) becomes a draft of a record: `image`, a question, its answer, and all columns beside. Which
table a row is from is told by its columns, their case aside. Texts are kept to the blank: questions about choices begin with
one (it stands between placeholders and question), prompts for a caption do not.
"""

import csv
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxmed.data.ct_rate import is_ct_rate
from jaxmed.data.drafts import Draft
from jaxmed.data.record_files import Reading
from jaxmed.errors import UserError

RAGGED = "\0ragged"
"""Key of the values of a CSV row that are more or fewer than the table's columns"""
CAPTION_KINDS = ("reports", "captions")
UPSTREAM_CHOICES = "na_choices"
"""Name of the defect (`--upstream-exact`): pandas reads these strings as missing, and prints them as `nan`."""
_MISSING = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL"]
) | {"NaN", "None", "n/a", "nan", "null"}
_FINDINGS = "study_findings:"
_SHORTEST = 5  # characters, blanks aside, of a section that counts


@dataclass(frozen=True)
class _Table:
    """How the rows of one kind of table are told and read; names of columns in lower case."""

    image: str
    answer: str
    columns: frozenset[str]
    """Columns that tell the kind"""
    labels: str = ""
    """How the choices are named in the question"""
    end: str = ""
    """What follows the text of a chosen answer"""


_TABLES = {
    "m3d_vqa": _Table("image path", "answer", frozenset({"image path", "question", "answer"}), "ABCD"),
    "samf_mcq": _Table("image", "answer", frozenset({"image", "question", "answer", "answer choice", "choice a"}), "abcd", "."),
    "reports": _Table("image", "caption", frozenset({"image", "caption"})),
    "captions": _Table("image", "text", frozenset({"image", "text"})),
    "questions": _Table("image", "answer", frozenset({"image", "question", "answer"})),
}
AS_PUBLISHED = Reading()


def ragged(row: Mapping[str, Any]) -> str:
    """What is wrong with a row that does not fit its table."""
    return f"it has {len(row[RAGGED])} values, more or fewer than the table has columns; quote texts with commas"


def kind_of(row: Mapping[str, Any]) -> str:
    """The kind of table that a row with these columns is from, "" for none that is known."""
    columns = {name.strip().lower() for name in row}
    return next((kind for kind, table in _TABLES.items() if table.columns <= columns), "")


def draft_of(row: Mapping[str, Any], source: str = "", reading: Reading = AS_PUBLISHED) -> Draft:
    """The draft of one row. `source`: the file, beside which texts lie."""
    kind = kind_of(row)
    if not kind:
        raise UserError(f"its columns are {', '.join(row)}; {_known()} (or `conversations`)")
    table = _TABLES[kind]
    cells = {name.strip().lower(): value for name, value in row.items()}
    if cells[table.image] is None:  # a text alone would be trained on without its volume
        raise UserError(f"its {table.image} is null; name its file, or take the row out")
    question, answer = _text(cells, "question", kind not in CAPTION_KINDS), _text(cells, table.answer, True)
    prompts: tuple[str, ...] = ()
    fields: dict[str, Any] = {"question_type": _text(cells, "question type", False)}
    if kind in CAPTION_KINDS:
        prompts = () if question else reading.prompts.captions
        question = question or prompts[0]
        answer = answer if kind == "reports" else _report(answer, source, cells[table.image])
    elif table.labels:
        question = f" {question}"
        closed = reading.questions == "closed"
        if "choice a" in cells:
            fields |= _choices(cells, needed=closed)
        if closed and "choice a" in cells:
            question, answer = _closed(cells, question, answer, table, reading.upstream_exact)
    values = {name: value for name, value in row.items() if name.strip().lower() not in ("id", table.image)}
    name = cells.get("id")
    return Draft("" if name is None else str(name), cells[table.image], question, answer, prompts, values, fields)


def _known() -> str:
    tables = [", ".join(sorted(table.columns)) for table in _TABLES.values()]
    return f"known tables have: {'; '.join([*tables, 'VolumeName, Findings_EN'])}"


def _choices(cells: Mapping[str, Any], needed: bool) -> dict[str, Any]:
    """The choices that there are (`NA` is none) and the letter of the right one. An open question, which does not show them,
    has none where they are faulty."""
    answer = _text(cells, "answer choice", False).strip().upper()
    texts = {letter: _text(cells, f"choice {letter.lower()}", False) for letter in "ABCD"}
    options = {k: v for k, v in texts.items() if v.strip() not in ("", "NA") or k == answer}
    fault = _not_a_choice(answer) if answer and answer not in texts else ""
    seen: dict[str, str] = {}
    for letter, text in options.items():
        other = seen.setdefault(" ".join(text.casefold().split()), letter)
        if other != letter and not fault:
            fault = f"its choices repeat: {other} and {letter} are both {text!r}; mend the choices, or take the row out"
    if fault and needed:
        raise UserError(fault)
    if fault:
        return {}
    return {"options": options, "answer": answer}


def _not_a_choice(letter: str) -> str:
    has = f"is {letter!r}" if letter.strip() else "is empty"
    return (
        f"its answer choice {has}; it must be one of A, B, C, D (questions without choices are read with :open behind the "
        "file's name)"
    )


def _text(cells: Mapping[str, Any], column: str, is_needed: bool) -> str:
    value = cells.get(column)
    missing = value is None or (isinstance(value, float) and math.isnan(value))  # pandas writes NaN where a text is missing
    value = "" if missing else str(value) if isinstance(value, int | float) else value
    if not isinstance(value, str):
        raise UserError(f"its {column} is {value!r}; it must be a text")
    if is_needed and not value.strip():
        raise UserError(f"its {column} is empty; write one, or take the row out")
    return value


def _closed(
    cells: Mapping[str, Any], question: str, answer: str, table: _Table, upstream_exact: frozenset[str]
) -> tuple[str, str]:
    """Question and answer with the choices named."""

    def shown(text: str) -> str:
        return "nan" if UPSTREAM_CHOICES in upstream_exact and text in _MISSING else text

    choices = [shown(_text(cells, f"choice {letter}", False)) for letter in "abcd"]
    listed = "".join(f" {label}. {choice}" for label, choice in zip(table.labels, choices, strict=True))
    letter = _text(cells, "answer choice", False)
    if letter.strip().lower() not in tuple("abcd"):
        raise UserError(_not_a_choice(letter))
    return f"{question} Choices:{listed}", f"{letter}. {shown(answer)}{table.end}"


def _report(text: str, source: str, image: Any) -> str:
    """M3D's caption entries name a text file, from the folder of the data set on: that of the list, or the one above."""
    if not text.endswith(".txt") or "\n" in text:
        return parse_report(text)
    above = os.path.dirname(os.path.abspath(source)) if source else os.getcwd()
    paths = [os.path.join(folder, text) for folder in (above, os.path.dirname(above), os.getcwd())]
    found = next((path for path in paths if os.path.isfile(path)), "")
    if not found:
        raise UserError(f"its text {text!r} is not there; looked in {', '.join(dict.fromkeys(map(os.path.dirname, paths)))}")
    try:
        with open(found, encoding="utf-8-sig") as file:
            whole = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{found}: cannot be read ({error}); save it as UTF-8") from error
    # Upstream's preparation writes volume and report, the latter in one line; a mark within that line it left there.
    prepared = str(image).endswith(".npy") and "\n" not in whole and whole.find(_FINDINGS) > 0
    return whole if prepared else parse_report(whole)


def parse_report(text: str) -> str:
    """The report in a text of M3D-Cap: all after `study_findings:`; where that is all but empty, all after `discussion:`; else
    the whole text. In one line."""
    for mark in (_FINDINGS, "discussion:"):
        _, found, rest = text.partition(mark)
        if mark == _FINDINGS and not found:
            break
        if found and len(rest.strip().replace("\n", "").replace(" ", "")) >= _SHORTEST:
            text = rest
            break
    return text.replace("\n", " ").strip()


def read_csv(path: str) -> list[dict[str, str]]:
    """Rows of a CSV file by their columns' names. Nothing is taken for missing: `NA` and `None` are texts. Empty rows are left
    out, and columns without a name, such as the numbers that pandas writes in front."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the CSV file of the records") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the table as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}: is no CSV table ({error}); save it again") from error
    header, *rows = [row for row in rows if any(map(str.strip, row))] or [[]]
    if not rows:
        raise UserError(f"{path}: holds no rows; give a table with a line of names and at least one row")
    if not kind_of(dict.fromkeys(header)) and not is_ct_rate(dict.fromkeys(header)):
        raise UserError(f"{path}: its columns are {', '.join(header)}; {_known()}")
    names = [name.strip().lower() for name in header]
    twice = next((name for name, low in zip(header, names, strict=True) if low and names.count(low) > 1), "")
    if twice:
        raise UserError(f"{path}: has the column {twice!r} twice; leave one of them out")

    def named(row: list[str]) -> dict[str, str]:
        return {name: value for name, value in zip(header, row, strict=True) if name.strip()}

    # A row that does not fit keeps its values, for the message about it.
    return [named(row) if len(row) == len(header) else {RAGGED: row} for row in rows]
