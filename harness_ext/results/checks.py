"""A run as lm_eval wrote it → what in it cannot be believed, one line each: whatever can be computed again from the samples is."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from harness_ext.results.outputs import Output, Row, TaskOutput, hash_samples
from harness_ext.results.publish import Submission

Scorer = Callable[[Mapping[str, Any], Mapping[str, Any], str], str]
"""A task's config, a prompt's record and a generated answer → the verdict."""
OWN_LIMITS = frozenset({"hf-extrapolate", "vllm-extrapolate", "sglang-extrapolate"})
"""Backends that refuse what does not fit; others cut it without a word."""
TOLERANCE = 1e-6
"""Relative: lm_eval and we sum in different order."""


def check_output(output: Output, submission: Submission, score: Scorer) -> list[str]:
    """What is wrong with a run; empty where it can be published. `score` computes verdicts on generated answers again."""
    found = [*_check_trained_length(output, submission)]
    for task in output.tasks:
        found += _check_whole(output, task)
        found += _check_places(output, task)
        for row in task.rows:
            found += [f"{task.file} line {row.line}: {message}" for message in _check_row(output, task, row, score)]
        found += _check_means(output, task)
    return found


def _check_trained_length(output: Output, submission: Submission) -> Iterator[str]:
    """The length that all multiples are of."""
    found = [task.config.get("trained_length") for task in output.tasks]
    if any(trained != found[0] for trained in found):
        yield f"{output.file}: the tasks take {found} as trained length; expected one; publish them as runs of their own"
    trained, said = found[0], output.results["config"].get("config_trained_length")
    if not trained or not said or trained["tokens"] == said["tokens"]:
        return
    if trained["source"] != "user":
        yield (
            f"{output.file}: trained length {trained['tokens']} ({trained['source']}), and the model's config says {said['tokens']} "
            f"({said['source']}); the file was changed: run again"
        )
    elif not submission.evidence:
        yield (
            f"{output.file}: trained length {trained['tokens']} as the user says, and the model's config says {said['tokens']} "
            f"({said['source']}); run again without trained_length, or say with --evidence where it is from"
        )


def _check_whole(output: Output, task: TaskOutput) -> Iterator[str]:
    """All samples of the run, and no others."""
    known = (output.results.get("task_hashes") or {}).get(task.name)
    if known and known != hash_samples(task.rows):
        yield f"{task.file}: its samples are not those of {output.file.name} (task_hashes); bring back the file that lm_eval wrote, or run again"
    planned = ((output.results.get("n-samples") or {}).get(task.name) or {}).get("original")
    limit = output.results["config"].get("limit")
    if planned is not None:
        asked = planned if not limit else min(planned, math.ceil(planned * limit) if limit < 1 else int(limit))
        if len(task.rows) != asked:
            yield f"{task.file}: {len(task.rows)} samples; expected {asked}, as {output.file.name} says; bring back the whole file, or run again"
    version, own = output.results["versions"].get(task.name), (task.config.get("metadata") or {}).get("version", 0)
    if version != own:
        yield f"{output.file}: {task.name} is version {version} under versions and {own} in its config; expected one; run again"


def _check_places(output: Output, task: TaskOutput) -> Iterator[str]:
    """Every cell that the run says it measured, each prompt once."""
    seen: dict[tuple[Any, ...], int] = {}
    for row in task.rows:
        place = (row.doc.get("control"), row.length, row.doc.get("depth"), row.doc["sample"])
        if place in seen:
            yield f"{task.file} line {row.line}: the same prompt as on line {seen[place]} (length {row.length}, sample {place[3]}); expected it once; run again"
        seen.setdefault(place, row.line)
    trained = (task.config.get("trained_length") or {}).get("tokens")
    sweep = [row for row in task.rows if not row.doc.get("control")]
    asked, measured = Counter(row.length for row in sweep), Counter(row.length for row in sweep if row.outcome == "measured")
    for length in task.lengths:
        tokens, multiple = length["length"], length["multiple"]
        if length["outcome"] == "measured" and not measured[tokens]:
            yield f"{output.file}: {task.name} says that {tokens} tokens were measured, and no sample is of them; run again with a --limit that leaves some"
        if length["outcome"] != "measured" and asked[tokens] and asked[tokens] == measured[tokens]:
            yield f"{output.file}: {task.name} says {length['outcome']} of {tokens} tokens, and all its samples were measured; run again"
        if multiple is not None and (not trained or abs(tokens - multiple * trained) > 1):
            yield f"{output.file}: {task.name} says that {tokens} tokens are {multiple} times the trained length, which is {trained}; run again"


def _check_row(output: Output, task: TaskOutput, row: Row, score: Scorer) -> Iterator[str]:
    """One prompt: its length, its verdict and what lm_eval counted."""
    doc, tokens, loss = row.doc, row.doc["prompt_tokens"], "edges" in task.config
    if doc["seed"] != task.config["seed"] or doc["sample"] >= task.config["samples"]:
        yield f"sample {doc['sample']} of seed {doc['seed']}; expected one of {task.config['samples']} of seed {task.config['seed']}; run again"
    if row.length not in _list_lengths(task) and not doc.get("control"):
        yield f"a prompt of {row.length} tokens; expected one of {', '.join(map(str, _list_lengths(task)))}; run again"
    if tokens > row.length:
        yield f"the prompt has {tokens} tokens, and was to have {row.length}: it was cut, or counted wrongly; run again"
    elif tokens < row.length and not loss and not doc.get("control"):
        yield f"the prompt has {tokens} tokens, and was to have {row.length}: that length was never measured; run again"
    config = output.results["config"]
    takes = output.results.get("max_length")
    if config.get("model") not in OWN_LIMITS and isinstance(takes, int) and row.outcome == "measured" and tokens > takes + 1:
        yield f"the prompt has {tokens} tokens, and {config.get('model')} takes {takes}: it was cut; run again with max_length={tokens} or more"
    if row.outcome != "measured":
        if row.metrics:
            yield f"{row.outcome}, and yet {', '.join(row.metrics)}; expected no score; run again"
        return
    if loss:
        yield from _check_loss(row)
    else:
        yield from _check_verdict(task, row, score)


def _check_verdict(task: TaskOutput, row: Row, score: Scorer) -> Iterator[str]:
    if isinstance(row.response, str):
        verdict = score(task.config, row.doc, row.response)
    else:
        verdict = "exact" if str(row.response[1]) == "True" else "missed"
    if row.verdict != verdict:
        yield f"the verdict is {row.verdict!r}, and the answer is {verdict!r}; expected that; the file was changed: run again"
    for metric, value in row.metrics.items():
        counted = {"exact": ("exact",), row.doc.get("control"): ("exact",), "lenient": ("exact", "lenient")}
        right = counted.get(metric.partition("@")[0])
        if right and value != float(verdict in right):
            yield f"{metric} is {value}, and the answer is {verdict!r}; expected {float(verdict in right)}; run again"


def _check_loss(row: Row) -> Iterator[str]:
    loss = -float(row.response[0]) / row.doc["scored_tokens"]
    said = [(name, value) for name, value in row.metrics.items() if name.startswith("sliding")]
    for name, value in [("the loss", float(row.verdict)), *said]:
        if not _same(value, loss):
            yield f"{name} is {value} nats per token; the log-likelihood over {row.doc['scored_tokens']} tokens gives {loss}; run again"


def _check_means(output: Output, task: TaskOutput) -> Iterator[str]:
    """lm_eval's own table against its samples."""
    values = defaultdict(list)
    for row in task.rows:
        for metric, value in row.metrics.items():
            values[metric].append(value)
    results = output.results["results"].get(task.name) or {}
    said = {name.rpartition(",")[0]: value for name, value in results.items() if "," in name and "_stderr," not in name}
    for metric in sorted(values.keys() | said.keys()):
        mean = sum(values[metric]) / len(values[metric]) if values[metric] else None
        found = said.get(metric)
        if mean is None or not isinstance(found, (int, float)) or not _same(found, mean):
            yield f"{output.file}: {task.name} {' '.join(metric.split())} is {found}; the mean of its samples is {mean}; expected that; run again"


def _list_lengths(task: TaskOutput) -> list[int]:
    edges: list[int] = task.config.get("edges") or [length["length"] for length in task.config["lengths"]]
    return edges


def _same(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=1e-9) or (math.isnan(found) and math.isnan(expected))
