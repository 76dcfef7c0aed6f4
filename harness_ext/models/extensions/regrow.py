"""Fixed tables computed anew at the longest length, by the family's own function: sinusoids, rotary angles, MPT's ALiBi bias.

Nothing is invented: positions that the table had keep their rows to the last bit, which is checked.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from harness_ext.errors import ModelError
from harness_ext.models.extensions.method import Method, Setting, Subject
from harness_ext.positions import find_type, tables

BUFFERS = {"gptj": "embed_positions", "codegen": "embed_positions", "ctrl": "pos_encoding"}
EMBEDDINGS = ("pegasus", "marian", "roformer")


def why_not(subject: Subject) -> str:
    """Why no table of a model can be computed anew; empty where one can."""
    kind = find_type(subject.model.config)
    if kind in (*BUFFERS, *EMBEDDINGS, "mpt"):
        return ""
    if "sinusoidal" in subject.schemes:
        return "it computes its sinusoids for any position by itself"
    return "it has no fixed table"


def install(subject: Subject, setting: Setting) -> None:
    model, kind = subject.model, find_type(subject.model.config)
    if kind == "mpt":
        model.config.max_seq_len = max(setting.tokens, subject.trained)
    for module in model.modules() if kind in BUFFERS else ():
        table = module._buffers.get(BUFFERS[kind])
        if table is not None:
            module._buffers[BUFFERS[kind]] = _checked(table, _compute(kind, module, table, setting.tokens))
    for module in tables(model) if kind in EMBEDDINGS else ():
        longer = type(module)(max(setting.tokens, module.num_embeddings), module.embedding_dim)
        rows = _checked(module.weight.detach(), longer.create_weight())
        module.weight, module.num_embeddings = nn.Parameter(rows, requires_grad=False), len(rows)


def _compute(kind: str, module: Any, table: Tensor, tokens: int) -> Tensor:
    code: Any = inspect.getmodule(type(module))
    tokens = max(tokens, len(table))
    if kind == "ctrl":
        computed: Tensor = code.positional_encoding(tokens, table.shape[1], torch.float)
    else:
        computed = code.create_sinusoidal_positions(tokens, table.shape[1])
    return computed


def _checked(old: Tensor, new: Tensor) -> Tensor:
    new = new.to(old.device, old.dtype)
    if not torch.allclose(new[: len(old)], old, atol=1e-3 if old.dtype != torch.float32 else 1e-6):
        raise ModelError(
            "a table computed anew is not the one that the model has; its checkpoint holds another, so it cannot be regrown"
        )
    return new


METHOD = Method(
    name="regrow",
    source="the family's own formula",
    changes="the fixed table is computed up to the longest length",
    why_not=why_not,
    install=install,
    lifts_limit=True,
)
