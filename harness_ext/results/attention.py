"""What the question of a prompt attended to, as a results file says it, and its figures.

A head that attends to the needle at a length that the model knows is what Wu et al. call a retrieval head (arXiv 2404.15574; they count how
often the most attended token is the one to copy, here it is the needle's share of the attention of the token before the answer). The figures
show what becomes of those heads as prompts grow, arm by arm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness_ext.results.charts import COLOURS, DASHES, MARKS, choose_styles
from harness_ext.results.figures import MUTED, PLACES, SERIES, Spec
from harness_ext.results.why import TITLES

Row = dict[str, Any]
Head = tuple[int, int]
"""Index of its layer among those that attend, and its own."""
SPANS: Mapping[str, str] = {"needle": COLOURS[1], "sinks": COLOURS[0], "question": COLOURS[4], "rest": "#c9cdd2"}
"""Span → its colour, from below."""
FEW = 16
"""Heads that are all shown; of more, the SHOWN that attend most to the needle."""
SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Means over the prompts of one arm and length."""

    arm: str
    length: int
    """Tokens."""
    multiple: float
    """Of the trained length."""
    prompts: int
    tokens: Mapping[str, float]
    """Span → how many."""
    shares: Mapping[str, tuple[tuple[float, ...], ...]]
    """Span → layer by layer, of each head, its share of the attention; 0 to 1. `entropy`: in nats, of the whole row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """What a task's questions attended to in one run."""

    task: str
    layers: tuple[int, ...]
    """Numbers in the model of those that attend."""
    cells: tuple[Cell, ...]

    def name(self, head: Head) -> str:
        """As figures call a head."""
        return f"layer {self.layers[head[0]]}, head {head[1]}"


def read_attention(results: Mapping[str, Any]) -> list[Attention]:
    """By task, what lm_eval's results hold of it; nothing where it was not looked at, or not seen."""
    said = results["config"].get("attention") or {}
    found = []
    for task in dict.fromkeys(cell["task"] for cell in said.get("cells", ())):
        trained = results["configs"][task]["trained_length"]
        if trained:
            own = (cell for cell in said["cells"] if cell["task"] == task and cell["prompts"])
            cells = tuple(sorted((_read_cell(cell, trained["tokens"]) for cell in own), key=lambda cell: cell.length))
            found.append(Attention(task=task, layers=tuple(said["layers"]), cells=cells))
    return found


def _read_cell(said: Mapping[str, Any], trained: int) -> Cell:
    return Cell(
        arm=said["arm"],
        length=said["length"],
        multiple=said["length"] / trained,
        prompts=said["prompts"],
        tokens=said["tokens"],
        shares={name: tuple(tuple(map(float, heads.split())) for heads in said[name]) for name in (*SPANS, "entropy")},
    )


def choose_heads(attention: Attention) -> list[Head]:
    """All heads where they are few; else those that attend most to the needle at home, the most first.

    Home is the longest plain prompt within the trained length, or the stretched one where no plain one was run.
    """
    within = [cell for arm in ("stretched", "long") for cell in attention.cells if cell.arm == arm and cell.multiple <= 1]
    if not within:
        return []
    needle = within[-1].shares["needle"]
    heads = [(layer, head) for layer, shares in enumerate(needle) for head in range(len(shares))]
    return heads if len(heads) <= FEW else sorted(heads, key=lambda head: -needle[head[0]][head[1]])[:SHOWN]


def list_shares(attention: Attention, heads: Iterable[Head], arms: Sequence[str], spans: Sequence[str]) -> Iterator[Row]:
    """A row each arm, length, head and span."""
    for layer, head in heads:
        for cell in attention.cells:
            for span in spans if cell.arm in arms else ():
                yield {
                    "panel": attention.name((layer, head)),
                    "layer": attention.layers[layer],
                    "head": head,
                    "arm": cell.arm,
                    "series": TITLES[cell.arm],  # type: ignore[index]
                    "length": cell.length,
                    "multiple": cell.multiple,
                    "span": span,
                    "order": [*SPANS].index(span),
                    "share": cell.shares[span][layer][head],
                    "tokens": cell.tokens[span],
                    "n": cell.prompts,
                }


def draw_attention(attention: Attention) -> Iterator[tuple[str, Spec, str, list[Row]]]:
    """(end of its file's name, specification, title, data `points`) of each figure."""
    heads = choose_heads(attention)
    plain = "long" if any(cell.arm == "long" for cell in attention.cells) else "stretched"
    if len({cell.multiple for cell in attention.cells if cell.arm == plain}) < 2 or not heads:
        return
    every = [(layer, head) for layer, shares in enumerate(attention.cells[0].shares["needle"]) for head in range(len(shares))]
    whole = len(heads) == len(every)
    which = "each head" if whole else f"the {len(heads)} heads that attend most to the needle within the trained length"
    names = [attention.name(head) for head in heads]
    columns = max(head for _, head in every) + 1 if whole else 4
    rows = list(list_shares(attention, heads, [plain], [*SPANS]))
    yield "", draw_spans(names, columns), f"where the question's attention goes: {which}; {TITLES[plain]}", rows  # type: ignore[index]
    arms = [arm for arm in TITLES if any(cell.arm == arm for cell in attention.cells)]
    if len(arms) > 1:
        rows = list(list_shares(attention, heads, arms, ["needle"]))
        yield "-arms", draw_arms(names, columns), f"the needle's share of the question's attention: {which}", rows
    if not whole:
        rows = list(list_shares(attention, every, [plain], ["needle"]))
        sizes = len(attention.layers), max(head for _, head in every) + 1
        yield "-map", draw_map(*sizes), f"the needle's share of the question's attention; {TITLES[plain]}", rows  # type: ignore[index]


