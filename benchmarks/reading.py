"""Reading each token once, beside lm_eval's `hf`: `python benchmarks/reading.py MODEL [--rows passkey sweep …] [--out FILE]`.

Every row is one process of its own, in which both read the same requests, of the same model in float32 with as many threads,
in turn. What is printed, as JSON lines, is seconds, tokens asked and computed, and their ratios; answers are compared too. The
rows are `ROWS`. `--write-requests FILE` writes the passkey row's requests as token ids, for `benchmarks/vllm_sweep.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Requests = list[tuple[tuple[str, str], list[int], list[int]]]
SWEEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "passkey": ("passkey_extrapolate", {"lengths": [256, 512, 1024, 2048], "samples": 2}),
    "sweep": ("niah_sweep_extrapolate", {"lengths": [2048], "samples": 1}),
    "loss": ("loss_extrapolate", {"lengths": [4096], "samples": 1}),
    "generate": ("passkey_extrapolate_generate", {"lengths": [256, 512, 1024, 2048], "samples": 1}),
}
ROWS_AT_ONCE = 8
"""Prompts of a batch where answers are generated."""
LONG = 8192
"""Tokens of the prompt whose memory is measured."""


def load(model: str, batch_size: int = 1, **options: Any) -> tuple[Any, Any]:
    """lm_eval's own `hf` and ours, of the same weights, each with the attention that it has by itself."""
    from lm_eval.models.huggingface import HFLM

    from harness_ext.model_view import resolve
    from harness_ext.models.hf import HFExtrapolate

    ours = HFExtrapolate(pretrained=model, dtype="float32", device="cpu", batch_size=batch_size, **options)
    theirs = HFLM(pretrained=resolve(model), dtype="float32", max_length=2**20, device="cpu", batch_size=batch_size)
    return theirs, ours


def build_task(name: str, lm: Any) -> list[Any]:
    """A task's requests, as lm_eval hands them over."""
    from lm_eval.tasks import TaskManager

    import harness_ext

    harness_ext.install()
    task_name, metadata = SWEEPS[name]
    task = TaskManager(include_defaults=False, metadata=metadata).load([task_name])["tasks"][task_name]
    task.bind(lm)
    task.build_all_requests()
    return list(task.instances)


