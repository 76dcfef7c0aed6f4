"""Resident memory over many short prompts, through the tests' server or the model in this process: `python benchmarks/soak.py [--local]`.

One process serves the embedded model over HTTP (tests/servers.py), this one asks it. A line every few seconds: prompts answered, seconds, and MiB
resident in this process and in the server's. Ends with the largest growth after the first fifth, and with 1 where that is more than 32 MiB.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import random
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

MODEL = "reference/rope"
WORDS = "the old farmer carried a box near river and green lamp stood on table by window seven".split()
MOST = 32.0
"""MiB."""


def serve(sender: Connection) -> None:
    """Serves until it is killed; sends its address."""
    import servers
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness_ext.model_view import resolve

    torch.set_num_threads(1)
    folder = resolve(MODEL)
    model = servers.Model(AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
    with servers.serve(model) as served:
        served.asked = collections.deque(maxlen=1)  # type: ignore[assignment]
        sender.send(served.url)
        threading.Event().wait()


def ask(count: int, url: str | None, every: float, pids: list[int]) -> float:
    """Asks `count` prompts. MiB by which a process grew after the first fifth of them, at the most."""
    from lm_eval.api.instance import Instance

    made: Any
    if url:
        from harness_ext.models.api import ApiExtrapolate

        made = ApiExtrapolate(base_url=url, model="rope", tokenizer=MODEL, num_concurrent=2)
    else:
        from harness_ext.models import ledger
        from harness_ext.models.hf import HFExtrapolate

        ledger.FLUSH = 1
        made = HFExtrapolate(pretrained=MODEL, device="cpu", dtype="float32", batch_size=8)
    rng = random.Random(0)
    requests = [
        Instance(
            "loglikelihood",
            {"prompt_tokens": 1},
            (" ".join(rng.choices(WORDS, k=20)), f" {rng.choice(WORDS)}"),
            index,
            ("soak", index, 1),
        )
        for index in range(count)
    ]
    answered, lines, over = [0], list[tuple[int, list[float]]](), threading.Event()
    made._resume = lambda *_, **__: (
        {},
        lambda answers: answered.__setitem__(0, answered[0] + len(answers)),
    )  # where answers are kept

    def watch() -> None:
        begun = time.monotonic()
        while not over.wait(every):
            sizes = [psutil.Process(pid).memory_info().rss / 2**20 for pid in pids]
            lines.append((answered[0], sizes))
            print(
                f"{answered[0]:>7} prompts {time.monotonic() - begun:>7.0f} s " + " ".join(f"{size:>8.1f} MiB" for size in sizes),
                flush=True,
            )

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    found = made.loglikelihood(requests, disable_tqdm=True)
    over.set()
    watcher.join()
    assert len(found) == count
    assert all(isinstance(likelihood, float) for likelihood, _ in found)
    late = [sizes for at, sizes in lines if at >= count / 5]
    return max((max(sizes) - sizes[0] for sizes in zip(*late, strict=True)), default=0.0)


def main() -> int:
    """1 where memory grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--every", type=float, default=10, help="seconds between lines")
    parser.add_argument("--local", action="store_true", help="the model in this process")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    own = psutil.Process().pid
    if given.local:
        grown = ask(given.prompts, None, given.every, [own])
    else:
        server = context.Process(target=serve, args=(sender,), daemon=True)
        server.start()
        assert server.pid is not None
        grown = ask(given.prompts, receiver.recv(), given.every, [own, server.pid])
        server.terminate()
    print(f"grown by {grown:.1f} MiB after the first fifth; at most {MOST:.0f} are right")
    return int(grown > MOST)


if __name__ == "__main__":
    sys.exit(main())
