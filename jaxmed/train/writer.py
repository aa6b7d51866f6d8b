"""What a run tells: rows of metrics.jsonl, TensorBoard scalars, a progress line. Process 0 alone writes.

A row of metrics.jsonl is one JSON object: `step`, `loss`, `learning_rate`, `grad_norm`, `supervised_tokens` (of that step),
`tokens_per_second`, `data_wait`, `seconds` (of the steps since the row before: tokens without padding over `seconds`, seconds
waited for data, seconds of the clock). Rows of an evaluation have `step`, `eval_loss`, `eval_tokens`, `seconds`. Contrastive
pretraining counts `pairs` and `pairs_per_second`, says its `accuracy`, and evaluates retrieval (see jaxmed.train.tasks).
"""

import errno
import json
import math
import os
import socket
import struct
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from jaxmed.errors import UserError

METRICS = "metrics.jsonl"
PLAIN_SECONDS = 10.0
"""Between progress lines where there is no terminal"""


def read_rows(path: str) -> list[dict[str, Any]]:
    """Whole rows of a JSONL file; a torn last line (the process was killed while writing) is left out."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):
                    break
                rows.append(json.loads(line))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{path}: line {len(rows) + 1} is not JSON ({error}); remove the line or the run") from error
    return rows


def cut_rows(path: str, last_step: int) -> None:
    """Drops rows of steps after `last_step`: a resumed run writes them again."""
    if os.path.exists(path):
        kept = [row for row in read_rows(path) if row.get("step", 0) <= last_step]
        replace_file(path, "".join(json.dumps(row) + "\n" for row in kept))


def replace_file(path: str, text: str) -> None:
    """Writes a file whole or not at all."""
    try:
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
    except OSError as error:
        raise _full(error, path) from error


def _full(error: OSError, path: str) -> BaseException:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: the disk is full; free some space and run the same command again to go on")
    return error


class JsonLines:
    """Appends rows; each is on its way to the disk before `add` returns."""

    def __init__(self, path: str):
        self.path = path
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (kept open as long as the run)

    def add(self, row: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise _full(error, self.path) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # what a full disk did not take is still in the buffer
            raise _full(error, self.path) from error


class Scalars:
    """TensorBoard's event file. Written here and now: tensorboardX's own writer has a thread, whose errors reach nobody."""

    def __init__(self, folder: str, first_step: int):
        """What earlier event files of the folder have from `first_step` on is void."""
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, f"events.out.tfevents.{time.time_ns() // 10**6}.{socket.gethostname()}")
        self._file = open(self.path, "wb")  # noqa: SIM115 (kept open as long as the run)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: dict[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Event) -> None:
        data = event.SerializeToString()
        header = struct.pack("<Q", len(data))
        try:
            self._file.write(header + struct.pack("<I", masked_crc32c(header)))
            self._file.write(data + struct.pack("<I", masked_crc32c(data)))
            self._file.flush()
        except OSError as error:
            raise _full(error, self.path) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise _full(error, self.path) from error


class Writer:
    """The voice of process 0; the other processes have `Silent`."""

    def __init__(self, run: str, start: int, total: int):
        """`start`: steps done. Rows beyond it, of a run that was killed, are dropped."""
        path = os.path.join(run, METRICS)
        cut_rows(path, start)
        self._rows = JsonLines(path)
        self._board = Scalars(os.path.join(run, "tensorboard"), start + 1)
        self._line = ProgressLine(start, total)

    def step(self, row: dict[str, Any], shown: dict[str, Any]) -> None:
        """`shown`: what the progress line has beyond the row (`mfu`, 0 where the chip's peak is not known)."""
        self._rows.add(row)
        drawn = {name: value for name, value in row.items() if name not in ("step", "seconds", "supervised_tokens", "pairs")}
        self._board.add(row["step"], {f"train/{name}": value for name, value in drawn.items()})
        self._line.step(row | shown)

    def evaluation(self, row: dict[str, Any]) -> None:
        self._rows.add(row)
        counted, found = [], {}
        for name, value in row.items():
            if name.startswith("eval_"):
                name = name.removeprefix("eval_")
                counted += [f"{value} {name}"] if isinstance(value, int) else []
                found |= {} if isinstance(value, int) else {name: value}
        self._board.add(row["step"], {f"eval/{name}": value for name, value in found.items()})
        others = "".join(f", {name} {value:.3f}" for name, value in found.items() if name != "loss")
        self._line.say(f"step {row['step']}: evaluation loss {row['eval_loss']:.4f} over {', '.join(counted)}{others}")

    def say(self, text: str) -> None:
        self._line.say(text)

    def close(self) -> None:
        self._line.close()
        self._board.close()
        self._rows.close()


class Silent:
    """The writer of every process but the first."""

    def step(self, row: dict[str, Any], shown: dict[str, Any]) -> None: ...

    def evaluation(self, row: dict[str, Any]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class ProgressLine:
    """One line that moves on a terminal; elsewhere a line now and then."""

    def __init__(self, start: int, total: int):
        self.total, self.console = total, Console(file=sys.stderr)
        self._first: tuple[int, float] | None = None  # step and moment of the first row: before it is compilation
        self._told = -math.inf
        self._bar: Progress | None = None
        if self.console.is_terminal:
            columns = (TextColumn("{task.fields[text]}"), BarColumn(bar_width=None), TextColumn("{task.fields[left]}"))
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=total, completed=start, text="compiling the step ...", left="")
            self._bar.start()

    def step(self, row: dict[str, Any]) -> None:
        text = f"step {row['step']}/{self.total}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  {speed(row)}"
        text += f"  MFU {row['mfu']:.0%}" if row["mfu"] else ""
        now = time.perf_counter()
        left = self._left(row["step"], now)
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], text=text, left=left)
        elif now - self._told >= PLAIN_SECONDS or row["step"] == self.total:
            self._told = now
            print(f"{text}  {left}".rstrip(), file=sys.stderr, flush=True)

    def _left(self, step: int, now: float) -> str:
        """Time left; "" where it cannot be known yet, or is over."""
        self._first = self._first or (step, now)
        steps, seconds = step - self._first[0], now - self._first[1]
        return f"{duration(seconds / steps * (self.total - step))} left" if steps > 0 and step < self.total else ""

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def speed(row: dict[str, Any]) -> str:
    """`12,346 tokens/s`, `3.2 pairs/s`"""
    name = next(name for name in row if name.endswith("_per_second"))
    digits = 0 if row[name] >= 100 else 1
    return f"{row[name]:,.{digits}f} {name.removesuffix('_per_second')}/s"


def duration(seconds: float) -> str:
    """`1 d 4 h`, `2 h 05 min`, `3 min 20 s`, `12 s`"""
    seconds = round(seconds)
    if seconds >= 86400:
        return f"{seconds // 86400} d {seconds % 86400 // 3600} h"
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"
