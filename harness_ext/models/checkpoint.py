"""Which files weights are read from: safetensors, which hold numbers alone. A pickle is a program that builds them, and is read only when asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from harness_ext.errors import ModelError

OTHERWISE = ("gguf_file", "autogptq", "gptqmodel")
"""Arguments that name weights of formats of their own."""
ADAPTER = "adapter_model.safetensors"


def prefer_safetensors(pretrained: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """HFLM's arguments with `use_safetensors=True`, where they do not say otherwise. Raises ModelError for an adapter that is a pickle.

    transformers would else fall back to a pickle, and where it is told not to, to weights that a bot has proposed for the model.
    """
    if "use_safetensors" in options or any(options.get(name) for name in OTHERWISE):
        return dict(options)
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    adapters = [name for name in (options.get("peft"), pretrained) if name and (name != pretrained or _is_adapter(name))]
    for name in adapters:
        found = cached_file(
            name,
            ADAPTER,
            revision=options.get("revision") or "main",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is None:
            raise ModelError(_word(str(name), ADAPTER))
    return {**options, "use_safetensors": True}


def explain(pretrained: str, options: Mapping[str, Any], error: OSError) -> Exception:
    """What to raise for weights that cannot be read."""
    lacking = options.get("use_safetensors") and "model.safetensors" in str(error)
    return ModelError(_word(str(options.get("delta") or pretrained), "model.safetensors")) if lacking else error


def _is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").is_file()


def _word(name: str, file: str) -> str:
    return (
        f"{name} has no {file}, and pickled weights (.bin, .pt) can run whatever code is in them, so they are not read; name a "
        "revision that has safetensors, or add use_safetensors=False where you trust who made them"
    )
