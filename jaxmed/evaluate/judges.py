"""Judges: something that completes prompts. A language model in memory, an endpoint that a person names, or a file of answers.

Medical texts leave this machine only through `EndpointJudge`, and only where the person gave a URL on another one.
"""

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxmed.errors import UserError
from jaxmed.evaluate import green

ATTEMPTS = 3
_PAUSE = 2.0
"""Seconds before the second attempt; twice as many before the next"""
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class JudgeError(Exception):
    """The judge did not answer; the message says why."""


class Judge(Protocol):
    name: str
    """What is written beside every figure"""
    batch: int
    """Prompts of one call"""
    parallel: int
    """Calls at a time"""

    def complete(self, prompts: Sequence[str]) -> list[str]:
        """One text a prompt; JudgeError where it cannot."""


def prompt_key(prompt: str) -> str:
    """Names a prompt in files."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:24]


class LocalJudge:
    """A language model of our own `load`, greedy, in the published judge's format of a chat or in the model's own."""

    parallel = 1

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
        answers = self._model.generate([None] * len(ids), ids, max_new_tokens=max(room), batch=self.batch)
        kept = [np.asarray(answer.token_ids[: max(left, 0)]) for answer, left in zip(answers, room, strict=True)]
        return [self._model.generation(row).text for row in kept]


class FileJudge:
    """Answers that somebody wrote for the prompts of `write_requests`: lines with `key` and `answer`."""

    batch = parallel = 1

    def __init__(self, path: str):
        self.name, self._answers = f"answers of {Path(path).name}", {}
        for row in read_lines(path):
            if not isinstance(row.get("key"), str) or not isinstance(row.get("answer"), str):
                raise UserError(f'{path}: a line lacks the texts "key" and "answer"; keep the keys of --judge-requests')
            self._answers[row["key"]] = row["answer"]
            self.name = str(row.get("judge") or self.name)

    def complete(self, prompts: Sequence[str]) -> list[str]:
        keys = [prompt_key(prompt) for prompt in prompts]
        missing = [key for key in keys if key not in self._answers]
        if missing:
            raise JudgeError(f"the file of answers has none for the key {missing[0]}")
        return [self._answers[key] for key in keys]


def read_lines(path: str) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of JSON lines") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON lines ({error}); write one object a line") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: holds a line that is no object; write one object a line")
    return rows


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Reports and key go to the address that was named, and to no other."""

    def redirect_request(self, *args: Any) -> None:
        return None


class EndpointJudge:
    """A server that speaks OpenAI's chat completions."""

    batch = 1

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        timeout: float = 120.0,
        parallel: int = 4,
        sleep: Callable[[float], None] = time.sleep,
    ):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--judge {url}: give an address such as http://localhost:8000/v1, or the folder of a model")
        if parts.username or parts.password:
            raise UserError("--judge: the address holds a password; put it into the variable that --judge-key-variable names")
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        self._url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
        self.host = parts.hostname
        self.name, self.parallel = f"{model} at {parts.netloc}", parallel
        self._model, self._key, self._timeout, self._sleep = model, key, timeout, sleep
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def is_remote(self) -> bool:
        return not (self.host in ("localhost", "::1") or self.host.startswith("127."))

    def complete(self, prompts: Sequence[str]) -> list[str]:
        return [self._ask(prompt) for prompt in prompts]

    def _ask(self, prompt: str) -> str:
        # no bound on the reply: servers that know their context refuse one that is too large
        content = {"model": self._model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self._opener.open(urllib.request.Request(self._url, body, headers), timeout=self._timeout) as reply:
                    return _text_of(reply.read())
            except urllib.error.HTTPError as error:
                what, again = f"it answered {error.code} {error.reason}", error.code in _BUSY
                error.close()
            except TimeoutError:
                what, again = f"no answer within {self._timeout:g} s", True
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                what, again = (f"no answer within {self._timeout:g} s" if late else f"it cannot be reached ({reason})"), True
            if not again or attempt == ATTEMPTS:
                break
            self._sleep(_PAUSE * 2 ** (attempt - 1))
        raise JudgeError(f"{self.name}: {what}{f', {ATTEMPTS} times' if again else ''}")


def _text_of(reply: bytes) -> str:
    """The text of a chat completion."""
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise JudgeError(f"what it answered is no chat completion: {reply[:80].decode('utf-8', 'replace')!r}")
    return text
