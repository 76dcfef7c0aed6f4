"""What is kept of a run, one record a run and one a prompt, and its JSON Lines."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonlines

from harness_ext.cells import Length, TrainedLength
from harness_ext.errors import ComparisonError

RUNS = "runs.jsonl"
"""In the folder of a comparison: one line a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One prompt under one method."""

    method: str
    """The run's."""
    task: str
    """lm_eval's name of it."""
    length: int
    """Tokens."""
    multiple: float | None
    """Of the trained length; None where that is unknown."""
    depth: float
    """Of the needle, as planned: 0 to 1."""
    sample: int
    """Prompts of one sample share their haystack, keys and values."""
    verdict: str
    """`exact`, or the kind of miss, or why there is none: `out_of_memory`."""
    prompt_hash: str
    """SHA-256 of what the model was given: equal where two methods saw the same tokens."""
    log_likelihood: float | None
    """Of the answer, natural logarithm; None where it was generated or not measured, and where the model's was no finite number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One method on all prompts; or, where it was refused, why."""

    model: str
    """As it was named."""
    method: str
    """`none`, or what the model was extended by."""
    refused: str = ""
    """Why the model does not run under this method; then nothing below is known."""
    override: Mapping[str, Any] | None = None
    """What the method changed in the model's config, as the model says it."""
    trained_length: TrainedLength | None = None
    """None where it is unknown."""
    plan: Mapping[str, tuple[Length, ...]] = dataclasses.field(default_factory=dict)
    """Task → its lengths, shortest first, each measured or with the reason why not."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What was asked: tasks, metadata, limit, model_args, batch_size."""
    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """lm_eval's own: task → metric → value."""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Package → version."""
    answers: tuple[Answer, ...] = ()
    """In lm_eval's order."""


def append_run(folder: Path, run: Run) -> None:
    """Writes a run's answers to a file of their own, and then its record, so that a recorded run is a whole one."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {field.name: getattr(run, field.name) for field in dataclasses.fields(Run) if field.name != "answers"}
    record["trained_length"] = run.trained_length and dataclasses.asdict(run.trained_length)
    record["plan"] = {task: [dataclasses.asdict(length) for length in lengths] for task, lengths in run.plan.items()}
    if not run.refused:
        with jsonlines.open(_samples(folder, run.method), "w", compact=True) as rows:
            rows.write_all(dataclasses.asdict(answer) for answer in run.answers)
    with jsonlines.open(folder / RUNS, "a", compact=True) as rows:
        rows.write(record)


def read_runs(folder: Path) -> list[Run]:
    """The runs of a comparison, in the order they were made. Raises ComparisonError where the folder holds none, or not as they were written."""
    if not (folder / RUNS).is_file():
        raise ComparisonError(f"{folder} holds no {RUNS}; give a folder that `harness-ext compare --output_path` wrote")
    return [_read(folder, row) for row in _read_rows(folder / RUNS)]


def _read_rows(file: Path) -> list[dict[str, Any]]:
    """The records of a file. Raises ComparisonError where they cannot all be read."""
    try:
        with jsonlines.open(file) as rows:
            return [dict(row) for row in rows.iter(type=dict)]
    except (OSError, jsonlines.Error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
        raise ComparisonError(f"{file} was cut off or changed: {reason}; make the comparison again") from None


def _read(folder: Path, row: dict[str, Any]) -> Run:
    try:
        trained = row.pop("trained_length")
        plan = {task: tuple(Length(**length) for length in lengths) for task, lengths in row.pop("plan").items()}
        given = [] if row["refused"] else _read_rows(_samples(folder, row["method"]))
        answers = tuple(Answer(**answer) for answer in given)
        return Run(**row, trained_length=TrainedLength(**trained) if trained else None, plan=plan, answers=answers)
    except (KeyError, TypeError, AttributeError) as error:
        raise ComparisonError(
            f"{folder / RUNS}: expected a run as `harness-ext compare` writes it, found {type(error).__name__}: {error}; make the comparison again"
        ) from None


def _samples(folder: Path, method: str) -> Path:
    """
    >>> _samples(Path("out"), "yarn").name, _samples(Path("out"), "a/b").name
    ('samples_yarn.jsonl', 'samples_a_b.jsonl')
    """
    return folder / f"samples_{re.sub(r'[^A-Za-z0-9.+=-]', '_', method)}.jsonl"
