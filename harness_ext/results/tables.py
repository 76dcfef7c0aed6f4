"""A comparison → Markdown: scores, tests past the trained length, tests length by length, and what was left out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness_ext.cells import Length
from harness_ext.results.paired import Cell, Comparison, PairedTest
from harness_ext.results.runs import Run
from harness_ext.results.statistics import wilson

CAVEAT = (
    "McNemar's test takes the prompts as independent. Prompts of one sample share their haystack, across depths and lengths, so these "
    "p-values, the pooled ones most, are smaller than they should be by what such prompts have in common; so are the intervals."
)
PAIRS_A_TABLE = 3
"""So many columns still stand side by side in a terminal."""


def show_comparison(comparison: Comparison) -> str:
    """All of it, as it is printed and as it stands in `compare.md`."""
    trained = comparison.trained_length
    known = f"trained length {trained.tokens} ({trained.source})" if trained else "trained length unknown"
    parts = [f"{comparison.model}, {known}. Shares of exact matches with 95 % Wilson intervals, on the same prompts."]
    parts += [show_scores(comparison), *_notes(comparison)]
    for title, tests in (("Past the trained length, pooled", comparison.pooled), ("Length by length", comparison.by_length)):
        parts += [f"{title}: {_describe(tests)}", show_tests(tests)] if tests else []
    if not comparison.pooled:
        parts += ["Nothing is pooled: no length past the trained length was asked for, or the trained length is unknown."]
    return "\n\n".join([*parts, CAVEAT, *_describe_runs(comparison.runs[0])]) + "\n"


def show_scores(comparison: Comparison) -> str:
    """One row a task and length, one column a method."""
    rows = [
        [cells[0].task, cells[0].length.label, _share_n(cells), *(show_cell(cell) for cell in cells)]
        for _, group in itertools.groupby(comparison.cells, key=lambda cell: (cell.task, cell.length.tokens))
        for cells in [list(group)]
    ]
    return lay_out(["task", "length", "n", *(run.method for run in comparison.runs)], rows, right=(1, 2))


def show_tests(tests: Sequence[PairedTest]) -> str:
    """One row a task and length, or a task where lengths are pooled; one column a pair of methods, a few to a table."""
    pairs = [*dict.fromkeys((test.first, test.second) for test in tests)]
    rows = [tests[start : start + len(pairs)] for start in range(0, len(tests), len(pairs))]
    tables = []
    for start in range(0, len(pairs), PAIRS_A_TABLE):
        columns = slice(start, start + PAIRS_A_TABLE)
        header = ["task", "length", "pairs", *(f"{first} : {second}" for first, second in pairs[columns])]
        tables.append(lay_out(header, [_show_row(row, row[columns]) for row in rows], right=(1, 2)))
    return "\n\n".join(tables)


def show_test(test: PairedTest, row: PairedTest) -> str:
    """The discordant prompts, p, and p after Holm's correction; and where they are not the row's, the prompts and lengths.

    >>> from dataclasses import replace
    >>> lengths = (Length(tokens=512, multiple=2.0), Length(tokens=1024, multiple=4.0))
    >>> test = PairedTest(task="t", lengths=lengths, first="a", second="b", n=9, only_first=0, only_second=6, p=0.03125, p_holm=0.0625)
    >>> show_test(test, test)
    '0 : 6, p = 0.031 (0.062)'
    >>> show_test(replace(test, n=5, lengths=lengths[:1]), test)
    '0 : 6, p = 0.031 (0.062), n = 5 at 512 (2x)'
    """
    if test.p is None or test.p_holm is None:
        return test.reason
    shown = f"{test.only_first} : {test.only_second}, p = {test.p:.2g} ({test.p_holm:.2g})"
    other = [f"n = {test.n}"] if test.n != row.n else []
    other += [f"at {_name_lengths(test.lengths)}"] if test.lengths != row.lengths else []
    return ", ".join([shown, " ".join(other)]) if other else shown


def show_cell(cell: Cell) -> str:
    """A score with its interval, or in words why there is none: never 0 for what was not measured."""
    if cell.n:
        return show_share(cell.exact, cell.n)
    return "no prompt" if cell.length.outcome == "measured" else cell.length.outcome


def show_share(successes: int, n: int) -> str:
    """
    >>> show_share(60, 100)
    '0.60 [0.50, 0.69]'
    """
    low, high = wilson(successes, n)
    return f"{successes / n:.2f} [{low:.2f}, {high:.2f}]"


def lay_out(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table, its columns of one width, so that it reads in a terminal too; `right` are the columns set flush right.

    >>> print(lay_out(["length", "n"], [["512 (2x)", "9"]], right=(1,)))
    | length   |  n |
    |----------|---:|
    | 512 (2x) |  9 |
    """
    widths = [max(2, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = [f"{'-' * (width + 1)}{':' if index in right else '-'}" for index, width in enumerate(widths)]
    aligned = [f"{{:{'>' if index in right else '<'}{width}}}" for index, width in enumerate(widths)]
    lines = ["| " + " | ".join(aligned).format(*row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def _describe(tests: Sequence[PairedTest]) -> str:
    family = sum(test.p is not None for test in tests)
    return (
        "exact McNemar tests, two-sided, of each two methods A : B on the prompts that both were given. Prompts that only A, and that "
        f"only B, answered exactly; p; in brackets p after Holm's correction over all pairs and rows of this table ({family} tests)."
    )


def _describe_runs(run: Run) -> Iterator[str]:
    """What makes the runs again, apart from the method."""
    if run.settings:
        versions = ", ".join(f"{package} {version}" for package, version in run.versions.items())
        yield f"Run with {json.dumps(run.settings)} and {versions}."


def _show_row(row: Sequence[PairedTest], shown: Sequence[PairedTest]) -> list[str]:
    """Some tests of a row, beside the most prompts and lengths that any pair of it has."""
    widest = max(row, key=lambda test: (test.n, len(test.lengths)))
    return [widest.task, _name_lengths(widest.lengths), str(widest.n), *(show_test(test, widest) for test in shown)]


def _notes(comparison: Comparison) -> Iterator[str]:
    lines = [f"- {run.method} was left out: {run.refused}" for run in comparison.refused]
    unmeasured = [cell for cell in comparison.cells if cell.length.outcome != "measured"]
    for outcome, reason in dict.fromkeys((cell.length.outcome, cell.length.reason) for cell in unmeasured):
        where = [cell for cell in unmeasured if (cell.length.outcome, cell.length.reason) == (outcome, reason)]
        tasks, methods = (
            ", ".join(dict.fromkeys(names)) for names in zip(*((cell.task, cell.method) for cell in where), strict=True)
        )
        lines.append(f"- {outcome}, {tasks} under {methods}: {reason}")
    if any(cell.length.outcome == "measured" and not cell.n for cell in comparison.cells):
        lines.append("- no prompt: --limit left none at this length")
    lines += [f"- {run.method}: {numbers}" for run in comparison.runs if (numbers := _name_override(run.override or {}))]
    if lines:
        yield "\n".join(lines)


def _name_override(override: Mapping[str, Any]) -> str:
    """
    >>> _name_override({"method": "yarn", "factor": 2.0, "options": {"beta_fast": 32.0}, "before": {"table": 3}})
    'factor 2, beta_fast 32'
    """
    found = {**override, **override.get("options", {}), "method": None}
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in found.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if isinstance(value, (str, int)))


def _share_n(cells: Sequence[Cell]) -> str:
    """The number of prompts in a row: one number, or where methods that could not run every length got others (`--limit`), each."""
    counts = dict.fromkeys(str(cell.n) for cell in cells if cell.n)
    return "/".join(counts) or "0"


def _name_lengths(lengths: Sequence[Length]) -> str:
    """
    >>> _name_lengths([Length(tokens=512, multiple=2.0)])
    '512 (2x)'
    >>> _name_lengths([Length(tokens=512, multiple=2.0), Length(tokens=1024, multiple=4.0)])
    '2x, 4x'
    """
    if len(lengths) == 1:
        return lengths[0].label
    return ", ".join(f"{length.multiple:.4g}x" if length.multiple else str(length.tokens) for length in lengths)
