"""PyTorch's attention kernels, called where they say how much was attended to: with log-sum-exps, pieces of an attention can be joined.

SDPA calls the same kernels and keeps those to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers.integrations.sdpa_attention import repeat_kv

aten: Any = torch.ops.aten
LAST_SEES_LAST = 2
"""How the memory-efficient kernel is told that the last query sees the last key; `torch.nn.attention.bias` has the number."""
ALIGNED = 8
"""Numbers of a head that a card's kernels take at a time; heads of other widths are filled up with zeros."""
STEPS = {torch.bfloat16: 32}
"""Type → of how many queries, and keys before them, the CPU's kernel is given a multiple; 1 of other types. Where a processor multiplies tiles of
numbers (AMX), PyTorch 2.13 compiles a kernel for each count of queries and of keys that its blocks leave over, in each thread, and keeps them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """How a kind of device attends."""

    run: Callable[..., tuple[Tensor, Tensor]]
    """(query (rows, heads, queries, head_dim), key and value (rows, key heads, keys, head_dim), is_causal=, scale=) → outputs as the query, and the
    log-sum-exps of its scores (rows, heads, queries). Where it `is_causal`, the last query sees the last key, and each before it one key fewer."""
    square: bool
    """Whether it computes what is masked, too: long pieces are cut into squares."""


def attend_on_cpu(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """As `Kernel.run`: the flash kernel of the CPU, which is causal for as many queries as keys alone: others stand in for those that lack."""
    if key.shape[1] != query.shape[1]:
        key, value = (repeat_kv(states, query.shape[1] // key.shape[1]) for states in (key, value))
    tokens = query.shape[2]
    before = key.shape[2] - tokens if is_causal else 0
    after = -(before + tokens) % STEPS.get(query.dtype, 1)
    if before or after:
        query = F.pad(query, (0, 0, before, after))
    if after and is_causal:
        key, value = (F.pad(states, (0, 0, 0, after)) for states in (key, value))
    outputs, sums = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=is_causal, scale=scale)
    asked = slice(before, before + tokens)
    return outputs[:, :, asked], sums[:, :, asked]


def attend_on_card(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """As `Kernel.run`: FlashAttention in half precision, which repeats no key, and the memory-efficient kernel for what that does not take (float32)."""
    width, tokens = query.shape[-1], query.shape[2]
    scale = width**-0.5 if scale is None else scale
    if width % ALIGNED:
        query, key, value = (F.pad(states, (0, -width % ALIGNED)) for states in (query, key, value))
    if can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, True)):
        outputs, sums, *_ = aten._scaled_dot_product_flash_attention(query, key, value, is_causal=is_causal, scale=scale)
        return outputs[..., :width], sums
    groups = query.shape[1] // key.shape[1]
    turned = (states.transpose(1, 2) for states in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
    bias_and_lengths = (None, None, None, None, None)
    outputs, sums, *_ = aten._efficient_attention_forward(
        *turned, *bias_and_lengths, 0.0, LAST_SEES_LAST if is_causal else 0, compute_log_sumexp=True, scale=scale
    )
    return outputs.transpose(1, 2)[..., :width], sums[..., :tokens]


KERNELS = {"cpu": Kernel(run=attend_on_cpu, square=True), "cuda": Kernel(run=attend_on_card, square=False)}
"""By the type of device that the tensors are on."""
