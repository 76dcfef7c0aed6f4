"""vLLM and SGLang as lm_eval's classes meet them, played at that border over a small transformers model.

What is played follows vLLM 0.32.0 (`vllm/config/model.py`, `_get_and_verify_max_len`; `layers/rotary_embedding`; `sampling_params.py`; `v1/worker/gpu_model_runner.py`) and
SGLang 0.5.23 (`srt/configs/model_config.py`, `_derive_context_length`; `srt/entrypoints/engine.py`; `srt/managers/tp_worker.py`; `srt/utils/hf_transformers/config.py`).
Both look angles up in a table: a position past its rows is an error here, as it is a wrong answer there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BLOCK = 16
"""Tokens of a cache block."""
KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
SERVER_ARGS = (
    "model_path tokenizer_path tokenizer_mode load_format trust_remote_code dtype kv_cache_dtype device mem_fraction_static tp_size dp_size "
    "chunked_prefill_size context_length json_model_override_args disable_radix_cache revision base_gpu_id log_level"
).split()
"""Of sglang 0.5.23's `ServerArgs` (srt/arg_groups/fields), those that may be used."""
GENERATE = (
    "prompt sampling_params input_ids image_data audio_data video_data mm_hashes mm_content_hashes return_logprob logprob_start_len top_logprobs_num "
    "token_ids_logprob lora_path custom_logit_processor"
).split()
"""The first parameters of sglang 0.5.23's `Engine.generate`, in their order."""


@dataclass
class Played:
    """What the engines did, and how they are made to fail."""

    started: list[dict[str, Any]] = field(default_factory=list)
    """Arguments of each engine, whether it started or not."""
    asked: list[list[list[int]]] = field(default_factory=list)
    """Prompts of each call."""
    told: list[Any] = field(default_factory=list)
    """Sampling parameters of each call."""
    capacity: int = 10**9
    """Tokens of one prompt that there is memory for."""
    crash: dict[int, BaseException] = field(default_factory=dict)
    """Prompts of at least so many tokens end the engine with this."""
    cut: int = 0
    """Tokens that the engine cuts off at the beginning without a word."""
    shut_down: int = 0
    loses_overrides: bool = False
    environment: list[str | None] = field(default_factory=list)
    """SGLang's permission, as each engine started."""


def read_config(model: str, overrides: Mapping[str, Any], merges: bool = False) -> tuple[Any, Any]:
    """The config and its text part, with overrides laid over as the engines do: a nested config is updated, a dict replaced (SGLang: merged)."""
    from transformers import AutoConfig, PretrainedConfig

    config = AutoConfig.from_pretrained(model)
    for name, value in overrides.items():
        own = getattr(config, name, None)
        if isinstance(own, PretrainedConfig):
            own.update(value)
        elif merges and isinstance(own, dict) and isinstance(value, dict):
            setattr(config, name, {**own, **value})
        else:
            setattr(config, name, value)
    return config, config.get_text_config()


def parts(text: Any) -> list[dict[str, Any]]:
    """Rope parameters, one set for each layer type."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or ([parameters] if parameters else [])


def derive(text: Any) -> float:
    """The length that an engine reads from a config, by the smallest of its fields."""
    found = min((value for key in KEYS if isinstance(value := getattr(text, key, None), int)), default=math.inf)
    for part in parts(text):
        if part.get("rope_type") not in ("llama3", "yarn", "longrope"):
            found *= part.get("factor", 1.0)
    return found


def rows(text: Any) -> float:
    """Of the shortest of its tables of angles."""
    length = min((value for key in KEYS if isinstance(value := getattr(text, key, None), int)), default=math.inf)
    sizes = []
    for part in parts(text):
        if part.get("rope_type") == "yarn":
            sizes.append(part["original_max_position_embeddings"] * part["factor"])
        else:
            sizes.append(length * part.get("factor", 1.0) if part.get("rope_type") == "linear" else length)
    return min(sizes, default=length)


class Weights:
    """A small model under a config, and the prefix cache."""

    def __init__(self, folder: str, config: Any, table: float) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
        self.table, self.kept = table, set[tuple[int, ...]]()

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities after each token, (tokens, vocabulary)."""
        assert len(ids) <= self.table, f"position {len(ids) - 1} was read past the {self.table:g} rows of the table of angles"
        with torch.inference_mode():
            return torch.log_softmax(self.model(torch.tensor([list(ids)])).logits[0].float(), -1)

    def find(self, ids: Sequence[int], most: int) -> int:
        """Tokens of a prompt that are in the cache, in whole blocks."""
        found = 0
        while found + BLOCK <= most and tuple(ids[: found + BLOCK]) in self.kept:
            found += BLOCK
        return found

    def keep(self, ids: Sequence[int]) -> None:
        self.kept |= {tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)}

    def write(self, ids: Sequence[int], budget: int, stops: Sequence[str], tokenizer: Any) -> str:
        """Greedy, up to the first stop text."""
        whole = list(ids)
        for _ in range(budget):
            whole.append(int(self.read(whole)[-1].argmax()))
            text = str(tokenizer.decode(whole[len(ids) :]))
            for stop in stops:
                if stop and stop in text:
                    return text[: text.index(stop)]
        return text


