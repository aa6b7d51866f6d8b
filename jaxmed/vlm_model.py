"""A vision-language model in memory: what `jaxmed.load` returns for runs, LLaVA, LaMed, SAMF and language-model folders.

How it is asked (`generate`, `answer`, `reports`) stands in jaxmed.text_model; here is what it computes on the way, and losses.

Axis letters: T positions of the spliced prompt, V vocabulary with added tokens, N image tokens, C features, D decoder width,
S slices, F features of a volume.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.checkpoint.load import export_names
from jaxmed.config import Experiment
from jaxmed.data.conversation import (
    as_upstream,
    encode_training,
    reading_of,
)
from jaxmed.data.examples import Example
from jaxmed.data.inputs import VisualInput, input_folder, input_path, read_input, token_count
from jaxmed.data.records import Record, known_records, settle
from jaxmed.data.tokenizer import IGNORE
from jaxmed.errors import UserError
from jaxmed.generate import features
from jaxmed.generate.placement import fetched, placed
from jaxmed.generate.prompts import Prompt, bucket_of, check, left_padded, put
from jaxmed.generate.training_rows import training_batch
from jaxmed.text_model import ImageInput, PromptInput, TextModel, same_number
from jaxmed.train.init import blueprint, start
from jaxmed.train.step import TokenCrossEntropy


class Result(dict):
    """A dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Model(TextModel):
    """Weights are read when they are first needed, in the form that is needed: merged for generation, apart for gradients."""

    def logits(self, images: Sequence[ImageInput], prompts: Sequence[PromptInput], template: str = "") -> list[np.ndarray]:
        """Per prompt [T, V] float32, at every position of the spliced prompt (image places included, padding cut off)."""
        same_number(images, prompts)
        size = self.experiment.model.decoder.vocab + len(self.experiment.model.added_tokens)
        result = []
        for image, prompt in zip(images, prompts, strict=True):
            batch = self._batch(self.prompt(image, prompt, template))
            logits = fetched(self.engine.apply(features.logits, batch))[0]
            result.append(logits[fetched(batch.segment_ids)[0] != 0][:, :size])
        return result

    def image_features(self, images: Sequence[ImageInput], hidden: bool = False) -> Any:
        """What projector or fusion read: [N, C] float32 an image (normalised where the model does so; slices: [S, C]).

        With `hidden`, also every block's output of the tower, all tokens, before selection and the final norm: a pair of that
        list and a list of [blocks, N', C] an image (slices: [blocks, S, N', C]).
        """
        found = [self._of_image(features.image_features, i)[0, 0] for i in images]
        visual = self.experiment.visual
        found = [f[: token_count(image.grid, visual)] for f, image in zip(found, map(self.read, images), strict=True)]
        if not hidden:
            return found
        if not self.experiment.has_tower:
            raise UserError("hidden=True: this model reads token files and has no tower whose blocks could be shown")
        blocks = [self._of_image(features.hidden_states, i) for i in images]
        slices = visual.kind == "slices"
        return found, [b[:, : visual.slices] if slices else b[:, 0] for b in blocks]

    def image_tokens(self, images: Sequence[ImageInput], prompts: Sequence[PromptInput] = (), template: str = "") -> list:
        """What the decoder reads: [N, D] float32 an image, after projector or fusion. `prompts`: one an image where the image
        tokens depend on the text (SAMF)."""
        fused = self.experiment.model.fusion.kind != "none"
        if fused and len(prompts) != len(images):
            raise UserError(
                "this model's image tokens depend on the text: give image_tokens(images, prompts) one prompt an image"
            )
        result = []
        for image, prompt in zip(images, prompts if fused else [None] * len(images), strict=True):
            made = self.prompt(image, prompt, template) if fused else self._shown(image)
            tokens = fetched(self.engine.apply(features.image_tokens, self._batch(made)))
            shown = made.images[0]
            places = self.experiment.places(token_count(shown.grid, self.experiment.visual), shown.grid)
            result.append(np.asarray(tokens, np.float32)[0, :places])
        return result

    def volume_features(self, images: Sequence[ImageInput]) -> list[np.ndarray]:
        """SAMF's features of whole volumes, from the aggregator: [F] float32 an image."""
        self._needs_fusion("volume_features")
        return [self._of_image(features.volume_features, i)[0, 0] for i in images]

    def fusion_weights(
        self, images: Sequence[ImageInput], prompts: Sequence[PromptInput], template: str = ""
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """What SAMF's fusion looks at: weights of the slices [S] and of the prompt's ids [T], each with sum 1, a prompt."""
        self._needs_fusion("fusion_weights")
        same_number(images, prompts)
        result = []
        for image, prompt in zip(images, prompts, strict=True):
            batch = self._batch(self.prompt(image, prompt, template))
            weights = self.engine.apply(features.fusion_weights, batch)
            slices, text = (fetched(w).astype(np.float32)[0, 0] for w in weights)
            result.append((slices, text[fetched(batch.segment_ids)[0] != 0]))
        return result

    def tower(self, inputs: np.ndarray) -> np.ndarray:
        """The tower alone, on inputs that are prepared already: [M, *image, channels] float32 -> [M, N, C] float32. Other
        sizes than its own are taken too: the position table is interpolated."""
        if not self.experiment.has_tower:
            raise UserError("this model reads token files and has no tower")
        count = -(-len(inputs) // self.rows) * self.rows
        padded = np.zeros((count, *inputs.shape[1:]), np.float32)
        padded[: len(inputs)] = inputs
        spec = self.rules.sharding(self.mesh, "batch", *[None] * (inputs.ndim - 1))
        return fetched(self.engine.apply(features.tower, placed(padded, spec))).astype(np.float32)[: len(inputs)]

    def _needs_fusion(self, name: str) -> None:
        if self.experiment.model.fusion.kind == "none":
            raise UserError(f"{name}: this model has no fusion of slices and text")

    def _shown(self, image: ImageInput) -> Prompt:
        """An image by itself, as if it were a prompt."""
        made = Prompt(np.asarray([-200], np.int32), (self.read(image),))
        check(made, self.experiment, "image")
        return made

    def _of_image(self, compute: Any, image: ImageInput) -> np.ndarray:
        return fetched(self.engine.apply(compute, self._batch(self._shown(image)))).astype(np.float32)

    def _batch(self, prompt: Prompt) -> Any:
        """A prompt alone on the mesh."""
        batch = left_padded([prompt], self.rows, bucket_of(prompt, self.experiment), self.experiment)
        return put(batch, self.mesh, self.rules)

    # -- training ----------------------------------------------------------------------------------------------------------

    def tokens(self, records: Sequence[Mapping[str, Any] | Record], template: str = "") -> list[Result]:
        """Per record `token_ids` (-200 at an image's places), `labels` (-100 where not supervised), both lists, and `voided`
        (bool): whether no label is left, with `reason`. Records as the data set's file holds them, conversations and rows of
        CSV files alike."""
        result = []
        for example, _ in self._examples(records, template):
            ids, labels = as_upstream(example, self.tokenizer)
            found = {"token_ids": ids.tolist(), "labels": labels.tolist()}
            result.append(Result(found, voided=bool(example.voided), reason=example.voided))
        return result

    def _examples(self, records: Sequence[Mapping[str, Any] | Record], template: str) -> list[tuple[Example, Record]]:
        name = template or self.experiment.data.template
        reading = reading_of(self.experiment)
        known = [settle(r, self.options.missing_image_token) for r in known_records(records, reading)]
        return [(encode_training(r, self.tokenizer, name, self.options), r) for r in known]

    def loss(
        self,
        records: Sequence[Mapping[str, Any] | Record],
        gradients: bool = False,
        folder: str = "",
        template: str = "",
        embeddings: str = "",
    ) -> Result:
        """Mean loss over the supervised tokens of `records`, without dropout: `loss`, `token_count`, `token_accuracy` (how many
        of these tokens have the largest logit), and with `gradients` {upstream's tensor name: float32 array} of the trainable
        half.

        An image is a path, or a name in `folder` (default: the run's folder of token files, images or volumes); `embeddings`
        is another name for it.
        """
        pairs = self._examples(records, template)
        folder = folder or embeddings
        images = [tuple(self._record_image(i, folder) for i in record.images) for _, record in pairs]
        examples = [example for example, _ in pairs]
        if not any((e.labels != IGNORE).any() for e in examples):
            zero = Result(loss=0.0, token_count=0, token_accuracy=0.0)
            return Result(zero, gradients=self._zero_gradients()) if gradients else zero
        batch = training_batch(examples, images, self.rows, 2 * dict(self.mesh.shape)["context"], self.experiment)
        with jax.set_mesh(self.mesh):
            trainable, frozen = self._halves
            placed = put(dataclasses.replace(batch, order="any"), self.mesh, self._plan.rules)
            if not gradients:
                total, count, right = self._totals(trainable, frozen, placed)
                return _loss_of(total / jnp.maximum(count, 1), count, right)
            metrics, grads = self._value_and_grad(trainable, frozen, placed, jax.random.key(0))
            named = export_names(grads, self.experiment)
        return Result(_loss_of(metrics.loss, metrics.count, metrics.right), gradients=named)

    @functools.cached_property
    def _objective(self) -> TokenCrossEntropy:
        return TokenCrossEntropy(self._plan.graphdef, self._plan.rules, without_dropout(self.experiment))

    @functools.cached_property
    def _totals(self) -> Callable[..., Any]:
        return jax.jit(self._objective.totals)

    @functools.cached_property
    def _value_and_grad(self) -> Callable[..., Any]:
        return jax.jit(self._objective.value_and_grad)

    def _record_image(self, image: str, folder: str) -> VisualInput:
        """A path that exists, by itself or after the path rule of token files, else a name in the folder."""
        visual = self.experiment.visual
        places = [image, input_path("", image, visual)]
        found = next((place for place in places if os.path.isfile(place)), "")
        return read_input(found or input_path(folder or input_folder(self.experiment.data, visual), image, visual), visual)

    def _zero_gradients(self) -> dict[str, np.ndarray]:
        with jax.set_mesh(self.mesh):
            return export_names(jax.tree.map(jnp.zeros_like, self._halves[0]), self.experiment)

    @functools.cached_property
    def _plan(self):
        with jax.set_mesh(self.mesh):
            return blueprint(self.experiment, self.mesh)

    @functools.cached_property
    def _halves(self) -> tuple[Any, Any]:
        """Trainable and frozen parameters, adapters apart."""
        with jax.set_mesh(self.mesh):
            return start(self._plan)


def without_dropout(experiment: Experiment) -> Experiment:
    model = dataclasses.replace(experiment.model, aggregator=dataclasses.replace(experiment.model.aggregator, dropout=0.0))
    return dataclasses.replace(experiment, model=model, lora=dataclasses.replace(experiment.lora, dropout=0.0))


def _loss_of(mean: jax.Array, count: jax.Array, right: jax.Array) -> Result:
    return Result(loss=float(mean), token_count=int(count), token_accuracy=int(right) / max(int(count), 1))
