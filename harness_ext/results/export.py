"""Published runs in the formats of others: every_eval_ever 0.3.0, and the `.eval_results` of a model's page on the hub.

What they have no place for is left out or said in words, never put where it would mean something else: a cell that was not measured
has no score there either, and a prompt is named by its fingerprint, since records hold no texts.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness_ext.results.identity import hash_json
from harness_ext.results.records import Cell, PublishedRun, Run, ScoreDetails, Task
from harness_ext.results.store import safe_name, to_bytes

EEE_VERSION = "0.3.0"
"""Of every_eval_ever's schema: github.com/evaleval/every_eval_ever, and the package `every-eval-ever`."""
COLLECTION = "harness_ext"
"""The folder below `data/` there."""
SELF_DEPLOYED = frozenset({"hf", "hf-extrapolate", "hf-multimodal", "vllm", "vllm-extrapolate", "sglang", "sglang-extrapolate"})
"""lm_eval's model classes that load weights themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A file to write."""

    path: str
    """Below the folder that was named."""
    content: bytes
    """All of it."""


# ---------------------------------------------------------------------- every_eval_ever


def to_every_eval_ever(published: PublishedRun) -> list[Exported]:
    """A run's aggregate file and, where answers were right or wrong, its samples: the same files for the same records."""
    run = published.run
    developer, name = run.model_info.developer or "local", run.model_info.id.rpartition("/")[2]
    digest = hashlib.sha256(to_bytes(published)).digest()
    stem = f"data/{COLLECTION}/{safe_name(developer)}/{safe_name(name)}/{uuid.UUID(bytes=digest[:16], version=4)}"
    rows = list(_list_samples(published))
    samples = "".join(f"{_to_json(row)}\n" for row in rows).encode()
    aggregate: dict[str, Any] = {
        "schema_version": EEE_VERSION,
        "evaluation_id": _name_evaluation(run),
        "evaluation_timestamp": _to_unix(run.evaluation_timestamp),
        "retrieved_timestamp": _to_unix(run.evaluation_timestamp),  # not the day of the export, which is no part of the run
        "source_metadata": {
            "source_name": "harness_ext",
            "source_type": "evaluation_run",
            "source_organization_name": run.source_metadata.source_organization_name or "unknown",
            "evaluator_relationship": run.source_metadata.evaluator_relationship,
            "additional_details": {"command": run.command, "not_measured": _list_unmeasured(published)},
        },
        "eval_library": {
            "name": run.eval_library.name,
            "version": run.eval_library.version,
            "additional_details": run.packages,
        },
        "model_info": _describe_model(run, developer),
        "evaluation_results": [*_list_results(published)],
    }
    if not rows:
        return [Exported(path=f"{stem}.json", content=_to_json(aggregate, indent=2).encode())]
    aggregate["detailed_evaluation_results"] = {
        "format": "jsonl",
        "file_path": f"{stem}_samples.jsonl",
        "hash_algorithm": "sha256",
        "checksum": hashlib.sha256(samples).hexdigest(),
        "total_rows": len(rows),
    }
    return [
        Exported(path=f"{stem}.json", content=_to_json(aggregate, indent=2).encode()),
        Exported(path=f"{stem}_samples.jsonl", content=samples),
    ]


def _name_evaluation(run: Run) -> str:
    """Theirs names one run; ours is the same for a run that was made again."""
    return f"harness_ext/{run.model_info.id}/{run.evaluation_id}/{_to_unix(run.evaluation_timestamp)}"


def _describe_model(run: Run, developer: str) -> dict[str, Any]:
    model, trained = run.model_info, run.trained_length
    details = {
        "deployment_type": "self_deployed" if model.inference_platform in SELF_DEPLOYED else "unknown",
        "model_availability": "unknown",
        "revision": model.revision,
        "weights_fingerprint": model.weights_fingerprint,
        "dtype": model.dtype,
        "num_parameters": model.num_parameters,
        "model_type": model.model_type,
        "position_scheme": model.position_scheme,
        "hard_limit": model.hard_limit,
        "trained_length": trained.tokens if trained else None,
        "trained_length_source": trained.source if trained else None,
        "override": run.override.method,
        "override_factor": run.override.factor,
        "override_fingerprint": run.override.fingerprint,
    }
    return {
        "name": model.name,
        "id": model.id,
        "developer": developer,
        "inference_platform": model.inference_platform,
        "additional_details": _to_texts(details),
    }


def _list_results(published: PublishedRun) -> Iterator[dict[str, Any]]:
    """Each task at each length, and each cell that was measured."""
    for task in published.run.tasks:
        own = [cell for cell in published.cells if cell.evaluation_name == task.evaluation_name]
        if task.metric == "exact":
            for point in task.curve.points:
                if point.score_details:
                    name = hash_json([published.run.evaluation_id, task.evaluation_name, point.length])
                    where = {"length": point.length, "multiple": point.multiple, "depth": "all", "control": None}
                    yield _describe_result(published.run, task, name, where, point.score_details)
        for cell in own:
            if cell.score_details:
                yield _describe_result(published.run, task, cell.evaluation_result_id, _name_place(cell), cell.score_details)