def draw_spans(panels: Sequence[str], columns: int) -> Spec:
    """Shares of the data `points` against the multiple, one on the other, a panel a head."""
    import altair as alt

    legend = alt.Legend(orient="bottom", columns=4, labelExpr="datum.label == 'sinks' ? 'first tokens (sinks)' : datum.label")
    colour = alt.Color("span:N", title=None, legend=legend).scale(domain=[*SPANS], range=[*SPANS.values()])
    y = alt.Y("share:Q", title="share of attention", stack="zero").scale(domain=[0, 1], clamp=True)
    areas = alt.Chart().mark_area(line={"color": "white", "strokeWidth": 0.8}, opacity=0.92, clip=True)
    shown = areas.encode(x=_multiples(), y=_quiet(y), color=colour, order="order:Q", tooltip=_tooltip())
    rule = alt.Chart().mark_rule(stroke="#1b1e23", strokeWidth=1, strokeDash=[3, 2]).encode(x=alt.XDatum(1))
    return _in_panels(alt.layer(shown, rule), panels, columns)


def draw_arms(panels: Sequence[str], columns: int) -> Spec:
    """Shares of the data `points` against the multiple, a line an arm, the plain prompt's bold, a panel a head."""
    import altair as alt

    names = list(TITLES.values())
    legend = alt.Legend(orient="bottom", columns=1, symbolOpacity=1, symbolSize=70, symbolStrokeWidth=0, values=SERIES)
    colour = alt.Color("series:N", title=None, legend=legend).scale(domain=names)
    mark = alt.Shape("series:N", title=None, legend=legend).scale(domain=names, range=choose_styles(MARKS, len(names)))
    dash = alt.StrokeDash("series:N", title=None, legend=None).scale(domain=names, range=choose_styles(DASHES, len(names)))
    y = _quiet(alt.Y("share:Q", title="share on the needle").scale(domain=[0, 1], clamp=True))
    base = alt.Chart().encode(x=_multiples(), y=y, color=colour)
    bold = alt.condition("datum.arm == 'long'", alt.value(3), alt.value(1.5))
    lines = base.mark_line().encode(strokeDash=dash, strokeWidth=bold)
    points = base.mark_point(filled=True, opacity=1, size=32).encode(shape=mark, tooltip=_tooltip())
    rule = alt.Chart().mark_rule(stroke=MUTED, strokeWidth=1).encode(x=alt.XDatum(1))
    return _in_panels(alt.layer(rule, lines, points), panels, columns)


def draw_map(layers: int, heads: int) -> Spec:
    """Shares of the data `points` as colours, layer against head, a panel a multiple."""
    import altair as alt

    step = max(3, min(18, 160 // heads, 320 // layers))
    x = alt.X("head:O", title="head").axis(labelAngle=0, ticks=False, domain=False, labelOverlap="greedy")
    y = alt.Y("layer:O", title="layer").axis(ticks=False, domain=False, labelOverlap="greedy")
    legend = alt.Legend(title="on the needle", format="%", orient="bottom", gradientLength=140, gradientThickness=8, tickCount=3)
    colour = alt.Color("share:Q").scale(scheme="viridis", domainMin=0).legend(legend)
    cells = alt.Chart().mark_rect().encode(x=x, y=y, color=colour, tooltip=_tooltip())
    sized = cells.properties(width=step * heads, height=step * layers)
    label = "format(datum.value, '.3~g') + '×'"
    header = alt.Header(labelExpr=label, labelFontSize=11)
    return _strip(sized.facet(column=alt.Facet("multiple:O", title=None, header=header), data=alt.NamedData("points")))


def _multiples() -> Any:
    import altair as alt

    x = alt.X("multiple:Q", title="× trained length").scale(type="log", base=2, nice=False)
    return x.axis(
        labelExpr="format(datum.value, '.3~g') + '×'",
        values=PLACES,
        grid=False,
        labelOverlap="greedy",
        labelFlush=False,
        labelFontSize=9,
    )


def _quiet(y: Any) -> Any:
    return y.axis(format="%", tickCount=3, domain=False, ticks=False)


def _tooltip() -> list[Any]:
    import altair as alt

    return [
        alt.Tooltip("panel:N", title="head"),
        alt.Tooltip("series:N", title="arm"),
        alt.Tooltip("multiple:Q", format=".3~g"),
        alt.Tooltip("span:N", title="on"),
        alt.Tooltip("share:Q", format=".1%"),
        alt.Tooltip("tokens:Q", title="tokens", format=".0f"),
        alt.Tooltip("n:Q", title="prompts"),
    ]


def _in_panels(chart: Any, panels: Sequence[str], columns: int) -> Spec:
    import altair as alt

    header = alt.Header(labelFontSize=11, labelPadding=4)
    sized = chart.properties(width=170, height=90)
    facet = alt.Facet("panel:N", title=None, sort=list(panels), header=header)
    return _strip(sized.facet(facet=facet, columns=columns, data=alt.NamedData("points"), spacing={"row": 18, "column": 34}))


def _strip(chart: Any) -> Spec:
    spec: Spec = chart.to_dict(validate=True)
    return {name: value for name, value in spec.items() if name not in ("config", "datasets")}
