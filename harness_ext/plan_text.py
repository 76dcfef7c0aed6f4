"""A plan → text for a reader, or plain values for a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from harness_ext.plan import Plan, PlannedLength, Reading, show_bytes
from harness_ext.results.tables import lay_out


def to_json(plan: Plan) -> dict[str, Any]:
    """`plan` as plain values, with the verdicts."""
    found = dataclasses.asdict(plan)
    for task, planned in zip(found["tasks"], plan.tasks, strict=True):
        for length, known in zip(task["lengths"], planned.lengths, strict=True):
            length |= {"planned_bytes": known.planned_bytes, "verdict": known.verdict}
    return {**found, "fits": plan.fits}


def to_text(plan: Plan) -> str:
    """`plan` as it is printed: lengths and memory, tokens and time, and what both were read off."""
    trained = plan.trained_length
    known = f"trained length {trained.tokens} ({trained.source})" if trained else "trained length unknown"
    return "\n\n".join(
        [
            f"{plan.model}, {known}, on {plan.device}. Nothing was scored.",
            show_lengths(plan),
            "\n".join(_notes(plan)),
            show_reading(plan),
            "\n".join(_say_time(plan)),
        ]
    )


def show_lengths(plan: Plan) -> str:
    """One row a task and length."""
    rows = [
        [task.task, length.length.label, str(length.prompts or "–"), _show_need(length), length.verdict]
        for task in plan.tasks
        for length in task.lengths
    ]
    return lay_out(["task", "length", "prompts", "memory", "verdict"], rows, right=(1, 2, 3))


def show_reading(plan: Plan) -> str:
    """One row a task, and one for all together where there are several."""
    rows = [[task.task, *_show_row(task.reading)] for task in plan.tasks]
    if len(plan.tasks) > 1:
        rows.append(["together", *_show_row(plan.total)])
    header = ["task", "prompts", "tokens asked", "computed", "generated at most", "time, estimated"]
    return lay_out(header, rows, right=(1, 2, 3, 4, 5))


def show_seconds(seconds: float) -> str:
    """A duration in its two largest units, since it is an estimate.

    >>> [show_seconds(seconds) for seconds in (0.2, 7.4, 65, 3700, 200_000)]
    ['under 1 s', '7 s', '1 min 5 s', '1 h 1 min', '2 d 7 h']
    """
    if seconds < 1:
        return "under 1 s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    parts = [f"{count} {name}" for count, name in ((days, "d"), (hour, "h"), (minute, "min"), (second, "s")) if count]
    return " ".join(parts[:2])


def _show_row(reading: Reading) -> list[str]:
    counts = (reading.prompts, reading.asked, reading.computed, reading.generated)
    return [*(f"{count:,}" for count in counts), show_seconds(reading.seconds)]


def _show_need(length: PlannedLength) -> str:
    return "–" if length.planned_bytes is None else show_bytes(length.planned_bytes)


def _notes(plan: Plan) -> Iterator[str]:
    """Why lengths are left out, and what the memory is made of."""
    left_out = [(task.task, length.length) for task in plan.tasks for length in task.lengths if length.length.outcome != "measured"]
    for outcome, reason in dict.fromkeys((length.outcome, length.reason) for _, length in left_out):
        names = dict.fromkeys(task for task, length in left_out if (length.outcome, length.reason) == (outcome, reason))
        yield f"- {outcome}, {', '.join(names)}: {reason}"
    demand = plan.demand
    fixed = f"{show_bytes(demand.state_fixed)} and " if demand.state_fixed >= 1 else ""
    state = (
        f"; what is kept of a prompt takes {fixed}{show_bytes(demand.state_token)} a token" if demand.state_token or fixed else ""
    )
    yield (
        f"- memory is beside the weights, which take {show_bytes(demand.weights)}; {show_bytes(plan.free_bytes)} are free then{state}"
    )
    yield f"- {plan.sharing}"


def _say_time(plan: Plan) -> Iterator[str]:
    total = plan.preparing_seconds + plan.total.seconds
    yield (
        f"In all {show_seconds(total)}, an estimate: {show_seconds(plan.preparing_seconds)} to prepare the prompts, "
        f"{show_seconds(plan.total.seconds)} for {plan.total.forwards:,} forwards; loading comes on top."
    )
    probed = ", ".join(f"{piece.stop - piece.start} at {piece.start}" for piece in plan.demand.probed)
    stretched = f", {plan.demand.stretched} tokens of the cache repeated and not read" if plan.demand.stretched else ""
    yield f"Read off pieces of so many tokens: {probed}{stretched}."
