"""From samples to the arrays of a Batch, as numpy, for any of a global batch's rows.

Shapes as in types.Batch, with R rows instead of B. An image's places in the text point into the row's image tokens, flattened
over images: place j of the row's image i is i * S + j, where S is what an image of the config's size has after the projector
(or pool, or fusion). Nothing is shifted on the device: `supervised` holds position t where `labels` holds the token at t + 1 of
the same sample.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxmed.config import Experiment, VisualConfig
from jaxmed.data.asking import drawn
from jaxmed.data.augment import Augment, augment
from jaxmed.data.conversation import Example, encode_training, text_options
from jaxmed.data.dataset import Dataset, Sample, images_per_row
from jaxmed.data.inputs import VisualInput, image_array_shape, read_input, token_count
from jaxmed.data.plan import GlobalBatch, capacity
from jaxmed.data.records import where
from jaxmed.data.tokenizer import IGNORE, IMAGE_ID
from jaxmed.errors import Problem, UserError

Arrays = dict[str, np.ndarray]
ALONG_T = ("tokens", "positions", "segment_ids", "image_index")


@dataclass(frozen=True)
class Loaded:
    """A sample with what its image files hold."""

    example: Example
    images: tuple[VisualInput, ...]
    tokens: tuple[int, ...]
    """Tokens of each image before the projector"""


def augmentation(visual: VisualConfig) -> Augment:
    """How volumes are changed in training. Tokens of a tower that was run before stay as they are."""
    return visual.prepare.augment if visual.kind == "volumes" else "none"


def load_sample(dataset: Dataset, sample: Sample, key: tuple[int, int, int]) -> Loaded:
    """Reads the sample's files; UserError names the file. `key`: of what is drawn for it, see GlobalBatch.key."""
    experiment = dataset.experiment
    kind = augmentation(experiment.visual)
    record = drawn(sample.record, experiment.train.seed, key)
    example = encode_training(record, dataset.tokenizer, experiment.data.template, text_options(experiment))
    images = []
    for path, tokens in zip(sample.paths, sample.tokens, strict=True):
        image = read_input(path, experiment.visual)
        found = token_count(image.grid, experiment.visual)
        if found != tokens:
            raise UserError(f"{path}: had {tokens} tokens when it was checked and has {found} now; start the run again")
        changed = augment(image.values, kind, experiment.train.seed, key, len(images))
        images.append(dataclasses.replace(image, values=changed))
    return Loaded(example, tuple(images), sample.tokens)


def splice(
    example: Example, places: Sequence[int], stride: int, first_image: int, max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, labels and image_index, each [T] int32, with image i of the sample on places[i] positions.

    Images stand where ids are IMAGE_ID, or on positions that the text has already, from `image_start` on, whose ids stay.
    What lies beyond `max_length` positions is cut off (0: nothing is), in the middle of an image too.
    """
    ids, labels = example.ids, example.labels
    if example.image_start >= 0:
        starts = example.image_start + np.cumsum(places) - places
    else:
        at = np.flatnonzero(ids == IMAGE_ID)
        places = places[: len(at)]  # the others were behind the cut of the text itself
        repeats = np.ones(len(ids), np.int64)
        repeats[at] = places
        starts = (np.cumsum(repeats) - repeats)[at]
        ids, labels = np.repeat(np.where(ids == IMAGE_ID, 0, ids), repeats), np.repeat(labels, repeats)
    image_index = np.full(len(ids), -1, np.int32)
    for image, (start, count) in enumerate(zip(starts.tolist(), places, strict=True), first_image):
        image_index[start : start + count] = image * stride + np.arange(count)
    kept = slice(max_length or None)
    return ids.astype(np.int32)[kept], labels.astype(np.int32)[kept], image_index[kept]


def empty_rows(experiment: Experiment, rows: int, bucket: int) -> Arrays:
    """Arrays of rows that hold nothing."""
    visual, images = experiment.visual, images_per_row(experiment)
    tokens = visual.tokens if images else 0
    supervised = capacity(experiment.data, images, bucket)[1]
    return {
        "tokens": np.zeros((rows, bucket), np.int32),
        "positions": np.zeros((rows, bucket), np.int32),
        "segment_ids": np.zeros((rows, bucket), np.int32),
        "image_index": np.full((rows, bucket), -1, np.int32),
        "supervised": np.full((rows, supervised), -1, np.int32),
        "labels": np.zeros((rows, supervised), np.int32),
        "images": np.zeros(*image_array_shape(visual, rows, images, tokens)),
        "image_token_mask": np.zeros((rows, images, tokens), bool),
        "image_grid": np.zeros((rows, images, 3), np.int32),
    }


class _Row:
    """One row of the arrays while samples are appended to it."""

    def __init__(self, arrays: Arrays, row: int):
        self.arrays = {name: array[row] for name, array in arrays.items()}
        self.length = self.supervised = self.images = 0

    def append(self, loaded: Loaded, places: Sequence[int], stride: int, segment: int, max_length: int) -> None:
        tokens, labels, image_index = splice(loaded.example, places, stride, self.images, max_length)
        span = slice(self.length, self.length + len(tokens))
        self.arrays["tokens"][span] = tokens
        self.arrays["positions"][span] = np.arange(len(tokens))
        self.arrays["segment_ids"][span] = segment
        self.arrays["image_index"][span] = image_index
        before = np.flatnonzero(labels[1:] != IGNORE)
        spot = slice(self.supervised, self.supervised + len(before))
        self.arrays["supervised"][spot] = self.length + before
        self.arrays["labels"][spot] = labels[before + 1]
        for number, (image, count) in enumerate(zip(loaded.images, loaded.tokens, strict=True), self.images):
            self.arrays["images"][number, : len(image.values)] = image.values
            self.arrays["image_token_mask"][number, :count] = True
            self.arrays["image_grid"][number] = image.grid
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
    stride, max_length = experiment.image_tokens, experiment.data.max_length
    offsets = batch.offsets
    for place, row_number in enumerate(rows):
        row = _Row(arrays, place)
        for segment, index in enumerate(batch.rows[row_number], 1 + offsets[row_number]):
            sample = dataset.samples[index]
            try:
                loaded = load_sample(dataset, sample, batch.key(segment - 1))
            except UserError as error:
                problem = Problem(where(sample.record), str(error))
                if experiment.data.on_bad_record == "stop":
                    raise UserError(f"{problem}; or pass --on-bad-record skip to go on without it") from None
                problems.append(problem)
                continue
            row.append(loaded, sample.places, stride, segment, max_length)
    return arrays, problems


def permute_batch(arrays: Arrays, permutation: np.ndarray) -> Arrays:
    """The same rows with T permuted: place p then holds what permutation[p] held; `supervised` follows."""
    moved = np.empty(len(permutation), np.int32)
    moved[permutation] = np.arange(len(permutation), dtype=np.int32)
    supervised = arrays["supervised"]
    changed = {name: np.ascontiguousarray(arrays[name][:, permutation]) for name in ALONG_T}
    return {**arrays, **changed, "supervised": np.where(supervised < 0, -1, moved[supervised])}
