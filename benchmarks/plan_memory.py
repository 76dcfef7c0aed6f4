"""What `harness-ext plan` says of memory, beside what a process takes: each case in a process of its own, on the CPU, on Linux.

python benchmarks/plan_memory.py

Random Llamas (hidden 512, 8 layers, 8 heads, vocabulary 32,000; `gqa`: 2 heads of keys) and a Mamba 2 (hidden 512, 4 layers), and the
embedded model. Measured: the most resident memory while one prompt is scored, over what the process held before, after a shorter prompt and
after the C library gave back what it did not use. Of what is planned in half precision, 384 MiB are what oneDNN may come to keep in a long run, which one prompt does not.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 2**20
LLAMA = {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 32000, "intermediate_size": 1408, "num_attention_heads": 8}
LLAMA["max_position_embeddings"] = 4096
MAMBA = {"hidden_size": 512, "num_hidden_layers": 4, "vocab_size": 32000, "num_heads": 16, "head_dim": 64}
MAMBA |= {"state_size": 64, "chunk_size": 64, "n_groups": 1}
MODELS = {"llama": ("llama", LLAMA), "gqa": ("llama", {**LLAMA, "num_key_value_heads": 2}), "mamba2": ("mamba2", MAMBA)}
CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    ("reference/rope", 2048, 5, {}),
    ("llama", 1024, 5, {}),
    ("llama", 4096, 5, {}),
    ("llama", 4096, 5, {"dtype": "bfloat16"}),
    ("llama", 4096, 5, {"attn_implementation": "eager"}),
    ("llama", 4096, 2000, {}),
    ("llama", 4096, 5, {"exact": True}),
    ("gqa", 4096, 5, {}),
    ("gqa", 8192, 5, {}),
    ("gqa", 4096, 5, {"attn_implementation": "eager", "dtype": "bfloat16"}),
    ("mamba2", 2048, 5, {}),
    ("mamba2", 2048, 5, {"exact": True}),
]
"""Model, tokens, tokens that are scored, arguments."""


def main() -> None:
    """Prints one row a case."""
    print(f"{'model':<15} {'tokens':>6} {'scored':>6} {'measured':>9} {'planned':>9}   MiB, beside the weights")
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        for name, tokens, scored, options in CASES:
            path = name if name.startswith("reference/") else str(Path(folder) / name)
            given = json.dumps([path, tokens, scored, options])
            done = subprocess.run([sys.executable, __file__, given], capture_output=True, text=True, check=True)
            measured, planned = json.loads(done.stdout.splitlines()[-1])
            said = f"{planned / measured - 1:+.0%} {' '.join(f'{key}={value}' for key, value in options.items())}"
            print(f"{name:<15} {tokens:>6} {scored:>6} {measured / MIB:>9.1f} {planned / MIB:>9.1f}   {said}", flush=True)


def save(folder: Path) -> None:
    """Random models, with the embedded model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from harness_ext.model_view import load_tokenizer

    for name, (kind, config) in MODELS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).save_pretrained(folder / name)
        load_tokenizer("reference/rope", {}).save_pretrained(folder / name)


def measure(path: str, tokens: int, scored: int, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes measured and planned."""
    import torch

    from harness_ext.models import demand
    from harness_ext.models.hf import HFExtrapolate
    from harness_ext.models.rehearsal import Rehearsal, rehearsing
    from harness_ext.plan import weigh

    lm = HFExtrapolate(pretrained=path, device="cpu", **options)
    lm._reader.prepare(tokens)
    ids = torch.randint(5, 90, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    requests = [(None, ids[:-scored], ids[-scored:])]
    lm._loglikelihood_tokens([(None, ids[:20], ids[20:25])], disable_tqdm=True)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = read_peak()
    lm._loglikelihood_tokens(requests, disable_tqdm=True)
    measured = read_peak() - before
    assert lm._reader.sharing is not None
    make = lm._reader.sharing.make
    with rehearsing(lm):
        assert isinstance(lm._reader, Rehearsal)
        lm._loglikelihood_tokens(requests, disable_tqdm=True)
        rehearsed = lm._reader.end()
    costs = demand.measure(lm._reader.forward, make, chunk=lm._reader.chunk, longest=tokens - 1, generates=False)
    needs = weigh(rehearsed.pieces, costs, whole=make is None, lanes=1)  # one prompt, which one lane reads
    return measured, needs["state_bytes"] + needs["reading_bytes"]


def read_peak() -> int:
    """Bytes of the most resident memory so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
    else:
        main()
