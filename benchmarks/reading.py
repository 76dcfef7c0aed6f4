"""Reading each token once, beside lm_eval's `hf`: `python benchmarks/reading.py MODEL [--rows passkey sweep …] [--out FILE]`.

Both read the same requests, of the same model in float32 with as many threads, in turn; on a CPU every row is a process of its own.
What is printed, as JSON lines, is seconds, tokens asked and computed, and their ratios; answers are compared too. The rows are `ROWS`.
`--write-requests FILE` writes the passkey row's requests as token ids, for `benchmarks/vllm_sweep.py`.

`--device cuda --dtype bfloat16` is the same table on a card, at `LARGER` times the lengths, with rows more: which attention kernels
ran (`kernels`), what those take (`attention`), what a forward takes beside its tokens (`forwards`), and how often the card was waited
for (`waits`). `--shape NAME` in place of a model is one of `SHAPES` with random weights.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import gc
import json
import math
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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
LARGER = 8
"""Times all lengths, on a card."""
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32, "head_dim": 64},
}
"""Of Llama 3.2 1B (its config.json): 8 key heads, 128,256 tokens, rotary base 500,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured."""

    model: str
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def times(self) -> int:
        """Of all lengths."""
        return 1 if self.device == "cpu" else LARGER


@functools.cache
def load(subject: Subject, batch_size: int = 1) -> tuple[Any, Any]:
    """lm_eval's own `hf` and ours, of the same weights, each with the attention that it has by itself."""
    from lm_eval.models.huggingface import HFLM

    from harness_ext.model_view import resolve
    from harness_ext.models.hf import HFExtrapolate

    options: dict[str, Any] = {"dtype": subject.dtype, "device": subject.device, "batch_size": batch_size}
    ours = HFExtrapolate(pretrained=subject.model, **options)
    theirs = HFLM(pretrained=resolve(subject.model), max_length=2**20, **options)
    return theirs, ours


def save_shape(name: str, folder: Path) -> str:
    """The folder, with random weights of one of `SHAPES` in bfloat16, and the embedded models' tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from harness_ext.model_view import resolve

    rotary = {"rope_type": "default", "rope_theta": 500_000.0}
    length = LARGER * LONG // 4
    config = LlamaConfig(
        **SHAPES[name], num_key_value_heads=8, vocab_size=128_256, rope_parameters=rotary, max_position_embeddings=length
    )
    torch.manual_seed(0)
    own = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(own)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("reference/rope")).save_pretrained(folder)
    return str(folder)


def build_task(name: str, lm: Any, times: int) -> list[Any]:
    """A task's requests, at so many times the lengths of `SWEEPS`, as lm_eval hands them over."""
    from lm_eval.tasks import TaskManager

    import harness_ext

    harness_ext.install()
    task_name, metadata = SWEEPS[name]
    metadata = {**metadata, "lengths": [times * length for length in metadata["lengths"]]}
    task = TaskManager(include_defaults=False, metadata=metadata).load([task_name])["tasks"][task_name]
    task.bind(lm)
    task.build_all_requests()
    return list(task.instances)


