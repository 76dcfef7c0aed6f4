"""Attention of a chunk on what is cached, without a mask and without copies of keys.

A chunk's queries see every cached key, so that only their own square is causal. transformers gives SDPA one mask over all of it, which
the CPU's kernel turns into floats layer by layer, which on a card rules FlashAttention out, and for which the cached keys and values are repeated for each head of
a group. Here, on a card, the kernel itself knows that the last query sees the last key. The CPU's does not: a chunk attends in two pieces, to what stands before and to
squares of itself, whose heads of a group are queries of one head. So do, on both, the rows that go on from the same keys, which are not copied for each. Pieces are joined by their log-sum-exps: the softmax over both, to
rounding (Dao et al., FlashAttention, arXiv 2205.14135, §3.1, for blocks of keys). A single query, of which a generated token has one, sees
all that its mask leaves, and is one piece.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from harness_ext.models import last_layer
from harness_ext.models.kernels import KERNELS, STEPS

NAME = "sdpa#pieces"
"""Before the mark: what it computes."""
UNUSUAL = ("position_bias", "softcap", "dropout", "s_aux")
"""What the pieces do not know."""
KNOWN = frozenset({"position_ids", *UNUSUAL})
"""Tensors that attention may be given beside queries, keys, values and a mask. Another says what to attend to: sparse attention picks keys so."""
OWN_MASK = re.compile(r"_attn_implementation\s+in\s*[(\[{][^)\]}]*sdpa")
"""In a family's code: under PyTorch's own attention, called by its name, it puts into the mask what it leaves to the kernel under others."""
SQUARE = 256
"""Tokens of a chunk that attend to each other at a time on the CPU, whose kernel computes the masked half of their square too."""
SHARED = "_begins_with"
"""On keys and values: those of one row that stand before each of theirs."""


def install(model: Any) -> bool:
    """Puts it in place of SDPA where a model uses that, on devices that there is a kernel for; whether it did."""
    can_set = getattr(model, "_can_set_attn_implementation", None)
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or can_set is None or not can_set():
        return False
    if not {weight.device.type for weight in model.parameters()} <= {*KERNELS, "meta"}:  # meta: brought in when they are used
        return False
    if any(OWN_MASK.search(_read_source(name)) for name in {type(module).__module__ for module in model.modules()}):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    model.set_attn_implementation(NAME)
    return True


def _read_source(module: str) -> str:
    """The code of a module; empty where there is none to be read."""
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


def is_installed(model: Any) -> bool:
    """Whether it is in place."""
    return getattr(model.config, "_attn_implementation", None) == NAME


def remove(model: Any) -> bool:
    """Puts SDPA back; whether there was anything to put back."""
    if not is_installed(model):
        return False
    model.set_attn_implementation("sdpa")
    return True


@contextlib.contextmanager
def set_aside(model: Any) -> Iterator[None]:
    """Within it SDPA attends, where this is in its place."""
    was_there = remove(model)
    try:
        yield
    finally:
        if was_there:
            model.set_attn_implementation(NAME)


def mask(
    *, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0, mask_function: Any = causal_mask_function, **rest: Any
) -> Tensor | None:
    """None where each query sees all keys up to its own, and SDPA's mask otherwise."""
    plain = mask_function is causal_mask_function and rest.get("attention_mask") is None and rest.get("allow_is_causal_skip", True)
    if plain and int(kv_offset) == 0 and int(q_offset) + q_length == kv_length:
        return None
    given = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
    # Without a mask, SDPA takes the first query to see the first key alone, as in a cache of one size for all; here the last sees the last.
    if 1 < q_length != kv_length:
        rest["allow_is_causal_skip"] = False
    made: Tensor | None = sdpa_mask(**given, mask_function=mask_function, **rest)
    return made


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Outputs (rows, tokens, heads, head_dim) of query (rows, heads, tokens, head_dim) on key and value (rows, key heads, keys, head_dim).

    Zeros for the first queries that a forward has no use for (`last_layer`). Raises NotImplementedError where it is told in a way it does not know
    what to attend to.
    """
    strange = [name for name, given in rest.items() if isinstance(given, Tensor) and name not in KNOWN]
    if strange:
        raise NotImplementedError(f"attention was given {', '.join(strange)}, which it does not know")
    unread = last_layer.count_unread(query.shape[2])
    if unread and (hasattr(key, SHARED) or _is_unusual(query, value, rest)):
        unread = 0
    mask = attention_mask if attention_mask is None or attention_mask.shape[2] == 1 else attention_mask[:, :, unread:]
    outputs = _attend_all(module, query[:, :, unread:], key, value, mask, scaling, is_causal, **rest)
    return (F.pad(outputs, (0, 0, 0, 0, unread, 0)) if unread else outputs), None


def _is_unusual(query: Tensor, value: Tensor, rest: Mapping[str, Any]) -> bool:
    """Whether it is more than the pieces know."""
    return any(isinstance(given, Tensor) or given for given in map(rest.get, UNUSUAL)) or query.shape[-1] != value.shape[-1]


def _attend_all(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    is_causal: bool | None,
    **rest: Any,
) -> Tensor:
    """Outputs as `attend`'s, of all queries."""
    shared = getattr(key, SHARED, None)
    tokens, past = query.shape[2], key.shape[2] - query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unusual = _is_unusual(query, value, rest)
    if shared is not None:
        if attention_mask is not None or unusual or not causal or past:
            raise NotImplementedError("rows that begin with the same keys are attended to without a mask, all at once")
        return _attend(query, key, value, shared, getattr(value, SHARED), scaling).contiguous()
    if tokens == 1 and not unusual and (attention_mask is None or attention_mask.shape[1] == 1):
        return _attend_singly(query, key, value, attention_mask, scaling)
    plain = attention_mask is None and causal and past >= 0 and tokens > 1
    if plain and unusual and past:
        attention_mask = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=query.device).tril(past)[None, None]
    kernel = KERNELS[query.device.type]
    if not plain or unusual or (not past and (tokens <= SQUARE or not kernel.square)):
        given = {"scaling": scaling, "is_causal": is_causal, **rest}
        whole: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **given)[0]
        return whole
    if not kernel.square:
        return kernel.run(query, key, value, is_causal=True, scale=scaling)[0].transpose(1, 2).contiguous()
    outputs, step = [], STEPS.get(query.dtype, 1)
    for start in range(0, tokens, SQUARE):
        first, stop = (past + start) // step * step, past + min(start + SQUARE, tokens)
        own, far = slice(first, stop), slice(first)
        queries = query[:, :, start : start + SQUARE]
        outputs.append(_attend(queries, key[:, :, own], value[:, :, own], key[:, :, far], value[:, :, far], scaling))
    return torch.cat(outputs, dim=1)


