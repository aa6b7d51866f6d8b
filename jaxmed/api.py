"""A trained model in three lines, for notebooks and scripts; the commands call the same functions.

    model = jaxmed.load("runs/btb3d")                                  # or an upstream LoRA folder, with base=...
    answers = model.generate(["scan.nii_embedded.npz"], ["<image>\\nWrite the report."])
    print(answers[0].text)

Axis letters: T positions of the spliced prompt, V vocabulary with added tokens, N image tokens, C features, D decoder width.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmed.checkpoint import manager
from jaxmed.checkpoint.adapter import run_experiment
from jaxmed.checkpoint.folders import KINDS, detect, llava_experiment, peft_experiment
from jaxmed.checkpoint.hf_config import decoder_of
from jaxmed.checkpoint.hf_io import base_fingerprint
from jaxmed.checkpoint.load import export_names
from jaxmed.config import Experiment, MeshConfig, ModelConfig, VisualConfig, replace_field
from jaxmed.data.conversation import check_template, encode_prompt, encode_training, strip_terminal
from jaxmed.data.embeddings import array_tokens, load_tokens, npz_path
from jaxmed.data.records import IMAGE_TOKEN, Record, record_from_dict
from jaxmed.data.tokenizer import IGNORE, Tokenizer
from jaxmed.errors import UserError
from jaxmed.generate.engine import Engine, Limits
from jaxmed.generate.prompts import Image, Prompt, bucket_of, check, left_padded, put
from jaxmed.generate.sampling import Sampling
from jaxmed.generate.scheduler import Scheduler, Task, run_all
from jaxmed.generate.training_rows import training_batch
from jaxmed.generate.weights import load_weights, splits_layers
from jaxmed.models.presets import LLAMA3_1_8B
from jaxmed.sharding import make_mesh, rules_for
from jaxmed.train.init import blueprint, start
from jaxmed.train.step import TokenCrossEntropy

DEFAULT_BATCH = 8
ImageInput = str | os.PathLike | np.ndarray | None
PromptInput = str | Sequence[Any] | np.ndarray
"""The user's turn; or a conversation so far, (role, text) pairs or {"from", "value"} dicts; or ids, -200 at an image."""


@dataclasses.dataclass(frozen=True)
class Generation:
    text: str
    """The answer without its end token"""
    token_ids: list[int]
    """All generated ids, the end token included where one came"""
    finish_reason: str
    """`stop` (an end token) or `length`"""


class Result(dict):
    """A dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def load(
    folder: str,
    base: str | None = None,
    tower: str | None = None,
    mesh: Mesh | None = None,
    dtype: str = "bfloat16",
    overrides: Mapping[str, Any] | None = None,
) -> "Model":
    """A model from a run of jaxmed, an upstream LoRA folder, or a Hugging Face language model.

    base: the language model's folder, where `folder` holds an adapter alone and does not find it by itself.
    tower: the image tower's folder, for models that have one apart.
    mesh: None: every device of this process on the data axis.
    overrides: config fields that no file stores or that shall differ, such as {"lora.alpha": 15}.
    Nothing is read from the network. Raises UserError for a folder that cannot be used.
    """
    if tower:
        raise UserError(f"tower {tower!r}: this model reads image tokens from files and has no tower; leave it out")
    experiment = resolve(os.fspath(folder), os.fspath(base or ""), dtype, dict(overrides or {}))
    return Model(experiment, mesh)


def resolve(folder: str, base: str, dtype: str, overrides: Mapping[str, Any]) -> Experiment:
    """The experiment that a folder describes, its weights named by `model.base` and `model.adapter`."""
    kind = detect(folder)
    if kind == "run":
        found = _of_run(folder, base)
    elif kind == "llava_lora":
        found = llava_experiment(folder, base, Experiment(model=ModelConfig(decoder=LLAMA3_1_8B)))
    elif kind == "peft":
        found = peft_experiment(folder, base, Experiment(model=ModelConfig(decoder=LLAMA3_1_8B)))
    elif kind == "hf":
        found = Experiment(
            model=ModelConfig(decoder=decoder_of(folder), base=folder), visual=VisualConfig(kind="none", images=0, tokens=0)
        )
        found = dataclasses.replace(found, lora=dataclasses.replace(found.lora, rank=0))
    else:
        raise UserError(
            f"{folder}: is {KINDS[kind]}, which is no whole model; go on from it with `jaxmed train --model.adapter`"
        )
    found = replace_field(found, "model.dtype", dtype)
    for name, value in overrides.items():
        found = replace_field(found, name, value)
    return found


def _of_run(folder: str, base: str) -> Experiment:
    """A run's own config, its newest checkpoint as the adapter, its base where it is now."""
    found = run_experiment(folder)
    meta = manager.read_meta(os.path.join(folder, manager.FOLDER), manager.newest(folder))
    base = base or found.model.base
    if base and not os.path.isdir(base):
        raise UserError(f"{folder}: its base model {base!r} is not on this machine; give its folder as base (--base)")
    if base and base_fingerprint(base) != meta["base_fingerprint"]:
        raise UserError(
            f"{folder}: was trained on another base than {base} (the weights differ); give the right one as base (--base)"
        )
    model = dataclasses.replace(found.model, adapter=folder, base=base, tokenizer=os.path.join(folder, "tokenizer"))
    visual = dataclasses.replace(found.visual, encoder=found.visual.encoder or meta["encoder"])
    return dataclasses.replace(found, model=model, visual=visual)


