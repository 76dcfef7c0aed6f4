"""Which lengths to run, and in which order their cells come."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness_ext.cells import Length, Limit, TrainedLength
from harness_ext.errors import LengthError
from harness_ext.sweep.spec import LossSpec, TaskSpec


def plan_lengths(spec: TaskSpec | LossSpec, trained: TrainedLength | None, limits: Sequence[Limit]) -> list[Length]:
    """The task's lengths, shortest first, each `measured` or with the outcome of the first of `limits` that it exceeds.

    Raises LengthError where multiples are asked for and no trained length is known.
    """
    if not spec.lengths and trained is None:
        raise LengthError(
            f"{spec.task}: multiples of the trained length were asked for, but none is known for this model; "
            "give it (trained_length=N), or give lengths in tokens"
        )
    # A user's multiple of 1.5 with a trained length of 1023 means 1534 tokens: to the nearest, never below 1.
    tokens = spec.lengths or sorted({max(1, math.floor(m * trained.tokens + 0.5)) for m in spec.multiples if trained})
    return [_plan(count, trained, limits) for count in tokens]


def _plan(tokens: int, trained: TrainedLength | None, limits: Sequence[Limit]) -> Length:
    multiple = tokens / trained.tokens if trained else None
    for limit in limits:
        if tokens > limit.tokens:
            return Length(tokens=tokens, multiple=multiple, outcome=limit.outcome, reason=limit.reason)
    return Length(tokens=tokens, multiple=multiple)


def order_cells(lengths: int, depths: int, samples: int) -> list[tuple[int, int, int]]:
    """(length, depth, sample) indices of all cells, so ordered that any first N are balanced.

    Among the first N, lengths differ by at most one prompt, and so do depths within each sample's round; depths come far
    apart first.

    >>> [cell for cell in order_cells(2, 4, 1)][:4]
    [(0, 0, 0), (1, 2, 0), (0, 1, 0), (1, 3, 0)]
    """
    spread = _spread(depths)
    block = math.lcm(lengths, depths)
    return [(i % lengths, spread[(i + i // block) % depths], sample) for sample in range(samples) for i in range(lengths * depths)]


def _spread(count: int) -> list[int]:
    """0 to count − 1, far apart first: in the order of their digits read backwards (van der Corput)."""
    bits = max(1, (count - 1).bit_length())
    return [i for i in (int(f"{n:0{bits}b}"[::-1], 2) for n in range(2**bits)) if i < count]
