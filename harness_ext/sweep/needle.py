"""What is hidden in one sample, and the document that hides it at a depth.

The tasks differ only in their text and in three numbers: how many keys stand in the document, how many values each key
has, and how many keys are asked for (RULER, arXiv 2404.06654, section 3: single, multi-key, multi-value, multi-query). Or
a key stands at each depth, and the prompts of a sample differ only in which of them they ask for.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from harness_ext.errors import TaskFileError
from harness_ext.sweep.spec import TaskSpec
from harness_ext.sweep.values import KINDS, distinct, draw_key, parse_kind

MAX_DRAWS = 10_000
"""Keys and values to draw for one sample, until enough of them cost the same: with k different costs, n of one cost are among any
k · (n − 1) + 1, which for 16 depths are a few hundred with the tokenizers in use."""


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
    """(key, value) of each needle: the first asked one first, or in the order of the depths where there is one at each."""
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


def draw_facts_alike(spec: TaskSpec, values: Iterator[str], rng: random.Random, cost: Callable[[Facts], int]) -> Facts:
    """The facts of one sample that has a needle at each depth, all of them asked for.

    `cost` says how many tokens it takes to ask for a key and answer with its value. All have the same, so that prompts of a
    length hold the same filler whichever they ask for: pairs are drawn until there are as many of one cost as depths. Raises
    TaskFileError where that does not happen.
    """
    alike: dict[int, list[tuple[str, str]]] = {}
    drawn = zip(distinct(lambda: draw_key(rng), taken=lambda _: False), values, strict=False)
    for key, value in itertools.islice(drawn, MAX_DRAWS):
        pair = (key, value)
        pairs = alike.setdefault(cost(Facts(pairs=(pair,), asked=(key,), values=(value,))), [])
        if not _holds_a_value(pair, pairs):
            pairs.append(pair)
        if len(pairs) == len(spec.depths):
            keys, expected = zip(*pairs, strict=True)
            return Facts(pairs=tuple(pairs), asked=keys, values=expected)
    most = max(map(len, alike.values()))
    raise TaskFileError(
        f"{spec.task}: field 'depths': {len(spec.depths)} were asked for, each with a needle, but of {MAX_DRAWS} keys and values "
        f"at most {most} take this tokenizer equally many tokens; ask for {most} depths or fewer"
    )


def _holds_a_value(pair: tuple[str, str], pairs: list[tuple[str, str]]) -> bool:
    """Whether a value, of `pair` or of `pairs`, is part of a key of theirs (words)."""
    together = [*pairs, pair]
    return any(value in key for key, _ in together for _, value in together)


def narrow(spec: TaskSpec, facts: Facts, depth: float) -> Facts:
    """What the prompt of `depth` asks of `facts`: everything, or the needle that stands there."""
    if not spec.every_depth:
        return facts
    key, value = facts.pairs[spec.depths.index(depth)]
    return dataclasses.replace(facts, asked=(key,), values=(value,))


def build_document(spec: TaskSpec, facts: Facts, depth: float, rng: random.Random) -> Document:
    """The document that hides `facts`: one asked-for needle at `depth`, the others anywhere, as `rng` draws, or at each depth.

    Several values of one key are expected in the order of the text, so their depths are dealt out in that order.
    """
    depths = list(spec.depths) if spec.every_depth else [depth, *(rng.random() for _ in facts.pairs[1:])]
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
    """Needles that nobody asks for, without end: the haystack `needles`. `taken` keys and values are left out.

    All different as long as there are different ones; then, unlike what is asked, they come again.
    """
    values = _again(draw_values(spec, rng, taken=taken))
    for key in _again(distinct(lambda: draw_key(rng), taken=taken)):
        yield spec.needle.format(key=key, value=next(values))


def _again(found: Iterator[str]) -> Iterator[str]:
    """What is found, and once there is nothing new, the same again. Raises LookupError where there was nothing."""
    seen = []
    try:
        for one in found:
            seen.append(one)
            yield one
    except LookupError:
        if not seen:
            raise
    yield from itertools.cycle(seen)


def enumerate_words(items: tuple[str, ...]) -> str:
    """
    >>> enumerate_words(("a",)), enumerate_words(("a", "b")), enumerate_words(("a", "b", "c"))
    ('a', 'a and b', 'a, b, and c')
    """
    if len(items) < 3:
        return " and ".join(items)
    return ", ".join(items[:-1]) + f", and {items[-1]}"
