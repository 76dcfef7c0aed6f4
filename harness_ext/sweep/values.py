"""What is hidden: keys ("tiny-apple") and values (numbers, words, UUIDs), unique and reproducible."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator

from harness_ext.sweep.words import NAMES_ADJECTIVES, NAMES_NOUNS

WIDEST = 1000
"""Digits or words of a value."""
Draw = Callable[[random.Random, int], str]


def _digits(rng: random.Random, width: int) -> str:
    return str(rng.randrange(10 ** (width - 1), 10**width))


def _words(rng: random.Random, width: int) -> str:
    return " ".join(rng.choice(NAMES_NOUNS) for _ in range(width))


def _uuid(rng: random.Random, width: int) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


KINDS: dict[str, Draw] = {"digits": _digits, "words": _words, "uuid": _uuid}
"""Kind → how one is drawn. All values of one kind and width have the same number of digits, words or hex digits."""


def parse_kind(text: str) -> tuple[str, int]:
    """`"digits:5"` → `("digits", 5)`; the width of a kind that has only one is 1.

    >>> parse_kind("digits:5"), parse_kind("uuid")
    (('digits', 5), ('uuid', 1))

    Raises ValueError, with what was expected, for any other text.
    """
    kind, _, width = text.partition(":")
    if (
        kind not in KINDS
        or (width and (not width.isdecimal() or not 1 <= int(width) <= WIDEST))
        or (kind == "digits" and not width)
    ):
        raise ValueError("one of digits:N (N digits), words:N (N words), uuid")
    return kind, int(width or 1)


def distinct(draw: Callable[[], str], *, taken: Callable[[str], bool], attempts: int = 10_000) -> Iterator[str]:
    """Draws without end, each different from the ones before and none that is `taken`.

    The i-th does not depend on how many are asked for. Raises LookupError once `attempts` draws in a row gave nothing new.
    """
    seen: set[str] = set()
    misses = 0
    while misses < attempts:
        value = draw()
        if value in seen or taken(value):
            misses += 1
            continue
        seen.add(value)
        misses = 0
        yield value
    raise LookupError(f"{len(seen)} distinct values, and {attempts} further draws gave none that was new")


def draw_key(rng: random.Random) -> str:
    """A name to ask for, such as `tiny-apple`; with a second adjective in a tenth of the draws, so that they do not run out."""
    adjectives = rng.sample(NAMES_ADJECTIVES, 2 if rng.random() < 0.1 else 1)
    return "-".join([*adjectives, rng.choice(NAMES_NOUNS)])
