"""Judges: something that completes prompts. A language model in memory, or a file of answers; a server that a person names is
jaxmed.evaluate.endpoint's, and the only way on which medical texts leave this machine."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxmed.errors import UserError
from jaxmed.evaluate import green

_ROOM_STEP = 256
"""Tokens of a reply are bounded in such steps: each bound is a compiled program"""


class JudgeError(Exception):
    """The judge did not answer; the message says why."""


class Judge(Protocol):
    name: str
    """What is written beside every figure"""
    batch: int
    """Prompts of one call"""
    parallel: int
    """Calls at a time"""
    may_be_absent: bool
    """Whether many calls without an answer in succession mean that it answers none any more"""

    def complete(self, prompts: Sequence[str]) -> list[str]:
        """One text a prompt; JudgeError where it cannot."""


def prompt_key(prompt: str) -> str:
    """Names a prompt in files."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:24]


class LocalJudge:
    """A language model of our own `load`, greedy, in the published judge's format of a chat or in the model's own."""

    parallel, may_be_absent = 1, False

    def __init__(self, model: Any, name: str, batch: int = 8, length: int = green.LENGTH, own_chat: bool = False):
        """`model`: a jaxmed.api.Model of text alone. `length`: tokens of prompt and reply together."""
        self.name = f"{name}, its own chat template" if own_chat else name
        self._model, self.batch, self._length, self._own_chat = model, batch, length, own_chat

    def ids(self, prompt: str) -> np.ndarray:
        """Ids of a prompt [T] int32; in the published format the end token comes last."""
        if self._own_chat:
            return self._model.prompt(None, prompt).ids[: self._length]
        tokenizer = self._model.tokenizer
        if not tokenizer.eos_ids:
            raise UserError(f"{self.name}: the judge's tokenizer names no end token; give another folder with --judge")
        end = tokenizer.eos_ids[0]
        found = tokenizer.encode(green.chat(prompt, tokenizer.piece(end)))
        if not found or found[-1] != end:
            found.append(end)
        return np.asarray([*found[: self._length - 1], end] if len(found) > self._length else found, np.int32)

    def complete(self, prompts: Sequence[str]) -> list[str]:
        ids = [self.ids(prompt) for prompt in prompts]
        room = [self._length - len(row) for row in ids]
        if max(room) < 1:
            raise JudgeError(f"the prompt fills the judge's {self._length} tokens; a shorter cut of the reports leaves room")
        most = -(-max(room) // _ROOM_STEP) * _ROOM_STEP
        answers = self._model.generate([None] * len(ids), ids, max_new_tokens=most, batch=self.batch)
        kept = [np.asarray(answer.token_ids[: max(left, 0)]) for answer, left in zip(answers, room, strict=True)]
        return [self._model.generation(row).text for row in kept]


class FileJudge:
    """Answers that somebody wrote for the prompts of `write_requests`: lines with `key` and `answer`."""

    batch, parallel, may_be_absent = 1, 1, False

    def __init__(self, path: str):
        self.name, self._path, self._answers = f"answers of {Path(path).name}", path, dict[str, str]()
        self._differ = set[str]()
        """Keys with answers that say different things"""
        for row in read_lines(path):
            key, answer = row.get("key"), row.get("answer")
            if not isinstance(key, str) or not isinstance(answer, str):
                where = f"the line with the key {key!r}" if isinstance(key, str) else "a line"
                raise UserError(f'{path}: {where} lacks the texts "key" and "answer"; keep the keys of --judge-requests')
            if self._answers.setdefault(key, answer) != answer:
                self._differ.add(key)
            self._answers[key] = answer
            self.name = str(row.get("judge") or self.name)

    def complete(self, prompts: Sequence[str]) -> list[str]:
        keys = [prompt_key(prompt) for prompt in prompts]
        missing = [key for key in keys if key not in self._answers]
        if missing:
            raise JudgeError(
                f"the file of answers has none for the key {missing[0]}; it depends on the reports, --green-version and "
                "--green-prompt"
            )
        return [self._answers[key] for key in keys]

    def notices(self, prompts: Iterable[str]) -> list[str]:
        """What is odd about the file, after all `prompts` were asked."""
        strangers = self._answers.keys() - {prompt_key(prompt) for prompt in prompts}
        found = []
        if strangers:
            found.append(
                f"{self._path}: {len(strangers)} of {len(self._answers)} answers are to questions that were not asked, such as "
                f"{min(strangers)}"
            )
        if self._differ:
            found.append(
                f"{self._path}: {len(self._differ)} keys have several answers that differ, such as {min(self._differ)}; "
                "the last counts"
            )
        return found


def read_lines(path: str) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]  # texts may hold other ends of lines
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of JSON lines") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON lines ({error}); write one object a line") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: holds a line that is no object; write one object a line")
    return rows
