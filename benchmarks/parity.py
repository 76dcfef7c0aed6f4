"""The same prompts through every backend that runs here: `python benchmarks/parity.py [--smollm2 FOLDER] [--out FOLDER]`.

Each row is one run of lm_eval, compared prompt for prompt with `hf` in the same type, and `hf` in bfloat16 with `hf` in float32. The embedded reference/rope
at 128, 256 and 512 tokens (twice its trained length); SmolLM2-135M-Instruct (`python benchmarks/smollm2.py FOLDER`) at 512 and 1,024, in float32 and bfloat16.
The server is the tests' own (tests/servers.py), over the same weights in the same type. A run that is there in `--out` is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

Answer = tuple[str, float | None, str]
"""(verdict, log-likelihood where it was scored, text where it was generated)."""


@dataclass(frozen=True)
class Row:
    """One way to run a model."""

    said: str
    model: str
    dtype: str
    arguments: str
    """Of the model, beside its name and type; for a server, beside its address."""
    options: tuple[str, ...] = ()
    processes: int = 1


def list_rows(dtypes: Sequence[str], longest: int, *, few: bool) -> list[Row]:
    """Every way, or for a model that takes long a `few` of them; in each type `hf` first."""
    rows = []
    for dtype in dtypes:
        rows += [
            Row("`hf`", "hf", dtype, f",max_length={longest}"),
            Row("`hf-extrapolate`", "hf-extrapolate", dtype, ""),
            Row("`hf-extrapolate`, `--batch_size 4`", "hf-extrapolate", dtype, "", ("--batch_size", "4")),
            Row("`hf-extrapolate`, `exact=True`", "hf-extrapolate", dtype, ",exact=True"),
            Row("`hf-extrapolate`, 2 processes (`torchrun`)", "hf-extrapolate", dtype, "", processes=2),
            Row("`hf-extrapolate`, 4 processes (`torchrun`)", "hf-extrapolate", dtype, "", processes=4),
            Row("`api-extrapolate`, token ids", "api-extrapolate", dtype, ""),
            Row("`api-extrapolate`, texts, 4 at a time", "api-extrapolate", dtype, ",tokenized_requests=False,num_concurrent=4"),
        ]
    return [
        row
        for row in rows
        if not few or (row.processes == 1 and not row.options and "exact" not in row.said and "texts" not in row.said)
    ]


@contextlib.contextmanager
def serving(folder: str, dtype: str) -> Iterator[str]:
    """The address of the tests' server over a model."""
    import servers
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with servers.serve(servers.Model(model, AutoTokenizer.from_pretrained(folder))) as served:
        yield served.url


def run(row: Row, folder: str, tasks: str, metadata: str, out: Path) -> dict[tuple[str, str, str], Answer]:
    """(task, prompt's fingerprint, values) → the answer to it."""
    if not list(out.rglob("samples_*.jsonl")):
        # `accelerate launch --cpu --num_processes N` starts one process, whatever N (accelerate 1.15).
        launcher = [] if row.processes == 1 else ["torch.distributed.run", "--nproc-per-node", str(row.processes), "-m"]
        with serving(folder, row.dtype) if row.model == "api-extrapolate" else contextlib.nullcontext("") as address:
            given = f"base_url={address},model=served,tokenizer={folder}" if address else f"pretrained={folder},dtype={row.dtype}"
            command = [sys.executable, "-m", *launcher, "lm_eval", "--model", row.model, "--model_args", given + row.arguments]
            command += ["--tasks", tasks, "--metadata", metadata, "--output_path", str(out), "--log_samples", *row.options]
            command += [] if address else ["--device", "cpu"]
            environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
            ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if ran.returncode:
            sys.exit(f"{' '.join(command)}\n{ran.stderr[-3000:]}")
    found = {}
    for file in out.rglob("samples_*.jsonl"):
        for line in file.read_text().splitlines():
            sample = json.loads(line)
            said = sample["resps"][0][0]
            score, text = (None, said) if isinstance(said, str) else (float(said[0]), "")
            key = (file.name.split("_2")[0], sample["doc"]["prompt_fingerprint"], str(sample["doc"]["values"]))
            found[key] = (str(sample["filtered_resps"][0]), score, text)
    return found


def compare(row: Row, found: dict[tuple[str, str, str], Answer], known: dict[tuple[str, str, str], Answer]) -> str:
    """A line of the table."""
    if found.keys() != known.keys():
        sys.exit(f"{row.said}: {len(found.keys() ^ known.keys())} prompts are not those of hf")
    pairs = [(found[key], known[key]) for key in known]
    verdicts = sum(one[0] == other[0] for one, other in pairs)
    texts = [one[2] == other[2] for one, other in pairs if other[1] is None]
    far = max(abs(one[1] - other[1]) for one, other in pairs if one[1] is not None and other[1] is not None)
    return f"| {row.said} | {row.dtype} | {verdicts} of {len(pairs)} | {far:.2g} | {sum(texts)} of {len(texts)} |"


def main() -> None:
    """Prints the tables."""
    from harness_ext.model_view import resolve

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "parity")
    given = parser.parse_args()
    asked: list[tuple[str, str, list[str], dict[str, Any]]] = [
        ("reference/rope", resolve("reference/rope"), ["float32"], {"lengths": [128, 256, 512], "samples": 4, "depths": 3})
    ]
    if given.smollm2:
        few = {"lengths": [512, 1024], "samples": 1, "depths": 2}
        asked.append((given.smollm2.name, str(given.smollm2), ["float32", "bfloat16"], few))
    for name, folder, dtypes, metadata in asked:
        print(f"\n| {name} | | verdicts equal | log-likelihoods, nats apart at most | texts equal |\n|---|---|---|---|---|")
        known: dict[tuple[str, str, str], Answer] = {}
        for row in list_rows(dtypes, max(metadata["lengths"]) + 1, few=len(dtypes) > 1):
            out = given.out / re.sub("[^A-Za-z0-9]+", "-", f"{name} {row.dtype} {row.said}").strip("-")
            found = run(
                row, folder, "passkey_extrapolate,niah_single_extrapolate,passkey_extrapolate_generate", json.dumps(metadata), out
            )
            print(compare(row, found, known or found), flush=True)
            known = found if row.model == "hf" else known


if __name__ == "__main__":
    main()
