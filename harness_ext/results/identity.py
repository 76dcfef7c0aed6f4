"""What makes two runs, cells or overrides the same one: hashes over canonical JSON of what identifies them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from harness_ext.results.records import Cell, ControlName, Override, Run

DIGITS = 32
"""Hexadecimal, of SHA-256's 64: among a billion records two share them with a chance of 1 in 10²⁰."""


ANSWERING = frozenset("think_end_token enable_thinking kv_cache_dtype mixed_precision_dtype softmax_dtype".split())
"""Model arguments that change what is answered to the same tokens by the same weights."""


def hash_json(value: Any) -> str:
    """The first 32 hex digits of SHA-256 over canonical JSON: keys sorted, no spaces, numbers in their shortest form.

    >>> hash_json({"b": 1, "a": [0.5, None]}) == hash_json({"a": [0.5, None], "b": 1})
    True
    """
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:DIGITS]


def identify_run(run: Run) -> str:
    """A run's `evaluation_id`.

    Weights identify a model where the backend shows them, so that a folder and a name on the hub that hold the same are one model;
    where it does not, what was named and how it was loaded has to do. Arguments count beside weights where they change an answer (`ANSWERING`).
    When, where and how fast it ran are no part of it.
    """
    model = run.model_info
    answering = {name: value for name, value in model.model_args.items() if name in ANSWERING}
    named = {"id": model.id, "revision": model.revision, "model_args": model.model_args}
    return hash_json(
        {
            "model": model.weights_fingerprint or named,
            "dtype": model.dtype,
            "inference_platform": model.inference_platform,
            "override": run.override.fingerprint,
            "trained_length": run.trained_length and run.trained_length.tokens,
            "tasks": [[task.evaluation_name, task.version, task.prompts_fingerprint] for task in run.tasks],
            **({"answering": answering} if answering else {}),
        }
    )


def identify_cell(evaluation_id: str, name: str, control: ControlName | None, length: int, depth: float | None) -> str:
    """A cell's `evaluation_result_id`."""
    return hash_json([evaluation_id, name, control, length, depth])


def identify_override(override: Override) -> str:
    """An override's `fingerprint`."""
    fields = msgspec.to_builtins(override)
    return hash_json({name: value for name, value in fields.items() if name != "fingerprint"})


def hash_prompts(cells: Iterable[Cell]) -> str:
    """A task's `prompts_fingerprint`."""
    ordered = sorted(
        (cell.length, -1.0 if cell.depth is None else cell.depth, prompt.sample, cell.control or "", prompt.fingerprint)
        for cell in cells
        for prompt in cell.prompts
    )
    return hash_json([fingerprint for *_, fingerprint in ordered])
