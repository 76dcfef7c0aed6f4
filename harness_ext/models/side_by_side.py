"""Lanes of a schedule (`lanes`), each run in a thread of its own with its share of the cores."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import threading
from collections.abc import Callable, Sequence

import torch

from harness_ext.model_view import first_line
from harness_ext.models import memory
from harness_ext.models.forward import Run
from harness_ext.models.lanes import Lanes
from harness_ext.models.ledger import FLUSH, Ledger
from harness_ext.models.prefix_tree import Step, leave_read

log = logging.getLogger(__name__)


class _StoppedError(Exception):
    """Another lane has failed, or the user has had enough."""


def run_side_by_side(run: Run, lanes: Lanes, steps: Sequence[Step], ledger: Ledger) -> tuple[Step, ...]:
    """Runs `steps`, those of the lanes' that are still to be run, on `run` and on copies of it; gives back what is left where memory ran out.

    Whatever else goes wrong in a lane ends the others at their next chunk, and is raised.
    """
    tell = run.progress
    shift = _Shift(steps, ledger, tell)
    first, *parts = (shift.list_left(part) for part in (lanes.first, *lanes.parts))
    parts = [part for part in parts if part]
    run.progress = shift.progress
    shift.go(run, first)
    if parts and not shift.stop.is_set():
        others = _branch(run, len(parts) - 1)
        if others is not None:
            ledger.runs += others
            calls = [functools.partial(shift.go, *lane) for lane in zip((run, *others), parts, strict=True)]
            run_threads(calls, len(lanes.parts), stop=shift.stop, meanwhile=ledger.hand_over)
            for other in others:
                run.absorb(other)
    ledger.runs, run.progress = [run], tell
    if shift.left:
        run.forget()
        memory.free()
    return tuple(shift.left.values())


class _Shift:
    """Steps that are being run in several lanes: what is left of them, by their identity, and whether to stop."""

    def __init__(self, steps: Sequence[Step], ledger: Ledger, tell: Callable[[int, int, int], None]) -> None:
        self.left = {id(step): step for step in steps}
        self.stop = threading.Event()
        self._ledger, self._tell, self._lock = ledger, tell, threading.Lock()

    def list_left(self, steps: Sequence[Step]) -> list[Step]:
        """Those of some steps that are still to be run."""
        return [step for step in steps if id(step) in self.left]

    def progress(self, start: int, end: int, rows: int) -> None:
        """A lane has read a chunk. Raises _StoppedError in a lane that should stop."""
        with self._lock:
            self._tell(start, end, rows)
        if self.stop.is_set():
            raise _StoppedError

    def go(self, run: Run, steps: Sequence[Step]) -> None:
        """Runs a lane's steps. Where memory runs out, or another lane has stopped, what was not read of them is left."""
        for step in steps:
            if self.stop.is_set():
                return
            run.done = step.start
            try:
                run.run(step)
            except _StoppedError:
                pass
            except (RuntimeError, MemoryError) as error:
                self.stop.set()
                if not memory.is_out(error):
                    raise
                log.warning("prompts side by side do not fit into memory: one at a time from here on: %s", first_line(error))
            self._ledger.note(step, run.done)
            if run.done < step.stop:
                self.left[id(step)] = leave_read(step, run.done)
                return
            del self.left[id(step)]


def _branch(run: Run, count: int) -> list[Run] | None:
    """So many copies of a run, or None where they do not fit into memory."""
    try:
        return [run.branch() for _ in range(count)]
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out(error):
            raise
        log.warning("%d states do not fit into memory: one prompt at a time from here on: %s", count + 1, first_line(error))
        return None


def run_threads(
    calls: Sequence[Callable[[], None]],
    lanes: int,
    *,
    stop: threading.Event | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Makes all calls at once, each with the cores of one of so many lanes; `meanwhile` is called every `FLUSH` seconds, in this thread.

    Raises what a call raises. `stop` is set as soon as that happens, or anything else ends this; then all calls are waited for.
    """
    cores = torch.get_num_threads()
    pool = concurrent.futures.ThreadPoolExecutor(len(calls), initializer=torch.set_num_threads, initargs=(max(1, cores // lanes),))
    try:
        waiting = {pool.submit(call) for call in calls}
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, FLUSH, concurrent.futures.FIRST_COMPLETED)
            for call in done:
                call.result()
            meanwhile()
    finally:
        if stop is not None:
            stop.set()
        pool.shutdown()
        torch.set_num_threads(cores)  # a worker's setting is what threads of the process begin with, too
