"""Published records → what in them does not follow from their own prompts, or says the same twice."""

from __future__ import annotations

import datetime
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from harness_ext.results.aggregate import make_cell, make_curve
from harness_ext.results.causes import PAST_ONLY
from harness_ext.results.identity import hash_prompts, identify_cell, identify_override, identify_run
from harness_ext.results.records import Cell, PublishedRun, Run, Task
from harness_ext.results.store import (
    FILE,
    MAX_FILE,
    MAX_LINE,
    MAX_LINES,
    MAX_PROBLEMS,
    Problem,
    RecordFile,
    decode_record,
    list_files,
    name_file,
    read_file,
    to_bytes,
)

TOLERANCE = 1e-9
"""Relative: what sums may differ by between processors."""
ROUNDING = 1e-3
"""A log-likelihood near 0 may come out above it by so much."""
MAX_TABLE = 10_000_000
"""Lengths × depths × samples of a task, so that no file asks for more memory than there is."""
SHARE = 64
"""Files that are given to a process at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was found in a folder."""

    runs: int
    """Good or not."""
    cells: int
    """As many."""
    problems: tuple[Problem, ...]
    """What has to be put right."""
    notes: tuple[Problem, ...]
    """What a reader may want to know."""


def audit_folder(folder: Path, processes: int = 1) -> Audit:
    """Reads every file of a folder and computes again whatever in it can be. Raises RecordError where the folder cannot be read."""
    problems: list[Problem] = []
    files = list_files(folder, problems)
    jobs = [(path, str(path.relative_to(folder))) for path in files]
    if processes > 1 and len(jobs) > SHARE:
        with ProcessPoolExecutor(processes) as pool:
            found = list(pool.map(_audit_path, jobs, chunksize=SHARE))
    else:
        found = [_audit_path(job) for job in jobs]
    by_id: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for summary in found:
        problems += summary.problems
        if summary.evaluation_id:
            by_id[summary.evaluation_id].append((summary.name, summary.timestamp))
    return Audit(
        runs=sum(bool(summary.evaluation_id) for summary in found),
        cells=sum(summary.cells for summary in found),
        problems=tuple(problems),
        notes=tuple(_name_repeats(by_id)),
    )


def audit_file(file: RecordFile) -> Iterator[Problem]:
    """What a file says that does not follow from its prompts, or from its own name."""
    own = file.published.run
    if changed := find_change(file):
        yield Problem(file=file.name, line=None, message=changed)
    elif name_file(own, file.digest) != f"{Path(file.name).parent.name}/{Path(file.name).name}":
        yield Problem(
            file=file.name, line=None, message=f"the file's name is another run's; expected {name_file(own, file.digest)}"
        )
    for line, message in audit_run(file.published, file.lines):
        yield Problem(file=file.name, line=line, message=message)


