"""Whether a server is still the one whose answers were kept. It has no weights to be hashed, so it is known by what it answers: to fixed
texts, and to some of the kept prompts once more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness_ext.cells import Unmeasured
from harness_ext.models.answers import Text
from harness_ext.models.canary import TEXTS, tells_apart

PLACE = -1
"""Number in a journal under which the likeness stands; prompts count from 0."""
TOKENS = 16
"""That are generated after each text."""

Likeness = list[list[Any]]
"""For each text: what was generated, and the log-probabilities of likely first tokens, twice."""


def take(ask: Callable[[str], Text | Unmeasured]) -> Likeness | None:
    """What a server says after fixed texts; None where it does not answer. Each is asked three times: the first only fills a prefix cache."""
    found: Likeness = []
    for text in TEXTS:
        said = [ask(text) for _ in range(3)]
        told = [one for one in said if isinstance(one, Text)]
        if len(told) < len(said):
            return None
        found.append([told[-1].text, dict(told[1].first or {}), dict(told[2].first or {})])
    return found


def find_change(kept: Likeness | None, now: Likeness) -> str:
    """What a server says otherwise than it did; empty where nothing. Log-probabilities may differ by twice what they do between repeats."""
    if not kept:
        return "nothing says which server gave these answers"
    for text, (old, seen, again), (new, first, _) in zip(TEXTS, kept, now, strict=True):
        if old != new:
            return f"after {text!r} the server said {old!r:.40}, and now says {new!r:.40}"
        if bool(seen) != bool(first) or (seen and tells_apart(seen, again, first)):
            return f"after {text!r} the server's likely tokens had other log-probabilities"
    return ""


def find_stale(known: Mapping[int, Any], sizes: Sequence[int], ask: Callable[[int], Any]) -> str:
    """Which of the longest, the middle and the shortest of the kept answers a server now answers otherwise; empty where none.

    Longest first: a server that was started with other positions differs there. `ask`: the number of a prompt → its answer.
    """
    order = sorted(known, key=lambda index: -sizes[index])
    for index in dict.fromkeys([order[0], order[len(order) // 2], order[-1]]):
        if not _is_like(known[index], functools.partial(ask, index)):
            return f"a kept prompt of {sizes[index]} tokens is answered otherwise now"
    return ""


def _is_like(kept: Any, ask: Callable[[], Any]) -> bool:
    """Whether a server gives the answer that was kept: a text, or a log-likelihood and a flag. Log-likelihoods may differ by twice what they do
    between repeats."""
    found = ask()
    if isinstance(found, (Unmeasured, str)):
        return bool(found == kept)
    if found[0] != kept[0]:
        again = ask()
        if isinstance(again, Unmeasured) or tells_apart({"": found[0]}, {"": again[0]}, {"": kept[0]}):
            return False
    return bool(found[1] == kept[1])
