"""From samples to the arrays of a Batch, as numpy, for any of a global batch's rows.

Shapes as in types.Batch, with R rows instead of B. An image's places in the text point into the row's image tokens, flattened
over images: place j of the row's image i is i * S + j, where S is visual.tokens, or pool_queries under an attention pool.
Nothing is shifted on the device: `supervised` holds position t where `labels` holds the token at t + 1 of the same sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxmed.config import Experiment
from jaxmed.data.conversation import Example, encode_training
from jaxmed.data.dataset import Dataset, Sample, images_per_row, text_places
from jaxmed.data.embeddings import Grid, load_tokens
from jaxmed.data.plan import GlobalBatch, capacity
from jaxmed.data.records import where
from jaxmed.data.tokenizer import IGNORE, IMAGE_ID
from jaxmed.errors import Problem, UserError

Arrays = dict[str, np.ndarray]
ALONG_T = ("tokens", "positions", "segment_ids", "image_index")


@dataclass(frozen=True)
class Loaded:
    """A sample with the values of its token files."""

    example: Example
    images: tuple[np.ndarray, ...]
    grids: tuple[Grid, ...]


def load_sample(dataset: Dataset, sample: Sample) -> Loaded:
    """Reads the sample's files; UserError names the file."""
    experiment = dataset.experiment
    example = encode_training(sample.record, dataset.tokenizer, experiment.data.template)
    images, grids = [], []
    for path, tokens in zip(sample.paths, sample.tokens, strict=True):
        values, grid = load_tokens(path, experiment.visual)
        if math.prod(grid) != tokens:
            raise UserError(
                f"{path}: had {tokens} tokens when it was checked and has {math.prod(grid)} now; start the run again"
            )
        images.append(values)
        grids.append(grid)
    return Loaded(example, tuple(images), tuple(grids))


def splice(example: Example, places: Sequence[int], stride: int, first_image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, labels and image_index, each [T] int32, with image i of the sample spread over places[i] positions."""
    at = np.flatnonzero(example.ids == IMAGE_ID)
    repeats = np.ones(len(example.ids), np.int64)
    repeats[at] = places
    source = np.repeat(np.arange(len(repeats)), repeats)
    tokens = np.where(example.ids == IMAGE_ID, 0, example.ids)[source].astype(np.int32)
    labels = example.labels[source].astype(np.int32)
    image_index = np.full(len(source), -1, np.int32)
    starts = np.cumsum(repeats) - repeats
    for number, (start, count) in enumerate(zip(starts[at].tolist(), places, strict=True)):
        image_index[start : start + count] = (first_image + number) * stride + np.arange(count)
    return tokens, labels, image_index


def empty_rows(experiment: Experiment, rows: int, bucket: int) -> Arrays:
    """Arrays of rows that hold nothing."""
    visual, images = experiment.visual, images_per_row(experiment)
    tokens = visual.tokens if images else 0
    supervised = capacity(experiment.data, images, bucket)[1]
    if visual.kind == "codes":
        values = np.zeros((rows, images, tokens * math.prod(visual.merge)), np.uint32)
    else:
        values = np.zeros((rows, images, tokens, visual.features), np.float32)
    return {
        "tokens": np.zeros((rows, bucket), np.int32),
        "positions": np.zeros((rows, bucket), np.int32),
        "segment_ids": np.zeros((rows, bucket), np.int32),
        "image_index": np.full((rows, bucket), -1, np.int32),
        "supervised": np.full((rows, supervised), -1, np.int32),
        "labels": np.zeros((rows, supervised), np.int32),
        "images": values,
        "image_token_mask": np.zeros((rows, images, tokens), bool),
        "image_grid": np.zeros((rows, images, 3), np.int32),
    }


class _Row:
    """One row of the arrays while samples are appended to it."""

    def __init__(self, arrays: Arrays, row: int):
        self.arrays = {name: array[row] for name, array in arrays.items()}
        self.length = self.supervised = self.images = 0

    def append(self, loaded: Loaded, places: Sequence[int], stride: int, segment: int) -> None:
        tokens, labels, image_index = splice(loaded.example, places, stride, self.images)
        span = slice(self.length, self.length + len(tokens))
        self.arrays["tokens"][span] = tokens
        self.arrays["positions"][span] = np.arange(len(tokens))
        self.arrays["segment_ids"][span] = segment
        self.arrays["image_index"][span] = image_index
        before = np.flatnonzero(labels[1:] != IGNORE)
        spot = slice(self.supervised, self.supervised + len(before))
        self.arrays["supervised"][spot] = self.length + before
        self.arrays["labels"][spot] = labels[before + 1]
        for image, (values, grid) in enumerate(zip(loaded.images, loaded.grids, strict=True), self.images):
            self.arrays["images"][image, : len(values)] = values
            self.arrays["image_token_mask"][image, : math.prod(grid)] = True
            self.arrays["image_grid"][image] = grid
        self.length += len(tokens)
        self.supervised += len(before)
        self.images += len(loaded.images)


def build_rows(dataset: Dataset, batch: GlobalBatch, rows: Sequence[int]) -> tuple[Arrays, list[Problem]]:
    """Arrays of these rows of the batch, in natural order along T, and the samples that were left out.

    A sample whose files cannot be read is an error, or, with `on_bad_record skip`, is left out of its row: the others move up
    and keep their segment ids.
    """
    experiment = dataset.experiment
    arrays, problems = empty_rows(experiment, len(rows), batch.bucket), []
    stride = text_places(experiment, experiment.visual.tokens)
    offsets = batch.offsets
    for place, row_number in enumerate(rows):
        row = _Row(arrays, place)
        for segment, index in enumerate(batch.rows[row_number], 1 + offsets[row_number]):
            sample = dataset.samples[index]
            try:
                loaded = load_sample(dataset, sample)
            except UserError as error:
                problem = Problem(where(sample.record), str(error))
                if experiment.data.on_bad_record == "stop":
                    raise UserError(f"{problem}; or pass --on-bad-record skip to go on without it") from None
                problems.append(problem)
                continue
            row.append(loaded, [text_places(experiment, count) for count in sample.tokens], stride, segment)
    return arrays, problems


def permute_batch(arrays: Arrays, permutation: np.ndarray) -> Arrays:
    """The same rows with T permuted: place p then holds what permutation[p] held; `supervised` follows."""
    moved = np.empty(len(permutation), np.int32)
    moved[permutation] = np.arange(len(permutation), dtype=np.int32)
    supervised = arrays["supervised"]
    changed = {name: np.ascontiguousarray(arrays[name][:, permutation]) for name in ALONG_T}
    return {**arrays, **changed, "supervised": np.where(supervised < 0, -1, moved[supervised])}
