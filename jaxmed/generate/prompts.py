"""From token ids and image tokens to left-padded batches of a fixed shape.

A prompt's bucket depends on the prompt alone: its images' tokens at their largest, plus its text rounded up to a power of two.

Axis letters: B batch, T bucket, I images, N tokens an image, C features.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxmed.config import Experiment
from jaxmed.data.tokenizer import IMAGE_ID
from jaxmed.errors import UserError
from jaxmed.sharding import Rules, batch_specs
from jaxmed.types import Batch

SHORTEST_TEXT = 64


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


def bucket_of(prompt: Prompt, experiment: Experiment) -> int:
    text = len(prompt.ids) - len(prompt.images)
    return len(prompt.images) * experiment.image_tokens + max(SHORTEST_TEXT, 1 << (text - 1).bit_length())


def check(prompt: Prompt, experiment: Experiment, where: str) -> None:
    """What the model cannot take, as a UserError that begins with `where`."""
    visual = experiment.visual
    wanted = int((prompt.ids == IMAGE_ID).sum())
    if wanted != len(prompt.images):
        raise UserError(f"{where}: the prompt has {wanted} <image> and {len(prompt.images)} images; give one image a place")
    if len(prompt.images) > visual.images or (prompt.images and visual.kind == "none"):
        raise UserError(
            f"{where}: {len(prompt.images)} images in one prompt, the model takes {visual.images}; --visual.images allows more"
        )
    for image in prompt.images:
        count = int(np.prod(image.grid))
        if count > visual.tokens:
            raise UserError(f"{where}: an image has {count} tokens, the model takes {visual.tokens} (visual.tokens)")


def left_padded(prompts: Sequence[Prompt], rows: int, bucket: int, experiment: Experiment) -> Batch:
    """numpy Batch of `rows` rows, prompts first, the rest empty; B = rows, T = bucket."""
    visual = experiment.visual
    count = visual.images if visual.kind != "none" else 0
    stride = experiment.image_tokens
    along_t = {name: np.zeros((rows, bucket), np.int32) for name in ("tokens", "positions", "segment_ids")}
    image_index = np.full((rows, bucket), -1, np.int32)
    codes = visual.kind == "codes"
    merged = visual.merge[0] * visual.merge[1] * visual.merge[2]
    shape = (rows, count, visual.tokens * merged) if codes else (rows, count, visual.tokens, visual.features)
    images = np.zeros(shape, np.uint32 if codes else np.float32)
    mask = np.zeros((rows, count, visual.tokens), bool)
    grid = np.zeros((rows, count, 3), np.int32)
    for r, prompt in enumerate(prompts):
        tokens, index, number = [], [], 0
        for piece in np.split(prompt.ids, np.flatnonzero(prompt.ids == IMAGE_ID)):
            if len(piece) and piece[0] == IMAGE_ID:
                n = places(prompt.images[number], experiment)
                tokens.append(np.zeros(n, np.int32))
                index.append(number * stride + np.arange(n))
                number, piece = number + 1, piece[1:]
            tokens.append(piece)
            index.append(np.full(len(piece), -1))
        flat = np.concatenate(tokens)
        start = bucket - len(flat)
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


def put(batch: Batch, mesh: Mesh, rules: Rules) -> Batch:
    """The same on the mesh's devices (all of this process)."""
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), batch, batch_specs(rules, batch.order))
