"""What oneDNN keeps of the products that it has compiled, which is how PyTorch multiplies in half precision on processors that have instructions for it.

It compiles one for each shape, of half a megabyte to one and a half, and keeps the last 1,024 of a process and of each thread. Prompts that share are read in pieces of
every length, so that is gigabytes, where a forward needs some ten of them (`docs/decisions.md` has the figures).
"""

from __future__ import annotations

import os

import torch

KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 256, "LRU_CACHE_CAPACITY": 64}
"""Products of the process, and of each of its threads: oneDNN's own setting, and that of the layer which PyTorch has between them."""
BYTES = 384 * 2**20
"""Of so many, at most."""


def bound() -> None:
    """Lets it keep so many, unless the environment says otherwise. It looks once, when it first multiplies."""
    for name, count in KEPT.items():
        os.environ.setdefault(name, str(count))


def count_kept(device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that it may come to keep."""
    return BYTES if device.type == "cpu" and dtype.itemsize < torch.float32.itemsize else 0
