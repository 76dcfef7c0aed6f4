"""The arms of an experiment on why a score falls with length: prompts that ask for the same facts, and change one thing.

A longer prompt differs from a short one in two ways at once: its tokens stand at positions that the model never saw, and there are
more of them. The arms take the two apart, and what the tokens say from how many there are.

- `long`: the sweep itself, L tokens at positions 0 to L − 1.
- `stretched`: a short prompt whose positions jump in the middle of each piece of filler, so that needle and question stand where they
  stand in a prompt of L tokens. New positions, few tokens. (Skipping positions: Zhu et al., PoSE, arXiv 2309.10400, who train so.)
- `packed`: L tokens in T positions: neighbours in the filler share one. Many tokens, no new position. (Sharing positions among
  neighbours: Jin et al., Self-Extend, arXiv 2401.01325; they never decrease, so that no distance is negative.)
- `shifted`: the short prompt, L − S tokens further on: what the absolute position does.
- `emptied`, `packed_emptied`: as `long` and `packed`, with one word over and over for filler, which says nothing.
- `other_text`, `distractors`: as `long`, with another haystack, and with one of needles that nobody asks for.

docs/method.md says what is made of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness_ext.cells import Length, Limit, Placing
from harness_ext.sweep.controls import Cell
from harness_ext.sweep.fit import Fitted
from harness_ext.sweep.frame import Frame
from harness_ext.sweep.haystack import Haystack, open_haystack
from harness_ext.sweep.needle import Document, draw_distractors
from harness_ext.sweep.prompts import Prompts
from harness_ext.sweep.spec import ARMS, TaskSpec

SHORT = frozenset({"stretched", "shifted"})
"""Of few tokens."""
PACKED = frozenset({"packed", "packed_emptied"})
"""Of the trained length's positions."""
PLACED = SHORT | PACKED
WATCHED = frozenset({"long", "stretched", "packed", "emptied"})
"""Of which it is looked at what the question attends to, where a task asks for that."""
FEW = 64
"""Tokens of filler in a short prompt."""
EMPTY = "and"
"""The word that says nothing: one token in the tokenizers in use."""

Span = tuple[int, int]
"""First token, and the one after the last."""
PlacementRun = tuple[int, int, int, int, int]
"""As `harness_ext.placement` reads them."""


class Refused(NamedTuple):
    """Why an arm is not run."""

    outcome: str
    reason: str


class LeftOut(NamedTuple):
    """An arm that was not run."""

    arm: str
    length: int | None
    """Tokens; None for all."""
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What decides which arms can be run."""

    spec: TaskSpec
    trained: int
    """The trained length, in tokens."""
    limits: Sequence[Limit]
    placing: Placing
    """The model's."""
    own: int = 0
    """Tokens of the task's text without filler."""

    def refuse(self, arm: str, length: Length) -> Refused | None:
        """Why an arm is not run at a length past the trained one or at it; None where it is."""
        hard = next((limit for limit in self.limits if limit.outcome == "hard_limit"), None)
        if arm in PLACED and self.placing.outcome != "measured":
            return Refused(outcome=self.placing.outcome, reason=self.placing.reason)
        if arm in PLACED and self.own >= self.trained:
            reason = (
                f"this task's own text takes {self.own} tokens, which leaves no room within the trained length of {self.trained}"
            )
            return Refused(outcome="not_admitted", reason=reason)
        if arm in SHORT:
            return _refuse_past(length.tokens, hard)
        if arm not in PACKED and length.outcome != "measured":
            return Refused(outcome=length.outcome, reason=length.reason)
        if arm in PACKED:
            if hard and self.placing.past_end and length.tokens > hard.tokens:
                return Refused(outcome="not_admitted", reason=f"more tokens than positions: {self.placing.past_end}")
            refused = _refuse_past(self.trained, hard)
            for limit in self.limits:
                refused = refused or (_refuse_past(length.tokens, limit) if limit is not hard else None)
            return refused
        if arm == "distractors" and ("{key}" not in self.spec.needle or self.spec.every_depth):
            return Refused(outcome="not_admitted", reason="its needles have no keys that tell others apart from the one asked for")
        return None


