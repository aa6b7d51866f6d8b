"""A handful of training examples as one batch, one sample a row, for losses from Python (data sets go through jaxmed.data).

Axis letters: B rows, T text, M supervised positions.
"""

from collections.abc import Sequence

import numpy as np

from jaxmed.config import Experiment
from jaxmed.data.conversation import Example
from jaxmed.data.tokenizer import IGNORE, IMAGE_ID
from jaxmed.generate.prompts import Bucket, Image, Prompt, bucket_of, left_padded, prompt_length
from jaxmed.types import Batch

LENGTH_STEP = 64


def training_batch(
    examples: Sequence[Example], images: Sequence[tuple[Image, ...]], rows: int, multiple: int, experiment: Experiment
) -> Batch:
    """numpy Batch with a multiple of `rows` rows and T a multiple of `multiple`; rows lie at the right end of T."""
    prompts = [Prompt(e.ids, i) for e, i in zip(examples, images, strict=True)]
    buckets = [bucket_of(p, experiment) for p in prompts]
    count, tokens, stride = (max(getattr(b, name) for b in buckets) for name in ("images", "tokens", "stride"))
    longest = max(prompt_length(p, experiment) for p in prompts)
    step = LENGTH_STEP * multiple
    length = -(-max(longest, count * stride + 1) // step) * step
    bucket = Bucket(count, tokens, stride, length - count * stride)
    total = -(-len(prompts) // rows) * rows
    batch = left_padded(prompts, total, bucket, experiment)
    most = max(max(int((e.labels != IGNORE).sum()) for e in examples), 1)
    supervised, labels = np.full((total, most), -1, np.int32), np.zeros((total, most), np.int32)
    for row, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        width = np.ones(len(example.ids), np.int64)
        width[example.ids == IMAGE_ID] = [_places(image, stride, tokens) for image in prompt.images]
        start = length - int(width.sum()) + np.cumsum(width) - width  # first position of each id
        wanted = np.flatnonzero(example.labels != IGNORE)
        supervised[row, : len(wanted)] = start[wanted] - 1
        labels[row, : len(wanted)] = example.labels[wanted]
    return Batch(**{**batch.__dict__, "supervised": supervised, "labels": labels})


def _places(image: Image, stride: int, tokens: int) -> int:
    return int(np.prod(image.grid)) if stride == tokens else stride
