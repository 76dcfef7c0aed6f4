"""An evaluation in parts on a Ray cluster, joined at the end.

    python examples/ray_shards.py --parts 16 --gpus 1 --out /shared/out \\
        --model vllm-extrapolate --model_args pretrained=org/name --tasks extrapolate_generate

runs on the cluster that RAY_ADDRESS names, or on this machine. The arguments that are not its own are lm_eval's; `--out` is a folder that
all machines see, and all have this package. Ray gives each part its cards (CUDA_VISIBLE_DEVICES), waits where there are none, and
runs a part elsewhere whose machine is lost; there it goes on where it was. A model larger than a machine: `--gpus 0` and
`distributed_executor_backend=ray` among vLLM's model arguments, which then takes its cards from Ray itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import ray

RETRIES = 3
"""Of a part whose machine is lost."""


@ray.remote(max_retries=RETRIES)
def run_part(number: int, parts: int, out: str, arguments: list[str]) -> str:
    """Runs one part, unless its results are there; what it said of itself. Raises RuntimeError where it failed."""
    if any(Path(f"{out}/part-{number}").rglob("results_*.json")):
        return f"part {number}/{parts} is there"
    command = ["harness-ext", "run", "--shard", f"{number}/{parts}", *arguments]
    ran = subprocess.run(
        ["env", f"HARNESS_EXT_CACHE={out}/unfinished", *command, "--output_path", f"{out}/part-{number}", "--log_samples"],
        capture_output=True,
        text=True,
    )
    said = next((line for line in reversed(ran.stderr.splitlines()) if "Error" in line or line.startswith("part ")), "")
    if ran.returncode:
        raise RuntimeError(f"part {number}/{parts} failed: {said}")
    return said


def main() -> int:
    """Runs all parts; joins them where none has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--parts", type=int, required=True)
    parser.add_argument("--gpus", type=float, default=1, help="a part's; default: 1")
    parser.add_argument("--cpus", type=float, default=1, help="a part's; default: 1")
    parser.add_argument("--out", type=Path, required=True)
    asked, arguments = parser.parse_known_args()
    ray.init()
    out, failed = str(asked.out.resolve()), 0
    part = run_part.options(num_gpus=asked.gpus, num_cpus=asked.cpus)
    waiting = [part.remote(number, asked.parts, out, arguments) for number in range(1, asked.parts + 1)]
    while waiting:
        [done], waiting = ray.wait(waiting)
        try:
            print(ray.get(done))
        except ray.exceptions.RayError as error:
            failed += 1
            print(str(error).strip().splitlines()[-1], file=sys.stderr)
    if failed:
        print(f"{failed} of {asked.parts} parts failed; the same command runs them again, and no others", file=sys.stderr)
        return 1
    return subprocess.run(
        ["harness-ext", "merge", *(f"{out}/part-{number}" for number in range(1, asked.parts + 1)), "--output_path", out]
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
