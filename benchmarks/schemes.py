"""Runs of the reference models past their trained length, and what lm_eval does not measure: `python benchmarks/schemes.py`.

Each run is kept in `results/schemes/NAME`, the other measurements in `results/schemes/facts.json`; docs/why.py makes a page of
both. Names choose: a model, `learned` under an extension, or `facts`. What is not embedded yet is left out, and said.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from keep import keep
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from harness_ext import positions
from harness_ext.errors import ModelError
from harness_ext.model_view import load_tokenizer, resolve

REPOSITORY = Path(__file__).parent.parent
MODELS = ("learned", "sinusoidal", "relative", "transformer-xl", "memformer", "alibi", "nope", "rope")
EXTENSIONS = ("table-tile", "table-clamp", "table-interpolate")
EXTENDED = {f"learned-{method}": method for method in EXTENSIONS}
TASKS = ("passkey_extrapolate", "niah_single_extrapolate", "copy_extrapolate")
LOCATED = TASKS[:2]
"""The tasks whose needle's distance is measured."""
STATE_TOKENS = {"transformer-xl": (256, 2048, 16384, 131072), "memformer": (256, 2048, 16384, 131072), "rope": (256, 2048, 16384)}
COST_TOKENS = {"rope": (1024, 2048, 4096, 8192, 16384), "transformer-xl": (1024, 2048, 4096, 8192, 16384)}
BEST_OF = 3
CHUNK = 512
LONGEST = 8
"""Multiple of the trained length at which hidden states and sight are looked at: the tasks' longest."""


def run(name: str, out: Path) -> None:
    """Runs lm_eval on a model, or on `learned` under an extension, and keeps what it wrote."""
    extend = EXTENDED.get(name)
    model, tasks = (f"learned,extend={extend}", TASKS[:1]) if extend else (name, TASKS)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf-extrapolate", "--model_args", f"pretrained=reference/{model}"]
    with tempfile.TemporaryDirectory() as temporary:
        command += ["--tasks", ",".join(tasks), "--batch_size", "auto", "--output_path", temporary, "--log_samples"]
        # One thread, unless told otherwise: on models this small two wait for each other longer than they work.
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1"})
        keep(Path(temporary), out / name)


def measure(names: Sequence[str]) -> dict[str, Any]:
    """All facts about the models `names`; each key is one of the functions below, and none reads a clock but `cost`."""
    torch.set_num_threads(1)
    models = {name: load(name) for name in names}
    facts: dict[str, Any] = {"models": {name: describe(name, model) for name, model in models.items()}}
    facts["state"] = {name: state(models[name], tokens) for name, tokens in STATE_TOKENS.items() if name in models}
    facts["cost"] = {name: cost(models[name], tokens) for name, tokens in COST_TOKENS.items() if name in models}
    facts["head"] = {name: head(model) for name, model in models.items()}
    facts["sight"] = {name: sight(model) for name, model in models.items()}
    if "relative" in models:
        facts["alike"] = alike(models["relative"])
    if "learned" in models:
        facts["table"] = table(models["learned"])
    facts["distance"] = distances(names[0]) if names else {}
    return facts


def load(name: str) -> Any:
    """The embedded model, in float32."""
    return AutoModelForCausalLM.from_pretrained(resolve(f"reference/{name}"), dtype=torch.float32).eval()


def draw_tokens(model: Any, count: int) -> Tensor:
    """Token ids (1, count), uniform over the vocabulary and always the same."""
    return torch.randint(model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))


def runnable(model: Any) -> int:
    """`LONGEST` times the trained length in tokens, or the position table's end where that comes first."""
    limit = positions.read_hard_limit(model.config, model)
    longest: int = LONGEST * model.config.max_position_embeddings
    return min(longest, limit.tokens) if limit else longest


# ---------------------------------------------------------------------------- the facts


def describe(name: str, model: Any) -> dict[str, Any]:
    """What is equal among the models and what differs, from config, weights and training log."""
    config = model.config
    with (REPOSITORY / "training" / "logs" / f"{name}.jsonl").open(encoding="utf-8") as log:
        training = json.loads(next(log))
    fields = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    special = {
        "relative": ("clip_distance",),
        "transformer-xl": ("segment_length", "memory_length"),
        "memformer": ("segment_length", "memory_slots"),
    }
    return {
        "schemes": list(positions.read_schemes(config, model)),
        "trained_length": config.max_position_embeddings,
        "parameters": model.num_parameters(),
        "steps": training["steps"],
        "seed": training["seed"],
        **{field: getattr(config, field) for field in (*fields, *special.get(name, ()))},
    }


