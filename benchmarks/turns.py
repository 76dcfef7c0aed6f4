"""What lanes lose by taking turns in Python: `python benchmarks/turns.py [--rounds N]`.

A part of the embedded model's sweep, read by one lane alone, by one lane for each core, and by more, in turn; and the calls into PyTorch of one forward. As JSON lines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

SAMPLES = 3
"""Of ten: a third of the sweep."""
MORE = 2
"""Lanes than cores, at most."""


class Calls(TorchFunctionMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    from lm_eval.tasks import TaskManager

    import harness_ext
    from harness_ext.models.hf import HFExtrapolate
    from harness_ext.models.journal import Kept

    harness_ext.install()
    lm = HFExtrapolate(pretrained="reference/rope", device="cpu", dtype="float32")
    asked = {"pretrained": "reference/rope", "samples": SAMPLES}
    encoded = []
    for task in TaskManager(include_defaults=False, metadata=asked).load(["extrapolate"])["tasks"].values():
        task.bind(lm)
        task.build_all_requests()
        encoded += [lm._encode_pair(*request.args) for request in task.instances]
    sequences, starts = [[*context, *answer] for context, answer in encoded], [len(context) for context, _ in encoded]
    reader = lm._reader
    reader.prepare(max(map(len, sequences)))
    schedule = lm._plan(sequences, starts, None)

    make = reader._make(1000)
    assert make is not None
    state, cores = make(), torch.get_num_threads()
    with torch.inference_mode():
        for tokens in (500, 400):  # the second stands on the first, and nothing of it is scored
            with Calls() as calls:
                reader.forward(torch.arange(tokens)[None], state, ())
    print(json.dumps({"row": "calls", "tokens": 400, "into_torch": calls.count}))

    seconds: dict[int, list[float]] = {lanes: [] for lanes in (1, *range(cores, cores + MORE + 1))}
    for _ in range(rounds):
        for lanes in seconds:
            reader.lanes = lanes
            torch.set_num_threads(1 if lanes == 1 else cores)  # alone, a lane has the one core that it has beside others
            started = time.perf_counter()
            with reader.open_bar("turns", [schedule], quiet=True) as bar:
                reader.score(sequences, schedule, bar, Kept())
            seconds[lanes].append(time.perf_counter() - started)
    share = statistics.mean(seconds.pop(1)) / cores
    print(json.dumps({"row": "turns", "computed": schedule.computed, "cores": cores, "share_alone": round(share, 2)}))
    for lanes, taken in seconds.items():
        mean = statistics.mean(taken)
        print(json.dumps({"row": "turns", "lanes": lanes, "seconds": round(mean, 2), "times_share": round(mean / share, 2)}))


if __name__ == "__main__":
    main()