def _describe_result(run: Run, task: Task, name: str, where: dict[str, Any], score: ScoreDetails) -> dict[str, Any]:
    loss, interval = task.metric == "loss", score.uncertainty.confidence_interval
    uncertainty: dict[str, Any] = {"num_samples": score.uncertainty.num_samples}
    if interval:
        uncertainty["confidence_interval"] = {
            "lower": interval.lower,
            "upper": interval.upper,
            "confidence_level": interval.confidence_level,
            "method": interval.method,
        }
    return {
        "evaluation_result_id": name,
        "evaluation_name": task.evaluation_name,
        "evaluation_timestamp": _to_unix(run.evaluation_timestamp),
        "source_data": {
            "dataset_name": task.evaluation_name,
            "source_type": "other",
            "additional_details": _to_texts(
                {"version": task.version, "seed": task.seed, "prompts_fingerprint": task.prompts_fingerprint, **task.settings}
            ),
        },
        "metric_config": {
            "metric_id": task.metric,
            "metric_name": "loss" if loss else "exact match",
            "metric_kind": "loss" if loss else "accuracy",
            "metric_unit": "nats per token" if loss else "share",
            "metric_parameters": where,
            "lower_is_better": loss,
            "score_type": "continuous",
            "min_score": 0,
            "max_score": "Infinity" if loss else 1,
        },
        "score_details": {"score": score.score, "uncertainty": uncertainty},
        "generation_config": {"additional_details": {"output_type": task.output_type}},
    }


def _list_samples(published: PublishedRun) -> Iterator[dict[str, Any]]:
    """The prompts that were answered right or wrong; a loss is neither, and has no place there."""
    run, tasks = published.run, {task.evaluation_name: task for task in published.run.tasks}
    for cell in published.cells:
        where = _name_place(cell)
        for prompt in cell.prompts if cell.successes is not None else ():
            exact = prompt.verdict == "exact"
            scored = tasks[cell.evaluation_name].output_type == "loglikelihood"
            place = "/".join(f"{value:g}" if isinstance(value, float) else str(value) for value in where.values())
            yield {
                "schema_version": EEE_VERSION,
                "evaluation_id": _name_evaluation(run),
                "model_id": run.model_info.id,
                "evaluation_name": cell.evaluation_name,
                "evaluation_result_id": cell.evaluation_result_id,
                "sample_id": f"{place}/{prompt.sample}",
                "sample_hash": prompt.fingerprint,
                "interaction_type": "single_turn",
                "input": {
                    "raw": f"prompt {prompt.fingerprint}: its text is not in the record, which says how it is made again",
                    "reference": [],
                },
                "output": {"raw": []},
                "answer_attribution": [],
                "evaluation": {"score": float(exact), "is_correct": exact},
                "token_usage": {"input_tokens": prompt.prompt_tokens, "output_tokens": 0, "total_tokens": prompt.prompt_tokens}
                if scored
                else None,
                "metadata": _to_texts(
                    {**where, "verdict": prompt.verdict, "log_likelihood": prompt.log_likelihood, "tokens": prompt.tokens}
                ),
            }


def _list_unmeasured(published: PublishedRun) -> str:
    """In words: their records have no outcome beside a score."""
    found = {
        f"{cell.evaluation_name}{f', {cell.control}' if cell.control else ''} at {cell.length} tokens: {cell.outcome}"
        for cell in published.cells
        if cell.outcome != "measured"
    }
    return "; ".join(sorted(found))


def _name_place(cell: Cell) -> dict[str, Any]:
    return {"length": cell.length, "multiple": cell.multiple, "depth": cell.depth, "control": cell.control}


# ---------------------------------------------------------------------- .eval_results


def to_eval_results(published: PublishedRun, dataset: str) -> Exported:
    """A run's `.eval_results` file for its model's repository: a score for each task and length, and each effective length.

    They have one score for a dataset and task, and no curve; so the length, and an override if there is one, stand in the task's
    name. `dataset`: the name on the hub of the benchmark whose `eval.yaml` names those tasks.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    run = published.run
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=name,
            value=value,
            date=run.evaluation_timestamp,
            notes=f"override {run.override.method}; {notes}",
        )
        for name, value, notes in _list_entries(run)
    ]
    folder = f"{safe_name(run.model_info.developer or 'local')}__{safe_name(run.model_info.id.rpartition('/')[2])}"
    content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    name = f"harness_ext-{safe_name(run.override.method)}-{run.evaluation_id[:8]}.yaml"
    return Exported(path=f"{folder}/.eval_results/{name}", content=content.encode())


def _list_entries(run: Run) -> Iterator[tuple[str, float, str]]:
    """Task, value and remark."""
    suffix = "" if run.override.method == "none" else f"_{safe_name(run.override.method)}"
    for task in run.tasks:
        for point in task.curve.points:
            if point.score_details:
                n = point.score_details.uncertainty.num_samples
                at = f"{point.multiple:.4g}x" if point.multiple else str(point.length)
                yield f"{task.evaluation_name}_{at}{suffix}", point.score_details.score, f"{point.length} tokens, {n} prompts"
        for length in task.curve.effective_lengths:
            if length.tokens is not None:
                notes = f"tokens at which the score is still {length.threshold:g} ({length.rule}), {length.outcome}"
                yield f"{task.evaluation_name}_effective_length_{length.rule}{suffix}", length.tokens, notes


# ---------------------------------------------------------------------- as text


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def _to_texts(details: dict[str, Any]) -> dict[str, str]:
    """Theirs are texts all; what is None is left out."""
    return {str(name): value if isinstance(value, str) else _to_json(value) for name, value in details.items() if value is not None}


def _to_unix(moment: str) -> str:
    found = datetime.datetime.strptime(moment, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
    return str(int(found.timestamp()))