class Model:
    """Weights are read when they are first needed, in the form that is needed: merged for generation, apart for gradients."""

    def __init__(self, experiment: Experiment, mesh: Mesh | None):
        self.mesh = mesh or make_mesh(MeshConfig(), jax.local_devices())
        shape = dict(self.mesh.shape)
        self.rows = shape["data"] * shape["fsdp"]
        data = dataclasses.replace(experiment.data, batch=self.rows, microbatches=1, buckets=(2 * shape["context"],))
        self.experiment = dataclasses.replace(experiment, data=data)
        rules = rules_for(experiment, shape)
        self.rules = dataclasses.replace(rules, length=())
        model = experiment.model
        self.tokenizer = Tokenizer.from_folder(model.tokenizer or model.base, model.added_tokens)

    @functools.cached_property
    def engine(self) -> Engine:
        """The sampler over merged weights."""
        with jax.set_mesh(self.mesh):
            platform = self.mesh.devices.flat[0].platform
            weights = load_weights(self.experiment, self.mesh, self.rules, splits_layers(platform))
        decoder = self.experiment.model.decoder
        added = tuple(range(decoder.vocab, decoder.vocab + len(self.experiment.model.added_tokens)))
        eos = tuple(i for i in self.tokenizer.eos_ids if i not in added)
        return Engine(weights.graphdef, weights.params, weights.experiment, self.mesh, self.rules, Limits(eos, added))

    # -- inputs ------------------------------------------------------------------------------------------------------------

    def preprocess(self, image: ImageInput) -> np.ndarray:
        """A path of token files, or an array as such a file holds it -> [N, C] float32, or [N'] uint32 codes."""
        return self._image(image, "").tokens

    def _image(self, image: ImageInput, embeddings: str) -> Image:
        visual = self.experiment.visual
        if isinstance(image, str | os.PathLike):
            path = os.fspath(image)
            if not path.endswith(".npz") or embeddings or not os.path.exists(path):
                path = npz_path(embeddings, path)
            return Image(*load_tokens(path, visual))
        return Image(*array_tokens(np.asarray(image), visual))

    def prompt(self, image: ImageInput | Sequence[ImageInput], prompt: PromptInput, template: str = "") -> Prompt:
        """An image (or several, or None) and a prompt as the engine takes them."""
        several = list(image) if isinstance(image, list | tuple) else [] if image is None else [image]
        images = tuple(self._image(i, "") for i in several)
        if isinstance(prompt, np.ndarray):
            ids = prompt.astype(np.int32)
        else:
            ids = self.prompt_ids(_turns(prompt, len(images)), template)
        made = Prompt(ids, images)
        check(made, self.experiment, "prompt")
        return made

    def prompt_ids(self, turns: Sequence[tuple[str, str | None]], template: str = "") -> np.ndarray:
        """(role, text) turns, human and gpt in turn, the last one human -> ids of the prompt, int32, -200 at an image."""
        name = template or self.experiment.data.template
        check_template(name, self.tokenizer)
        return encode_prompt([*turns, ("gpt", None)], self.tokenizer, name)

    # -- outputs -----------------------------------------------------------------------------------------------------------

    def generate(
        self,
        images: Sequence[ImageInput],
        prompts: Sequence[PromptInput],
        max_new_tokens: int = 64,
        batch: int = DEFAULT_BATCH,
        template: str = "",
        **sampling: Any,
    ) -> list[Generation]:
        """One answer a prompt. `images`: one a prompt, a path, an array as the file holds it, or None.

        `sampling`: temperature, top_k, top_p, repetition_penalty, seed (see jaxmed.generate.sampling); greedy by default.
        """
        _same_number(images, prompts)
        chosen = Sampling(**sampling)
        tasks = [Task(n, self.prompt(i, p, template), str(n), 0) for n, (i, p) in enumerate(zip(images, prompts, strict=True))]
        scheduler = self.scheduler(batch, chosen, max_new_tokens)
        found = {task.name: ids for task, ids in run_all(scheduler, tasks)}
        return [self.generation(found[n], template) for n in range(len(tasks))]

    def scheduler(self, batch: int, sampling: Sampling, max_new_tokens: int) -> Scheduler:
        """For commands that make their own tasks; `batch` is rounded up to what the mesh divides."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        rows = -(-max(batch, 1) // self.rows) * self.rows
        return Scheduler(self.engine, self.engine.experiment, rows, sampling, max_new_tokens)

    def generation(self, ids: np.ndarray, template: str = "") -> Generation:
        """Generated ids as text, cleaned up as upstream's tokenizer did, without the end token."""
        raw = self.tokenizer.decode(ids.tolist()).strip()
        ended = len(ids) > 0 and int(ids[-1]) in self.engine.limits.eos_ids
        text = strip_terminal(raw, self.tokenizer, template or self.experiment.data.template)
        return Generation(text, ids.tolist(), "stop" if ended else "length")

    def logits(self, images: Sequence[ImageInput], prompts: Sequence[PromptInput], template: str = "") -> list[np.ndarray]:
        """Per prompt [T, V] float32, at every position of the spliced prompt (image places included, padding cut off)."""
        _same_number(images, prompts)
        size = self.experiment.model.decoder.vocab + len(self.experiment.model.added_tokens)
        result = []
        for image, prompt in zip(images, prompts, strict=True):
            made = self.prompt(image, prompt, template)
            batch = left_padded([made], self.rows, bucket_of(made, self.experiment), self.experiment)
            logits = self.engine.logits(put(batch, self.mesh, self.rules))
            kept = batch.segment_ids[0] != 0
            result.append(np.asarray(logits)[0][kept][:, :size])
        return result

    def image_features(self, images: Sequence[ImageInput]) -> list[np.ndarray]:
        """What the projector reads: [N, C] float32 an image, normalised where the model does so. (There is no tower here.)"""
        return [self._image_arrays(image)[0] for image in images]

    def image_tokens(self, images: Sequence[ImageInput]) -> list[np.ndarray]:
        """What the decoder reads: [N, D] float32 an image, after the projector."""
        return [self._image_arrays(image)[1] for image in images]

    def _image_arrays(self, image: ImageInput) -> tuple[np.ndarray, np.ndarray]:
        made = Prompt(np.asarray([-200], np.int32), (self._image(image, ""),))
        check(made, self.experiment, "image")
        bucket = bucket_of(made, self.experiment)
        batch = put(left_padded([made], self.rows, bucket, self.experiment), self.mesh, self.rules)
        features, tokens = self.engine.image_arrays(batch)
        count = int(np.prod(made.images[0].grid))
        places = count if bucket.stride == bucket.tokens else bucket.stride
        return np.asarray(features, np.float32)[0, 0, :count], np.asarray(tokens, np.float32)[0, :places]

    # -- training ----------------------------------------------------------------------------------------------------------

    def tokens(self, records: Sequence[Mapping[str, Any] | Record], template: str = "") -> list[Result]:
        """Per record `token_ids` (-200 at an image), `labels` (-100 where not supervised), both lists, and `voided` (bool):
        whether no label is left, with `reason`. Records as the data set's file holds them."""
        name = template or self.experiment.data.template
        examples = [encode_training(_record(r, n), self.tokenizer, name) for n, r in enumerate(records)]
        return [
            Result(token_ids=e.ids.tolist(), labels=e.labels.tolist(), voided=bool(e.voided), reason=e.voided) for e in examples
        ]

    def loss(
        self,
        records: Sequence[Mapping[str, Any] | Record],
        gradients: bool = False,
        embeddings: str = "",
        template: str = "",
    ) -> Result:
        """Mean loss over the supervised tokens of `records`, without dropout: `loss`, `token_count`, and with `gradients`
        {upstream's tensor name: float32 array} of the trainable half.

        An image is a path, or a name in the folder `embeddings` (default: the run's).
        """
        name = template or self.experiment.data.template
        folder = embeddings or self.experiment.data.embeddings
        known = [_record(r, n) for n, r in enumerate(records)]
        examples = [encode_training(r, self.tokenizer, name) for r in known]
        images = [tuple(self._record_image(i, folder) for i in r.images) for r in known]
        supervised = sum(int((e.labels != IGNORE).sum()) for e in examples)
        if not supervised:
            zero = Result(loss=0.0, token_count=0)
            return Result(zero, gradients=self._zero_gradients()) if gradients else zero
        batch = training_batch(examples, images, self.rows, 2 * dict(self.mesh.shape)["context"], self.experiment)
        with jax.set_mesh(self.mesh):
            trainable, frozen = self._halves
            objective = TokenCrossEntropy(self._plan.graphdef, self._plan.rules, self.experiment)
            placed = put(dataclasses.replace(batch, order="any"), self.mesh, self._plan.rules)
            if not gradients:
                total, count = jax.jit(objective.evaluate)(trainable, frozen, placed)
                return Result(loss=float(total / count), token_count=int(count))
            sample = dataclasses.replace(self.experiment, lora=dataclasses.replace(self.experiment.lora, dropout=0.0))
            objective = dataclasses.replace(objective, experiment=sample)
            metrics, grads = jax.jit(objective.value_and_grad)(trainable, frozen, placed, jax.random.key(0))
            named = export_names(grads, self.experiment)
        return Result(loss=float(metrics.loss), token_count=int(metrics.supervised_tokens), gradients=named)

    def _record_image(self, image: str, folder: str) -> Image:
        """A path that exists, by itself or after the path rule, else a name in the folder."""
        here = npz_path("", image)
        path = image if os.path.isfile(image) and image.endswith(".npz") else here if os.path.isfile(here) else ""
        return Image(*load_tokens(path or npz_path(folder, image), self.experiment.visual))

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


def _same_number(images: Sequence[Any], prompts: Sequence[Any]) -> None:
    if len(images) != len(prompts):
        raise UserError(f"{len(images)} images for {len(prompts)} prompts; give one a prompt, None where there is none")


def _record(record: Mapping[str, Any] | Record, row: int) -> Record:
    return record if isinstance(record, Record) else record_from_dict(dict(record), row)


def _turns(prompt: str | Sequence[Any], images: int) -> list[tuple[str, str]]:
    """The conversation that a prompt means; an image without a place goes in front of the first turn."""
    if isinstance(prompt, str):
        turns = [("human", prompt)]
    else:
        turns = [(t["from"], t["value"]) if isinstance(t, Mapping) else (t[0], t[1]) for t in prompt]
    if images and not any(IMAGE_TOKEN in text for _, text in turns):
        turns[0] = (turns[0][0], "\n".join([IMAGE_TOKEN] * images + [turns[0][1]]))
    return turns