# ---------------------------------------------------------------------- vLLM


@dataclass
class SamplingParams:
    """Those of vLLM's fields that may be used; another one is a TypeError."""

    temperature: float = 1.0
    max_tokens: int = 16
    stop: Sequence[str] = ()
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    skip_reading_prefix_cache: bool | None = None

    def __post_init__(self) -> None:
        if self.skip_reading_prefix_cache is None:
            self.skip_reading_prefix_cache = self.prompt_logprobs is not None


def make_vllm(played: Played) -> dict[str, ModuleType]:
    """The modules that lm_eval's class and ours import."""

    class EngineArgs:
        def __init__(self, **arguments: Any) -> None:
            self.arguments = arguments

        def create_model_config(self) -> Any:
            overrides = {} if played.loses_overrides else self.arguments.get("hf_overrides") or {}
            config, text = read_config(self.arguments["model"], overrides)
            derived, asked = derive(text), self.arguments["max_model_len"]
            if asked is not None and asked > derived:
                raise ValueError(f"User-specified max_model_len ({asked}) is greater than the derived max_model_len ({derived})")
            if asked in (None, -1):
                found = 2048 if math.isinf(derived) else int(derived)
                asked = min(found, played.capacity) if asked == -1 else found
            return SimpleNamespace(hf_config=config, hf_text_config=text, max_model_len=asked, dtype=torch.float32)

    class LLM:
        def __init__(self, **arguments: Any) -> None:
            played.started.append(dict(arguments))
            config = EngineArgs(**arguments).create_model_config()
            if config.max_model_len > played.capacity or not played.capacity:
                raise ValueError(
                    f"To serve at least one request with the model's max seq len ({config.max_model_len}), 9 GiB KV cache is needed"
                )
            cache = SimpleNamespace(enable_prefix_caching=arguments["enable_prefix_caching"])
            core = SimpleNamespace(shutdown=lambda: setattr(played, "shut_down", played.shut_down + 1))
            self.llm_engine = SimpleNamespace(
                model_config=config, vllm_config=SimpleNamespace(cache_config=cache), engine_core=core
            )
            self.weights = Weights(arguments["model"], config.hf_config, rows(config.hf_text_config))
            self.dead: BaseException | None = None
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(arguments["model"])

        def generate(
            self, prompts: Sequence[Any], sampling_params: Sequence[Any], use_tqdm: bool = True, lora_request: Any = None
        ) -> list[Any]:
            asked = [prompt["prompt_token_ids"] for prompt in prompts]
            played.asked.append(asked)
            played.told.append(list(sampling_params))
            for ids in asked:
                self.dead = self.dead or next((error for size, error in played.crash.items() if len(ids) >= size), None)
                if self.dead:
                    raise self.dead
                if len(ids) >= self.llm_engine.model_config.max_model_len:
                    raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length")
            return [self.answer(ids[played.cut :], asked) for ids, asked in zip(asked, sampling_params, strict=True)]

        def answer(self, ids: list[int], asked: SamplingParams) -> Any:
            cached = 0 if asked.skip_reading_prefix_cache else self.weights.find(ids, len(ids) - 1)
            self.weights.keep(ids)
            places: list[Any] = [None]
            if asked.prompt_logprobs is not None:
                found = self.weights.read(ids)
                for place, token in enumerate(ids[1:]):
                    if place < cached:  # what nobody computed is whatever was in memory
                        places.append({-7: SimpleNamespace(logprob=-777.0)})
                        continue
                    likeliest = int(found[place].argmax())
                    places.append(
                        {known: SimpleNamespace(logprob=float(found[place, known])) for known in dict.fromkeys((token, likeliest))}
                    )
            text = self.weights.write(ids, asked.max_tokens, asked.stop, self.tokenizer) if asked.detokenize else ""
            return SimpleNamespace(
                prompt_token_ids=ids, prompt_logprobs=places, num_cached_tokens=cached, outputs=[SimpleNamespace(text=text)]
            )

    def get_tokenizer(name: str, **_: Any) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)

    modules = {
        name: ModuleType(name)
        for name in (
            "vllm vllm.lora vllm.lora.request vllm.engine vllm.engine.arg_utils vllm.renderers vllm.renderers.hf vllm.tokenizers"
        ).split()
    }
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
    vars(modules["vllm"]).update(
        __version__="0.32.0",
        LLM=LLM,
        SamplingParams=SamplingParams,
        TokensPrompt=lambda prompt_token_ids: {"prompt_token_ids": prompt_token_ids},
    )
    vars(modules["vllm.lora.request"]).update(LoRARequest=object)
    vars(modules["vllm.engine.arg_utils"]).update(EngineArgs=EngineArgs)
    vars(modules["vllm.renderers.hf"]).update(resolve_chat_template=lambda tokenizer, **_: tokenizer.chat_template)
    vars(modules["vllm.tokenizers"]).update(get_tokenizer=get_tokenizer)
    return modules


