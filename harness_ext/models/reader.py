"""Prompts in, answers out, each distinct token of them read once: the schedule is made, run, and lived with where memory runs out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness_ext.cells import Unmeasured
from harness_ext.models import pieces, prefix_tree
from harness_ext.models.batch_check import BatchChecks
from harness_ext.models.forward import Forward, Run
from harness_ext.models.journal import Kept
from harness_ext.models.lanes import Lanes, split
from harness_ext.models.ledger import Answer, Ledger
from harness_ext.models.memory import Memory
from harness_ext.models.prefix_tree import Batch, Schedule, Step
from harness_ext.models.progress import TokenBar, cost, find_even_position
from harness_ext.models.self_check import Finding, check_output, find_reach, find_state
from harness_ext.models.side_by_side import run_side_by_side
from harness_ext.models.state import State
from harness_ext.models.watching import Reading

log = logging.getLogger(__name__)

Tokens = Sequence[int]
Company = tuple[Step, ...]
"""Steps whose prompts are answered together."""
Generate = Callable[[Sequence[int], State | None], list[str]]
"""Contexts by their indices, and the state to go on from, a row for each → their answers. It holds all tokens but the last of each; None where they share nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPlan:
    """How answers come to be generated."""

    contexts: Sequence[Tokens]
    schedule: Schedule
    companies: Sequence[Company]
    """Of all steps of the schedule, in their order."""
    budget: int
    """Tokens of an answer, at most."""


