"""Files as lm_eval writes them of a run whose answers are planted: no model is run."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DATE = "2026-11-20T10-00-00.000000"
TASKS = {"scored": "passkey_extrapolate", "generated": "passkey_extrapolate_generate", "loss": "loss_extrapolate"}
Right = Callable[[int, float, int], bool]
"""(length, depth, sample) → whether the answer is right."""


def write_output(
    folder: Path,
    *,
    kinds: Sequence[str] = ("scored",),
    trained: int | None = 256,
    multiples: Sequence[float] = (0.5, 1, 2, 4),
    depths: Sequence[float] = (0.0, 0.5, 1.0),
    samples: int = 4,
    right: Right = lambda length, depth, sample: length <= 256 or (length == 512 and sample != 1),
    unmeasured: dict[int, str] | None = None,
    controls: bool = False,
    arms: dict[str, Right] | None = None,
    left_out: Sequence[dict[str, Any]] = (),
    swept: bool = True,
    long_only_to: int = 2**30,
    date: str = DATE,
    config: dict[str, Any] | None = None,
    **results: Any,
) -> Path:
    """The results file. `unmeasured`: length → why nothing was asked of it; `config`, `results`: what is said otherwise.

    `arms`: arm → whether its answer is right; `left_out`: those that were not run; not `swept`: arms alone; `long_only_to`: past
    it there was no memory for plain prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [
        {"length": round(m * (trained or 256)), "multiple": m if trained else None, "outcome": "measured", "reason": ""}
        for m in multiples
    ]
    for length in lengths:
        if length["length"] in (unmeasured or {}):
            length |= {"outcome": unmeasured[length["length"]], "reason": "planted"}
    run: dict[str, Any] = {
        "results": {},
        "configs": {},
        "versions": {},
        "n-samples": {},
        "task_hashes": {},
        "config": {**CONFIG, **(config or {})},
        "date": 1795168800.0,
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.23.0",
        "max_length": 2048,
        "total_evaluation_time_seconds": "60.5",
    }
    for kind in kinds:
        task = TASKS[kind]
        planned = [length for length in lengths if length["outcome"] == "measured"]
        measured = [length for length in planned if length["length"] <= long_only_to]
        for length in planned[len(measured) :]:
            length |= {"outcome": "out_of_memory", "reason": "planted"}
        if kind == "loss":
            rows = _loss_rows([length["length"] for length in measured], samples)
        else:
            rows = _answer_rows(kind, measured if swept else [], depths, samples, right, controls)
            rows += _arm_rows(kind, planned, depths, samples, arms or {}, len(rows), trained or 256)
        run["configs"][task] = _config(kind, lengths, depths, samples, trained)
        if arms or left_out:
            run["configs"][task]["arms"] = [*(["long"] if swept else []), *(arms or {}), *(one["arm"] for one in left_out)]
            run["configs"][task]["arms_left_out"] = list(left_out)
        run["versions"][task] = 2
        run["n-samples"][task] = {"original": len(rows), "effective": len(rows)}
        run["results"][task] = {"alias": task, **means(rows)}
        run["task_hashes"][task] = hash_rows(rows)
        write_rows(folder / f"samples_{task}_{date}.jsonl", rows)
    file = folder / f"results_{date}.json"
    file.write_text(json.dumps(run | results))
    return file


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metric → mean, as lm_eval names it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name in row["metrics"]:
            values.setdefault(name, []).append(row[name])
    return {f"{name},none": sum(found) / len(found) for name, found in values.items()}


