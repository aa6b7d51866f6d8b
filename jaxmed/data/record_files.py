"""How a file of records is named on a command line: the file, and behind colons how it is read.

    M3D_Cap.json:train                 one of the lists of a file
    M3D_VQA_test.csv:open              questions without their choices
    dataset.json:validation            AMOS-MM: a record for each region's report; with :chest, of that region alone
    dataset.json:validation:vqa        AMOS-MM: a record for each question; with :letter_text the target is letter and text
    train_reports.csv:regions:first    CT-RATE: a record a region, of the first reconstruction of each scan alone
    mix.json                           several of these (jaxmed.data.mixture)

All commands take the same names, so that what was trained on is what is generated and scored.
"""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxmed.data.captions import FIXED, Prompts
from jaxmed.data.regions import REGIONS
from jaxmed.errors import UserError

Folder = Literal["volumes", "images", "embeddings"]
"""Fields that name the folder of a data set's image files"""
MissingImageToken = Literal["refuse", "prepend", "text_only"]
WORDS: dict[str, dict[str, Any]] = {
    "report": {"task": "report"},
    "vqa": {"task": "vqa"},
    "closed": {"questions": "closed"},
    "open": {"questions": "open"},
    "letter": {"choices": "letter"},
    "letter_text": {"choices": "letter_text"},
    "regions": {"by_region": True},
    "first": {"first_reconstruction": True},
    **{region: {"region": region} for region in REGIONS},
}
"""What may stand behind a file, beside the name of one of its lists, and the fields of a Reading that it sets."""


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
    """Whether choices are named, and the answer is one of them"""
    split: str = ""
    """Which list of a JSON object of several (M3D's captions: train, validation, test, ...)"""
    prompts: Prompts = FIXED
    """Questions of reports that have none: the first is asked, training draws among all"""
    task: Literal["report", "vqa"] = "report"
    """Which of AMOS-MM's two tasks"""
    choices: Literal["", "letter", "letter_text"] = ""
    """Target of AMOS-MM's questions, "": the bare letter, as published"""
    by_region: bool = False
    """CT-RATE: a record for each region that the report says something about"""
    region: str = ""
    """Records of one region alone"""
    first_reconstruction: bool = False
    """CT-RATE: of the reconstructions of one scan, which share a report, the first"""
    unanswered: bool = False
    """Reports without text are asked for (a test set), not a fault"""


@dataclass(frozen=True)
class RecordsFile:
    path: str
    """The file on disk"""
    split: str = ""
    """One of its lists"""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of a Reading"""


def parse(name: str) -> RecordsFile:
    """A file whose own name has colons is that file."""
    path, words = name, []
    while not os.path.exists(path) and ":" in os.path.basename(path):
        path, _, word = path.rpartition(":")
        words.insert(0, word)
    if not os.path.exists(path):
        return RecordsFile(name)
    splits = [word for word in words if word not in WORDS]
    if len(splits) > 1 or "" in splits:
        raise UserError(
            f"{name}: behind the file stand {', '.join(map(repr, splits))}; one of them may name a list of the file, the "
            f"others must be of {', '.join(WORDS)}"
        )
    fields: dict[str, Any] = {}
    for word in words:
        for key, value in WORDS.get(word, {}).items():
            if fields.setdefault(key, value) != value:
                raise UserError(f"{name}: {word} contradicts what stands before it; leave one of them out")
    return RecordsFile(path, splits[0] if splits else "", fields)


def records_file(name: str) -> str:
    """The file on disk; `name` as it is where there is none."""
    return parse(name).path
