"""Scores against length, as a figure. altair and vl-convert are an extra (`harness_ext[report]`), so they are imported when used."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness_ext.errors import ComparisonError
from harness_ext.results.paired import Comparison
from harness_ext.results.statistics import wilson

if TYPE_CHECKING:
    import altair as alt

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#661100")
"""Okabe & Ito 2008, "Color universal design", with a dark brown for its yellow, which is hard to see on white. Lines differ in
dashes and marks too, so that they are told apart in print and by the colour-blind."""
DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3), (10, 4), (4, 2, 1, 2, 1, 2), (1, 3), (3, 7))
MARKS = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
Point = dict[str, Any]
"""One score: length (tokens), multiple (or None), score, low, high, n, and the names that tell lines and panels apart."""


def make_point(successes: int, n: int, length: int, multiple: float | None, **names: str) -> Point:
    """A point of the figure, with its 95 % Wilson interval."""
    low, high = wilson(successes, n)
    return {"length": length, "multiple": multiple, "score": successes / n, "low": low, "high": high, "n": n, **names}


def list_points(comparison: Comparison) -> list[Point]:
    """One for each task, length and method; none for what was not measured."""
    return [
        make_point(cell.exact, cell.n, cell.length.tokens, cell.length.multiple, method=cell.method, task=cell.task)
        for cell in comparison.cells
        if cell.n
    ]


def save_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """The figure's files, `compare.svg` and `compare.png`.

    Raises ComparisonError where altair or vl-convert is not installed, or where nothing was measured.
    """
    missing = [name for name in ("altair", "vl_convert") if importlib.util.find_spec(name) is None]
    if missing:
        raise ComparisonError(f"{missing[0]} draws the figure and is not installed: pip install 'harness_ext[report]'")
    if not list_points(comparison):
        raise ComparisonError("no length was measured")
    chart = draw_comparison(comparison)
    files = [folder / "compare.svg", folder / "compare.png"]
    for file in files:
        chart.save(file, scale_factor=2 if file.suffix == ".png" else 1)
    return files


def draw_comparison(comparison: Comparison) -> alt.FacetChart:
    """One panel a task, one line a method."""
    import altair as alt

    points = list_points(comparison)
    methods, tasks = ([*dict.fromkeys(point[name] for point in points)] for name in ("method", "task"))
    chart: alt.FacetChart = (
        draw_lines(points, "method", methods)
        .properties(width=300, height=200)
        .facet(facet=alt.Facet("task:N", title=None, sort=tasks), columns=2, data=alt.InlineData(values=points))
        .properties(title=alt.Title(comparison.model, subtitle="shares of exact matches, 95 % Wilson intervals"))
        .configure(background="white")
    )
    return chart


def draw_lines(points: Sequence[Point], name: str, names: Sequence[str]) -> alt.LayerChart:
    """One line for each of `names`, which stand in the field `name`, with its intervals; and a rule at the trained length.

    The points are looked at for the axis alone: the caller brings the data, since panels take them otherwise than one chart.
    """
    import altair as alt

    known = all(point["multiple"] is not None for point in points)
    x = _length_axis(points, "multiple" if known else "length")
    y = alt.Y("score:Q", title="exact matches").scale(domain=[0, 1]).axis(format="%")

    # One legend with colour and mark; its symbols would take the band's faintness and the lines' dashes if not told otherwise.
    legend = alt.Legend(symbolOpacity=1, symbolSize=90, symbolStrokeWidth=0)

    def tell_apart(channel: Any, styles: Sequence[Any]) -> Any:
        chosen = choose_styles(styles, len(names))
        shown = None if channel is alt.StrokeDash else legend  # a mark's outline is too short for dashes
        return channel(f"{name}:N", title=None, legend=shown).scale(domain=list(names), range=chosen)

    base = alt.Chart().encode(x=x, color=tell_apart(alt.Color, COLOURS))
    intervals = base.encode(y=alt.Y("low:Q", title="exact matches"), y2="high:Q")
    layers = [
        intervals.mark_area(opacity=0.12),
        intervals.mark_rule(opacity=0.6),
        base.mark_line().encode(y=y, strokeDash=tell_apart(alt.StrokeDash, DASHES)),
        base.mark_point(filled=True, opacity=1, size=60).encode(y=y, shape=tell_apart(alt.Shape, MARKS)),
    ]
    if known:
        layers.insert(0, alt.Chart().mark_rule(color="#999999", strokeWidth=1.5).encode(x=alt.XDatum(1)))
    return alt.LayerChart(layer=layers)


def choose_styles(styles: Sequence[Any], count: int) -> list[Any]:
    """A style for each of `count` lines. In each round after the first, dashes and marks are other ones beside the same colour.

    >>> lines = list(zip(*(choose_styles(styles, 20) for styles in (COLOURS, DASHES, MARKS))))
    >>> len(set(lines)), lines[0] == (COLOURS[0], DASHES[0], MARKS[0])
    (20, True)
    """
    step = {COLOURS: 0, DASHES: 3, MARKS: 5}[tuple(styles)]
    return [styles[(index + index // len(COLOURS) * step) % len(styles)] for index in range(count)]


def _length_axis(points: Sequence[Point], field: str) -> alt.X:
    import altair as alt

    values = sorted({point[field] for point in points})
    title = "length, as a multiple of the trained length" if field == "multiple" else "length in tokens"
    shown = [*values, 1] if field == "multiple" else values  # with the rule at 1
    ends = [min(shown) / 1.15, max(shown) * 1.15]
    axis = {"values": values, "labelExpr": "format(datum.value, '.3~g') + '×'"} if field == "multiple" else {"values": values}
    return alt.X(f"{field}:Q", title=title).scale(type="log", base=2, domain=ends, nice=False).axis(**axis)
