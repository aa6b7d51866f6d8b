"""From token ids and image tokens to left-padded batches of a fixed shape.

A prompt's bucket depends on the prompt alone: its images' tokens at their largest, plus its text rounded up to a power of two.

Axis letters: B batch, T bucket, R branches a row, U tokens of a branch's rest, I images, N tokens an image, C features.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmed.config import Experiment
from jaxmed.data.conversation import find_template
from jaxmed.data.examples import Example, TextOptions
from jaxmed.data.inputs import TOKEN_KINDS, VisualInput, image_array_shape, token_count
from jaxmed.data.placeholders import PLACEHOLDER, image_start
from jaxmed.data.rows import splice
from jaxmed.data.tokenizer import IGNORE, IMAGE_ID, Tokenizer
from jaxmed.errors import UserError
from jaxmed.generate.placement import placed
from jaxmed.sharding import Rules, balanced_order, batch_specs, to_shardings
from jaxmed.types import Array, Batch

SHORTEST_TEXT = 64
IMAGE_STEP = 64


@dataclasses.dataclass(frozen=True)
class Prompt:
    ids: np.ndarray
    """int32, -200 where an image goes"""
    images: tuple[VisualInput, ...]
    """in the order of their places"""
    image_start: int = -1
    """>= 0: `ids` has the image's places already, from here on (see jaxmed.data.examples.Example)"""

    @property
    def image_places(self) -> int:
        """Places for images that the text names."""
        return len(self.images) if self.image_start >= 0 else int((self.ids == IMAGE_ID).sum())


def prompt_of_ids(
    ids: np.ndarray, images: tuple[VisualInput, ...], tokenizer: Tokenizer, template: str, options: TextOptions
) -> Prompt:
    """A prompt that is tokenised already: IMAGE_ID for an image, or (template `m3d`) for each of its placeholders."""
    if not images or find_template(template).mask != "m3d":
        return Prompt(ids, images)
    ids = np.where(ids == IMAGE_ID, tokenizer.token_id(PLACEHOLDER), ids).astype(np.int32)
    return Prompt(ids, images, image_start(ids, len(images), tokenizer, options))


def places(image: VisualInput, experiment: Experiment) -> int:
    """How many positions of the text an image takes."""
    return experiment.places(token_count(image.grid, experiment.visual), image.grid)


def prompt_length(prompt: Prompt, experiment: Experiment) -> int:
    if prompt.image_start >= 0:
        return len(prompt.ids)
    return len(prompt.ids) - len(prompt.images) + sum(places(i, experiment) for i in prompt.images)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rest:
    """How each prompt of a row goes on behind what all of them begin with, padded on the left."""

    tokens: Array
    """[B, R, U] int32 ([B, R * U] on devices)"""
    positions: Array
    """as tokens, behind those of the prefix"""
    valid: Array
    """as tokens, bool; a branch without a prompt has none"""
    reach: Array
    """[B] int32, up to which position the longest answer of a row may grow"""
    branches: int = dataclasses.field(metadata={"static": True})
    """R"""


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


