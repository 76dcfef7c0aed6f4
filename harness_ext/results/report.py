"""Runs → a report: the page with its data inside as one file, and each of its figures as PNG and SVG."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from harness_ext.errors import ReportError
from harness_ext.results import figures, leaderboard
from harness_ext.results.attention import Attention, draw_attention
from harness_ext.results.leaderboard import (
    SITE,
    Board,
    Row,
    list_cells,
    list_controls,
    list_depths,
    list_points,
    name_runs,
    to_script,
)
from harness_ext.results.records import PublishedRun, Task
from harness_ext.results.why import TITLES, list_arms

WIDTHS = {"curve": 560, "depths": 420, "profile": 420, "arms": 620}
"""Kind of figure → pixels of its plot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A run to be shown."""

    published: PublishedRun
    """Its records."""
    source: str
    """Where they were read."""
    attention: Sequence[Attention] = ()
    """What questions attended to, by task: lm_eval's results say it, records do not."""


def write_report(runs: Sequence[Shown], folder: Path) -> list[Path]:
    """Writes `report.html` and the figures, and returns their files.

    Raises ReportError where charts cannot be made or files not written.
    """
    import vl_convert

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, spec in itertools.chain(draw_figures(runs), draw_attentions(runs)):
            svg, png = folder / f"{name}.svg", folder / f"{name}.png"
            svg.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
            png.write_bytes(vl_convert.vegalite_to_png(spec, scale=2))
            written += [svg, png]
        page = folder / "report.html"
        page.write_text(make_page(runs), encoding="utf-8", newline="\n")
    except OSError as error:
        raise ReportError(f"{folder} cannot be written: {error.strerror or error}; name another with --out") from None
    return [page, *written]


def draw_figures(runs: Sequence[Shown]) -> Iterator[tuple[str, figures.Spec]]:
    """File name and specification of each figure: a curve a task and its depth profile, all runs in each, and a heat map a run."""
    specs = figures.make_specs()
    named = [*zip((shown.published for shown in runs), name_runs([shown.published.run for shown in runs]), strict=True)]
    for name in dict.fromkeys(task.evaluation_name for run, _ in named for task in run.run.tasks):
        having = [(run, label, task) for run, label in named for task in run.run.tasks if task.evaluation_name == name]
        for number, (_, label, task) in enumerate(having, 1):
            if arms := list_arms(task.curve):
                file = f"{_safe(name)}-why" + (f"-{number}" if len(having) > 1 else "")
                series = dict.fromkeys(row["series"] for row in arms if row["score"] is not None and row["arm"] != "predicted")
                yield file, _paint(specs["arms-multiple"], WIDTHS["arms"], f"{name}: {label}", [*series], points=arms)
        points: list[Row] = [{**point, "series": label} for _, label, task in having for point in list_points(task)]
        if not points:  # arms alone
            continue
        field = "multiple" if all(point["multiple"] is not None for point in points) else "length"
        controls = list_controls(having[0][2]) if len(having) == 1 else []
        data = {"points": points, "controls": controls} if controls else {"points": points}
        kind = "controls" if controls else having[0][2].metric
        yield _safe(name), _paint(specs[f"{kind}-{field}"], WIDTHS["curve"], name, [label for _, label, _ in having], **data)
        cells = {label: [cell for cell in run.cells if cell.evaluation_name == name] for run, label, _ in having}
        profile: list[Row] = [{**row, "series": label} for label, own in cells.items() for row in list_depths(own)]
        pasts = {tuple(_list_past(task)) for _, _, task in having} - {()}
        if profile and len(pasts) == 1:  # over other lengths it would be another score
            filled = _paint(specs["profile"], WIDTHS["profile"], f"{name}, all lengths past 1×", [*cells], points=profile)
            yield f"{_safe(name)}-profile", filled
        for number, (label, own) in enumerate(cells.items(), 1):
            if rows := list_cells(own):
                file = f"{_safe(name)}-depths" + (f"-{number}" if len(having) > 1 else "")
                yield file, _paint(specs["heat"], WIDTHS["depths"], f"{name}: {label}", (), cells=rows)


def draw_attentions(runs: Sequence[Shown]) -> Iterator[tuple[str, figures.Spec]]:
    """As `draw_figures`, of what questions attended to: some figures a run and task."""
    labels = name_runs([shown.published.run for shown in runs])
    having = [(shown, label) for shown, label in zip(runs, labels, strict=True) if shown.attention]
    for number, (shown, label) in enumerate(having, 1):
        for attention in shown.attention:
            for end, spec, title, rows in draw_attention(attention):
                file = f"{_safe(attention.task)}-attention{end}" + (f"-{number}" if len(having) > 1 else "")
                series = [named for named in TITLES.values() if any(row["series"] == named for row in rows)]
                painted = _paint(spec, 0, "", series, points=rows)
                yield file, {**painted, "title": {"text": f"{attention.task}: {label}", "subtitle": title}}


def _list_past(task: Task) -> Iterator[float]:
    """The multiples past the trained length at which a task has a score: what its depth profile is over."""
    return (point.multiple for point in task.curve.points if point.score_details and point.multiple and point.multiple > 1)


def make_page(runs: Sequence[Shown]) -> str:
    """The page as one file, which needs no other and may load none."""
    board = Board()
    scripts = []
    for shown in runs:
        if key := board.add(shown.published.run):
            detail = msgspec.json.encode(leaderboard.detail_run(shown.published))
            scripts.append(to_script(f"run-{key}", detail, records=shown.source))
    found = leaderboard.list_scripts(board)
    found["index"]["report"] = True
    found["charts"] = leaderboard.describe_charts()
    scripts += [to_script(key, msgspec.json.encode(value)) for key, value in found.items()]
    own = [(SITE / "page.js").read_text("utf-8"), _keep_inside(leaderboard.bundle_vega()), "".join(scripts)]
    style, page = (SITE / "page.css").read_text("utf-8"), (SITE / "page.html").read_text("utf-8")
    sources = " ".join(_hash(script) for script in own)
    for old, new in (
        ("script-src 'self' file:", f"script-src {sources}"),
        ("style-src 'self' file:", f"style-src {_hash(style)}"),
        ('<link rel="stylesheet" href="page.css">', f"<style>{style}</style>"),
        ('<script src="page.js" defer></script>', "".join(f"<script>{script}</script>" for script in own)),
    ):
        if page.count(old) != 1:
            raise AssertionError(f"page.html holds {old!r} {page.count(old)} times")
        page = page.replace(old, new)
    return page


def _paint(spec: figures.Spec, width: int, title: str, series: Sequence[str], **data: Sequence[Row]) -> figures.Spec:
    """A figure that stands alone, on white."""
    painted = figures.fill(spec, "light", width, title, series, **data)
    return {**painted, "background": "white", "padding": 12}


def _keep_inside(script: str) -> str:
    """The script without what would end it inside a page; in its strings the same is meant."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(text: str) -> str:
    """As a content security policy names what it lets run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _safe(name: str) -> str:
    """A task's name as a file's.

    >>> _safe("../passkey extrapolate")
    'passkey-extrapolate'
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:100] or "task"
