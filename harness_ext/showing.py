"""The commands that show runs: as a site, and as a report."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harness_ext.errors import PublishError, RecordError, ReportError

if TYPE_CHECKING:
    from harness_ext.results.report import Shown

SHOWN = 20
"""Problems that are printed; the rest are counted."""


def leaderboard_arguments(command: argparse.ArgumentParser) -> None:
    """What `leaderboard` takes."""
    command.add_argument("results", type=Path, metavar="FOLDER", help="of records, as publish --results wrote them")
    command.add_argument("--out", type=Path, required=True, metavar="SITE", help="folder to write the site to; open its index.html")


def leaderboard(options: argparse.Namespace) -> int:
    """Make a static site of published records, which opens from disk as well."""
    from harness_ext.results.leaderboard import build_site

    site = build_site(options.results, options.out, processes=min(2, os.cpu_count() or 1))
    for problem in site.problems[:SHOWN]:
        print(problem, file=sys.stderr)
    if site.problems:
        print(f"{len(site.problems)} problems, not shown on the site; see harness-ext validate {options.results}", file=sys.stderr)
    print(f"{options.out / 'index.html'}: {site.rows} rows of {site.runs} runs")
    return 0


def report_arguments(command: argparse.ArgumentParser) -> None:
    """What `report` takes."""
    command.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="OUT",
        help="folders that lm_eval's --output_path named, with --log_samples; or published records, a file or their folder",
    )
    command.add_argument("--out", type=Path, metavar="FOLDER", help="write the report there; default: report, in the first folder")


def report(options: argparse.Namespace) -> int:
    """Show runs: curves, heat maps and numbers, here, as PNG and SVG and as one HTML file."""
    from harness_ext.results.leaderboard import require_charts
    from harness_ext.results.report import write_report
    from harness_ext.results.terminal import Screen, show_runs

    runs = [shown for place in options.runs for shown in read_runs(place)]
    terminal, encoding = sys.stdout.isatty(), (sys.stdout.encoding or "").lower()
    screen = Screen(
        width=shutil.get_terminal_size((100, 24)).columns,
        colour=terminal and "NO_COLOR" not in os.environ,
        blocks=encoding.startswith("utf"),
    )
    print(show_runs([shown.published for shown in runs], screen))
    try:
        require_charts()
    except ReportError as error:
        print(error, file=sys.stderr)
        return 0
    first = options.runs[0] if options.runs[0].is_dir() else options.runs[0].parent
    for file in write_report(runs, options.out or first / "report"):
        print(file)
    return 0


def read_runs(place: Path) -> Iterator[Shown]:
    """The runs of lm_eval, or the published ones, below a folder or in a file. Raises HarnessExtError where there is none."""
    from harness_ext.publishing import prepare_run
    from harness_ext.results.attention import read_attention
    from harness_ext.results.audit import find_obstacle
    from harness_ext.results.outputs import find_outputs
    from harness_ext.results.publish import Submission
    from harness_ext.results.report import Shown
    from harness_ext.results.store import Problem, list_files, read_file

    outputs, none = [], PublishError(f"{place} cannot be read; give a folder that --output_path named, or published records")
    try:
        outputs = find_outputs([place]) if place.is_dir() or place.suffix == ".json" else []
    except PublishError as error:
        none = error
    for file in outputs:
        published = prepare_run(file, Submission(evidence="not said"))
        yield Shown(published=published, source=str(file), attention=read_attention(json.loads(file.read_text("utf-8"))))
    if outputs:
        return
    problems: list[Problem] = []
    records = [place] if place.is_file() else list_files(place, problems) or sorted(place.glob("*.jsonl")) if place.is_dir() else []
    if not records:
        raise none
    for path in records:
        found, wrong = read_file(path, str(path))
        problems += wrong
        if found and (why := find_obstacle(found.published)):
            problems.append(Problem(file=str(path), line=None, message=why))
        elif found:
            yield Shown(published=found.published, source=str(path))
    if problems:
        raise RecordError(f"{problems[0]}" + (f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""))
