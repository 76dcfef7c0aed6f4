"""The circles of a model's rotary pairs: what its weights have seen of them, and the frequencies in effect at a length.

Read from the modules: from what they hold or, where the model stands on the meta device, from the same modules built anew with numbers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness_ext import positions
from harness_ext.angles import Seen
from harness_ext.errors import ModelError
from harness_ext.models.extensions.method import Subject
from harness_ext.models.extensions.rotary import FULL, PER_LENGTH, Rotary, find_rotaries

NEAR = ("sliding_attention", "chunked_attention")
"""Types of layers that see a window only."""
UNTURNED = ("linear_attention", "conv", "mamba", "recurrent")
"""Types of layers that keep a state, and turn nothing."""
Frequencies = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Circles:
    """One set of rotary pairs."""

    layer_type: str
    """Of the layers that turn by it; empty where all are alike."""
    layers: int | None
    """How many those are; None where the config does not tell."""
    of_layers: int | None
    """How many layers there are in all."""
    seen: Seen
    before: str
    """The checkpoint's rope type, where training is that of the model before it was extended so; else empty."""
    read: Callable[[int], Frequencies]
    """Frequencies in effect in a prompt of so many tokens, as the modules are when it is called."""

    def find_unseen(self, length: int) -> tuple[float, ...]:
        """As `Seen.find_unseen`, under what is in effect now."""
        return self.seen.find_unseen(self.read(length), length)


def read_circles(subject: Subject) -> list[Circles]:
    """Each set of rotary pairs of a model that no method has changed yet; none where it has none, or reads both ways.

    In an encoder, distances go both ways, and an arc counts twice. Raises ModelError where modules on the meta device cannot be built anew.
    """
    model = subject.model
    if getattr(model.config, "is_encoder_decoder", False):
        return []
    if "rotary_table" in subject.schemes:
        return list(_read_tables(subject))
    found: dict[tuple[str, Frequencies], Circles] = {}
    rotaries = find_rotaries(model) if "rotary" in subject.schemes else []
    if any(rotary.frequencies.is_meta for rotary in rotaries):
        rotaries = find_rotaries(isolate(model))
    for rotary in rotaries:
        circles = _read_set(rotary, positions.text_config(model.config), subject)
        found.setdefault((circles.layer_type, circles.seen.frequencies), circles)
    return list(found.values())


def find_new(circles: Circles, length: int) -> tuple[int, float]:
    """(pairs that meet angles in a prompt of `length` tokens which training did not show, the share of their angles that is new).

    The share is the mean over those pairs, 0 where there are none.
    """
    unseen = [share for share in circles.find_unseen(length) if share]
    return len(unseen), round(sum(unseen) / len(unseen), 4) if unseen else 0.0


def isolate(model: Any) -> Any:
    """The model's rotary modules alone and with numbers, to be changed without changing the model.

    Raises ModelError where one on the meta device takes other arguments than transformers' own.
    """
    alone: Any = nn.Module()
    alone.config, alone.parts = model.config, nn.ModuleList()
    for module in dict.fromkeys(rotary.module for rotary in find_rotaries(model)):
        try:
            alone.parts.append(type(module)(module.config) if any(b.is_meta for b in module.buffers()) else copy.deepcopy(module))
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ModelError(f"{type(module).__name__} cannot be built by itself: {error!r}") from error
    return alone


def _read_set(rotary: Rotary, config: Any, subject: Subject) -> Circles:
    layers, of_layers = _list_layers(config, rotary.layer_type, subject.schemes)
    window = _read_window(config, layers)
    trained, before = _read_trained(rotary, config, subject.trained)
    turned = [index for index, frequency in enumerate(trained) if frequency]  # Gemma 4 has pairs that never turn

    def read(length: int) -> Frequencies:
        now = rotary.compute({}, length)[0] if _depends_on_length(rotary) else rotary.frequencies
        frequencies = now.tolist()
        return tuple(frequencies[index] for index in turned)

    return Circles(
        layer_type=rotary.layer_type or "",
        layers=len(layers) if layers else None,
        of_layers=of_layers,
        seen=Seen(
            frequencies=tuple(trained[index] for index in turned),
            tokens=min(subject.trained, window or subject.trained),
            window=window,
        ),
        before=before,
        read=read,
    )


def _depends_on_length(rotary: Rotary) -> bool:
    kind = rotary.module.rope_type
    return (kind[rotary.layer_type] if rotary.layer_type else kind) in PER_LENGTH


def _read_trained(rotary: Rotary, config: Any, tokens: int) -> tuple[list[float], str]:
    """(frequencies that the weights were trained with on that many tokens, the extension that they were trained before)."""
    kind = rotary.own.get("rope_type", "default")
    if kind in PER_LENGTH:
        return rotary.compute({}, tokens)[0].tolist(), ""
    length = positions.read_trained_length(config)
    extended = length is not None and "original" in length.source and length.tokens == tokens and kind != "default"
    if extended and hasattr(rotary.module, "compute_default_rope_parameters"):
        return rotary.compute({"rope_type": "default"}, None)[0].tolist(), kind
    return rotary.frequencies.tolist(), ""


def _list_layers(config: Any, layer_type: str | None, schemes: tuple[str, ...]) -> tuple[list[str], int | None]:
    """(types of the layers that turn by a set, empty where the config does not tell; number of all layers)."""
    types = list(getattr(config, "layer_types", None) or [])
    rotating = getattr(config, "no_rope_layers", None)  # 1 is a layer that turns, whatever the name says
    if rotating and types:
        kept = [kind for kind, turns in zip(types, rotating, strict=False) if turns]
    elif layer_type:
        kept = [kind for kind in types if kind == layer_type]
    elif "none" in schemes:
        kept = [kind for kind in types if kind != FULL]
    else:
        kept = [kind for kind in types if kind not in UNTURNED]
    return kept, len(types) or getattr(config, "num_hidden_layers", None)


def _read_window(config: Any, layers: list[str]) -> int | None:
    """Tokens that every one of these layers sees at most."""
    if layers and not set(layers) <= set(NEAR):
        return None
    chunk = getattr(config, "attention_chunk_size", None) if "chunked_attention" in layers else None
    return chunk or positions.read_window(config)


def _read_tables(subject: Subject) -> Iterator[Circles]:
    """Angles of position 1 in a table of sines, then cosines (GPT-J, CodeGen, RoFormer), which no method changes."""
    model = subject.model
    rows = [(module, module._buffers.get("embed_positions")) for module in model.modules()]
    rows += [(module, module.weight) for module in positions.tables(model)]
    module, table = next((module, table) for module, table in rows if table is not None)
    if table.is_meta:
        code: Any = inspect.getmodule(type(module))
        if hasattr(code, "create_sinusoidal_positions"):
            table = code.create_sinusoidal_positions(2, table.shape[1])
        else:
            table = type(module)(2, table.shape[1]).create_weight()
    sine, cosine = table[1].detach().float().cpu().chunk(2)
    frequencies = tuple(torch.atan2(sine, cosine).tolist())
    yield Circles(
        layer_type="",
        layers=None,
        of_layers=getattr(model.config, "num_hidden_layers", None),
        seen=Seen(frequencies=frequencies, tokens=subject.trained),
        before="",
        read=lambda length: frequencies,
    )
