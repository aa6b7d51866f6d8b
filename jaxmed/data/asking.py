"""What a report without a question of its own is asked with: one of its prompts, drawn anew for each sample and epoch in
training, always the first otherwise. Sizes hold for every prompt, so that a plan does not depend on what is drawn."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jaxmed.data.examples import TextOptions
from jaxmed.data.records import Record, Turn
from jaxmed.data.sizes import Progress, TextSize, text_sizes
from jaxmed.data.tokenizer import Tokenizer

_PROMPT = 17
"""Last word of the key under which a prompt is drawn"""


def asked_with(record: Record, prompt: str) -> Record:
    """A record that has no question of its own, asked with another of its prompts."""
    first, *others = record.turns
    question = first.value.removesuffix(record.prompts[0]) + prompt
    return dataclasses.replace(record, turns=(Turn(first.role, question), *others))


def drawn(record: Record, seed: int, key: tuple[int, int, int]) -> Record:
    """The record as the sample with this key (see GlobalBatch.key) asks it; nothing is drawn in evaluation."""
    if len(record.prompts) < 2 or key[0] < 0:
        return record
    draw = int(np.random.Philox(np.random.SeedSequence([seed, *key, _PROMPT])).random_raw())
    return asked_with(record, record.prompts[draw % len(record.prompts)])


def variants(record: Record, tokenizer: Tokenizer) -> tuple[Record, ...]:
    """The record with its longest and its shortest prompt, which any other lies between; itself where it has no choice."""
    if len(record.prompts) < 2:
        return (record,)
    return tuple(asked_with(record, prompt) for prompt in _extremes(record.prompts, tokenizer))


@functools.lru_cache(maxsize=64)
def _extremes(prompts: tuple[str, ...], tokenizer: Tokenizer) -> tuple[str, str]:
    lengths = {prompt: len(tokenizer.encode(prompt, special=False)) for prompt in prompts}
    return max(prompts, key=lengths.__getitem__), min(prompts, key=lengths.__getitem__)


def asked_sizes(
    records: Sequence[Record],
    path: str,
    tokenizer: Tokenizer,
    template: str,
    progress: Progress | None,
    options: TextOptions,
) -> list[TextSize]:
    """text_sizes that hold for every prompt: the length is the longest one's; where texts are cut, the shortest leaves most
    of the answer."""
    asked = [variants(record, tokenizer) for record in records]
    several = [place for place, each in enumerate(asked) if options.max_length and len(each) > 1]
    every = [each[0] for each in asked] + [asked[place][1] for place in several]
    sizes = text_sizes(every, path, tokenizer, template, progress, options)
    for place, short in zip(several, sizes[len(records) :], strict=True):
        sizes[place] = dataclasses.replace(sizes[place], supervised=max(sizes[place].supervised, short.supervised))
    return sizes[: len(records)]
