"""From a record to token ids and labels (training), and from a conversation so far to prompt ids (generation).

Ids are int32 [T] with -200 (IMAGE_ID) at an image's place, labels int32 [T] with -100 (IGNORE) where nothing is supervised;
no shift is taken. Training moves `<image>` to the start of its turn, generation takes every text verbatim. The template `m3d`
has placeholders in place of IMAGE_ID (jaxmed.data.placeholders).
"""

from collections.abc import Sequence

import numpy as np

from jaxmed.config import Experiment
from jaxmed.data.captions import read_prompts
from jaxmed.data.examples import Example, TextOptions, text_options
from jaxmed.data.masks import supervised
from jaxmed.data.placeholders import as_upstream, encode_answered, encode_question, placeholder_warning
from jaxmed.data.records import Reading, Record, image_places, settle
from jaxmed.data.templates import TEMPLATES, Template, render
from jaxmed.data.tokenizer import IGNORE, IMAGE_ID, IMAGE_TOKEN, Tokenizer
from jaxmed.errors import UserError

__all__ = [
    "IGNORE",
    "IMAGE_ID",
    "IMAGE_TOKEN",
    "TEMPLATES",
    "Example",
    "Template",
    "TextOptions",
    "answer_text",
    "as_upstream",
    "check_template",
    "encode_prompt",
    "encode_prompt_example",
    "encode_text",
    "encode_training",
    "find_template",
    "normalise",
    "placeholder_warning",
    "reading_of",
    "render",
    "required_tokens",
    "strip_terminal",
    "text_options",
]

Turns = Sequence[tuple[str, str | None]]


