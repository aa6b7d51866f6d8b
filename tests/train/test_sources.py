"""What a run left out: records of both files, each listed once."""

import dataclasses
import json
from pathlib import Path

from golden_runs import GOLDEN, experiment

from jaxmed.errors import Problem
from jaxmed.train.folder import Skipped
from jaxmed.train.sources import open_data
from jaxmed.train.writer import read_rows


def test_held_out_records_that_are_left_out_count_too(tmp_path: Path) -> None:
    good = json.loads((GOLDEN / "records_batch.json").read_text())
    empty = {"id": "empty", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": ""}]}
    paths = [tmp_path / "train.json", tmp_path / "valid.json"]
    paths[0].write_text(json.dumps([*good, {"id": "broken", "conversations": []}]))
    paths[1].write_text(json.dumps([empty, *good]))
    e = experiment("train_zero2")
    data = dataclasses.replace(e.data, records=str(paths[0]), eval_records=str(paths[1]), on_bad_record="skip")
    sources = open_data(dataclasses.replace(e, data=data), str(tmp_path))
    assert [problem.where for problem in sources.left_out] == [
        f"{paths[0]}: record 2 (id 'broken')",
        f"{paths[1]}: record 0 (id 'empty')",
    ]


def test_a_record_left_out_in_every_epoch_is_listed_once(tmp_path: Path) -> None:
    known, later = Problem("a.json: record 3", "no turns"), Problem("a.json: record 7", "NaN")
    skipped = Skipped(str(tmp_path), [known], 0)
    assert [skipped.add(problem, step) for step, problem in ((2, later), (5, later), (6, known))] == [True, False, False]
    skipped.close()
    assert [(row["where"], row["step"]) for row in read_rows(skipped.path)] == [(known.where, 0), (later.where, 2)]
    resumed = Skipped(str(tmp_path), [known], 4)
    assert resumed.count == 2 and not resumed.add(later, 5)
    resumed.close()
