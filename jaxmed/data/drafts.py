"""What a reader of one kind of file makes of an entry, before it becomes a Record: image, question, answer, and what is known
beside them."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxmed.data.record_files import Reading

VOLUME_ENDINGS = (".nii.gz", ".nii", ".npy", ".npz")


@dataclass
class Draft:
    id: str
    """"": its row number"""
    image: str
    question: str
    answer: str | None
    """None where there is none yet"""
    prompts: tuple[str, ...] = ()
    """Questions that might stand for `question`, itself the first, where the data set has none of its own"""
    values: dict[str, Any] = field(default_factory=dict)
    """The entry's other keys"""
    fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of the Record: region, options, answer, question_type, patient"""

    def json(self) -> dict[str, Any]:
        """The record as LLaVA's files have it."""
        turns = [{"from": "human", "value": self.question}]
        turns += [] if self.answer is None else [{"from": "gpt", "value": self.answer}]
        return self.values | ({"id": self.id} if self.id else {}) | {"image": self.image, "conversations": turns}


def case_name(image: str) -> str:
    """`./imagesTr/amos_0001.nii.gz` -> `amos_0001`"""
    name = os.path.basename(image.strip().rstrip("/"))
    ending = next((ending for ending in VOLUME_ENDINGS if name.endswith(ending)), "")
    return name[: len(name) - len(ending)]


def listed_choices(options: Mapping[str, str]) -> str:
    """` Choices: A. one B. two`"""
    return " Choices:" + "".join(f" {letter}. {text}" for letter, text in options.items())


def region_drafts(image: str, texts: Mapping[str, str | None], reading: Reading, name: str = "") -> Iterator[Draft]:
    """A draft for each region's text (None: a question without an answer)."""
    for region, text in texts.items():
        if reading.region in ("", region):
            prompts = reading.prompts.of(region)
            yield Draft(f"{name or case_name(image)}/{region}", image, prompts[0], text, prompts, fields={"region": region})
