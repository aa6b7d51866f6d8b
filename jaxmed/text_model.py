"""A model that is asked in words: images and prompts in, answers out. What `jaxmed.vlm_model.Model` builds on.

Batches are padded to few shapes (buckets), and each is compiled once; an answer depends on its own prompt alone. Prompts about
the same image share its prefill (jaxmed.generate.sharing).
"""

import dataclasses
import functools
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmed.config import Experiment, MeshConfig
from jaxmed.data.captions import FIXED
from jaxmed.data.conversation import answer_text, check_template, encode_prompt_example, find_template, normalise, text_options
from jaxmed.data.drafts import listed_choices
from jaxmed.data.inputs import VisualInput, input_path, read_input
from jaxmed.data.records import IMAGE_TOKEN
from jaxmed.data.regions import REGIONS
from jaxmed.data.tokenizer import Tokenizer
from jaxmed.errors import UserError
from jaxmed.generate.choices import Choice, Likelihood, choice_of, continuations, wordings
from jaxmed.generate.engine import Engine, Limits
from jaxmed.generate.prompts import Prompt, check, prompt_of_ids
from jaxmed.generate.sampling import Sampling
from jaxmed.generate.scheduler import Scheduler, Task, run_all
from jaxmed.generate.weights import load_weights, splits_layers
from jaxmed.sharding import generation_rules, make_mesh, rules_for, whole_rows

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


