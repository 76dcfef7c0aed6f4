"""Parts of an evaluation → the files that it would have written in one piece.

find the parts → read what each says → refuse those of another run, name the missing and the doubled → check that every prompt is there once → write.

The parts stay as they are. Samples are copied line by line, so that a part of any size is joined in little memory, and lm_eval's own table is
computed from them anew, in lm_eval's order.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from harness_ext.errors import PublishError, ShardError
from harness_ext.results.outputs import RESULTS_FILE, find_outputs
from harness_ext.results.publish import is_private, strip_paths
from harness_ext.shards import Shard

OF_THE_MACHINE = frozenset(
    "results groups configs versions n-shot higher_is_better n-samples task_hashes group_subtasks shard config date start_time end_time "
    "total_evaluation_time_seconds pretty_env_info git_hash upper_git_hash".split()
)
"""Fields of a results file in which parts of one run may differ, or that are looked into in another way."""
OF_THE_MACHINE_TOO = frozenset("model_args hardware reading attention batch_sizes device use_cache".split())
"""The same, of its `config`."""
NEEDED = frozenset(
    "results configs versions n-shot higher_is_better n-samples config date task_hashes model_name_sanitized total_evaluation_time_seconds".split()
)
"""Fields without which a results file is none of lm_eval's."""
SHOWN = 3
"""Differences of a part that are named; the rest are counted."""
LONGEST = 60
"""Characters of a value that are shown."""
DIGITS = 4
"""Of a share of attention, as models write it."""
SUMMED = ("asked", "computed", "seconds", "resumed")
"""Fields of `config.reading` that are counts."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a samples file, without the prompt."""

    doc_id: int
    """The prompt's place among all of its task's."""
    file: Path
    start: int
    """Bytes from the file's beginning."""
    size: int
    """In bytes."""
    filter: str
    """lm_eval's, part of a metric's name in its table."""
    metrics: Mapping[str, float]
    """Metric → the prompt's value."""
    digest: str
    """lm_eval's hashes of the record, the prompt and the target, joined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part, as it was written."""

    shard: Shard
    file: Path
    """Of its results."""
    results: Mapping[str, Any]
    """What is in it."""
    lines: Mapping[str, tuple[Line, ...]]
    """Task → its samples."""
    wrong: str
    """What it lacks, in words; empty where it is whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """What was written."""

    file: Path
    """Of results; the samples lie beside it."""
    parts: int
    tasks: int
    prompts: int
    notes: tuple[str, ...]
    """What a reader may want to know."""


def join(places: Sequence[Path], folder: Path) -> Joined:
    """Writes the whole run below `folder`, whose parts lie below `places`. Raises ShardError that names all that is wrong, one line each."""
    parts, notes = take_whole([read_part(file) for file in find_parts(places)])
    wrong = [*find_strangers(parts)] or [*find_gaps(parts), *find_damage(parts)]
    if wrong:
        raise ShardError("\n".join(wrong))
    parts.sort(key=lambda part: part.shard.index)
    lines = {
        task: sorted((line for part in parts for line in part.lines.get(task, ())), key=lambda line: line.doc_id)
        for task in parts[0].results["shard"]["tasks"]
    }
    wrong = [problem for task, found in lines.items() for problem in find_holes(task, found, parts)]
    if wrong:
        raise ShardError("\n".join(wrong))
    try:
        file = write(parts, lines, folder)
    except OSError as error:
        raise ShardError(
            f"--output_path: {folder} could not be written to: {error.strerror or error}; name another folder"
        ) from None
    kinds = {json.dumps(part.results["config"].get("hardware"), sort_keys=True) for part in parts}
    if len(kinds) > 1:
        notes.append(f"note: the parts ran on {len(kinds)} kinds of machines, which {file.name} names under parts")
    return Joined(file=file, parts=len(parts), tasks=len(lines), prompts=sum(map(len, lines.values())), notes=tuple(notes))


def find_parts(places: Sequence[Path]) -> list[Path]:
    """The results files below `places`."""
    try:
        return find_outputs(places, parts=True)
    except PublishError as error:
        raise ShardError(f"{error}") from None


def read_part(file: Path) -> Part:
    """A part. Raises ShardError for a file that is none."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        said = results.get("shard")
        if not said:
            raise ShardError(f"{file} was made without --shard: it is a run, and no part of one; leave it out")
        shard, tasks, dated = Shard(index=said["index"], of=said["of"]), said["tasks"], RESULTS_FILE.search(file.name)
        missing = NEEDED - results.keys()
        if missing or dated is None or not 1 <= shard.index <= shard.of:
            raise ValueError(f"no {', '.join(sorted(missing)) or 'date, or a wrong number'}")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(
            f"{file}: expected lm_eval's results, found {type(error).__name__}: {error}; remove it, and run that part again"
        ) from None
    lines, wrong = dict[str, tuple[Line, ...]](), ""
    for task in [task for task, asked in tasks.items() if asked["here"]]:
        samples = file.with_name(f"samples_{task}_{dated['date']}.jsonl")
        try:
            lines[task] = tuple(read_lines(samples))
        except (OSError, ValueError, KeyError, TypeError) as error:
            wrong = f"{samples} cannot be read to its end ({type(error).__name__})"
            continue
        if hashlib.sha256("".join(line.digest for line in lines[task]).encode()).hexdigest() != results["task_hashes"].get(task):
            wrong = f"{samples} does not hold the samples that {file.name} was made of (task_hashes)"
    return Part(shard=shard, file=file, results=results, lines=lines, wrong=wrong)


