"""What is asked of a server before its answers are believed: that its log-probabilities belong to the tokens they stand at, that it
has the tokenizer that was named, and that it reads a long prompt from its beginning on. No reference model is needed for any of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness_ext.cells import Unmeasured
from harness_ext.errors import ModelError
from harness_ext.models.answers import Echo, Spelling, Text

log = logging.getLogger(__name__)

TEXTS = (
    "The sun rises in the east and sets in the west. The moon",
    "One, two, three, four, five, six, seven, eight, nine, ten, eleven,",
    "The old farmer carried a box of apples to the river, and the old farmer carried a box of",
    "Water is made of hydrogen and oxygen. Salt is made of sodium and",
)
CLOSE = 0.1
"""Nats by which one log-probability may differ between two questions: engines in 16 bits differ by some hundredths."""
ENOUGH = 2
"""Tokens that have to be checked, at the least."""
NAMESAKES = 4
"""Tokens of one text that are tried, where an answer gives no more than the text."""
CHANGED = 8
"""Tokens, or words, at the beginning of a long prompt that are changed."""
FAINT = 1e-6
"""Nats; a smaller difference is none."""
SLACK = 2
"""Tokens by which a server's count of a text, or of a chat, may differ from ours: a BOS, or a word that a seam cuts otherwise."""

AskEcho = Callable[[Sequence[int]], "Echo | Unmeasured"]
Seen = Mapping[str, float]
"""Log-probabilities at the end of a prompt, by the name of what they are of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What a server says with its answers."""

    reports: bool
    """Whether it says how many tokens of the prompt it read."""
    adds: int
    """Tokens that it reads beyond those that we count."""
    tells_first: bool
    """Whether it says how likely the first tokens of an answer are."""


def find_flaw(
    ask: AskEcho,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    spelling: Spelling,
    *,
    can_ask: Callable[[Sequence[int]], bool],
) -> str | None:
    """What is wrong with a server's echoed log-probabilities; None where they are right.

    After a prompt the server generates its likeliest token, and says how likely it and the next likeliest are. Each of the two is
    put at the end of the prompt, and scored: it has to have the same log-probability there, the first has to be the likeliest, the
    other not, and the tokens before have to keep theirs. A shift by one place, log-probabilities of other tokens, or the likeliest
    in place of the one that is there cannot pass; where neighbours are about as likely, another prompt decides. `can_ask`: whether
    tokens can go out as they are.
    """
    named: dict[str, list[int]] = {}
    checked = 0
    for ids in prompts:
        alone = ask(ids)
        if isinstance(alone, Unmeasured):
            return alone.reason
        ranked = sorted(alone.tops[-1].items(), key=lambda pair: -pair[1])
        if abs(alone.logprobs[-1] - ranked[0][1]) > CLOSE:
            return f"it generates {alone.tokens[-1]!r:.40} at temperature 0, and says that {ranked[0][0]!r:.40} is likelier"
        for rank, (text, expected) in enumerate(ranked[:2]):
            named = named or _name_tokens(tokenizer, spelling)
            found: Echo | None = None
            for token in _find_tokens(text, named):
                if not can_ask([*ids, token]):
                    continue
                answer = ask([*ids, token])
                if isinstance(answer, Unmeasured):
                    return answer.reason
                found = answer
                if abs(found.logprobs[len(ids) - 1] - expected) <= CLOSE:
                    break
            if found is None:
                continue
            place = len(ids) - 1
            if abs(found.logprobs[place] - expected) > CLOSE:
                return (
                    f"{text!r:.40} has log-probability {expected:.4g} where it is generated, and {found.logprobs[place]:.4g} where the same "
                    "prompt ends in it (log-probabilities of other tokens, or off by one place)"
                )
            if max(abs(one - other) for one, other in zip(alone.logprobs[:place], found.logprobs, strict=False)) > CLOSE:
                return "log-probabilities of a prompt's tokens change with what stands after them"
            likeliest = found.score(len(ids))[1]
            if likeliest != (rank == 0) and abs(ranked[0][1] - expected) > (FAINT if rank else 0):
                return f"{text!r:.40} is {'not ' * (rank == 0)}said to be the likeliest token in a place where it is{' not' * rank}"
            beside = (alone.logprobs[place - 1], found.logprobs[-1])
            checked += all(abs(one - expected) > 2 * CLOSE for one in beside)
    if checked < ENOUGH:
        return f"they could not be checked: {checked} of at least {ENOUGH} tokens could be told from their neighbours"
    return None


