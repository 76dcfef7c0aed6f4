"""What a run was made with, for whoever has to repeat it or to trust it: weights, positions, hardware, packages; read from what is loaded."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils import align_module_device  # type: ignore[import-untyped]

from harness_ext import positions

PACKAGES = ("harness_ext", "lm_eval", "transformers", "torch", "accelerate")
SAMPLE = 64
"""Values of each parameter that go into the weights' fingerprint."""


def describe(model: Any, config: Any, device: torch.device, weights: str) -> dict[str, Any]:
    """For the results file. `config`: the checkpoint's, as it was before any argument changed it; `weights`: their fingerprint."""
    trained, limit = positions.read_trained_length(config), positions.read_hard_limit(config, model)
    return {
        "model_type": positions.find_type(config),
        "position_scheme": "+".join(positions.read_schemes(config, model)) or "unknown",
        "hard_limit": limit and limit.tokens,
        "config_trained_length": trained and {"tokens": trained.tokens, "source": trained.source},
        "weights_fingerprint": weights,
        "hardware": describe_hardware(model, device),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def hash_weights(model: Any) -> str:
    """SHA-256 over each parameter's name, shape, and `SAMPLE` of its values, evenly spread; empty where values are not at hand.

    A sample, so that a model of any size takes seconds: it tells checkpoints and revisions apart, and is no proof against someone
    who changes single values. The values are read as float32, in the dtype they were loaded in; what is offloaded is brought in, module by
    module, and is the same wherever it lies.
    """
    found, tied = hashlib.sha256(), getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters())
    for name in sorted(parameters):
        if tied.get(name) in parameters:  # offloading takes tied weights apart
            continue
        values = _sample(model, name)
        if values is None:
            return ""
        found.update(f"{name} {tuple(parameters[name].shape)} ".encode() + values.numpy().tobytes())
    return found.hexdigest()


def _sample(model: Any, name: str) -> torch.Tensor | None:
    """Some values of a parameter, in float32; None where they are nowhere."""
    path, _, field = name.rpartition(".")
    module = model.get_submodule(path)
    with align_module_device(module):
        flat = getattr(module, field).detach().reshape(-1)
        if flat.device.type == "meta":
            return None
        places = np.linspace(0, max(0, flat.numel() - 1), SAMPLE).astype(np.int64)[: flat.numel()]
        values: torch.Tensor = flat[torch.from_numpy(places).to(flat.device)].to("cpu", torch.float32)
        return values


def hash_vocabulary(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's tokens and their numbers, and which of them are special."""
    return hashlib.sha256(repr([sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_tokens)]).encode()).hexdigest()


def list_facts(model: Any, device: torch.device) -> dict[str, Any]:
    """What answers follow from beside weights and prompts, down to their last bits."""
    return {
        "config": model.config.to_json_string(use_diff=False),
        "adapters": {name: _to_text(adapter) for name, adapter in (getattr(model, "peft_config", None) or {}).items()},
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "device": device.type,
        "placed": {name: str(place) for name, place in (getattr(model, "hf_device_map", None) or {}).items()},
        "threads": torch.get_num_threads(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _to_text(config: Any) -> str:
    """A PEFT adapter's config, the same in each process: sets have no order."""
    values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return repr(sorted((name, sorted(map(str, value)) if isinstance(value, set) else str(value)) for name, value in values.items()))


def describe_hardware(model: Any, device: torch.device) -> dict[str, Any]:
    """Device type, name, number (of cards that hold weights, or of cores) and memory (bytes, of one), and the platform."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        name, count, memory = card.name, len({str(weight.device) for weight in model.parameters()}), card.total_memory
    else:
        name, count, memory = _name_processor(), os.cpu_count() or 1, psutil.virtual_memory().total
    return {"device": device.type, "name": name, "count": count, "memory_bytes": memory, "platform": platform.platform()}


def _name_processor() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
