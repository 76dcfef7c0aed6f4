"""What is kept of compiled kernels and products in half precision on a CPU: `python benchmarks/compiled.py [--dtype bfloat16]`.

A JSON line each, MiB that are resident beyond what was before: after attention of 3,000 pieces of any length on caches of any length, as they are
given to PyTorch's kernel and as `pieces` gives them; after products of 2,000 lengths, with PyTorch's own bounds and with ours. Linux; a process each.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys

import psutil
import torch
import torch.nn.functional as F

from harness_ext.models import onednn, pieces

CALLS, LENGTHS = 3000, 2000
HEADS, WIDTH = 4, 32
HIDDEN, WIDE = 576, 1536
OWN = dict.fromkeys(onednn.KEPT, "1024")
"""What oneDNN and PyTorch keep unless they are told otherwise."""


def read_resident() -> int:
    """Bytes, after the C library gave back what it did not use."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def attend(dtype: torch.dtype, *, in_pieces: bool) -> None:
    """Attention of one piece after the other."""
    rng, module = random.Random(0), argparse.Namespace(is_causal=True)
    query, key, value = (torch.randn(1, HEADS, length, WIDTH).to(dtype) for length in (512, 4096, 4096))
    for _ in range(CALLS):
        tokens = rng.randrange(2, 512)
        keys = tokens + rng.randrange(1, 4096 - 512)
        given = query[:, :, :tokens], key[:, :, :keys], value[:, :, :keys]
        if in_pieces:
            pieces.attend(module, *given, None)
        else:
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given)


def multiply(dtype: torch.dtype) -> None:
    """Products of one length after the other."""
    states, weight = torch.randn(LENGTHS + 1, HIDDEN).to(dtype), torch.randn(WIDE, HIDDEN).to(dtype)
    for length in range(1, LENGTHS + 1):
        F.linear(states[:length], weight)


WAYS = {
    "attention as it is given": lambda dtype: attend(dtype, in_pieces=False),
    "attention in pieces": lambda dtype: attend(dtype, in_pieces=True),
    "products, PyTorch's bounds": multiply,
    "products, our bounds": multiply,
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way is None:
        for way in WAYS:
            bounds = OWN if way.endswith("PyTorch's bounds") else {name: str(count) for name, count in onednn.KEPT.items()}
            command = [sys.executable, __file__, "--dtype", given.dtype, "--way", way]
            subprocess.run(command, env={**os.environ, **bounds}, check=True)
        return
    dtype = getattr(torch, given.dtype)
    before = read_resident()
    WAYS[given.way](dtype)
    grown = round((read_resident() - before) / 2**20)
    on = {"threads": torch.get_num_threads(), "vectors": torch.backends.cpu.get_cpu_capability(), "dtype": given.dtype}
    print(json.dumps({"row": given.way, **on, "mebibytes": grown}))


if __name__ == "__main__":
    main()