def build(name: str, lm: Any, times: int) -> Requests:
    """A task's requests, as lm_eval encodes them."""
    return [(request.args, *lm._encode_pair(*request.args)) for request in build_task(name, lm, times)]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until it has come, and what came."""
    started = time.perf_counter()
    found = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, found


def compare(subject: Subject, ask: Callable[[Any], Requests], pairs: int = 1) -> dict[str, Any]:
    """Both over the same requests, in turn. Ours checks itself once, at its start: those seconds stand by themselves."""
    theirs, ours = load(subject)
    requests = ask(ours)
    checked, _ = timed(lambda: ours._reader.prepare(max(len(context) + len(answer) for _, context, answer in requests)))
    warm = [(("", ""), [5] * 64, [7])]
    for lm in (theirs, ours):
        lm._loglikelihood_tokens(warm, disable_tqdm=True)
    before, seconds = ours._reader.describe(), dict[str, list[float]](hf=[], ours=[])
    for _ in range(pairs):
        took, expected = timed(lambda: theirs._loglikelihood_tokens(requests, disable_tqdm=True))
        seconds["hf"].append(round(took, 2))
        took, found = timed(lambda: ours._loglikelihood_tokens(requests, disable_tqdm=True))
        seconds["ours"].append(round(took, 2))
    reading = ours._reader.describe()
    return {
        "requests": len(requests),
        **{name: (reading[name] - before[name]) // pairs for name in ("asked", "computed")},
        "lanes": reading["lanes"],
        "seconds": seconds,
        "self_check": round(checked, 2),
        "ratio": round(min(seconds["hf"]) / min(seconds["ours"]), 2),
        "largest_difference": max(abs(a[0] - b[0]) for a, b in zip(expected, found, strict=True)),
        "greedy_equal": all(a[1] == b[1] for a, b in zip(expected, found, strict=True)),
    }


def compare_task(name: str, subject: Subject) -> dict[str, Any]:
    """A sweep of `SWEEPS`."""
    return compare(subject, lambda lm: build(name, lm, subject.times))


def compare_alone(_: str, subject: Subject) -> dict[str, Any]:
    """Prompts that have nothing in common: 12 of 200 to 1,400 random tokens."""
    rng = random.Random(0)
    requests: Requests = [
        (
            ("", str(i)),
            [rng.randrange(5, 1000) for _ in range(subject.times * rng.randrange(200, 1400))],
            [rng.randrange(5, 1000) for _ in range(6)],
        )
        for i in range(12)
    ]
    return compare(subject, lambda lm: requests, pairs=3)


def compare_generated(name: str, subject: Subject) -> dict[str, Any]:
    """The passkey sweep with its answers generated, in batches."""
    return answer(subject, lambda lm: build_task(name, lm, subject.times))


def compare_generated_alone(_: str, subject: Subject) -> dict[str, Any]:
    """Answers of 48 tokens to 32 prompts of 20 to 80 words that have nothing in common, in batches."""
    from lm_eval.api.instance import Instance

    rng = random.Random(0)
    words = ["river", "stone", "bird", "walks", "slowly", "under", "bright", "old", "tree", "town", "night", "many", "near", "saw"]
    prompts = [" ".join(rng.choice(words) for _ in range(rng.randrange(20, 80))).capitalize() for _ in range(32)]
    options = {"until": ["@@@"], "max_gen_toks": 48}
    requests = [Instance("generate_until", {}, (prompt, options), number) for number, prompt in enumerate(prompts)]
    return answer(subject, lambda lm: requests, pairs=4)


def answer(subject: Subject, ask: Callable[[Any], list[Any]], pairs: int = 1) -> dict[str, Any]:
    """Both over the same requests, in turn, in batches of `ROWS_AT_ONCE`; the best of some pairs."""
    theirs, ours = load(subject, ROWS_AT_ONCE)
    requests = ask(ours)
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


def compare_bare(_: str, subject: Subject) -> dict[str, Any]:
    """The passkey sweep's schedule, in one lane and side by side, and transformers alone over the same chunks: a cache, cut and gone on from."""
    from transformers import DynamicCache

    from harness_ext.models import foresight

    _, ours = load(subject)
    requests = build("passkey", ours, subject.times)[:40]
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
            ours.model(torch.tensor([tokens], device=subject.device), past_key_values=cache, use_cache=True, logits_to_keep=1)

    seconds: dict[str, list[float]] = {"bare": [], "one_lane": [], "ours": []}
    for _turn in range(2):
        seconds["bare"].append(round(timed(run_bare)[0], 2))
        for way, most in (("one_lane", 1), ("ours", foresight.MOST_LANES)):
            own, foresight.MOST_LANES = foresight.MOST_LANES, most
            seconds[way].append(round(timed(lambda: ours._loglikelihood_tokens(requests, disable_tqdm=True))[0], 2))
            foresight.MOST_LANES = own
    best = {name: min(taken) for name, taken in seconds.items()}
    return {
        "chunks": len(chunks),
        "computed": schedule.computed,
        "seconds": seconds,
        "one_lane_ratio": round(best["one_lane"] / best["bare"], 3),
        "ratio": round(best["ours"] / best["bare"], 3),
    }


def compare_memory(_: str, subject: Subject) -> dict[str, Any]:
    """Peak memory over the loaded weights for one prompt; on a CPU each in a process of its own."""
    if subject.device == "cpu":
        peaks = {name: json.loads(run_apart(subject, "--peak", name)) for name in ("hf", "ours")}
    else:
        peaks = {name: measure_peak(name, subject) for name in ("hf", "ours")}
    return {"tokens": subject.times * LONG, "mebibytes": peaks, "ratio": round(peaks["hf"] / peaks["ours"], 2)}


