"""A run without the model: what `hf-extrapolate` would read for requests, forward by forward, found by its own code with a forward that only counts.

The requests go the way that lm_eval sends them, through tokenising, grouping, the prefix tree and the cutting into chunks. What is put
in place of its own is the forward, which counts, and the state, which has a length and no tensors. So nothing of the schedule is written twice.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from harness_ext.models.forward import Forward, Run
from harness_ext.models.journal import Kept
from harness_ext.models.ledger import Answer
from harness_ext.models.memory import Memory
from harness_ext.models.prefix_tree import Schedule
from harness_ext.models.progress import TokenBar
from harness_ext.models.reader import AnswerPlan, Generate, Reader
from harness_ext.models.self_check import Finding
from harness_ext.models.state import State


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One forward."""

    rows: int
    start: int
    """Tokens of each row that are held already."""
    stop: int
    """Tokens of each row that are held afterwards, padding included."""
    scored: int
    """Logits asked for, over all rows."""
    held: int
    """Tokens in all states, rows counted each, when it ends."""
    states: int
    """Rows in all states."""
    budget: int = 0
    """Tokens generated after it, for each row, at most; `held` has room for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """What a run would do."""

    asked: int
    """Tokens of all prompts."""
    computed: int
    """Those of them that are computed, padding aside."""
    copied: int
    """Tokens in all states that are copied."""
    pieces: tuple[Piece, ...]
    """In their order."""
    sharing: Finding
    """What the model goes on from."""
    lanes: int
    """Scored prompts that are read side by side, at most; `pieces` are those of one after the other."""


@contextlib.contextmanager
def rehearsing(lm: Any) -> Iterator[Callable[[Sequence[Any]], Rehearsed]]:
    """Within it, `lm` (`hf-extrapolate`, a causal model) scores and generates nothing; gives (lm_eval's requests) → what a run would do.

    With `batch_size=auto`, as many rows generate at once as HFLM tries first: it halves them where memory runs out.
    """
    own = {name: vars(lm).get(name) for name in ("_reader", "_memory", "_detect_batch_size")}
    reader = Rehearsal(lm._reader)
    lm._reader, lm._memory = reader, _Whole(lm, reader)
    lm._detect_batch_size = lambda *_, **__: lm.max_batch_size

    def rehearse(requests: Sequence[Any]) -> Rehearsed:
        reader.begin()
        for kind in dict.fromkeys(request.request_type for request in requests):
            same = [request for request in requests if request.request_type == kind for _ in range(request.repeats)]
            getattr(lm, kind)(same, disable_tqdm=True)
        return reader.end()

    try:
        yield rehearse
    finally:
        del lm._detect_batch_size
        lm._reader, lm._memory = own["_reader"], own["_memory"]


class Rehearsal(Reader):
    """A reader that reads nothing, and keeps what it would have read."""

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader.forward, Memory(reader.forward.device), chunk=reader.chunk, trained=reader.trained, exact=False)
        self.sharing, self.checks, self.bounded = reader.sharing, reader.checks, reader.bounded
        self.begin()

    def begin(self) -> None:
        """Forgets what it was asked before."""
        self.asked = self.computed = 0
        self.notes = Notes(self.forward)

    def end(self) -> Rehearsed:
        """What was asked since `begin`."""
        return Rehearsed(
            asked=self.asked,
            computed=self.computed,
            copied=self.notes.copied,
            pieces=tuple(self.notes.pieces),
            sharing=self.sharing or Finding(make=None, said="answers that are sampled, and beams, share nothing"),
            lanes=self._lane_count,
        )

    def open_bar(self, name: str, schedules: Sequence[Schedule], *, quiet: bool, answers: int = 0) -> TokenBar:
        return super().open_bar(name, schedules, quiet=True, answers=answers)

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        schedule: Schedule,
        bar: TokenBar,
        kept: Kept,
        watch: Any = None,
    ) -> list[Answer]:
        """Answers that mean nothing: the steps are taken, without the model."""
        run = _Unscored(self.notes.forward, sequences, self._make(schedule.longest), self.chunk)
        for step in schedule.steps:
            run.done = step.start
            run.run(step)
        return [(0.0, False)] * len(sequences)

    def generate(self, plan: AnswerPlan, bar: TokenBar, answer: Generate, kept: Kept) -> list[Any]:
        """Answers that mean nothing, as `score`."""

        def note(rows: Sequence[int], state: Any) -> list[str]:
            self.notes.note_answers(len(rows), state, max(len(plan.contexts[row]) for row in rows), plan.budget)
            return [""] * len(rows)

        real, self.forward = self.forward, self.notes.forward
        try:
            return list(super().generate(plan, bar, note, kept))
        finally:
            self.forward = real

    def _make(self, room: int) -> Callable[[], State] | None:
        """What makes a state without tensors, of the kind that the model goes on from."""
        real = super()._make(room)
        if real is None:
            return None
        state = real()
        return lambda: self.notes.open(Held(self.notes, cuts=state.cuts, forks=state.forks, alone=state.alone, joins=state.joins))


class Notes:
    """What was read, and the states that are alive."""

    def __init__(self, forward: Forward) -> None:
        self.pieces: list[Piece] = []
        self.copied = 0
        self.forward: Any = Counting(self, forward)
        self._states: weakref.WeakSet[Held] = weakref.WeakSet()

    def open(self, state: Held) -> Held:
        """Counts a state for as long as somebody holds it."""
        self._states.add(state)
        return state

    def note(self, rows: int, start: int, stop: int, scored: int, budget: int = 0) -> None:
        """Adds a forward."""
        held, states = sum(s.rows * (s.tokens - s.shared) for s in self._states), sum(s.rows for s in self._states)
        self.pieces.append(Piece(rows=rows, start=start, stop=stop, scored=scored, held=held, states=states, budget=budget))

    def note_answers(self, rows: int, state: Held | None, context: int, budget: int) -> None:
        """Adds what HFLM does with rows of `context` tokens, on top of a state or of nothing: one forward, and a token at a time after it."""
        state = state or self.open(Held(self, cuts=False, rows=rows))
        start, state.tokens = state.tokens, context + budget
        self.note(rows, start, context, rows, budget)


class Held:
    """A state of so many tokens in each of so many rows, without tensors."""

    attentions = 0

    def __init__(
        self,
        notes: Notes,
        *,
        cuts: bool,
        forks: bool = False,
        alone: bool = True,
        joins: bool = False,
        rows: int = 1,
        tokens: int = 0,
        shared: int = 0,
    ) -> None:
        """`shared`: of its tokens, those that another state holds for it."""
        self.notes, self.cuts, self.forks, self.alone, self.joins = notes, cuts, forks, alone, joins
        self.rows, self.tokens, self.shared = rows, tokens, shared

    def arguments(self) -> dict[str, Any]:
        return {}

    def take(self, output: Any) -> None:
        """Nothing."""

    def keep(self, tokens: int) -> None:
        self.tokens = tokens

    def copied(self, rows: int = 1) -> Held:
        self.notes.copied += rows * self.tokens
        return self.notes.open(Held(self.notes, cuts=self.cuts, alone=self.alone, rows=rows, tokens=self.tokens))

    def forked(self, rows: int) -> Held:
        if not self.forks:
            return self.copied(rows)
        return self.notes.open(Held(self.notes, cuts=True, rows=rows, tokens=self.tokens, shared=self.tokens))

    def joined(self, rows: int, width: int, room: int) -> Held:
        return self.notes.open(Held(self.notes, cuts=True, rows=rows, tokens=width))

    def put(self, row: int, other: State, tokens: int, of: int = 0) -> None:
        self.notes.copied += tokens


class Counting:
    """In place of a `Forward`: it counts."""

    def __init__(self, notes: Notes, forward: Forward) -> None:
        self._notes = weakref.proxy(notes)
        self.model, self.device, self.vocabulary = forward.model, forward.device, forward.vocabulary

    def __call__(self, tokens: Tensor, state: Held | None, wanted: Sequence[int], positions: Tensor | None = None) -> None:
        rows, count = tokens.shape
        start = state.tokens if state is not None else 0
        if state is not None:
            state.tokens += count
        self._notes.note(rows, start, start + count, rows * max(1, len(wanted)))


class _Unscored(Run):
    """A run whose logits are none."""

    def _score(self, *_: Any) -> None:
        """Nothing."""


class _Whole(Memory):
    """In place of what HFLM generates by itself, without sharing: batches of prompts in the order of their length."""

    def __init__(self, lm: Any, reader: Rehearsal) -> None:
        super().__init__(lm.device)
        self.lm, self.reader = lm, reader

    def what_fits(self, requests: Sequence[Any], sizes: Sequence[int], run: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        """Answers that mean nothing. `sizes`: prompt and answer, of one kind."""
        budget = normalize_gen_kwargs(requests[0].args[1], self.lm.max_gen_toks)["max_gen_toks"]
        contexts = sorted((size - budget for size in sizes), reverse=True)
        rows = self.lm.max_batch_size if self.lm.batch_size == "auto" else int(self.lm.batch_size)
        for start in range(0, len(contexts), rows):
            batch = contexts[start : start + rows]
            self.reader.notes.note_answers(len(batch), None, batch[0], budget)
        return [""] * len(requests)