def _refuse_past(tokens: int, limit: Limit | None) -> Refused | None:
    return Refused(outcome=limit.outcome, reason=limit.reason) if limit and tokens > limit.tokens else None


def add_arms(
    cells: Iterable[Cell], asked: Sequence[str], trained: int, refuse: Callable[[str, Length], Refused | None]
) -> Iterator[Cell]:
    """The cells of a sweep, in their order, each with those of the arms `asked` for that admit it right after it.

    There are no arms below the trained length, and none packed at it, where there is nothing to pack.
    """
    for cell in cells:
        if cell.control is not None or (cell.length.outcome == "measured" and "long" in asked):
            yield cell
        if cell.control is not None or cell.length.tokens < trained:
            continue
        for arm in ARMS[1:]:
            if arm in asked and (arm not in PACKED or cell.length.tokens > trained) and refuse(arm, cell.length) is None:
                yield cell._replace(control=arm)


def list_left_out(
    lengths: Iterable[Length], asked: Sequence[str], trained: int, refuse: Callable[[str, Length], Refused | None]
) -> list[LeftOut]:
    """The arms that `add_arms` leaves out, and why."""
    past = [length for length in lengths if length.tokens >= trained]
    found = []
    for arm in (arm for arm in ARMS[1:] if arm in asked):
        own = [length for length in past if arm not in PACKED or length.tokens > trained]
        why = [(length, refused) for length in own if (refused := refuse(arm, length)) is not None]
        if len(why) == len(own) and len({refused for _, refused in why}) == 1:
            found.append(LeftOut(arm, None, *why[0][1]))
        else:
            found += [LeftOut(arm, length.tokens, *refused) for length, refused in why]
    return found


@dataclass(frozen=True)
class Made:
    """A prompt, which several arms may put at different positions."""

    frame: Frame
    document: Document
    fitted: Fitted

    @functools.cached_property
    def arguments(self) -> tuple[str, Any]:
        """What lm_eval's model method takes of it."""
        return self.frame.arguments(self.fitted.body, self.document)

    @functools.cached_property
    def located(self) -> tuple[list[int], list[Span]]:
        """See `locate`."""
        return locate(self.frame, *self.arguments, self.fitted.body, self.document)


class ArmPrompts:
    """The prompts of the arms, the sweep's own among them; `own`: tokens of the task's text without filler."""

    def __init__(self, prompts: Prompts, trained: int, own: int) -> None:
        self.prompts, self.trained = prompts, trained
        self.few = min(trained, own + FEW)
        self._beside: dict[str, Prompts] = {}
        self._made: dict[tuple[str, int, float, int], Made] = {}

    def build(self, cell: Cell) -> Made:
        """The prompt of an arm's cell, or of the sweep's. Raises as `Prompts.fit`."""
        assert cell.depth is not None
        prompts, tokens = self._choose(cell.control), self.few if cell.control in SHORT else cell.length.tokens
        key = (prompts.haystack.name, cell.sample, cell.depth, tokens)
        if key not in self._made:  # short ones are for all lengths; of the others, which are large, the last is kept
            self._made = {known: made for known, made in self._made.items() if known[3] == self.few}
            self._made[key] = Made(prompts.frame, *prompts.build(cell.sample, cell.depth, tokens))
        return self._made[key]

    def place(self, cell: Cell, ids: Sequence[int], kept: Sequence[Span], depths: Sequence[float]) -> list[PlacementRun]:
        """Where an arm puts its tokens. `kept`: what stays together, in order; `depths`: those of the needles among it."""
        if cell.control == "shifted":
            return [(0, cell.length.tokens - len(ids), 0, 1, 1)]
        if cell.control == "stretched":
            return stretch(kept, depths, cell.length.tokens)
        if cell.control in PACKED:
            return pack(kept, self.trained)
        return [(0, 0, 0, 1, 1)]

    def _choose(self, arm: str | None) -> Prompts:
        spec = self.prompts.spec
        haystack = {
            "emptied": lambda: Haystack(name="emptied", sentences=lambda *_: itertools.repeat(EMPTY)),
            "other_text": lambda: open_haystack("text" if spec.haystack == "noise" else "noise", distractors=lambda *_: iter(())),
            "distractors": lambda: open_haystack(
                "needles", distractors=lambda rng, taken: draw_distractors(spec, rng, taken=taken)
            ),
        }.get("emptied" if arm == "packed_emptied" else arm or "")
        if haystack is None:
            return self.prompts
        name = "emptied" if arm == "packed_emptied" else str(arm)
        if name not in self._beside:
            self._beside[name] = self.prompts.beside(haystack())
        return self._beside[name]