def run_apart(subject: Subject, *arguments: str) -> str:
    """The last line that this file prints in a process of its own."""
    given = [subject.model, "--device", subject.device, "--dtype", subject.dtype, *arguments]
    ran = subprocess.run([sys.executable, __file__, *given], stdout=subprocess.PIPE, text=True, check=True)
    return ran.stdout.splitlines()[-1]


def measure_peak(name: str, subject: Subject) -> float:
    """Mebibytes over the loaded weights that one prompt of LONG tokens takes."""
    theirs, ours = load(subject)
    lm = theirs if name == "hf" else ours
    rng = random.Random(0)
    prompt = [rng.randrange(5, 1000) for _ in range(subject.times * LONG - 6)]
    lm._loglikelihood_tokens([(("", ""), [5] * 64, [7])], disable_tqdm=True)
    if subject.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 2**20 if subject.device != "cpu" else read_status("VmRSS") / 2**10
    if subject.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # loading took more than what it left; the peak is counted from here
    lm._loglikelihood_tokens([(("", ""), prompt, [7, 8, 9, 10, 11, 12])], disable_tqdm=True)
    after = torch.cuda.max_memory_allocated() / 2**20 if subject.device != "cpu" else read_status("VmHWM") / 2**10
    return round(after - before, 1)


def read_status(name: str) -> int:
    """A line of /proc/self/status, in kibibytes: `VmRSS`, what is resident, or `VmHWM`, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def run_embedded(_: str, subject: Subject) -> dict[str, Any]:
    """The embedded model's default sweep of all tasks, after lm_eval's own start and loading: from the first prompt built to the last score.

    Beside it, over the same requests: lm_eval's `hf`, and on a CPU ours without all that is not a matrix product or the attention kernel (`run_kernels`).
    """
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    import harness_ext

    harness_ext.install()
    theirs, ours = load(Subject(model="reference/rope", device=subject.device))
    requests, schedules = Requests(), []
    read, score = ours._loglikelihood_tokens, ours._reader.score

    def keep_requests(given: Requests, *args: Any, **kwargs: Any) -> Any:
        requests.extend(given)
        return read(given, *args, **kwargs)

    def keep_schedule(sequences: Any, schedule: Any, *args: Any, **kwargs: Any) -> Any:
        schedules.append(schedule)
        return score(sequences, schedule, *args, **kwargs)

    ours._loglikelihood_tokens, ours._reader.score = keep_requests, keep_schedule
    tasks = TaskManager(include_defaults=False, metadata={"pretrained": "reference/rope"}).load(["extrapolate"])
    took, _ = timed(lambda: evaluator.evaluate(lm=ours, task_dict=tasks, bootstrap_iters=0))
    bare = {}
    if subject.device == "cpu":
        bare["kernels"], _ = timed(lambda: [run_kernels(ours, schedule) for schedule in schedules])
        bare["products"], _ = timed(lambda: [run_kernels(ours, schedule, attends=False) for schedule in schedules])
    hf, _ = timed(lambda: theirs._loglikelihood_tokens(requests, disable_tqdm=True))
    reading = ours._reader.describe()
    return {
        "requests": len(requests),
        "seconds": round(took, 1),
        "reading": reading,
        **{name: round(seconds, 1) for name, seconds in bare.items()},
        "hf": round(hf, 1),
        "ratio": round(hf / reading["seconds"], 2),
    }


@torch.inference_mode()
def run_kernels(lm: Any, schedule: Any, *, attends: bool = True) -> None:
    """The matrix products and, if it `attends`, the attention of a schedule's chunks, in as many lanes, on made-up numbers: what no reading by these kernels can take less than."""
    from torch.nn.functional import linear

    from harness_ext.models import pieces
    from harness_ext.models.side_by_side import run_threads

    config, reader = lm.model.config, lm._reader
    assert config.num_key_value_heads == config.num_attention_heads
    *before, last = lm.model.model.layers
    always = list_weights([*before, last.self_attn.q_proj, last.self_attn.k_proj, last.self_attn.v_proj])
    where_scored = list_weights([last.self_attn.o_proj, last.mlp])
    heads, width = config.num_attention_heads, config.head_dim
    keys, values = torch.randn(2, 1, heads, schedule.longest + reader.chunk, width)
    made_up = torch.randn(4 * reader.chunk * max(heads * width, *(weight.shape[1] for weight in always + where_scored)))

    def make(*shape: int) -> torch.Tensor:
        return made_up[: math.prod(shape)].view(shape)

    def attend(rows: int, start: int, stop: int, read: int) -> None:
        key, value = keys[:, :, :stop], values[:, :, :stop]
        if rows > 1:
            own = make(rows, heads, stop - start, width)
            key, value = pieces.put_after((key[:, :, :start], value[:, :, :start]), own, own)
        for queries in [stop - start] * len(before) + [read if rows == 1 else stop - start] * bool(read):
            pieces.attend(lm.model, make(rows, heads, queries, width), key, value, None)

    @torch.inference_mode()
    def run(steps: Any) -> None:
        for step in steps:
            first = min((read.start for read in step.reads), default=step.stop)
            for start in range(step.start, step.stop, reader.chunk):
                stop = min(start + reader.chunk, step.stop)
                read = max(0, stop - max(first, start))
                for weight in always + where_scored * bool(read):
                    linear(make(len(step.rows) * (stop - start), weight.shape[1]), weight)
                if attends:
                    attend(len(step.rows), start, stop, read)

    lanes = reader._split(schedule)
    run(lanes.first)
    run_threads([functools.partial(run, steps) for steps in lanes.parts], len(lanes.parts))