@torch.inference_mode()
def state(model: Any, lengths: Sequence[int]) -> dict[str, int]:
    """Length in tokens → bytes that the model carries on after so many tokens.

    The tokens are fed in chunks. What a recurrent model carries rises and falls within a segment, so another segment is fed
    after them, token by token, and the most counts.
    """
    tokens, past, sizes = draw_tokens(model, max(lengths)), None, {}
    for start, end in split(max(lengths), lengths):
        past = model(tokens[:, start:end], past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
        if end in lengths:
            past, most = feed_segment(model, past)
            sizes[str(end)] = most
    return sizes


def split(total: int, stops: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) of chunks of at most `CHUNK` tokens, none across a stop.

    >>> split(1200, (256, 1200))
    [(0, 256), (256, 768), (768, 1200)]
    """
    ends = [*stops, total]
    pieces, start = [], 0
    while start < total:
        end = min(start + CHUNK, *(stop for stop in ends if stop > start))
        pieces.append((start, end))
        start = end
    return pieces


def feed_segment(model: Any, past: Any) -> tuple[Any, int]:
    """The state after one more segment, and the most bytes on the way; a cache, which only grows, as it is."""
    most = count_bytes(past)
    for token in draw_tokens(model, getattr(model.config, "segment_length", 0) if hasattr(past, "memory") else 0)[0]:
        past = model(token[None, None], past_key_values=past, use_cache=True).past_key_values
        most = max(most, count_bytes(past))
    return past, most


def count_bytes(past: Any) -> int:
    """Bytes of all tensors in a Stream or in a transformers cache."""
    if hasattr(past, "memory"):
        tensors = [past.memory, *past.segment, *(tensor for layer in past.layers for tensor in layer)]
    else:
        tensors = [tensor for layer in past.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.inference_mode()
def cost(model: Any, lengths: Sequence[int]) -> dict[str, Any]:
    """Wall seconds of one forward at each length, on one thread; how they grow; and the multiply-adds by the config."""
    seconds = [time_forward(model, length) for length in lengths]
    return {
        "machine": "two CPU cores, one thread used",
        "best_of": BEST_OF,
        "tokens": list(lengths),
        "seconds": [round(value, 4) for value in seconds],
        "exponents": [round(math.log2(later / earlier), 3) for earlier, later in itertools.pairwise(seconds)],
        "multiply_adds_per_token": [count_multiply_adds(model.config, length) for length in lengths],
    }


def time_forward(model: Any, length: int) -> float:
    """Seconds of the fastest of `BEST_OF` forwards, logits of the last token only."""
    tokens, found = draw_tokens(model, length), []
    for _ in range(BEST_OF):
        started = time.perf_counter()
        model(tokens, use_cache=False, logits_to_keep=1)
        found.append(time.perf_counter() - started)
    return min(found)


def count_multiply_adds(config: Any, length: int) -> dict[str, float]:
    """Multiply-adds per token of the body, the mean over a text of `length`: those that depend on the length, and the others.

    Dependent: each key that a query may see is scored and its value added. Not: projections, feed-forward, and in
    Transformer-XL the sinusoids' scores, which are as many as a segment and its memory whatever the length. The output layer is
    apart: it is paid for each position whose logits are asked for.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    segment = config.segment_length if getattr(config, "position_scheme", "") == "transformer-xl" else None
    fixed = 4 * width**2 + 3 * width * config.intermediate_size
    if segment is None:
        keys = (length + 1) / 2
    else:
        reach = config.memory_length + segment
        keys = sum(min(config.memory_length, p - p % segment) + p % segment + 1 for p in range(length)) / length
        fixed += reach * width + reach * width**2 // segment
    return {
        "depending_on_length": layers * 2 * width * keys,
        "not_depending_on_length": layers * fixed,
        "output_layer_per_position": width * config.vocab_size,
    }


@torch.inference_mode()
def head(model: Any) -> dict[str, Any]:
    """How far the output layer on a whole sequence of hidden states is from the same layer position by position.

    Hidden states of `LONGEST` times the trained length; where the position table ends before, of as many windows.
    """
    total = LONGEST * model.config.max_position_embeddings
    hidden = model.model(draw_tokens(model, total).view(-1, runnable(model)))[0].reshape(1, total, -1)
    layer = model.get_output_embeddings()
    whole = layer(hidden)
    single = torch.cat([layer(hidden[:, index : index + 1]) for index in range(total)], dim=1)
    return {
        "positions": total,
        "largest_difference": float((whole - single).abs().max()),
        "largest_logit": float(whole.abs().max()),
        "parameters": sum(parameter.numel() for parameter in layer.parameters()),
    }


def sight(model: Any) -> dict[str, int]:
    """How far back from the last token the farthest one is that its logits depend on at all: by the gradient, exactly zero past it."""
    tokens = draw_tokens(model, runnable(model))
    inputs: list[Tensor] = []

    def watch(_: torch.nn.Module, __: Any, embedded: Tensor) -> Tensor:
        inputs.append(embedded.detach().requires_grad_())
        return inputs[-1]

    hook = model.get_input_embeddings().register_forward_hook(watch)
    logits = model(tokens, use_cache=False, logits_to_keep=1).logits[0, -1]
    hook.remove()
    (logits * torch.linspace(1, 2, len(logits))).sum().backward()
    moved = torch.cat([x.grad[0].abs().amax(-1) if x.grad is not None else torch.zeros(x.shape[1]) for x in inputs])
    model.zero_grad()
    return {"tokens": tokens.shape[1], "farthest": tokens.shape[1] - 1 - int(moved.nonzero()[0])}


@torch.inference_mode()
def alike(model: Any) -> dict[str, Any]:
    """Whether a query tells far tokens apart by their position: the spread of the scores' position terms over distances.

    For the query of the last token, the most over layers and heads: past the clip, and below it.
    """
    clip, total = model.config.clip_distance, runnable(model)
    distance, past, below = torch.arange(total)[None, None], 0.0, 0.0
    attentions = [layer.self_attn for layer in model.model.layers]
    given: list[Tensor] = []
    hooks = [attention.q_proj.register_forward_hook(lambda _, __, output: given.append(output)) for attention in attentions]
    model(draw_tokens(model, total), logits_to_keep=1)
    for hook, attention, query in zip(hooks, attentions, given, strict=True):
        hook.remove()
        term = attention.term(attention.split(query)[:, :, -1:], distance)
        past = max(past, float((term[..., clip:].amax(-1) - term[..., clip:].amin(-1)).max()))
        below = max(below, float((term[..., :clip].amax(-1) - term[..., :clip].amin(-1)).max()))
    return {"clip_distance": clip, "tokens": total, "largest_difference_past_clip": past, "spread_below_clip": below}


@torch.inference_mode()
def table(model: Any) -> dict[str, Any]:
    """What the model itself raises at one token more than its table has."""
    tokens = model.config.max_position_embeddings + 1
    try:
        model(draw_tokens(model, tokens))
    except (IndexError, RuntimeError, ValueError) as error:
        return {"tokens": tokens, "error": type(error).__name__, "message": str(error)}
    return {"tokens": tokens, "error": "", "message": ""}


def distances(name: str) -> dict[str, int]:
    """Hash of a prompt → tokens from the end of the prompt back to the needle's value, where it stands last.

    The hash is lm_eval's `prompt_hash`, so that a kept sample finds its distance. All models have one tokenizer.
    """
    tokenizer = load_tokenizer(f"reference/{name}", {})
    longest = LONGEST * AutoConfig.from_pretrained(resolve(f"reference/{name}")).max_position_embeddings
    metadata = {"pretrained": f"reference/{name}", "max_length": longest}
    found = {}
    for task in TaskManager(include_defaults=False, metadata=metadata).load(list(LOCATED))["tasks"].values():
        task.build_all_requests()
        for instance in task.instances:
            prompt = instance.arguments[0]
            offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
            place = prompt.rindex(instance.doc["values"][0])
            index = next(index for index, (_, end) in enumerate(offsets) if end > place)
            found[hashlib.sha256(prompt.encode()).hexdigest()] = len(offsets) - 1 - index
    return found


# ---------------------------------------------------------------------------- the command


def is_embedded(name: str) -> bool:
    """Whether the model that a run is of can be loaded by name."""
    try:
        resolve(f"reference/{'learned' if name in EXTENDED else name}")
    except ModelError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = [*MODELS, *EXTENDED, "facts"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all where none is given")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "schemes")
    arguments = parser.parse_args()
    names = arguments.names or known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    for name in names:
        if name == "facts":
            continue
        if is_embedded(name):
            run(name, arguments.out)
        else:
            print(f"{name}: not embedded, left out", file=sys.stderr)
    if "facts" in names:
        facts = measure([name for name in MODELS if is_embedded(name)])
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
