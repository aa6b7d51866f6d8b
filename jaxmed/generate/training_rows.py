"""A handful of training examples as one batch, one sample a row, for losses from Python (data sets go through jaxmed.data).

Axis letters: B rows, T text, M supervised positions.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxmed.config import Experiment
from jaxmed.data.conversation import Example
from jaxmed.data.inputs import VisualInput
from jaxmed.data.tokenizer import IGNORE
from jaxmed.generate.prompts import Bucket, Prompt, bucket_of, prompt_length, spliced_rows
from jaxmed.types import Batch

LENGTH_STEP = 64


def training_batch(
    examples: Sequence[Example], images: Sequence[tuple[VisualInput, ...]], rows: int, multiple: int, experiment: Experiment
) -> Batch:
    """numpy Batch with a multiple of `rows` rows and T a multiple of `multiple`; rows lie at the right end of T."""
    prompts = [Prompt(e.ids, i, e.image_start) for e, i in zip(examples, images, strict=True)]
    buckets = [bucket_of(p, experiment) for p in prompts]
    count, tokens, stride = (max(getattr(b, name) for b in buckets) for name in ("images", "tokens", "stride"))
    limit = experiment.data.max_length
    longest = max(min(prompt_length(p, experiment), limit or math.inf) for p in prompts)
    step = LENGTH_STEP * multiple
    length = -(-max(longest, count * stride + 1) // step) * step
    bucket = Bucket(count, tokens, stride, length - count * stride)
    total = -(-len(prompts) // rows) * rows
    batch, spliced = spliced_rows(examples, images, total, bucket, experiment, limit)
    most = max(max(int((row[1:] != IGNORE).sum()) for row in spliced), 1)
    supervised, labels = np.full((total, most), -1, np.int32), np.zeros((total, most), np.int32)
    for row, found in enumerate(spliced):
        before = np.flatnonzero(found[1:] != IGNORE)
        supervised[row, : len(before)] = length - len(found) + before
        labels[row, : len(before)] = found[before + 1]
    return dataclasses.replace(batch, supervised=supervised, labels=labels)
