"""A judge behind an address: OpenAI's chat completions, from whatever server speaks them.

What can go wrong on the way is told as a JudgeError: no answer in time, a refusal (with what the server says of it), an answer
that is none or that was cut short. Busy servers are asked again, after as long as they ask for. The key stands in no message.
"""

import email.utils
import http.client
import ipaddress
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from jaxmed.errors import UserError
from jaxmed.evaluate.judges import JudgeError

ATTEMPTS = 3
_PAUSE = 2.0
"""Seconds before the second attempt; twice as many before the next"""
_LONGEST_PAUSE = 120.0
"""Seconds; a server that asks for more patience (Retry-After) is asked earlier"""
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_LARGEST = 1 << 24
"""Bytes of an answer"""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Reports and key go to the address that was named, and to no other."""

    def redirect_request(self, *args: Any) -> None:
        return None


class EndpointJudge:
    """A server that speaks OpenAI's chat completions."""

    batch, may_be_absent = 1, True

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        timeout: float = 120.0,
        parallel: int = 4,
        tokens: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """`timeout`: seconds of a whole answer; `tokens`: of a reply at most (0: the server's own bound)."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--judge {url}: give an address such as http://localhost:8000/v1, or the folder of a model")
        if parts.username or parts.password:
            raise UserError("--judge: the address holds a password; put it into the variable that --judge-key-variable names")
        self._key = key.strip()  # a line's end, from a file
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError("the judge's key holds characters that no key has; set the variable of --judge-key-variable anew")
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        self._url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
        self.host = parts.hostname
        self.name, self.parallel = f"{model} at {parts.netloc}", parallel
        self._model, self._tokens, self._timeout, self._sleep = model, tokens, timeout, sleep
        # what is for this machine goes through no proxy, whatever the environment says
        direct = () if self.is_remote else (urllib.request.ProxyHandler({}),)
        self._opener = urllib.request.build_opener(_NoRedirect, *direct)

    @property
    def is_remote(self) -> bool:
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"

    def complete(self, prompts: Sequence[str]) -> list[str]:
        return [self._ask(prompt) for prompt in prompts]

    def _ask(self, prompt: str) -> str:
        # no bound of our own on the reply: servers that know their context refuse one that is too large
        content = {"model": self._model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        body = json.dumps(content | ({"max_tokens": self._tokens} if self._tokens else {})).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        for attempt in range(1, ATTEMPTS + 1):
            pause = _PAUSE * 2 ** (attempt - 1)
            try:
                until = time.monotonic() + self._timeout
                with self._opener.open(urllib.request.Request(self._url, body, headers), timeout=self._timeout) as reply:
                    return self._text_of(_read(reply, until))
            except urllib.error.HTTPError as error:
                what, again = f"it answered {error.code} {error.reason}{self._said(error)}", error.code in _BUSY
                pause = max(pause, min(_asked_pause(error), _LONGEST_PAUSE))
                error.close()
            except TimeoutError:
                what, again = f"no answer within {self._timeout:g} s", True
            except http.client.HTTPException as error:
                what, again = f"its answer broke off ({error!r})", True
            except OSError as error:
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                what, again = (f"no answer within {self._timeout:g} s" if late else f"it cannot be reached ({reason})"), True
            if not again or attempt == ATTEMPTS:
                break
            self._sleep(pause)
        raise JudgeError(self._without_key(f"{self.name}: {what}{f', {ATTEMPTS} times' if again else ''}"))

    def _said(self, error: urllib.error.HTTPError) -> str:
        """What a refusal says of its reason, such as a model's name that the server does not know."""
        try:
            text = error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return ""
        try:
            found = json.loads(text)
            found = found.get("error", found)
            text = found if isinstance(found, str) else str(found.get("message") or found.get("detail") or "")
        except (ValueError, AttributeError):
            pass
        text = " ".join(text.split())
        path = urllib.parse.urlsplit(self._url).path
        where = f" (at {path}; mostly the address ends with /v1)" if error.code == 404 and "/v1/" not in path else ""
        return where + (f": {text[:200]}" if text else "")

    def _text_of(self, reply: bytes) -> str:
        """The text of a chat completion."""
        choice, text = {}, None
        try:
            choice = json.loads(reply)["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            pass
        if isinstance(choice, dict) and choice.get("finish_reason") == "length":
            raise JudgeError(
                f"its reply was cut short after {len(text or '')} characters; let the server write longer ones, or give "
                "--judge-tokens"
            )
        if not isinstance(text, str):
            start = reply[:80].decode("utf-8", "replace")
            raise JudgeError(self._without_key(f"what it answered is no chat completion: {start!r}"))
        return text

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _read(reply: http.client.HTTPResponse, until: float) -> bytes:
    """The whole body; TimeoutError where it is not there by `until`, however busily it drips."""
    pieces, size = [], 0
    while piece := reply.read1(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if time.monotonic() > until:
            raise TimeoutError
        if size > _LARGEST:
            raise JudgeError(f"its answer is longer than {_LARGEST >> 20} MB")
    if reply.length:
        raise http.client.IncompleteRead(b"", reply.length)
    return b"".join(pieces)


def _asked_pause(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks to wait (Retry-After: seconds, or a date), 0 where it does not."""
    asked = error.headers.get("Retry-After", "") if error.headers else ""
    try:
        return float(asked)
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
    except (TypeError, ValueError):
        return 0.0
