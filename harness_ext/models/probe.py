"""Where a family that nobody listed ends: one forward at its length and one a token past it, in a process of its own.

On a small random model of the family, since what decides is its code: few layers, a small vocabulary, a length of 64. In a
child, because what happens past a limit may take the process with it.
"""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness_ext.cells import Limit
from harness_ext.positions import LENGTH_FIELDS, is_listed, read_hard_limit, table_sizes, text_config

SHORT = 64
"""Tokens that the small model is configured for."""
SECONDS = 180
FEW_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
FEW_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
VOCABULARY = 512
FAILED = "could not be probed"


LENGTH_NAME = re.compile(r"pos|len|ctx|context|block|seq|window")
"""What a config field that sizes a table may be called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was found."""

    limit: Limit | None
    """Where the model ends; None where it goes on, or where nothing could be found out."""
    said: str
    """In words, what was tried and what happened."""


def find_limit(config: Any, model: Any) -> Probe:
    """Where a model ends: by its family and modules where the family is listed, else by trying. `model` may be on the meta device."""
    if is_listed(config):
        return Probe(limit=read_hard_limit(config, model), said="by its family, config and modules")
    found = probe(config, model)
    if found.said.startswith(FAILED):  # then what its modules look like is all there is
        return Probe(limit=read_hard_limit(config, model), said=found.said)
    return found


def probe(config: Any, model: Any) -> Probe:
    """What a model does one token past its length, tried on a small one of the same class as `model`."""
    text, sizes = text_config(config), table_sizes(model)
    fields = _find_fields(text, sizes)
    try:
        job = pickle.dumps(sys.path) + pickle.dumps((config, type(model), list(fields)))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        return Probe(limit=None, said=f"{FAILED}: it cannot be handed to another process ({error})")
    child = [sys.executable, "-c", "from harness_ext.models.probe import answer; answer()"]
    try:
        ran = subprocess.run(child, input=job, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Probe(limit=None, said=f"{FAILED}: no answer within {SECONDS} s")
    lines = [line.split(" ", 2)[1:] for line in ran.stdout.decode().splitlines() if line.startswith("PROBE ")]
    died = ["", f"the process ended with {ran.returncode}"]
    (at, within), (_, past) = [*lines, died, died][:2]
    if within != "ok":
        why = within if lines else (ran.stderr.decode().strip().splitlines() or [within])[-1]
        return Probe(limit=None, said=f"{FAILED}: a small model of it fails within its own length ({why})")
    if past == "ok":
        return Probe(limit=None, said=f"probed: a small model of it, made for {at} tokens, runs on past them")
    said = f"probed: a small model of it, made for {at} tokens, fails one token later ({past})"
    tokens, where = min(
        ((size, name) for name, size in (sizes or {f"config.{name}": size for name, size in fields.items()}).items())
    )
    return Probe(
        limit=Limit(tokens=tokens, outcome="hard_limit", reason=f"{text.model_type} ends at {tokens} ({where}); {said}"), said=said
    )


def _find_fields(text: Any, sizes: Mapping[str, int]) -> dict[str, int]:
    """The config's fields that may size what ends, and their values: by name, or of the same value and with a likely name."""
    numbers = {name: value for name, value in text.to_dict().items() if isinstance(value, int) and value > 0}
    likely = {name: value for name, value in numbers.items() if LENGTH_NAME.search(name)}
    fields = {name: value for name in LENGTH_FIELDS if isinstance(value := getattr(text, name, None), int) and value > 0}
    known = {*sizes.values(), *fields.values()}
    fields |= {name: value for name, value in likely.items() if value in known}
    return fields or {name: value for name, value in likely.items() if value > SHORT}


def answer() -> None:
    """The child: reads what `probe` hands over, prints what a forward at the small model's length does, then at one more token."""
    import torch

    sys.path[:] = pickle.load(sys.stdin.buffer)
    config, model_class, fields = pickle.load(sys.stdin.buffer)
    torch.manual_seed(0)
    model = _build(config, model_class, fields)
    made_for = min(table_sizes(model).values(), default=SHORT)  # a table that no field was found for is as long as it was
    for tokens in (made_for, made_for + 1):
        ids = torch.full((1, tokens), 7)
        extra = {"decoder_input_ids": ids[:, :1]} if getattr(config, "is_encoder_decoder", False) else {}
        try:
            with torch.no_grad():
                model(ids, **extra)
            print(f"PROBE {tokens} ok", flush=True)
        except (IndexError, RuntimeError, ValueError, AssertionError) as error:
            print(f"PROBE {tokens} {type(error).__name__}: {str(error).splitlines()[0][:160]}", flush=True)


def _build(config: Any, model_class: Any, fields: list[str]) -> Any:
    """A model of `config` at SHORT tokens, with few layers where the family's pattern of layers allows it."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return model_class._from_config(_shrink(config, fields, layers=2)).eval()
    except (ValueError, IndexError, KeyError, RuntimeError, AssertionError, AttributeError, TypeError, StrictDataclassError):
        return model_class._from_config(_shrink(config, fields, layers=None)).eval()


def _shrink(config: Any, fields: list[str], layers: int | None) -> Any:
    small = copy.deepcopy(config)
    text = text_config(small)
    for field in fields:
        setattr(text, field, SHORT)
    for names, count in ((FEW_LAYERS, layers), (FEW_EXPERTS, 4), (("vocab_size",), VOCABULARY)):
        for name in names:
            if count and isinstance(getattr(text, name, None), int):
                setattr(text, name, min(getattr(text, name), count))
    if layers and isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:layers]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), VOCABULARY - 1))
    return small
