"""Making prompts, beside lm_eval's own RULER builder: `python benchmarks/prompts.py TOKENIZER [--length 32768] [--samples 100]`.

The same tokenizer, the same length, the same task (one needle in repeated noise), the same number of prompts, in turn in one
process. RULER's builder fills to at most L; ours to exactly L. It needs `pip install nltk wonderwords`; the data that nltk
would download is only for other haystacks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from transformers import AutoTokenizer


def build_ruler(tokenizer: Any, length: int, samples: int) -> list[int]:
    """Seconds and the lengths of RULER's `niah_single_1`, as lm_eval 0.4.13 builds it."""
    import nltk

    nltk.data.find = lambda *_: None  # sentence splitting is for essays; this haystack has none
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE
    from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack

    made = generate_samples(
        get_haystack(type_haystack="repeat"),
        max_seq_length=length,
        template=TEMPLATE,
        type_haystack="repeat",
        type_needle_k="words",
        type_needle_v="numbers",
        num_samples=samples,
        TOKENIZER=tokenizer,
    )
    return [sample["length"] for sample in made]


def build_ours(tokenizer: Any, length: int, samples: int) -> list[int]:
    """The lengths of `niah_single_extrapolate` over noise, through the task as lm_eval drives it."""
    from lm_eval.tasks import TaskManager

    metadata = {
        "tokenizer": tokenizer,
        "lengths": [length],
        "depths": 10,
        "samples": -(-samples // 10),
        "haystack": "noise",
        "max_length": length,
    }
    name = "niah_single_extrapolate"
    task = TaskManager(include_defaults=False, metadata=metadata).load([name])["tasks"][name]
    task.build_all_requests(limit=samples)
    return [doc["prompt_tokens"] for doc in (instance.doc for instance in task.instances)]


def main() -> None:
    """Prints both, pair by pair, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    tokenizer("warm up")
    seconds: dict[str, list[float]] = {"ruler": [], "ours": []}
    lengths: dict[str, list[int]] = {}
    for _ in range(arguments.runs):
        for name, build in (("ruler", build_ruler), ("ours", build_ours)):
            started = time.perf_counter()
            lengths[name] = build(tokenizer, arguments.length, arguments.samples)
            seconds[name].append(time.perf_counter() - started)
    report = {
        "length": arguments.length,
        "samples": arguments.samples,
        **{f"{name}_seconds": [round(value, 2) for value in values] for name, values in seconds.items()},
        **{f"{name}_fill": [min(values) / arguments.length, max(values) / arguments.length] for name, values in lengths.items()},
        "ratio": round(statistics.median(a / b for a, b in zip(seconds["ruler"], seconds["ours"], strict=True)), 2),
    }
    json.dump(report, sys.stdout)
    print()


if __name__ == "__main__":
    main()
