"""What an answer of a completions server says, read strictly: one choice, of the prompt that was sent, whole, in numbers that are numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness_ext.models.served import AttemptError

CLOSE = 1e-3
"""Nats by which a log-probability may exceed 0, or that of the likeliest token: rounding."""
UNREADABLE = "\N{REPLACEMENT CHARACTER}"
"""In the text of a token that is a part of a letter."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that was sent back, with its log-probabilities."""

    logprobs: list[float]
    """Of each token of the prompt but the first, and of the one generated after it; in nats."""
    tops: list[dict[str, float]]
    """Of each of these places, what the likeliest tokens there are."""
    tokens: list[str]
    """The text of each of these tokens."""

    def score(self, start: int) -> tuple[float, bool]:
        """The log-likelihood of the prompt's tokens from `start` on, and whether each of them was the likeliest."""
        logprobs, tops = self.logprobs[start - 1 : -1], self.tops[start - 1 : -1]
        return math.fsum(logprobs), all(own >= max(top.values()) for own, top in zip(logprobs, tops, strict=True))


@dataclass(frozen=True, slots=True)
class Text:
    """A generated answer."""

    text: str
    first: dict[str, float] | None
    """The log-probabilities of the likeliest first tokens, where the server says them."""
    read: int | None
    """Tokens of the prompt that the server says it read."""


class Spelling:
    """Tells whether a token's text in an answer is that of a token id. Servers decode tokens each in a way of their own: with
    or without the space before a word, the raw piece, `token_id:5`, `bytes:…`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self.write = functools.cache(self._write)

    def fits(self, token: int, text: object) -> bool:
        """Whether `text` may be how a server writes `token`."""
        if not isinstance(text, str):
            return False
        if text.startswith("token_id:"):
            return text == f"token_id:{token}"
        written, raw = self.write(token)
        if text in (written, raw) or token in self._special or UNREADABLE in written + text or text.startswith("bytes:"):
            return True
        return text.strip(" ▁Ġ") == written.strip(" ")

    def _write(self, token: int) -> tuple[str, str]:
        return str(self._tokenizer.decode([token])), str(self._tokenizer.convert_ids_to_tokens(token))


def read_echo(answer: Any, ids: Sequence[int], spelling: Spelling) -> Echo:
    """The prompt `ids` as it was sent back. Raises AttemptError where it is another one, a part of it, or has no log-probabilities."""
    choice, sent = _read_choice(answer), len(ids)
    check_read(read_usage(answer), sent)
    found = choice.get("logprobs")
    lists: list[Any] = [found.get(name) for name in ("tokens", "token_logprobs", "top_logprobs")] if isinstance(found, dict) else []
    if not lists or not all(isinstance(part, list) for part in lists):
        kind = f"an object of {', '.join(map(str, found)) or 'nothing'}" if isinstance(found, dict) else f"{found!r:.80}"
        raise AttemptError(f"the answer has no log-probabilities of the prompt: its logprobs are {kind}")
    tokens, logprobs, tops = lists
    if not len(tokens) == len(logprobs) == len(tops):
        raise AttemptError(
            f"the answer has {len(tokens)} tokens, {len(logprobs)} log-probabilities and {len(tops)} of the likeliest"
        )
    if len(tokens) != sent + 1:
        raise AttemptError(
            f"{sent} tokens were sent, and log-probabilities of {len(tokens)} came back, not of these and the one generated",
            outcome="backend_limit" if len(tokens) <= sent else "backend_error",
            again=len(tokens) > sent,
        )
    for place, (token, text) in enumerate(zip(ids, tokens, strict=False)):
        if not spelling.fits(token, text):
            wanted = spelling.write(token)[0]
            raise AttemptError(f"the answer is to another prompt: its token {place} is {text!r:.40}, and {wanted!r:.40} was sent")
    if logprobs[0] is not None:
        raise AttemptError("the answer has a log-probability of the first token, which nothing stands before")
    for place in range(1, sent + 1):
        _check_number(logprobs[place], place)
        top = tops[place]
        if not isinstance(top, dict) or not top:
            raise AttemptError(f"the answer does not say which token is the likeliest at {place}: found {top!r:.40}")
        for value in top.values():
            _check_number(value, place)
        if logprobs[place] > max(top.values()) + CLOSE:
            raise AttemptError(f"at {place} the answer's likeliest token is less likely than the one that is there")
    return Echo(logprobs[1:], tops[1:], tokens[1:])


def read_text(answer: Any, *, sent: int | None, budget: int, chat: bool) -> Text:
    """The generated text. Raises AttemptError where there is none, fewer than `sent` tokens of the prompt were read, or the answer was
    ended for its length before `budget` tokens."""
    choice, read, made = _read_choice(answer), read_usage(answer), read_usage(answer, "completion_tokens")
    if sent is not None:
        check_read(read, sent)
    message = choice.get("message") if chat else choice
    text = message.get("content" if chat else "text") if isinstance(message, dict) else None
    ended = choice.get("finish_reason")
    if ended == "content_filter":
        raise AttemptError("the answer was withheld by a content filter", again=False)
    if ended == "length" and made is not None and made < budget:
        raise AttemptError(
            f"the answer was cut after {made} of {budget} tokens: there is no room for more", outcome="backend_limit", again=False
        )
    if text is None and chat and isinstance(message, dict):
        raise AttemptError(
            f"the answer has no content (finish_reason {ended!r:.20}); a model that reasons first needs more max_gen_toks",
            again=False,
        )
    if not isinstance(text, str):
        raise AttemptError(f"the answer has no text: {sorted(map(str, choice))!r:.80}")
    return Text(text, _read_first(choice.get("logprobs")), read)


def read_usage(answer: Any, name: str = "prompt_tokens") -> int | None:
    """The tokens of the prompt that the server says it read; None where it says nothing. `name`: or of what else."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    read = usage.get(name) if isinstance(usage, dict) else None
    return read if isinstance(read, int) and not isinstance(read, bool) and read > 0 else None


