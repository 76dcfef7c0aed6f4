"""The commands that show runs: as a site, and as a report."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

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
