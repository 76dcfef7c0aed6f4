"""`hf-extrapolate`: lm_eval's `hf`, run past the length that the model was trained on.

What differs from `HFLM`: prompts are never truncated (one that does not fit is an error, before any forward); each distinct
token of all prompts is computed once, in chunks, and logits only where an answer is scored; a tokenizer that ends each text with EOS is told not to, since the answer follows;
`extend=` puts an inference-time extension in effect, and proves it; memory that runs out is an outcome and no crash.
Everything else (dtype, device_map, parallelize, revision, peft, …) is HFLM's. Within the trained length the scores are
HFLM's too: the tests hold them together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from harness_ext import placement, positions
from harness_ext.cells import Limit, Placing, TrainedLength, Unmeasured
from harness_ext.errors import ModelError, PromptTooLongError
from harness_ext.model_view import check_fits, first_line, resolve
from harness_ext.models import cards, checkpoint, foresight, onednn, pieces, probe, provenance
from harness_ext.models.answering import AnsweringHFLM
from harness_ext.models.extensions import rotary
from harness_ext.models.extensions.effect import read_effect
from harness_ext.models.extensions.extension import PINNED, Extension, check_applies, find_method
from harness_ext.models.extensions.method import Subject
from harness_ext.models.forward import Forward
from harness_ext.models.inspection import build_without_weights
from harness_ext.models.journal import Journals, Kept
from harness_ext.models.ledger import Answer
from harness_ext.models.memory import Memory
from harness_ext.models.outcomes import check_understood
from harness_ext.models.placing import find_placing
from harness_ext.models.prefix_tree import Batch, Schedule
from harness_ext.models.progress import find_even_position
from harness_ext.models.ranks import ALONE, Ranks, add_up
from harness_ext.models.reader import Reader
from harness_ext.models.state import State
from harness_ext.models.watching import Seen, Watcher, describe

log = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm_eval's: (key for its cache, context tokens, continuation tokens)."""
CHUNK = {"cpu": 512}
"""Tokens read at a time; ELSEWHERE on other devices, which smaller pieces would leave idle."""
ELSEWHERE = 2048
FORWARD = {"cpu": 64}
"""Tokens that take as long as what a forward takes beside them, about; FORWARD_ELSEWHERE on other devices (not measured)."""
FORWARD_ELSEWHERE = 256


