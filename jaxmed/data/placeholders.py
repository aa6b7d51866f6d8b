"""Plain text behind placeholders: how M3D-LaMed and SAMF lay out a question, its answer and the end token (template `m3d`).

A text begins with as many `<im_patch>` as an image has tokens, then the question follows as it stands, a blank and the answer.
No role, no system text. Image tokens replace embeddings by *position*: from 1 on, whatever token is there (a BOS at 0 is taken
for granted), or where the placeholders are. Ids and labels are int32 [T]; labels are not shifted.
"""

from collections.abc import Sequence

import numpy as np

from jaxmed.data.examples import Example, TextOptions
from jaxmed.data.records import Record, RecordError
from jaxmed.data.tokenizer import IGNORE, IMAGE_ID, IMAGE_TOKEN, Tokenizer
from jaxmed.errors import UserError

PLACEHOLDER = "<im_patch>"


def question_text(text: str) -> str:
    """A human turn without `<image>` and the line break beside it; all else is the user's, a leading blank too."""
    for mark in (f"{IMAGE_TOKEN}\n", f"\n{IMAGE_TOKEN}", IMAGE_TOKEN):
        text = text.replace(mark, "")
    return text


def behind_placeholders(question: str, images: int, options: TextOptions) -> str:
    return PLACEHOLDER * (images * options.places) + question_text(question)


def encode_answered(record: Record, tokenizer: Tokenizer, options: TextOptions) -> Example:
    """One question and its answer, cut at `max_length`. Behind the text comes the end token, unless the text was cut."""
    fault = placeholder_fault(len(record.images), [turn.role for turn in record.turns])
    if fault:
        raise RecordError(fault)
    question = behind_placeholders(record.turns[0].value, len(record.images), options)
    answer = record.turns[1].value if len(record.turns) == 2 else ""
    ids = tokenizer.encode(f"{question} {answer}", max_length=options.max_length)
    alone = tokenizer.encode(question, max_length=options.max_length)
    asked, valid = len(alone), len(ids)
    joined = ids[:asked] != alone
    pad, end = _padding(tokenizer, options), end_id(tokenizer)
    is_cut = 0 < options.max_length <= valid
    ids = np.array(ids if is_cut else [*ids, end], np.int32)
    # Padding ids inside the answer are not supervised either: upstream finds padding by its id.
    labels = np.where((np.arange(len(ids)) < asked) | (ids == pad), IGNORE, ids).astype(np.int32)
    if not is_cut:
        labels[valid] = end
    if options.fill and options.max_length > len(ids):
        more = options.max_length - len(ids)
        ids = np.concatenate([ids, np.full(more, pad, np.int32)])
        labels = np.concatenate([labels, np.full(more, IGNORE, np.int32)])
    start = image_start(ids, len(record.images), tokenizer, options)
    reason = _void_reason(labels, answer, len(record.images), start, len(ids), options)
    if joined and not reason:
        reason = (
            f"the tokenizer joins the end of its question ({question[-12:]!r}) with its answer, so that it "
            "cannot be told where the answer begins; take blanks off the question's end"
        )
    return Example(ids, np.full_like(labels, IGNORE) if reason else labels, reason, start)


def encode_question(text: str, images: int, tokenizer: Tokenizer, options: TextOptions) -> Example:
    """A question to be answered, with the BOS that the tokenizer gives it; it is never cut."""
    if images > 1:
        raise UserError(f"the template m3d takes one image, this question has {images}; ask about them one by one")
    if images and not options.places:
        raise UserError("a question has an image, and the model reads none (visual.kind is none); leave the image out")
    ids = np.array(tokenizer.encode(behind_placeholders(text, images, options)), np.int32)
    start = image_start(ids, images, tokenizer, options)
    if start + options.places * images > len(ids):
        raise UserError("the question is empty, so that the last image token has no place; write a question")
    return Example(ids, np.full_like(ids, IGNORE), "", start)


def placeholder_fault(images: int, roles: Sequence[str]) -> str:
    """What a record has that this layout cannot hold, "" where nothing is wrong."""
    if len(roles) > 2:
        return f"the template m3d takes one question and its answer, this has {len(roles)} turns; split the record"
    if images > 1:
        return f"the template m3d takes one image, this has {images}; split the record"
    return ""


def _void_reason(labels: np.ndarray, answer: str, images: int, start: int, length: int, options: TextOptions) -> str:
    if images and not options.places:
        return "it has an image, and the model reads none (visual.kind is none); take another model or records of text alone"
    if start + options.places * images > length:
        return f"its image's {options.places} tokens do not fit into {length} (data.max_length); raise that"
    if not answer:
        return "its question has no answer; add the answer"
    # Nothing comes before the first token, so a label there can never be asked for.
    if (labels[1:] == IGNORE).all():
        return f"it is cut at {options.max_length} tokens (data.max_length), before its answer; raise that"
    return ""


def _padding(tokenizer: Tokenizer, options: TextOptions) -> int:
    return options.pad_id if options.pad_id >= 0 else tokenizer.pad_id


def end_id(tokenizer: Tokenizer) -> int:
    if not tokenizer.eos_ids:
        raise UserError("the tokenizer names no end token (eos_token), with which the template m3d closes an answer; add it")
    return tokenizer.eos_ids[0]


def image_start(ids: np.ndarray, images: int, tokenizer: Tokenizer, options: TextOptions) -> int:
    """Where image tokens go: position 1 ("offset"), or the first placeholder; -1 without an image."""
    if not images or not options.places:
        return -1
    if options.splice == "offset":
        return 1
    return int(np.argmax(ids == tokenizer.token_id(PLACEHOLDER)))


def placeholder_warning(ids: np.ndarray | Sequence[int], tokenizer: Tokenizer) -> str:
    """What splicing at position 1 costs here, "" where a BOS stands first, as upstream takes for granted."""
    ids = list(ids)
    placeholder = tokenizer.token_id(PLACEHOLDER)
    if placeholder not in ids[:1]:
        return ""
    after = next((token for token in ids if token != placeholder), None)
    lost = "the last image token" if after is None else f"the first token of the question ({tokenizer.piece(after).strip()!r})"
    return (
        f"the tokenizer adds no BOS: image tokens go to positions 1, 2, ... as upstream has it, so {PLACEHOLDER} stays at "
        f"position 0 and {lost} is overwritten; with data.splice placeholders each stands where it belongs"
    )


def as_upstream(example: Example, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(ids with IMAGE_ID for every placeholder, labels), as long as the row is. (Without placeholders: ids as they are.)"""
    placeholder = tokenizer.token_id(PLACEHOLDER)
    if example.image_start < 0 or placeholder is None:
        return example.ids, example.labels
    return np.where(example.ids == placeholder, IMAGE_ID, example.ids).astype(np.int32), example.labels