def locate(frame: Frame, context: str, answer: str, body: str, document: Document) -> tuple[list[int], list[Span]]:
    """The token ids of a prompt, answer included, and the spans in it that are no filler: what stands before it, each needle, the rest.

    By the tokens that a beginning of the text shares with the whole, so that it holds for any tokenizer; a token on a border counts
    to what follows it.
    """
    ids, _ = frame.view.encode_scored(context, answer)
    needles = sorted((context.index(needle), len(needle)) for needle in document.needles)
    start = max(0, context.find(document.head or body)) + len(document.head)
    borders = [start, *(edge for at, width in needles for edge in (at, at + width)), context.rindex(document.question)]
    shared = (_count_common(frame.view.encode(context[:border]), ids) for border in borders)
    marks = [0, *itertools.accumulate(shared, max), len(ids)]
    return ids, list(zip(marks[::2], marks[1::2], strict=True))


def find_asked(context: str, document: Document, values: Sequence[str], kept: Sequence[Span]) -> list[Span]:
    """Those of the spans that `locate` found that are needles with one of `values`."""
    needles = sorted(document.needles, key=context.index)
    return [span for needle, span in zip(needles, kept[1:-1], strict=True) if any(value in needle for value in values)]


def _count_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def stretch(kept: Sequence[Span], depths: Sequence[float], length: int) -> list[PlacementRun]:
    """Runs in which the spans `kept` stand as in a prompt of `length` tokens: a jump in the middle of each piece of filler between them.

    `depths`: of all filler, how much stands before each span but the first and the last.

    >>> stretch([(0, 2), (6, 8), (10, 12)], [0.5], 20)
    [(0, 0, 0, 1, 1), (4, 7, 4, 1, 1), (9, 17, 9, 1, 1)]
    """
    gaps = [(before[1], after[0]) for before, after in itertools.pairwise(kept)]
    filler = sum(stop - start for start, stop in gaps)
    missing = length - kept[-1][1]
    shares = [after - before for before, after in itertools.pairwise([0.0, *depths, 1.0])]
    wanted = [max(0.0, (filler + missing) * share - (stop - start)) for share, (start, stop) in zip(shares, gaps, strict=True)]
    runs: list[PlacementRun] = [(0, 0, 0, 1, 1)]
    sums = [0.0, *itertools.accumulate(wanted)]
    for (start, stop), before, after in zip(gaps, sums, sums[1:], strict=False):
        jumped, jumps = (round(missing * share / (sums[-1] or 1.0)) for share in (before, after))
        if jumps > jumped:
            middle = start + (stop - start) // 2
            runs.append((middle, middle + jumps, middle, 1, 1))
    return runs


def pack(kept: Sequence[Span], positions: int) -> list[PlacementRun]:
    """Runs in which all tokens stand at the first `positions` positions: the spans `kept` one by one, what is between them squeezed.

    How far does not depend on where the spans stand, so that prompts that begin alike are placed alike.

    >>> pack([(0, 2), (10, 12), (14, 16)], 10)
    [(0, 0, 0, 1, 1), (2, 2, 2, 4, 10), (10, 5, 10, 1, 1), (12, 4, 4, 4, 10), (14, 8, 14, 1, 1)]
    """
    whole, end = sum(stop - start for start, stop in kept), kept[-1][1]
    filler, room = end - whole, positions - whole
    runs: list[PlacementRun] = []
    own = 0
    for start, stop in kept:
        runs.append((start, own + (start - own) * room // filler, start, 1, 1))
        own += stop - start
        runs.append((stop, own, own, room, filler))
    return [run for run, after in itertools.pairwise([*runs, (end, 0, 0, 0, 0)]) if run[0] < after[0]]