def build(name: str, lm: Any) -> Requests:
    """A task's requests, as lm_eval encodes them."""
    return [(request.args, *lm._encode_pair(*request.args)) for request in build_task(name, lm)]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came."""
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


def compare(model: str, requests: Requests, pairs: int = 1) -> dict[str, Any]:
    """Both over the same requests, in turn. Ours checks itself once, at its start: those seconds stand by themselves."""
    theirs, ours = load(model)
    checked, _ = timed(lambda: ours._reader.prepare(max(len(context) + len(answer) for _, context, answer in requests)))
    warm = [(("", ""), [5] * 64, [7])]
    theirs._loglikelihood_tokens(warm, disable_tqdm=True)
    seconds: dict[str, list[float]] = {"hf": [], "ours": []}
    for _ in range(pairs):
        took, expected = timed(lambda: theirs._loglikelihood_tokens(requests, disable_tqdm=True))
        seconds["hf"].append(round(took, 2))
        took, found = timed(lambda: ours._loglikelihood_tokens(requests, disable_tqdm=True))
        seconds["ours"].append(round(took, 2))
    reading = ours._reader.describe()
    return {
        "requests": len(requests),
        "asked": reading["asked"] // pairs,
        "computed": reading["computed"] // pairs,
        "lanes": reading["lanes"],
        "seconds": seconds,
        "self_check": round(checked, 2),
        "ratio": round(min(seconds["hf"]) / min(seconds["ours"]), 2),
        "largest_difference": max(abs(a[0] - b[0]) for a, b in zip(expected, found, strict=True)),
        "greedy_equal": all(a[1] == b[1] for a, b in zip(expected, found, strict=True)),
    }


def compare_task(name: str, model: str) -> dict[str, Any]:
    """A sweep of `SWEEPS`."""
    _, ours = load(model)
    return compare(model, build(name, ours))


def compare_alone(_: str, model: str) -> dict[str, Any]:
    """Prompts that have nothing in common: 12 of 200 to 1,400 random tokens."""
    rng = random.Random(0)
    requests: Requests = [
        (
            ("", str(i)),
            [rng.randrange(5, 1000) for _ in range(rng.randrange(200, 1400))],
            [rng.randrange(5, 1000) for _ in range(6)],
        )
        for i in range(12)
    ]
    return compare(model, requests, pairs=3)


def compare_generated(name: str, model: str) -> dict[str, Any]:
    """The passkey sweep with its answers generated, in batches."""
    _, ours = load(model, ROWS_AT_ONCE)
    return answer(model, build_task(name, ours))


def compare_generated_alone(_: str, model: str) -> dict[str, Any]:
    """Answers of 48 tokens to 32 prompts of 20 to 80 words that have nothing in common, in batches."""
    from lm_eval.api.instance import Instance

    rng = random.Random(0)
    words = ["river", "stone", "bird", "walks", "slowly", "under", "bright", "old", "tree", "town", "night", "many", "near", "saw"]
    prompts = [" ".join(rng.choice(words) for _ in range(rng.randrange(20, 80))).capitalize() for _ in range(32)]
    options = {"until": ["@@@"], "max_gen_toks": 48}
    return answer(
        model, [Instance("generate_until", {}, (prompt, options), number) for number, prompt in enumerate(prompts)], pairs=2
    )


def answer(model: str, requests: list[Any], pairs: int = 1) -> dict[str, Any]:
    """Both over the same requests, in turn, in batches of `ROWS_AT_ONCE`; the best of some pairs."""
    theirs, ours = load(model, ROWS_AT_ONCE)
    for lm in (theirs, ours):
        longest = sorted(requests, key=lambda request: -len(request.args[0]))[:ROWS_AT_ONCE]
        lm.generate_until(longest, disable_tqdm=True)  # with the self-check
    before, seconds = ours._reader.describe(), dict[str, list[float]](hf=[], ours=[])
    for _ in range(pairs):
        took, found = timed(lambda: ours.generate_until(requests, disable_tqdm=True))
        seconds["ours"].append(round(took, 2))
        took, expected = timed(lambda: theirs.generate_until(requests, disable_tqdm=True))
        seconds["hf"].append(round(took, 2))
    after = ours._reader.describe()
    return {
        "requests": len(requests),
        "batch_size": ROWS_AT_ONCE,
        **{name: (after[name] - before[name]) // pairs for name in ("asked", "computed")},
        "seconds": seconds,
        "ratio": round(min(seconds["hf"]) / min(seconds["ours"]), 2),
        "different": sum(one != other for one, other in zip(expected, found, strict=True)),
    }


def compare_bare(_: str, model: str) -> dict[str, Any]:
    """The passkey sweep's schedule, in one lane and side by side, and transformers alone over the same chunks: a cache, cut and gone on from."""
    from transformers import DynamicCache

    from harness_ext.models import foresight

    _, ours = load(model)
    requests = build("passkey", ours)[:40]
    ours._loglikelihood_tokens(requests, disable_tqdm=True)  # with the self-check
    sequences = [[*context, *answer] for _, context, answer in requests]
    schedule, chunks = ours._plan(sequences, [len(context) for _, context, _ in requests], None), list[tuple[int, list[int]]]()
    for step in schedule.steps:
        for row in step.rows:
            stop = step.stop if len(step.rows) == 1 else len(sequences[row]) - 1
            starts = range(step.start, stop, ours._reader.chunk)
            chunks += [(start, sequences[row][start : min(start + ours._reader.chunk, stop)]) for start in starts]
    assert sum(len(tokens) for _, tokens in chunks) == schedule.computed

    @torch.inference_mode()
    def run_bare() -> None:
        cache = DynamicCache()
        for past, tokens in chunks:
            cache.crop(past - cache.get_seq_length())
            ours.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)

    seconds: dict[str, list[float]] = {"bare": [], "one_lane": [], "ours": []}
    for _ in range(2):
        seconds["bare"].append(round(timed(run_bare)[0], 2))
        for name, most in (("one_lane", 1), ("ours", foresight.MOST_LANES)):
            own, foresight.MOST_LANES = foresight.MOST_LANES, most
            seconds[name].append(round(timed(lambda: ours._loglikelihood_tokens(requests, disable_tqdm=True))[0], 2))
            foresight.MOST_LANES = own
    best = {name: min(taken) for name, taken in seconds.items()}
    return {
        "chunks": len(chunks),
        "computed": schedule.computed,
        "seconds": seconds,
        "one_lane_ratio": round(best["one_lane"] / best["bare"], 3),
        "ratio": round(best["ours"] / best["bare"], 3),
    }


def compare_memory(_: str, model: str) -> dict[str, Any]:
    """Peak memory over the loaded weights for one prompt, each in a process of its own."""
    peaks = {}
    for name in ("hf", "ours"):
        ran = subprocess.run([sys.executable, __file__, model, "--peak", name], capture_output=True, text=True, check=True)
        peaks[name] = json.loads(ran.stdout.splitlines()[-1])
    return {"tokens": LONG, "mebibytes": peaks, "ratio": round(peaks["hf"] / peaks["ours"], 2)}


def measure_peak(name: str, model: str) -> float:
    """Mebibytes over the loaded weights that one prompt of LONG tokens takes."""
    theirs, ours = load(model)
    lm = theirs if name == "hf" else ours
    rng = random.Random(0)
    lm._loglikelihood_tokens([(("", ""), [5] * 64, [7])], disable_tqdm=True)
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # loading took more than what it left; the peak is counted from here
    lm._loglikelihood_tokens(
        [(("", ""), [rng.randrange(5, 1000) for _ in range(LONG - 6)], [7, 8, 9, 10, 11, 12])], disable_tqdm=True
    )
    return round((read_status("VmHWM") - before) / 1024, 1)


