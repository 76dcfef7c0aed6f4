"""Prompts → a cell's record, cells → a curve's: the arithmetic of what is published, a function of its arguments alone.

A publisher makes records with these, and a reader makes them again to check what strangers published.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec
import numpy as np

from harness_ext.results.causes import ARMS, Arm, Scores, explain, measure_baselines
from harness_ext.results.clusters import Answers, draw_scores, list_intervals, tabulate
from harness_ext.results.effective_length import RULES, Reading, find_area_past, find_half_length, measure_length
from harness_ext.results.predict import predict
from harness_ext.results.records import (
    ArmName,
    ArmPoint,
    Cell,
    CellOutcome,
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
from harness_ext.results.statistics import t_interval, wilson

_Key = TypeVar("_Key", str, int, float)


def make_cell(
    *,
    evaluation_result_id: str,
    evaluation_id: str,
    evaluation_name: str,
    control: ControlName | None = None,
    length: int,
    multiple: float | None,
    depth: float | None,
    outcome: CellOutcome,
    reason: str = "",
    prompts: Sequence[Prompt] = (),
) -> Cell:
    """The cell of these prompts, all of one task, control, length and depth.

    A share has Wilson's interval: prompts of one cell are of different haystacks, so that they are independent. A loss is the
    mean over texts, each in nats per token, with Student's t interval; one that is no finite number leaves the cell without a
    score, and `reason` says so.

    Raises ValueError where a cell that was not measured has prompts: they are no score.
    """
    if outcome != "measured" and prompts:
        raise ValueError(f"{evaluation_name} at {length} tokens: {len(prompts)} prompts of a cell that is {outcome}; expected none")
    kept = sorted(prompts, key=lambda prompt: prompt.sample)
    verdicts = Counter(prompt.verdict for prompt in kept)
    likelihoods = [prompt.log_likelihood for prompt in kept if prompt.log_likelihood is not None]
    loss = "loss" in verdicts
    score = _score_loss(kept) if loss else _score_share(verdicts["exact"], len(kept)) if kept else None
    if kept and score is None and not reason:
        reason = "the loss of a text is no finite number"
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
        score_details=score,
        prompts=kept,
    )


def make_curve(cells: Sequence[Cell]) -> Curve:
    """The curve of one task's cells, controls and arms among them.

    Points' intervals are clustered by haystack; figures derived from the curve take their intervals from the same draws, in which
    all lengths are drawn together. A loss has points alone: it has no right answers, of which half could be left.
    """
    by_control = _group(cells, lambda cell: cell.control or "")
    sweep = by_control.pop("", [])
    arms = {arm: by_control.pop(arm) for arm in ARMS if arm in by_control}
    curve = _make_plain(sweep, by_control)
    return _add_arms(curve, sweep, arms) if arms else curve


def _make_plain(sweep: Sequence[Cell], by_control: Mapping[str, Sequence[Cell]]) -> Curve:
    points, reading = _make_points(list(_group(sweep, lambda cell: cell.length).values()))
    if reading is None:
        why = "a loss" if any(cell.n and cell.successes is None for cell in sweep) else "nothing was measured"
        none = Derived(value=None, lower=None, upper=None, reason=why)
        return Curve(points=points, controls=_make_controls(by_control), effective_lengths=[], half_length=none, area_past=none)
    return Curve(
        points=points,
        controls=_make_controls(by_control),
        effective_lengths=[measure_length(rule, reading) for rule in RULES],
        half_length=find_half_length(reading),
        area_past=find_area_past(reading),
    )


def _add_arms(curve: Curve, sweep: Sequence[Cell], arms: Mapping[ArmName, Sequence[Cell]]) -> Curve:
    """The curve with what its arms say of it."""
    points = [
        ArmPoint(
            arm=arm,
            length=point.length,
            multiple=point.multiple,
            outcome=point.outcome,
            reason=point.reason,
            score_details=point.score_details,
        )
        for arm, cells in arms.items()
        for point in _make_points(list(_group(cells, lambda cell: cell.length).values()))[0]
    ]
    known = next(((point.length, point.multiple) for point in points if point.multiple), None)
    if known is None:  # the trained length is unknown: nothing is past it
        return msgspec.structs.replace(curve, arms=points)
    trained = round(known[0] / known[1])
    became = {point.length: "was not run" for point in points} | {point.length: str(point.outcome) for point in curve.points}
    scores = draw_arms([*sweep, *itertools.chain(*arms.values())])
    return msgspec.structs.replace(
        curve,
        arms=points,
        baselines=measure_baselines(scores, trained),
        causes=explain(scores, points, became, trained),
        predictions=predict(scores, trained),
    )


def draw_arms(cells: Iterable[Cell]) -> Scores:
    """The scores of all arms at all their lengths: prompts of one haystack are drawn together, so that differences are paired."""
    arms: dict[str, Arm] = {"": "long", **{arm: arm for arm in ARMS}}
    groups = {
        (arms[control], length): group
        for control, own in _group(cells, lambda cell: cell.control or "").items()
        if control in arms
        for length, group in _group(own, lambda cell: cell.length).items()
        if _is_whole(group)
    }
    if not groups:
        return {}
    answers = tabulate(list(groups.values()))
    draws = draw_scores(answers, own=1)
    columns = np.column_stack([answers.scores, draws] if np.isfinite(draws).all() else [answers.scores])
    return dict(zip(groups, columns, strict=True))


def profile_depths(cells: Sequence[Cell], *, above: float = 1.0, up_to: float = math.inf) -> dict[float, ScoreDetails]:
    """Depth → the score there, over the lengths whose multiple is above one and up to the other (by default: past the trained length).

    Lengths share haystacks, so the intervals are clustered by haystack, as a curve's.
    """
    chosen = [cell for cell in cells if cell.control is None and cell.prompts and above < (cell.multiple or 0) <= up_to]
    by_depth = _group(
        [cell for cell in chosen if cell.successes is not None and cell.depth is not None], lambda cell: cell.depth or 0
    )
    groups = list(by_depth.values())
    return dict(zip(by_depth, _score_clustered(tabulate(groups)), strict=True)) if groups else {}


def _make_points(groups: Sequence[Sequence[Cell]]) -> tuple[list[Point], Reading | None]:
    """A point a length, and for shares what is read off the measured ones.

    A length is measured where every depth of it was: the mean over those that were would be another mean.
    """
    missing = [next((cell for cell in group if cell.outcome != "measured"), None) for group in groups]
    whole = [_is_whole(group) for group in groups]
    measured = list(itertools.compress(groups, whole))
    shares = all(cell.successes is not None for group in measured for cell in group if cell.prompts)
    answers = tabulate(measured) if measured and shares else None
    scores = iter(_score_clustered(answers) if answers else [group[0].score_details for group in measured])
    points = [
        Point(
            length=group[0].length,
            multiple=group[0].multiple,
            outcome=gap.outcome if gap else "measured",
            reason=(gap or group[0]).reason,
            score_details=next(scores) if known else None,
        )
        for group, gap, known in zip(groups, missing, whole, strict=True)
    ]
    return points, _read(points, answers) if answers else None


def _is_whole(group: Sequence[Cell]) -> bool:
    return all(cell.outcome == "measured" for cell in group) and any(cell.prompts for cell in group)


def _read(points: Sequence[Point], answers: Answers) -> Reading:
    measured = [point for point in points if point.score_details]
    multiples = tuple(point.multiple for point in measured if point.multiple is not None)
    longer = next((point for point in points if point.length > measured[-1].length), None)
    draws = draw_scores(answers)
    return Reading(
        tokens=tuple(point.length for point in measured),
        multiples=multiples if len(multiples) == len(measured) else None,
        scores=answers.scores,
        draws=draws if np.isfinite(draws).all() else None,
        unmeasured=f"{longer.length} tokens: {longer.outcome}" if longer else "",
    )


def _make_controls(by_control: Mapping[str, Sequence[Cell]]) -> list[ControlPoint]:
    return [
        ControlPoint(
            control=control,  # type: ignore[arg-type]  # the arms were taken out
            length=None if control == "no_haystack" else point.length,
            score_details=point.score_details,
        )
        for control, cells in by_control.items()
        for point in _make_points(list(_group(cells, lambda cell: cell.length).values()))[0]
        if point.score_details
    ]


def _score_share(successes: int, n: int) -> ScoreDetails:
    lower, upper = wilson(successes, n)
    interval = ConfidenceInterval(lower=lower, upper=upper, method="wilson")
    return ScoreDetails(score=successes / n, uncertainty=Uncertainty(confidence_interval=interval, num_samples=n))


def _score_loss(prompts: Sequence[Prompt]) -> ScoreDetails | None:
    """None where a text has no finite loss: a mean over the others would be another score."""
    losses = [-prompt.log_likelihood / prompt.tokens for prompt in prompts if prompt.log_likelihood is not None and prompt.tokens]
    if len(losses) < len(prompts):
        return None
    ends = t_interval(losses)
    interval = ConfidenceInterval(lower=ends[0], upper=ends[1], method="t") if ends else None
    return ScoreDetails(
        score=math.fsum(losses) / len(losses), uncertainty=Uncertainty(confidence_interval=interval, num_samples=len(losses))
    )


def _score_clustered(answers: Answers) -> list[ScoreDetails]:
    rows = zip(answers.scores.tolist(), answers.asked.sum((1, 2)).tolist(), list_intervals(answers), strict=True)
    return [
        ScoreDetails(
            score=score,
            uncertainty=Uncertainty(
                confidence_interval=ConfidenceInterval(lower=ends[0], upper=ends[1], method="clustered_wilson") if ends else None,
                num_samples=int(n),
            ),
        )
        for score, n, ends in rows
    ]


def _group(cells: Iterable[Cell], key: Callable[[Cell], _Key]) -> dict[_Key, list[Cell]]:
    """By key, ascending; within a group by length and depth, so that the order in which cells come makes no difference."""
    groups: dict[_Key, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (key(cell), cell.length, -1.0 if cell.depth is None else cell.depth)):
        groups.setdefault(key(cell), []).append(cell)
    return groups
