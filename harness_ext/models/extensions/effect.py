"""What is in effect in a loaded model, as a fingerprint: read from its modules, never from what was asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device  # type: ignore[import-untyped]

from harness_ext.models.extensions.rotary import find_rotaries
from harness_ext.positions import read_hard_limit, tables

Effect = dict[str, Any]
"""`frequencies`: hash over all rotary frequencies to `DIGITS`, as the modules give them at position 1; `slowest_wavelength`: of them, in tokens; `attention_factor`: the
rotary modules' (one number, or one for each set); `table`: hash over the position tables; `limit`: where the model ends, in tokens;
`attention`: the implementation, with a method's numbers where one is placed. None where a model has no such thing."""

DIGITS = 4
"""Significant digits of frequencies: their last bits are another power function's on another kind of CPU, and parts of one run are made on several."""


def read_effect(model: Any) -> Effect:
    """The fingerprint of a model as it is now."""
    measured = [rotary.measure() for rotary in find_rotaries(model)]
    limit = read_hard_limit(model.config, model)
    factors = list(dict.fromkeys(round(factor, 6) for _, factor in measured))
    slowest = min((float(found) for frequencies, _ in measured for found in frequencies[frequencies > 0][:1]), default=None)
    return {
        "frequencies": hash_frequencies([frequencies for frequencies, _ in measured]),
        "slowest_wavelength": slowest and float(f"{2 * torch.pi / slowest:.{DIGITS}g}"),
        "attention_factor": factors[0] if len(factors) == 1 else factors or None,
        "table": _hash([_read_rows(table).numpy().tobytes() for table in tables(model)]),
        "limit": limit and limit.tokens,
        "attention": str(getattr(model.config, "_attn_implementation", None)).partition("#")[0],
    }


def hash_frequencies(measured: Sequence[torch.Tensor]) -> str | None:
    """Of one tensor for each set of frequencies, in radians a token; None where there is none.

    >>> hash_frequencies([torch.tensor([1.0, 0.1])]) == hash_frequencies([torch.tensor([1.0, 0.1 + 1e-8])])
    True
    """
    return _hash([" ".join(f"{frequency:.{DIGITS - 1}e}" for frequency in each.tolist()).encode() + b"\n" for each in measured])


def _read_rows(table: Any) -> torch.Tensor:
    """A table's rows, brought in where they are offloaded; none where they are nowhere, as in a model without weights."""
    with align_module_device(table):
        rows: torch.Tensor = table.weight.detach()
        return rows.new_empty(0, device="cpu") if rows.is_meta else rows.to("cpu", torch.float32)


def _hash(parts: Sequence[bytes]) -> str | None:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16] if parts else None
