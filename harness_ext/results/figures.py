"""The charts of the page and of the report, written once: Vega-Lite specifications that name their data and do not hold it.

The page hands them its data in the browser, the report hands it in here; colours, dashes and marks are those of `charts`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from harness_ext.results.charts import COLOURS, DASHES, MARKS, choose_styles
from harness_ext.results.why import TITLES

Spec = dict[str, Any]
Row = Mapping[str, Any]
LINES = 24
"""Styles that are handed out before they come round again: lines of one colour differ in dashes and marks."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
BELOW = {"bottom": {"direction": "vertical", "anchor": "start", "margin": 8}}
"""Legends one under another, so that a telephone has room for them."""
CROSS = "M-.7,-.7L.7,.7M.7,-.7L-.7,.7"
"""The mark of what could not be run."""
SLASH = "M-.5,.5L.5,-.5"
"""The same in a heat map, where it fills its cell."""
INTERVAL = {
    "exact": "isValid(datum.low) ? format(datum.low, '.1%') + ' to ' + format(datum.high, '.1%') : 'none'",
    "loss": "isValid(datum.low) ? format(datum.low, '.3f') + ' to ' + format(datum.high, '.3f') : 'none'",
}
"""Metric → a 95 % interval in words, as Vega computes it."""
CONTROLS: dict[str, str] = {
    "no_haystack": "no haystack",
    "needle_absent": "needle absent",
    "cropped": "cropped",
    "short": "short, same override",
}
"""Control → as the figure calls it."""
ROW = 17
"""Pixels of a heat map's row."""
DARK_COLOURS = ("#4FA3DE", "#F0803C", "#2FBF93", "#E29BC3", "#F0B93A", "#8CCDF5", "#F2F2F2", "#F0E442")
"""`COLOURS`, lightened for a dark page: Okabe and Ito's black turned white, and their own yellow where a light page has brown."""


