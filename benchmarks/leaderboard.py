"""How long the page of many models takes: `python benchmarks/leaderboard.py [MODELS [FOLDER]]` prints it, for planted runs of 100 cells.

Records are written to FOLDER (default: a temporary one, about 0.1 MB a model) and read from there again. The first view is what a browser
has loaded when the first row stands; it is driven by playwright where that and chromium are installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from made_runs import make_many

from harness_ext.results.leaderboard import build_site
from harness_ext.results.store import write_run


def measure(models: int, folder: Path) -> None:
    """Prints the figures."""
    results, out = folder / "results", folder / "site"
    if not results.exists():
        for run in make_many(models):
            write_run(results, run)
    size = sum(file.stat().st_size for file in results.rglob("*.jsonl"))
    started, before = time.perf_counter(), os.times()
    site = build_site(results, out, processes=min(2, os.cpu_count() or 1))
    spent, busy = time.perf_counter() - started, sum(os.times()[:4]) - sum(before[:4])
    print(
        f"{site.rows} rows, {100 * site.rows} cells, {size / 1e6:.0f} MB of records: built in {spent:.1f} s, {busy:.1f} s of processors"
    )
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        print("chromium or playwright is not installed: the page was not opened")
        return
    view_page(out, chromium)


def view_page(out: Path, chromium: str) -> None:
    """Opens the page and prints what it loads, and how long a reader waits."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        loaded: list[str] = []
        page.on("request", lambda request: loaded.append(request.url))
        started = time.perf_counter()
        page.goto((out / "index.html").as_uri(), wait_until="commit")
        page.wait_for_selector("#rows tbody tr")
        print(f"first row after {time.perf_counter() - started:.2f} s")
        sizes = [Path(unquote(urlsplit(url).path)).stat().st_size for url in loaded]
        print(f"first view {sum(sizes) / 1e6:.2f} MB in {len(sizes)} files")
        for what, act in (
            ("sorted", "document.querySelector(\"[data-key='at-2'] button\").click()"),
            ("searched", "const q = document.getElementById('query'); q.value = 'model-0012'; q.dispatchEvent(new Event('input'))"),
        ):
            spent = page.evaluate(f"(() => {{ const t = performance.now(); {act}; return performance.now() - t }})()")
            print(f"{what} in {spent:.0f} ms")
        started = time.perf_counter()
        page.locator("[data-open]").first.click()
        page.locator(".chart svg").first.wait_for()
        print(f"a row opened with its first chart after {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    if len(sys.argv) > 2:
        measure(count, Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as place:
            measure(count, Path(place))
