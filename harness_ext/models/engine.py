"""What `vllm-extrapolate` and `sglang-extrapolate` share: an engine that is started for the longest prompt, and asked so that its prefix cache hits.

An engine makes its tables and its room for keys and values when it starts, and lm_eval's classes start it in the constructor, before tasks have said
(`lift`) how long their prompts are. So here it starts at the first request, told everything that has to hold by then. Until then only the config and the tokenizer are read.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import gc
import importlib.metadata
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from harness_ext import positions
from harness_ext.cells import Limit, TrainedLength, Unmeasured
from harness_ext.errors import HarnessExtError, ModelError
from harness_ext.model_view import check_fits, first_line, resolve
from harness_ext.models import engine_config, memory, provenance
from harness_ext.models.ceiling import Ceiling
from harness_ext.models.extensions import rotary
from harness_ext.models.extensions.extension import find_method
from harness_ext.models.extensions.method import Setting
from harness_ext.models.outcomes import check_understood
from harness_ext.token_count import TokenCount, count_appended, find_end

log = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm_eval's: (key for its cache, context tokens, continuation tokens)."""
Likelihood = tuple[float, bool] | Unmeasured
LONG_TEXT = 1000
"""Characters; shorter texts are tokenised whole."""
DEFAULT_LENGTH = 2048
"""Tokens, where neither the config nor the user names a trained length; lm_eval's."""