def list_weights(modules: list[torch.nn.Module]) -> list[torch.Tensor]:
    """Of all linear layers in some modules."""
    return [part.weight for module in modules for part in module.modules() if isinstance(part, torch.nn.Linear)]


def list_kernels(_: str, subject: Subject) -> dict[str, Any]:
    """What computes attention in each: calls of SDPA's implementations, and on a card its kernels' milliseconds, by the profiler; one prompt of LONG tokens."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if subject.device != "cpu" else [])]
    rng, found = random.Random(0), {}
    requests: Requests = [(("", ""), [rng.randrange(5, 1000) for _ in range(subject.times * LONG // 4)], [7, 8])]
    for name, lm in zip(("hf", "ours"), load(subject), strict=True):
        lm._loglikelihood_tokens(requests, disable_tqdm=True)
        with profile(activities=activities) as seen:
            lm._loglikelihood_tokens(requests, disable_tqdm=True)
        averages = seen.key_averages()
        ran = {event.key: round(event.self_device_time_total / 1000, 2) for event in averages if event.device_type.name != "CPU"}
        found[name] = {
            "calls": {event.key: event.count for event in averages if "aten::_scaled_dot_product" in event.key},
            "milliseconds": dict(sorted(ran.items(), key=lambda item: -item[1])[:6]),
        }
    return {"tokens": len(requests[0][1]), **found}


def time_attention(_: str, subject: Subject) -> dict[str, Any]:
    """Milliseconds of one layer's attention of some tokens on those before, as transformers has SDPA do it and as ours does it: the best of ten."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from harness_ext.models import pieces

    _, ours = load(subject)
    config, dtype = ours.model.config, getattr(torch, subject.dtype)
    module = next(module for module in ours.model.modules() if hasattr(module, "num_key_value_groups"))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = []
    for tokens, past in ((30, 2018), (512, 1536), (2048, 2048), (2048, 14336), (8192, 8192)):
        query = torch.randn(1, config.num_attention_heads, tokens, width, device=subject.device).to(dtype)
        key, value = torch.randn(2, 1, config.num_key_value_heads, past + tokens, width, device=subject.device).to(dtype)
        mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=subject.device).tril(past)[None, None]
        took = {
            "sdpa": best(lambda: sdpa_attention_forward(module, query, key, value, mask)),  # noqa: B023
            "ours": best(lambda: pieces.attend(module, query, key, value, None)),  # noqa: B023
        }
        rows.append({"tokens": tokens, "past": past, **took})
    return {"milliseconds": rows}


@torch.inference_mode()
def best(run: Callable[[], Any], times: int = 10) -> float:
    """Milliseconds, the fewest of some times, after one that does not count."""
    run()
    return round(1000 * min(timed(run)[0] for _ in range(times)), 3)


