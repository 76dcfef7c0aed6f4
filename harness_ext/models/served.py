"""A server that speaks OpenAI's API: one question at a time, and what came of it, within bounds of attempts and of seconds.

Every question has a connection of its own, so that nothing a server sends late can be taken for the answer to another. Whatever the
server says is read as a stranger's: in one line, shortened, and with the API key taken out.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from harness_ext import credentials
from harness_ext.cells import Outcome, Unmeasured
from harness_ext.errors import ModelError

log = logging.getLogger(__name__)

T = TypeVar("T")
Read = Callable[[Any], T]
"""What makes of a JSON document what it says. Raises AttemptError where it does not."""
TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size)|model (length|len\b)|max_model_len|max_total_tokens|(prompt|input|inputs|request)\b.{0,60}"
    r"\b(too (long|large)|exceed|less than \d+ tokens|more than \d+ tokens)|maximum.{0,40}\btokens",
    re.IGNORECASE | re.DOTALL,
)
"""How servers say that a prompt does not fit: OpenAI, Azure, vLLM, SGLang, llama.cpp, llama-cpp-python, text-generation-inference."""
NO_MEMORY = re.compile(r"out of memory|failed to allocate|cannot allocate", re.IGNORECASE)
FINAL = {
    301: "it has moved; give the address that it has now",
    302: "it has moved; give the address that it has now",
    307: "it has moved; give the address that it has now",
    308: "it has moved; give the address that it has now",
    401: "it wants a key, or another one: set OPENAI_API_KEY",
    403: "this key may not ask for this",
    404: "the end of base_url (/v1/completions or /v1/chat/completions), or the model's name, is not one of that server's",
    405: "base_url ends in no address that can be asked; it should end in /v1/completions or /v1/chat/completions",
}
"""Statuses that no other prompt will change, and what to do."""
AGAIN = frozenset({408, 409, 425, 429})
"""Statuses below 500 that another attempt may change."""
HIDDEN = b"***"
"""In place of the key, wherever a server repeats it."""
SAID = 300
"""Characters of what a server said that are repeated."""
MOST_BYTES = 1 << 20
"""Of an answer; for each token asked, PER_TOKEN more."""
PER_TOKEN = 2048
PIECE = 1 << 16
"""Bytes read at a time."""
LONGEST_PAUSE = 30.0
"""Seconds between two attempts, unless the server asks for more."""


class AttemptError(Exception):
    """An attempt that gave no answer: what becomes of the prompt if no other attempt does, and whether one is worth it."""

    def __init__(self, reason: str, *, outcome: Outcome = "backend_error", again: bool = True, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.outcome, self.again, self.wait = reason, outcome, again, wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How long a question is asked."""

    attempts: int
    """At least 1."""
    timeout: float
    """Seconds, of one attempt, until its last byte is there."""
    total: float
    """Seconds, of all attempts and the pauses between them."""


