"""A run of lm_eval → its published records."""

from __future__ import annotations

import datetime
import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from harness_ext.results.aggregate import make_cell, make_curve
from harness_ext.results.identity import hash_prompts, identify_cell, identify_override, identify_run
from harness_ext.results.outputs import Output, Row, TaskOutput
from harness_ext.results.records import (
    SCHEMA_VERSION,
    Cell,
    EvalLibrary,
    Hardware,
    ModelInfo,
    Override,
    Prompt,
    PublishedRun,
    Run,
    SourceMetadata,
    Task,
    TrainedLengthRecord,
    to_plain,
)

MODEL_ARGUMENTS = ("pretrained", "model", "path", "engine")
"""Where lm_eval's models take the model's name, in lm_eval's order."""
PRIVATE = re.compile(r"token(?!izer|s)|key|secret|passw|auth|credential|header|base_url|cache|dir$", re.IGNORECASE)
"""In the names of arguments that say who asked, where a server stands or where files lie, and nothing of the model."""
PUBLIC = re.compile(
    r"(\w+_)?(think|bos|eos|pad|sep|cls|unk|mask|prefix|image|special)_(\w+_)?token(_ids?)?|kv_cache_\w+|num_key_\w+", re.IGNORECASE
)
"""Names of others, which change what the model is given or says."""
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
PATH = re.compile(r"^(?:[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\])|^[^\s/\\]+[/\\]\S+[/\\]")
"""Looks like a place in somebody's file system: from a root, a home or here, or with more than one separator and no space."""
ELSEWHERE = frozenset(
    "task class tag task_alias unsafe_code target_delimiter fewshot_delimiter fewshot_config num_fewshot repeats should_decontaminate "
    "output_type metadata lengths trained_length samples seed arms_left_out".split()
)
"""Fields of a task's config that lm_eval adds, or that stand elsewhere in the record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What lm_eval's files do not say of a run, and its publisher may."""

    model_id: str = ""
    """`developer/name` of a model that was run from a folder."""
    evidence: str = ""
    """Where a trained length is from that the config does not say."""
    organization: str = ""
    """The publisher's."""
    relationship: Literal["first_party", "third_party", "collaborative", "other"] = "other"
    """To the model's developer."""


def make_records(output: Output, submission: Submission) -> PublishedRun:
    """A run's records. What the backend did not say is None or `unknown`; `checks` says first whether the rest can be believed."""
    config = output.results["config"]
    trained = _read_trained_length(output, submission)
    draft = [(task, _draft_cells(task, trained.tokens if trained else None)) for task in output.tasks]
    reading = config.get("reading") or {}
    run = Run(
        schema_version=SCHEMA_VERSION,
        evaluation_id="0" * 32,
        evaluation_timestamp=_name_moment(output.results["date"]),
        source_metadata=SourceMetadata(
            source_organization_name=submission.organization, evaluator_relationship=submission.relationship
        ),
        eval_library=EvalLibrary(name="lm_eval", version=str(output.results.get("lm_eval_version") or "unknown")),
        packages=config.get("packages") or _read_packages(output),
        model_info=_read_model(output, submission),
        trained_length=trained,
        override=_read_override(config),
        hardware=Hardware(**config["hardware"]) if config.get("hardware") else None,
        wall_seconds=_number(output.results.get("total_evaluation_time_seconds")),
        compute_seconds=_number(reading.get("seconds")),
        tokens_asked=reading.get("asked"),
        tokens_computed=reading.get("computed"),
        command=write_command(output),
        tasks=[_make_task(output, task, cells) for task, cells in draft],
    )
    run = msgspec.structs.replace(run, evaluation_id=identify_run(run))
    named = [_name_cell(cell, run.evaluation_id) for _, cells in draft for cell in cells]
    return PublishedRun(run=run, cells=tuple(named))


