"""How much of the prompts is the same: `python benchmarks/sharing.py TOKENIZER [--lengths 256 512 1024 2048] [--samples 2] [TASK …]`.

Of each task: the tokens that all its prompts have together, those of them that begin no other prompt alike (a token counts once
for each distinct text before it, which is what a model has to compute at least), the quotient, and how far a needle stands
from its depth at most, at 512 tokens or more (0 where there are none).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

TASKS = (
    "passkey_extrapolate",
    "niah_single_extrapolate",
    "niah_multikey_extrapolate",
    "niah_multivalue_extrapolate",
    "niah_multiquery_extrapolate",
    "copy_extrapolate",
)


def count_distinct(rows: Iterable[Sequence[int]]) -> int:
    """Tokens of `rows`, those of a common beginning once: the nodes of their prefix tree.

    >>> count_distinct([[1, 2, 3], [1, 2, 4], [1, 2]])
    4
    """
    nodes: dict[tuple[int, int], int] = {}
    for row in rows:
        node = 0
        for token in row:
            node = nodes.setdefault((node, token), len(nodes) + 1)
    return len(nodes)


def measure(task: Any, tokenizer: Any) -> str:
    """A row of the table."""
    task.build_all_requests()
    # A continuation's last token is scored, but never goes in.
    rows = [tokenizer.encode("".join(instance.args))[:-1] for instance in task.instances]
    asked, distinct = sum(map(len, rows)), count_distinct(rows)
    docs = [instance.doc for instance in task.instances if instance.doc.get("length", 0) >= 512]
    departure = max((abs(doc["depth"] - doc["depth_realised"]) for doc in docs), default=0.0)
    return f"{task.spec.task:<32} {asked:>9} {distinct:>9} {asked / distinct:>6.2f} {departure:>6.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("tasks", nargs="*", default=TASKS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--samples", type=int, default=2)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    asked = {"lengths": arguments.lengths, "samples": arguments.samples, "max_length": max(arguments.lengths)}
    manager = TaskManager(include_defaults=False, metadata={"tokenizer": tokenizer, **asked})
    print(f"{'task':<32} {'asked':>9} {'distinct':>9} {'':>6} {'depth':>6}")
    for name in arguments.tasks:
        print(measure(manager.load([name])["tasks"][name], tokenizer))
