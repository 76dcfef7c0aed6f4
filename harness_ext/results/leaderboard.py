"""Published runs → a static site: one row a model and override, and what a row is made of, each in a script that the page asks for.

A page opened from disk may not `fetch`; scripts it may load. So data is written as scripts that hand it to `register` in page.js. What
stands in records reaches the page as data alone: as JSON inside a JavaScript string here, as text there.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import importlib.util
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from harness_ext.errors import ReportError
from harness_ext.results import figures, why
from harness_ext.results.aggregate import profile_depths
from harness_ext.results.audit import find_change, find_obstacle
from harness_ext.results.records import Cell, Curve, PublishedRun, Run, ScoreDetails, Task
from harness_ext.results.store import Problem, list_files, read_file, to_bytes

SITE = importlib.resources.files("harness_ext.results") / "site"
RULES = {
    "nolima": "NoLiMa: at least 85 % of its own short score",
    "ruler_llama2_chat": "RULER: above 85.6 %",
    "ruler_llama2_base": "RULER, base models: above 79.4 %",
    "yarn": "YaRN: at least 80 %",
    "k_max": "k_max: at least 20 % at every length up to it",
}
"""Rule → as the page calls it; the first is the headline."""
RARE = 0.1
"""Of the rows that the commonest multiple has: a multiple with fewer gets no column."""
COLUMNS = 8
"""Multiples that get a column of their own; the others stand in the curve and where a row is opened."""
KEY = 16
"""Digits of a run's `evaluation_id` that tell it apart on the page."""
SHARE = 64
"""Files that are given to a process at a time."""
OWN = ("data", "records")
"""Folders of a site, which each build replaces as a whole."""
Row = dict[str, Any]
TaskKey = tuple[str, str]
"""A task's name and its metric, `exact` or `loss`: whoever calls a task by another's name does not take its place."""


# ---------------------------------------------------------------------- what a figure is drawn from


def list_points(task: Task) -> list[Row]:
    """A row a length, for the curve."""
    return [
        {"length": p.length, "multiple": p.multiple, **_say_score(p.score_details), "outcome": p.outcome, "reason": p.reason}
        for p in task.curve.points
    ]


def list_controls(task: Task) -> list[Row]:
    """A row a control and length, to stand beside the curve."""
    multiples = {point.length: point.multiple for point in task.curve.points}
    return [
        {
            "control": figures.CONTROLS[control.control],
            "length": control.length,
            "multiple": multiples.get(control.length) if control.length else None,
            **_say_score(control.score_details),
        }
        for control in task.curve.controls
    ]


def list_cells(cells: Iterable[Cell]) -> list[Row]:
    """A row a length and depth, for the heat map; none where the task has no depths."""
    return [
        {"length": c.length, "multiple": c.multiple, "depth": c.depth, **_say_score(c.score_details), "outcome": c.outcome}
        for c in cells
        if c.depth is not None and c.control is None
    ]


def list_depths(cells: Sequence[Cell]) -> list[Row]:
    """A row a depth, for its profile: the score there over all lengths past the trained length. None where there is one depth."""
    rows = [{"depth": depth, **_say_score(details)} for depth, details in profile_depths(cells).items()]
    return rows if len(rows) > 1 else []


def list_prompts(task: Task, cells: Iterable[Cell]) -> list[Row]:
    """A row a measured length: what was asked, as one fingerprint, and each haystack's answers, depth by depth, 1 for an exact one.

    Runs whose fingerprints are equal were given the same prompts there, in this order; so their answers pair. None for a loss.
    """
    measured = {point.length for point in task.curve.points if point.outcome == "measured"} if task.metric == "exact" else set()
    by_length: dict[int, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.length, cell.depth or 0)):
        if cell.control is None and cell.length in measured and cell.prompts:
            by_length.setdefault(cell.length, []).append(cell)
    rows = []
    for length, group in by_length.items():
        answers: dict[int, str] = {}
        asked = hashlib.sha256()
        for cell in group:
            prompts = sorted(cell.prompts, key=lambda prompt: prompt.sample)
            for prompt in prompts:
                answers[prompt.sample] = answers.get(prompt.sample, "") + ("1" if prompt.verdict == "exact" else "0")
            asked.update(msgspec.json.encode((cell.depth, [(prompt.sample, prompt.fingerprint) for prompt in prompts])))
        rows.append({"length": length, "fingerprint": asked.hexdigest()[:KEY], "sample": [*answers], "exact": [*answers.values()]})
    return rows


def name_override(run: Run) -> str:
    """`none`, or the method and how far it was to reach."""
    factor = run.override.factor
    return run.override.method if factor is None else f"{run.override.method} ×{factor:.3g}"