def find_template(name: str) -> Template:
    if name not in TEMPLATES:
        raise UserError(f"data.template is {name!r}; known are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def required_tokens(template: str) -> tuple[str, ...]:
    """Tokens that must be whole in the tokenizer for this template's masks and prompts to hold."""
    return find_template(template).required


def check_template(template: str, tokenizer: Tokenizer) -> None:
    """UserError if the tokenizer would cut one of the template's tokens into pieces."""
    lacking = [token for token in required_tokens(template) if tokenizer.encode(token, False) != [tokenizer.token_id(token)]]
    if lacking:
        raise UserError(
            f"the tokenizer lacks {', '.join(lacking)}, which the template {template!r} needs; "
            "take the model's own template (--data.template) or the tokenizer that belongs to it (--model.tokenizer)"
        )


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text with IMAGE_ID at each `<image>`. The pieces between are tokenised one by one, each with the
    tokenizer's BOS, of which the first alone stays."""
    ids: list[int] = []
    for index, piece in enumerate(text.split(IMAGE_TOKEN)):
        piece_ids = tokenizer.encode(piece)
        ids += [IMAGE_ID, *piece_ids[len(tokenizer.prefix) :]] if index else piece_ids
    return ids


def normalise(text: str, images: int) -> str:
    """A turn as training sees it: its image place moved to the front, on a line of its own."""
    places = image_places(text, images)
    if not places:
        return text
    return (f"{IMAGE_TOKEN}\n" * places + text.replace(IMAGE_TOKEN, "").strip()).strip()


NO_OPTIONS = TextOptions()
UNKNOWN = "<unk>"
"""What upstream fills rows with where templates have the masks below; a sample that holds it no longer adds up for it"""
FILLED_WITH_UNKNOWN = ("v1", "llama_2")


def encode_training(record: Record, tokenizer: Tokenizer, template: str, options: TextOptions = NO_OPTIONS) -> Example:
    """What a record is trained on. RecordError for one that the template or the options refuse."""
    chosen = find_template(template)
    if chosen.mask == "m3d":
        return encode_answered(record, tokenizer, options)
    record = settle(record, options.missing_image_token)
    return _cut(_conversation(record, tokenizer, chosen, options.max_length), options.max_length)


def _conversation(record: Record, tokenizer: Tokenizer, chosen: Template, max_length: int) -> Example:
    images = len(record.images)
    turns = [(turn.role, normalise(turn.value, images) if images else turn.value) for turn in record.turns]
    if chosen.mask == "plain":
        return _plain(turns, tokenizer, chosen)

    def encode(text: str) -> list[int]:
        # `<image>` in a record without an image is ordinary text.
        return encode_text(text, tokenizer) if images else tokenizer.encode(text)

    prompt = render(chosen, turns)
    ids = np.array(encode(prompt), np.int32)
    mask, counted = supervised(prompt, len(ids), chosen, encode, len(tokenizer.prefix), tokenizer.legacy)
    if counted != len(ids):
        return _void(ids, _diagnose(turns, chosen, counted, len(ids)))
    fills = tokenizer.token_id(UNKNOWN) if chosen.mask in FILLED_WITH_UNKNOWN else None
    if fills is not None and (ids == fills).any() and not 0 < max_length <= len(ids):  # upstream does not check what it cuts
        return _void(ids, f"its text holds {UNKNOWN}, or letters that the tokenizer lacks; take them out")
    return _example(ids, mask)


def _plain(turns: Turns, tokenizer: Tokenizer, template: Template) -> Example:
    """Caption training: the image and its answer; the question is left out."""
    places = IMAGE_TOKEN * turns[0][1].count(IMAGE_TOKEN)
    ids = np.array(encode_text(places or render(template, turns[:2]), tokenizer), np.int32)
    if len(turns) != 2:
        return _void(
            ids, f"the plain template takes one question and its answer, this has {len(turns)} turns; split the record"
        )
    if not places:
        return _void(ids, f"the plain template needs {IMAGE_TOKEN} in the question; add it, or take another template")
    masked = len(ids)
    ids = np.array(encode_text(places + turns[1][1] + template.sep, tokenizer), np.int32)
    return _example(ids, np.arange(len(ids)) >= masked)


def _cut(example: Example, max_length: int) -> Example:
    """The first `max_length` ids (0: all), an IMAGE_ID counting as one; with its images in, the sample is cut once more."""
    if not max_length or len(example.ids) <= max_length:
        return example
    ids, labels = example.ids[:max_length], example.labels[:max_length]
    lost = not example.voided and bool((labels[1:] == IGNORE).all())
    reason = f"it is cut at {max_length} tokens (data.max_length), before its first answer; raise that, or split the record"
    return Example(ids, labels, reason if lost else example.voided)


def _void(ids: np.ndarray, reason: str) -> Example:
    return Example(ids, np.full_like(ids, IGNORE), reason)


def _example(ids: np.ndarray, mask: np.ndarray) -> Example:
    labels = np.where(mask & (ids != IMAGE_ID), ids, IGNORE).astype(np.int32)
    if (labels == IGNORE).all():
        return _void(ids, "none of its tokens is supervised; give the last turn an answer")
    return Example(ids, labels, "")


def _diagnose(turns: Turns, template: Template, counted: int, size: int) -> str:
    """Why rounds and tokens do not add up, in words that tell what to change."""
    header = template.sep + template.roles[1] + ": " if template.style == "two" else "[/INST]"
    marks = {"mpt": (template.sep,), "two": (template.sep2, header), "llama_2": (template.sep2, header)}[template.style]
    for number, (role, text) in enumerate(turns, 1):
        if not text:
            return f"turn {number} ({role}) is empty; write its text or take the round out"
        found = [mark for mark in marks if mark in text]
        if found:
            return f"turn {number} ({role}) holds {found[0]!r}, which the template sets between turns; take it out of the text"
    if turns[-1][0] == "human":
        return f"turn {len(turns)} is a question without an answer; add the answer or take the question out"
    return (
        f"the template's rounds account for {counted} of {size} tokens, so answers cannot be told from questions; "
        "take special tokens out of the texts, or another template"
    )


def encode_prompt(turns: Turns, tokenizer: Tokenizer, template: str, options: TextOptions = NO_OPTIONS) -> np.ndarray:
    """[T] int32: the conversation up to the answer to be written, texts verbatim; the last turn is ("gpt", None)."""
    return encode_prompt_example(turns, tokenizer, template, options).ids


def encode_prompt_example(turns: Turns, tokenizer: Tokenizer, template: str, options: TextOptions = NO_OPTIONS) -> Example:
    """`encode_prompt` with the place of the image (`image_start`); nothing is supervised."""
    chosen = find_template(template)
    if chosen.mask == "m3d":
        asked = [text or "" for role, text in turns if role == "human"]
        if len(asked) != 1:
            raise UserError(
                f"the template m3d takes one question and no history, this conversation has {len(asked)} questions; "
                "ask them one by one"
            )
        return encode_question(asked[0], asked[0].count(IMAGE_TOKEN), tokenizer, options)
    ids = np.array(encode_text(render(chosen, turns), tokenizer), np.int32)
    return Example(ids, np.full_like(ids, IGNORE), "")


def answer_text(
    ids: Sequence[int], tokenizer: Tokenizer, template: str, keep_special: bool = False, whole_bytes: bool = False
) -> str:
    """Generated ids as upstream printed them (`keep_special`), else without the end tokens that this leaves standing.

    Which tokens count as special is the folder's matter: M3D's `[SEG]` stays, and so do Phi-3's `<|end|>` and `<|assistant|>`
    under `keep_special`, as they are not in SAMF's special-token map.
    """
    text = tokenizer.decode(ids, find_template(template).keeps_special, whole_bytes).strip()
    return text if keep_special else strip_terminal(text, tokenizer, template)


def strip_terminal(text: str, tokenizer: Tokenizer, template: str) -> str:
    """An answer as it goes back into the conversation: without final end tokens and the blanks around them, since the
    template closes the turn itself. End tokens in the middle stay."""
    chosen = find_template(template)
    ends = {tokenizer.piece(token) for token in tokenizer.eos_ids} | {chosen.end}
    if chosen.mask == "m3d":
        ends |= set(tokenizer.special_tokens)  # folders of M3D and SAMF need not say which of them end an answer
    ends = tuple(end for end in ends if end.strip())
    text = text.strip()
    while text.endswith(ends) and ends:
        end = max((e for e in ends if text.endswith(e)), key=len)
        text = text[: -len(end)].rstrip()
    return text


def reading_of(experiment: Experiment, upstream_exact: frozenset[str] = frozenset()) -> Reading:
    """How a records file is read for this experiment."""
    data = experiment.data
    placeholders = find_template(data.template).mask == "m3d"
    return Reading(data.missing_image_token, placeholders, upstream_exact, prompts=read_prompts(data.prompts))
