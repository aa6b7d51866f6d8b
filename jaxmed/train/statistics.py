"""Fixed statistics of the visual input (`visual.norm`): mean and deviation of every feature at every token position.

They are computed once, over the token files of the training set, before the first step; they are saved with the trainable half
and never updated. N tokens an image, C features.
"""

import numpy as np

from jaxmed.config import VisualConfig
from jaxmed.data.dataset import Dataset
from jaxmed.data.embeddings import load_tokens, merge_neighbours, unpack_codes
from jaxmed.errors import UserError

FLOOR = 0.01
"""Added to the deviation: a feature that never changes stays near 0 instead of growing without bound"""


def token_statistics(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """-> mean, sd, both [N, C] float32; 0 and 1 at positions that no file fills. Every file counts once, in order of name."""
    visual = dataset.experiment.visual
    total = np.zeros((visual.tokens, visual.features))
    squares, count = np.zeros_like(total), np.zeros((visual.tokens, 1))
    paths = sorted({path for sample in dataset.samples for path in sample.paths})
    for path in paths:
        try:
            values = float_tokens(path, visual)
        except UserError:
            if dataset.experiment.data.on_bad_record == "stop":
                raise
            continue  # the loader leaves its sample out as well, and says so
        total[: len(values)] += values
        squares[: len(values)] += np.square(values)
        count[: len(values)] += 1
    seen = np.maximum(count, 1)
    mean = total / seen
    variance = np.maximum(squares / seen - np.square(mean), 0)
    sd = np.where(count > 0, np.sqrt(variance) + FLOOR, 1.0)
    return mean.astype(np.float32), sd.astype(np.float32)


def float_tokens(path: str, visual: VisualConfig) -> np.ndarray:
    """Tokens of a file as the projector takes them, [N, C] float64; packed codes become ±1."""
    values, grid = load_tokens(path, visual)
    if visual.kind != "codes":
        return values.astype(np.float64)
    t, h, w = (n * m for n, m in zip(grid, visual.merge, strict=True))
    bits = unpack_codes(values.reshape(t, h, w))
    if visual.channel_order == "reverse":
        bits = bits[::-1]
    merged = merge_neighbours(bits, visual.merge)
    return merged.reshape(len(merged), -1).T.astype(np.float64)
