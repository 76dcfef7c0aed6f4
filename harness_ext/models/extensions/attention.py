"""Attention changed at its border: a function of ours in transformers' attention interface, in front of or in place of the model's.

A family whose attention does not go through the interface accepts the name and ignores it, so that the calls are counted.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from harness_ext.errors import ModelError
from harness_ext.models.extensions import rotary
from harness_ext.models.extensions.method import Subject
from harness_ext.positions import read_window

PREFIX = "harness_ext_"
NUMBERS = itertools.count()
SCORES = 2**25
"""Scores held at a time, over heads, queries and keys: 128 MB in float32."""


def why_not(subject: Subject) -> str:
    """Why the attention of a model cannot be changed; empty where it can."""
    if subject.model.config.is_encoder_decoder:
        return "it is an encoder and a decoder"
    if "recurrent" in subject.schemes and len(subject.schemes) == 1:
        return "it has no attention"
    can_set = getattr(subject.model, "_can_set_attn_implementation", None)  # of the model itself, where an adapter wraps it
    if can_set is None or not can_set() or "harness_ext" in can_set.__self__.__module__:
        return "its attention does not go through transformers' attention interface"
    return ""


def why_not_turned(subject: Subject) -> str:
    """Why queries and keys of a model cannot be turned on; empty where they can."""
    config = subject.model.config
    if "rotary" not in subject.schemes:
        return "it has no rotary angles that are computed"
    if any(name in subject.schemes for name in ("none", "recurrent")):
        return "only some of its layers take positions"
    if read := [rotary.layer_type for rotary in rotary.find_rotaries(subject.model) if rotary.layer_type]:
        return f"its layer types ({', '.join(read)}) have angles of their own"
    if getattr(config, "sliding_window", None) and read_window(config):
        return "some of its layers see a sliding window"
    if hasattr(config, "qk_rope_head_dim"):
        return "it turns a part of its latent queries and keys in a way of its own"
    if any(hasattr(module, "sinks") for module in subject.model.modules()):
        return "its attention has learned sinks"
    return why_not(subject) or rotary.why_not(subject)


def place(model: Any, name: str, function: Callable[..., tuple[Tensor, Any]], mask: str) -> None:
    """Puts an attention function in effect under `harness_ext_NAME`, with the masks that implementation `mask` gets.

    Raises ModelError where a forward does not call it.
    """
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        nonlocal calls
        calls += 1
        return function(*args, **kwargs)

    full = f"{PREFIX}{name}#{next(NUMBERS)}"  # a name of its own for each model, since the table of names is the process's
    AttentionInterface.register(full, counted)
    AttentionMaskInterface.register(full, {"sdpa": sdpa_mask, "eager": eager_mask}.get(mask) or ALL_MASK_ATTENTION_FUNCTIONS[mask])
    model.set_attn_implementation(full)
    with torch.inference_mode():
        model(torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device))
    if not calls:
        raise ModelError(f"{type(model).__name__} was given another attention, and did not call it; this method does not apply")


def scaled(model: Any, name: str, scale: Callable[[Tensor], Tensor]) -> None:
    """Multiplies queries by `scale(positions)`, (batch or 1, tokens) → the same shape, before the model's own attention."""
    own = _own_implementation(model)

    def function(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        factors = scale(_positions(query, key, kwargs.get("position_ids")))
        forward = ALL_ATTENTION_FUNCTIONS[own] if own in ALL_ATTENTION_FUNCTIONS else _eager(module)
        answer: tuple[Tensor, Any] = forward(module, query * factors[:, None, :, None].to(query.dtype), key, *args, **kwargs)
        return answer

    place(model, name, function, own)


def split(model: Any, name: str, near: int, sinks: int | None, turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Attention whose far keys are seen at other positions than their own.

    Keys fewer than `near` tokens back are seen as they are; farther ones (only the first `sinks` of the sequence, where that is a
    number) at the positions that `turn(queries' positions, keys' positions)` gives, both (batch or 1, tokens).
    """
    (found,) = rotary.find_rotaries(model)[:1]

    def function(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention as transformers' interface has it."""
        groups = query.shape[1] // key.shape[1]
        tokens, keys = query.shape[2], key.shape[2]
        at = _positions(query, key, kwargs.get("position_ids"))
        seen_at = at[:, -1:] - torch.arange(keys - 1, -1, -1, device=query.device)  # padding before the first token is negative
        query_far, key_far = turn(at, seen_at)
        far_key = rotary.rotate(module, found, key, key_far - seen_at)
        far_query = rotary.rotate(module, found, query, query_far - at)
        key, far_key, value = (x.repeat_interleave(groups, dim=1) for x in (key, far_key, value))
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = max(16, SCORES // (query.shape[1] * keys))
        out = []
        for start in range(0, tokens, rows):
            block, end = slice(start, start + rows), min(keys, keys - tokens + start + rows)
            distance = at[:, block, None] - seen_at[:, None, :end]
            allowed = distance[:, None] >= 0
            if attention_mask is not None:
                allowed = allowed & attention_mask[:, :, block, :end]
            if sinks is not None:
                allowed = allowed & ((distance < near) | (seen_at[:, None, :end] < sinks))[:, None]
            scores = query[:, :, block].float() @ key[:, :, :end].float().transpose(-1, -2)
            far = far_query[:, :, block].float() @ far_key[:, :, :end].float().transpose(-1, -2)
            scores = torch.where(distance[:, None] < near, scores, far) * scaling
            softcap = kwargs.get("softcap")
            scores = torch.tanh(scores / softcap) * softcap if softcap else scores
            weights = torch.softmax(scores.masked_fill(~allowed, torch.finfo(scores.dtype).min), dim=-1)
            out.append(weights.to(value.dtype) @ value[:, :, :end])
        return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None

    place(model, name, function, "sdpa")


def _own_implementation(model: Any) -> str:
    """The implementation that the model came with, whatever was placed in front of it since."""
    if not hasattr(model, "_harness_ext_attention"):
        model._harness_ext_attention = model.config._attn_implementation
    return str(model._harness_ext_attention)


def _eager(module: Any) -> Callable[..., Any]:
    found = getattr(inspect.getmodule(type(module)), "eager_attention_forward", None)
    if found is None:
        raise ModelError(f"{type(module).__name__} has no eager attention to go on with; this method does not apply")
    return found  # type: ignore[no-any-return]


def _positions(query: Tensor, key: Tensor, given: Tensor | None) -> Tensor:
    """Positions of the queries, (batch or 1, tokens): those that the model was given, or their places in the sequence."""
    tokens, keys = query.shape[2], key.shape[2]
    if given is not None and given.shape[-1] == tokens:
        return given
    return torch.arange(keys - tokens, keys, device=query.device)[None]
