"""Which prompts of an evaluation each of several machines runs: whole samples, dealt out by what reading them costs.

tasks' records → units, one a task and sample → what each costs → parts.

A unit is a task's sample at all its lengths and depths: its prompts share a haystack, so one machine reads what they have in common once, and
answers that are not independent of each other stay together. What a part holds follows from the records alone, and so is the same
wherever it is run.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness_ext.errors import ShardError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One part of an evaluation."""

    index: int
    """From 1."""
    of: int
    """How many parts there are."""

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is never split."""

    task: str
    """lm_eval's name."""
    sample: int
    """Of the task."""
    docs: tuple[int, ...]
    """The places of its prompts among all of the task's, ascending: lm_eval's `doc_id`."""
    cost: int
    """Pairs of tokens; see `weigh`."""


def parse_shard(text: str) -> Shard:
    """The shard that `3/16` names. Raises ShardError for anything else.

    >>> parse_shard("3/16")
    Shard(index=3, of=16)
    """
    index, _, of = text.partition("/")
    if not (index.isdecimal() and of.isdecimal() and 1 <= int(index) <= int(of)):
        raise ShardError(f"--shard: found {text!r}; expected which part of how many, from 1, as in 3/16")
    return Shard(index=int(index), of=int(of))


def list_units(task: str, docs: Sequence[Mapping[str, Any]], *, one_context: bool = False) -> list[Unit]:
    """The units of a task's records; `one_context`: whether a length's needles stand in one context (a task with `every_depth`)."""
    samples: dict[int, list[int]] = {}
    for number, doc in enumerate(docs):
        samples.setdefault(doc["sample"], []).append(number)
    return [
        Unit(
            task=task, sample=sample, docs=tuple(numbers), cost=weigh([docs[number] for number in numbers], one_context=one_context)
        )
        for sample, numbers in samples.items()
    ]


def weigh(docs: Sequence[Mapping[str, Any]], *, one_context: bool = False) -> int:
    """About how many pairs of tokens attention looks at in a sample's prompts, what they share counted once.

    Up to its needle, a prompt is the haystack that all others have too: what was read up to the deepest needle is there, and the rest of each
    prompt, from its needle on, is its own. Reading tokens p to n takes (n² − p²) / 2 pairs; the half is left out. Tokens' own cost is left out
    as well: it decides where prompts are short, and there everything is cheap. Beside the prefix tree of the prompts themselves, on the embedded
    model, it is 6 % too low to 10 % too high, and 36 % too low for sixteen questions of one context, which count for nothing.

    >>> weigh([{"length": 100, "depth": 0.5}, {"length": 100, "depth": 0.0}])  # 50² + (100² − 50²) + 100²
    20000
    >>> weigh([{"edge": 50}, {"edge": 100}])  # the buckets of one text
    10000
    """
    if one_context:
        return sum(length**2 for length in {doc["length"] for doc in docs})
    spans = [_span(doc) for doc in docs]
    return max(shared for shared, _ in spans) ** 2 + sum(end**2 - shared**2 for shared, end in spans)


def deal(units: Sequence[Unit], parts: int) -> list[list[Unit]]:
    """`units` in so many parts: the costliest first, each to the part that has least so far (Graham, Bounds on Multiprocessing Timing
    Anomalies, 1969: longest processing time first).

    No part is costlier than another by more than the costliest unit, and none is above 4/3 of the best split's costliest part.
    Raises ShardError where parts would be empty.
    """
    if parts > len(units):
        raise ShardError(
            f"{parts} parts were asked for, and samples are never split, of which these tasks have {len(units)}; ask for at most so many parts"
        )
    dealt: list[list[Unit]] = [[] for _ in range(parts)]
    loads = [(0, 0, part) for part in range(parts)]
    for unit in sorted(units, key=lambda unit: (-unit.cost, unit.task, unit.sample)):
        load, count, part = heapq.heappop(loads)
        dealt[part].append(unit)
        heapq.heappush(loads, (load + unit.cost, count + 1, part))
    return dealt


def _span(doc: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens that a prompt shares with others of its sample, and all of them."""
    if "edge" in doc:
        return doc["edge"], doc["edge"]
    if doc.get("control") == "cropped":  # its end alone, down to the trained length
        return 0, round(doc["length"] / doc["multiple"])
    length, depth = doc["length"], doc.get("depth")
    return length if depth is None else int(depth * length), length
