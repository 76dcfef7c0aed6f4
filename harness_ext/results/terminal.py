"""Runs → text for a terminal: numbers, curves as bars, heat maps as figures on colours. Plain where it is no terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from harness_ext.errors import PairingError
from harness_ext.results.figures import CONTROLS
from harness_ext.results.leaderboard import RULES, name_override, name_runs
from harness_ext.results.paired import PairedTest, compare_runs, correct
from harness_ext.results.records import Cell, EffectiveLength, Point, PublishedRun, Run, ScoreDetails, Task
from harness_ext.results.why import fold, show_why

WIDEST = 40
"""Columns of a bar, where the terminal has room."""
MOST = 12
"""Runs that are tested in pairs, as many as the page lays over each other."""
BLOCKS, LETTERS = ("█", "▓", "░", "─"), ("#", "+", ".", "-")
"""Up to the interval's lower end, from there to the score, from there to the upper end; and the rule at the trained length."""
HEAT = ((54, 231), (61, 231), (30, 231), (71, 16), (220, 16))
"""Of a terminal's 256 colours, background and text of each fifth of the scores: viridis, as nearly as they come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """What is drawn on."""

    width: int = 100
    """Columns."""
    colour: bool = False
    """Whether it shows colours."""
    blocks: bool = True
    """Whether it shows more than ASCII."""


def show_runs(runs: Sequence[PublishedRun], screen: Screen) -> str:
    """All of it: a run after the other, each task with its curve, its effective lengths and its heat map; and every two, tested."""
    return "\n".join([line for published in runs for line in (*_show_run(published, screen), "")] + [*_show_pairs(runs, screen)])


def draw_bar(details: ScoreDetails, width: int, screen: Screen) -> str:
    """A share as a bar, its interval shaded.

    >>> from harness_ext.results.records import ConfidenceInterval, Uncertainty
    >>> interval = ConfidenceInterval(lower=0.2, upper=0.8, method="wilson")
    >>> details = ScoreDetails(score=0.5, uncertainty=Uncertainty(confidence_interval=interval, num_samples=9))
    >>> draw_bar(details, 10, Screen())
    '██▓▓▓░░░  '
    """
    interval = details.uncertainty.confidence_interval
    ends = (interval.lower, details.score, interval.upper) if interval else (details.score,) * 3
    low, score, high = (round(end * width) for end in ends)
    solid, sure, maybe, _ = BLOCKS if screen.blocks else LETTERS
    return (solid * low + sure * (score - low) + maybe * (high - score)).ljust(width)


def _show_run(published: PublishedRun, screen: Screen) -> Iterator[str]:
    run, trained = published.run, published.run.trained_length
    known = f"trained length {trained.tokens:,} ({trained.source})" if trained else "trained length unknown"
    yield _strong(f"{run.model_info.id}, {name_override(run)}", screen) + f": {run.model_info.position_scheme}, {known}"
    for task in run.tasks:
        yield ""
        yield from _show_task(run, task, screen)
        cells = [cell for cell in published.cells if cell.evaluation_name == task.evaluation_name]
        yield from _show_heat(cells, screen)


def _show_task(run: Run, task: Task, screen: Screen) -> Iterator[str]:
    said = "loss in nats a token" if task.metric == "loss" else "exact matches in percent"
    yield f"{_strong(task.evaluation_name, screen)}: {said}, 95 % intervals"
    points = task.curve.points
    rows = [(f"{point.length:,}", _say_multiple(point.multiple), _say_score(point, task.metric)) for point in points]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    room = min(WIDEST, screen.width - sum(widths) - 8)
    trained, was_inside = run.trained_length, True
    for point, row in zip(points, rows, strict=True):
        if trained and was_inside and point.length > trained.tokens:
            was_inside = False
            rule = (BLOCKS if screen.blocks else LETTERS)[3]
            yield "  " + f"{rule * 2} past the trained length ".ljust(sum(widths) + 4 + max(0, room), rule)
        bar = draw_bar(point.score_details, room, screen) if point.score_details and task.metric == "exact" and room >= 8 else ""
        numbers = f"{row[0]:>{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}"
        yield f"  {numbers}  {bar}".rstrip()
    for rule_name, title in RULES.items():
        for found in (e for e in task.curve.effective_lengths if e.rule == rule_name):
            yield from fold(f"  {title.partition(':')[0]}: {_say_effective(found, run)}", screen.width)
    for control in task.curve.controls:
        where = f" at {control.length:,}" if control.length else ""
        yield f"  control, {CONTROLS[control.control]}{where}: {_say_details(control.score_details, 'exact')}"
    yield from show_why(task.curve, screen.width)


def _show_heat(cells: Sequence[Cell], screen: Screen) -> Iterator[str]:
    """Depths against lengths, in as many blocks as the width asks for."""
    swept = [cell for cell in cells if cell.control is None and cell.depth is not None]
    found = {(cell.depth, cell.length): cell for cell in swept}
    depths, lengths = sorted({cell.depth for cell in swept if cell.depth is not None}), sorted({cell.length for cell in swept})
    if len(depths) < 2:
        return
    names = {cell.length: _say_multiple(cell.multiple) or f"{cell.length:,}" for cell in swept}
    column = max(5, *(len(name) + 1 for name in names.values()))
    fit = max(1, (screen.width - 12) // column)
    for start in range(0, len(lengths), fit):
        block = lengths[start : start + fit]
        yield "  depth   " + "".join(f"{names[length]:>{column}}" for length in block)
        for depth in depths:
            yield f"  {100 * depth:>4.0f} %  " + "".join(_draw_cell(found.get((depth, length)), column, screen) for length in block)
    if any(cell.outcome != "measured" for cell in swept):
        yield f"  {_unmeasured(screen)} could not be run"


def _show_pairs(runs: Sequence[PublishedRun], screen: Screen) -> Iterator[str]:
    """A table a task that several runs have, of every two of them, corrected as one; and why two are not compared."""
    for name in dict.fromkeys(task.evaluation_name for run in runs for task in run.run.tasks if task.metric == "exact"):
        having = [_keep_task(run, name) for run in runs if any(task.evaluation_name == name for task in run.run.tasks)]
        if len(having) > MOST:
            yield f"{name}: {len(having)} runs; at most {MOST} are tested in pairs, so name fewer"
            continue
        found: dict[str, tuple[PairedTest, ...]] = {}
        refused: list[str] = []
        named = zip(name_runs([one.run for one in having]), having, strict=True)
        for (label, first), (other, second) in itertools.combinations(named, 2):
            try:
                found[f"{label} : {other}"] = compare_runs(first, second)
            except PairingError as error:
                refused.append(f"not compared: {error}")
        corrected = _correct(found)
        if corrected:
            yield _strong(f"{name}, two runs on the same prompts", screen)
            yield from fold(
                "prompts that only the first and that only the second answered exactly; p by the exact test of haystacks, and McNemar's "
                "by prompts, too small where haystacks differ in what is hard on them; both after Holm's correction over the "
                f"{sum(test.p is not None for tests in corrected.values() for test in tests)} tests of this table",
                screen.width,
            )
        for pair, tests in corrected.items():
            yield f"  {pair}"
            seen: set[int] = set()
            for test in tests:
                tokens = test.lengths[0].tokens  # those pooled come after each alone, and may be one
                yield "    " + _show_test(test, "past the trained length" if tokens in seen else f"{tokens:,}")
                seen.add(tokens)
        for line in refused:
            yield from fold(line, screen.width)
        if corrected or refused:
            yield ""


def _keep_task(published: PublishedRun, name: str) -> PublishedRun:
    """A run as if it had this task alone: other prompts of another task are no reason not to compare this one."""
    tasks = [task for task in published.run.tasks if task.evaluation_name == name]
    return msgspec.structs.replace(published, run=msgspec.structs.replace(published.run, tasks=tasks))


def _correct(found: Mapping[str, Sequence[PairedTest]]) -> dict[str, list[PairedTest]]:
    """The tests of several pairs of runs, with Holm's correction over all of them."""
    corrected = iter(correct(test for tests in found.values() for test in tests))
    return {pair: [next(corrected) for _ in tests] for pair, tests in found.items()}


