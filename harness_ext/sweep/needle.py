"""What is hidden in one sample, and the document that hides it at a depth.

The tasks differ only in their text and in three numbers: how many keys stand in the document, how many values each key
has, and how many keys are asked for (RULER, arXiv 2404.06654, section 3: single, multi-key, multi-value, multi-query).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from harness_ext.sweep.spec import TaskSpec
from harness_ext.sweep.values import KINDS, distinct, draw_key, parse_kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A prompt's text without its filler."""

    head: str
    """Stands before the filler; may be empty."""
    needles: tuple[str, ...]
    """The sentences to hide."""
    depths: tuple[float, ...]
    """Where each needle should stand, 0 (before all filler) to 1 (after it)."""
    target: int
    """Index of the needle that stands at the depth asked for."""
    question: str
    """Stands after the filler."""
    answer_prefix: str
    """How the answer begins, where its beginning is given."""
    answer: str
    """What a model that found everything says."""
    inline: bool
    """Needles stand inside the running text; otherwise each on a line of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What one sample hides: the same at every length and depth, so that cells are compared on the same question."""

    pairs: tuple[tuple[str, str], ...]
    """(key, value) of each needle, the first asked one first."""
    asked: tuple[str, ...]
    """The keys that are asked for, in the order of the question."""
    values: tuple[str, ...]
    """The expected values, in the order in which they are expected."""


def draw_values(spec: TaskSpec, rng: random.Random, *, taken: Callable[[str], bool]) -> Iterator[str]:
    """Values of the task's kind, without end, all different."""
    kind, width = parse_kind(spec.value)
    return distinct(lambda: KINDS[kind](rng, width), taken=taken)


def draw_facts(spec: TaskSpec, values: Iterator[str], rng: random.Random) -> Facts:
    """The facts of one sample, with `values` to take from; those that are part of a key (words) are passed over."""
    keys = list(itertools.islice(distinct(lambda: draw_key(rng), taken=lambda _: False), spec.keys))
    usable = (value for value in values if not any(value in key for key in keys))
    pairs = list(zip((key for key in keys for _ in range(spec.values)), usable, strict=False))
    asked = keys[: spec.queries]
    return Facts(pairs=tuple(pairs), asked=tuple(asked), values=tuple(value for key, value in pairs if key in asked))


def build_document(spec: TaskSpec, facts: Facts, depth: float, rng: random.Random) -> Document:
    """The document that hides `facts`: one asked-for needle at `depth`, the others anywhere, as `rng` draws.

    Several values of one key are expected in the order of the text, so their depths are dealt out in that order.
    """
    depths = [depth, *(rng.random() for _ in facts.pairs[1:])]
    if spec.values > 1:
        depths.sort()
    return Document(
        head=spec.description,
        needles=tuple(spec.needle.format(key=key, value=value) for key, value in facts.pairs),
        depths=tuple(depths),
        target=depths.index(depth),
        question=spec.question.format(key=enumerate_words(facts.asked)),
        answer_prefix=spec.answer_prefix.format(key=enumerate_words(facts.asked)),
        answer=enumerate_words(facts.values),
        inline=spec.inline,
    )


def draw_distractors(spec: TaskSpec, rng: random.Random, *, taken: Callable[[str], bool]) -> Iterator[str]:
    """Needles that nobody asks for, without end: the haystack `needles`. `taken` keys and values are left out."""
    values = draw_values(spec, rng, taken=taken)
    for key in distinct(lambda: draw_key(rng), taken=taken):
        yield spec.needle.format(key=key, value=next(values))


def enumerate_words(items: tuple[str, ...]) -> str:
    """
    >>> enumerate_words(("a",)), enumerate_words(("a", "b")), enumerate_words(("a", "b", "c"))
    ('a', 'a and b', 'a, b, and c')
    """
    if len(items) < 3:
        return " and ".join(items)
    return ", ".join(items[:-1]) + f", and {items[-1]}"
