"""A record as token ids and labels, and what beside tokenizer and template decides about them.

Image tokens enter in one of two ways: an IMAGE_ID in `ids` is replaced by as many positions as the image has tokens, or
(`image_start` >= 0) the row has these positions already and the image's tokens lie on ids[image_start : image_start + places].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxmed.config import Experiment
from jaxmed.data.tokenizer import IGNORE, IMAGE_ID


@dataclass(frozen=True)
class Example:
    ids: np.ndarray
    """[T] int32, IMAGE_ID at an image's place"""
    labels: np.ndarray
    """[T] int32, IGNORE where not supervised"""
    voided: str
    """"" or why no token of the sample is supervised, and what to do"""
    image_start: int = -1
    """First of the positions that image tokens take from the text's own; -1: there are none, images stand at IMAGE_ID"""


@dataclass(frozen=True)
class TextOptions:
    """Experiment settings that texts depend on. The defaults suit templates with `<image>` and records that are not cut."""

    places: int = 0
    """Placeholders that stand for one image (template `m3d`)"""
    max_length: int = 0
    """Tokens after which a sample is cut, 0: never"""
    pad_id: int = -1
    """Id that fills rows up to `max_length`, -1: the tokenizer's padding"""
    splice: Literal["offset", "placeholders"] = "offset"
    """Image tokens go to positions 1, 2, ... or to the placeholders (template `m3d`)"""
    missing_image_token: Literal["refuse", "prepend", "text_only"] = "refuse"
    """What becomes of a record that has an image and no `<image>`"""
    fill: bool = False
    """Whether rows are filled: a fusion that reads the whole row reads its padding"""


def text_options(experiment: Experiment) -> TextOptions:
    data, fusion = experiment.data, experiment.model.fusion
    fill = fusion.kind != "none" and fusion.text_scope == "all"
    places = experiment.image_tokens
    return TextOptions(places, data.max_length, data.pad_id, data.splice, data.missing_image_token, fill)


def spliced_counts(example: Example, places: Sequence[int], max_length: int) -> tuple[int, int]:
    """(length, supervised tokens) once image i of the sample takes places[i] positions and what comes after `max_length` is
    cut off (0: nothing is). Upstream cuts twice: the ids (as here they are), and what has become of them with images in."""
    repeats = np.ones(len(example.ids), np.int64)
    if example.image_start < 0:
        repeats[example.ids == IMAGE_ID] = places
    length = int(repeats.sum())
    position = np.cumsum(repeats) - repeats
    kept = (position < max_length) if max_length else np.ones(len(position), bool)
    # Nothing comes before the first token, so a label there can never be asked for.
    supervised = int(((example.labels != IGNORE) & kept & (position > 0)).sum())
    return (min(length, max_length) if max_length else length), supervised