def name_run(run: Run) -> str:
    """As figures call it."""
    return f"{run.model_info.id} · {name_override(run)}"


def name_runs(runs: Sequence[Run]) -> list[str]:
    """Each by a name that is its alone: one line of a figure is one run."""
    names = [name_run(run) for run in runs]
    ids = [f" ({run.evaluation_id[:8]})" if names.count(name) > 1 else "" for run, name in zip(runs, names, strict=True)]
    return [name + more for name, more in zip(names, ids, strict=True)]


def _say_score(details: ScoreDetails | None) -> Row:
    if details is None:
        return {"score": None, "low": None, "high": None, "n": 0}
    interval = details.uncertainty.confidence_interval
    return {
        "score": details.score,
        "low": interval.lower if interval else None,
        "high": interval.upper if interval else None,
        "n": details.uncertainty.num_samples,
    }


def _to_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


# ---------------------------------------------------------------------- what a row is opened to


def detail_run(published: PublishedRun) -> Row:
    """A run with all its figures."""
    run = published.run
    cells: dict[str, list[Cell]] = {task.evaluation_name: [] for task in run.tasks}
    for cell in published.cells:
        if cell.evaluation_name in cells:
            cells[cell.evaluation_name].append(cell)
    return {
        "label": name_run(run),
        "run": {name: getattr(run, name) for name in run.__struct_fields__ if name != "tasks"},
        "tasks": {task.evaluation_name: _detail_task(task, cells[task.evaluation_name]) for task in run.tasks},
    }


def _detail_task(task: Task, cells: Sequence[Cell]) -> Row:
    curve = task.curve
    return {
        "metric": task.metric,
        "version": task.version,
        "samples": task.samples,
        "seed": task.seed,
        "output_type": task.output_type,
        "prompts_fingerprint": task.prompts_fingerprint,
        "effective_lengths": curve.effective_lengths,
        "half_length": curve.half_length,
        "area_past": curve.area_past,
        "points": _to_columns(list_points(task)),
        "controls": _to_columns(list_controls(task)),
        **(_detail_why(curve) if curve.arms else {}),
        "cells": _to_columns(list_cells(cells)),
        "profile": _to_columns(list_depths(cells)),
        "prompts": _to_columns(list_prompts(task, cells)),
    }


def _detail_why(curve: Curve) -> Row:
    return {
        "why": {
            "sentence": why.say_why(curve),
            "arms": _to_columns(why.list_arms(curve)),
            "causes": why.list_causes(curve),
            "baselines": why.say_baselines(curve),
            "reasons": why.list_reasons(curve),
            "left_out": why.list_left_out(curve),
        }
    }


# ---------------------------------------------------------------------- the rows


@dataclass(slots=True)
class Entry:
    """A row: a model under an override, with its newest run of each task."""

    run: Run
    """Its newest."""
    tasks: dict[TaskKey, tuple[str, str, Curve]] = field(default_factory=dict)
    """Task → when it was run, the key of the run, and its curve."""


@dataclass(slots=True)
class Board:
    """The rows of all runs so far."""

    entries: dict[tuple[Any, ...], Entry] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    """Key, the beginning of a run's `evaluation_id` or all of it → `evaluation_id`."""
    dates: dict[str, str] = field(default_factory=dict)
    """Run → when it was run."""

    def add(self, run: Run) -> str | None:
        """Takes a run in and returns its key; None where the same run is there already, and newer."""
        date, name = run.evaluation_timestamp, run.evaluation_id
        if date < self.dates.get(name, ""):
            return None
        self.dates[name] = date
        key = name[:KEY] if self.keys.setdefault(name[:KEY], name) == name else name
        self.keys[key] = name
        entry = self.entries.setdefault(identify_row(run), Entry(run))
        if date >= entry.run.evaluation_timestamp:
            entry.run = run
        for task in run.tasks:
            asked = (task.evaluation_name, task.metric)
            if date >= entry.tasks.get(asked, ("",))[0]:
                entry.tasks[asked] = (date, key, task.curve)
        return key

    def list_shown(self) -> set[str]:
        """The keys of runs that some row shows."""
        return {key for entry in self.entries.values() for _, key, _ in entry.tasks.values()}


def identify_row(run: Run) -> tuple[Any, ...]:
    """What two runs share that are one row."""
    model, trained = run.model_info, run.trained_length
    return (
        *(model.id, model.revision, model.weights_fingerprint, model.dtype, model.inference_platform),
        *(run.override.fingerprint, trained.tokens if trained else None),
    )


