"""Learned position tables made longer than they were trained: tiled, clamped, or interpolated (Dosovitskiy et al., arXiv 2010.11929, §3.2).

Named baselines, and opt-in: nothing trains the new rows. Tiled and clamped tables leave the trained positions as they are;
interpolation changes them all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness_ext.errors import ModelError
from harness_ext.models.extensions.method import Method, Setting, Subject
from harness_ext.positions import find_type, table_offset, tables

OWN_WAYS = {
    "reformer": "its table has axes of its own",
    "prophetnet": "it clamps positions by itself",
    "led": "its table is padded to its window",
    "bigbird_pegasus": "its attention switches to blocks with the length",
}


def why_not(subject: Subject) -> str:
    """Why a model's table cannot grow; empty where it can."""
    if "learned" not in subject.schemes:
        return "it has no learned position table"
    return OWN_WAYS.get(find_type(subject.model.config), "")


def tile(rows: Tensor, length: int) -> Tensor:
    """The table again and again: rows (n, width) → (length, width)."""
    return rows[torch.arange(length) % len(rows)]


def clamp(rows: Tensor, length: int) -> Tensor:
    """The last row for every position past the table: rows (n, width) → (length, width)."""
    return rows[torch.arange(length).clamp(max=len(rows) - 1)]


def interpolate(rows: Tensor, length: int) -> Tensor:
    """The table stretched, ends on ends: rows (n, width) → (length, width)."""
    stretched = nn.functional.interpolate(rows.T[None].float(), size=length, mode="linear", align_corners=True)
    return stretched[0].T.to(rows.dtype)


def install(grow: Callable[[Tensor, int], Tensor]) -> Callable[[Subject, Setting], None]:
    """A method that makes every learned table of a model as long as the longest prompt."""

    def install_in(subject: Subject, setting: Setting) -> None:
        """Makes the tables that long. Raises ModelError where one is offloaded."""
        for module in tables(subject.model):
            if module.weight.device.type == "meta":
                raise ModelError(
                    "its position table was to be made longer, and is offloaded, where that would be undone; name a device for it in device_map"
                )
            before = table_offset(module)
            if not hasattr(module, "_harness_ext_rows"):
                module._harness_ext_rows = module.weight.detach().clone()
            offset, rows = module._harness_ext_rows[:before], module._harness_ext_rows[before:]
            old, new = len(module.weight) - before, max(setting.tokens, len(rows))
            module.weight = nn.Parameter(torch.cat((offset, grow(rows, new) if new > len(rows) else rows)), requires_grad=False)
            module.num_embeddings = len(module.weight)
            _grow_buffers(subject.model, old, new)

    return install_in


def _grow_buffers(model: Any, old: int, new: int) -> None:
    """Causal masks and running numbers that some families keep at the table's size."""
    layer_kinds = getattr(model.config, "attention_layers", [])
    for name, module in model.named_modules():
        for field, buffer in list(module._buffers.items()):
            if buffer is None or buffer.shape[-1:] != (old,):
                continue
            if field == "position_ids":
                grown = torch.arange(new).expand(*buffer.shape[:-1], new)
            elif field == "token_type_ids":
                grown = torch.zeros(*buffer.shape[:-1], new)
            elif field == "bias" and buffer.shape[-2:] == (old, old):
                grown = torch.ones(new, new).tril()
                layer = re.search(r"\.(\d+)\.", name)
                if layer and layer_kinds and layer_kinds[int(layer[1])] == "local":  # GPT-Neo's band
                    grown = grown - grown.tril(-model.config.window_size)
                grown = grown.expand(*buffer.shape[:-2], new, new)
            else:
                continue
            module._buffers[field] = grown.to(buffer.device, buffer.dtype).contiguous()


def _method(kind: str, changes: str, grow: Callable[[Tensor, int], Tensor], source: str) -> Method:
    return Method(name=f"table-{kind}", source=source, changes=changes, why_not=why_not, install=install(grow), lifts_limit=True)


TILE = _method("tile", "the learned table is repeated past its end", tile, "a baseline")
CLAMP = _method("clamp", "every position past the learned table has its last row", clamp, "a baseline")
INTERPOLATE = _method(
    "interpolate", "the learned table is stretched to the longest length", interpolate, "Dosovitskiy et al., arXiv 2010.11929, §3.2"
)
