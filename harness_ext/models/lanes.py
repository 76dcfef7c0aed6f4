"""A schedule's steps, dealt out to be run side by side, each token still computed once.

A core that runs a step alone does more than its share of one that all cores run together: they wait for each other at the end of every small
operation. What stands on nothing, and what stands on the same tokens, can be run apart from the rest, as long as whoever runs it holds those tokens.

No tensors here; `reader` runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness_ext.models.prefix_tree import Step, find_parents


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """Who runs which steps. All of them are the schedule's."""

    first: tuple[Step, ...]
    """Run before the others, by all together: one step that steps of several lanes stand on, or none."""
    parts: tuple[tuple[Step, ...], ...]
    """Each lane's, in the order to run them: what stands on `first` comes before what does not, and nothing stands on another lane's."""


def split(steps: Sequence[Step], costs: Sequence[float], count: int) -> Lanes:
    """At most `count` lanes of about equal `costs`, a step each: fewer where there is less to deal out.

    Dealt out is whatever stands on nothing, the costliest first, to whoever has least to do (Graham's rule: the longest lane is no longer than the
    mean and one item). Where one item is so large that this leaves cores idle, its first step is run by all, and what stands on that is dealt out.
    """
    parents = find_parents(steps)
    roots = [number for number, parent in enumerate(parents) if parent < 0]
    items = [range(start, stop) for start, stop in zip(roots, [*roots[1:], len(steps)], strict=True)]
    choices: list[tuple[list[int], list[range]]] = [([], items)]
    if items and not any(step.copy or step.resume for step in steps):
        largest = max(items, key=lambda item: _add_up(item, costs))
        starts = [number for number in largest if parents[number] == largest.start]
        inner = [range(start, stop) for start, stop in zip(starts, [*starts[1:], largest.stop], strict=False)]
        choices.append(([largest.start], inner + [item for item in items if item is not largest]))
    dealt = [(first, _deal(chosen, costs, count)) for first, chosen in choices]
    first, lanes = min(dealt, key=lambda one: _add_up(one[0], costs) / count + max((load for load, _ in one[1]), default=0.0))
    parts = [tuple(steps[number] for item in given for number in item) for _, given in lanes]
    return Lanes(first=tuple(steps[number] for number in first), parts=tuple(parts))


def _deal(items: Sequence[range], costs: Sequence[float], count: int) -> list[tuple[float, list[range]]]:
    """(cost, items in the order they were given) of each lane that has any."""
    loads, chosen = [0.0] * count, [list[int]() for _ in range(count)]
    for index in sorted(range(len(items)), key=lambda index: -_add_up(items[index], costs)):
        least = loads.index(min(loads))
        loads[least] += _add_up(items[index], costs)
        chosen[least].append(index)
    return [(load, [items[index] for index in sorted(given)]) for load, given in zip(loads, chosen, strict=True) if given]


def _add_up(numbers: Sequence[int], costs: Sequence[float]) -> float:
    return sum(costs[number] for number in numbers)
