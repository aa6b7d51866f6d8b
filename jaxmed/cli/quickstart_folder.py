"""What the quickstarts share: the folder of one set of flags, the clock over interrupted calls, reports and their findings."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmed.cli import generate
from jaxmed.data.phantom_dataset import PhantomDataset
from jaxmed.data.phantom_reports import FindingScores, build_tokenizer, score_findings
from jaxmed.data.records import load_records
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import UserError
from jaxmed.generate.journal import write_json


class Clock:
    """Seconds of all calls together: those of earlier, interrupted ones are kept beside the data."""

    def __init__(self, out: str):
        self.path, self.last = os.path.join(out, "seconds.json"), time.monotonic()
        self.stages: dict[str, float] = {}
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                self.stages = json.load(file)

    def done(self, stage: str) -> None:
        now = time.monotonic()
        self.stages[stage] = round(self.stages.get(stage, 0.0) + now - self.last, 1)
        self.last = now
        write_json(self.path, self.stages)

    @property
    def total(self) -> float:
        return round(sum(self.stages.values()), 1)


def open_folder(out: str, flags: Mapping[str, Any]) -> None:
    """The folder belongs to one set of flags."""
    path = os.path.join(out, "quickstart.json")
    try:
        os.makedirs(out, exist_ok=True)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
            differ = [k for k in {**flags, **found} if found.get(k) != flags.get(k)]
            if differ:
                absent = "absent"
                pairs = ", ".join(
                    f"--{k.replace('_', '-')} {found.get(k, absent)} there, {flags.get(k, absent)} now" for k in differ
                )
                raise UserError(f"{out} was begun with other flags ({pairs}); give another --out, or the same flags")
        else:
            write_json(path, dict(flags))
    except OSError as error:
        raise UserError(f"{out}: cannot be made or read ({error.strerror}); give another --out") from error


def words_of(records_path: str, folder: str) -> int:
    """A tokenizer of the records' words in `folder`, where none is yet; -> its size."""
    if not os.path.exists(folder):
        records, _ = load_records(records_path)
        build_tokenizer([turn.value for record in records for turn in record.turns], f"{folder}.part")
        os.replace(f"{folder}.part", folder)
    return Tokenizer.from_folder(folder).size


def write_reports(run: str, records: str, inputs: Sequence[str], path: str, control: str) -> str:
    """A result file: reports with the model's own volumes, or with another study's. `inputs`: flags of the images' folder."""
    flags = ["--records", records, *inputs, "--out", path]
    flags += ["--dtype", "float32", "--max-new-tokens", "64", "--batch", "64"]
    flags += ["--control", control] if control else []
    code = generate.run([run, *flags])
    if code:
        raise UserError(f"reports could not be written to {path}")
    return path


def findings(path: str, data: PhantomDataset) -> FindingScores:
    """What a result file says against what was drawn."""
    with open(path, encoding="utf-8") as file:
        studies = json.load(file)
    with open(data.labels, encoding="utf-8") as file:
        labels = json.load(file)
    texts = {answer["id"]: answer["answer"] for study in studies for answer in study["conversations_out"]}
    return score_findings(texts, labels)
