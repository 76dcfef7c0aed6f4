"""Show kept runs: `python docs/curve.py FOLDER…` prints their table, `python docs/curve.py FOLDER… FIGURE.svg` draws it.

Exact matches against length, one line a task, with 95 % Wilson intervals; past the trained length the ground is shaded.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import altair as alt
import jsonlines
from scipy.stats import binomtest

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
"""Okabe & Ito's, which the colour-blind can tell apart; the marks differ too."""


def read_cells(folders: list[Path]) -> list[dict[str, Any]]:
    """One record for each task and length."""
    hits: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for file in sorted(file for folder in folders for file in folder.glob("*.jsonl")):
        with jsonlines.open(file) as rows:
            for row in rows:
                metric = next(name for name in row["metrics"] if name.startswith("exact@"))
                hits[file.stem.replace("_extrapolate", ""), row["doc"]["length"], row["doc"]["multiple"]].append(row[metric])
    cells = []
    for (task, length, multiple), values in sorted(hits.items()):
        interval = binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
        score = sum(values) / len(values)
        cells.append(
            {
                "task": task,
                "length": length,
                "multiple": multiple,
                "score": score,
                "n": len(values),
                "low": interval.low,
                "high": interval.high,
            }
        )
    return cells


def draw(cells: list[dict[str, Any]]) -> alt.LayerChart:
    """Score against multiple of the trained length, on a log axis."""
    multiples = sorted({cell["multiple"] for cell in cells})
    x = (
        alt.X("multiple:Q", title="length, as a multiple of the trained length")
        .scale(type="log", base=2)
        .axis(values=multiples, labelExpr="datum.value + '×'")
    )
    tasks = sorted({cell["task"] for cell in cells})
    colour = alt.Color("task:N", title=None, legend=alt.Legend(symbolType="circle")).scale(
        domain=tasks, range=COLOURS[: len(tasks)]
    )
    shape = alt.Shape("task:N", title=None, legend=None).scale(domain=tasks)
    base = alt.Chart(alt.Data(values=cells)).encode(x=x, color=colour)
    shade = (
        alt.Chart(alt.Data(values=[{"from": 1, "to": multiples[-1]}]))
        .mark_rect(opacity=0.12, color="gray")
        .encode(x="from:Q", x2="to:Q")
    )
    y = alt.Y("score:Q", title="exact matches").scale(domain=[0, 1]).axis(format="%")
    return (
        alt.layer(
            shade,
            base.mark_rule(opacity=0.7).encode(y="low:Q", y2="high:Q"),
            base.mark_line().encode(y=y),
            base.mark_point(filled=True, opacity=1, size=60).encode(y=y, shape=shape),
        )
        .properties(width=420, height=240)
        .configure(background="white")
    )


def tabulate(cells: list[dict[str, Any]]) -> str:
    """The same as Markdown: one row a length, one column a task, each cell a score with its interval and n."""
    tasks = sorted({cell["task"] for cell in cells})
    found = {(cell["task"], cell["length"]): cell for cell in cells}
    lines = ["| length | of the trained length | " + " | ".join(tasks) + " |", "|---:|---:|" + "---|" * len(tasks)]
    for length, multiple in sorted({(cell["length"], cell["multiple"]) for cell in cells}):
        row = [found.get((task, length)) for task in tasks]
        shown = [f"{c['score']:.2f} [{c['low']:.2f}, {c['high']:.2f}], n = {c['n']}" if c else "not run" for c in row]
        lines.append(f"| {length} | {multiple:g}× | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    figure = next((name for name in sys.argv[1:] if name.endswith((".svg", ".png"))), None)
    records = read_cells([Path(name) for name in sys.argv[1:] if name != figure])
    if figure:
        draw(records).save(figure)
    else:
        print(tabulate(records))
