"""Several processes under accelerate give, prompt for prompt, what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

METADATA = {"samples": 4, "depths": 3, "lengths": [128, 256, 512]}
ASKED = [
    "--model",
    "hf-extrapolate",
    "--model_args",
    "pretrained=reference/rope",
    "--tasks",
    "passkey_extrapolate,loss_extrapolate",
]


def run(out: Path, *launcher: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Each prompt's record and answer, in order, and what was read."""
    command = [sys.executable, "-m", *launcher, "lm_eval", *ASKED, "--metadata", json.dumps(METADATA)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ran = subprocess.run(
        [*command, "--output_path", str(out), "--log_samples"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows: list[dict[str, Any]] = []
    for file in out.rglob("samples_*.jsonl"):
        rows += [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 36 + 4 * len({row["doc"]["edge"] for row in rows if "edge" in row["doc"]})
    (results,) = out.rglob("results_*.json")
    kept = ({name: row[name] for name in ("doc", "resps", "filtered_resps", "metrics")} for row in rows)
    ordered = sorted(kept, key=lambda row: json.dumps(row["doc"], sort_keys=True))
    return ordered, json.loads(results.read_text())["config"]["reading"]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_answer_every_prompt_once_and_as_one_process_does(processes: int, tmp_path: Path) -> None:
    # `accelerate launch --cpu --num_processes N` starts one process, whatever N (accelerate 1.15)
    (alone, read), launcher = run(tmp_path / "one"), ("torch.distributed.run", "--nproc-per-node", str(processes), "-m")
    several, together = run(tmp_path / "several", *launcher)
    assert [row["doc"] for row in several] == [row["doc"] for row in alone]
    for row, known in zip(several, alone, strict=True):
        (((likelihood, greedy),),), (((expected, expected_greedy),),) = row["resps"], known["resps"]
        assert (float(likelihood), greedy) == (pytest.approx(float(expected), abs=1e-4), expected_greedy)
        assert row["metrics"] == known["metrics"]
        if "edge" not in row["doc"]:
            assert row["filtered_resps"] == known["filtered_resps"]
    assert together["asked"] == read["asked"]
    assert len(together["processes"]) == processes
    assert read["computed"] <= together["computed"] == sum(together["processes"]) <= 1.15 * read["computed"]
    assert max(together["processes"]) <= 1.3 * together["computed"] / processes