class HFExtrapolate(AnsweringHFLM):
    """A transformers model whose `max_length` is lifted to what the tasks ask.

    `trained_length`: tokens; read from the config where not given. `max_length`: the longest prompt to run; without it, as
    long as the position scheme goes. `pretrained=reference/NAME` names an embedded model. `extend`: a method of
    `extensions.extension.METHODS`, its options (`factor` and its own) beside it. `exact=True`: every prompt whole, in one forward
    that shares nothing with others. `chunk`: tokens read at a time. `try_all=True`: lengths that by the plan are more than the memory of a CPU
    holds are tried too, which may end the process. Other arguments are HFLM's.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        trained_length: int | None = None,
        max_length: int | None = None,
        extend: str | None = None,
        exact: bool = False,
        chunk: int | None = None,
        try_all: bool = False,
        **options: Any,
    ) -> None:
        for name, value in (("trained_length", trained_length), ("max_length", max_length), ("chunk", chunk)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ModelError(f"{name}: found {value!r}; expected a whole number of tokens from 1")
        if options.pop("truncation", False):
            raise ModelError("truncation=True cuts prompts without a word; leave it out: hf-extrapolate never truncates")
        method = find_method(extend) if extend and extend != "none" else None
        numbers = {name: options.pop(name) for name in ("factor", *(method.options if method else ())) if name in options}
        if numbers and method is None:
            raise ModelError(f"factor={numbers['factor']} was given, and no method that it is for; add extend=NAME")
        self._given_length = trained_length
        self._lifted = self._announced = 0
        self._knows_outcomes = True
        self._placing: Placing | None = None
        self._journals = Journals()
        self._method, self._extension = method, None
        name = resolve(pretrained) if isinstance(pretrained, str) else pretrained
        if isinstance(options.get("tokenizer"), str):
            options["tokenizer"] = resolve(options["tokenizer"])
        if not options.get("device"):  # HFLM's default is a CUDA card, whether there is one or not
            found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            options["device"] = found.type if found else "cpu"
        self._asked_length, self._chunk = max_length, chunk
        self._rows = int(options["batch_size"]) if str(options.get("batch_size", "auto")).isdecimal() else 1
        if options.get("device_map"):  # which HFLM drops without a word where it is not told to `parallelize`
            options["parallelize"] = True
        onednn.bound()
        super().__init__(name, max_length=max_length, **options)
        self.stop_appending_eos()
        if hasattr(self, "accelerator"):  # HFLM deals to the cards of one machine only: others would each run everything
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._ranks = Ranks(self.rank, self.world_size)
        self._probed = probe.find_limit(self.model.config, self.model)  # before anything of ours is in its config
        if not exact and self.backend == "causal":
            pieces.install(self.model)
        self._watcher = Watcher(self.model)
        self._memory = Memory(self.device, foresees=self.device.type == "cpu" and not try_all)
        self._reader = Reader(
            Forward(self.model, self.device, self.mixed_precision_dtype),
            self._memory,
            chunk=chunk or CHUNK.get(self.device.type, ELSEWHERE),
            trained=self._window,
            exact=exact,
        )
        if self.backend == "causal" and self.softmax_dtype not in (None, torch.float32):
            log.warning("softmax_dtype=%s was asked for; log-likelihoods are computed in float32 all the same", self.softmax_dtype)
        warning = positions.find_rounding(self.model.config, str(self.model.dtype))
        if warning:
            log.warning("%s", warning)
        if not positions.is_listed(self.model.config):
            log.warning("%s is no family that was measured beforehand; %s", self.model.config.model_type, self._probed.said)
        if method or rotary.is_recomputed(self.model):
            self._extension = Extension(method or PINNED, self._as_subject(self.model), numbers)

    # ------------------------------------------------------------------ lengths

    @property
    def trained_length(self) -> TrainedLength | None:
        """From the user, or from the checkpoint's config as it was before any argument changed it."""
        if self._given_length:
            return TrainedLength(tokens=self._given_length, source="user")
        return positions.read_trained_length(self.config)

    @property
    def length_limits(self) -> list[Limit]:
        """The position scheme's end, unless it is extended, and the user's `max_length`."""
        hard = None if self._method and self._method.lifts_limit else self._probed.limit
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
        """Raises `max_length` to the longest prompt of a task. Raises PromptTooLongError where the model cannot run it."""
        self._open(tokens)
        self._announced = max(self._announced, tokens)

    def _open(self, tokens: int) -> None:
        check_fits(tokens, self.length_limits)
        self._lifted = max(self._lifted, tokens)

    def _check_answer(self, tokens: int) -> None:
        """Raises PromptTooLongError where an encoder-decoder's answer goes past its decoder's end."""
        limit = positions.read_answer_limit(self.model.config, self.model)
        check_fits(tokens, [limit] if limit else [], "an answer")

    # ------------------------------------------------------------------ extension

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's, for the results file, what was in effect (read from the modules, before and after), what the run was made with, the
        tokens asked and computed, and what was attended to where tasks ask for that."""
        made_with = provenance.describe(self.model, self.config, self.device, self._weights)
        readings, seen = zip(*(self._ranks.readings or [self._tell()]), strict=True)
        found = {"override": self._describe_override(), "reading": add_up(readings), **describe(seen)}
        return {**super().get_model_info(), **made_with, **found}

    def _tell(self) -> tuple[dict[str, Any], Seen]:
        """What this process has read and seen so far."""
        return self._reader.describe(), self._watcher.seen

    def _describe_override(self) -> dict[str, Any]:
        return self._extension.describe() if self._extension else {"method": "none", "before": read_effect(self.model), "after": {}}

    def _as_subject(self, model: Any) -> Subject:
        trained = self.trained_length
        if trained is None:
            raise ModelError("an extension needs the trained length, and this model's config does not say it; add trained_length=N")
        return Subject(model=model, schemes=positions.read_schemes(model.config, model), trained=trained.tokens)

    def _prepare(self, tokens: int, longest: int) -> None:
        """Puts the extension in effect for a prompt of `tokens`; `longest`: of these requests."""
        if self._extension is None:
            return
        known = (
            self._announced or self._max_length or (longest if self._extension.factor or self._extension.method is PINNED else 0)
        )
        if not known:
            raise ModelError(
                f"extend={self._extension.method.name} takes its factor from the longest length, which these tasks do not name; "
                "add factor=N or max_length=N"
            )
        if tokens > known and self._extension.method.lifts_limit:
            raise PromptTooLongError(
                f"a prompt of {tokens} tokens was asked for, and the position table was made for {known}; add max_length=N"
            )
        self._extension.prepare(tokens, known)

    # ------------------------------------------------------------------ interrupted and resumed

    @contextlib.contextmanager
    def evaluating(self, cache: Path | None = None) -> Iterator[None]:
        """Around one evaluation: answers are kept as they come, and what an interrupted one of the same prompts has left is gone on from.

        `cache`: a folder in which answers stay, and are found again by any evaluation of this model.
        """
        self._watcher.forget()
        with self._journals.evaluating(cache):
            yield

    @functools.cached_property
    def _weights(self) -> str:
        return provenance.hash_weights(self.model)

    @functools.cached_property
    def _vocabulary(self) -> str:
        return provenance.hash_vocabulary(self.tokenizer)

    def _describe_answering(self) -> dict[str, Any]:
        """What generated answers follow from besides."""
        own = self.model.generation_config
        settings = own.to_json_string(use_diff=False, ignore_metadata=True) if own is not None else ""
        return {"vocabulary": self._vocabulary, "end": self.eot_token_id, "think_end": self.think_end_token, "generation": settings}

    def _resume(
        self, kind: str, sequences: Sequence[Sequence[int]], own: Sequence[Any], *, cached: bool = True, **facts: Any
    ) -> Kept:
        """Answers to token sequences that an interrupted evaluation has left or, `cached`, any has, by index. `own`: what each follows from besides."""
        if self._journals.opened is None:
            return Kept()
        if not self._weights:
            log.warning("answers are not kept: the weights are not all at hand to tell them apart by")
            return Kept()
        facts |= {
            "kind": kind,
            "weights": self._weights,
            "batch_size": self.batch_size,
            "autocast": str(self.mixed_precision_dtype),
            **provenance.list_facts(self.model, self.device),
        }
        facts |= {"override": self._describe_override(), "reading": self._reader.describe_way()}
        journal = self._journals.open(facts, sequences, own, cached=cached)
        kept = Kept(journal.read(), journal.write)
        self._reader.resumed += len(kept.known)
        return kept

    # ------------------------------------------------------------------ what lm_eval calls

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """HFLM's. Raises ModelError where a prompt of a task that knows no outcomes did not fit into memory."""
        with self._watcher.asking(requests):
            answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return [check_understood(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def loglikelihood_at(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """As `loglikelihood`, of (context, continuation, {"positions": runs, …}): the prompts' tokens stand where `placement` says.

        Raises ModelError where this model's tokens cannot be put there (`find_placing`).
        """
        placing = self.find_placing()
        if placing.outcome != "measured":
            raise ModelError(f"prompts at chosen positions were asked for, and this model has none: {placing.reason}")
        prompts, starts, spans = [], [], []
        for context, continuation, options in (request.args for request in requests):
            before, after = self._encode_pair(context, continuation)
            positions = placement.list_positions(options["positions"], len(before) + len(after))
            prompts.append(placement.join([*before, *after], positions).tolist())
            starts.append(len(before))
            spans.append(int(positions.max()) + 1)
        with self._watcher.asking(requests):
            answers = self._score(prompts, starts, spans, "loglikelihood_at", disable_tqdm=disable_tqdm)
        return [check_understood(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def find_placing(self) -> Placing:
        """Whether this model's tokens can be put at chosen positions."""
        if self.backend != "causal":
            return Placing(outcome="not_admitted", reason="an encoder-decoder counts two texts")
        if self._placing is None:
            self._reader.prepare(self._window)
            hard = next((limit for limit in self.length_limits if limit.outcome == "hard_limit"), None)
            sharing = self._reader.sharing
            self._placing = find_placing(self._reader.forward, hard, sharing.make if sharing else None)
        return self._placing

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """The answer to each request, in order. Raises PromptTooLongError, or ModelError for a request without tokens, before any forward."""
        if not requests:
            return []
        for key, context, continuation in requests:
            if not context or not continuation:
                what, why = ("context", "the first token after it") if not context else ("continuation", "anything")
                raise ModelError(
                    f"the {what} of {key or (context, continuation)!r:.200} has no tokens, so that {why} could not be scored; change it"
                )
        sequences = [[*context, *continuation] for _, context, continuation in requests]
        sizes = [len(sequence) for sequence in sequences]
        starts = [len(context) for _, context, _ in requests]
        if self.backend != "causal":  # an encoder reads the context, and a decoder the answer
            longest, answer = max(starts), max(len(continuation) for _, _, continuation in requests)
            self._check_answer(answer)
            self._open(longest)
            self._lifted = max(self._lifted, answer)  # HFLM cuts both at one length
            self._prepare(longest, longest)
            kept = self._resume("loglikelihood", sequences, starts)
            missing = [index for index in range(len(requests)) if index not in kept.known]
            asked = [requests[index] for index in missing]
            found = super()._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm, override_bs=override_bs) if asked else []
            new: dict[int, Answer] = dict(zip(missing, found, strict=True))
            kept.add(new)
            answers = {**kept.likelihoods(), **new}
            return [answers[index] for index in range(len(requests))]
        return self._score(sequences, starts, sizes, "loglikelihood", disable_tqdm=disable_tqdm, override=override_bs)

    def _score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        spans: Sequence[int],
        kind: str,
        *,
        disable_tqdm: bool = False,
        override: int | None = None,
    ) -> list[Answer]:
        """The answer to each sequence from its token `starts` on; `spans`: positions up to its last token's."""
        ranks = self._ranks if self._knows_outcomes else ALONE  # a text's windows are summed up by the process that has the text
        prompts: list[tuple[Any, int, int]] = ranks.gather([*zip(map(np.asarray, sequences), starts, spans, strict=True)])
        watched = ranks.gather(self._watcher.asked or [None] * len(sequences))
        sequences, starts, spans = zip(*prompts, strict=True)
        # A continuation's last token is scored, but never goes in; a model of n positions can run n + 1 tokens.
        longest = max(spans)
        check_fits(longest - 1, self.length_limits)
        check_fits(max(map(len, sequences)) - 1, [limit for limit in self.length_limits if limit.outcome != "hard_limit"])
        self._prepare(longest, longest)
        self._reader.prepare(longest - 1)
        foresight.look_ahead(self._reader, [len(sequence) - 1 for sequence in sequences])
        groups = self._deal(ranks, [sequence[:-1] for sequence in sequences], self._group(spans))
        refused = self._memory.list_refused([len(sequence) for sequence in sequences], unheld=1)
        answers: list[Answer | None] = [refused.get(index) for index in range(len(sequences))]
        groups = [rest for rest in ([index for index in group if index not in refused] for group in groups) if rest]
        schedules = [self._plan([sequences[i] for i in group], [starts[i] for i in group], override) for group in groups]
        with self._reader.open_bar(kind, schedules, quiet=disable_tqdm or self.rank != 0) as bar:
            for group, schedule in zip(groups, schedules, strict=True):
                self._prepare(spans[group[0]], longest)
                asked = [sequences[index] for index in group]
                watch = self._watcher.watch(watched, group, starts)
                kept = self._resume(kind, asked, [starts[index] for index in group], cached=watch is None)
                found = self._reader.score(asked, schedule, bar, kept, watch)
                for index, answer in zip(group, found, strict=True):
                    answers[index] = self._check_known(answer)
        return ranks.own(self._memory.settle(list(map(len, sequences)), ranks.collect(answers, self._tell())))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """HFLM's, in windows of the user's `max_length` or the trained length, whatever other tasks of the run have asked for.

        Raises ModelError where a window does not fit into memory: a sum over the others would be a false number.
        """
        (lifted, self._lifted), self._knows_outcomes = (self._lifted, 0), False
        try:
            return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))
        finally:
            self._lifted, self._knows_outcomes = lifted, True
            self._ranks.note(self._tell())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """HFLM's, with `max_length` lifted to the longest prompt and its answer, so that nothing is cut.

        Greedy answers go on from what prompts share; sampled ones and beams are HFLM's own.
        """
        own = requests
        prompts = self._ranks.gather([(self.tok_batch_encode([request.args[0]])[0][0].numpy(), request.args) for request in own])
        requests = [Instance("generate_until", {}, arguments, 0) for _, arguments in prompts]
        settings = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        contexts: list[Any] = [context for context, _ in prompts]
        sizes = [len(context) + asked["max_gen_toks"] for context, asked in zip(contexts, settings, strict=True)]
        longest = max(sizes, default=0)
        self._open(longest)
        self._check_answer(max((asked["max_gen_toks"] for asked in settings), default=0))
        if self.backend == "causal" and any(map(self.goes_on, settings)):
            self._prepare(longest, longest)
            self._can_generate(longest)
        foresight.look_ahead(self._reader, sizes)
        for context, request in zip(contexts, requests, strict=True):
            if not len(context):
                raise ModelError(
                    f"the prompt {request.args[0]!r:.200} has no tokens, so that nothing can be generated after it; change it"
                )
        kinds = [repr(sorted(asked.items(), key=str)) for asked in settings]
        groups = self._group(sizes, kinds, [str(request.args[0]) for request in requests])
        refused = self._memory.list_refused(sizes)
        answers: list[Any] = [refused.get(index) for index in range(len(sizes))]
        for dealt in self._deal(self._ranks, contexts, groups, [asked["max_gen_toks"] for asked in settings]):
            group = [index for index in dealt if index not in refused]
            if not group:
                continue
            self._prepare(sizes[group[0]], longest)
            chosen, asked = [requests[index] for index in group], settings[group[0]]
            if self.backend == "causal" and self.goes_on(asked) and self._can_generate(longest):
                found = self._generate([contexts[index] for index in group], chosen, asked["max_gen_toks"], quiet=disable_tqdm)
            else:
                found = self._generate_whole(
                    chosen, [contexts[index] for index in group], [sizes[index] for index in group], quiet=disable_tqdm
                )
            for index, answer in zip(group, found, strict=True):
                answers[index] = answer
        settled = self._ranks.own(self._memory.settle(sizes, self._ranks.collect(answers, self._tell())))
        return [check_understood(request, answer) for request, answer in zip(own, settled, strict=True)]

    def _can_generate(self, longest: int) -> bool:
        self._reader.prepare(longest)
        return self._reader.generates

    def _generate(self, contexts: Sequence[list[int]], requests: Sequence[Instance], budget: int, *, quiet: bool) -> list[Any]:
        """Greedy answers, each from what its prompt shares with others, by HFLM's own generation."""
        longest = max(map(len, contexts))
        rows = foresight.limit_rows(self._reader, longest + budget, self._count_rows())
        batch = self._bound(rows, rows * (self._window if self.batch_size == "auto" else longest))
        plan = self._reader.plan_answers(contexts, batch, budget)

        def answer(indices: Sequence[int], state: State | None) -> list[str]:
            held = None if state is None else (state, [list(contexts[index]) for index in indices])
            return self.answer([requests[index] for index in indices], held)

        with self._reader.open_bar("generate_until", [plan.schedule], quiet=quiet or self.rank != 0, answers=budget) as bar:
            settings = [str(request.args[1]) for request in requests]
            kept = self._resume("generate_until", contexts, settings, rows=rows, **self._describe_answering())
            return list(self._reader.generate(plan, bar, answer, kept))

    def _generate_whole(
        self, requests: Sequence[Instance], contexts: Sequence[list[int]], sizes: Sequence[int], *, quiet: bool
    ) -> list[Any]:
        """HFLM's own answers to requests of one kind, longest first, batch by batch."""
        settings = [str(request.args[1]) for request in requests]
        kept = Kept()
        asked = normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)
        if self.is_greedy(asked):  # what is drawn depends on all that was drawn before
            kept = self._resume("generate_until", contexts, settings, **self._describe_answering())
        answers: list[Any] = []
        missing = [len(context) for index, context in enumerate(contexts) if index not in kept.known]
        started = time.monotonic()
        rows = 1 if self.is_assisted(asked) else self._count_rows()
        for batch in tqdm(self._cut(contexts, rows), desc="generate_until", disable=True if quiet or self.rank else None):
            if all(index in kept.known for index in batch):
                answers += [kept.known[index] for index in batch]
                continue
            found = self._memory.what_fits(
                [requests[index] for index in batch],
                [sizes[index] for index in batch],
                self.answer,
            )
            kept.add(dict(zip(batch, found, strict=True)))
            answers += found
        self._reader.count(sum(map(len, contexts)), sum(missing), time.monotonic() - started)
        return answers

    def _count_rows(self) -> int:
        return self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size)

    def _cut(self, contexts: Sequence[list[int]], rows: int) -> list[range]:
        """Prompts in batches of so many rows, in their order; of one length, or one, where the model answers it otherwise beside others."""
        lengths, starts = list(map(len, contexts)), [0]
        batch = self._reader.checks.limit("answered", Batch(rows=rows), max(lengths))
        if self.backend != "causal":  # where HFLM takes the prompt's tokens, with padding, for answer's
            batch = dataclasses.replace(batch, equal=True)
        for index in range(1, len(lengths)):
            if index - starts[-1] == batch.rows or (batch.equal and lengths[index] != lengths[starts[-1]]):
                starts.append(index)
        return list(map(range, starts, [*starts[1:], len(lengths)]))

    # ------------------------------------------------------------------ what is read together

    def _group(self, sizes: Sequence[int], kinds: Sequence[str] = (), texts: Sequence[str] = ()) -> list[list[int]]:
        """Indices of requests that may share, longest first: of one kind, and of one size under what depends on the length.

        `texts`: in whose order those of one size come, as in HFLM, so that what is drawn for each is what HFLM draws.
        """
        per_length = self._extension is not None and self._extension.method.per_length
        groups: dict[tuple[str, int], list[int]] = {}
        for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], texts[index] if texts else "")):
            groups.setdefault((kinds[index] if kinds else "", sizes[index] if per_length else 0), []).append(index)
        return list(groups.values())

    def _deal(
        self, ranks: Ranks, sequences: Sequence[Sequence[int]], groups: list[list[int]], budgets: Sequence[int] = ()
    ) -> list[list[int]]:
        """What this process reads of groups of prompts that may share."""
        shares = self._reader.sharing is None or self._reader.sharing.make is not None
        return ranks.deal(sequences, groups, even=find_even_position(self.model), budgets=budgets, shares=shares)

    def _plan(self, sequences: Sequence[Sequence[int]], starts: Sequence[int], override: int | None) -> Schedule:
        """Their schedule. `auto` needs no probing forward: the longest has to fit anyway, so shorter ones may fill as many tokens."""
        read = [sequence[:-1] for sequence in sequences]
        count, longest = override or self.batch_size, max(map(len, read))
        if count == "auto" or not count:
            batch = self._bound(self.max_batch_size, longest)
        else:
            batch = self._bound(int(count), int(count) * longest)
        return self._reader.plan(read, [start - 1 for start in starts], batch)

    def _bound(self, rows: int, tokens: int) -> Batch:
        """A batch of so many rows, and tokens in all. With several, what prompts share must be worth a forward; each of its tokens is computed once otherwise."""
        return Batch(rows=rows, tokens=tokens, forward=FORWARD.get(self.device.type, FORWARD_ELSEWHERE) if rows > 1 else 0)

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        """HFLM's probe (for generation and rolling windows), at the trained length and not at what tasks have lifted it to."""
        longest, lifted, self._lifted = self.max_length, self._lifted, 0
        count, self._world_size = self.world_size, 1  # processes do not all probe as often, so none waits for another
        try:
            return max(1, int(super()._detect_batch_size(requests, pos)) * self.max_length // longest)
        finally:
            self._lifted, self._world_size = lifted, count

    def _check_known(self, answer: Answer) -> Answer:
        """The answer. Raises ModelError for an outcome in the middle of what would be summed up."""
        if isinstance(answer, Unmeasured) and not self._knows_outcomes:
            raise ModelError(f"{answer.reason}; use a smaller max_length or a lower precision")
        return answer

    # ------------------------------------------------------------------ loading

    def _get_config(self, pretrained: str, **options: Any) -> None:
        try:
            super()._get_config(pretrained, **options)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"model {pretrained!r} was asked for, but its config cannot be read: {first_line(error)}; "
                "give a folder with a config.json, a model's name on the hub, or reference/rope"
            ) from error

    def _create_model(self, pretrained: Any, *args: Any, **options: Any) -> None:
        """HFLM's, with the rope parameters that the user gives laid over the checkpoint's: transformers would put them in their place."""
        given = {name: options.pop(name) for name in ("rope_scaling", "rope_parameters") if options.get(name)}
        for parameters in given.values():
            options["rope_parameters"] = rotary.merge(positions.text_config(self.config).rope_parameters, parameters)
        if self._method:  # minutes before the weights are there, where they are many
            check_applies(self._method, self._as_subject(build_without_weights(self.config, **options)))
        options = checkpoint.prefer_safetensors(pretrained, options)
        self._loading = options
        try:
            super()._create_model(pretrained, *args, **options)
        except OSError as error:
            raise checkpoint.explain(pretrained, options, error) from error

    def _get_accelerate_args(self, *args: Any, max_memory_per_gpu: Any = None, **options: Any) -> dict[str, Any]:
        """HFLM's; where several cards share the weights as they like, with room beside them for the longest prompt."""
        found: dict[str, Any] = super()._get_accelerate_args(*args, max_memory_per_gpu=max_memory_per_gpu, **options)
        if found.get("max_memory") and max_memory_per_gpu is None and isinstance(found["device_map"], str):
            chunk = self._chunk or ELSEWHERE
            method = self._method
            longest = self._asked_length or cards.find_longest(
                self.config, self._window, lifted=bool(method and method.lifts_limit)
            )
            found["max_memory"] = cards.leave_room(
                self.config, self._loading, found["max_memory"], tokens=longest, chunk=chunk, rows=self._rows
            )
        return found
