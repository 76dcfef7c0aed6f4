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
    number_of = {id(step): number for number, step in enumerate(steps)}
    first, *parts = ([step for step in part if id(step) in number_of] for part in (lanes.first, *lanes.parts))
    parts = [part for part in parts if part]
    left, stop, lock = dict(enumerate(steps)), threading.Event(), threading.Lock()
    tell = run.progress

    def progress(start: int, end: int, rows: int) -> None:
        with lock:
            tell(start, end, rows)
        if stop.is_set():
            raise _StoppedError

    def go(run: Run, part: Sequence[Step]) -> None:
        for step in part:
            if stop.is_set():
                return
            run.done = step.start
            try:
                run.run(step)
            except _StoppedError:
                pass
            except (RuntimeError, MemoryError) as error:
                stop.set()
                if not memory.is_out(error):
                    raise
                log.warning(
                    "%d prompts side by side do not fit into memory: one at a time from here on: %s", len(parts), first_line(error)
                )
            ledger.note(step, run.done)
            if run.done < step.stop:
                left[number_of[id(step)]] = leave_read(step, run.done)
                return
            del left[number_of[id(step)]]

    run.progress = progress
    go(run, first)
    others: list[Run] = []
    if parts and not stop.is_set():
        try:
            others = [run.branch() for _ in parts[1:]]
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out(error):
                raise
            log.warning("%d states do not fit into memory: one prompt at a time from here on: %s", len(parts), first_line(error))
        else:
            ledger.runs += others
            calls = [functools.partial(go, *lane) for lane in zip((run, *others), parts, strict=True)]
            run_threads(calls, len(lanes.parts), stop=stop, meanwhile=ledger.hand_over)
    for other in others:
        run.absorb(other)
    ledger.runs, run.progress = [run], tell
    if left:
        run.forget()
        memory.free()
    return tuple(left[number] for number in sorted(left))


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
