"""Prepared volumes kept on disk, so that a volume is read and resized once and not every epoch.

A volume is FOLDER/NAME-KEY.npy, [D, H, W] float32, beside a .json of its notices and frame. The key is of the file (place,
size, time), of everything in the config that the result depends on and of the version of the code: whatever changes, the old
array is no longer found. Both files are renamed into place when complete, so any number of processes may fill one folder, and
an interrupted filling goes on where it was.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxmed.config import VisualConfig
from jaxmed.data.embeddings import read_npy_header
from jaxmed.data.parallel import over_items
from jaxmed.data.prepare import Frame, Prepared, metadata_row, prepare
from jaxmed.data.volume_sources import kind_of, stamp
from jaxmed.errors import BadRecords, Problem, UserError

VERSION = "2"
"""Raise it whenever `prepare` comes to give other values for the same file and config"""
NOT_IN_KEY = ("cache", "augment", "metadata")
"""Fields that change no prepared value; of the metadata the volume's own row counts"""
LONGEST_NAME = 80
SHOWN = 20
"""Different notices of a filling that its log has"""
STALE = 24 * 3600
"""Seconds after which an unfinished file is nobody's any more"""


class Unwritable(UserError):
    """The cache's folder takes no more: the fault of no volume."""


@dataclass(frozen=True)
class Filled:
    written: int
    present: int
    """Volumes that were prepared already: in the cache, or .npy"""
    problems: tuple[Problem, ...]
    """Volumes that cannot be prepared, left out (`on_bad_record` skip)"""
    notices: dict[str, int]
    """What was said of volumes prepared now -> number of volumes"""
    seconds: float

    def lines(self) -> list[str]:
        """For the log."""
        done = f"volumes: {self.written} prepared in {self.seconds:.0f} s, {self.present} were prepared already"
        more = [f"volumes: {count} x {notice}" for notice, count in Counter(self.notices).most_common(SHOWN)]
        if len(self.notices) > SHOWN:
            more.append(f"volumes: {len(self.notices) - SHOWN} other notices, kept in the .json files of the cache")
        return [done, *more, *(f"volumes: left out {problem}" for problem in self.problems)]


def key_of(path: str, visual: VisualConfig) -> str:
    """What the prepared volume depends on, as a short name."""
    config = {name: value for name, value in dataclasses.asdict(visual.prepare).items() if name not in NOT_IN_KEY}
    row = metadata_row(path, visual.prepare)
    facts = [VERSION, os.path.realpath(path), stamp(path), visual.volume, config, dataclasses.asdict(row) if row else None]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def place_of(path: str, visual: VisualConfig) -> str:
    """The file that holds the prepared volume, there or not."""
    name = os.path.basename(os.path.normpath(path)).removesuffix(".gz").removesuffix(".nii")
    return os.path.join(visual.prepare.cache, f"{name[-LONGEST_NAME:]}-{key_of(path, visual)}.npy")


def prepared(path: str, visual: VisualConfig, tell: Callable[[str], None] | None = None) -> Prepared:
    """From the cache where the volume is there; else it is prepared, and kept if there is a cache. `tell` hears what should be
    said of a volume that was prepared now, and that it cannot be kept; without it that is an error (Unwritable)."""
    place = place_of(path, visual) if visual.prepare.cache else ""
    if place and (found := _read(place, visual)) is not None:
        return found
    found = prepare(path, visual)
    for notice in found.notices if tell else ():
        tell(f"{path}: {notice}")
    try:
        if place:
            _write(place, found)
    except Unwritable as error:
        if not tell:
            raise
        tell(f"{error}; going on without it")
    return found