def hash_rows(rows: Sequence[dict[str, Any]]) -> str:
    return hashlib.sha256("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows).encode()).hexdigest()


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def edit_rows(
    results: Path, change: Callable[[list[dict[str, Any]]], Any], *, task: str = TASKS["scored"], means_too: bool = False
) -> None:
    """Changes a run's samples, and where asked, lm_eval's means to match; its hash of the samples always, as somebody who means it would."""
    file = results.with_name(results.name.replace("results_", f"samples_{task}_").replace(".json", ".jsonl"))
    rows = read_rows(file)
    change(rows)
    write_rows(file, rows)

    def follow(run: dict[str, Any]) -> None:
        run["task_hashes"][task] = hash_rows(rows)
        if means_too:
            run["results"][task] = {"alias": task, **means(rows)}

    edit_results(results, follow)


def edit_results(results: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a run's results file."""
    run = json.loads(results.read_text())
    change(run)
    results.write_text(json.dumps(run))


CONFIG: dict[str, Any] = {
    "model": "hf-extrapolate",
    "model_args": {"pretrained": "lab/tiny"},
    "model_num_parameters": 459392,
    "model_dtype": "torch.float32",
    "model_revision": "main",
    "model_sha": "0" * 40,
    "model_type": "llama",
    "position_scheme": "rotary",
    "hard_limit": None,
    "config_trained_length": {"tokens": 256, "source": "config.max_position_embeddings"},
    "weights_fingerprint": "ab" * 32,
    "hardware": {"device": "cpu", "name": "a processor", "count": 2, "memory_bytes": 2**34, "platform": "Linux-x86_64"},
    "packages": {"harness_ext": "0.1.0", "lm_eval": "0.4.13", "transformers": "5.23.0", "torch": "2.13.0"},
    "override": {"method": "none", "before": {"frequencies": "20bc73f31c86a45d", "attention_factor": 1.0}, "after": {}},
    "reading": {"asked": 39630, "computed": 17830, "seconds": 1.012, "sharing": ""},
    "limit": None,
    "gen_kwargs": {},
}


def _config(
    kind: str, lengths: Sequence[dict[str, Any]], depths: Sequence[float], samples: int, trained: int | None
) -> dict[str, Any]:
    common = {
        "task": TASKS[kind],
        "description": "Find it.",
        "fewshot_delimiter": "\n\n",
        "num_fewshot": 0,
        "output_type": "generate_until" if kind == "generated" else "loglikelihood",
        "metadata": {"config_source": "task.yaml", "version": 2},
        "haystack": "noise",
        "multiples": [length["multiple"] for length in lengths],
        "lengths": list(lengths),
        "samples": samples,
        "seed": 0,
        "trained_length": trained and {"tokens": trained, "source": "config.max_position_embeddings"},
    }
    if kind == "loss":
        return common | {"edges": [length["length"] for length in lengths if length["outcome"] == "measured"]}
    return common | {"depths": list(depths), "value": "digits:5", "score": "retrieval", "needle": "The pass key is {value}."}


def _answer_rows(
    kind: str, lengths: Sequence[dict[str, Any]], depths: Sequence[float], samples: int, right: Right, controls: bool
) -> list[dict[str, Any]]:
    places: list[tuple[str | None, dict[str, Any], float | None, int]] = [
        (None, length, depth, sample) for sample, depth, length in itertools.product(range(samples), depths, lengths)
    ]
    if controls:
        places += [("needle_absent", length, None, sample) for sample, length in itertools.product(range(samples), lengths)]
        places += [("no_haystack", {"length": 40, "multiple": 40 / 256}, None, sample) for sample in range(samples)]
    return [
        _answer_row(
            kind, number, place, place[0] == "no_haystack" or (not place[0] and right(place[1]["length"], place[2] or 0, place[3]))
        )
        for number, place in enumerate(places)
    ]


def _arm_rows(
    kind: str,
    lengths: Sequence[dict[str, Any]],
    depths: Sequence[float],
    samples: int,
    arms: dict[str, Right],
    first: int,
    trained: int,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for arm, length, depth, sample in itertools.product(arms, lengths, depths, range(samples)):
        if length["length"] >= trained + arm.startswith("packed"):
            exact = arms[arm](length["length"], depth, sample)
            rows.append(_answer_row(kind, first + len(rows), (arm, length, depth, sample), exact))
            if arm in ("stretched", "shifted"):
                rows[-1]["doc"]["prompt_tokens"] = 180
    return rows


def _answer_row(kind: str, number: int, place: tuple[str | None, dict[str, Any], float | None, int], exact: bool) -> dict[str, Any]:
    control, length, depth, sample = place
    at = f"@{length['length']:>8}"
    metric = f"exact{at}" if not control else control if control == "no_haystack" else f"{control}{at}"
    doc = {
        "length": length["length"],
        "multiple": length["multiple"],
        "depth": depth,
        "sample": sample,
        "seed": 0,
        "prompt_tokens": length["length"],
        "answer_tokens": 0 if kind == "generated" else 5,
        "prompt_fingerprint": _digest(kind, control, length["length"], depth, sample)[:16],
        "answer": "84402",
        "values": ["84402"],
        **({"control": control} if control else {}),
    }
    if kind == "generated":
        response: Any = " 84402." if exact else " 11111."
        verdict = "exact" if exact else "wrong_value"
        metrics = {metric: float(exact), **({} if control else {f"lenient{at}": float(exact)})}
    else:
        response, verdict = [str(-0.25 if exact else -9.5), str(exact)], "exact" if exact else "missed"
        metrics = {metric: float(exact)}
    return _row(number, doc, response, verdict, metrics)


def _loss_rows(edges: Sequence[int], samples: int) -> list[dict[str, Any]]:
    rows = []
    for sample in range(samples):
        start = 1
        for edge in edges:
            scored = edge - start
            loss = 2.5 + 0.25 * max(0.0, math.log2(edge / 256)) + 0.125 * sample
            doc = {"sample": sample, "edge": edge, "seed": 0, "start": start, "prompt_tokens": edge, "scored_tokens": scored}
            doc["prompt_fingerprint"] = _digest("loss", edge, sample)[:16]
            found = -loss * scored
            verdict = str(-found / scored)
            rows.append(_row(len(rows), doc, [str(found), "False"], verdict, {f"sliding@{edge:>8}": float(verdict)}))
            start = edge
    return rows


def _row(number: int, doc: dict[str, Any], response: Any, verdict: str, metrics: dict[str, float]) -> dict[str, Any]:
    return {
        "doc_id": number,
        "doc": doc,
        "target": "84402",
        "arguments": {"gen_args_0": {"arg_0": "a prompt", "arg_1": " 84402"}},
        "resps": [[response]],
        "filtered_resps": [verdict],
        "filter": "none",
        "metrics": list(metrics),
        "doc_hash": _digest("doc", number, doc["prompt_fingerprint"]),
        "prompt_hash": _digest("prompt", doc["prompt_fingerprint"]),
        "target_hash": _digest("target"),
        **metrics,
    }


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
