"""What each card may take of a model's weights, so that beside them the cache of the longest prompt has room, and the forward that reads it.

transformers shares weights out among the cards that there are (`device_map="auto"`, `parallelize=True`) and fills each with as much as is free:
what a prompt needs beside them it does not know. A layer's keys and values lie on the card that has the layer, so each byte of weights brings its
part of the cache with it. What the longest prompt needs is found by reading it with a model that has shapes and no numbers (torch's meta device).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from harness_ext import positions
from harness_ext.models import machine
from harness_ext.models.demand import count_weights, find_peak, list_tensors
from harness_ext.models.inspection import build_without_weights
from harness_ext.models.rounding import ERRORS
from harness_ext.models.state import Cuttable

log = logging.getLogger(__name__)

LARGEST_MULTIPLE = 8
"""Of the trained length, in a sweep that nobody gave lengths: weights are placed before tasks are known."""
SHAPES = "harness_ext_shapes"
QUANTISED = ("quantization_config", "load_in_8bit", "load_in_4bit", "gguf_file", "autogptq", "gptqmodel")
FEW = 16
"""Tokens that a token's part of the cache is read off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a model and the longest prompt take, in bytes."""

    tokens: int
    """Of the longest prompt."""
    weights: int
    cache: int
    """The longest prompt's keys and values, in all layers; where these are no keys and values, what the config would give them."""
    reading: int
    """The most that a forward holds beside both, on the card that it is on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Who takes what."""

    weights: Mapping[int | str, int]
    """Card → bytes of weights, at the most: accelerate's `max_memory`."""
    said: str
    """What could not be done, in words; empty where everything has room."""


def find_longest(config: Any, trained: int, *, lifted: bool) -> int:
    """The longest prompt, in tokens, that is likely to be asked for where nobody said: `LARGEST_MULTIPLE` times the `trained` length, or the
    end of the position table, unless that is `lifted`."""
    limit = None if lifted else positions.read_hard_limit(config, build_without_weights(config))
    return min(LARGEST_MULTIPLE * trained, limit.tokens if limit else LARGEST_MULTIPLE * trained)


def leave_room(
    config: Any, options: Mapping[str, Any], free: Mapping[int | str, int], *, tokens: int, chunk: int, rows: int
) -> dict[int | str, int]:
    """`max_memory` that leaves room for `rows` prompts of `tokens` tokens, of what is `free` on the cards; says what cannot be done.

    `options`: what the model is loaded with. Quantised weights are not what the config says, and are placed as ever.
    """
    if any(options.get(name) for name in QUANTISED) or getattr(config, "quantization_config", None) is not None:
        log.warning(
            "weights are quantised, of which the config does not say the size: no room is left for the cache; max_memory_per_gpu=N does"
        )
        return dict(free)
    model = build_without_weights(config, **{name: options[name] for name in ("trust_remote_code",) if options.get(name)})
    dtype = options.get("dtype", "auto")
    loaded = (getattr(config, "dtype", None) if dtype == "auto" else dtype) or torch.float32
    model = model.to(getattr(torch, loaded) if isinstance(loaded, str) else loaded)
    need = find_need(model, tokens, chunk, rows)
    cards = {card: size for card, size in free.items() if isinstance(card, int)}
    shares = share_out(need, cards, int(free.get("cpu", 0.9 * machine.read_free().bytes)))
    if shares.said:
        log.warning("%s", shares.said)
    log.info("of each card, weights may take %s, beside %s of cache", shares.weights, _show(need.cache))
    return dict(shares.weights)


@torch.inference_mode()
def find_need(model: Any, tokens: int, chunk: int, rows: int = 1) -> Need:
    """What `model`, on the meta device and in the type it will have, takes with `rows` prompts of `tokens` tokens, read `chunk` at a time.

    The forward is the last chunk's, on a cache of all that stands before it; of attention that is a kernel of its own (SDPA, flash), only
    what goes in and what comes out, and the mask. A model that cannot be read so is taken to have the keys and values that its config gives it.
    """
    weights = count_weights(model)
    try:
        token, reading = _read_shapes(model, tokens, min(chunk, tokens))
    except ERRORS as error:
        log.info("what a forward takes is not known before the weights are there: %s", error)
        token, reading = guess_token(model), 0
    return Need(tokens=tokens, weights=weights, cache=rows * tokens * token, reading=rows * reading)


