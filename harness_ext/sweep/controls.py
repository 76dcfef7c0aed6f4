"""Controls: prompts on the same run that say what a sweep's scores are to be held against. None of them enters the sweep's own.

- `no_haystack`: the needles and the question alone, as short as it gets: can the model do the task at all. One a sample.
- `needle_absent`: the haystack without the needle that is asked for, scored as if it were there: chance. One a sample and length.
- `cropped`: what is left of a prompt past the trained length when it is cut to that: what truncation would have scored. One for each
  such prompt, so that the two are pairs.
- `short`: a prompt within the trained length, where the sweep has none of its own: what an override costs there.

How a cropped prompt differs from the last T token ids of the whole one: what every prompt has around it (BOS, system message, chat
template) stays, and it begins with a whole word. So it has at most T tokens, and one word more would be too many. The cut may go
through a needle, as truncation does; `needle_kept` says whether all values that are asked for still stand in what is left.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from harness_ext.cells import Length
from harness_ext.errors import LengthError
from harness_ext.sweep.fit import Fitted, count_bare
from harness_ext.sweep.frame import Frame
from harness_ext.sweep.needle import Document, Facts
from harness_ext.sweep.prompts import Prompts

NEAR = 512
"""Characters on either side of where a cropped prompt should begin that are looked at first: some eighty words."""
WORD = re.compile(r"(?<!\S)\S")
"""The beginning of one."""


class Cell(NamedTuple):
    """Where a prompt stands in a sweep, or beside it."""

    length: Length
    """Of the prompt; of a cropped one, before it was cut."""
    depth: float | None
    """Of the needle; None where none is hidden in a haystack."""
    sample: int
    """Prompts of one sample ask for the same facts."""
    control: str | None = None
    """A control or an arm (`arms`); None in the sweep itself."""


def add_controls(cells: Iterable[Cell], *, trained: int, own: Length, short: Length | None) -> Iterator[Cell]:
    """The cells of a sweep, in their order, each with the controls that belong to it right after it.

    So the first N hold the controls of the sweep's among them. `own`: the length of a prompt without haystack; `short`: one within
    the `trained` tokens, None where the sweep has some.
    """
    seen = set[Any]()
    for cell in cells:
        length, depth, sample, _ = cell
        yield cell
        if sample not in seen:
            yield Cell(own, None, sample, "no_haystack")
        if (sample, length) not in seen:
            yield Cell(length, None, sample, "needle_absent")
        if length.tokens > trained:
            yield Cell(length, depth, sample, "cropped")
        if short and (sample, depth) not in seen:
            yield Cell(short, depth, sample, "short")
        seen |= {sample, (sample, length), (sample, depth)}


def find_short(lengths: Sequence[Length], trained: int, own: int) -> Length | None:
    """Half the trained length, or all of it where the task's `own` text takes more; None where it takes more still, and where the
    sweep has a length within the trained one."""
    room = next((tokens for tokens in (trained // 2, trained) if tokens >= own), None)
    if room is None or any(length.tokens <= trained for length in lengths):
        return None
    return Length(tokens=room, multiple=room / trained)


def build(prompts: Prompts, cell: Cell, trained: int) -> tuple[Document, Fitted, dict[str, Any]]:
    """The document and prompt of a cell, and what its record says beside. `trained` is the length to crop to. Raises as `Prompts.fit`."""
    depths = prompts.spec.depths
    if cell.control == "no_haystack":
        depth = depths[cell.sample % len(depths)]  # so that what is asked for stands first, last and between
        document = _sort_needles(prompts.document(cell.sample, depth))
        fitted = prompts.fit(document, cell.sample, count_bare(document, prompts.frame))
        return document, fitted, describe(prompts.facts(cell.sample, depth), None)
    if cell.control == "needle_absent":
        # As if it stood deepest: what the sweep's prompts have in common, up to their needles, this one has too.
        facts, whole = prompts.facts(cell.sample, depths[-1]), prompts.document(cell.sample, depths[-1])
        document = _leave_out_asked(whole, facts)
        fitted = prompts.fit(document, cell.sample, cell.length.tokens, like=whole)
        return document, fitted, describe(facts, None)
    assert cell.depth is not None
    facts = prompts.facts(cell.sample, cell.depth)
    document, fitted = prompts.build(cell.sample, cell.depth, cell.length.tokens)
    said = describe(facts, fitted.depths[document.target])
    if cell.control != "cropped":
        return document, fitted, said
    try:
        cropped = crop(document, fitted, trained, prompts.frame)
    except LengthError as error:
        raise LengthError(f"{prompts.spec.task}: {error}") from None
    return document, cropped, {**said, "needle_kept": all(value in cropped.body for value in facts.values)}


def crop(document: Document, fitted: Fitted, tokens: int, frame: Frame) -> Fitted:
    """The end of `fitted` that makes a prompt of at most `tokens` tokens, from the first word that does; see above.

    It is looked for where it should begin if all words had as many tokens, and further around where it does not. Raises LengthError
    where the question alone takes more.
    """
    body = fitted.body
    asked = len(body) - len(document.question)
    guess = int(asked * (1 - tokens / fitted.prompt_tokens))

    def fits(start: int) -> bool:
        return frame.count_prompt(body[start:], document) <= tokens

    for reach in itertools.accumulate(itertools.repeat(4), operator.mul, initial=NEAR):
        low, high = max(0, guess - reach), min(asked, guess + reach)
        starts = [*(word.start() for word in WORD.finditer(body, low, high)), asked][: None if high == asked else -1]
        if starts and (low == 0 or not fits(starts[0])) and (high == asked or fits(starts[-1])):
            break
    first = bisect.bisect_left(starts, True, key=fits)
    if first == len(starts):
        raise LengthError(
            f"a prompt cropped to {tokens} tokens was asked for, but this task's question alone takes more; leave controls out"
        )
    kept = body[starts[first] :]
    return dataclasses.replace(fitted, body=kept, prompt_tokens=frame.count_prompt(kept, document))


def describe(facts: Facts, depth: float | None) -> dict[str, Any]:
    """What a prompt's record says of what it hides, and of where that came to stand: `depth`."""
    return {"depth_realised": depth, "values": list(facts.values)}


def _sort_needles(document: Document) -> Document:
    """The document with its needles in the order in which they stand."""
    order = sorted(range(len(document.needles)), key=document.depths.__getitem__)
    return _take(document, order, order.index(document.target))


def _leave_out_asked(document: Document, facts: Facts) -> Document:
    """The document without what is asked for; its `target` is none."""
    return _take(document, [index for index, (key, _) in enumerate(facts.pairs) if key not in facts.asked], -1)


def _take(document: Document, order: Sequence[int], target: int) -> Document:
    return dataclasses.replace(
        document,
        needles=tuple(document.needles[index] for index in order),
        depths=tuple(document.depths[index] for index in order),
        target=target,
    )
