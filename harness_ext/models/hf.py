"""`hf-extrapolate`: lm_eval's `hf`, run past the length that the model was trained on.

What differs from `HFLM`: prompts are never truncated (one that does not fit is an error, before any forward); logits are
computed only where an answer is scored; a tokenizer that ends each text with EOS is told not to, since the answer follows.
Everything else (dtype, device_map, parallelize, revision, peft, …) is HFLM's. Within the trained length the scores are
HFLM's too: the tests hold them together.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from harness_ext import positions
from harness_ext.cells import Limit, TrainedLength
from harness_ext.errors import ModelError
from harness_ext.model_view import check_fits, first_line, resolve

log = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm_eval's: (key for its cache, context tokens, continuation tokens)."""


class HFExtrapolate(HFLM):
    """A transformers model whose `max_length` is lifted to what the tasks ask.

    `trained_length`: tokens; read from the config where not given. `max_length`: the longest prompt to run; without it, as
    long as the position scheme goes. `pretrained=reference/NAME` names an embedded model. Other arguments are HFLM's.
    """

    def __init__(
        self, pretrained: Any, *, trained_length: int | None = None, max_length: int | None = None, **options: Any
    ) -> None:
        for name, value in (("trained_length", trained_length), ("max_length", max_length)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ModelError(f"{name}: found {value!r}; expected a whole number of tokens from 1")
        if options.pop("truncation", False):
            raise ModelError("truncation=True cuts prompts without a word; leave it out: hf-extrapolate never truncates")
        self._given_length = trained_length
        self._lifted = 0
        name = resolve(pretrained) if isinstance(pretrained, str) else pretrained
        if isinstance(options.get("tokenizer"), str):
            options["tokenizer"] = resolve(options["tokenizer"])
        if not options.get("device"):  # HFLM's default is a CUDA card, whether there is one or not
            found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            options["device"] = found.type if found else "cpu"
        super().__init__(name, max_length=max_length, **options)
        self._stop_appending_eos()
        warning = positions.find_rounding(self.model.config, str(self.model.dtype))
        if warning:
            log.warning("%s", warning)

    # ------------------------------------------------------------------ lengths

    @property
    def trained_length(self) -> TrainedLength | None:
        """From the user, or from the checkpoint's config as it was before any argument changed it."""
        if self._given_length:
            return TrainedLength(tokens=self._given_length, source="user")
        return positions.read_trained_length(self.config)

    @property
    def length_limits(self) -> list[Limit]:
        """The position scheme's end, and the user's `max_length`."""
        hard = positions.read_hard_limit(self.model.config)
        user = self._max_length and Limit(
            tokens=self._max_length,
            outcome="backend_limit",
            reason=f"max_length={self._max_length} was asked for; raise it or leave it out",
        )
        return [limit for limit in (hard, user) if limit]

    @property
    def max_length(self) -> int:
        """The user's, or the trained length, or the longest prompt that a task has asked for."""
        return self._max_length or max(self._window, self._lifted)

    @property
    def _window(self) -> int:
        trained = self.trained_length
        return trained.tokens if trained else self._DEFAULT_MAX_LENGTH

    def lift(self, tokens: int) -> None:
        """Raises `max_length` to `tokens`. Raises PromptTooLongError where the model cannot run them."""
        check_fits(tokens, self.length_limits)
        self._lifted = max(self._lifted, tokens)

    # ------------------------------------------------------------------ what lm_eval calls

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each request's continuation, in order. Raises PromptTooLongError before any forward."""
        if not requests:
            return []
        # A continuation's last token is scored, but never goes in; a model of n positions can run n + 1 tokens.
        for _, context, continuation in requests:
            check_fits(len(context) + len(continuation) - 1, self.length_limits)
        if self.backend != "causal":
            self.lift(max(len(context) + len(continuation) for _, context, continuation in requests))
            return list(super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for batch in self._batches(requests, override_bs):
            for index, answer in zip(batch, self._score([requests[i] for i in batch]), strict=True):
                answers[index] = answer
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
            bar.update(len(batch))
        bar.close()
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """HFLM's, in windows of the user's `max_length` or the trained length, whatever other tasks of the run have asked for."""
        lifted, self._lifted = self._lifted, 0
        try:
            return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))
        finally:
            self._lifted = lifted

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """HFLM's, with `max_length` lifted to the longest prompt and its answer, so that nothing is cut."""
        budgets = (normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"] for request in requests)
        contexts = (len(self.tok_encode(request.args[0])) for request in requests)
        self.lift(max(context + budget for context, budget in zip(contexts, budgets, strict=True)))
        return list(super().generate_until(requests, disable_tqdm=disable_tqdm))

    # ------------------------------------------------------------------ the forward

    def _batches(self, requests: Sequence[Request], override: int | None) -> Iterator[list[int]]:
        """Indices of requests, longest first, in batches of `batch_size`.

        `auto` needs no probing forward: the longest prompt has to fit anyway, so shorter ones may fill as many tokens.
        """
        sizes = [len(context) + len(continuation) for _, context, continuation in requests]
        order = sorted(range(len(requests)), key=lambda i: (-sizes[i], requests[i][1]))
        while order:
            count = override or self.batch_size
            if count == "auto" or not count:
                count = min(self.max_batch_size, max(1, max(sizes) // sizes[order[0]]))
            batch, order = order[:count], order[count:]
            yield batch

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        """HFLM's probe (for generation and rolling windows), at the trained length and not at what tasks have lifted it to."""
        longest, lifted, self._lifted = self.max_length, self._lifted, 0
        try:
            return max(1, int(super()._detect_batch_size(requests, pos)) * self.max_length // longest)
        finally:
            self._lifted = lifted

    @torch.inference_mode()
    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """One forward over right-padded rows, without a mask, as HFLM does it: a causal model's rows do not see their padding."""
        rows = [torch.tensor([*context, *continuation][:-1]) for _, context, continuation in requests]
        width = max(len(row) for row in rows)
        tokens = torch.stack([F.pad(row, (0, width - len(row))) for row in rows]).to(self.device)
        keep = max(width - len(row) + len(continuation) for row, (_, _, continuation) in zip(rows, requests, strict=True))
        logits = self._last_logits(tokens, keep)
        answers = []
        for row, (_, _, continuation), last in zip(rows, requests, logits, strict=True):
            end = len(row) - (width - keep)
            scores = F.log_softmax(last[end - len(continuation) : end].float(), dim=-1)
            target = torch.tensor(continuation, device=scores.device)
            likelihood = scores.gather(1, target[:, None]).sum()
            answers.append((float(likelihood), bool((scores.argmax(-1) == target).all())))
        return answers

    def _last_logits(self, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits of the last `keep` positions, (batch, keep, vocabulary), from tokens (batch, tokens).

        The output layer is given those positions only. It is applied position by position, so the logits are the same; what
        is saved is tokens × vocabulary floats, most of the memory of a long prompt.
        """

        def keep_last(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args or args[0].shape[:2] != tokens.shape:
                return None  # sliced already, or laid out in a way of its own
            return (args[0][:, -keep:], *args[1:])

        try:
            head = self.model.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            head = None
        hook = head.register_forward_pre_hook(keep_last) if head is not None else None
        cache = {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}
        try:
            with torch.autocast(self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None):
                logits: torch.Tensor = self.model(tokens, **cache).logits
        finally:
            if hook is not None:
                hook.remove()
        return logits[:, -keep:]

    # ------------------------------------------------------------------ loading

    def _get_config(self, pretrained: str, **options: Any) -> None:
        try:
            super()._get_config(pretrained, **options)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"model {pretrained!r} was asked for, but its config cannot be read: {first_line(error)}; "
                "give a folder with a config.json, a model's name on the hub, or reference/rope"
            ) from error

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        try:
            super()._create_tokenizer(pretrained, tokenizer, **options)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the tokenizer of {tokenizer or pretrained!r} cannot be read: {first_line(error)}; name one with tokenizer=…"
            ) from error
        # Its limit is only a warning, and one that says the opposite of what this class is for.
        self.tokenizer.model_max_length = int(1e30)

    def _stop_appending_eos(self) -> None:
        """An EOS after the prompt would stand between the question and its answer, and shift what is scored."""
        self._appended = 0
        if self.backend != "causal":
            return
        ids, bare = self.tokenizer.encode("a"), self.tokenizer.encode("a", add_special_tokens=False)
        self._appended = len(list(itertools.takewhile(lambda i: i not in bare, reversed(ids)))) if bare else 0
        if self._appended:
            log.warning(
                "the tokenizer ends each text with %r; left off, since the answer follows",
                self.tokenizer.decode(ids[-self._appended :]),
            )

    @property
    def eot_token_id(self) -> int:
        """EOS, or what stands for it in a tokenizer that has none (HFLM cannot tokenise with such a one)."""
        tokenizer = self.tokenizer
        known = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, 0)
        return int(next(token for token in known if token is not None))

    @property
    def prefix_token_id(self) -> int:
        """What goes before an empty context."""
        known = (self.custom_prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.cls_token_id, self.eot_token_id)
        return int(next(token for token in known if token is not None))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """HFLM's, without the special tokens that the tokenizer puts at the end."""
        ids = list(super().tok_encode(string, add_special_tokens=add_special_tokens, **options))
        appended = getattr(self, "_appended", 0)
        if not appended or add_special_tokens is False or ids == self.tokenizer.encode(string, add_special_tokens=False):
            return ids
        return ids[:-appended]

    def tok_batch_encode(self, strings: list[str], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """HFLM's, without the special tokens that the tokenizer puts at the end; (batch, tokens) each."""
        ids, mask = super().tok_batch_encode(strings, **options)
        appended = getattr(self, "_appended", 0)
        return (ids[:, :-appended], mask[:, :-appended]) if appended else (ids, mask)