def share_out(need: Need, free: Mapping[int, int], elsewhere: int) -> Shares:
    """What each card of `free` bytes may take of the weights; `elsewhere`: bytes that are free off the cards.

    On each card, weights w come with w ÷ all weights of the cache, and with a forward: w × (1 + cache ÷ weights) + reading ≤ free.
    What is left of the weights goes elsewhere and is brought to the first card to be used, where its part of the cache then is too
    (accelerate's `dispatch_model`).

    >>> need = Need(tokens=100, weights=80, cache=20, reading=5)
    >>> dict(share_out(need, {0: 55, 1: 55}, 0).weights)
    {0: 40, 1: 40}
    >>> dict(share_out(need, {0: 55, 1: 30}, 70).weights)
    {0: 35, 1: 20, 'cpu': 70}
    """
    kept: dict[int | str, int] = {
        card: max(0, int((bytes_ - need.reading) * need.weights / (need.weights + need.cache))) for card, bytes_ in free.items()
    }
    if sum(kept.values()) >= need.weights:
        return Shares(weights=kept, said="")
    first, *others = free
    brought = need.cache * (need.weights - sum(kept[card] for card in others)) // need.weights
    left = free[first] - need.reading - brought
    shares = {**kept, first: max(0, left), "cpu": elsewhere}
    placed = sum(shares[card] for card in free)
    if left >= 0:
        said = (
            f"{_show(need.weights - placed)} of {_show(need.weights)} weights go to the CPU or the disk, so that {need.tokens} tokens have "
            f"{_show(need.cache)} of room for their cache; max_length=N, for fewer tokens, leaves more of them on the cards"
        )
    else:
        most = max(0, need.tokens * (free[first] - need.reading) // max(1, brought))
        said = (
            f"{need.tokens} tokens have no room on the cards: their cache takes {_show(need.cache)}, of which {_show(brought)} would be on card {first}, and "
            f"{_show(max(0, free[first] - need.reading))} are free there; about {most} tokens would fit. Longer prompts will be out_of_memory; "
            "use more cards or a lower precision"
        )
    return Shares(weights=shares, said=said)


def _read_shapes(model: Any, tokens: int, chunk: int) -> tuple[int, int]:
    """Bytes of a token's keys and values, and of the last chunk's forward."""
    state = Cuttable(tokens + FEW)  # with room, so that nothing grows while it is watched
    read = {"use_cache": True, "past_key_values": state.cache}
    if getattr(model, "_can_set_attn_implementation", lambda: False)() and model.config._attn_implementation != "eager":
        AttentionInterface.register(SHAPES, _attend)
        AttentionMaskInterface.register(SHAPES, sdpa_mask)
        model.set_attn_implementation(SHAPES)
    model(torch.zeros(1, FEW, dtype=torch.long, device="meta"), **read)
    layers = [layer for layer in state.cache.layers if layer.get_seq_length()]
    token = sum(kept.nbytes for layer in layers for kept in (layer.keys, layer.values)) // FEW
    if not token:
        raise ValueError("it keeps no keys and values")
    for layer in layers:
        more = max(0, tokens - chunk - FEW)
        layer.update(*(kept.new_empty(*kept.shape[:-2], more, kept.shape[-1]) for kept in (layer.keys, layer.values)))
    ids = torch.zeros(1, chunk, dtype=torch.long, device="meta")
    return token, find_peak(torch.device("meta"), lambda: model(ids, **read, logits_to_keep=1), list_tensors(layers))


def _attend(module: Any, query: torch.Tensor, key: Any, value: torch.Tensor, mask: torch.Tensor | None, **_: Any) -> Any:
    """What SDPA takes beside what it is given: its output, and the mask in the queries' type."""
    bias = None if mask is None else mask.to(query.dtype)
    rows, heads, tokens, _width = query.shape
    found = query.new_empty(rows, tokens, heads, value.shape[-1])
    del bias
    return found, None


def guess_token(model: Any) -> int:
    """Bytes of a token's keys and values, as a config's numbers give them; a hidden state for each where these differ from layer to layer."""
    config, size = model.config.get_text_config(), int(next(weight.element_size() for weight in model.parameters()))
    try:
        queries = getattr(config, "num_attention_heads", None) or 1
        heads, width = getattr(config, "num_key_value_heads", None) or queries, getattr(config, "head_dim", None)
        each = int(heads * (width or config.hidden_size // queries))
    except (RuntimeError, AttributeError):
        each = int(config.hidden_size)
    return 2 * int(getattr(config, "num_hidden_layers", 1)) * each * size


def _show(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
