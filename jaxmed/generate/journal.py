"""What a generation has finished, study by study, on disk: nothing is lost and nothing is done twice.

    X_vqa.json                 the result, written once all studies are there (atomically, in the order of the records)
    X_vqa.json.header.json     what it was made with
    X_vqa.json.parts/I.jsonl   a line a finished study, by process I; flushed to disk line by line

A header with another hash (another checkpoint, other records or sampling) is refused. The number of processes is not part of
it: a restart reads every part and does the rest.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

from jaxmed.errors import UserError


class Journal:
    """The parts of one result file; this process appends to its own."""

    def __init__(self, out: str, header: dict[str, Any], process: int):
        self.out, self.folder = out, f"{out}.parts"
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made ({error.strerror}); give another --out") from error
        self.header = header
        self._check_header()
        self.path = os.path.join(self.folder, f"{process}.jsonl")
        self.done: dict[str, Any] = {}
        for path in self._parts():
            self.done |= dict(_lines(path, torn=path != self.path))
        _cut_torn_line(self.path)
        self._file = open(self.path, "ab")  # noqa: SIM115  (closed in `close`; one study a line, for hours)

    def _check_header(self) -> None:
        path = f"{self.out}.header.json"
        if os.path.exists(path):
            try:
                with open(path, encoding="utf-8") as file:
                    found = dict(json.load(file))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{path}: cannot be read ({error}); remove it and {self.folder} to start afresh") from error
            differ = sorted(k for k in self.header.keys() | found.keys() if self.header.get(k) != found.get(k))
            if differ:
                pairs = ", ".join(f"{k} {found.get(k)!r} there, {self.header.get(k)!r} now" for k in differ)
                raise UserError(
                    f"{self.out} was begun with other settings ({pairs}); give another --out, or remove {self.folder}"
                )
            return
        if os.path.exists(self.out):
            raise UserError(f"{self.out} exists and was not written by `jaxmed generate`; give another --out")
        write_json(path, self.header)

    def _parts(self) -> list[str]:
        return sorted(os.path.join(self.folder, name) for name in os.listdir(self.folder) if name.endswith(".jsonl"))

    def append(self, key: str, entry: Any) -> None:
        """One finished study, on disk when this returns."""
        self.done[key] = entry
        try:
            self._file.write(json.dumps({"key": key, "entry": entry}).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); what was finished before is kept. Free some space and run "
                "the same command again"
            ) from error

    def refresh(self) -> None:
        """Takes in what other processes have finished since."""
        for path in self._parts():
            if path != self.path:
                self.done |= dict(_lines(path, torn=True))

    def close(self) -> None:
        self._file.close()


def _lines(path: str, torn: bool) -> Iterator[tuple[str, Any]]:
    """Finished studies of a part. The last line may be torn: another process is writing it, or died doing so."""
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    for number, line in enumerate(lines[:-1]):
        try:
            row = json.loads(line)
            yield row["key"], row["entry"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines) - 2 and torn:
                return
            raise UserError(f"{path}: line {number + 1} is damaged; remove that line and run the same command again") from None


def _cut_torn_line(path: str) -> None:
    """Removes what follows the last newline: the start of a study that was never finished."""
    if not os.path.exists(path):
        return
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def write_json(path: str, value: Any) -> None:
    """Indented, ASCII alone, under its final name only when complete."""
    partial = f"{path}.{os.getpid()}.tmp"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=4)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); what was finished is kept") from error