def _theme(ink: str, muted: str, grid: str, past: str, colours: Sequence[str]) -> Spec:
    text = {"labelColor": muted, "titleColor": ink, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": 500}
    return {
        "params": [{"name": "muted", "value": muted}, {"name": "past", "value": past}],
        "config": {
            "background": None,
            "font": FONT,
            "view": {"stroke": None},
            "axis": {**text, "gridColor": grid, "domainColor": muted, "tickColor": muted, "titlePadding": 8, "tickSize": 4},
            "legend": {**text, "labelColor": ink, "labelLimit": 280, "rowPadding": 3, "columnPadding": 16, "layout": BELOW},
            "title": {"color": ink, "subtitleColor": muted, "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 14},
            "range": {"category": list(colours)},
        },
    }


THEMES: Mapping[str, Spec] = {
    "light": _theme("#1b1e23", "#5b626c", "#e7e9ec", "#f3f4f6", COLOURS),
    "dark": _theme("#e9ebee", "#9ba3ad", "#2c3138", "#20242a", DARK_COLOURS),
}
MUTED, PAST, SERIES, PLACES = {"expr": "muted"}, {"expr": "past"}, {"expr": "series"}, {"expr": "places"}
"""What `fill` gives a value to: two colours of the theme, the names of the lines in their order, and where the axis has labels."""


@functools.cache
def make_specs() -> dict[str, Spec]:
    """Name → specification: scores, losses, and scores with their controls, each against the multiple or the length; and by depth."""
    fields = ("multiple", "length")
    specs = {f"{metric}-{field}": draw_curve(metric, field) for metric in ("exact", "loss") for field in fields}
    specs |= {f"controls-{field}": draw_curve("exact", field, controls=True) for field in fields}
    return {**specs, "heat": draw_heat(), "profile": draw_profile(), "arms-multiple": draw_arms()}


def fill(
    spec: Spec, theme: str = "light", width: int | None = None, title: str = "", series: Sequence[str] = (), **data: Sequence[Row]
) -> Spec:
    """The specification with its data, as page.js does it in the browser; `width` in pixels, or as wide as what it stands in.

    `series` are the names of the lines, where another figure has lines that this one may lack: they keep their colours.
    """
    points = data.get("points", ())
    multiples: list[Any] = [row.get("multiple") for row in points]
    places = {1, *multiples} if None not in multiples else {row.get("length", 0) for row in points}
    named = {"series": [*(series or dict.fromkeys(row["series"] for row in points))], "places": sorted(places)}
    params = [*THEMES[theme]["params"], *({"name": name, "value": value} for name, value in named.items())]
    filled = {**spec, **THEMES[theme], "params": params, "datasets": data}
    filled |= {"width": width} if width else {}
    filled |= {"height": ROW * len({row["depth"] for row in data["cells"]})} if "cells" in data else {}
    return filled | ({"title": title} if title else {})


def draw_curve(metric: str, field: str, controls: bool = False) -> Spec:
    """A line a run in the data `points`, its intervals as bands, and if asked the data `controls` beside it.

    The trained length is a line and everything past it is shaded; a length that could not be run is a cross above the plot.
    """
    import altair as alt

    colour, mark, dash = _tell_apart()
    multiples = field == "multiple"
    title = {
        ("exact", True): "length, as a multiple of the trained length",
        ("exact", False): "length in tokens",
        ("loss", True): "position, as a multiple of the trained length",
        ("loss", False): "position in tokens",
    }[metric, multiples]
    label = "format(datum.value, '.3~g') + '×'" if multiples else "format(datum.value, ',d')"
    x = (
        alt.X(f"{field}:Q", title=title)
        .scale(type="log", base=2, nice=False, padding=14)
        .axis(labelExpr=label, values=PLACES, grid=False)
    )
    said = "exact matches" if metric == "exact" else "loss, nats a token"
    y_scale: Spec = {"domain": [0, 1]} if metric == "exact" else {"zero": False, "nice": True}
    y_axis: Spec = {"format": "%", "tickCount": 5} if metric == "exact" else {"format": ".1f", "tickCount": 5}
    y = alt.Y("score:Q", title=said).scale(**y_scale).axis(**y_axis, domain=False, ticks=False)
    tooltip = [
        alt.Tooltip("series:N", title="run"),
        alt.Tooltip("length:Q", title="tokens", format=",d"),
        alt.Tooltip("multiple:Q", title="multiple", format=".3~g"),
        alt.Tooltip("score:Q", title=said, format=".1%" if metric == "exact" else ".3f"),
        alt.Tooltip("interval:N", title="95 %"),
        alt.Tooltip("n:Q", title="prompts", format=",d"),
        alt.Tooltip("outcome:N", title="outcome"),
    ]
    points = alt.Chart(alt.NamedData("points")).transform_calculate(interval=INTERVAL[metric])
    measured = points.transform_filter("isValid(datum.score)")
    missing = points.transform_filter("!isValid(datum.score)")
    one = alt.SequenceGenerator(alt.SequenceParams(start=0, stop=1))
    layers: list[Any] = []
    if multiples:
        layers += [
            alt.Chart(one).mark_rect(fill=PAST, opacity=1).encode(x=alt.XDatum(1), x2=alt.value("width")),
            alt.Chart(one).mark_rule(stroke=MUTED, strokeWidth=1.2).encode(x=alt.XDatum(1)),
        ]
    layers += [
        measured.mark_area(opacity=0.15).encode(x=x, color=colour, y=alt.Y("low:Q").title(said), y2="high:Q"),
        measured.mark_rule(opacity=0.55).encode(x=x, color=colour, y=alt.Y("low:Q").title(said), y2="high:Q"),
        points.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour, strokeDash=dash),
        measured.mark_point(filled=True, opacity=1, size=55).encode(x=x, y=y, color=colour, shape=mark, tooltip=tooltip),
        missing.mark_point(shape=CROSS, filled=False, size=40, strokeWidth=1.8).encode(
            x=x, y=alt.value(-9), color=colour, tooltip=tooltip
        ),
        missing.transform_aggregate(n="count()")
        .transform_filter("datum.n > 0")
        .mark_text(fill=MUTED, fontSize=10.5, align="right", baseline="bottom")
        .encode(x=alt.value("width"), y=alt.value(-17), text=alt.value("× could not be run")),
    ]
    layered = alt.layer(*layers)
    if controls:
        layered = alt.layer(layered, _draw_controls(x, y)).resolve_scale(strokeDash="independent")
    return _finish(layered, 240)


def _draw_controls(x: Any, y: Any) -> Any:
    """Grey lines in the data `controls`: one a control, a level across the plot where it has no length."""
    import altair as alt

    named = list(CONTROLS.values())
    legend = alt.Legend(title="controls", orient="bottom", columns=2, symbolType="stroke", symbolSize=300, symbolStrokeColor=MUTED)
    dash = alt.StrokeDash("control:N").legend(legend).scale(domain=named, range=[[1, 0], [1, 3], [5, 3], [8, 3, 2, 3]])
    tooltip = [
        alt.Tooltip("control:N"),
        alt.Tooltip("length:Q", title="tokens", format=",d"),
        alt.Tooltip("score:Q", title="exact matches", format=".1%"),
        alt.Tooltip("interval:N", title="95 %"),
    ]
    controls = alt.Chart(alt.NamedData("controls")).transform_calculate(interval=INTERVAL["exact"])
    beside = controls.transform_filter("isValid(datum.length)")
    grey = alt.value(MUTED)
    return alt.layer(
        beside.mark_line(strokeWidth=1.3).encode(x=x, y=y, strokeDash=dash, color=grey),
        beside.mark_point(size=28, strokeWidth=1.2).encode(x=x, y=y, color=grey, tooltip=tooltip),
        controls.transform_filter("!isValid(datum.length)").mark_rule(strokeWidth=1.3).encode(y=y, color=grey, tooltip=tooltip),
    )


def draw_arms() -> Spec:
    """A line an arm in the data `points`, the plain prompt's bold; what was predicted as hollow marks, and no line.

    Arms stand a little beside each other, so that those with equal scores are all seen; the plain prompt stands where it is.
    """
    import altair as alt

    names = list(TITLES.values())
    legend = alt.Legend(orient="bottom", columns=1, symbolOpacity=1, symbolSize=70, symbolStrokeWidth=0, values=SERIES)
    colour = alt.Color("series:N", title=None, legend=legend).scale(domain=names)
    mark = alt.Shape("series:N", title=None, legend=legend).scale(domain=names, range=choose_styles(MARKS, len(names)))
    dash = alt.StrokeDash("series:N", title=None, legend=legend).scale(domain=names, range=choose_styles(DASHES, len(names)))
    x = (
        alt.X("place:Q", title="length, as a multiple of the trained length")
        .scale(type="log", base=2, nice=False, padding=14)
        .axis(labelExpr="format(datum.value, '.3~g') + '×'", values=PLACES, grid=False)
    )
    y = alt.Y("score:Q", title="exact matches").scale(domain=[0, 1]).axis(format="%", tickCount=5, domain=False, ticks=False)
    ends = {"y": alt.Y("low:Q").title("exact matches"), "y2": "high:Q"}
    tooltip = [
        alt.Tooltip("series:N", title="arm"),
        alt.Tooltip("length:Q", title="tokens", format=",d"),
        alt.Tooltip("multiple:Q", title="multiple", format=".3~g"),
        alt.Tooltip("score:Q", title="exact matches", format=".1%"),
        alt.Tooltip("interval:N", title="95 %"),
        alt.Tooltip("n:Q", title="prompts", format=",d"),
        alt.Tooltip("outcome:N", title="outcome"),
    ]
    points = alt.Chart(alt.NamedData("points")).transform_calculate(
        interval=INTERVAL["exact"], place="datum.multiple * pow(2, datum.order * 0.025)"
    )
    scored = points.transform_filter("isValid(datum.score)")
    measured = scored.transform_filter("datum.outcome == 'measured'")
    long, others = (measured.transform_filter(f"datum.arm {sign} 'long'") for sign in ("==", "!="))
    predicted = scored.transform_filter("datum.outcome == 'predicted'")
    one = alt.SequenceGenerator(alt.SequenceParams(start=0, stop=1))
    note = alt.value("◇ predicted, not measured")
    layers: list[Any] = [
        alt.Chart(one).mark_rect(fill=PAST, opacity=1).encode(x=alt.XDatum(1), x2=alt.value("width")),
        alt.Chart(one).mark_rule(stroke=MUTED, strokeWidth=1.2).encode(x=alt.XDatum(1)),
        long.mark_area(opacity=0.18).encode(x=x, color=colour, **ends),
        others.mark_rule(opacity=0.4).encode(x=x, color=colour, **ends),
        others.mark_line(strokeWidth=1.6).encode(x=x, y=y, color=colour, strokeDash=dash),
        others.mark_point(filled=True, opacity=1, size=45).encode(x=x, y=y, color=colour, shape=mark, tooltip=tooltip),
        long.mark_line(strokeWidth=4).encode(x=x, y=y, color=colour, strokeDash=dash),
        long.mark_point(filled=True, opacity=1, size=90).encode(x=x, y=y, color=colour, shape=mark, tooltip=tooltip),
        predicted.mark_rule(stroke=MUTED, strokeDash=[2, 2]).encode(x=x, **ends),
        predicted.mark_point(shape="diamond", stroke=MUTED, strokeWidth=1.6, size=70, filled=False).encode(
            x=x, y=y, tooltip=tooltip
        ),
        predicted.transform_aggregate(n="count()")
        .transform_filter("datum.n > 0")
        .mark_text(fill=MUTED, fontSize=10.5, align="right", baseline="bottom")
        .encode(x=alt.value("width"), y=alt.value(-5), text=note),
    ]
    return _finish(alt.layer(*layers), 280)


def draw_profile() -> Spec:
    """Score against depth in the data `points`, a line a run, its intervals as bands."""
    import altair as alt

    colour, mark, dash = _tell_apart()
    x = alt.X("depth:Q", title="depth of the needle").scale(domain=[0, 1]).axis(format="%", tickCount=5, grid=False)
    y = alt.Y("score:Q", title="exact matches").scale(domain=[0, 1]).axis(format="%", tickCount=5, domain=False, ticks=False)
    tooltip = [
        alt.Tooltip("series:N", title="run"),
        alt.Tooltip("depth:Q", format=".0%"),
        alt.Tooltip("score:Q", title="exact matches", format=".1%"),
        alt.Tooltip("interval:N", title="95 %"),
        alt.Tooltip("n:Q", title="prompts", format=",d"),
    ]
    points = alt.Chart(alt.NamedData("points")).transform_calculate(interval=INTERVAL["exact"]).encode(x=x, color=colour)
    return _finish(
        alt.layer(
            points.mark_area(opacity=0.15).encode(y=alt.Y("low:Q").title("exact matches"), y2="high:Q"),
            points.mark_line(strokeWidth=2).encode(y=y, strokeDash=dash),
            points.mark_point(filled=True, opacity=1, size=40).encode(y=y, shape=mark, tooltip=tooltip),
        ),
        180,
    )


def _tell_apart() -> tuple[Any, Any, Any]:
    """Colour, mark and dashes of each run in `series`, under one legend."""
    import altair as alt

    legend = alt.Legend(orient="bottom", columns=1, symbolOpacity=1, symbolSize=70, symbolStrokeWidth=0)
    return (
        alt.Color("series:N", title=None, legend=legend).scale(domain=SERIES),
        alt.Shape("series:N", title=None, legend=legend).scale(domain=SERIES, range=choose_styles(MARKS, LINES)),
        alt.StrokeDash("series:N", title=None, legend=legend).scale(domain=SERIES, range=choose_styles(DASHES, LINES)),
    )


def draw_heat() -> Spec:
    """Depth against length in the data `cells`, one run: its shares as colours and numbers; a slash where it could not be run."""
    import altair as alt

    by_length = alt.EncodingSortField("length", op="min")
    x = alt.X("where:N", title=None, sort=by_length).axis(labelAngle=0, orient="top", domain=False, ticks=False)
    y = alt.Y("depth:O", title="depth of the needle").axis(format=".0%", domain=False, ticks=False)
    tooltip = [
        alt.Tooltip("length:Q", title="tokens", format=",d"),
        alt.Tooltip("multiple:Q", title="multiple", format=".3~g"),
        alt.Tooltip("depth:Q", format=".0%"),
        alt.Tooltip("score:Q", title="exact matches", format=".1%"),
        alt.Tooltip("interval:N", title="95 %"),
        alt.Tooltip("n:Q", title="prompts", format=",d"),
        alt.Tooltip("outcome:N"),
    ]
    legend = alt.Legend(title="exact matches", format="%", orient="bottom", gradientLength=140, gradientThickness=8, tickCount=3)
    shown = alt.Color("score:Q").scale(scheme="viridis", domain=[0, 1]).legend(legend)
    cells = (
        alt.Chart(alt.NamedData("cells"))
        .transform_calculate(
            where="isValid(datum.multiple) ? format(datum.multiple, '.3~g') + '×' : format(datum.length, ',d')",
            percent="format(100 * datum.score, '.0f')",
            interval=INTERVAL["exact"],
        )
        .encode(x=x, y=y)
    )
    measured = cells.transform_filter("isValid(datum.score)")
    missing = cells.transform_filter("!isValid(datum.score)")
    dark_ink = alt.condition("datum.score > 0.6", alt.value("#111111"), alt.value("#ffffff"))
    return _finish(
        alt.layer(
            measured.mark_rect().encode(color=shown, tooltip=tooltip),
            measured.mark_text(fontSize=9.5).encode(text=alt.Text("percent:N"), color=dark_ink),
            missing.mark_rect(fill=PAST).encode(tooltip=tooltip),
            missing.mark_point(shape=SLASH, stroke=MUTED, strokeWidth=1.2, size=200),
        ),
        ROW,
    )


def _finish(chart: Any, height: int) -> Spec:
    import altair as alt

    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    spec: Spec = chart.properties(height=height, width="container", autosize=fit).to_dict(validate=True)
    return {name: value for name, value in spec.items() if name not in ("config", "datasets")}