class Reader:
    """A model and what it can go on from. `trained`: its trained length in tokens. `chunk`: tokens read at a time."""

    def __init__(self, forward: Forward, memory: Memory, *, chunk: int, trained: int, exact: bool) -> None:
        self.forward, self.memory, self.chunk, self.trained = forward, memory, chunk, trained
        self.asked = self.computed = 0
        """Tokens of all prompts so far, and those of them that were computed."""
        self.sharing = Finding(make=None, said="exact=True was asked for") if exact else None
        """What the model can go on from, once that was found out."""
        self.resumed = 0
        """Answers that were there already, from an interrupted run or a cache."""
        self.seconds = 0.0
        """In which answers were computed."""
        self.smallest = chunk
        """Tokens that were read at a time where memory was scarce."""
        self.lanes = 1
        """Steps that are run side by side at most, each on a state of its own and with its share of the cores."""
        self.bounded = memory.foresees
        """Whether what is held at once is bounded by what is free, since nothing is refused."""
        self.checks = BatchChecks(forward)
        self._checked = 0

    def prepare(self, longest: int) -> None:
        """Finds out what the model, as it is now, can go on from; no farther than the `longest` prompt, in tokens, goes.

        Again where later prompts go farther than earlier ones, and that may make a difference.
        """
        if self.forward.picks is None:
            check_output(self.forward)
        far = min(longest, find_reach(self.forward, self.trained))
        if self.sharing is not None and (self.sharing.make is None or far <= self._checked):
            return
        self.sharing, self._checked = find_state(self.forward, self.trained, far), far
        self.checks.forget()
        if self.sharing.make is None and pieces.remove(self.forward.model):
            self.sharing = find_state(self.forward, self.trained, far)
        how = "prompts share what they have in common" if self.sharing.make else "every prompt is read whole"
        log.log(logging.INFO if self.sharing.make else logging.WARNING, "%s: %s", how, self.sharing.said)

    @property
    def generates(self) -> bool:
        """Whether an answer can be generated from a shared beginning, found out on the first call after `prepare`."""
        make = self._made().make
        return make is not None and self.checks.generates(make, self._checked)

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
            "attentions": state and state.attentions,
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

    def plan(self, sequences: Sequence[Tokens], wanted: Sequence[int], batch: Batch) -> Schedule:
        """The schedule of prompts to score, one that suits the model; see `prefix_tree.plan`."""
        make = self._made().make
        state = make(0) if make else None
        if state is not None and state.forks:
            batch = dataclasses.replace(batch, leaves=self.chunk)
        if state is None:  # of the others it is known that what comes after a token changes nothing: they can be read in chunks
            batch = self.checks.limit("read", batch, max(map(len, sequences), default=0))
            return prefix_tree.plan_whole(sequences, wanted, batch)
        return prefix_tree.plan(sequences, wanted, batch, cut=state.cuts, alone=state.alone)

    def plan_answers(self, contexts: Sequence[Tokens], batch: Batch, budget: int) -> AnswerPlan:
        """A schedule of prompts to answer, the last token of each read for itself, and its steps as they are answered together."""
        make, longest = self._made().make, max(map(len, contexts), default=0)
        assert make is not None, "answers are generated from whole prompts"
        state = make(0)
        if state.joins:
            batch = self.checks.limit("gone on from", batch, longest, make)
        else:  # those that share nothing are answered whole, and so together
            batch = self.checks.limit("answered", batch, longest)
        lengths = list(map(len, contexts))
        schedule = prefix_tree.plan(contexts, [length - 1 for length in lengths], batch, cut=state.cuts, apart=True)
        schedule, companies = prefix_tree.gather(schedule, lengths, batch, joins=state.joins)
        return AnswerPlan(contexts=contexts, schedule=schedule, companies=companies, budget=budget)

    def count(self, asked: int, computed: int, seconds: float) -> None:
        """Tokens of prompts that were answered by another than this reader, and how long that took."""
        self.asked, self.computed, self.seconds = self.asked + asked, self.computed + computed, self.seconds + seconds

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
        kept: Kept,
        watch: Reading | None = None,
    ) -> list[Answer]:
        """The answer to each of `sequences`, which have the last tokens that the schedule has not, but for those known already.

        Those that have come are `kept` by sequence, each once, every so often (`ledger.FLUSH`) and at the end. `watch`: as `Run`'s.
        """
        run = Run(self.forward, sequences, self._make(schedule.longest), self.chunk, bar.update, watch)
        steps = prefix_tree.leave_out(schedule.steps, kept.known)
        self._skip(schedule.steps, steps, [len(sequence) - 1 for sequence in sequences], bar)
        started, lanes = time.monotonic(), self._split(schedule)
        with Ledger([run], steps, kept) as ledger:
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
                        pending += [prefix_tree.take_rows(left, [row], len(sequences[step.rows[row]]) - 1) for row in range(rows)]
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

    def generate(self, plan: AnswerPlan, bar: TokenBar, answer: Generate, kept: Kept) -> list[str | Unmeasured]:
        """A greedy answer to each context, equal ones answered once; `kept` as in `score`."""
        contexts, budget = plan.contexts, plan.budget
        run = Run(self.forward, contexts, self._make(plan.schedule.longest + budget), self.chunk, bar.update)
        found: dict[int, str | Unmeasured] = dict(kept.known)
        started = time.monotonic()
        companies = prefix_tree.leave_out_whole(plan.schedule.steps, plan.companies, found)
        self._skip(plan.schedule.steps, [*itertools.chain.from_iterable(companies)], list(map(len, contexts)), bar, budget)
        for company in companies:
            rows = [row for step in company if step.reads for row in step.rows]
            if not rows:
                for step in company:
                    self.memory.unless_out(step.stop, functools.partial(run.run, step))
                continue
            ask = functools.partial(_answer_together, run, company, plan, answer)
            texts = self.memory.what_fits(rows, [len(contexts[row]) + budget for row in rows], ask)
            self.smallest = min(self.smallest, run.chunk)
            if any(isinstance(text, Unmeasured) for text in texts):
                run.forget()
                run.chunk = self.chunk
            text_of = dict(zip(rows, texts, strict=True))
            come = {read.sequence: text_of[step.rows[read.row]] for step in company for read in step.reads}
            come = {index: text for index, text in come.items() if index not in found}
            found |= come
            kept.add(come)
            for step in company:
                if step.reads:
                    bar.update(step.stop - 1, step.stop + budget, len(step.rows))
        self.seconds += time.monotonic() - started
        return [found[index] for index in range(len(contexts))]

    def _skip(self, steps: Sequence[Step], left: Sequence[Step], lengths: Sequence[int], bar: TokenBar, budget: int = 0) -> None:
        """Takes the steps that are not left, since their answers are known, out of what is counted as computed, and out of the bar."""
        running = {id(step) for step in left}
        for step in steps:
            if id(step) not in running:
                self.computed -= prefix_tree.count_tokens(step, lengths)
                bar.drop(step.start, step.stop + (budget if step.reads else 0), len(step.rows))

    def _make(self, room: int) -> Callable[[], State] | None:
        """What makes a fresh state with room for so many tokens."""
        make = self._made().make
        return None if make is None else functools.partial(make, room)


def _answer_together(run: Run, company: Company, plan: AnswerPlan, answer: Generate, rows: Sequence[int]) -> list[str]:
    """The answers to some `rows` of a company, which are held all at once."""
    assert run.make is not None
    lengths = {row: len(plan.contexts[row]) for row in rows}
    joins, width = run.make().joins, max(lengths.values()) - 1
    if not joins and len(rows) > 1:
        return answer(rows, None)
    joined: State | None = None
    for step in company:
        own = [number for number, row in enumerate(step.rows) if row in lengths]
        if not step.reads:
            run.run(step)
        if not step.reads or not own:
            continue
        part = prefix_tree.take_rows(step, own, max(lengths[step.rows[number]] for number in own))
        state = run.hold(part)
        if len(rows) == 1:
            answers = answer(rows, state)
            run.leave()
            return answers
        joined = joined or state.joined(len(rows), width, width + plan.budget)
        for number, row in enumerate(part.rows):
            joined.put(rows.index(row), state, lengths[row] - 1, number)
    return answer(rows, joined)