class TextModel:
    """Weights are read when they are first needed, merged for generation."""

    def __init__(self, experiment: Experiment, mesh: Mesh | None):
        self.mesh = mesh or make_mesh(MeshConfig(), jax.local_devices())
        shape = dict(self.mesh.shape)
        self.rows = shape["data"] * shape["fsdp"]
        data = dataclasses.replace(experiment.data, batch=self.rows, microbatches=1, buckets=(2 * shape["context"],))
        self.experiment = dataclasses.replace(experiment, data=data)
        self.rules = whole_rows(rules_for(experiment, shape))
        model = experiment.model
        self.tokenizer = Tokenizer.from_folder(model.tokenizer or model.base, model.added_tokens)
        self.options = text_options(experiment)

    @functools.cached_property
    def engine(self) -> Engine:
        """The sampler over merged weights."""
        with jax.set_mesh(self.mesh):
            platform = self.mesh.devices.flat[0].platform
            weights = load_weights(self.experiment, self.mesh, self.rules, splits_layers(platform))
        decoder = self.experiment.model.decoder
        added = tuple(range(decoder.vocab, decoder.vocab + len(self.experiment.model.added_tokens)))
        eos = tuple(i for i in self.experiment.model.end_ids or self.tokenizer.eos_ids if i not in added)
        rules = generation_rules(self.experiment, dict(self.mesh.shape))
        return Engine(weights.graphdef, weights.params, weights.experiment, self.mesh, rules, Limits(eos, added))

    # -- inputs ------------------------------------------------------------------------------------------------------------

    def preprocess(self, image: ImageInput) -> np.ndarray:
        """A file, or an array as such a file holds it -> what the model reads: token files [N, C] float32 or [N'] uint32
        codes; 2-D images [H, W, 3], prepared volumes [D, H, W, 1], slices of a volume [S, H, W], all float32."""
        return self.read(image).values

    def read(self, image: ImageInput) -> VisualInput:
        """The same with its token grid."""
        if isinstance(image, str | os.PathLike):
            path = os.fspath(image)
            image = path if os.path.exists(path) else input_path("", path, self.experiment.visual)
        return read_input(image, self.experiment.visual)

    def prompt(self, image: ImageInput | Sequence[ImageInput], prompt: PromptInput, template: str = "") -> Prompt:
        """An image (or several, or None) and a prompt as the engine takes them."""
        several = list(image) if isinstance(image, list | tuple) else [] if image is None else [image]
        return self.prompt_of([self.read(i) for i in several], prompt, template)

    def prompt_of(self, images: Sequence[VisualInput], prompt: PromptInput, template: str = "") -> Prompt:
        """The same with images that are read already."""
        images = tuple(images)
        if isinstance(prompt, np.ndarray):
            made = prompt_of_ids(
                prompt.astype(np.int32), images, self.tokenizer, template or self.experiment.data.template, self.options
            )
        else:
            made = self.conversation(turns_of(prompt, len(images)), images, template)
        check(made, self.experiment, "prompt")
        return made

    def conversation(self, turns: Sequence[tuple[str, str]], images: Sequence[VisualInput], template: str = "") -> Prompt:
        """(role, text) turns, human and gpt in turn, the last one human; shows as many of `images` as the turns have places.

        Models of 2-D images get each turn's `<image>` first, as their upstream scripts put it; the others take texts verbatim.
        """
        name = template or self.experiment.data.template
        check_template(name, self.tokenizer)
        turns = self._as_asked(turns, len(images))
        made = encode_prompt_example([*turns, ("gpt", None)], self.tokenizer, name, self.options)
        shown = sum(text.count(IMAGE_TOKEN) for _, text in turns)
        return Prompt(made.ids, tuple(images[:shown]), made.image_start)

    def _as_asked(self, turns: Sequence[tuple[str, str]], images: int) -> Sequence[tuple[str, str]]:
        if self.experiment.visual.kind != "pixels":
            return turns
        return [(role, normalise(text, images) if IMAGE_TOKEN in text else text) for role, text in turns]

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
        same_number(images, prompts)
        tasks = self._tasks(images, prompts, template)
        scheduler = self.scheduler(batch, Sampling(**sampling), max_new_tokens)
        found = {answered.task.name: answered.ids for answered in run_all(scheduler, tasks)}
        return [self.generation(found[n], template) for n in range(len(prompts))]

    def reports(
        self,
        images: Sequence[ImageInput],
        regions: Sequence[str] = REGIONS,
        max_new_tokens: int = 512,
        batch: int = DEFAULT_BATCH,
        template: str = "",
        prompt: str = FIXED.regions[0],
        **sampling: Any,
    ) -> list[dict[str, Generation]]:
        """A report of each region of every volume: {region: answer}, for which a volume is read in once.

        `prompt`: the request, with `{region}`; what the model was trained with, else ours. `sampling` as in `generate`.
        """
        shown = [image for image in images for _ in regions]
        asked = [prompt.replace("{region}", region) for _ in images for region in regions]
        found = iter(self.generate(shown, asked, max_new_tokens, batch, template, **sampling))
        return [{region: next(found) for region in regions} for _ in images]

    def answer(
        self,
        images: Sequence[ImageInput],
        questions: Sequence[str],
        options: Sequence[Mapping[str, str]],
        likelihood: Likelihood = "letters",
        per_token: bool = False,
        batch: int = DEFAULT_BATCH,
        template: str = "",
        list_choices: bool = True,
    ) -> list[Choice]:
        """The likeliest option of each question, its letter with the probabilities of all; nothing is generated.

        options: {"A": text, ...} a question. likelihood: of the letter, of letter and text (`options`), or of the text
        (`texts`); per_token: the mean over an option's tokens instead of their sum. list_choices: the choices are named behind
        the question, as M3D has them; False: the question is complete as it is.
        """
        same_number(images, questions)
        if len(options) != len(questions):
            raise UserError(f"{len(options)} sets of options for {len(questions)} questions; give one a question")
        for question, choices in zip(questions, options, strict=True):
            if len(choices) < 2:
                raise UserError(f"{question!r} has {len(choices)} options; give two at least, {{letter: text}}")
        placeholders = find_template(template or self.experiment.data.template).mask == "m3d"
        lead = " " if placeholders else ""
        asked = [
            f"{lead}{q.strip()}{listed_choices(o)}" if list_choices else q for q, o in zip(questions, options, strict=True)
        ]
        tasks = self._tasks(images, asked, template, [wordings(o, likelihood) for o in options])
        found = {a.task.name: a.likelihoods for a in run_all(self.scheduler(batch, Sampling(), 1), tasks)}
        return [choice_of(o, found[n], per_token) for n, o in enumerate(options)]

    def log_likelihoods(
        self,
        images: Sequence[ImageInput],
        prompts: Sequence[PromptInput],
        texts: Sequence[Sequence[str]],
        batch: int = DEFAULT_BATCH,
        template: str = "",
    ) -> list[list[np.ndarray]]:
        """How likely given answers are: per prompt and text the log-likelihood of each of its tokens, float32."""
        same_number(images, prompts)
        tasks = self._tasks(images, prompts, template, texts)
        found = {a.task.name: a.likelihoods for a in run_all(self.scheduler(batch, Sampling(), 1), tasks)}
        return [list(found[n]) for n in range(len(prompts))]

    def _tasks(
        self,
        images: Sequence[ImageInput | Sequence[ImageInput]],
        prompts: Sequence[PromptInput],
        template: str,
        texts: Sequence[Sequence[str]] = (),
    ) -> list[list[Task]]:
        """Tasks named by their number, those about the same image together; each image is read once."""
        seen: dict[Hashable, list[VisualInput]] = {}
        studies: dict[Hashable, list[Task]] = {}
        for n, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            several = list(image) if isinstance(image, list | tuple) else [] if image is None else [image]
            names = tuple(os.fspath(i) if isinstance(i, str | os.PathLike) else id(i) for i in several)
            if names not in seen:
                seen[names] = [self.read(i) for i in several]
            made = self.prompt_of(seen[names], prompt, template)
            given = ()
            if texts:
                if isinstance(prompt, np.ndarray):
                    raise UserError("likelihoods are asked for with prompts in words, not in ids")
                given = self.continuations(turns_of(prompt, len(several)), made, texts[n], template)
            studies.setdefault(names or n, []).append(Task(n, made, str(n), 0, given))
        return list(studies.values())

    def continuations(
        self, turns: Sequence[tuple[str, str]], prompt: Prompt, texts: Sequence[str], template: str = ""
    ) -> tuple[np.ndarray, ...]:
        """Ids of texts as answers to a conversation, whose prompt `conversation` made."""
        name = template or self.experiment.data.template
        turns = self._as_asked(turns, len(prompt.images))
        return continuations(turns, texts, prompt.ids, self.tokenizer, name, self.options)

    def scheduler(self, batch: int, sampling: Sampling, max_new_tokens: int) -> Scheduler:
        """For commands that make their own tasks; `batch` is rounded up to what the mesh divides."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        rows = -(-max(batch, 1) // self.rows) * self.rows
        return Scheduler(self.engine, self.engine.experiment, rows, sampling, max_new_tokens, self.rows)

    def generation(self, ids: np.ndarray, template: str = "") -> Generation:
        """Generated ids as text, cleaned up as upstream's tokenizer did, without the end token."""
        ended = len(ids) > 0 and int(ids[-1]) in self.engine.limits.eos_ids
        return Generation(self.text_of(ids, template, keep_special=False), ids.tolist(), "stop" if ended else "length")

    def text_of(self, ids: np.ndarray, template: str, keep_special: bool) -> str:
        """Generated ids as text; `keep_special` leaves end tokens and their like in it, as upstream does."""
        name = template or self.experiment.data.template
        # LLaVA-Med reads its whole models with the fast tokenizer; adapters are read by LLaVA's code, with the slow one
        fast = name == "mistral_instruct" and not self.experiment.lora.rank
        return answer_text(ids.tolist(), self.tokenizer, name, keep_special, whole_bytes=fast)


def same_number(images: Sequence[Any], prompts: Sequence[Any]) -> None:
    if len(images) != len(prompts):
        raise UserError(f"{len(images)} images for {len(prompts)} prompts; give one a prompt, None where there is none")


def turns_of(prompt: str | Sequence[Any], images: int) -> list[tuple[str, str]]:
    """The conversation that a prompt means; an image without a place goes in front of the first turn."""
    if isinstance(prompt, str):
        turns = [("human", prompt)]
    else:
        turns = [(t["from"], t["value"]) if isinstance(t, Mapping) else (t[0], t[1]) for t in prompt]
    if images and not any(IMAGE_TOKEN in text for _, text in turns):
        turns[0] = (turns[0][0], "\n".join([IMAGE_TOKEN] * images + [turns[0][1]]))
    return turns
