"""Keep a run: `python benchmarks/keep.py OUT FOLDER` copies lm_eval's output without the prompts' text.

The results file is copied as it is. Of each sample `arguments` are left out, which hold the prompt: a run of long prompts is hundreds of
megabytes of filler that the seed makes again, and lm_eval's `prompt_hash` says whether it did. So is what stands there twice.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import jsonlines

LEFT_OUT = ("arguments", "target", "filter", "doc_hash", "target_hash")


def keep(out: Path, folder: Path) -> None:
    """Copies the newest run in `out`, each file under its name without the time."""
    folder.mkdir(parents=True, exist_ok=True)
    results = max(out.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    shutil.copyfile(results, folder / "results.json")
    stamp = results.stem.removeprefix("results_")
    for samples in sorted(results.parent.glob(f"samples_*_{stamp}.jsonl")):
        name = samples.stem.removeprefix("samples_").removesuffix(f"_{stamp}")
        with jsonlines.open(samples) as rows, jsonlines.open(folder / f"{name}.jsonl", "w", compact=True) as kept:
            for row in rows:
                kept.write({name: value for name, value in row.items() if name not in LEFT_OUT})


if __name__ == "__main__":
    keep(Path(sys.argv[1]), Path(sys.argv[2]))
