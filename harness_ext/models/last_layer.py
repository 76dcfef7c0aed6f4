"""The last attention of a forward, for the queries alone whose outputs are read.

A chunk is read for what it leaves in the cache, and for logits at a few of its tokens. When the last layer attends, its keys and values are in the cache already,
and what comes after is computed position by position. So the first queries, whose outputs nobody reads, need not attend there; and a forward of which
no logits are wanted has done its work, and ends.

Which attention is a forward's last, of what a model calls and in which order, is counted in a forward that is not cut short. Whether nothing comes after it that
mixes positions or writes into the cache is found out by `self_check`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


class ForwardEndedError(Exception):
    """Nothing more of a forward is wanted. Raised from within it, caught by who called it."""


class _Running(threading.local):
    """The forward that runs in a thread."""

    calls = 0
    """Of attention, so far."""
    last = 0
    """Which of them is the last; 0 for none that may be cut short."""
    tokens = 0
    """It reads, in each row."""
    unread = 0
    """Of those, the first so many have no use for what the last attention makes of them."""


_running = _Running()


@contextlib.contextmanager
def cut_short(last: int, tokens: int, unread: int) -> Iterator[None]:
    """Within it, attention number `last` of this thread's forward, counted from 1, leaves out the first `unread` of its `tokens`. 0: none does."""
    _running.calls, _running.last, _running.tokens, _running.unread = 0, last, tokens, unread
    try:
        yield
    finally:
        _running.last = 0


def count_attentions(run: Callable[[], Any]) -> int:
    """How often attention was called in a forward, which `run` makes."""
    _running.calls = 0
    run()
    return _running.calls


def count_unread(queries: int) -> int:
    """How many of the first `queries` need not attend, in the attention that calls this, as each does once.

    Raises ForwardEndedError where that is all of them.
    """
    _running.calls += 1
    if _running.calls != _running.last or queries != _running.tokens:
        return 0
    if _running.unread == queries:
        raise ForwardEndedError
    return _running.unread
