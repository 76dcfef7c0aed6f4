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


def run(out: Path, *launcher: str) -> list[str]:
    """Each prompt's record and answer, as JSON, in order."""
    command = [sys.executable, "-m", *launcher, "lm_eval", *ASKED, "--metadata", json.dumps(METADATA)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "--output_path", str(out), "--log_samples"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows: list[dict[str, Any]] = []
    for file in out.rglob("samples_*.jsonl"):
        rows += [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 36 + 4 * len({row["doc"]["edge"] for row in rows if "edge" in row["doc"]})
    return sorted(json.dumps({name: row[name] for name in ("doc", "resps", "filtered_resps", "metrics")}) for row in rows)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_answer_every_prompt_once_and_as_one_process_does(processes: int, tmp_path: Path) -> None:
    alone = run(tmp_path / "one")
    launcher = ("accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "-m")
    assert run(tmp_path / "several", *launcher) == alone
