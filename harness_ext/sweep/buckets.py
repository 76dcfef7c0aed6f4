"""A text of exactly L tokens, cut into buckets of positions, each scored by itself after all that stands before it.

Cuts stand between words, where a tokenizer's tokens of the beginning are the beginning of its tokens of the whole: that is
verified of each. No sentence is moved or left out, so that the text reads as its source does.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from harness_ext.errors import LengthError, ModelError
from harness_ext.sweep.fit import Counter, Filler, count_in_context

MIN_TOKENS = 16
"""The shortest bucket that is planned, and the shortest length: a few words at least with any tokenizer."""
STARTS = 200
"""Sentences to try for the text's first, until L tokens end where a word does; with words of six tokens, six are tried."""
SPARE = 64
"""Tokens past L to read at first; doubled while they are too few."""
CORRECTIONS = 3
"""Counts to bring the sum of the words' tokens in line with the text's; none is needed where a tokenizer cuts between words."""
FIRST_WORDS = 8
"""Words to try for the first context."""


class Encoder(Counter, Protocol):
    """What is asked of a model's tokenizer for a text that is scored."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, as the model splits it, BOS included."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A place in a text."""

    characters: int
    """Before it."""
    tokens: int
    """Before it, BOS counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A text of exactly the length asked for."""

    text: str
    """Whole words."""
    ids: tuple[int, ...]
    """Its tokens."""
    cuts: tuple[Cut, ...]
    """After the first word, which is context only; then where each bucket ends, the last at the text's end."""


def plan_edges(lengths: Sequence[int], buckets: int) -> list[int]:
    """Positions in tokens where buckets end: an even grid up to the longest of `lengths` (ascending), and every length.

    A place of the grid that is nearer to a length than half a bucket is left out, and so are buckets of fewer than `MIN_TOKENS`.

    >>> plan_edges([128, 256, 512], 4), plan_edges([100, 500], 4), plan_edges([64], 32)
    ([128, 256, 384, 512], [100, 250, 375, 500], [16, 32, 48, 64])
    """
    count = min(buckets, max(1, lengths[-1] // MIN_TOKENS))
    width = lengths[-1] / count
    grid = (round(number * width) for number in range(1, count))
    return sorted({*lengths, *(edge for edge in grid if all(abs(edge - length) >= width / 2 for length in lengths))})


def build_passage(filler: Filler, edges: Sequence[int], tokenizer: Encoder) -> Passage:
    """The filler's first text of exactly `edges[-1]` tokens, cut at the last word that ends at or before each edge.

    Raises LengthError where this tokenizer gives none, or where two edges fall on one word, ModelError where it cannot be cut.
    """
    for start in range(STARTS):
        ruler = Ruler(_take(filler, start, edges[-1], tokenizer), tokenizer)
        last = ruler.find(edges[-1])
        ids = ruler.encode(last)
        if len(ids) == edges[-1]:
            text = ruler.text[: ruler.ends[last]]
            return Passage(text=text, ids=tuple(ids), cuts=_cut(Ruler(text, tokenizer), ids, edges))
    raise LengthError(
        f"no text of exactly {edges[-1]} tokens could be made of whole words with this tokenizer; "
        "ask for another length or haystack"
    )


@dataclass(slots=True)
class Ruler:
    """Where in a text its tokens stand: each word is tokenised once, and what the words' sum misses is counted."""

    text: str
    tokenizer: Encoder
    ends: list[int] = field(init=False)
    """Characters before the end of each word."""
    _sums: list[int] = field(init=False)
    """Tokens of the words up to each."""
    _missed: int = 0
    _last: tuple[int, list[int]] = (-1, [])

    def __post_init__(self) -> None:
        words = self.text.split(" ")
        known = list(dict.fromkeys(words))
        costs = dict(zip(known, count_in_context(self.tokenizer, known), strict=True))
        self.ends = [end - 1 for end in itertools.accumulate(len(word) + 1 for word in words)]
        self._sums = list(itertools.accumulate(costs[word] for word in words))

    def find(self, tokens: int) -> int:
        """The index of the last word that ends at or before `tokens`; with some tokenizers, of one near it."""
        index = 0
        for _ in range(CORRECTIONS):
            index = max(0, bisect.bisect_right(self._sums, tokens - self._missed) - 1)
            missed = len(self.encode(index)) - self._sums[index]
            if missed == self._missed:
                break
            self._missed = missed
        return index

    def encode(self, index: int) -> list[int]:
        """Token ids of the text up to the end of word `index`."""
        if self._last[0] != index:
            self._last = index, self.tokenizer.encode(self.text[: self.ends[index]])
        return self._last[1]


def _take(filler: Filler, start: int, tokens: int, tokenizer: Encoder) -> str:
    """The filler's text from sentence `start` on, with more than `tokens` tokens."""
    filler.reach(0)
    spare = SPARE
    while True:
        stop = filler.reach(filler.ends[min(start, len(filler.texts))] + tokens + spare)
        text = " ".join(filler.texts[start:stop])
        if len(tokenizer.encode(text)) > tokens:
            return text
        spare *= 2


def _cut(ruler: Ruler, ids: list[int], edges: Sequence[int]) -> tuple[Cut, ...]:
    """The first context's end, and the end of each bucket of the ruler's text, which has the tokens `ids`."""
    cuts = [_cut_first(ruler, ids)]
    for edge in edges[:-1]:
        index = ruler.find(edge)
        while ruler.ends[index] > cuts[-1].characters:
            before = ruler.encode(index)
            if len(before) <= edge and ids[: len(before)] == before:
                cuts.append(Cut(characters=ruler.ends[index], tokens=len(before)))
                break
            index -= 1
        else:
            raise LengthError(
                f"no word ends between {cuts[-1].tokens} and {edge} tokens of a text; "
                "ask for fewer buckets, or lengths further apart"
            )
    return (*cuts, Cut(characters=len(ruler.text), tokens=len(ids)))


def _cut_first(ruler: Ruler, ids: list[int]) -> Cut:
    for index in range(min(FIRST_WORDS, len(ruler.ends) - 1)):
        before = ruler.encode(index)
        if before and ids[: len(before)] == before:
            return Cut(characters=ruler.ends[index], tokens=len(before))
    raise ModelError(
        "with this model's tokenizer the tokens of a text do not begin with those of its beginning, as where it ends every text "
        "with a token of its own; use --model hf-extrapolate, which leaves that off"
    )