VLLM = Played()
"""lm_eval's module is imported once in a process, so what it is over is made once too."""
MODULES = make_vllm(VLLM)


def play_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Played]]:
    """Our module over the played vLLM, and what it did."""
    vars(VLLM).update(vars(Played()))
    for name, module in MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)
    own = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0" if name == "vllm" else own(name))
    ours = importlib.import_module("harness_ext.models.vllm")
    yield (importlib.reload(ours) if ours.MISSING else ours), VLLM


# ---------------------------------------------------------------------- SGLang


def make_sglang(played: Played) -> ModuleType:
    """The module that lm_eval's class imports."""

    class Engine:
        def __init__(self, **arguments: Any) -> None:
            unknown = set(arguments) - set(SERVER_ARGS)
            if unknown:
                raise TypeError(f"ServerArgs.__init__() got unexpected keyword arguments {sorted(unknown)}")
            played.started.append(dict(arguments))
            allowed = os.environ.get("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN")
            played.environment.append(allowed)
            overrides = {} if played.loses_overrides else json.loads(arguments.get("json_model_override_args", "{}"))
            config, text = read_config(arguments["model_path"], overrides, merges=True)
            derived = next((value for key in KEYS if isinstance(value := getattr(text, key, None), int)), 2048)
            asked = arguments.get("context_length") or derived
            if asked > derived and allowed != "1":
                raise ValueError(f"User-specified context_length ({asked}) is greater than the derived context_length ({derived})")
            from transformers import AutoTokenizer

            self.tokenizer_manager = SimpleNamespace(
                tokenizer=AutoTokenizer.from_pretrained(arguments["model_path"]),
                context_len=asked,
                max_req_input_len=min(asked - 1, played.capacity - 1) - 5,
                model_config=SimpleNamespace(hf_text_config=text, dtype=torch.float32),
            )
            self.weights = Weights(arguments["model_path"], config, max(rows(text), asked if "yarn" in str(parts(text)) else 0))

        def shutdown(self) -> None:
            played.shut_down += 1

        def generate(self, *args: Any, **options: Any) -> list[dict[str, Any]]:
            unknown = set(options) - set(GENERATE)
            if args or unknown:
                raise TypeError(f"Engine.generate() got {args} and {sorted(unknown)}")
            prompts, params = options["input_ids"], options["sampling_params"]
            played.asked.append(prompts)
            played.told.append(options)
            manager = self.tokenizer_manager
            for ids, asked in zip(prompts, params, strict=True):
                for size, error in played.crash.items():
                    if len(ids) >= size:
                        raise error
                if len(ids) >= manager.max_req_input_len or len(ids) + asked["max_new_tokens"] > manager.context_len:
                    raise ValueError(f"Input length ({len(ids)} tokens) exceeds the maximum allowed length")
            starts = options.get("logprob_start_len") or [-1] * len(prompts)
            return [
                self.answer(ids[played.cut :], asked, start, options)
                for ids, asked, start in zip(prompts, params, starts, strict=True)
            ]

        def answer(self, ids: list[int], asked: dict[str, Any], start: int, options: dict[str, Any]) -> dict[str, Any]:
            most = len(ids) - 1 if start < 0 else min(len(ids) - 1, start)
            cached = self.weights.find(ids, most)
            self.weights.keep(ids)
            said: dict[str, Any] = {"prompt_tokens": len(ids), "cached_tokens": cached, "finish_reason": {"type": "length"}}
            text = ""
            if options.get("return_logprob"):
                found = self.weights.read(ids)
                said["input_token_logprobs"] = [
                    (None if place == start else float(found[place - 1, ids[place]]), ids[place], None)
                    for place in range(start, len(ids))
                ]
                likeliest = [int(found[place - 1].argmax()) for place in range(start + 1, len(ids))]
                said["input_top_logprobs"] = [None] + [
                    [(float(found[start + index, token]), token, None)] for index, token in enumerate(likeliest)
                ]
            else:
                text = self.weights.write(ids, asked["max_new_tokens"], asked["stop"], self.tokenizer_manager.tokenizer)
            return {"text": text, "meta_info": said}

    module = ModuleType("sglang")
    module.__spec__ = ModuleSpec("sglang", None)
    vars(module).update(__version__="0.5.23", Engine=Engine)
    return module


def play_sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Played]]:
    """Our module over the played SGLang, and what it did."""
    played = Played()
    module = make_sglang(played)
    monkeypatch.setitem(sys.modules, "sglang", module)
    from lm_eval.models import sglang_causallms

    monkeypatch.setattr(sglang_causallms, "sgl", module, raising=False)
    yield importlib.import_module("harness_ext.models.sglang"), played
