"""A document of exactly L tokens, as the model counts them.

The haystack is tokenised once, sentence by sentence; a prompt is planned from those counts, put together, and counted as a
whole by the model's own tokenizer. What the plan missed (tokenizers that merge across sentences, a line break more) is
corrected and counted again, until the count is L. Whole sentences make up the difference; where no choice of them can (a
few tokens are left over), the last sentence of the filler is drawn out by a few neutral words, or by a piece of one.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from harness_ext.errors import LengthError
from harness_ext.sweep.needle import Document
from harness_ext.sweep.words import NOISE

CHANGE = 24
"""How many sentences past the cut are considered to make up the last tokens."""
ATTEMPTS = 6
"""Plans of whole sentences to try; each is a count of the whole prompt. The first is right for most tokenizers."""
SLACKS = (0, 4, 16, 48)
"""Tokens to leave for neutral words, where whole sentences do not come out."""
MAX_PADDING = 1024
"""Tokens of neutral words at most."""
FEW = 64
"""Tokens of neutral words for which every beginning of them is counted."""
DEPARTURE = 0.02
"""Of all filler: how far from its depth a needle may be put to stand where it stands in a prompt of half the length. Less than
a fifth of the 0.11 between neighbours of the default depths, so that no cell is mistaken for its neighbour."""


class Counter(Protocol):
    """What is asked of a model's tokenizer for a haystack."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, without special tokens."""
        ...


class Tokenizer(Counter, Protocol):
    """What is asked of a model's tokenizer for a prompt."""

    def count_prompt(self, body: str, document: Document) -> int:
        """Tokens that the model consumes for `document` with this body: BOS, chat template, answer prefix and answer too."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A document at its length."""

    body: str
    """Description, filler, needles and question."""
    depths: tuple[float, ...]
    """Where each needle came to stand: tokens of filler before it, as a share of all filler."""
    prompt_tokens: int
    """The model's count of the whole prompt, answer included; equal to the length asked for."""


