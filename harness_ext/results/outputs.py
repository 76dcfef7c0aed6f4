"""What lm_eval wrote of a run, read: its `results_*.json`, and the `samples_*.jsonl` beside it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jsonlines

from harness_ext.errors import PublishError, ShardError
from harness_ext.results.causes import PAST_ONLY
from harness_ext.results.records import CellOutcome

RESULTS_FILE = re.compile(r"_(?P<date>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json")
"""lm_eval's name of a results file: `results_<date>.json`, or what --output_path named and the date. Its samples have the same date."""
PART = re.compile(rb'^  "shard": \{$', re.MULTILINE)
"""In the results file of a part, which `harness-ext run --shard` wrote."""
OUTCOMES = frozenset(get_args(CellOutcome)) - {"measured"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt as lm_eval logged it."""

    line: int
    """Of the samples file, from 1."""
    doc: Mapping[str, Any]
    """The task's own record of the prompt."""
    verdict: str
    """`exact`, a kind of miss, an outcome, or for running text the loss as a decimal number."""
    response: Any
    """The model's: text, or log-likelihood and whether it is greedy, as strings."""
    metrics: Mapping[str, float]
    """Metric → this prompt's value."""
    digest: str
    """lm_eval's hashes of the record, the prompt and the target, joined."""

    @property
    def length(self) -> int:
        """Tokens; of running text, the position at which the bucket ends."""
        return int(self.doc["edge"] if "edge" in self.doc else self.doc["length"])

    @property
    def outcome(self) -> str:
        """`measured`, or why not."""
        return self.verdict if self.verdict in OUTCOMES else "measured"

    @property
    def log_likelihood(self) -> float | None:
        """Of the answer; None where it was generated, or is no finite number."""
        if isinstance(self.response, str) or self.outcome != "measured":
            return None
        value = float(self.response[0])
        return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOutput:
    """One task of a run."""

    name: str
    """lm_eval's."""
    file: Path
    """Of its samples."""
    config: Mapping[str, Any]
    """As it ran."""
    rows: tuple[Row, ...]
    """In lm_eval's order."""

    @property
    def lengths(self) -> list[Mapping[str, Any]]:
        """The sweep's, each with its outcome; none where arms were run without it."""
        asked = self.config.get("arms") or ["long"]
        return list(self.config["lengths"]) if "long" in asked else []

    @property
    def left_out(self) -> dict[tuple[str, int], Mapping[str, Any]]:
        """(Arm, length) → its outcome and reason, for what the model could not be asked."""
        found: dict[tuple[str, int], Mapping[str, Any]] = {}
        trained = (self.config.get("trained_length") or {"tokens": 0})["tokens"]
        for entry in self.config.get("arms_left_out") or []:
            least = trained + (entry["arm"] in PAST_ONLY)
            lengths = [length["length"] for length in self.config["lengths"] if length["length"] >= least]
            for length in [entry["length"]] if entry["length"] else lengths:
                found[entry["arm"], length] = entry
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One run of lm_eval."""

    file: Path
    """Of its results."""
    results: Mapping[str, Any]
    """What is in it."""
    tasks: tuple[TaskOutput, ...]
    """Those of this package, by name."""


def find_outputs(places: Iterable[Path], *, parts: bool = False) -> list[Path]:
    """The results files below `places`, which are folders or such files; those of parts of a run only where they are asked for.

    Raises PublishError for a place that holds none, and ShardError for one that holds parts alone.
    """
    found: dict[Path, None] = {}
    for place in places:
        files = sorted(place.rglob("*.json")) if place.is_dir() else [place]
        named = [file for file in files if RESULTS_FILE.search(file.name)]
        if not named:
            raise PublishError(
                f"{place} holds no results of lm_eval (results_<date>.json); give the folder that --output_path named"
            )
        named = [file for file in named if parts or not (file.is_file() and PART.search(file.read_bytes()))]
        if not named:
            raise ShardError(f"{place} holds parts of a run alone; join them first: harness-ext merge {place} --output_path FOLDER")
        found |= dict.fromkeys(file.resolve() for file in named)
    return list(found)


def read_output(file: Path) -> Output:
    """A run's results with the samples of this package's tasks. Raises PublishError that names the file and line."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        configs = results["configs"]
        ours = {name: config for name, config in sorted(configs.items()) if {"lengths", "seed"} <= config.keys()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise PublishError(f"{file}: expected lm_eval's results, found {type(error).__name__}: {error}") from None
    if not ours:
        raise PublishError(
            f"{file}: found the tasks {', '.join(configs) or 'none'}; none of them has lengths, so there is no curve to publish"
        )
    return Output(file=file, results=results, tasks=tuple(_read_task(file, name, config) for name, config in ours.items()))


def hash_samples(rows: Iterable[Row]) -> str:
    """lm_eval's hash of a task's samples, which its results file holds too."""
    return hashlib.sha256("".join(row.digest for row in rows).encode()).hexdigest()


def _read_task(file: Path, name: str, config: Mapping[str, Any]) -> TaskOutput:
    date = RESULTS_FILE.search(file.name)
    samples = file.with_name(f"samples_{name}_{date['date'] if date else ''}.jsonl")
    if not samples.is_file():
        raise PublishError(
            f"{samples} is missing: a run is published with its samples; run again with --log_samples, or bring the file back"
        )
    return TaskOutput(name=name, file=samples, config=config, rows=tuple(_read_rows(samples)))


def _read_rows(file: Path) -> Iterator[Row]:
    number = 0
    try:
        with jsonlines.open(file) as lines:
            for number, sample in enumerate(lines, 1):
                yield _read_row(number, sample)
    except jsonlines.InvalidLineError as error:
        raise PublishError(f"{file} line {error.lineno}: {error}; the file was cut off or changed; run again") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise PublishError(
            f"{file} line {number}: expected a sample of lm_eval and its fields, found {type(error).__name__}: {error}; "
            "was it made with an older version? run again"
        ) from None


def _read_row(number: int, sample: Mapping[str, Any]) -> Row:
    doc = sample["doc"]
    row = Row(
        line=number,
        doc=doc,
        verdict=str(sample["filtered_resps"][0]),
        response=sample["resps"][0][0],
        metrics={name: float(sample[name]) for name in sample["metrics"]},
        digest=sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"],
    )
    fields = ["sample", "prompt_tokens", "prompt_fingerprint", "edge" if "edge" in doc else "length"]
    fields += ["scored_tokens"] if "edge" in doc else ["answer_tokens", "depth"]
    for field in fields:
        doc[field]
    row.log_likelihood  # noqa: B018  # raises where it is no number
    return row
