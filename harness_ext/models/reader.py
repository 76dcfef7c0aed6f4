"""Prompts in, answers out, each distinct token of them read once: the schedule is made, run, and lived with where memory runs out."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness_ext.cells import Unmeasured
from harness_ext.models import pieces, prefix_tree
from harness_ext.models.forward import Forward, Run
from harness_ext.models.lanes import Lanes, split
from harness_ext.models.ledger import Answer, Ledger
from harness_ext.models.memory import Memory
from harness_ext.models.prefix_tree import Batch, Schedule, Step
from harness_ext.models.progress import TokenBar, cost, find_even_position
from harness_ext.models.self_check import Finding, check_generation, find_reach, find_state
from harness_ext.models.side_by_side import run_side_by_side
from harness_ext.models.state import State
from harness_ext.models.watching import Reading

log = logging.getLogger(__name__)

Tokens = Sequence[int]


class Reader:
    """A model and what it can go on from. `trained`: its trained length in tokens. `chunk`: tokens read at a time."""

    def __init__(self, forward: Forward, memory: Memory, *, chunk: int, trained: int, exact: bool) -> None:
        self.forward, self.memory, self.chunk, self.trained = forward, memory, chunk, trained
        self.asked = self.computed = 0
        """Tokens of all prompts so far, and those of them that were computed."""
        self.sharing = Finding(make=None, said="exact=True was asked for") if exact else None
        """What the model can go on from, once that was found out."""
        self.resumed = 0
        """Answers that an interrupted run had left."""
        self.seconds = 0.0
        """In which answers were computed."""
        self.smallest = chunk
        """Tokens that were read at a time where memory was scarce."""
        self.lanes = 1
        """Steps that are run side by side at most, each on a state of its own and with its share of the cores."""
        self._checked = 0
        self._generation: Finding | None = None

    def prepare(self, longest: int) -> None:
        """Finds out what the model, as it is now, can go on from; no farther than the `longest` prompt, in tokens, goes.

        Again where later prompts go farther than earlier ones, and that may make a difference.
        """
        far = min(longest, find_reach(self.forward, self.trained))
        if self.sharing is not None and (self.sharing.make is None or far <= self._checked):
            return
        self.sharing, self._checked = find_state(self.forward, self.trained, far), far
        if self.sharing.make is None and pieces.remove(self.forward.model):
            self.sharing = find_state(self.forward, self.trained, far)
        how = "prompts share what they have in common" if self.sharing.make else "every prompt is read whole"
        log.log(logging.INFO if self.sharing.make else logging.WARNING, "%s: %s", how, self.sharing.said)

    @property
    def generates(self) -> bool:
        """Whether an answer can be generated from a shared beginning, found out on the first call after `prepare`."""
        if self._generation is None:
            make = self._made().make
            self._generation = check_generation(self.forward, make, self._checked) if make else self._made()
            if make and not self._generation.make:
                log.warning("answers are generated from whole prompts: %s", self._generation.said)
        return self._generation.make is not None

    def _made(self) -> Finding:
        assert self.sharing is not None, "prepare comes first"
        return self.sharing

    def describe_way(self) -> dict[str, Any]:
        """What decides how tokens are put together, and so the last bits of an answer."""
        make = self.sharing.make if self.sharing else None
        state = make(0) if make else None
        return {
            "chunk": self.chunk,
            "lanes": self._lane_count,
            "cuts": state and state.cuts,
            "forks": state and state.forks,
            "alone": state and state.alone,
            "exact": make is None,
        }

    def describe(self) -> dict[str, Any]:
        """For the results file: tokens asked and computed so far, and what they were shared by."""
        return {
            "asked": self.asked,
            "computed": self.computed,
            "seconds": round(self.seconds, 3),
            "resumed": self.resumed,
            "chunk": self.chunk,
            "smallest_chunk": self.smallest,
            "lanes": self._lane_count,
            "too_large": self.memory.too_large or None,
            "sharing": self.sharing.said if self.sharing else "nothing was read",
        }

    def plan(self, sequences: Sequence[Tokens], wanted: Sequence[int], batch: Batch, *, apart: bool = False) -> Schedule:
        """The schedule that suits the model; see `prefix_tree.plan`."""
        make = self._made().make
        if make is None:
            return prefix_tree.plan_whole(sequences, wanted, batch)
        state = make(0)
        if state.forks and not apart:
            batch = dataclasses.replace(batch, leaves=self.chunk)
        return prefix_tree.plan(sequences, wanted, batch, cut=state.cuts, apart=apart, alone=state.alone)

    def open_bar(self, name: str, schedules: Sequence[Schedule], *, quiet: bool, answers: int = 0) -> TokenBar:
        """A bar over schedules, which are counted as asked, and over `answers` tokens to generate at the end of each prompt."""
        asked, computed = (sum(getattr(schedule, field) for schedule in schedules) for field in ("asked", "computed"))
        self.asked, self.computed = self.asked + asked, self.computed + computed
        log.info("%s: %d tokens asked, %d computed", name, asked, computed)
        even = find_even_position(self.forward.model)
        steps = [step for schedule in schedules for step in schedule.steps]
        spans = [(len(step.rows), step.start, step.stop + (answers if step.reads else 0)) for step in steps]
        tokens = sum(rows * (stop - start) for rows, start, stop in spans)
        return TokenBar(name, tokens, sum(rows * cost(start, stop, even) for rows, start, stop in spans), even, quiet=quiet)

    def score(
        self,
        sequences: Sequence[Tokens],
        schedule: Schedule,
        bar: TokenBar,
        write: Callable[[dict[int, Answer]], None] = lambda answers: None,
        known: Mapping[int, Answer] | None = None,
        watch: Reading | None = None,
    ) -> list[Answer]:
        """The answer to each of `sequences`, which have the last tokens that the schedule has not; `known`: those that are there already.

        `write` is given those that have come, by sequence, each once, every so often (`ledger.FLUSH`) and at the end. `watch`: as `Run`'s.
        """
        run = Run(self.forward, sequences, self._make(schedule.longest), self.chunk, bar.update, watch)
        steps = prefix_tree.leave_out(schedule.steps, known or {})
        started, lanes = time.monotonic(), self._split(schedule)
        with Ledger([run], steps, known or {}, write) as ledger:
            if len(lanes.parts) > 1:
                steps = run_side_by_side(run, lanes, steps, ledger)
                self.smallest = min(self.smallest, run.chunk)
                if steps:
                    self.lanes, run.chunk = 1, self.chunk  # smaller pieces were for the other lanes' sake
            pending = list(reversed(steps))
            while pending:
                step = pending.pop()
                run.done = step.start
                rows = len(step.rows)
                failed = self.memory.unless_out(
                    rows * step.stop, functools.partial(run.run, step), functools.partial(run.needs, rows)
                )
                self.smallest = min(self.smallest, run.chunk)
                ledger.note(step, run.done)
                if isinstance(failed, Unmeasured):
                    run.forget()
                    run.chunk = self.chunk  # that was for this length's sake
                    left = prefix_tree.leave_read(step, run.done)
                    if rows == 1:
                        ledger.add({read.sequence: self.memory.refuse(len(sequences[read.sequence])) for read in left.reads})
                    else:
                        pending += [prefix_tree.take_row(left, row, len(sequences[step.rows[row]]) - 1) for row in range(rows)]
                    ledger.add(self.memory.list_refused([len(sequence) for sequence in sequences], unheld=1))
                    pending = list(reversed(prefix_tree.leave_out(tuple(reversed(pending)), ledger.answers)))
                ledger.hand_over()
        self.smallest = min(self.smallest, run.chunk)
        self.seconds += time.monotonic() - started
        return [ledger.answers[index] for index in range(len(sequences))]

    @property
    def _lane_count(self) -> int:
        """Lanes that a schedule is dealt to. Only models whose attention is ours (`forks`): others may keep something of a forward in themselves."""
        make = self.sharing.make if self.sharing else None
        return self.lanes if self.lanes > 1 and make is not None and make(0).forks else 1

    def _split(self, schedule: Schedule) -> Lanes:
        """The lanes of the whole schedule, whatever of it is done already: so a run that goes on runs each step in the same company."""
        even = find_even_position(self.forward.model)
        costs = [len(step.rows) * cost(step.start, step.stop, even) for step in schedule.steps]
        return split(schedule.steps, costs, self._lane_count)

    def generate(
        self,
        contexts: Sequence[Tokens],
        schedule: Schedule,
        bar: TokenBar,
        budget: int,
        answer: Callable[[Sequence[int], State | None], list[str]],
        write: Callable[[dict[int, str]], None] = lambda answers: None,
        known: Mapping[int, str] | None = None,
    ) -> list[str | Unmeasured]:
        """A greedy answer of at most `budget` tokens to each of `contexts`, equal ones answered once; `write` and `known` as in `score`.

        `answer` is given contexts by their indices, and the state that all of them go on from: a row for each, or None where
        they share nothing.
        """
        make = self._make(schedule.longest + budget)
        run = Run(self.forward, contexts, make, self.chunk, bar.update)
        found: dict[int, str | Unmeasured] = dict(known or {})
        started = time.monotonic()
        for step in prefix_tree.leave_out(schedule.steps, found):
            run.done = step.start
            if not step.reads:
                self.memory.unless_out(step.stop, functools.partial(run.run, step))
                continue

            def generate(rows: Sequence[int], step: Step = step) -> list[str]:
                if len(step.rows) > 1 and not step.start:
                    return answer(rows, None)
                alone = len(step.rows) == 1
                state = run.hold(step, step.stop - 1 if alone else step.start)
                answers = answer(rows, state if alone else state.copied(len(rows)))
                run.leave()
                return answers

            texts = self.memory.what_fits(step.rows, [len(contexts[row]) + budget for row in step.rows], generate)
            self.smallest = min(self.smallest, run.chunk)
            if any(isinstance(text, Unmeasured) for text in texts):
                run.forget()
                run.chunk = self.chunk
            come = {read.sequence: texts[read.row] for read in step.reads if read.sequence not in found}
            found |= come
            write({index: text for index, text in come.items() if not isinstance(text, Unmeasured)})
            bar.update(step.stop - 1 if len(step.rows) == 1 else step.start, step.stop + budget, len(step.rows))
        self.seconds += time.monotonic() - started
        return [found[index] for index in range(len(contexts))]

    def _make(self, room: int) -> Callable[[], State] | None:
        """What makes a fresh state with room for so many tokens."""
        make = self._made().make
        return None if make is None else functools.partial(make, room)