def read_lines(file: Path) -> Iterator[Line]:
    """The lines of a samples file."""
    start = 0
    with file.open("rb") as lines:
        for line in lines:
            row = json.loads(line)
            yield Line(
                doc_id=int(row["doc_id"]),
                file=file,
                start=start,
                size=len(line),
                filter=row["filter"],
                metrics={name: row[name] for name in row["metrics"]},
                digest=row["doc_hash"] + row["prompt_hash"] + row["target_hash"],
            )
            start += len(line)


def take_whole(parts: Sequence[Part]) -> tuple[list[Part], list[str]]:
    """The parts without those that were cut off while they were written, and have been made again since; and what is left out."""
    whole = {part.shard for part in parts if not part.wrong}
    left = [part for part in parts if part.wrong and part.shard in whole]
    return [part for part in parts if part not in left], [
        f"note: {part.wrong}; left out, since part {part.shard} is there whole as well" for part in left
    ]


def find_strangers(parts: Sequence[Part]) -> Iterator[str]:
    """Which parts are of another run than most of them, and by what that is seen."""
    facts = [dict(list_facts(part)) for part in parts]
    known = [json.dumps(found, sort_keys=True) for found in facts]
    model = known.index(Counter(known).most_common(1)[0][0])
    for part, found in zip(parts, facts, strict=True):
        fields = sorted({**facts[model], **found}, key=lambda field: field.endswith(".records"))  # a hash says least
        differences = [
            f"{field} is {_shorten(found.get(field))}, and {_shorten(facts[model].get(field))} there"
            for field in fields
            if found.get(field) != facts[model].get(field)
        ]
        if differences:
            more = f" (and {len(differences) - SHOWN} more)" if len(differences) > SHOWN else ""
            yield f"{part.file} is part of another run than {parts[model].file}: {'; '.join(differences[:SHOWN])}{more}; leave it out, or run that part again"


def list_facts(part: Part) -> Iterator[tuple[str, str]]:
    """Field → value, as JSON, of what all parts of one run have in common; secrets and folders are left out."""
    results, config = part.results, part.results["config"]
    tasks = {
        task: {name: value for name, value in asked.items() if name != "here"} for task, asked in results["shard"]["tasks"].items()
    }
    arguments = {name: value for name, value in (config.get("model_args") or {}).items() if not is_private(name)}
    yield from _flatten("config", {name: value for name, value in config.items() if name not in OF_THE_MACHINE_TOO})
    yield from _flatten("model_args", strip_paths(arguments))
    yield from _flatten("device", (config.get("hardware") or {}).get("device"))
    yield from _flatten("--shard of", part.shard.of)
    yield from _flatten("tasks", tasks)
    yield from _flatten("", {name: value for name, value in results.items() if name not in OF_THE_MACHINE})


def find_gaps(parts: Sequence[Part]) -> Iterator[str]:
    """Which parts are missing, and which are there twice."""
    of = parts[0].shard.of
    files: dict[int, list[Path]] = {}
    for part in parts:
        files.setdefault(part.shard.index, []).append(part.file)
    for index in range(1, of + 1):
        found = files.get(index, [])
        if not found:
            yield f"part {index}/{of} is missing: run it (--shard {index}/{of}), or name the folder it is in"
        elif len(found) > 1:
            yield f"part {index}/{of} is there {len(found)} times: {', '.join(map(str, found))}; leave out all but one"


