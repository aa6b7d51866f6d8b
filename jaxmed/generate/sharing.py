"""What the prompts of one study have in common, so that the volume goes through the decoder once.

Prompts about the same images begin alike: with the template's head, the images, and the words that their questions share. That
part is a row's prefix; what is left of each prompt is a branch of the row (jaxmed.nn.cache). Nothing is shared where an image
stands behind the first difference, or where image tokens depend on the text (SAMF's fusion).

Axis letters: R branches a row, U tokens of a branch's rest.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxmed.config import Experiment
from jaxmed.data.tokenizer import IMAGE_ID
from jaxmed.generate.prompts import Prompt, Rest, places, power_of_two, prompt_length

BRANCHES = (1, 2, 3, 4, 8, 16, 32)
"""Numbers of branches that programs are compiled for; a program is cheap beside a wrong one of them in every decode step"""
SHORTEST_REST = 16


@dataclasses.dataclass(frozen=True)
class Split:
    """How the prompts of a study are laid out."""

    length: int
    """Leading ids that all prompts share, as `Prompt.ids` has them; 0: each prompt is a row of its own"""
    branches: int
    """R, prompts that a row holds at most"""
    rest: int
    """U"""


ALONE = Split(0, 1, 0)


def split_of(prompts: Sequence[Prompt], experiment: Experiment, most: int, ahead: int) -> Split:
    """Depends on the prompts alone, so give all of a study, those that are answered already too. They show the same images.

    most: branches of a row at most; ahead: tokens that may follow a prompt.
    """
    first = prompts[0]
    alike = {(len(p.images), p.image_start) for p in prompts}
    if len(prompts) < 2 or most < 2 or not first.images or len(alike) > 1 or experiment.model.fusion.kind != "none":
        return ALONE
    rope = experiment.model.decoder.rope
    reaches = {prompt_length(p, experiment) - 1 + ahead >= rope.original_positions for p in prompts}
    if rope.scaling == "longrope" and len(reaches) > 1:
        return ALONE  # cached keys are rotated by one list of frequencies or the other
    length = _common(prompts, experiment)
    behind = first.image_start + _image_places(first, experiment) if first.image_start >= 0 else 0
    if length < max(behind, 1) or any((p.ids[length:] == IMAGE_ID).any() for p in prompts):
        return ALONE
    longest = max(len(p.ids) for p in prompts) - length
    fitting = min((count for count in BRANCHES if count >= len(prompts)), default=most)
    return Split(length, min(fitting, most), power_of_two(longest, SHORTEST_REST))


def _common(prompts: Sequence[Prompt], experiment: Experiment) -> int:
    """Leading ids that are equal, the last one of every prompt aside. What stands below image tokens does not count."""
    length = min(len(p.ids) for p in prompts) - 1
    ids = np.stack([p.ids[:length] for p in prompts])
    start = prompts[0].image_start
    if start >= 0:
        ids[:, start : start + _image_places(prompts[0], experiment)] = 0
    differ = np.flatnonzero((ids != ids[0]).any(axis=0))
    return int(differ[0]) if len(differ) else length


def _image_places(prompt: Prompt, experiment: Experiment) -> int:
    return sum(places(image, experiment) for image in prompt.images)


def prefix_of(prompt: Prompt, split: Split) -> Prompt:
    return dataclasses.replace(prompt, ids=prompt.ids[: split.length])


def rest_of(
    rows: Sequence[tuple[Sequence[Prompt], Split]], shape: tuple[int, int, int], experiment: Experiment, ahead: int
) -> Rest:
    """numpy Rest of shape [B, R, U]: the prompts of each row first, then empty branches, then empty rows."""
    tokens, positions, valid = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    reach = np.zeros(shape[0], np.int32)
    for r, (prompts, split) in enumerate(rows):
        for b, prompt in enumerate(prompts):
            more, total = prompt.ids[split.length :], prompt_length(prompt, experiment)
            at = np.s_[r, b, shape[2] - len(more) :]
            tokens[at], valid[at] = more, True
            positions[at] = np.arange(total - len(more), total)
            reach[r] = max(reach[r], total - 1 + ahead)
    return Rest(tokens, positions, valid, reach, shape[1])