def fill_cache(
    paths: Sequence[str],
    visual: VisualConfig,
    processes: int = 0,
    progress: bool = True,
    on_bad_record: Literal["stop", "skip"] = "stop",
) -> Filled:
    """Prepares every volume that the cache lacks, in several processes (0: one a core), each one volume at a time. Prepared
    .npy files need none. `progress`: a bar on stderr. A volume that cannot be prepared stops the filling (BadRecords) or is
    left out; a folder that takes no more always stops it. What was prepared until then stays."""
    if not visual.prepare.cache:
        raise UserError("no folder for prepared volumes; set visual.prepare.cache")
    started = time.monotonic()
    _clear_away(visual.prepare.cache)
    unique, missing, problems = sorted(set(paths)), [], []
    for path in unique:
        try:
            if kind_of(path) != "prepared" and not os.path.exists(place_of(path, visual)):
                missing.append(path)
        except UserError as error:
            problems.append(_problem(path, error))
    if problems and on_bad_record == "stop":
        raise BadRecords(problems)
    present, notices, written = len(unique) - len(missing) - len(problems), Counter(), 0
    results = over_items(functools.partial(_fill_one, visual=visual), missing, processes, "Preparing volumes", False, progress)
    with closing(results):
        for result in results:
            if isinstance(result, Problem):
                if on_bad_record == "stop":
                    raise BadRecords([result])
                problems.append(result)
                continue
            written += 1
            notices.update(result)
    return Filled(written, present, tuple(problems), dict(notices), time.monotonic() - started)


def _fill_one(path: str, visual: VisualConfig) -> tuple[str, ...] | Problem:
    try:
        return prepared(path, visual).notices
    except Unwritable:
        raise
    except UserError as error:
        return _problem(path, error)


def _problem(path: str, error: UserError) -> Problem:
    """The message without the path that it begins with."""
    return Problem(path, str(error).removeprefix(f"{path}: "))


def _read(place: str, visual: VisualConfig) -> Prepared | None:
    """None where nothing whole is there."""
    try:
        values = _read_values(place, visual.volume)
        with open(f"{place.removesuffix('.npy')}.json", encoding="utf-8") as file:
            about = json.load(file)
        frame = Frame(**{name: _tuples(value) for name, value in about["frame"].items()})
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    return Prepared(values[..., None], tuple(about["notices"]), frame)


def _read_values(place: str, size: tuple[int, ...]) -> np.ndarray:
    """[D, H, W] float32; ValueError if the file is another or cut short. Not np.load: threads read here, and it would parse
    two headers at once."""
    with open(place, "rb") as file:
        shape, dtype, fortran, _ = read_npy_header(file)
        if shape != size or dtype != np.float32:
            raise ValueError(f"{shape} {dtype}")
        return np.fromfile(file, dtype, math.prod(shape)).reshape(shape, order="F" if fortran else "C")


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _write(place: str, found: Prepared) -> None:
    about = json.dumps({"notices": found.notices, "frame": dataclasses.asdict(found.frame)})
    unfinished, described = f".{uuid.uuid4().hex}.part", f"{place.removesuffix('.npy')}.json"
    values = np.ascontiguousarray(found.values[..., 0])
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(described + unfinished, "w", encoding="utf-8") as file:
            file.write(about)
        os.replace(described + unfinished, described)
        with open(place + unfinished, "wb") as file:
            # np.save would not say what the system said of a full disk
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
            file.write(values.data)
        os.replace(place + unfinished, place)
    except OSError as error:
        for partial in (described + unfinished, place + unfinished):
            with contextlib.suppress(OSError):
                os.unlink(partial)
        raise Unwritable(
            f"{os.path.dirname(place)}: prepared volumes cannot be kept there ({error.strerror or error}); free space, or give "
            "another folder as visual.prepare.cache"
        ) from None


def _clear_away(cache: str) -> None:
    """Removes what killed processes left unfinished."""
    with contextlib.suppress(OSError), os.scandir(cache) as entries:
        for entry in entries:
            if entry.name.endswith(".part") and time.time() - entry.stat().st_mtime > STALE:
                os.unlink(entry.path)