def write_command(output: Output) -> str:
    """The command line that repeats the run, without what is private.

    A folder's name stands for the folder. lm_eval puts model arguments among a task's metadata; they are named once.
    """
    config = output.results["config"]
    arguments = _read_arguments(config)
    asked = {
        name: value
        for task in output.tasks
        for name, value in (task.config.get("metadata") or {}).items()
        if name not in ("version", "config_source") and not is_private(name) and str(arguments.get(name)) != str(value)
    }
    words = ["lm_eval", "--model", str(config.get("model") or "unknown")]
    words += ["--model_args", ",".join(f"{name}={value}" for name, value in _public_arguments(config).items())]
    words += ["--tasks", ",".join(task.name for task in output.tasks)]
    words += ["--metadata", msgspec.json.encode(strip_paths(asked), order="sorted").decode()] if asked else []
    words += ["--batch_size", str(config["batch_size"])] if str(config.get("batch_size") or 1) != "1" else []
    words += ["--limit", f"{config['limit']:g}"] if config.get("limit") else []
    words += (
        ["--gen_kwargs", msgspec.json.encode(config["gen_kwargs"], order="sorted").decode()] if config.get("gen_kwargs") else []
    )
    words += ["--apply_chat_template"] if output.results.get("chat_template") else []
    words += ["--system_instruction", str(output.results["system_instruction"])] if output.results.get("system_instruction") else []
    return to_plain(shlex.join([*words, "--output_path", "out", "--log_samples"]))


def is_private(name: str) -> bool:
    """Whether an argument of this name is left out of what is published.

    >>> [name for name in ("hf_token", "x_api_key", "cache_dir", "think_end_token", "add_bos_token", "kv_cache_dtype") if is_private(name)]
    ['hf_token', 'x_api_key', 'cache_dir']
    """
    return PRIVATE.search(name) is not None and PUBLIC.fullmatch(name) is None


