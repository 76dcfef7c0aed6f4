"""Show kept runs: `python docs/curve.py FOLDER…` prints their table, `python docs/curve.py FOLDER… FIGURE.svg` draws it.

Exact matches against length, one line a task, with 95 % Wilson intervals and a rule at the trained length.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import altair as alt
import jsonlines

from harness_ext.results.charts import Point, draw_lines, make_point
from harness_ext.results.tables import show_share


def read_points(folders: list[Path]) -> list[Point]:
    """One point for each task and length."""
    hits: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for file in sorted(file for folder in folders for file in folder.glob("*.jsonl")):
        with jsonlines.open(file) as rows:
            for row in rows:
                metric = next(name for name in row["metrics"] if name.startswith("exact@"))
                hits[file.stem.replace("_extrapolate", ""), row["doc"]["length"], row["doc"]["multiple"]].append(row[metric])
    return [
        make_point(int(sum(values)), len(values), length, multiple, task=task)
        for (task, length, multiple), values in sorted(hits.items())
    ]


def draw(points: list[Point]) -> alt.LayerChart:
    """Score against multiple of the trained length, on a log axis."""
    tasks = sorted({point["task"] for point in points})
    chart = draw_lines(points, "task", tasks).properties(width=420, height=240, data=alt.InlineData(values=points))
    return chart.configure(background="white")


def tabulate(points: list[Point]) -> str:
    """The same as Markdown: one row a length, one column a task, each cell a score with its interval and n."""
    tasks = sorted({point["task"] for point in points})
    found = {(point["task"], point["length"]): point for point in points}
    lines = ["| length | of the trained length | " + " | ".join(tasks) + " |", "|---:|---:|" + "---|" * len(tasks)]
    for length, multiple in sorted({(point["length"], point["multiple"]) for point in points}):
        row = [found.get((task, length)) for task in tasks]
        shown = [f"{show_share(round(p['score'] * p['n']), p['n'])}, n = {p['n']}" if p else "not run" for p in row]
        lines.append(f"| {length} | {multiple:g}× | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    figure = next((name for name in sys.argv[1:] if name.endswith((".svg", ".png"))), None)
    kept = read_points([Path(name) for name in sys.argv[1:] if name != figure])
    if figure:
        draw(kept).save(figure)
    else:
        print(tabulate(kept))
