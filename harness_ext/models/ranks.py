"""Several processes that answer one evaluation's prompts: each is told all of them, they are dealt out by what reading them costs, and answers go
back to the process that was asked.

lm_eval deals by count, before anybody knows what prompts share. It wants each answer from the process that it asked, and gets it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch.distributed

from harness_ext.models.prefix_tree import count_common
from harness_ext.models.progress import cost

STEPS = 50
"""Of the search for the smallest largest share."""
Item = TypeVar("Item")


class Ranks:
    """The processes, as one of them sees them."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.readings: list[Any] = []
        """What each of them read, as far as that was told."""

    def gather(self, own: Sequence[Item]) -> list[Item]:
        """The items of all processes, in the order of their ranks."""
        parts = self._tell(list(own))
        self._first, self._own = sum(map(len, parts[: self.rank])), len(own)
        return list(itertools.chain.from_iterable(parts))

    def deal(
        self,
        sequences: Sequence[Sequence[int]],
        groups: Sequence[Sequence[int]],
        *,
        even: float,
        budgets: Sequence[int] = (),
        shares: bool = True,
    ) -> list[list[int]]:
        """This process's part of groups of what was gathered, by index, empty groups left out; arguments as `deal`'s."""
        if self.count == 1:
            return [list(group) for group in groups]
        dealt = [deal(sequences, groups, self.count, even=even, budgets=budgets, shares=shares) if not self.rank else None]
        torch.distributed.broadcast_object_list(dealt)  # one dealing, whatever each process may have found out of the model
        assert dealt[0] is not None
        mine = set(dealt[0][self.rank])
        parts = ([index for index in group if index in mine] for group in groups)
        return [part for part in parts if part]

    def collect(self, answers: Sequence[Item | None], reading: Any) -> list[Item]:
        """The answers of all processes, of which each has given its own; `reading`: what it read."""
        if self.count == 1:
            return [answer for answer in answers if answer is not None]
        parts = self._tell({index: answer for index, answer in enumerate(answers) if answer is not None})
        self.note(reading)
        found = {index: answer for part in parts for index, answer in part.items()}
        return [found[index] for index in range(len(answers))]

    def note(self, reading: Any) -> None:
        """Tells the processes what this one has read so far; each of them has to."""
        if self.count > 1:
            self.readings = self._tell(reading)

    def own(self, gathered: Sequence[Item]) -> list[Item]:
        """What belongs to this process's own items, of what belongs to all that were gathered."""
        return list(gathered[self._first : self._first + self._own])

    def _tell(self, own: Item) -> list[Item]:
        """What each process says."""
        if self.count == 1:
            return [own]
        said: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(said, own)
        return said


ALONE = Ranks(0, 1)


def deal(
    sequences: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    parts: int,
    *,
    even: float,
    budgets: Sequence[int] = (),
    shares: bool = True,
) -> list[list[int]]:
    """Indices of `sequences` in at most so many parts, of which the costliest is as cheap as runs of neighbours can be.

    Sorted, prompts stand beside those that they share most with, so that a run of neighbours is read with its common beginnings once
    (`prefix_tree`), and cutting the row costs no more than what stands on both sides of the cut. `groups`: only prompts of one share; `budgets`:
    tokens generated after each; `even`: as `progress.cost`'s, by which a token costs 1 and what it attends to; `shares`: whether any share.
    The costliest part is above the mean by no more than the costliest prompt does.
    """
    order, alone, after = [], [], []
    for group in groups:
        arrays = {index: np.asarray(sequences[index], dtype=">u8") for index in group}
        row = sorted(group, key=lambda index: arrays[index].tobytes())
        for before, index in zip([None, *row], row, strict=False):
            stop = len(arrays[index])
            answer = cost(stop, stop + budgets[index], even) if budgets else 0.0
            common = count_common(arrays[before], arrays[index]) if before is not None and shares else 0
            order.append(index)
            alone.append(cost(0, stop, even) + answer)
            after.append(cost(common, stop, even) + (answer if common < stop else 0.0))
    low, high = max(alone, default=0.0), sum(alone)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if len(_fill(alone, after, middle)) <= parts else (middle, high)
    dealt = [[order[place] for place in part] for part in _fill(alone, after, high)]
    return dealt + [[] for _ in range(parts - len(dealt))]


def _fill(alone: Sequence[float], after: Sequence[float], most: float) -> list[range]:
    """Runs of neighbours, each of which costs `most` or less if it can: the first of a run what it does alone, others what they do after it."""
    runs, start, load = [], 0, 0.0
    for place in range(len(alone)):
        more = alone[place] if place == start else after[place]
        if place > start and load + more > most:
            runs.append(range(start, place))
            start, load, more = place, 0.0, alone[place]
        load += more
    return [*runs, range(start, len(alone))] if alone else []


def add_up(readings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What processes read (`Reader.describe`), as if one had, and the tokens that each computed.

    >>> one = {"asked": 9, "computed": 5, "seconds": 1.5, "resumed": 0}
    >>> add_up([one, {"asked": 9, "computed": 4, "seconds": 1.0, "resumed": 2}])
    {'asked': 18, 'computed': 9, 'seconds': 1.5, 'resumed': 2, 'processes': [5, 4]}
    >>> add_up([one]) == one
    True
    """
    if len(readings) == 1:
        return readings[0]
    added = {name: sum(reading[name] for reading in readings) for name in ("asked", "computed", "resumed")}
    slowest = max(reading["seconds"] for reading in readings)
    return {**readings[0], **added, "seconds": slowest, "processes": [reading["computed"] for reading in readings]}
