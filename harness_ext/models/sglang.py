"""`sglang-extrapolate`: lm_eval's `sglang`, run past the length that the model was trained on.

What differs from `SGLangLM`: the engine is told the length (lm_eval keeps `max_model_len` and `context_length` to itself), its table of angles with it (`engine_config`);
it starts at the first request, for the longest prompt that tasks have announced; prompts are never cut, which lm_eval's class does without a word; scored prompts
read the prefix cache up to their answer; a prompt that does not fit has an outcome and no score. BOS is the tokenizer's affair, as for `hf-extrapolate`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from lm_eval.models import sglang_causallms
from lm_eval.models.sglang_causallms import SGLangLM

from harness_ext import positions
from harness_ext.cells import Unmeasured
from harness_ext.errors import ModelError
from harness_ext.model_view import first_line, load_tokenizer, resolve
from harness_ext.models.engine import EngineModel, Likelihood

INSTALL = "pip install sglang (docs.sglang.ai/get_started/install.html)"
LONGER = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"
"""Environment: whether a context may be longer than what SGLang derives from the config. Safe here, since the tables are as long, and needed for families in whose
configs it finds no length, for which it derives 2,048."""


class SGLangExtrapolate(EngineModel, SGLangLM):
    """A model in SGLang.

    `trained_length`: tokens; read from the config where not given. `max_length`: the longest prompt to ask. `pretrained=reference/rope` names the embedded
    model. `extend`: a method that is rope parameters alone, its options (`factor` and its own) beside it. `json_model_override_args`: laid over what the
    length needs. Other arguments are lm_eval's, and those that it does not know, SGLang's own.
    """

    engine, package, room = "SGLang", "sglang", 7
    """`max_req_input_len` is the context less 6 (sglang 0.5.23, `TpWorker.get_worker_info`), and an input has to be shorter than that."""

    def __init__(
        self,
        pretrained: str,
        *,
        trained_length: int | None = None,
        max_length: int | None = None,
        extend: str | None = None,
        add_bos_token: bool | None = None,
        **options: Any,
    ) -> None:
        if find_spec("sglang") is None or not hasattr(sglang_causallms, "sgl"):
            raise ModelError(f"sglang-extrapolate needs SGLang, which is not installed: {INSTALL}")
        if options.get("allow_auto_truncate"):
            raise ModelError(
                "allow_auto_truncate=True cuts prompts without a word; leave it out: sglang-extrapolate never truncates"
            )
        given = options.pop("json_model_override_args", None) or {}
        self._given: dict[str, Any] = json.loads(given) if isinstance(given, str) else dict(given)
        kind, _, number = str(options.pop("device", None) or "cuda").partition(
            ":"
        )  # lm_eval's default is cuda:0, and SGLang's word is cuda
        if kind != "cuda":
            raise ModelError(f"device={kind}: lm_eval runs SGLang on CUDA alone")
        options |= {"device": kind, **({"base_gpu_id": int(number)} if number not in ("", "0") else {})}
        for other in ("max_model_len", "context_length"):
            max_length = options.pop(other, max_length)
        options.update({key: self._given.pop(key) for key in ("rope_parameters", "rope_scaling") if key in self._given})
        name = self._prepare(pretrained, options, trained_length=trained_length, max_length=max_length, extend=extend)
        self._check_scale()
        tokenizer = load_tokenizer(options.get("tokenizer_path") or pretrained, self._source)
        if options.get("tokenizer_path"):
            options["tokenizer_path"] = resolve(options["tokenizer_path"])
        # lm_eval runs strangers' code unless told not to, reads prompts whole, and falls back to weights that are pickles.
        options = {
            "trust_remote_code": False,
            "chunked_prefill_size": None,
            "load_format": "safetensors",
            "disable_radix_cache": False,
            "batch_size": "auto",
            **options,
        }
        with _without_starting(tokenizer):
            super().__init__(name, **options)
        self.model = None
        self.add_bos_token = add_bos_token
        self.tokenizer.model_max_length = int(1e30)  # its limit is only a warning, and says the opposite of what this class is for

    def _check_scale(self) -> None:
        """Raises ModelError for a scale of attention that SGLang would pass over: it reads `attn_factor` (sglang 0.5.23)."""
        own = self._parameters or getattr(positions.text_config(self._checkpoint), "rope_parameters", None) or {}
        parts = [self._options, own, *(part for part in own.values() if isinstance(part, Mapping))]
        found = next((part["attention_factor"] for part in parts if part.get("attention_factor") is not None), None)
        if found is not None:
            raise ModelError(
                f"attention_factor={found}: SGLang reads no such parameter, and would run without it; use hf-extrapolate or vllm-extrapolate"
            )

    # ------------------------------------------------------------------ the engine

    def _start(self, tokens: int, overrides: dict[str, Any]) -> int:
        context = tokens + self.room
        told = {"json_model_override_args": json.dumps({**overrides, **self._given}), "context_length": context}
        self.model_args |= told
        try:
            with _allow_longer():
                self.model = sglang_causallms.sgl.Engine(**self.model_args)
        except self.failures as error:
            raise ModelError(f"SGLang does not start for {tokens} tokens: {first_line(error)}") from error
        if (found := self._read_back()["max_length"]) < context:
            raise ModelError(f"SGLang was told a context of {context} tokens, and runs with {found}")
        # Less than the context where its pool of keys and values is smaller.
        longest = getattr(self.model.tokenizer_manager, "max_req_input_len", None)
        return tokens if longest is None else min(tokens, int(longest) - 1)

    def _shut_down(self) -> None:
        self.model.shutdown()

    def _read_back(self) -> dict[str, Any]:
        manager = self.model.tokenizer_manager
        return {
            "max_length": int(manager.context_len),
            "config": manager.model_config.hf_text_config,
            "dtype": str(getattr(manager.model_config, "dtype", "")),
            "longest_input": getattr(manager, "max_req_input_len", None),
            "prefix_caching": not self.model_args["disable_radix_cache"],
            "tensor_parallel_size": self.tensor_parallel_size,
            "data_parallel_size": self.data_parallel_size,
        }

    @property
    def _version(self) -> str:
        return str(sglang_causallms.sgl.__version__)

    @property
    def _cards(self) -> int:
        return int(self.tensor_parallel_size * self.data_parallel_size)

    # ------------------------------------------------------------------ asking

    def _score(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[Likelihood]:
        """Log-probabilities from the context's last token on, up to which SGLang reads its prefix cache (`logprob_start_len`)."""
        outputs = self.model.generate(
            input_ids=list(sequences),
            sampling_params=[{"temperature": 0, "max_new_tokens": 1}] * len(sequences),
            return_logprob=True,
            top_logprobs_num=1,
            logprob_start_len=[start - 1 for start in starts],
        )
        self._count(sequences, outputs)
        return [_read_score(*asked) for asked in zip(sequences, starts, outputs, strict=True)]

    def _write(self, prompts: Sequence[list[int]], settings: Sequence[dict[str, Any]]) -> list[str | Unmeasured]:
        params = []
        for asked in settings:
            until, budget = asked.pop("until"), asked.pop("max_gen_toks")
            stop = [text for text in until if text == self._eos] if self.think_end_token else until
            params.append({**self.modify_gen_kwargs(asked), "max_new_tokens": budget, "stop": stop})
        outputs = self.model.generate(input_ids=list(prompts), sampling_params=params)
        self._count(prompts, outputs)
        return [_find_cut(ids, output) or str(output["text"]) for ids, output in zip(prompts, outputs, strict=True)]

    def _count(self, sequences: Sequence[list[int]], outputs: Sequence[Any]) -> None:
        cached = sum(int(output["meta_info"].get("cached_tokens") or 0) for output in outputs)
        self._read["computed"] += sum(map(len, sequences)) - cached


