"""Answers as steps bring them: what of each prompt has still to be read, and what was handed over already."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence

from harness_ext.cells import Unmeasured
from harness_ext.models.forward import Run
from harness_ext.models.journal import Kept
from harness_ext.models.prefix_tree import Step

FLUSH = 30
"""Seconds between two hand-overs of finished answers."""
Answer = tuple[float, bool] | Unmeasured
"""(log-likelihood, is greedy)."""


class Ledger:
    """What steps that are still to be run will answer. `runs`: that run them, each some. Answers are `kept` by sequence, each once.

    Whatever ends the `with` block, an error or Ctrl-C too, the answers that have come whole by then are handed over.
    """

    def __init__(self, runs: Sequence[Run], steps: Sequence[Step], kept: Kept) -> None:
        self.runs = list(runs)
        self.answers: dict[int, Answer] = {**kept.likelihoods()}
        self._unread: dict[int, int] = {}
        self._kept, self._written, self._lock = kept, time.monotonic(), threading.Lock()
        for step in steps:
            for read in step.reads:
                self._unread[read.sequence] = self._unread.get(read.sequence, 0) + read.stop - read.start

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # A device that has failed gives nothing more, and why it failed is what matters.
        with contextlib.suppress(RuntimeError) if error else contextlib.nullcontext():
            self.hand_over(now=True)

    def note(self, step: Step, done: int) -> None:
        """A step was read up to token `done`, by any thread."""
        with self._lock:
            for read in step.reads:
                self._unread[read.sequence] -= max(0, min(read.stop, done) - read.start)

    def add(self, answers: Mapping[int, Answer]) -> None:
        """Answers that no step brought; one that is there already stays."""
        self.answers = {**answers, **self.answers}

    def hand_over(self, *, now: bool = False) -> None:
        """Adds and keeps the answers that have come whole. Waits for the device, so only every `FLUSH` seconds, or `now`."""
        if not now and time.monotonic() - self._written <= FLUSH:
            return
        with self._lock:
            whole = [sequence for sequence, unread in self._unread.items() if not unread and sequence not in self.answers]
        parts = [run.answers() for run in self.runs]
        new: dict[int, Answer] = {
            sequence: (sum(part[sequence][0] for part in parts), all(part[sequence][1] for part in parts)) for sequence in whole
        }
        self.answers |= new
        self._kept.add(new)
        self._written = time.monotonic()