def list_scripts(board: Board) -> dict[str, Any]:
    """Key → data: `index` with what every row has, and for each task `task-0` with its scores and `task-0-<rule>` with lengths."""
    entries = sorted(board.entries.values(), key=lambda entry: (entry.run.model_info.id, name_override(entry.run)))
    counts = Counter(task for entry in entries for task in entry.tasks)
    tasks = sorted(counts, key=lambda task: (task[1] == "loss", -counts[task], task))
    described = [{"name": name, "metric": metric, "rows": counts[name, metric]} for name, metric in tasks]
    scripts: dict[str, Any] = {"index": {"rules": RULES, "tasks": described, "rows": _list_models(entries)}}
    for number, task in enumerate(tasks):
        curves = [entry.tasks[task][2] if task in entry.tasks else None for entry in entries]
        ids = [entry.tasks[task][1] if task in entry.tasks else None for entry in entries]
        scripts[f"task-{number}"] = {"run": ids, **_list_scores(curves)}
        if task[1] == "exact":
            scripts |= {f"task-{number}-{rule}": _list_lengths(curves, rule) for rule in RULES}
    return scripts


def _list_models(entries: Sequence[Entry]) -> Row:
    """A column for each thing that rows have, whatever the task; words that come often are numbers into a list of them."""
    runs = [entry.run for entry in entries]
    trained = [run.trained_length for run in runs]
    return {
        "model": [run.model_info.id for run in runs],
        "override": _number(name_override(run) for run in runs),
        "method": _number(run.override.method for run in runs),
        "scheme": _number(run.model_info.position_scheme for run in runs),
        "dtype": _number(run.model_info.dtype for run in runs),
        "platform": _number(run.model_info.inference_platform for run in runs),
        "parameters": [run.model_info.num_parameters for run in runs],
        "trained": [found.tokens if found else None for found in trained],
        "stated": [row for row, found in enumerate(trained) if found and found.source == "user"],
    }


def _list_scores(curves: Sequence[Curve | None]) -> Row:
    """Every row's scores at the multiples of its grid; what has no multiple is in no grid, and in no column, and one that few rows have
    is in no column either."""
    points = [[point for point in curve.points if point.multiple is not None] if curve else [] for curve in curves]
    grids = [tuple(point.multiple or 0.0 for point in row) for row in points]
    counts = Counter(multiple for grid in grids for multiple in grid)
    often = [multiple for multiple in counts if counts[multiple] >= RARE * max(counts.values())]
    common = sorted(often, key=lambda multiple: (-counts[multiple], not _is_octave(multiple), multiple))[:COLUMNS]
    scores = [[round(p.score_details.score, 3) if p.score_details else p.outcome for p in row] for row in points]
    return {"columns": sorted(common), "grid": _number(grids), "scores": scores}


def _list_lengths(curves: Sequence[Curve | None], rule: str) -> Row:
    found = [next((e for e in curve.effective_lengths if e.rule == rule), None) if curve else None for curve in curves]
    return {
        "tokens": [e.tokens if e else None for e in found],
        "lower": [e.lower if e else None for e in found],
        "upper": [e.upper if e else None for e in found],
        "outcome": _number(e.outcome if e else "" for e in found),
    }


def _number(values: Iterable[Any]) -> Row:
    """A column of few different values: those once, and each row's number among them."""
    numbers: dict[Any, int] = {}
    rows = [numbers.setdefault(value, len(numbers)) for value in values]
    return {"values": list(numbers), "rows": rows}


def _is_octave(multiple: float) -> bool:
    return math.frexp(multiple)[0] == 0.5


# ---------------------------------------------------------------------- the files


def to_script(key: str, data: bytes, **more: str) -> str:
    r"""JavaScript that hands JSON to the page. What stands in it can end neither the string nor, inline, the script.

    >>> print(to_script("index", b'{"a":"</script>\'"}'), end="")
    register('index', '{"a":"\\u003c/script>\'"}');
    """
    text = data.decode()
    if more:
        text = f"{text[:-1]},{json.dumps(more)[1:]}"
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"register('{key}', '{quoted}');\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What was built."""

    rows: int
    """Models and overrides."""
    runs: int
    """Shown."""
    problems: tuple[Problem, ...]
    """What could not be read, and so is not shown."""


