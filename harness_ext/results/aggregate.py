"""Prompts → a cell's record, cells → a curve's: the arithmetic of what is published, a function of its arguments alone.

A publisher makes records with these, and a reader makes them again to check what strangers published.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

from harness_ext.cells import Outcome
from harness_ext.results.records import (
    Cell,
    ConfidenceInterval,
    ControlName,
    ControlPoint,
    Curve,
    Derived,
    Point,
    Prompt,
    ScoreDetails,
    Uncertainty,
)
from harness_ext.results.statistics import wilson


def make_cell(
    *,
    evaluation_result_id: str,
    evaluation_id: str,
    evaluation_name: str,
    control: ControlName | None = None,
    length: int,
    multiple: float | None,
    depth: float | None,
    outcome: Outcome,
    reason: str = "",
    prompts: Sequence[Prompt] = (),
) -> Cell:
    """The cell of these prompts, all of one task, control, length and depth.

    Raises ValueError where a cell that was not measured has prompts: they are no score.
    """
    if outcome != "measured" and prompts:
        raise ValueError(f"{evaluation_name} at {length} tokens: {len(prompts)} prompts of a cell that is {outcome}; expected none")
    kept = sorted(prompts, key=lambda prompt: prompt.sample)
    verdicts = Counter(prompt.verdict for prompt in kept)
    likelihoods = [prompt.log_likelihood for prompt in kept if prompt.log_likelihood is not None]
    loss = "loss" in verdicts
    return Cell(
        evaluation_result_id=evaluation_result_id,
        evaluation_id=evaluation_id,
        evaluation_name=evaluation_name,
        control=control,
        length=length,
        multiple=multiple,
        depth=depth,
        outcome=outcome,
        reason=reason,
        n=len(kept),
        successes=verdicts["exact"] if kept and not loss else None,
        misses={} if loss else {verdict: count for verdict, count in sorted(verdicts.items()) if verdict != "exact"},
        mean_log_likelihood=math.fsum(likelihoods) / len(likelihoods) if likelihoods else None,
        score_details=_score(kept),
        prompts=kept,
    )


def make_curve(cells: Sequence[Cell]) -> Curve:
    """The curve of one task's cells, controls among them."""
    ordered = sorted(cells, key=lambda cell: (cell.length, cell.depth or 0))
    sweep = itertools.groupby((cell for cell in ordered if cell.control is None), key=lambda cell: cell.length)
    return Curve(
        points=[_make_point(list(group)) for _, group in sweep],
        controls=_make_controls([cell for cell in ordered if cell.control]),
        effective_lengths=[],
        half_length=Derived(value=None, lower=None, upper=None, reason="not computed yet"),
        area_past=Derived(value=None, lower=None, upper=None, reason="not computed yet"),
    )


def _make_point(cells: Sequence[Cell]) -> Point:
    """Of one length: measured only where every depth of it was, since depths left out would make another mean."""
    first, missing = cells[0], next((cell for cell in cells if cell.outcome != "measured"), None)
    return Point(
        length=first.length,
        multiple=first.multiple,
        outcome=missing.outcome if missing else "measured",
        reason=missing.reason if missing else "",
        score_details=None if missing else _score([prompt for cell in cells for prompt in cell.prompts]),
    )


def _make_controls(cells: Sequence[Cell]) -> list[ControlPoint]:
    found = []
    by_place = sorted(cells, key=lambda cell: (cell.control or "", cell.length))
    for (control, length), group in itertools.groupby(by_place, key=lambda cell: (cell.control, cell.length)):
        score = _make_point(list(group)).score_details
        if control and score:
            found.append(ControlPoint(control=control, length=None if control == "no_haystack" else length, score_details=score))
    return found


def _score(prompts: Sequence[Prompt]) -> ScoreDetails | None:
    if not prompts:
        return None
    if any(prompt.verdict == "loss" for prompt in prompts):
        losses = [-prompt.log_likelihood / prompt.tokens for prompt in prompts if prompt.log_likelihood is not None and prompt.tokens]
        if len(losses) < len(prompts):
            return None
        return ScoreDetails(score=math.fsum(losses) / len(losses), uncertainty=Uncertainty(confidence_interval=None, num_samples=len(losses)))
    successes, n = sum(prompt.verdict == "exact" for prompt in prompts), len(prompts)
    lower, upper = wilson(successes, n)
    interval = ConfidenceInterval(lower=lower, upper=upper, method="wilson")
    return ScoreDetails(score=successes / n, uncertainty=Uncertainty(confidence_interval=interval, num_samples=n))