def find_damage(parts: Sequence[Part]) -> Iterator[str]:
    """Which parts are not as they were written."""
    return (f"part {part.shard} is not whole: {part.wrong}; run it again (--shard {part.shard})" for part in parts if part.wrong)


def find_holes(task: str, lines: Sequence[Line], parts: Sequence[Part]) -> Iterator[str]:
    """Which prompts are missing, there twice, or none of the run's."""
    asked = parts[0].results["shard"]["tasks"][task]["prompts"]
    found = Counter(line.doc_id for line in lines)
    said = {"missing": set(range(asked)) - found.keys(), "none of the run's": found.keys() - set(range(asked))}
    said["there twice"] = {number for number, count in found.items() if count > 1}
    for what, numbers in said.items():
        if numbers:
            files = sorted({str(line.file) for line in lines if line.doc_id in numbers})
            yield f"{task}: {len(numbers)} of {asked} prompts are {what}, the first of them doc_id {min(numbers)}{' in ' if files else ''}{', '.join(files)}; run those parts again"


def write(parts: Sequence[Part], lines: Mapping[str, Sequence[Line]], folder: Path) -> Path:
    """The results file, written after all samples files. The last part's date names them, so that joining again writes the same files."""
    last = max((part.file for part in parts), key=lambda file: _date(file))
    target = folder / str(parts[0].results["model_name_sanitized"]) / f"results_{_date(last)}.json"
    if target.resolve() in [part.file.resolve() for part in parts]:
        raise ShardError(f"--output_path: {target} is one of the parts, which stay as they are; name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    for task, found in lines.items():
        file = target.with_name(f"samples_{task}_{_date(last)}.jsonl")
        with _replacing(file) as out:
            copy_lines(found, out)
    with _replacing(target) as out:
        out.write(json.dumps(make_results(parts, lines), indent=2, ensure_ascii=False).encode())
    return target


def copy_lines(lines: Sequence[Line], out: BinaryIO) -> None:
    """Copies lines, in their order; each ends, whether it did or not, as the last of a file may not."""
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(file.open("rb")) for file in dict.fromkeys(line.file for line in lines)}
        for line in lines:
            files[line.file].seek(line.start)
            out.write(files[line.file].read(line.size).rstrip(b"\r\n") + b"\n")