def audit_run(published: PublishedRun, lines: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Line and message of what does not follow from a run's prompts; `lines`: of each cell."""
    run, cells = published.run, published.cells
    yield from ((1, message) for message in _audit_run(run))
    seen: dict[tuple[Any, ...], int] = {}
    for cell, line in zip(cells, lines, strict=True):
        place = (cell.evaluation_name, cell.control, cell.length, cell.depth)
        if place in seen:
            yield line, f"the same cell as on line {seen[place]}: {_name_place(cell)}; expected it once"
        seen.setdefault(place, line)
        yield from ((line, message) for message in _audit_cell(run, cell))
    for task in run.tasks:
        own = [cell for cell in cells if cell.evaluation_name == task.evaluation_name]
        yield from ((1, message) for message in _audit_task(task, own))


def find_change(file: RecordFile) -> str:
    """What says that a file was changed since it was published: its name, which holds the hash of what was in it. Empty where nothing does."""
    named = FILE.fullmatch(file.path.name)
    if named is not None and named["hash"] == file.digest[:16]:
        return ""
    return f"the file's name does not hold the hash of what is in it, {file.digest[:16]}: it was changed; publish the run again"


def find_obstacle(published: PublishedRun) -> str:
    """Why figures of a run cannot be drawn or computed again, as where they would ask for more memory than there is; empty where they can."""
    for task in published.run.tasks:
        if why := _find_obstacle(task, [cell for cell in published.cells if cell.evaluation_name == task.evaluation_name]):
            return why
    return ""


def audit_records(published: PublishedRun) -> list[str]:
    """What keeps records from being published: what a reader would refuse in them."""
    content = to_bytes(published)
    lines = content.splitlines()
    found = []
    if len(lines) > MAX_LINES or len(content) > MAX_FILE:
        found.append(
            f"{len(lines)} records of {len(content)} bytes; expected at most {MAX_LINES} of {MAX_FILE}: publish a part of the run"
        )
    for number, line in enumerate(lines, 1):
        if len(line) >= MAX_LINE:
            found.append(f"record {number}: {len(line)} bytes; expected fewer than {MAX_LINE}: publish a part of the run")
        try:
            decode_record(line.decode())
        except ValueError as error:
            found.append(f"record {number}: {error}")
    return found or [f"record {line}: {message}" for line, message in audit_run(published, range(2, len(published.cells) + 2))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Summary:
    name: str
    evaluation_id: str = ""
    timestamp: str = ""
    cells: int = 0
    problems: tuple[Problem, ...] = ()


def _audit_path(job: tuple[Path, str]) -> _Summary:
    path, name = job
    file, problems = read_file(path, name)
    if file is None:
        return _Summary(name=name, problems=tuple(problems))
    run = file.published.run
    return _Summary(
        name=name,
        evaluation_id=run.evaluation_id,
        timestamp=run.evaluation_timestamp,
        cells=len(file.published.cells),
        problems=(*problems, *itertools.islice(audit_file(file), MAX_PROBLEMS)),
    )


def _audit_run(run: Run) -> Iterator[str]:
    yield from _compare("override.fingerprint", run.override.fingerprint, identify_override(run.override))
    yield from _compare("evaluation_id", run.evaluation_id, identify_run(run))
    developer, slash, _ = run.model_info.id.partition("/")
    yield from _compare("model_info.developer", run.model_info.developer, developer if slash else "")
    names = [task.evaluation_name for task in run.tasks]
    if names != sorted(set(names)):
        yield f"tasks: found {', '.join(names)}; expected each once, by name"
    tomorrow = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=1)
    try:
        made = datetime.datetime.strptime(run.evaluation_timestamp, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
    except ValueError:
        yield f"evaluation_timestamp: found {run.evaluation_timestamp}, which no calendar has; expected when the run was made"
    else:
        if made > tomorrow:
            yield f"evaluation_timestamp: found {run.evaluation_timestamp}, which is to come; expected when the run was made"
    trained = run.trained_length
    if trained and trained.config_tokens not in (None, trained.tokens) and not (trained.source == "user" and trained.evidence):
        yield (
            f"trained_length: found {trained.tokens} ({trained.source}), and the config says {trained.config_tokens}; expected that, "
            "or source `user` with evidence"
        )


def _audit_cell(run: Run, cell: Cell) -> Iterator[str]:
    if cell.evaluation_name not in [task.evaluation_name for task in run.tasks]:
        yield f"a cell of {cell.evaluation_name}, which is no task of the run on line 1"
    for prompt in cell.prompts:
        if prompt.log_likelihood is not None and prompt.log_likelihood > ROUNDING:
            yield f"sample {prompt.sample}: a log-likelihood of {prompt.log_likelihood}; expected at most 0"
        exactly = cell.control is None and prompt.verdict != "loss"
        if prompt.prompt_tokens > cell.length or (exactly and prompt.prompt_tokens != cell.length):
            yield f"sample {prompt.sample}: a prompt of {prompt.prompt_tokens} tokens; expected {cell.length}, as the cell says"
    samples = [prompt.sample for prompt in cell.prompts]
    if len(set(samples)) < len(samples):
        yield "a sample stands there twice; expected each once"
    if cell.control is None and cell.outcome in ("not_admitted", "no_positions"):
        yield f"outcome {cell.outcome} of a cell of the sweep; expected it of an arm alone"
    if cell.outcome == "measured" and not cell.prompts:
        yield "measured without a prompt; expected prompts, or another outcome"
    hard = run.model_info.hard_limit
    if hard and run.override.method == "none" and _find_span(cell) > hard:
        yield f"measured at {cell.length} tokens, and the model ends at {hard}; expected outcome `hard_limit`"
    expected_id = identify_cell(run.evaluation_id, cell.evaluation_name, cell.control, cell.length, cell.depth)
    yield from _compare("evaluation_result_id", cell.evaluation_result_id, expected_id)
    trained = run.trained_length
    try:
        expected = make_cell(
            evaluation_result_id=cell.evaluation_result_id,
            evaluation_id=cell.evaluation_id,
            evaluation_name=cell.evaluation_name,
            control=cell.control,
            length=cell.length,
            multiple=cell.length / trained.tokens if trained else None,
            depth=cell.depth,
            outcome=cell.outcome,
            reason=cell.reason,
            prompts=cell.prompts,
        )
    except ValueError as error:
        yield f"{error}"
        return
    except OverflowError:
        yield "log-likelihoods of which no sum is finite; expected a model's"
        return
    if cell != expected:  # else nothing has to be looked for
        yield from _compare("", msgspec.to_builtins(cell), msgspec.to_builtins(expected))


def _find_span(cell: Cell) -> int:
    """The positions that a cell's prompts reach over: a packed one's end with the trained length, a short one's are the sweep's."""
    if cell.control in PAST_ONLY or not cell.prompts:
        return 0
    return cell.length if cell.control in ("stretched", "shifted") else max(prompt.prompt_tokens for prompt in cell.prompts)


def _audit_task(task: Task, cells: list[Cell]) -> Iterator[str]:
    yield from _compare(f"{task.evaluation_name}: prompts_fingerprint", task.prompts_fingerprint, hash_prompts(cells))
    if why := _find_obstacle(task, cells):
        yield why
        return
    try:
        expected = make_curve(cells)
    except OverflowError:
        yield f"{task.evaluation_name}: log-likelihoods of which no sum is finite; the curve was not computed"
        return
    if task.curve != expected:
        yield from _compare(f"{task.evaluation_name}: curve", msgspec.to_builtins(task.curve), msgspec.to_builtins(expected))


def _find_obstacle(task: Task, cells: Sequence[Cell]) -> str:
    """Why a task's curve is not computed of its cells; empty where it can be."""
    if any((prompt.verdict == "loss") != (task.metric == "loss") for cell in cells for prompt in cell.prompts):
        return f"{task.evaluation_name}: metric {task.metric}, and prompts of the other; expected one of them"
    size = math.prod(len(found) or 1 for found in _spread(cells))
    if size > MAX_TABLE:
        return f"{task.evaluation_name}: {size} places of lengths, depths and samples; expected at most {MAX_TABLE}; the curve was not computed"
    return ""


def _spread(cells: Sequence[Cell]) -> tuple[set[Any], set[float | None], set[int]]:
    """The lengths (of each control), depths and samples of cells."""
    samples = {prompt.sample for cell in cells for prompt in cell.prompts}
    return {(cell.control, cell.length) for cell in cells}, {cell.depth for cell in cells}, samples


def _compare(where: str, found: Any, expected: Any) -> Iterator[str]:
    """The first place at which two values differ, if there is one."""
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        steps: Iterator[tuple[str, Any, Any]] = ((f"{where}.{name}".lstrip("."), found[name], expected[name]) for name in found)
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        steps = ((f"{where}[{index}]", *pair) for index, pair in enumerate(zip(found, expected, strict=True)))
    else:
        same: Callable[[Any, Any], bool] = _is_close if isinstance(found, float) and isinstance(expected, float) else _is_same
        if not same(found, expected):
            yield f"{where}: found {_show(found)}; computed from the rest of the file, it is {_show(expected)}"
        return
    for step in steps:
        for difference in _compare(*step):
            yield difference
            return


def _is_same(found: Any, expected: Any) -> bool:
    return bool(found == expected)


def _is_close(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _show(value: Any) -> str:
    return msgspec.json.encode(value).decode()[:80]


def _name_place(cell: Cell) -> str:
    depth = "" if cell.depth is None else f", depth {cell.depth:.3g}"
    return f"{cell.evaluation_name}{f', {cell.control}' if cell.control else ''}, {cell.length} tokens{depth}"


def _name_repeats(by_id: dict[str, list[tuple[str, str]]]) -> Iterator[Problem]:
    """Runs that were made more than once: all are kept, and a page shows the newest."""
    for found in by_id.values():
        if len(found) > 1:
            (newest, when), *others = sorted(found, key=lambda file: (file[1], file[0]), reverse=True)
            names = ", ".join(name for name, _ in others)
            yield Problem(file=newest, line=None, message=f"the same run was made before: {names}; the newest, of {when}, is shown")