def meet(
    ask: Callable[[bool, str, bool], Text | Unmeasured],
    count: Callable[[str], int],
    *,
    server: str,
    as_text: Sequence[bool],
) -> Habits:
    """How a server answers two short questions. `ask`: (as text, the text, whether likely first tokens are asked for); `as_text`: the
    ways in which a question can be put, the one that the run will use first.

    Raises ModelError where it does not answer, or counts the tokens of a text otherwise than `count`.
    """
    tells, added = True, list[int]()
    for own, text, way in _list_questions(as_text):
        found = ask(way, text, tells)
        if isinstance(found, Unmeasured) and tells:
            tells, found = False, ask(way, text, False)
        if isinstance(found, Unmeasured):
            if not own:
                continue
            raise ModelError(f"{server} does not answer a short prompt: {found.reason}")
        tells = tells and found.first is not None
        if found.read is None:
            return Habits(reports=False, adds=0, tells_first=tells)
        added.append(found.read - count(text))
        if not max(added) - min(added) <= SLACK or (added[-1] < 0 and not (own and as_text[0])):
            raise ModelError(
                f"{server} has another tokenizer than the one that was named, or cuts short prompts: it reports {found.read} tokens "
                f"(usage.prompt_tokens) for a text of {count(text)}; name the model's own with tokenizer=…"
            )
    return Habits(reports=True, adds=min(added[:2]), tells_first=tells)


def _list_questions(as_text: Sequence[bool]) -> Iterator[tuple[bool, str, bool]]:
    """(whether the run will ask in this way, text, as text), a short and a longer text in the run's way first."""
    for way in as_text:
        for text in (TEXTS[0], " ".join(TEXTS)):
            yield way == as_text[0], text, way


def tells_apart(seen: Seen, again: Seen, other: Seen) -> bool:
    """Whether a prompt with another beginning (`other`) ends otherwise than the prompt itself, by more than chance (`again`)."""
    return _distance(seen, other) > max(FAINT, 2 * _distance(seen, again))


def change_ids(ids: Sequence[int], special: frozenset[int]) -> list[int]:
    """`ids` with the first few changed; of as many tokens."""
    first = next((place for place, token in enumerate(ids) if token not in special), 0)
    old = list(ids[first : first + CHANGED])
    new = _turn(old)
    return [*ids[:first], *new, *ids[first + CHANGED :]]


def change_text(text: str) -> str:
    """`text` with the first few words in another order; of about as many tokens."""
    words = text.split(" ")
    return " ".join([*_turn(words[:CHANGED]), *words[CHANGED:]])


def _turn(parts: list[Any]) -> list[Any]:
    """The last first. Parts that are all alike stay as they are: nothing is to be seen there then."""
    return [*parts[-1:], *parts[:-1]]


def _distance(one: Seen, other: Seen) -> float:
    """The largest difference between what both name, in nats; infinite where they name nothing in common."""
    return max((abs(one[name] - other[name]) for name in one.keys() & other.keys()), default=float("inf"))


def _name_tokens(tokenizer: Any, spelling: Spelling) -> dict[str, list[int]]:
    """Text → the tokens that are written so."""
    named: dict[str, list[int]] = {}
    for token in range(len(tokenizer)):
        for text in {*spelling.write(token)}:
            named.setdefault(text, []).append(token)
    return named


def _find_tokens(text: str, named: Mapping[str, list[int]]) -> list[int]:
    """The tokens that an answer may mean by `text`, where they are few."""
    if text.startswith("token_id:") and text[9:].isdecimal():
        return [int(text[9:])]
    found = named.get(text, [])
    return found if len(found) <= NAMESAKES else []