@dataclass(slots=True)
class Filler:
    """One sample's haystack and the tokens of its sentences; drawn out as far as it is read, shared by all its prompts."""

    sentences: Iterator[str]
    tokenizer: Counter
    texts: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=lambda: [0])
    """Tokens of the first i sentences."""
    _costs: dict[str, int] = field(default_factory=dict)

    def reach(self, tokens: int) -> int:
        """The number of leading sentences that together have at most `tokens` tokens; `CHANGE` more are read."""
        while self.ends[-1] <= tokens or len(self.texts) < bisect.bisect_right(self.ends, tokens) - 1 + CHANGE:
            mean = max(1, self.ends[-1] // max(1, len(self.texts)))
            self._read(max(CHANGE, (tokens - self.ends[-1]) // mean + CHANGE))
        return bisect.bisect_right(self.ends, tokens) - 1

    def cost(self, index: int) -> int:
        """Tokens of sentence `index`."""
        return self.ends[index + 1] - self.ends[index]

    def _read(self, count: int) -> None:
        batch = list(itertools.islice(self.sentences, count))
        if not batch:
            raise LengthError(f"the haystack ended after {len(self.texts)} sentences; give one that goes on")
        new = [text for text in dict.fromkeys(batch) if text not in self._costs]
        self._costs.update(zip(new, count_in_context(self.tokenizer, new), strict=True))
        self.texts += batch
        before = self.ends[-1]
        self.ends += itertools.accumulate((self._costs[text] for text in batch), initial=self.ends.pop())
        if self.ends[-1] == before:
            raise LengthError(
                f"this tokenizer makes no token of the haystack's sentences, such as {batch[0]!r}; give another haystack"
            )


def count_bare(document: Document, tokenizer: Tokenizer) -> int:
    """Tokens of the document without any filler: the shortest prompt that can be made of it."""
    return tokenizer.count_prompt(assemble(document, [], [0] * len(document.needles)), document)


def aim(length: float, bare: int, depth: float) -> float:
    """Tokens of filler that should stand before a needle at `depth`, in a prompt of `length` tokens of which `bare` are no filler.

    Where that is within `DEPARTURE`, as many as in the prompt of half the length at twice the depth, so that the two prompts
    begin with the same tokens up to there: what a model computes of them can be computed once.

    >>> aim(512, 72, 1.0), aim(1024, 72, 0.5), aim(2048, 72, 0.25), aim(4096, 72, 0.125)
    (440.0, 476.0, 476.0, 476.0)
    """
    filler = length - bare
    if depth <= 0.5 and length / 2 > bare:
        shared = aim(length / 2, bare, 2 * depth)
        if abs(shared / filler - depth) <= DEPARTURE:
            return shared
    return depth * filler


def fit(document: Document, filler: Filler, length: int, tokenizer: Tokenizer, like: Document | None = None) -> Fitted:
    """`document` filled up to exactly `length` tokens, its needles where `aim` says (where it says for `like`, if given).

    Raises LengthError where `length` is too short for the document's own text, or where this tokenizer admits no prompt of
    exactly that length.
    """
    bare = count_bare(document, tokenizer)
    if bare > length:
        raise LengthError(
            f"a prompt of {length} tokens was asked for, but this task's own text takes {bare}; ask for {bare} or more"
        )
    beside = bare if like is None else count_bare(like, tokenizer)
    targets = [aim(length, beside, depth) for depth in document.depths]
    if bare == length:
        return _build(document, filler, NOTHING, targets, tokenizer)
    budget, tried, short = length - bare, {0}, {bare: NOTHING}
    while budget not in tried and len(tried) <= ATTEMPTS:
        tried.add(budget)
        chosen = _choose(filler, budget)
        fitted = _build(document, filler, chosen, targets, tokenizer)
        if fitted.prompt_tokens == length:
            return fitted
        if fitted.prompt_tokens < length:
            short[fitted.prompt_tokens] = chosen
        budget = max(0, budget + length - fitted.prompt_tokens)
    longest = max(short)
    for slack in SLACKS:
        chosen = short[longest] if not slack else _choose(filler, max(0, longest - bare - slack))
        fitted = _build(document, filler, chosen, targets, tokenizer)
        for padding in _paddings(length - fitted.prompt_tokens, tokenizer):
            fitted = _build(document, filler, chosen, targets, tokenizer, padding)
            if fitted.prompt_tokens == length:
                return fitted
    raise LengthError(f"no prompt of exactly {length} tokens could be made with this tokenizer; ask for another length")


@dataclass(frozen=True, slots=True)
class Choice:
    """Sentences of a filler: the first `lead` of them, then those at the indices `tail`."""

    lead: int
    tail: tuple[int, ...] = ()


NOTHING = Choice(0)


def _choose(filler: Filler, budget: int) -> Choice:
    """Sentences that together have `budget` tokens, or as near below as whole sentences come.

    All leading ones, but for the last few, which are chosen so that the sum comes out.
    """
    lead = filler.reach(budget)
    for start in range(lead, max(-1, lead - CHANGE), -1):
        picked = _make_change(filler, start, budget - filler.ends[start])
        if picked is not None:
            return Choice(start, tuple(picked))
    return Choice(lead)


def _make_change(filler: Filler, start: int, amount: int) -> list[int] | None:
    """Some of the sentences after `start`, in order, with `amount` tokens together; None where none do.

    Subset sum over bit sets: bit t of `sums[i]` says that some of the first i candidates have t tokens together.
    """
    candidates = range(start, min(start + CHANGE, len(filler.texts)))
    sums = [1]
    for index in candidates:
        sums.append((sums[-1] | sums[-1] << filler.cost(index)) & ((1 << amount + 1) - 1))
    if not sums[-1] >> amount & 1:
        return None
    picked = []
    for step in range(len(candidates), 0, -1):
        if not sums[step - 1] >> amount & 1:
            picked.append(candidates[step - 1])
            amount -= filler.cost(candidates[step - 1])
    return picked[::-1]


def _build(
    document: Document, filler: Filler, choice: Choice, targets: Sequence[float], tokenizer: Tokenizer, padding: str = ""
) -> Fitted:
    """The document with these sentences, needle i at the boundary nearest to `targets[i]` tokens of filler."""
    ends = filler.ends[: choice.lead + 1]
    ends += itertools.accumulate(map(filler.cost, choice.tail), initial=ends.pop())
    sentences = filler.texts[: choice.lead] + [filler.texts[index] for index in choice.tail]
    places = [find_boundary(ends, target) for target in targets]
    body = assemble(document, sentences, places, padding)
    if sentences and padding:
        ends[-1] += tokenizer.count([padding])[0]  # the last sentence, drawn out
    return Fitted(
        body=body,
        depths=tuple(ends[place] / ends[-1] if ends[-1] else float(bool(padding)) for place in places),  # which then stands first
        prompt_tokens=tokenizer.count_prompt(body, document),
    )


def find_boundary(ends: list[int], target: float) -> int:
    """The index of the sentence boundary nearest to `target` tokens; the earlier of two as near."""
    right = min(bisect.bisect_left(ends, target), len(ends) - 1)
    return right - 1 if right > 0 and target - ends[right - 1] <= ends[right] - target else right


def assemble(document: Document, sentences: list[str], places: list[int], padding: str = "") -> str:
    """The document's text, needle i before sentence `places[i]`: description, filler and needles, question.

    `padding` draws out the last sentence, so that prompts that are padded differently begin alike; without filler, the first line.
    """
    head = document.head if sentences else document.head + padding
    sentences = [*sentences[:-1], sentences[-1] + padding] if sentences else []
    order = sorted(range(len(places)), key=lambda needle: places[needle])
    parts: list[str] = []
    start = 0
    for place, needles in itertools.groupby(order, key=lambda needle: places[needle]):
        parts += [" ".join(sentences[start:place]), *(document.needles[needle] for needle in needles)]
        start = place
    parts.append(" ".join(sentences[start:]))
    filled = (" " if document.inline else "\n").join(part for part in parts if part)
    return "\n".join(part for part in (head.strip(), filled, document.question) if part)


def _paddings(missing: int, tokenizer: Tokenizer) -> Iterator[str]:
    """Pieces of neutral text that have about `missing` tokens, most likely first: whole words, then pieces of words."""
    if not 0 < missing <= MAX_PADDING:
        return
    text = " " + " ".join(NOISE * (1 + missing // 8))
    by_word = [text[:end] for end in range(2, len(text) + 1) if end == len(text) or text[end] == " "]
    by_letter = [text[:end].rstrip().ljust(end, ".") for end in range(2, min(len(text), 12 * missing + 24))]
    if missing > FEW:  # others are too far off, and to count them all takes as long as the square of what is missing
        each = len(text) / max(1, tokenizer.count([text])[0])
        by_word, by_letter = (
            [one for one in candidates if abs(len(one) / each - missing) < missing / 4] for candidates in (by_word, by_letter)
        )
    for candidates in (by_word, by_letter, [".", "..", "..."]):
        costs = [count - 1 for count in tokenizer.count(["." + candidate for candidate in candidates])]
        ranked = sorted(range(len(candidates)), key=lambda i: (abs(costs[i] - missing), i))
        yield from (candidates[i] for i in ranked[:16] if abs(costs[i] - missing) <= 4)


def count_in_context(tokenizer: Counter, texts: Sequence[str]) -> list[int]:
    """Tokens of each text as it stands after a sentence and a space (tokenizers mark the beginning of a text in their own ways)."""
    before = NOISE[0]
    first, *counts = tokenizer.count([before, *(f"{before} {text}" for text in texts)])
    return [max(0, count - first) for count in counts]