class EngineModel(abc.ABC):
    """One of lm_eval's classes for an engine is the second base."""

    engine: str
    """Its name, for messages."""
    package: str
    room: int
    """Tokens that it needs beside a prompt and its answer."""
    failures: tuple[type[Exception], ...] = (RuntimeError, ValueError, MemoryError)
    """What it raises while it starts and runs."""
    tokenizer: Any
    model: Any

    def _prepare(
        self, pretrained: str, options: dict[str, Any], *, trained_length: int | None, max_length: int | None, extend: str | None
    ) -> str:
        """The name or folder that the engine can load; `options` without what is for us. Raises ModelError for what is wrong before anything is loaded."""
        for name, value in (("trained_length", trained_length), ("max_length", max_length)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ModelError(f"{name}: found {value!r}; expected a whole number of tokens from 1")
        if not isinstance(pretrained, str):
            raise ModelError(f"{self.engine} loads a model by itself: pretrained has to be a folder or a name on the hub")
        self._method = find_method(extend) if extend and extend != "none" else None
        self._factor = options.pop("factor", None)
        taken = self._method.options if self._method else {}
        self._options = {**taken, **{name: options.pop(name) for name in taken if name in options}}
        if self._factor is not None and self._method is None:
            raise ModelError(f"factor={self._factor} was given, and no method that it is for; add extend=NAME")
        if self._factor is not None and (not isinstance(self._factor, (int, float)) or self._factor < 1):
            raise ModelError(
                f"factor={self._factor!r} was given; expected a number from 1, the longest length over the trained one"
            )
        name = resolve(pretrained)
        source = {"revision": options.get("revision"), "trust_remote_code": bool(options.get("trust_remote_code"))}
        self._source = {key: value for key, value in source.items() if value is not None}
        self._checkpoint = engine_config.read_config(name, **self._source)
        own = getattr(positions.text_config(self._checkpoint), "rope_parameters", None)
        given = [options.pop(key) for key in ("rope_scaling", "rope_parameters") if options.get(key)]
        self._parameters = functools.reduce(rotary.merge, given, own) if given else None
        engine_config.check_told(self._checkpoint, self._method, self.engine)
        self._given_length, self._asked_max, self._lifted = trained_length, max_length, 0
        self._hard = engine_config.find_limit(self._checkpoint, trust_remote_code=bool(options.get("trust_remote_code")))
        self._ceiling, self._takes, self._fits, self._knows_outcomes = Ceiling(), 0, 0, True
        self._broken: Unmeasured | None = None
        self._told: dict[str, Any] = {}
        self._setting: Setting | None = None
        self._read = {"asked": 0, "computed": 0, "seconds": 0.0}
        warning = positions.find_rounding(self._checkpoint, str(options.get("dtype")))
        if warning:
            log.warning("%s", warning)
        if self._method:  # where the method does not apply, it says so before the engine starts
            self._scale(2 * self._window)
        return name

    # ------------------------------------------------------------------ lengths

    @property
    def trained_length(self) -> TrainedLength | None:
        """From the user, or from the checkpoint's config."""
        if self._given_length:
            return TrainedLength(tokens=self._given_length, source="user")
        return positions.read_trained_length(self._checkpoint)

    @property
    def length_limits(self) -> list[Limit]:
        """The position scheme's end, less what the engine needs beside a prompt, and the user's `max_length`."""
        user = self._asked_max and Limit(
            tokens=self._asked_max,
            outcome="backend_limit",
            reason=f"max_length={self._asked_max} was asked for; raise it or leave it out",
        )
        hard = self._hard and dataclasses.replace(
            self._hard,
            tokens=self._hard.tokens - self.room,
            reason=f"{self._hard.reason}; {self.engine} keeps {self.room} of them for itself",
        )
        return [limit for limit in (hard, user) if limit]

    @property
    def max_length(self) -> int:
        """The user's, or the trained length, or the longest prompt that a task has asked for."""
        return self._asked_max or max(self._window, self._lifted)

    @property
    def _window(self) -> int:
        trained = self.trained_length
        return trained.tokens if trained else DEFAULT_LENGTH

    def lift(self, tokens: int) -> None:
        """Raises `max_length` to the longest prompt of a task. Raises PromptTooLongError where the model cannot run it."""
        check_fits(tokens, self.length_limits)
        self._lifted = max(self._lifted, tokens)

    # ------------------------------------------------------------------ the engine

    @abc.abstractmethod
    def _start(self, tokens: int, overrides: dict[str, Any]) -> int:
        """Starts an engine for prompts of `tokens` tokens, answers included. `overrides`: of the config's fields.

        Gives the tokens that it takes, which are fewer where memory has no room for more. Raises ModelError where it does not start.
        """

    @abc.abstractmethod
    def _read_back(self) -> dict[str, Any]:
        """What the running engine says of itself: `max_length` in tokens, `config` (its text config), and more."""

    @abc.abstractmethod
    def _score(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[Likelihood]:
        """The log-likelihood of each sequence from its start on, and whether greedy decoding gives it."""

    @abc.abstractmethod
    def _write(self, prompts: Sequence[list[int]], settings: Sequence[dict[str, Any]]) -> list[str | Unmeasured]:
        """The text generated after each prompt. `settings`: lm_eval's, normalised, with `until`."""

    def _scale(self, longest: int) -> Mapping[str, Any] | None:
        if self._method is None:
            return self._parameters
        known = self._lifted or self._asked_max or longest
        factor = float(self._factor or max(known, self._window) / self._window)
        self._setting = Setting(tokens=known, factor=factor, options=self._options)
        return engine_config.scale_rope(self._checkpoint, self._method, self._setting, self._window)

    def _open(self, longest: int) -> None:
        """An engine that takes prompts of `longest` tokens, or as long as memory has room for."""
        if self._takes >= longest or (self._takes and self._fits):
            return
        self._close()
        tokens = self._fits or max(self._asked_max or self._lifted, longest)
        self._told = engine_config.stretch(self._checkpoint, tokens + self.room, self._scale(longest))
        began = time.monotonic()
        takes = self._start(tokens, self._told)
        self._check_told()
        log.info("%s started for %d tokens in %.0f s", self.engine, takes, time.monotonic() - began)
        if takes < tokens:
            self._fits = takes
        self._takes = takes

    def _check_told(self) -> None:
        """Raises ModelError where the engine runs by another config than it was told."""
        config = self._read_back()["config"]
        for name, told in self._told.get("text_config", self._told).items():
            found = getattr(config, name, None)
            if not _agrees(found, told):
                raise ModelError(f"{self.engine} was told {name}={told}, and runs with {found}")

    def _close(self) -> None:
        """Lets go of the engine, whatever state it is in."""
        self._takes = 0
        if getattr(self, "model", None) is not None:
            self._shut_down()
            self.model = None
            gc.collect()

    @abc.abstractmethod
    def _shut_down(self) -> None:
        """Ends the engine's own processes."""

    # ------------------------------------------------------------------ what lm_eval calls

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Likelihood]:
        """lm_eval's. Raises ModelError where a prompt of a task that knows no outcomes has no score."""
        found = super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[misc]
        return [check_understood(request, answer) for request, answer in zip(requests, found, strict=True)]

    def _loglikelihood_tokens(self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any) -> list[Likelihood]:
        """The answer to each request, in order. Raises PromptTooLongError before anything is asked."""
        if not requests:
            return []
        sequences = [[*context, *continuation] for _, context, continuation in requests]
        starts = [len(context) for _, context, _ in requests]

        def score(indices: Sequence[int]) -> list[Likelihood]:
            return self._score([sequences[index] for index in indices], [starts[index] for index in indices])

        return self._ask_all(list(map(len, sequences)), sequences, score, quiet=disable_tqdm, name="loglikelihood")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """lm_eval's, in windows of the user's `max_length` or the trained length. Raises ModelError where a window has no answer."""
        (lifted, self._lifted), self._knows_outcomes = (self._lifted, 0), False
        try:
            return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))  # type: ignore[misc]
        finally:
            self._lifted, self._knows_outcomes = lifted, True

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """The answer to each request, in order, cut at the first of its stop texts. Raises PromptTooLongError before anything is asked."""
        if not requests:
            return []
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        default: int = self.max_gen_toks  # type: ignore[attr-defined]
        settings: list[dict[str, Any]] = [dict(normalize_gen_kwargs(request.args[1], default)) for request in requests]
        for asked in settings:
            asked["until"] = handle_stop_sequences(asked.get("until"), eos=self._eos)
        sizes = [len(prompt) + asked["max_gen_toks"] for prompt, asked in zip(prompts, settings, strict=True)]
        thinking = getattr(self, "think_end_token", None)

        def write(indices: Sequence[int]) -> list[Any]:
            found = self._write([prompts[index] for index in indices], [dict(settings[index]) for index in indices])
            return [
                text if isinstance(text, Unmeasured) else postprocess_generated_text(text, settings[index]["until"], thinking)
                for index, text in zip(indices, found, strict=True)
            ]

        found = self._ask_all(sizes, prompts, write, quiet=disable_tqdm, name="generate_until")
        return [check_understood(request, answer) for request, answer in zip(requests, found, strict=True)]

    # ------------------------------------------------------------------ asking

    def _ask_all(
        self,
        sizes: Sequence[int],
        sequences: Sequence[list[int]],
        ask: Callable[[Sequence[int]], list[Any]],
        *,
        quiet: bool,
        name: str,
    ) -> list[Any]:
        """The answer to each prompt, asked in the order of their tokens, so that those that begin alike follow one another."""
        check_fits(max(sizes), self.length_limits)
        self._open(max(sizes))
        order = sorted(range(len(sizes)), key=lambda index: np.asarray(sequences[index], dtype=">u4").tobytes())
        size: Any = self.batch_size  # type: ignore[attr-defined]
        rows = len(order) if size in ("auto", 1) else int(size)  # 1 is lm_eval's default, and an engine batches by itself
        found: list[Any] = [None] * len(order)
        began = time.monotonic()
        for start in tqdm(range(0, len(order), rows), desc=name, disable=True if quiet or rows >= len(order) else None):
            batch = order[start : start + rows]
            for index, answer in zip(batch, self._ask(batch, sizes, ask), strict=True):
                if isinstance(answer, Unmeasured) and not self._knows_outcomes:
                    raise ModelError(f"{answer.reason}; a sum over the others would be a false number")
                found[index] = answer
        self._read["seconds"] += time.monotonic() - began
        return found

    def _ask(self, indices: Sequence[int], sizes: Sequence[int], ask: Callable[[Sequence[int]], list[Any]]) -> list[Any]:
        """The answers to prompts; where the engine fails over them, to shorter ones first, each half by an engine started anew."""
        known = {index: self._find_known(sizes[index]) for index in indices}
        asked = [index for index in indices if known[index] is None]
        if not asked:
            return [known[index] for index in indices]
        try:
            answers = self._run(asked, sizes, ask)
        except HarnessExtError:
            raise
        except self.failures as error:
            failed = _explain(error, self.engine)
        else:
            return [known[index] or answers[index] for index in indices]
        log.warning("%s, over %d prompts of up to %d tokens", failed.reason, len(asked), max(sizes[index] for index in asked))
        self._close()  # outside the handler of the error, which holds what the engine had
        lengths = sorted({sizes[index] for index in asked})
        if len(lengths) == 1:
            for index in asked:
                self._ceiling.note(sizes[index], failed)
            return [known[index] or failed for index in indices]
        middle = lengths[len(lengths) // 2]
        parts = [index for index in asked if sizes[index] < middle], [index for index in asked if sizes[index] >= middle]
        answers = dict(itertools.chain.from_iterable(zip(part, self._ask(part, sizes, ask), strict=True) for part in parts))
        return [known[index] or answers[index] for index in indices]

    def _find_known(self, tokens: int) -> Unmeasured | None:
        """Why a prompt of so many tokens is not asked; None where it is."""
        if self._fits and tokens > self._fits:
            said = (
                f"{self.engine} has memory for the keys and values of {self._fits} tokens, and a prompt of {tokens} was asked for"
            )
            return Unmeasured("out_of_memory", said)
        return self._broken or self._ceiling.find(tokens)

    def _run(self, indices: Sequence[int], sizes: Sequence[int], ask: Callable[[Sequence[int]], list[Any]]) -> dict[int, Any]:
        """The answers to prompts by index, from an engine that runs. One that does not start again answers nothing any more."""
        again = not self._takes
        try:
            self._open(max(sizes[index] for index in indices))
        except ModelError as error:
            if not again:
                raise
            self._broken = Unmeasured("backend_error", str(error))
            return dict.fromkeys(indices, self._broken)
        answers = ask(indices)
        self._read["asked"] += sum(sizes[index] for index in indices)
        return dict(zip(indices, answers, strict=True))

    # ------------------------------------------------------------------ for the results file

    def get_model_info(self) -> dict[str, Any]:
        """What was in effect, read back from the running engine, and what the run was made with."""
        known = {name: importlib.metadata.version(name) for name in provenance.PACKAGES}
        trained = positions.read_trained_length(self._checkpoint)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = self._read_back() if self._takes else {}
        return {
            "model_dtype": str(found.pop("dtype", "")),
            "model_type": positions.find_type(self._checkpoint),
            "position_scheme": "+".join(positions.read_schemes(self._checkpoint)) or "unknown",
            "hard_limit": self._hard and self._hard.tokens,
            "config_trained_length": trained and {"tokens": trained.tokens, "source": trained.source},
            "weights_fingerprint": "",
            "hardware": provenance.describe_hardware(torch.nn.Module(), device)
            | ({"count": self._cards} if device.type == "cuda" else {}),
            "packages": {**known, self.package: self._version},
            "override": self._describe_override(found.pop("config", None), found.get("max_length")),
            "engine": found,
            "reading": dict(self._read),
        }

    @property
    @abc.abstractmethod
    def _version(self) -> str: ...

    @property
    @abc.abstractmethod
    def _cards(self) -> int: ...

    def _describe_override(self, config: Any, takes: int | None) -> dict[str, Any]:
        """The method, and the fields that say what is in effect: the checkpoint's, and those that the engine runs with."""
        after = {str(takes): _list_fields(config)} if config is not None else {}
        return {
            "method": self._method.name if self._method else "none",
            "source": self._method.source if self._method else "the checkpoint's own",
            "factor": self._setting.factor if self._setting else self._factor,
            "options": self._options,
            "before": _list_fields(positions.text_config(self._checkpoint)),
            "after": after,
        }

    # ------------------------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        """EOS, or what stands for it in a tokenizer that has none; as `hf-extrapolate` has it."""
        return find_end(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """What goes before an empty context."""
        given: int | None = self.custom_prefix_token_id  # type: ignore[attr-defined]
        known = (given, self.tokenizer.bos_token_id, self.tokenizer.cls_token_id, self.eot_token_id)
        return int(next(token for token in known if token is not None))

    @property
    def _eos(self) -> str:
        return str(self.tokenizer.decode([self.eot_token_id]) or self.tokenizer.eos_token)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As `hf-extrapolate` splits it: with the tokenizer's BOS, without its EOS, and never cut; of a long text, each sentence once."""
        if add_special_tokens is False:
            return list(self.tokenizer.encode(string, add_special_tokens=False))
        return self._encode(string) if len(string) < LONG_TEXT else self.token_count.ids(string, self._encode)

    def _encode(self, string: str) -> list[int]:
        asked: bool | None = self.add_bos_token  # type: ignore[attr-defined]
        if asked is False or has_bos_prefix(string, self.tokenizer.bos_token):
            return list(self.tokenizer.encode(string, add_special_tokens=False))
        ids = list(self.tokenizer.encode(string))
        return ids[: len(ids) - self._appended] if self._appended else ids

    @functools.cached_property
    def _appended(self) -> int:
        return count_appended(self.tokenizer)

    @functools.cached_property
    def token_count(self) -> TokenCount:
        return TokenCount(self.tokenizer)


def _list_fields(config: Any) -> dict[str, Any]:
    """The fields of a text config that say how far its positions go."""
    fields = (*engine_config.LENGTH_FIELDS, "rope_parameters", "sliding_window")
    return {name: value for name in fields if (value := getattr(config, name, None)) is not None}


def _agrees(found: Any, told: Any) -> bool:
    """Whether a field holds what was told; an engine may add to a dict."""
    if isinstance(told, Mapping):
        return isinstance(found, Mapping) and all(_agrees(found.get(name), value) for name, value in told.items())
    return bool(found == told)


def _explain(error: BaseException, engine: str) -> Unmeasured:
    """What became of prompts that an engine failed over."""
    chain = list(_causes(error))
    said = f"{engine} failed: {first_line(chain[-1])}"
    if any(memory.is_out(cause) for cause in chain):
        return Unmeasured("out_of_memory", said)
    too_long = any(words in str(cause) for cause in chain for words in TOO_LONG)
    return Unmeasured("backend_limit" if too_long else "backend_error", said)


TOO_LONG = ("longer than the maximum model length", "exceeds the maximum allowed length", "context length")
"""What vLLM and SGLang say of a prompt that is too long."""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