def time_forwards(_: str, subject: Subject) -> dict[str, Any]:
    """Milliseconds of a forward of ours over so many tokens, on nearly as many as the longest prompt of a sweep has before: the best of ten."""
    _, ours = load(subject)
    past = subject.times * 2048 - 8192 if subject.times > 1 else 1024
    ours._reader.prepare(past)
    state = ours._reader._make(subject.times * 2048)()
    with torch.inference_mode():
        ours._reader.forward(torch.full((1, past), 7), state, [])

    def read(count: int) -> None:
        state.keep(past)
        ours._reader.forward(torch.full((1, count), 7), state, [])

    sizes = [size for size in (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if past + size <= subject.times * 2048]
    return {"past": past, "milliseconds": {str(size): best(functools.partial(read, size)) for size in sizes}}


def count_waits(_: str, subject: Subject) -> dict[str, Any]:
    """How often the processor waits for the card while ours scores, and how much oftener with twice the requests."""
    _, ours = load(subject)
    requests, counts = build("passkey", ours, 1), {}
    ours._loglikelihood_tokens(requests, disable_tqdm=True)
    for share in (2, 1):
        some = requests[: len(requests) // share]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            ours._loglikelihood_tokens(some, disable_tqdm=True)
            torch.cuda.set_sync_debug_mode("default")
        counts[len(some)] = collections.Counter(
            f"{Path(warning.filename).name}:{warning.lineno}" for warning in seen if "synchronizing" in str(warning.message)
        )
    (few, before), (many, after) = counts.items()
    return {
        "waits": {str(few): before.total(), str(many): after.total()},
        "for_each_request": (after.total() - before.total()) / (many - few),
        "where": dict(after.most_common(5)),
    }


ROWS: dict[str, Callable[[str, Subject], dict[str, Any]]] = {
    "passkey": compare_task,
    "sweep": compare_task,
    "loss": compare_task,
    "generate": compare_generated,
    "generate_alone": compare_generated_alone,
    "memory": compare_memory,
    "alone": compare_alone,
    "bare": compare_bare,
    "embedded": run_embedded,
    "kernels": list_kernels,
    "attention": time_attention,
    "forwards": time_forwards,
    "waits": count_waits,
}


def main() -> None:
    """Prints a JSON line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder or a name")
    parser.add_argument("--shape", choices=SHAPES, help="random weights, in place of a model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", nargs="+", choices=ROWS)
    parser.add_argument("--out", type=Path, help="add the lines to a file, too")
    parser.add_argument("--write-requests", type=Path)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=("hf", "ours"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if bool(given.model) == bool(given.shape):
        parser.error("name a model, or a --shape")
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or save_shape(given.shape, Path(folder))
        subject = Subject(model=model, device=given.device, dtype=given.dtype)
        if given.peak:
            print(measure_peak(given.peak, subject))
        elif given.row:
            print(json.dumps(measure(given.row, subject)))
        elif given.write_requests:
            requests = [[context, answer] for _, context, answer in build("passkey", load(subject)[1], subject.times)]
            given.write_requests.write_text(json.dumps({"requests": requests}))
        else:
            failed = 0
            for row in given.rows or [row for row in ROWS if row != "waits" or given.device != "cpu"]:
                if given.device == "cpu":
                    line = run_apart(subject, "--row", row)
                else:
                    line, ran = measure_here(row, subject)
                    failed += not ran
                print(line, flush=True)
                if given.out:
                    with given.out.open("a") as file:
                        file.write(line + "\n")
            sys.exit(failed and f"{failed} rows failed")


def measure_here(row: str, subject: Subject) -> tuple[str, bool]:
    """A row's line, or one that says how it failed, since the card is held for the others too; and whether it did not."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return json.dumps(measure(row, subject)), True
    except Exception as error:
        traceback.print_exc()
        return json.dumps({"row": row, "error": f"{type(error).__name__}: {error}"[:300]}), False
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def measure(row: str, subject: Subject) -> dict[str, Any]:
    """A row, with what it was measured on."""
    on: dict[str, Any] = {"threads": torch.get_num_threads(), "vectors": torch.backends.cpu.get_cpu_capability()}
    if subject.device != "cpu":
        on = {"card": torch.cuda.get_device_name(), "dtype": subject.dtype, "torch": torch.__version__}
    return {"row": row, **on, **ROWS[row](row, subject)}


if __name__ == "__main__":
    main()
