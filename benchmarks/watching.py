"""What watching attention costs: `python benchmarks/watching.py MODEL [--repeats 5] [--metadata JSON]`.

The plain and the stretched, packed and emptied prompts of `extrapolate_why` are answered with and without, in turn, in one process, in float32. What
is printed, as a JSON line, is the processor's seconds of each (so that other work on the machine counts little) and the median of the pairs' ratios;
answers have to be equal to the last bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from lm_eval.tasks import TaskManager

import harness_ext
from harness_ext.models.hf import HFExtrapolate


def answer(lm: Any, instances: list[Any]) -> tuple[float, list[Any]]:
    """Processor seconds, and the answers."""
    started, answers = time.process_time(), []
    for kind in ("loglikelihood", "loglikelihood_at"):
        answers += getattr(lm, kind)([one for one in instances if one.request_type == kind], disable_tqdm=True)
    return time.process_time() - started, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--metadata", type=json.loads, default={"samples": 2})
    options = parser.parse_args()
    harness_ext.install()
    lm = HFExtrapolate(options.model, dtype="float32", device="cpu")
    wanted = {"arms": ["long", "stretched", "packed", "emptied"], **options.metadata}
    task = TaskManager(include_defaults=False, metadata=wanted).load(["extrapolate_why"])["tasks"]["extrapolate_why"]
    task.bind(lm)
    task.build_all_requests()
    watches = [instance.doc.pop("watch") for instance in task.instances]
    answer(lm, task.instances)  # what is done once only
    pairs = []
    for _ in range(options.repeats):
        without, expected = answer(lm, task.instances)
        for instance, watch in zip(task.instances, watches, strict=True):
            instance.doc["watch"] = watch
        with_it, answers = answer(lm, task.instances)
        for instance in task.instances:
            instance.doc.pop("watch")
        assert answers == expected, "watching changed an answer"
        pairs.append((without, with_it))
    assert not lm._watcher.seen.why_not
    print(
        json.dumps(
            {
                "model": options.model,
                "prompts": len(watches),
                "tokens": sum(instance.doc["prompt_tokens"] for instance in task.instances),
                "threads": torch.get_num_threads(),
                "without_s": [round(pair[0], 3) for pair in pairs],
                "with_s": [round(pair[1], 3) for pair in pairs],
                "ratio": round(statistics.median(pair[1] / pair[0] for pair in pairs), 4),
            }
        )
    )


if __name__ == "__main__":
    main()