def make_results(parts: Sequence[Part], lines: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    """What lm_eval would have written of the whole; `parts` says what it was joined of."""
    whole = {name: value for name, value in parts[0].results.items() if name not in ("shard", "start_time", "end_time")}
    all_results = [part.results for part in parts]
    tables = {task: tabulate(task, found, _find_own(parts, task).results) for task, found in lines.items()}
    groups = {name: value for name, value in whole["results"].items() if name not in lines}
    whole["results"] = {**tables, **groups}
    for name in ("configs", "versions", "n-shot", "higher_is_better"):
        whole[name] = dict(sorted(functools.reduce(_unite, [results[name] for results in all_results]).items()))
    for task in lines:
        whole["configs"][task]["lengths"] = join_lengths(
            [results["configs"][task]["lengths"] for results in all_results if task in results["configs"]]
        )
    own = {task: _find_own(parts, task).results["n-samples"][task]["original"] for task in lines}
    whole["n-samples"] = {task: {"original": own[task], "effective": tables[task]["sample_len"]} for task in lines}
    whole["task_hashes"] = {
        task: hashlib.sha256("".join(line.digest for line in found).encode()).hexdigest() for task, found in lines.items()
    }
    whole["date"] = min(results["date"] for results in all_results)
    whole["total_evaluation_time_seconds"] = str(sum(float(results["total_evaluation_time_seconds"]) for results in all_results))
    configs = [results["config"] for results in all_results]
    whole["config"] = dict(whole["config"])
    if all(config.get("reading") for config in configs):
        counts = {name: sum(config["reading"][name] for config in configs) for name in SUMMED}
        whole["config"]["reading"] = {**configs[0]["reading"], **counts, "seconds": round(counts["seconds"], 3)}
    if all(config.get("hardware") for config in configs):
        whole["config"]["hardware"] = join_hardware([config["hardware"] for config in configs])
    if seen := [config["attention"] for config in configs if config.get("attention")]:
        whole["config"]["attention"] = join_attention(seen)
    whole["parts"] = [
        {
            "shard": str(part.shard),
            "file": part.file.name,
            **{name: part.results.get(name) for name in ("date", "total_evaluation_time_seconds")},
            "hardware": part.results["config"].get("hardware"),
        }
        for part in parts
    ]
    return whole


def tabulate(task: str, lines: Sequence[Line], results: Mapping[str, Any]) -> dict[str, Any]:
    """lm_eval's row of a task: of each metric the mean and its standard error, in the order and by the functions of lm_eval itself.

    `results`: of a part that has the task.
    """
    from lm_eval.api.metrics import mean, mean_stderr

    values: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        for metric, value in line.metrics.items():
            values.setdefault((metric, line.filter), []).append(value)
    row = {name: value for name, value in results["results"][task].items() if "," not in name}
    row["sample_len"] = max(map(len, values.values()), default=0)
    for (metric, filtered), found in values.items():
        row[f"{metric},{filtered}"] = mean(found)
        known = results["config"].get("bootstrap_iters") and len(found) > 1
        row[f"{metric}_stderr,{filtered}"] = mean_stderr(found) if known else "N/A"
    return row


def join_lengths(found: Sequence[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """The lengths of a task: where a part could not measure one, as that part says."""
    return [next((length for length in same if length["outcome"] != "measured"), same[0]) for same in zip(*found, strict=True)]


def join_hardware(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the parts ran on, as one record: of what differs, all names, and the smallest number.

    >>> join_hardware([{"name": "A100", "count": 1}, {"name": "H100", "count": 1}, {"name": "A100", "count": 2}])
    {'name': 'A100 + H100', 'count': 1}
    """
    joined: dict[str, Any] = {}
    for name in found[0]:
        values = dict.fromkeys(hardware.get(name) for hardware in found)
        numbers = [value for value in values if isinstance(value, int)]
        joined[name] = next(iter(values)) if len(values) == 1 else min(numbers) if numbers else " + ".join(sorted(map(str, values)))
    return joined


def join_attention(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the models of all parts attended to; where one could not say, as it says."""
    unseen = next((one for one in found if one["outcome"] != "measured"), None)
    if unseen:
        return dict(unseen)
    cells: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for cell in (cell for one in found for cell in one["cells"]):
        cells.setdefault((cell["task"], cell["arm"], cell["length"]), []).append(cell)
    return {**found[0], "cells": [pool_attention(cells[place]) for place in sorted(cells)]}


def pool_attention(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means over the prompts of all parts of one task, arm and length; of means that were rounded, so good to half of their last digit.

    >>> one, other = {"asked": 1, "prompts": 1, "rest": ["0.1000 1.0000"]}, {"asked": 4, "prompts": 3, "rest": ["0.5000 0.0000"]}
    >>> pool_attention([one, other])
    {'asked': 5, 'prompts': 4, 'rest': ['0.4000 0.2500']}
    """
    asked, prompts = (sum(cell[name] for cell in cells) for name in ("asked", "prompts"))
    seen = [cell for cell in cells if cell["prompts"]]

    def mean(values: Sequence[Any]) -> float:
        return float(sum(float(value) * cell["prompts"] for value, cell in zip(values, seen, strict=True)) / prompts)

    pooled = {**(seen or cells)[0], "asked": asked, "prompts": prompts}
    for name, value in pooled.items():
        if isinstance(value, Mapping):
            pooled[name] = {span: round(mean([cell[name][span] for cell in seen]), 1) for span in value}
        elif isinstance(value, list):  # a layer's heads are one string
            layers = zip(*(cell[name] for cell in seen), strict=True)
            pooled[name] = [
                " ".join(f"{mean(heads):.{DIGITS}f}" for heads in zip(*map(str.split, layer), strict=True)) for layer in layers
            ]
    return pooled


def _find_own(parts: Sequence[Part], task: str) -> Part:
    """The first part that ran prompts of a task."""
    return next(part for part in parts if task in part.lines)


def _unite(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both; where both have a name, the first's value, and of two mappings all that either holds."""
    united = {**other, **one}
    return united | {
        name: {**other[name], **one[name]}
        for name in one.keys() & other.keys()
        if isinstance(one[name], dict) and isinstance(other[name], dict)
    }


def _shorten(text: str | None) -> str:
    """
    >>> _shorten(None), _shorten("8"), len(_shorten("8" * 1000))
    ('nothing', '8', 61)
    """
    return "nothing" if text is None else text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _flatten(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Dotted name → JSON of each leaf."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flatten(f"{name}.{key}" if name else str(key), item)
    else:
        yield name, json.dumps(value, sort_keys=True)


def _date(file: Path) -> str:
    found = RESULTS_FILE.search(file.name)
    assert found, file
    return found["date"]


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[BinaryIO]:
    """A file that takes its place once it is whole."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    with unfinished.open("wb") as out:
        yield out
    unfinished.replace(file)
