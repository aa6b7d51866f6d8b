"""Multiple choice by likelihood: which continuation of the prompt the model holds for most likely.

    letters   the letter alone (" A", " B", ...), so that the options' wording does not weigh in
    options   letter and text as M3D's targets have them (" A. left lung")
    texts     the option's text alone

Calibration over the set: a model may like some letters whatever is asked. Batch calibration (Zhou et al., "Batch Calibration",
arXiv 2309.17249) takes the mean probability of each letter over the answered questions for that liking, and divides by it. It
needs no passes of its own and no labels; it takes for granted that right answers are spread over the letters.

Axis letters: Q questions, C options of one.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxmed.data.conversation import encode_text, find_template
from jaxmed.data.examples import TextOptions
from jaxmed.data.placeholders import behind_placeholders
from jaxmed.data.templates import render
from jaxmed.data.tokenizer import IMAGE_TOKEN, Tokenizer
from jaxmed.errors import UserError

Likelihood = Literal["letters", "options", "texts"]
FEWEST = 8
"""Questions with the same letters, below which their mean says nothing about the model's liking"""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which option is likeliest."""

    letter: str
    probabilities: dict[str, float]
    """By letter, with sum 1"""
    log_likelihoods: dict[str, float]
    """By letter, of the whole continuation"""


def wordings(options: Mapping[str, str], kind: Likelihood) -> list[str]:
    """What each option is written as."""
    forms = {"letters": "{0}", "options": "{0}. {1}", "texts": "{1}"}
    return [forms[kind].format(letter, text) for letter, text in options.items()]


def continuations(
    turns: Sequence[tuple[str, str]],
    texts: Sequence[str],
    prompt: np.ndarray,
    tokenizer: Tokenizer,
    template: str,
    given: TextOptions,
) -> tuple[np.ndarray, ...]:
    """int32 ids of each text as the answer to come, as training tokenises it behind its prompt, without its end token; with it
    where one text begins another, which could never be likelier than its beginning.

    `turns`: the conversation so far, `prompt`: its ids. UserError where two texts are the same ids, or one has none.
    """
    found = [_continuation(turns, text, prompt, tokenizer, template, given) for text in texts]
    for n, ids in enumerate(found):
        if not len(ids):
            raise UserError(f"the option {texts[n]!r} has no tokens; mend the options")
        same = [texts[m] for m in range(n) if np.array_equal(found[m], ids)]
        if same:
            raise UserError(f"the options {same[0]!r} and {texts[n]!r} are the same tokens; take another --likelihood")
    if any(a is not b and np.array_equal(a, b[: len(a)]) for a in found for b in found):
        closing = find_template(template).end
        end = tokenizer.encode(closing, False) if closing else list(tokenizer.eos_ids[:1])
        found = [np.append(ids, end).astype(np.int32) for ids in found]
    return tuple(found)


def _continuation(
    turns: Sequence[tuple[str, str]], text: str, prompt: np.ndarray, tokenizer: Tokenizer, template: str, given: TextOptions
) -> np.ndarray:
    chosen = find_template(template)
    if chosen.mask == "m3d":
        question = behind_placeholders(turns[-1][1], turns[-1][1].count(IMAGE_TOKEN), given)
        before, whole = question, f"{question} {text}"
        ids = tokenizer.encode(whole)
    else:
        before = render(chosen, [*turns, ("gpt", None)])
        whole = render(chosen, [*turns, ("gpt", text)]).removesuffix(chosen.end).rstrip()
        ids = encode_text(whole, tokenizer)
    if ids[: len(prompt)] == prompt.tolist():
        return np.asarray(ids[len(prompt) :], np.int32)
    # the border between question and answer is no border of tokens here: the answer by itself
    return np.asarray(tokenizer.encode(whole[len(before) :], False), np.int32)


def choice_of(options: Mapping[str, str], likelihoods: Sequence[np.ndarray], per_token: bool) -> Choice:
    """likelihoods: per option the log-likelihoods of its tokens. `per_token`: their mean counts, else their sum."""
    totals = [float(np.sum(tokens, dtype=np.float64)) for tokens in likelihoods]
    scores = [total / len(tokens) for total, tokens in zip(totals, likelihoods, strict=True)] if per_token else totals
    shares = _softmax(np.asarray(scores))
    letters = list(options)
    return Choice(
        letters[int(shares.argmax())],
        dict(zip(letters, shares.tolist(), strict=True)),
        dict(zip(letters, totals, strict=True)),
    )


def _softmax(scores: np.ndarray) -> np.ndarray:
    shares = np.exp(scores - scores.max())
    return shares / shares.sum()


def batch_calibrated(shares: np.ndarray) -> np.ndarray:
    """[Q, C] probabilities -> the same, each option's divided by its mean over the questions, with sum 1 again."""
    with np.errstate(divide="ignore"):
        scores = np.log(shares) - np.log(shares.mean(axis=0))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def answer_entry(name: str, question: str, options: Mapping[str, str], choice: Choice) -> dict[str, Any]:
    """One answer as a `*_vqa.json` has it; `answer` is written as M3D's targets are."""
    return {
        "id": name,
        "question": question,
        "answer": f"{choice.letter}. {options[choice.letter]}",
        "prediction": choice.letter,
        "probabilities": choice.probabilities,
        "log_likelihoods": choice.log_likelihoods,
    }


def calibrate(
    studies: Sequence[dict[str, Any]], options: Mapping[str, Mapping[str, str]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Batch calibration of the answers of a finished file: `studies` as it has them, `options` of each record by its id ->
    the studies anew, with `uncalibrated` beside the new probabilities, and what the person should know.

    Questions with other letters (two options instead of four) are calibrated by themselves.
    """
    groups: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for s, study in enumerate(studies):
        for a, answer in enumerate(study["conversations_out"]):
            if "probabilities" in answer:
                groups[tuple(sorted(answer["probabilities"]))].append((s, a))
    made = [dict(study, conversations_out=list(study["conversations_out"])) for study in studies]
    notices = []
    for letters, places in groups.items():
        if len(places) < FEWEST:
            notices.append(
                f"{len(places)} questions with the options {', '.join(letters)} are too few to be calibrated ({FEWEST})"
            )
            continue
        answers = [made[s]["conversations_out"][a] for s, a in places]
        before = np.asarray([[answer["probabilities"][letter] for letter in letters] for answer in answers])
        after = batch_calibrated(before)
        for (s, a), answer, shares in zip(places, answers, after, strict=True):
            letter = letters[int(shares.argmax())]
            made[s]["conversations_out"][a] = answer | {
                "answer": f"{letter}. {options[answer['id']][letter]}",
                "prediction": letter,
                "probabilities": dict(zip(letters, shares.tolist(), strict=True)),
                "uncalibrated": answer["probabilities"],
            }
        means = ", ".join(f"{letter} {mean:.3f}" for letter, mean in zip(letters, before.mean(axis=0), strict=True))
        notices.append(f"calibrated {len(places)} answers by the mean probabilities of their letters: {means}")
    return made, notices
