"""A page of all records in results/, as Markdown: `python docs/board.py` writes docs/leaderboard.md.

The same records as the site (`harness-ext leaderboard results/ --out site/`), where a page of Markdown is enough: scores by multiple with 95 %
intervals clustered by haystack, and the effective length by NoLiMa's rule. Every number is read from the records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from harness_ext.results.leaderboard import name_override
from harness_ext.results.records import EffectiveLength, Point, Run, Task
from harness_ext.results.store import read_results
from harness_ext.results.tables import lay_out

REPOSITORY = Path(__file__).parent.parent
RULE = "nolima"
HEAD = """\
# All records

`python docs/board.py` writes this page from `results/`; `harness-ext leaderboard results/ --out site/` makes the site of the same records, with curves, heat maps, controls, every
rule of effective length, and the command that repeats each run. In percent exact matches, in brackets 95 % intervals clustered by haystack; for a loss, nats per token. `no haystack` is the
control without filler. The effective length is NoLiMa's, 85 % of the score within the window ([statistics.md](statistics.md)), as a multiple of the trained length, with its interval."""


def write_page(runs: Sequence[Run]) -> str:
    """A table for each task."""
    names = sorted({task.evaluation_name for run in runs for task in run.tasks if task.curve.points})
    parts = [HEAD]
    for name in names:
        rows = [(run, task) for run in runs for task in run.tasks if task.evaluation_name == name and task.curve.points]
        parts += [f"## {name}", *tabulate(rows)]
    return "\n\n".join(parts) + "\n"


def tabulate(rows: Sequence[tuple[Run, Task]]) -> Iterator[str]:
    """One table for runs that have the same multiples."""
    grids = {tuple(point.multiple for point in _pick(task)) for _, task in rows}
    for grid in sorted(grids, key=str):
        same = [(run, task) for run, task in rows if tuple(point.multiple for point in _pick(task)) == grid]
        exact = same[0][1].metric == "exact"
        header = [
            "model",
            "override",
            *(f"{multiple:g}×" for multiple in grid if multiple),
            *(["effective", "no haystack"] if exact else []),
        ]
        yield lay_out(
            header,
            [
                [run.model_info.id, name_override(run), *map(show_point, _pick(task)), *(_end(run, task) if exact else [])]
                for run, task in same
            ],
        )


def show_point(point: Point) -> str:
    """A score, or why there is none."""
    if point.score_details is None:
        return point.outcome
    score, interval = point.score_details.score, point.score_details.uncertainty.confidence_interval
    percent = interval is not None and interval.method != "t"
    shown = f"{100 * score:.0f}" if percent else f"{score:.2f}"
    if interval is None:
        return shown
    ends = [f"{100 * end:.0f}" if percent else f"{end:.2f}" for end in (interval.lower, interval.upper)]
    return f"{shown} [{', '.join(ends)}]"


def _pick(task: Task) -> list[Point]:
    """Of a loss's many buckets, those that end at a multiple that tasks are run at."""
    return [point for point in task.curve.points if task.metric == "exact" or point.multiple in (0.5, 1.0, 2.0, 4.0, 8.0)]


def _end(run: Run, task: Task) -> list[str]:
    found = next(length for length in task.curve.effective_lengths if length.rule == RULE)
    control = next((point for point in task.curve.controls if point.control == "no_haystack"), None)
    return [show_length(found, run), f"{100 * control.score_details.score:.0f}" if control else ""]


def show_length(found: EffectiveLength, run: Run) -> str:
    """As a multiple of the trained length."""
    if found.tokens is None or run.trained_length is None:
        return "not measurable"
    ends = ["none" if not end else f"{end / run.trained_length.tokens:g}" for end in (found.lower, found.upper)]
    more = "≥ " if found.outcome == "at_least" else ""
    return f"{more}{found.tokens / run.trained_length.tokens:g}× [{', '.join(ends)}]"


if __name__ == "__main__":
    published, problems = read_results(REPOSITORY / "results")
    assert not problems, problems
    runs = sorted(
        (found.run for found in published), key=lambda run: (run.model_info.id, run.override.method != "none", run.override.method)
    )
    (REPOSITORY / "docs" / "leaderboard.md").write_text(write_page(runs), encoding="utf-8")