def strip_paths(value: Any) -> Any:
    """`value`, in which the last part of a path stands for the path.

    >>> strip_paths({"pretrained": "/home/ann/models/rope", "tokenizer": "org/name", "files": ["a/b/c.txt"]})
    {'pretrained': 'rope', 'tokenizer': 'org/name', 'files': ['c.txt']}
    """
    if isinstance(value, Mapping):
        return {str(name): strip_paths(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strip_paths(item) for item in value]
    if isinstance(value, str) and "\n" not in value and PATH.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _read_model(output: Output, submission: Submission) -> ModelInfo:
    config = output.results["config"]
    arguments = _read_arguments(config)
    named = next((str(arguments[key]) for key in MODEL_ARGUMENTS if arguments.get(key)), "unknown")
    on_hub = HUB_ID.fullmatch(named) and not Path(named).is_dir()
    name = named if on_hub else re.split(r"[/\\]", named.rstrip("/\\"))[-1]
    model_id = submission.model_id or (name if on_hub else re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "unknown")
    parameters = config.get("model_num_parameters")
    return ModelInfo(
        id=model_id,
        name=to_plain(name, 200),
        developer=model_id.partition("/")[0] if "/" in model_id else "",
        revision=str(config.get("model_sha") or ""),
        weights_fingerprint=config.get("weights_fingerprint") or "",
        dtype=str(config.get("model_dtype") or "").removeprefix("torch."),
        num_parameters=parameters if isinstance(parameters, int) and parameters >= 0 else None,
        model_type=config.get("model_type") or "",
        position_scheme=config.get("position_scheme") or "unknown",
        hard_limit=config.get("hard_limit"),
        inference_platform=to_plain(str(config.get("model") or "unknown"), 200),
        model_args=_public_arguments(config),
    )


def _read_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """lm_eval's `model_args`, which are a text where they came from the command line of older versions."""
    given = config.get("model_args") or {}
    if isinstance(given, str):
        return dict(part.split("=", 1) for part in given.split(",") if "=" in part)
    return dict(given)


def _public_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = strip_paths({name: value for name, value in _read_arguments(config).items() if not is_private(name)})
    return found


def _read_trained_length(output: Output, submission: Submission) -> TrainedLengthRecord | None:
    found = output.tasks[0].config.get("trained_length")
    if not found:
        return None
    said = output.results["config"].get("config_trained_length")
    return TrainedLengthRecord(
        tokens=found["tokens"], source=found["source"], config_tokens=said and said["tokens"], evidence=submission.evidence
    )


def _read_override(config: Mapping[str, Any]) -> Override:
    found = config.get("override") or {"method": "unknown"}
    known = {name: found[name] for name in ("method", "factor", "options", "before", "after") if found.get(name) is not None}
    override = msgspec.convert({**known, "fingerprint": "0" * 32}, Override)
    return msgspec.structs.replace(override, fingerprint=identify_override(override))


def _read_packages(output: Output) -> dict[str, str]:
    versions = {name: output.results.get(f"{name}_version") for name in ("lm_eval", "transformers")}
    return {name: str(version) for name, version in versions.items() if version}


def _draft_cells(task: TaskOutput, trained: int | None) -> list[Cell]:
    """A task's cells, still without the run's name, in order."""
    rows = sorted(task.rows, key=_place)
    groups = {place: list(group) for place, group in itertools.groupby(rows, key=_place)}
    depths: Sequence[float | None] = [None] if "edges" in task.config else task.config["depths"]
    unmeasured = {entry["length"]: entry for entry in task.lengths if entry["outcome"] != "measured"}
    left_out = task.left_out
    asked = {(control, length) for control, length, _ in groups}
    for length, depth in itertools.product(unmeasured, depths):
        groups.setdefault(("", length, -1.0 if depth is None else depth), [])
    groups |= {(arm, length, -1.0): [] for arm, length in left_out if (arm, length) not in asked}
    cells = []
    for (control, length, depth), group in sorted(groups.items()):
        longer = next((unmeasured[edge] for edge in sorted(unmeasured) if edge >= length), {})
        why: Mapping[str, Any] = left_out.get((control, length)) or unmeasured.get(length) or longer
        outcome = next((row.outcome for row in group if row.outcome != "measured"), "measured" if group else why["outcome"])
        cells.append(
            make_cell(
                evaluation_result_id="0" * 32,
                evaluation_id="0" * 32,
                evaluation_name=task.name,
                control=control or None,  # type: ignore[arg-type]
                length=length,
                multiple=length / trained if trained else None,
                depth=None if depth < 0 else depth,
                outcome=outcome,  # type: ignore[arg-type]
                reason="" if outcome == "measured" else to_plain(why.get("reason", "")),
                prompts=[_make_prompt(row) for row in group] if outcome == "measured" else [],
            )
        )
    return cells


def _place(row: Row) -> tuple[str, int, float]:
    """Control, length and depth; empty and −1 where there is none, so that they sort."""
    depth = row.doc.get("depth")
    return row.doc.get("control") or "", row.length, -1.0 if depth is None else depth


def _make_prompt(row: Row) -> Prompt:
    loss = "edge" in row.doc
    return Prompt(
        sample=row.doc["sample"],
        verdict="loss" if loss else row.verdict,  # type: ignore[arg-type]
        log_likelihood=row.log_likelihood,
        tokens=row.doc["scored_tokens" if loss else "answer_tokens"],
        prompt_tokens=row.doc["prompt_tokens"],
        fingerprint=row.doc["prompt_fingerprint"],
    )


def _make_task(output: Output, task: TaskOutput, cells: Sequence[Cell]) -> Task:
    settings = {name: value for name, value in task.config.items() if name not in ELSEWHERE and value is not None}
    for name in ("chat_template_sha", "system_instruction"):
        settings |= {name: output.results[name]} if output.results.get(name) else {}
    kind, _, source = str(settings["haystack"]).rpartition(":")
    settings["haystack"] = f"{kind}:{strip_paths(source)}" if kind else source
    settings["haystack_source"] = strip_paths(settings.get("haystack_source"))
    return Task(
        evaluation_name=task.name,
        version=str(output.results["versions"].get(task.name)),
        metric="loss" if "edges" in task.config else "exact",
        output_type=task.config["output_type"],
        seed=task.config["seed"],
        samples=task.config["samples"],
        prompts_fingerprint=hash_prompts(cells),
        settings=settings,
        curve=make_curve(cells),
    )


def _name_cell(cell: Cell, evaluation_id: str) -> Cell:
    name = identify_cell(evaluation_id, cell.evaluation_name, cell.control, cell.length, cell.depth)
    return msgspec.structs.replace(cell, evaluation_result_id=name, evaluation_id=evaluation_id)


def _name_moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