def read_status(name: str) -> int:
    """A line of /proc/self/status, in kibibytes: `VmRSS`, what is resident, or `VmHWM`, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def run_embedded(_: str, __: str) -> dict[str, Any]:
    """The embedded model's default sweep of all tasks, after lm_eval's own start: from the first prompt built to the last score.

    Beside it, over the same requests: lm_eval's `hf`, and ours without all that is not a matrix product or the attention kernel (`run_kernels`).
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    import harness_ext

    harness_ext.install()
    theirs, ours = load("reference/rope")
    requests, schedules = Requests(), []
    read, score = ours._loglikelihood_tokens, ours._reader.score

    def keep_requests(given: Requests, *args: Any, **kwargs: Any) -> Any:
        requests.extend(given)
        return read(given, *args, **kwargs)

    def keep_schedule(sequences: Any, schedule: Any, *args: Any, **kwargs: Any) -> Any:
        schedules.append(schedule)
        return score(sequences, schedule, *args, **kwargs)

    ours._loglikelihood_tokens, ours._reader.score = keep_requests, keep_schedule
    manager = TaskManager(include_defaults=False, metadata={"pretrained": "reference/rope"})
    took, _ = timed(lambda: lm_eval.simple_evaluate(model=ours, tasks=["extrapolate"], task_manager=manager, bootstrap_iters=0))
    kernels, _ = timed(lambda: [run_kernels(ours, schedule) for schedule in schedules])
    hf, _ = timed(lambda: theirs._loglikelihood_tokens(requests, disable_tqdm=True))
    reading = ours._reader.describe()
    return {
        "requests": len(requests),
        "seconds": round(took, 1),
        "reading": reading,
        "kernels": round(kernels, 1),
        "hf": round(hf, 1),
        "ratio": round(hf / reading["seconds"], 2),
    }


@torch.inference_mode()
def run_kernels(lm: Any, schedule: Any) -> None:
    """The matrix products and the attention of a schedule's chunks, in as many lanes, on made-up numbers: what no reading by these kernels can take less than."""
    from torch.nn.functional import linear

    from harness_ext.models import pieces
    from harness_ext.models.side_by_side import run_threads

    config, reader = lm.model.config, lm._reader
    assert config.num_key_value_heads == config.num_attention_heads
    weights = [module.weight for module in lm.model.model.modules() if isinstance(module, torch.nn.Linear)]
    heads, width = config.num_attention_heads, config.head_dim
    keys, values = torch.randn(2, 1, heads, schedule.longest + reader.chunk, width)
    made_up = torch.randn(4 * reader.chunk * max(heads * width, *(weight.shape[1] for weight in weights)))

    def make(*shape: int) -> torch.Tensor:
        return made_up[: math.prod(shape)].view(shape)

    def attend(rows: int, start: int, stop: int) -> None:
        query, key, value = make(rows, heads, stop - start, width), keys[:, :, :stop], values[:, :, :stop]
        if rows > 1:
            key, value = pieces.put_after((key[:, :, :start], value[:, :, :start]), query, query)
        for _ in range(config.num_hidden_layers):
            pieces.attend(lm.model, query, key, value, None)

    @torch.inference_mode()
    def run(steps: Any) -> None:
        for step in steps:
            for start in range(step.start, step.stop, reader.chunk):
                stop = min(start + reader.chunk, step.stop)
                for weight in weights:
                    linear(make(len(step.rows) * (stop - start), weight.shape[1]), weight)
                attend(len(step.rows), start, stop)

    lanes = reader._split(schedule)
    run(lanes.first)
    run_threads([lambda steps=steps: run(steps) for steps in lanes.parts], len(lanes.parts))


ROWS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "passkey": compare_task,
    "sweep": compare_task,
    "loss": compare_task,
    "generate": compare_generated,
    "generate_alone": compare_generated_alone,
    "memory": compare_memory,
    "alone": compare_alone,
    "bare": compare_bare,
    "embedded": run_embedded,
}


def main() -> None:
    """Prints a JSON line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, help="add the lines to a file, too")
    parser.add_argument("--write-requests", type=Path)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=("hf", "ours"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(measure_peak(given.peak, given.model))
    elif given.row:
        print(json.dumps({"row": given.row, "threads": torch.get_num_threads(), **ROWS[given.row](given.row, given.model)}))
    elif given.write_requests:
        requests = [[context, answer] for _, context, answer in build("passkey", load(given.model)[1])]
        given.write_requests.write_text(json.dumps({"requests": requests}))
    else:
        for row in given.rows:
            ran = subprocess.run(
                [sys.executable, __file__, given.model, "--row", row], stdout=subprocess.PIPE, text=True, check=True
            )
            line = ran.stdout.splitlines()[-1]
            print(line, flush=True)
            if given.out:
                with given.out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