def build_site(results: Path, folder: Path, processes: int = 1) -> Site:
    """Writes the site of a folder of records. What an earlier build wrote there is replaced once all is read, other files are left.

    Raises ReportError where charts cannot be made, where no run can be read, and where `folder` cannot be written to or holds data that
    is not a site's; RecordError where `results` cannot be read.
    """
    require_charts()
    problems: list[Problem] = []
    paths = list_files(results, problems)
    _check_place(folder, results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as name:
            new = Path(name)
            board = _fill(new, _read_all([(path, str(path.relative_to(results))) for path in paths], processes), problems)
            if not board.entries:
                raise ReportError(
                    f"no run can be read in {results}; publish one first: harness-ext publish OUT --results {results}"
                )
            for own in OWN:
                shutil.rmtree(folder / own, ignore_errors=True)
                (new / own).replace(folder / own)
        _write(folder / "vega.js", bundle_vega())
        for page, source in (("page.css", "page.css"), ("page.js", "page.js"), ("index.html", "page.html")):
            _write(folder / page, (SITE / source).read_text("utf-8"))
    except OSError as error:
        raise ReportError(f"{folder} could not be written to: {error.strerror or error}; name another folder with --out") from None
    return Site(rows=len(board.entries), runs=len(board.list_shown()), problems=tuple(problems))


def _check_place(folder: Path, results: Path) -> None:
    """Raises ReportError where what a site replaces in `folder` is somebody else's, the records that it is made of above all."""
    for own in (folder / name for name in OWN):
        whose = results.resolve()
        if own.resolve() == whose or own.resolve() in whose.parents:
            raise ReportError(f"{own} would be replaced, and {results} lies there; name another folder with --out")
        if own.exists() and not (folder / OWN[0] / "index.js").is_file():
            raise ReportError(f"{own} holds other things; name another folder with --out, or one that an earlier build wrote")


def _fill(folder: Path, files: Iterable[Read], problems: list[Problem]) -> Board:
    """Writes what a site has of records, and gives back its rows; what could not be read goes to `problems`."""
    data, records = (folder / name for name in OWN)
    for own in (data, records):
        own.mkdir()
    board = Board()
    for path, shown, found in files:
        problems += found
        key = board.add(shown.run) if shown else None
        if shown is None or key is None:
            continue
        _write(data / f"run-{key}.js", to_script(f"run-{key}", shown.detail, records=f"records/{key}.jsonl"))
        _place(shown.whole or path, records / f"{key}.jsonl")
    for key in board.keys.keys() - board.list_shown():
        (data / f"run-{key}.js").unlink()
        (records / f"{key}.jsonl").unlink()
    for key, value in {**list_scripts(board), "charts": describe_charts()}.items():
        _write(data / f"{key}.js", to_script(key, msgspec.json.encode(value)))
    return board


def _place(source: Path | bytes, target: Path) -> None:
    """A file's bytes, or the same file under another name, since records are never written to; a copy where the two are on different disks."""
    target.unlink(missing_ok=True)  # which may be a link to another's record
    if isinstance(source, bytes):
        target.write_bytes(source)
        return
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def describe_charts() -> Row:
    """What page.js draws charts from."""
    return {"specs": figures.make_specs(), "themes": figures.THEMES}


@dataclass(frozen=True, slots=True)
class _Shown:
    """A file, ready to be shown."""

    run: Run
    detail: bytes
    """JSON of what a row is opened to."""
    whole: bytes | None
    """Its good records, where not all are; else None, and the file itself is shown."""


Read = tuple[Path, _Shown | None, list[Problem]]


def _read_all(jobs: Sequence[tuple[Path, str]], processes: int) -> Iterator[Read]:
    """Each file in turn, so that no more than a few are in memory."""
    if processes > 1 and len(jobs) > SHARE:
        with ProcessPoolExecutor(processes) as pool:
            yield from pool.map(_read_shown, jobs, chunksize=SHARE)
    else:
        yield from map(_read_shown, jobs)


def _read_shown(job: tuple[Path, str]) -> Read:
    path, name = job
    file, problems = read_file(path, name)
    if file is None:
        return path, None, problems
    # Bad lines are no longer as they were published, and say so themselves; the others of their file are shown.
    if why := find_obstacle(file.published) or ("" if problems else find_change(file)):
        return path, None, [*problems, Problem(file=name, line=None, message=why)]
    detail = msgspec.json.encode(detail_run(file.published))
    return path, _Shown(file.published.run, detail, to_bytes(file.published) if problems else None), problems


def require_charts() -> None:
    """Raises ReportError that says what to install, where charts cannot be made."""
    missing = [name for name in ("altair", "vl_convert") if importlib.util.find_spec(name) is None]
    if missing:
        raise ReportError(f"{missing[0]} draws the charts and is not installed: pip install 'harness_ext[report]'")


@functools.cache
def bundle_vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, inside a function so that its names stay its own."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed")
    return "(() => {" + script.replace("</script", "<\\/script").replace("<!--", "<\\!--") + "})();\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
