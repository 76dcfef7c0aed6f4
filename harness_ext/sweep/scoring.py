"""An answer → a verdict: whether it is right, and if not, in which way it is wrong.

Finding the key anywhere in the answer is not enough (it passes "99999, no, 71432"), so the first value counts, and the
looser reading is kept beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Verdict = Literal["exact", "lenient", "wrong_value", "no_value", "cut_off"]
"""`exact`: the first values are the expected ones. `lenient`: they all occur as whole token runs, but are not the first.
`wrong_value`, `no_value`: what it says instead. `cut_off`: it stops inside the expected answer, for want of tokens."""

TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
"""A token of an answer: letters and digits, hyphens inside."""
_VALUE = {
    "digits": re.compile(r"\d+"),
    "uuid": re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE),
    "words": TOKEN,
}


LIST_NUMBER = re.compile(r"^[ \t]*\d{1,2}[.)][ \t]+(?=\S)", re.MULTILINE)
"""Of an item, at the beginning of its line."""


def score_retrieval(answer: str, expected: Sequence[str], kind: str) -> Verdict:
    """The verdict on `answer`, where the values `expected`, of `kind` `digits`, `words` or `uuid`, are asked for.

    >>> score_retrieval(" 71432. The grass is green.", ["71432"], "digits")
    'exact'
    >>> score_retrieval("99999, then 71432", ["71432"], "digits")
    'lenient'
    >>> score_retrieval("It is 714321", ["71432"], "digits")
    'wrong_value'
    >>> score_retrieval(" 714", ["71432"], "digits")
    'cut_off'
    >>> score_retrieval("They are:\\n1. 71432\\n2. 80599", ["71432", "80599"], "digits")
    'exact'
    """
    if kind == "digits" and all(len(value) > 2 for value in expected):
        answer = LIST_NUMBER.sub("", answer)
    wanted = [token for value in expected for token in _VALUE[kind].findall(value.casefold())]
    found = _VALUE[kind].findall(answer.casefold())
    if found[: len(wanted)] == wanted:
        return "exact"
    if all(_has_run(answer, value) for value in expected):
        return "lenient"
    partial = TOKEN if kind == "uuid" else _VALUE[kind]  # half a UUID is no UUID
    if _is_cut_off(
        answer, partial.findall(answer.casefold()), [t for value in expected for t in partial.findall(value.casefold())]
    ):
        return "cut_off"
    return "wrong_value" if found else "no_value"


def score_copy(answer: str, expected: str) -> Verdict:
    """The verdict on a copy: `exact` where the answer's first tokens are the expected ones, all and in order."""
    wanted, found = _tokens(expected), _tokens(answer)
    if found[: len(wanted)] == wanted:
        return "exact"
    if _has_run(answer, expected):
        return "lenient"
    if _is_cut_off(answer, found, wanted):
        return "cut_off"
    return "wrong_value" if found else "no_value"


def copy_similarity(answer: str, expected: str) -> float:
    """1 − normalised Levenshtein distance between the expected tokens and as many of the answer's; 0 to 1.

    >>> copy_similarity("red green blue and more", "red green blue"), copy_similarity("red blue", "red green blue")
    (1.0, 0.6666666666666667)
    """
    wanted = _tokens(expected)
    found = _tokens(answer)[: len(wanted)]
    row = list(range(len(found) + 1))
    for i, want in enumerate(wanted, 1):
        diagonal, row[0] = row[0], i
        for j, got in enumerate(found, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (want != got))
    return 1 - row[-1] / max(len(wanted), len(found), 1)


def _tokens(text: str) -> list[str]:
    return TOKEN.findall(text.casefold())


def _has_run(answer: str, value: str) -> bool:
    found, wanted = _tokens(answer), _tokens(value)
    return any(found[start : start + len(wanted)] == wanted for start in range(len(found) - len(wanted) + 1))


def _is_cut_off(answer: str, found: list[str], wanted: list[str]) -> bool:
    """Whether the answer's end is a beginning of what is wanted, and no punctuation closes it."""
    if not found or not answer[-1:].isalnum():
        return False
    runs = ((found[-length:], wanted[:length]) for length in range(1, min(len(found), len(wanted)) + 1))
    return any(run[:-1] == want[:-1] and want[-1].startswith(run[-1]) and run != wanted for run, want in runs)