def _show_test(test: PairedTest, where: str) -> str:
    if test.p_holm is None or test.p_haystacks_holm is None:
        return f"{where:>23}  {test.reason}"
    counts = f"{test.only_first} : {test.only_second}"
    return f"{where:>23}  {counts:>9}  p {_say_p(test.p_haystacks_holm):<8}  prompts {_say_p(test.p_holm)}"


def _say_p(p: float) -> str:
    """
    >>> _say_p(0.0123), _say_p(1e-9), _say_p(1.0)
    ('0.012', '< 0.0001', '1')
    """
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def _draw_cell(cell: Cell | None, width: int, screen: Screen) -> str:
    if cell is None:
        return " " * width
    if cell.score_details is None:
        return f"{_unmeasured(screen):>{width - 1}} "
    text = f"{100 * cell.score_details.score:>{width - 1}.0f} "
    if not screen.colour:
        return text
    ground, ink = HEAT[min(4, int(5 * cell.score_details.score))]
    return f"\033[48;5;{ground};38;5;{ink}m{text}\033[0m"


def _unmeasured(screen: Screen) -> str:
    return "╱" if screen.blocks else "/"


def _say_effective(found: EffectiveLength, run: Run) -> str:
    if found.tokens is None:
        return f"not measurable, {found.reason}"
    trained, more = run.trained_length, found.outcome == "at_least"
    multiple = f" ({found.tokens / trained.tokens:.3g}× the trained length)" if trained else ""
    said = f"{'at least ' if more else ''}{found.tokens:,} tokens{multiple}"
    if found.lower is None or found.upper is None:
        return f"{said}, no interval"
    return f"{said}, 95 % {f'{found.lower:,}' if found.lower else 'none'} to {found.upper:,}{' or more' if more else ''}"


def _say_score(point: Point, metric: str) -> str:
    return point.outcome if point.score_details is None else _say_details(point.score_details, metric)


def _say_details(details: ScoreDetails, metric: str) -> str:
    interval = details.uncertainty.confidence_interval
    scale, digits = (1, 3) if metric == "loss" else (100, 1)
    score = f"{scale * details.score:5.{digits}f}"
    return f"{score} [{scale * interval.lower:.{digits}f}, {scale * interval.upper:.{digits}f}]" if interval else score


def _say_multiple(multiple: float | None) -> str:
    return "" if multiple is None else f"{multiple:.3g}×"


def _strong(text: str, screen: Screen) -> str:
    return f"\033[1m{text}\033[0m" if screen.colour else text
