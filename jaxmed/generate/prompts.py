"""From token ids and image tokens to left-padded batches of a fixed shape.

A prompt's bucket depends on the prompt alone: its images' tokens at their largest, plus its text rounded up to a power of two.

Axis letters: B batch, T bucket, I images, N tokens an image, C features.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmed.config import Experiment, VisualConfig
from jaxmed.data.tokenizer import IMAGE_ID
from jaxmed.errors import UserError
from jaxmed.sharding import Rules, batch_specs, to_shardings
from jaxmed.types import Batch

SHORTEST_TEXT = 64
IMAGE_STEP = 64


@dataclasses.dataclass(frozen=True)
class Image:
    """One image's tokens as a file gives them."""

    tokens: np.ndarray
    """[N, C] float32, or [N'] uint32 codes"""
    grid: tuple[int, int, int]
    """(depth, rows, columns) after merging"""


@dataclasses.dataclass(frozen=True)
class Prompt:
    ids: np.ndarray
    """int32, -200 where an image goes"""
    images: tuple[Image, ...]
    """in the order of their places"""


def places(image: Image, experiment: Experiment) -> int:
    """How many positions of the text an image takes."""
    projector = experiment.model.projector
    return projector.pool_queries if projector.pooled else int(np.prod(image.grid))


def prompt_length(prompt: Prompt, experiment: Experiment) -> int:
    return len(prompt.ids) - len(prompt.images) + sum(places(i, experiment) for i in prompt.images)


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """The compiled shape that holds a prompt."""

    images: int
    """I"""
    tokens: int
    """N, tokens of an image at most"""
    stride: int
    """Places in the text that an image may take: N, or the pool's queries"""
    text: int
    """Tokens of text at most"""

    @property
    def length(self) -> int:
        """T"""
        return self.images * self.stride + self.text


def bucket_of(prompt: Prompt, experiment: Experiment) -> Bucket:
    visual, projector = experiment.visual, experiment.model.projector
    text = len(prompt.ids) - len(prompt.images)
    largest = max((int(np.prod(i.grid)) for i in prompt.images), default=0)
    fixed = visual.norm or visual.positions or visual.kind == "codes"  # tables with a row for every token of the grid
    tokens = visual.tokens if fixed and prompt.images else -(-largest // IMAGE_STEP) * IMAGE_STEP
    stride = projector.pool_queries if projector.pooled and prompt.images else tokens
    return Bucket(len(prompt.images), tokens, stride, max(SHORTEST_TEXT, 1 << (text - 1).bit_length()))


def check(prompt: Prompt, experiment: Experiment, where: str) -> None:
    """What the model cannot take, as a UserError that begins with `where`."""
    visual = experiment.visual
    wanted = int((prompt.ids == IMAGE_ID).sum())
    if wanted != len(prompt.images):
        raise UserError(f"{where}: the prompt has {wanted} <image> and {len(prompt.images)} images; give one image a place")
    if prompt.images and visual.kind == "none":
        raise UserError(f"{where}: has an image, and the model reads none (visual.kind is none)")
    fixed = visual.norm or visual.positions or visual.kind == "codes"
    for image in prompt.images:
        if fixed and tuple(image.grid) != tuple(visual.grid):
            raise UserError(
                f"{where}: an image's token grid is {tuple(image.grid)}, the model was made for {tuple(visual.grid)}"
            )


def left_padded(prompts: Sequence[Prompt], rows: int, bucket: Bucket, experiment: Experiment) -> Batch:
    """numpy Batch of `rows` rows, prompts first, the rest empty; B = rows, T = bucket.length."""
    visual = experiment.visual
    along_t = {name: np.zeros((rows, bucket.length), np.int32) for name in ("tokens", "positions", "segment_ids")}
    image_index = np.full((rows, bucket.length), -1, np.int32)
    images = np.zeros(*image_shape(visual, rows, bucket))
    mask = np.zeros((rows, bucket.images, bucket.tokens), bool)
    grid = np.zeros((rows, bucket.images, 3), np.int32)
    for r, prompt in enumerate(prompts):
        tokens, index, number = [], [], 0
        for piece in np.split(prompt.ids, np.flatnonzero(prompt.ids == IMAGE_ID)):
            if len(piece) and piece[0] == IMAGE_ID:
                n = places(prompt.images[number], experiment)
                tokens.append(np.zeros(n, np.int32))
                index.append(number * bucket.stride + np.arange(n))
                number, piece = number + 1, piece[1:]
            tokens.append(piece)
            index.append(np.full(len(piece), -1))
        flat = np.concatenate(tokens)
        start = bucket.length - len(flat)
        along_t["tokens"][r, start:] = flat
        along_t["positions"][r, start:] = np.arange(len(flat))
        along_t["segment_ids"][r, start:] = 1 + r
        image_index[r, start:] = np.concatenate(index)
        for i, image in enumerate(prompt.images):
            images[r, i, : len(image.tokens)] = image.tokens
            mask[r, i, : int(np.prod(image.grid))] = True
            grid[r, i] = image.grid
    none = np.full((rows, 1), -1, np.int32)
    return Batch(
        **along_t,
        image_index=image_index,
        supervised=none,
        labels=np.zeros_like(none),
        images=images,
        image_token_mask=mask,
        image_grid=grid,
    )


def image_shape(visual: VisualConfig, rows: int, bucket: Bucket) -> tuple[tuple[int, ...], type]:
    """Shape and dtype of Batch.images."""
    if visual.kind == "codes":
        return (rows, bucket.images, bucket.tokens * math.prod(visual.merge)), np.uint32
    return (rows, bucket.images, bucket.tokens, visual.features), np.float32


def put(batch: Batch, mesh: Mesh, rules: Rules) -> Batch:
    """The same on the mesh's devices (all of this process)."""
    return jax.tree.map(jax.device_put, batch, to_shardings(batch_specs(rules, batch.order, batch.images.ndim), mesh))