@contextlib.contextmanager
def _without_starting(tokenizer: Any) -> Iterator[None]:
    """lm_eval's constructor, which starts an engine and takes its tokenizer, without one."""
    own = sglang_causallms.sgl
    sglang_causallms.sgl = SimpleNamespace(
        Engine=lambda **_: SimpleNamespace(tokenizer_manager=SimpleNamespace(tokenizer=tokenizer))
    )
    try:
        yield
    finally:
        sglang_causallms.sgl = own


@contextlib.contextmanager
def _allow_longer() -> Iterator[None]:
    """The engine's processes, started within, take the context that they are told."""
    own = os.environ.get(LONGER)
    os.environ[LONGER] = "1"
    try:
        yield
    finally:
        os.environ.pop(LONGER)
        if own is not None:
            os.environ[LONGER] = own


def _find_cut(ids: Sequence[int], output: Any) -> Unmeasured | None:
    """The outcome of a prompt that SGLang gave up, or cut; None where it did neither."""
    said = output["meta_info"]
    finish = said.get("finish_reason") or {}
    if isinstance(finish, dict) and finish.get("type") == "abort":
        return Unmeasured("backend_error", f"SGLang gave the prompt up: {finish.get('message') or 'without a reason'}")
    read = said.get("prompt_tokens")
    if read is None or read == len(ids):
        return None
    return Unmeasured("backend_limit", f"SGLang read {read} tokens of a prompt of {len(ids)}")


def _read_score(ids: list[int], start: int, output: Any) -> Likelihood:
    """Log-likelihood and greediness of what stands from `start` on: the likeliest has to be the token that is there."""
    cut = _find_cut(ids, output)
    if cut:
        return cut
    answer = ids[start:]
    places = output["meta_info"]["input_token_logprobs"][-len(answer) :]  # (log-probability, token, its text)
    tops = output["meta_info"]["input_top_logprobs"][-len(answer) :]
    if [token for _, token, *_ in places] != answer or any(value is None or math.isnan(value) for value, *_ in places):
        return Unmeasured("backend_error", "SGLang gave no log-probability for a token of the answer")
    greedy = all(bool(top) and max(top)[1] == token for token, top in zip(answer, tops, strict=True))
    return float(sum(value for value, *_ in places)), greedy