class Server:
    """One address. `key`: an API key, or nothing. `verify`: as requests has it."""

    def __init__(self, url: str, bounds: Bounds, *, key: str = "", verify: bool | str = True) -> None:
        check_url(url)
        key = key.strip()
        if not (key.isascii() and key.isprintable()):
            raise ModelError("OPENAI_API_KEY holds characters that no header can carry; set it anew")
        self.url, self.bounds = url, bounds
        self._key, self._verify = key, verify

    def ask(self, question: Mapping[str, Any], read: Read[T], *, tokens: int = 0) -> T | Unmeasured:
        """What `read` makes of the answer; an outcome where the bounds ended before there was one. `tokens`: of the prompt.

        Raises ModelError for what concerns every prompt: a wrong key, address or model name.
        """
        body = json.dumps(question).encode()
        end = time.monotonic() + self.bounds.total
        for attempt in range(1, self.bounds.attempts + 1):
            try:
                return read(self._post(body, min(end, time.monotonic() + self.bounds.timeout), MOST_BYTES + PER_TOKEN * tokens))
            except AttemptError as fault:
                wait = min(LONGEST_PAUSE, 0.5 * 2**attempt) if fault.wait is None else fault.wait
                left = end - time.monotonic()
                if not fault.again or attempt == self.bounds.attempts or wait >= left:
                    return Unmeasured(fault.outcome, self._count_attempts(fault, attempt, wait if wait >= left else 0))
                log.warning("%s; asked again in %.3g s", fault.reason, wait)
                time.sleep(wait)
        raise AssertionError("bounds without an attempt")

    def _count_attempts(self, fault: AttemptError, attempt: int, wait: float) -> str:
        times = f", {attempt} times" if attempt > 1 else ""
        over = f"; another attempt in {wait:.3g} s would be past the {self.bounds.total:.4g} s of max_seconds"
        return f"{fault.reason}{times}" + (over if fault.again and wait and attempt < self.bounds.attempts else "")

    def _post(self, body: bytes, end: float, most: int) -> Any:
        """The JSON document that came back by `end`, in seconds of the monotonic clock. Raises AttemptError and ModelError."""
        import requests  # not installed without the extra `api`
        from urllib3.exceptions import HTTPError

        seconds = max(0.1, end - time.monotonic())
        headers = {"Content-Type": "application/json", "Connection": "close"}
        try:
            with requests.post(
                self.url,
                data=body,
                headers=headers,
                auth=self._sign,
                verify=self._verify,
                timeout=(min(30.0, seconds), seconds),
                stream=True,
                allow_redirects=False,
            ) as response:
                text = _read_body(response.raw, end, most).replace(self._key.encode() or HIDDEN, HIDDEN)
                status, kind = response.status_code, response.headers.get("Content-Type", "")
                wait = _read_wait(response.headers.get("Retry-After"))
        except requests.exceptions.Timeout:
            raise AttemptError(f"no answer within {seconds:.3g} s") from None
        except (requests.exceptions.RequestException, HTTPError, OSError) as error:
            if "timed out" in str(error):
                raise AttemptError(f"no whole answer within {seconds:.3g} s") from None
            raise AttemptError(f"the connection failed: {self._say(_find_cause(error))}") from None
        if status != 200:
            raise self._fail(status, text, wait)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise AttemptError(
                f"the answer is no JSON ({len(text)} bytes of {self._say(kind or 'no content type')}): {self._say(text)}"
            ) from None
        if isinstance(found, dict) and found.get("error") and not found.get("choices"):
            raise self._fail(status, text, wait)
        return found

    def _sign(self, request: Any) -> Any:
        """The request with the key: so given, no .netrc takes its place, and no other host is shown it."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _fail(self, status: int, text: bytes, wait: float | None) -> AttemptError:
        """What an error answer means. Raises ModelError where it means it for every prompt."""
        said = f"the server answered {status}: {self._say(_find_message(text))}"
        if status in FINAL:
            raise ModelError(f"{self.url}: {said}; {FINAL[status]}") from None
        if status == 413 or (status != 429 and TOO_LONG.search(said)):
            return AttemptError(said, outcome="backend_limit", again=False)
        if NO_MEMORY.search(said):
            return AttemptError(said, outcome="out_of_memory", wait=wait)
        return AttemptError(said, again=status in AGAIN or status >= 500 or status == 200, wait=wait)

    def _say(self, text: str | bytes) -> str:
        """A stranger's text in one short line, without the key."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        if self._key:
            text = text.replace(self._key, HIDDEN.decode())
        text = credentials.hide(text)
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 8 * SAID]).split())
        return (line[:SAID] + " …" if len(line) > SAID else line) or "nothing"


def check_url(url: Any) -> None:
    """Raises ModelError where `url` is no address, or holds a secret: it is written into results."""
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
    except ValueError:
        parts = None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ModelError(f"base_url: found {url!r}; expected an address such as http://localhost:8000/v1/completions")
    if credentials.in_address(url):
        raise ModelError("base_url holds a key or a password, and model arguments are written into results; set OPENAI_API_KEY")


def _read_body(raw: Any, end: float, most: int) -> bytes:
    """All bytes of a response; piece by piece, since a server that sends a byte now and then is never late by its own clock."""
    pieces, size = list[bytes](), 0
    while True:
        piece = raw.read1(PIECE, decode_content=True)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise AttemptError(f"the answer is longer than {most} bytes", again=False)
        if time.monotonic() > end:
            raise AttemptError(f"the answer was not whole in time: {size} bytes came")


def _read_wait(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date (RFC 9110, 10.2.3); None where it does not."""
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value.strip()):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    now = datetime.datetime.now(date.tzinfo)
    return max(0.0, (date - now).total_seconds())


def _find_message(text: bytes) -> str:
    """What an error answer says: OpenAI's `error.message`, other servers' `error`, `message` or `detail`, or all of it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text[: 8 * SAID].decode("utf-8", "replace")
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found)


def _find_cause(error: BaseException) -> str:
    """The innermost of the exceptions that one was made of: those around it repeat the address and themselves."""
    while True:
        inner = error.__cause__ or error.__context__ or next((a for a in error.args if isinstance(a, BaseException)), None)
        if inner is None or inner is error:
            return f"{type(error).__name__}: {error}"
        error = inner
