"""The folder of a run: its config, which a run that goes on must share, and the list of what was skipped.

config.json  metrics.jsonl  checkpoints/STEP/  tokenizer/  skipped.jsonl  tensorboard/
"""

import json
import os
from collections.abc import Iterable
from typing import Any

import jax

from jaxmed.checkpoint.manager import FOLDER, complete_steps
from jaxmed.config import Experiment, to_dict, to_json
from jaxmed.distributed import barrier, is_first
from jaxmed.errors import Problem, UserError
from jaxmed.train.writer import METRICS, JsonLines, read_rows, replace_file

CONFIG = "config.json"
MAY_DIFFER = ("mesh.", "distributed.", "data.prefetch", "data.threads")
MAY_DIFFER += ("train.save_every", "train.eval_every", "train.log_every", "train.keep")
"""Fields that change where, how fast and how often, never what is trained"""


def open_run(out: str, experiment: Experiment) -> None:
    """Makes the folder or checks that it is a run of the same config. All processes look before the first one writes."""
    path = os.path.join(out, CONFIG)
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"--out {out} is a file; give the folder of the run")
    if os.path.exists(path):
        before = _read(path)
        if complete_steps(os.path.join(out, FOLDER)) or read_rows(os.path.join(out, METRICS)):
            _check_same(out, before, experiment)
    barrier("config compared")
    if is_first():
        try:
            os.makedirs(out, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: the folder cannot be made ({error.strerror}); give another one") from error
        replace_file(path, to_json(experiment))
    barrier("config written")


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give another --out") from error
    if not isinstance(values, dict) or not {"model", "visual", "train"} <= values.keys():
        raise UserError(f"{path} is not the config of a run; it would be overwritten, give another --out")
    return values


def _check_same(out: str, before: dict[str, Any], experiment: Experiment) -> None:
    old, new = _flat(before), _flat(json.loads(json.dumps(to_dict(experiment))))
    differ = [
        f"{name} was {old.get(name, 'absent')!r}, is {new.get(name, 'absent')!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(MAY_DIFFER)
    ]
    if differ:
        raise UserError(f"{out} is a run of another config: {'; '.join(differ)}. Use the old values, or another --out")


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return flat


class Skipped:
    """skipped.jsonl: records left out, and why. Those known before the first step have step 0. One file a process."""

    def __init__(self, out: str, known: Iterable[Problem], start: int):
        name = "skipped.jsonl" if is_first() else f"skipped-{jax.process_index()}.jsonl"
        path = os.path.join(out, name)
        rows = [_row(problem, 0) for problem in known] if is_first() else []
        rows += [row for row in read_rows(path) if 0 < row["step"] <= start]
        replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))
        self.path = path
        self._where = {row["where"] for row in rows}
        self._lines = JsonLines(path)

    def add(self, problem: Problem, step: int) -> bool:
        """Lists a record once, however many epochs it is left out of; whether it is new."""
        new = problem.where not in self._where
        if new:
            self._where.add(problem.where)
            self._lines.add(_row(problem, step))
        return new

    @property
    def count(self) -> int:
        """Records on the list."""
        return len(self._where)

    def close(self) -> None:
        self._lines.close()


def _row(problem: Problem, step: int) -> dict[str, Any]:
    return {"where": problem.where, "what": problem.what, "step": step}