def check_read(read: int | None, sent: int) -> None:
    """Raises AttemptError where fewer tokens were read than were sent."""
    if read is not None and read < sent:
        raise AttemptError(
            f"the server cut the prompt: {sent} tokens were sent, and it reports {read} (usage.prompt_tokens)",
            outcome="backend_limit",
            again=False,
        )


def _read_choice(answer: Any) -> dict[str, Any]:
    """The one choice of an answer to one prompt. Raises AttemptError where there is another number of them."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        raise AttemptError(f"the answer has no choices: {answer!r:.120}")
    if len(choices) != 1:
        raise AttemptError(f"the answer has {len(choices)} choices, and one prompt was sent")
    (choice,) = choices
    if not isinstance(choice, dict) or choice.get("index", 0) != 0:
        raise AttemptError(f"the answer's choice is no object of index 0: {choice!r:.80}")
    return choice


def _read_first(found: Any) -> dict[str, float] | None:
    """The likeliest first tokens: of a completion's `top_logprobs`, or of a chat's `content`, which llama.cpp has for both."""
    if not isinstance(found, dict):
        return None
    if isinstance(found.get("content"), list) and found["content"]:
        listed: Any = found["content"][0].get("top_logprobs") if isinstance(found["content"][0], dict) else None
        pairs: list[tuple[Any, Any]] = [(one.get("token"), one.get("logprob")) for one in listed or [] if isinstance(one, dict)]
    else:
        tops = found.get("top_logprobs")
        pairs = list(tops[0].items()) if isinstance(tops, list) and tops and isinstance(tops[0], dict) else []
    known = {str(token): float(value) for token, value in pairs if _is_number(value) and math.isfinite(value)}
    return known or None


def _check_number(value: object, place: int) -> None:
    if not _is_number(value) or not math.isfinite(value) or value > CLOSE:  # type: ignore[operator, arg-type]
        raise AttemptError(f"the answer's log-probability at {place} is {value!r:.40}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