def bucket_of(prompt: Prompt, experiment: Experiment, shortest: int = SHORTEST_TEXT) -> Bucket:
    """`shortest`: tokens of text that the smallest bucket holds."""
    visual, projector = experiment.visual, experiment.model.projector
    text = prompt_length(prompt, experiment) - sum(places(i, experiment) for i in prompt.images)
    largest = max((token_count(i.grid, visual) for i in prompt.images), default=0)
    tokens = visual.tokens if fixed_size(experiment) and prompt.images else -(-largest // IMAGE_STEP) * IMAGE_STEP
    stride = tokens
    if prompt.images and (projector.pooled or fixed_size(experiment)):
        stride = experiment.places(tokens, visual.grid)
    return Bucket(len(prompt.images), tokens, stride, power_of_two(text, shortest))


def power_of_two(length: int, least: int) -> int:
    """The smallest power of two that holds `length`, `least` at least."""
    return max(least, 1 << max(length - 1, 0).bit_length())


def fixed_size(experiment: Experiment) -> bool:
    """Whether images must have exactly the grid of the config: a tower's, or tables or pools with a row for each token."""
    visual, projector = experiment.visual, experiment.model.projector
    static = visual.kind not in ("none", "embeddings") or not (projector.position_wise or projector.pooled)
    return visual.norm or visual.positions or static


def check(prompt: Prompt, experiment: Experiment, where: str) -> None:
    """What the model cannot take, as a UserError that begins with `where`."""
    visual = experiment.visual
    wanted = prompt.image_places
    if wanted != len(prompt.images):
        raise UserError(f"{where}: the prompt has {wanted} <image> and {len(prompt.images)} images; give one image a place")
    if prompt.images and visual.kind == "none":
        raise UserError(f"{where}: has an image, and the model reads none (visual.kind is none)")
    for image in prompt.images:
        if fixed_size(experiment) and tuple(image.grid) != tuple(visual.grid):
            raise UserError(
                f"{where}: an image's token grid is {tuple(image.grid)}, the model was made for {tuple(visual.grid)}"
            )


def left_padded(prompts: Sequence[Prompt], rows: int, bucket: Bucket, experiment: Experiment) -> Batch:
    """numpy Batch of `rows` rows, prompts first, the rest empty; B = rows, T = bucket.length."""
    unlabelled = [Example(p.ids, np.full_like(p.ids, IGNORE), "", p.image_start) for p in prompts]
    return spliced_rows(unlabelled, [p.images for p in prompts], rows, bucket, experiment, 0)[0]


def spliced_rows(
    examples: Sequence[Example],
    images: Sequence[tuple[VisualInput, ...]],
    rows: int,
    bucket: Bucket,
    experiment: Experiment,
    max_length: int,
) -> tuple[Batch, list[np.ndarray]]:
    """numpy Batch at the right end of T (nothing supervised yet), and each row's labels after splicing.

    `max_length`: positions after which a row is cut, 0: never.
    """
    visual = experiment.visual
    along_t = {name: np.zeros((rows, bucket.length), np.int32) for name in ("tokens", "positions", "segment_ids")}
    image_index = np.full((rows, bucket.length), -1, np.int32)
    shape, dtype = image_array_shape(visual, rows, bucket.images, bucket.tokens)
    values = np.zeros(shape, dtype)
    mask = np.zeros((rows, bucket.images, bucket.tokens), bool)
    grid = np.zeros((rows, bucket.images, 3), np.int32)
    labels = []
    for r, (example, shown) in enumerate(zip(examples, images, strict=True)):
        counts = [places(image, experiment) for image in shown]
        tokens, label, index = splice(example, counts, bucket.stride, 0, max_length)
        start = bucket.length - len(tokens)
        along_t["tokens"][r, start:] = tokens
        along_t["positions"][r, start:] = np.arange(len(tokens))
        along_t["segment_ids"][r, start:] = 1 + r
        image_index[r, start:] = index
        labels.append(label)
        for i, image in enumerate(shown):
            if visual.kind in TOKEN_KINDS:
                values[r, i, : len(image.values)] = image.values
            else:
                values[r, i] = image.values
            mask[r, i, : token_count(image.grid, visual)] = True
            grid[r, i] = image.grid
    none = np.full((rows, 1), -1, np.int32)
    batch = Batch(
        **along_t,
        image_index=image_index,
        supervised=none,
        labels=np.zeros_like(none),
        images=values,
        image_token_mask=mask,
        image_grid=grid,
    )
    return batch, labels


def balanced(batch: Batch, context: int) -> Batch:
    """A numpy Batch of unlabelled, left-padded prompts, lengthened on the left and put into balanced order (see sharding)."""
    if context == 1:
        return batch
    pad, fill = -batch.tokens.shape[1] % (2 * context), {"image_index": -1}
    order = balanced_order(batch.tokens.shape[1] + pad, context)
    moved = {
        name: np.pad(getattr(batch, name), ((0, 0), (pad, 0)), constant_values=fill.get(name, 0))[:, order]
        for name in ("tokens", "positions", "segment_ids", "image_index")
    }
    return dataclasses.replace(batch, **moved, order="balanced")


def put(batch: Batch, mesh: Mesh, rules: Rules) -> Batch:
    """The same on the mesh's devices."""
    return jax.tree.map(placed, batch, to_shardings(batch_specs(rules, batch.order, batch.images.ndim), mesh))