def _attend_singly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Outputs as `attend`'s, of one query a row, which sees all keys, or those of a mask (rows, 1, 1, keys): the heads of a group are queries of one head."""
    rows, heads, _, width = query.shape
    packed = query.reshape(rows, key.shape[1], -1, width)
    return F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling).reshape(rows, 1, heads, width)


def put_after(shared: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (rows, key heads, keys, head_dim) that `attend` takes to stand after the `shared` ones, of one row, in each row."""
    for states, before in zip((key, value), shared, strict=True):
        setattr(states, SHARED, before)
    return key, value


def _attend(query: Tensor, own_key: Tensor, own_value: Tensor, far_key: Tensor, far_value: Tensor, scaling: float | None) -> Tensor:
    """Outputs as `attend`'s, of queries on their own keys, causally, and on all the far ones: as many rows of those, or one for all."""
    near, near_weight = KERNELS[query.device.type].run(query, own_key, own_value, is_causal=True, scale=scaling)
    if not far_key.shape[2]:
        first: Tensor = near.transpose(1, 2)
        return first
    far, far_weight = _attend_far(query, far_key, far_value, scaling)
    share = torch.sigmoid(near_weight - far_weight)[..., None]
    if query.dtype.itemsize < 4:
        return torch.lerp(far.float(), near.float(), share.float()).to(query.dtype).transpose(1, 2)
    return torch.lerp(far, near, share).transpose(1, 2)


def _attend_far(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps as `Kernel.run`'s, of queries that all see the same keys, of as many rows or one for all."""
    attend_by = KERNELS[query.device.type].run
    rows, heads, tokens, width = query.shape
    key_rows, key_heads = key.shape[:2]
    if (rows, heads) == (key_rows, key_heads):
        return attend_by(query, key, value, is_causal=False, scale=scaling)
    # (key rows, key heads, queries, head_dim): whatever looks at the same keys is one head's queries.
    split = (key_rows, key_heads, rows // key_rows, heads // key_heads * tokens)
    packed = query.reshape(key_rows, rows // key_rows, key_heads, -1, width).transpose(1, 2)
    outputs, weights = attend_by(packed.reshape(key_rows, key_heads, -1, width), key, value, is_causal=False, scale=scaling)
    outputs = outputs.reshape(*split, width).transpose(1, 2).reshape(query.shape)
    return outputs, weights.reshape(split).transpose(1, 2).reshape(rows, heads, tokens)
