"""`api-extrapolate`: lm_eval's `local-completions` and `local-chat-completions`, run past the length the model was trained on.

What differs from them: prompts are never cut by us (theirs are cut to 2,048 tokens without a word), and a server that cuts them is found
out; its log-probabilities are checked before they are believed; a prompt that it does not answer has an outcome and no score; prompts that
begin alike are asked one after the other, as an engine's prefix cache likes it. Requests are worded as lm_eval words them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from harness_ext import credentials
from harness_ext.cells import Limit, TrainedLength, Unmeasured
from harness_ext.errors import ModelError
from harness_ext.model_view import ModelView, check_fits, load_tokenizer
from harness_ext.models import answers, canary, likeness, provenance
from harness_ext.models.ceiling import Ceiling
from harness_ext.models.journal import Journals, Kept
from harness_ext.models.outcomes import check_understood
from harness_ext.models.served import Bounds, Server, check_url
from harness_ext.token_count import TokenCount, count_appended

log = logging.getLogger(__name__)

T = TypeVar("T")
Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm_eval's: (key for its cache, context tokens, continuation tokens)."""
Likelihood = tuple[float, bool] | Unmeasured
LIKELY = 5
"""Of the first tokens of an answer, how many are asked for."""
SHORT = 64
"""Tokens; whether a prompt of fewer is read from its beginning on is not checked."""
LONG_TEXT = 1000
"""Characters; shorter texts are tokenised whole."""


class ApiExtrapolate(LocalCompletionsAPI):
    """A model behind an OpenAI-compatible server.

    `base_url`: of its completions, or its chat completions. `tokenizer`: the model's own, a name or a folder. `trained_length`: tokens;
    read from the tokenizer's config where not given. `max_length`: the longest prompt to ask. `chat`: by default, whether `base_url`
    says so. `num_concurrent`, or `batch_size`: prompts asked at a time, each in a request of its own. `max_retries`: attempts of one
    prompt; `timeout`: seconds of one attempt; `max_seconds`: of all of them. `tokenized_requests=False`: prompts go out as text.
    `trust_usage`: where a changed beginning changes nothing in a long prompt's answer (a recurrent model), believe the number of
    tokens that the server reports. Other arguments are lm_eval's.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        model: str | None = None,
        tokenizer: Any = None,
        trained_length: int | None = None,
        max_length: int | None = None,
        chat: bool | None = None,
        tokenized_requests: bool = True,
        trust_usage: bool = False,
        batch_size: int | str = 1,
        num_concurrent: int = 1,
        max_retries: int = 4,
        timeout: float = 600,
        max_seconds: float = 3600,
        **options: Any,
    ) -> None:
        check_url(base_url)
        assert base_url is not None
        self._check_arguments(options, model, tokenizer)
        numbers = {
            "trained_length": trained_length,
            "max_length": max_length,
            "num_concurrent": num_concurrent,
            "max_retries": max_retries,
        }
        for name, value in numbers.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ModelError(f"{name}: found {value!r}; expected a whole number from 1")
        for name, seconds in (("timeout", timeout), ("max_seconds", max_seconds)):
            if not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
                raise ModelError(f"{name}: found {seconds!r}; expected seconds")
        self._asked_max, self._lifted = max_length, 0
        self._journals = Journals()
        self._resumed, self._options = 0, {**options, "tokenized_requests": tokenized_requests}
        self.chat = base_url.rstrip("/").endswith("/chat/completions") if chat is None else bool(chat)
        source = {name: options[name] for name in ("revision", "trust_remote_code") if options.get(name)}
        named = load_tokenizer(tokenizer, source) if isinstance(tokenizer, str) else tokenizer
        self._trained_length = self._find_trained(trained_length, tokenizer, source)
        try:
            super().__init__(
                base_url=base_url, model=model, tokenizer_backend="None", batch_size=1, max_length=self.max_length + 1, **options
            )
        except ModuleNotFoundError as error:
            raise ModelError(
                f"api-extrapolate needs {error.name or 'packages'} that are not installed: pip install 'harness_ext[api]'"
            ) from None
        self.tokenizer, self.tokenizer_backend = named, "huggingface"
        self.tokenizer.model_max_length = int(1e30)  # its limit is only a warning, and says the opposite of what this class is for
        self.tokenized_requests = bool(tokenized_requests) and not self.chat
        self._at_once = max(num_concurrent, batch_size if isinstance(batch_size, int) else 1)
        self._trust_usage = bool(trust_usage)
        self._special = frozenset(self.tokenizer.all_special_ids)
        self._spelling = answers.Spelling(self.tokenizer)
        self._ceiling, self._proven, self._knows_outcomes = Ceiling(), 0, True
        self._flaw: str | None = None
        self._server = Server(
            base_url,
            Bounds(attempts=max_retries, timeout=timeout, total=max_seconds),
            key=self.api_key or "",
            verify=options.get("ca_cert_path") or options.get("verify_certificate", True),
        )
        self._habits = self._meet()

    def _check_arguments(self, options: Mapping[str, Any], model: Any, tokenizer: Any) -> None:
        credentials.refuse(options)
        if not model:
            raise ModelError("api-extrapolate needs the model's name on the server: add model=NAME")
        if not tokenizer or options.get("tokenizer_backend", "huggingface") != "huggingface":
            raise ModelError(
                "prompts of an exact length need the tokenizer of the model that is served, and a server does not say which that is; "
                "add tokenizer=NAME or a folder"
            )

    def _find_trained(self, given: int | None, tokenizer: Any, source: Mapping[str, Any]) -> TrainedLength:
        if given:
            return TrainedLength(tokens=given, source="user")
        found = ModelView(None, {"tokenizer": tokenizer, **source}).trained_length if isinstance(tokenizer, str) else None
        if found is None:
            raise ModelError(
                f"the trained length is not known: {tokenizer!r:.200} has no config that says it; add trained_length=N"
            )
        return found

    # ------------------------------------------------------------------ lengths

    @property
    def trained_length(self) -> TrainedLength:
        """From the user, or from the config beside the tokenizer."""
        return self._trained_length

    @property
    def length_limits(self) -> list[Limit]:
        """The user's `max_length`. What the server takes is found by asking it."""
        if self._asked_max is None:
            return []
        reason = f"max_length={self._asked_max} was asked for; raise it or leave it out"
        return [Limit(tokens=self._asked_max, outcome="backend_limit", reason=reason)]

    @property
    def max_length(self) -> int:
        """The user's, or the trained length, or the longest prompt that a task has asked for."""
        return self._asked_max or max(self._trained_length.tokens, self._lifted)

    @max_length.setter
    def max_length(self, _: int) -> None:
        """lm_eval's class stores the length that it would cut to."""

    def lift(self, tokens: int) -> None:
        """Raises `max_length` to the longest prompt of a task. Raises PromptTooLongError where the user's is shorter."""
        check_fits(tokens, self.length_limits)
        self._lifted = max(self._lifted, tokens)

    def get_model_info(self) -> dict[str, Any]:
        """For the results file: what the server was seen to do."""
        return {
            "server": {
                "url": self._server.url,
                "chat": self.chat,
                "tokenized_requests": self.tokenized_requests,
                "reports_usage": self._habits.reports,
                "adds_tokens": self._habits.adds,
                "tells_likely_tokens": self._habits.tells_first,
                "read_from_the_beginning": self._proven,
                "resumed": self._resumed,
            }
        }

    # ------------------------------------------------------------------ interrupted and resumed

    @contextlib.contextmanager
    def evaluating(self, cache: Path | None = None) -> Iterator[None]:
        """As `hf-extrapolate`'s; what is kept is believed where the server answers as it did."""
        with self._journals.evaluating(cache):
            yield

    def _resume(
        self,
        kind: str,
        sequences: Sequence[Sequence[int]],
        sizes: Sequence[int],
        ask: Callable[[int], Any],
        own: Sequence[Any],
        **facts: Any,
    ) -> Kept:
        """Answers that an interrupted evaluation has left, or any where they are cached, by index, where the server is still what it was.

        `own`: what each follows from besides.
        """
        if self._journals.opened is None or not self._knows_outcomes or facts.get("drawn"):
            return Kept()
        facts |= {"kind": kind, "url": self._server.url, "model": self.model, "chat": self.chat, "options": self._options}
        facts |= {"vocabulary": provenance.hash_vocabulary(self.tokenizer), "seed": self._seed}
        facts |= {"packages": {name: importlib.metadata.version(name) for name in ("harness_ext", "lm_eval", "transformers")}}
        now = likeness.take(lambda text: self._ask_fixed(text, likeness.TOKENS, first=self._habits.tells_first))
        if now is None:
            log.warning("answers are not kept, should the run be interrupted: the server does not answer short prompts any more")
            return Kept()
        journal = self._journals.open(facts, sequences, own)
        known = journal.read()
        before = known.pop(likeness.PLACE, None)
        if known and (reason := likeness.find_change(before, now) or likeness.find_stale(known, sizes, ask)):
            journal.set_aside(reason)
            known, before = {}, None
        if before is None or not known:
            journal.write({likeness.PLACE: now})
        self._resumed += len(known)
        return Kept(known, journal.write)

    # ------------------------------------------------------------------ what lm_eval calls

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Likelihood]:
        """lm_eval's. Raises ModelError where the server's log-likelihoods cannot be had or believed."""
        self._check_likelihoods(requests)
        found = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return [check_understood(request, answer) for request, answer in zip(requests, found, strict=True)]

    def _loglikelihood_tokens(self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any) -> list[Likelihood]:
        """The answer to each request, in order. Raises PromptTooLongError before anything is asked."""
        sequences = [[*context, *continuation] for _, context, continuation in requests]
        sizes = [len(sequence) for sequence in sequences]
        check_fits(max(sizes, default=0), self.length_limits)
        starts = [len(context) for _, context, _ in requests]

        def look(index: int, changed: bool) -> canary.Seen | Unmeasured:
            """Log-probabilities of the answer's tokens, after the prompt or after one that begins otherwise."""
            ids, scored = sequences[index], slice(starts[index] - 1, -1)
            found = self._ask_echo(canary.change_ids(ids, self._special) if changed else ids)
            return found if isinstance(found, Unmeasured) else {str(at): one for at, one in enumerate(found.logprobs[scored])}

        def score(index: int) -> Likelihood:
            found = self._ask_echo(sequences[index])
            return found if isinstance(found, Unmeasured) else found.score(starts[index])

        self._check_beginning({size: index for index, size in enumerate(sizes) if starts[index] >= SHORT}, look)
        kept = self._resume("loglikelihood", sequences, sizes, score, starts)
        kept = Kept(kept.likelihoods(), kept.write)
        return self._ask_all(sizes, _sort_keys(sequences), score, kept, quiet=disable_tqdm, name="loglikelihood")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """lm_eval's, in windows of the user's `max_length` or the trained length. Raises ModelError where a window has no answer."""
        self._check_likelihoods(requests)
        (lifted, self._lifted), self._knows_outcomes = (self._lifted, 0), False
        try:
            return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))
        finally:
            self._lifted, self._knows_outcomes = lifted, True

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """The answer to each request, in order, cut at the first of its stop texts. Raises PromptTooLongError before anything is asked."""
        if not requests:
            return []
        self._check_can_generate(requests)
        contexts, settings = [request.args[0] for request in requests], [request.args[1] for request in requests]
        prompts = [self._encode_context(context) for context in contexts]
        sent = [len(prompt) for prompt in prompts]
        sizes = [
            length + normalize_gen_kwargs(asked, self._max_gen_toks)["max_gen_toks"]
            for length, asked in zip(sent, settings, strict=True)
        ]
        check_fits(max(sizes), self.length_limits)

        def look(index: int, changed: bool) -> canary.Seen | Unmeasured:
            """Log-probabilities of the likeliest first tokens, after the prompt or after one that begins otherwise."""
            ids, context = prompts[index], contexts[index]
            if changed:
                context = JsonChatStr(_change_chat(context.prompt)) if self.chat else canary.change_text(context)
                ids = canary.change_ids(ids, self._special)
            # The words of a text in another order may be a token more or less.
            length = sent[index] - (0 if self.tokenized_requests or not changed else canary.CHANGED)
            found = self._ask_text(ids if self.tokenized_requests else context, {"max_gen_toks": 1}, length, first=True)
            if isinstance(found, Unmeasured):
                return found
            return found.first or Unmeasured(
                "backend_error", "the server says of a long prompt no more how likely tokens are, as it did of a short one"
            )

        def answer(index: int) -> str | Unmeasured:
            question = prompts[index] if self.tokenized_requests else contexts[index]
            found = self._ask_text(question, settings[index], sent[index])
            if isinstance(found, Unmeasured):
                return found
            return str(postprocess_generated_text(found.text, settings[index].get("until"), getattr(self, "think_end_token", None)))

        if self._habits.tells_first:
            self._check_beginning({size: index for index, size in enumerate(sizes) if sent[index] >= SHORT}, look)
        drawn = any(asked.get("do_sample") or asked.get("temperature") for asked in settings)
        said = [str(context) for context in contexts]
        kept = self._resume("generate_until", prompts, sizes, answer, [*zip(said, map(str, settings), strict=True)], drawn=drawn)
        found = self._ask_all(sizes, _sort_keys(prompts), answer, kept, quiet=disable_tqdm, name="generate_until")
        return [check_understood(request, answer) for request, answer in zip(requests, found, strict=True)]

    def _check_likelihoods(self, requests: Sequence[Instance]) -> None:
        """Raises ModelError where the server has no log-likelihoods of prompts, or none to be believed. Asks it once."""
        names = sorted({request.task_name or "a task" for request in requests})
        if self.chat:
            raise ModelError(
                f"chat completions give no log-likelihoods of a prompt, and {', '.join(names)} has to be scored; {_name_instead(names)}"
            )
        if self._flaw is None and requests:
            prompts = [self.tok_encode(text) for text in canary.TEXTS]
            found = canary.find_flaw(
                lambda ids: self._ask_echo(ids, tops=2),
                [ids for ids in prompts if self._word(ids)],
                self.tokenizer,
                self._spelling,
                can_ask=lambda ids: self._word(ids) is not None,
            )
            self._flaw = found or ""
        if self._flaw:
            raise ModelError(f"the log-likelihoods of {self._server.url} cannot be believed: {self._flaw}; {_name_instead(names)}")

    def _check_can_generate(self, requests: Sequence[Instance]) -> None:
        """Raises ModelError where truncation could not be found out, or a chat is asked for without one."""
        if self.chat and not isinstance(requests[0].args[0], JsonChatStr):
            raise ModelError("a chat server is asked in messages; add --apply_chat_template")
        if not self._habits.reports and not self._habits.tells_first:
            raise ModelError(
                f"{self._server.url} says neither how many tokens it read (usage.prompt_tokens) nor how likely tokens are (logprobs): "
                "whether it cuts prompts cannot be found out, so nothing is measured"
            )

    # ------------------------------------------------------------------ asking

    def _ask_all(
        self,
        sizes: Sequence[int],
        keys: Sequence[bytes],
        ask: Callable[[int], Any],
        kept: Kept,
        *,
        quiet: bool,
        name: str,
    ) -> list[Any]:
        """The answer to each prompt, asked in the order of `keys`, so that those that begin alike follow one another; those known already are not asked."""
        order, found = sorted(range(len(keys)), key=keys.__getitem__), [None] * len(keys)
        over = threading.Event()

        def ask_one(index: int) -> Any:
            """The answer to a prompt, or why it is not asked."""
            refused = self._ceiling.find(sizes[index])
            if over.is_set() or refused is not None:
                return refused
            if index in kept.known:
                return kept.known[index]
            try:
                answer = ask(index)
            except ModelError:
                over.set()  # before the next prompt is taken up
                raise
            self._ceiling.note(sizes[index], answer)
            return answer

        pool = ThreadPoolExecutor(self._at_once, thread_name_prefix="api")
        try:
            with tqdm(total=len(order), desc=name, disable=True if quiet else None) as bar:
                for index, answer in zip(order, pool.map(ask_one, order), strict=True):
                    if isinstance(answer, Unmeasured) and not self._knows_outcomes:
                        raise ModelError(f"{answer.reason}; a sum over the others would be a false number")
                    if index not in kept.known:
                        kept.add({index: answer})
                    found[index] = answer
                    bar.update()
        finally:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return found

    def _check_beginning(self, examples: Mapping[int, int], look: Callable[[int, bool], canary.Seen | Unmeasured]) -> None:
        """Notes from which length on the end of a prompt is the same with another beginning: the longest first, until one is not.

        What reaches from the beginning of a long prompt to its end does so in a shorter one too. `examples`: a prompt of each length;
        `look`: (prompt, changed) → what is seen at its end.
        """
        for size, index in sorted(examples.items(), reverse=True):
            if size <= self._proven:
                return
            if self._ceiling.find(size) is not None:
                continue
            seen = list[canary.Seen]()
            while len(seen) < 4 and not isinstance(found := look(index, len(seen) == 3), Unmeasured):
                seen.append(found)
            if len(seen) < 4:
                self._ceiling.note(size, found)
                continue
            # A prefix cache serves every question but the first, and computes otherwise: by 0.1 nats, in llama.cpp.
            if canary.tells_apart(*seen[1:]):
                self._proven = size
                return
            said = f"the end of a prompt of {size} tokens is the same with another beginning"
            if self._trust_usage and self._habits.reports:
                log.warning("%s; the server reports all of its tokens as read, which trust_usage believes", said)
                return
            reason = f"{said}: the server cuts it, though it does not say so, or the model has forgotten its beginning (trust_usage=True)"
            log.warning("%s", reason)
            self._ceiling.note(size, Unmeasured("backend_limit", reason))

    def _ask_echo(self, ids: Sequence[int], tops: int = 1) -> answers.Echo | Unmeasured:
        question = self._word(ids)
        if question is None:
            return Unmeasured(
                "backend_error", "the prompt's text has other tokens than the prompt; leave tokenized_requests=False out"
            )
        payload = self._create_payload(question, generate=False, seed=self._seed) | {"logprobs": tops}
        return self._server.ask(payload, lambda found: answers.read_echo(found, ids, self._spelling), tokens=len(ids))

    def _ask_text(
        self, question: Any, settings: Mapping[str, Any], sent: int | None, *, first: bool = False
    ) -> answers.Text | Unmeasured:
        """`question`: token ids, a text, or a chat as JSON. `first`: likely first tokens are asked for too."""
        wanted: Any = normalize_gen_kwargs(copy.deepcopy(dict(settings)), self._max_gen_toks)
        budget = wanted["max_gen_toks"]  # the request's words take it out
        asked: dict[str, Any] = {"generate": True, "gen_kwargs": wanted, "seed": self._seed, "eos": self.eos_string}
        if self.chat:
            payload = LocalChatCompletion._create_payload(self, json.loads(question.prompt), **asked)
        else:
            payload = self._create_payload(question, **asked)
        if first:
            payload |= {"logprobs": True, "top_logprobs": LIKELY} if self.chat else {"logprobs": LIKELY}
        if sent is not None:
            sent += self._habits.adds - (0 if self.tokenized_requests else canary.SLACK)
        return self._server.ask(payload, lambda found: answers.read_text(found, sent=sent, budget=budget, chat=self.chat))

    def _word(self, ids: Sequence[int]) -> Any:
        """A scored prompt as it goes out; None where it has to be text, and the text has other tokens."""
        if self.tokenized_requests:
            return list(ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text if self.tok_encode(text) == list(ids) else None

    def _meet(self) -> canary.Habits:
        def count(text: str) -> int:
            return len(self._encode_context(_make_chat(text) if self.chat else text))

        ways = [False, True] if self.tokenized_requests else [True]
        return canary.meet(
            lambda as_text, text, first: self._ask_fixed(text, 1, first=first, as_text=as_text),
            count,
            server=self._server.url,
            as_text=ways,
        )

    def _ask_fixed(self, text: str, budget: int, *, first: bool, as_text: bool | None = None) -> answers.Text | Unmeasured:
        """What is generated after a short text of ours."""
        as_text = not self.tokenized_requests if as_text is None else as_text
        question = _make_chat(text) if self.chat else (text if as_text else self.tok_encode(text))
        return self._ask_text(question, {"max_gen_toks": budget}, None, first=first)

    # ------------------------------------------------------------------ tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Any:
        """lm_eval's. Raises ModelError where a chat server would have to go on from the beginning of an answer, as scored tasks want."""
        if self.chat and not add_generation_prompt:
            raise ModelError(
                "chat completions give no log-likelihoods, and begin every answer by themselves; in place of a task that is scored, use "
                "the one of its name that ends in _generate (passkey_extrapolate_generate)"
            )
        return super().apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def _encode_context(self, context: Any) -> list[int]:
        """Token ids of a prompt to generate after; of a chat, as the tokenizer's own template lays it out, where it has one."""
        if not isinstance(context, JsonChatStr):
            return self.tok_encode(context)
        messages = json.loads(context.prompt)
        if not getattr(self.tokenizer, "chat_template", None):
            raise ModelError("to count a chat's tokens, name a tokenizer that has the model's chat template")
        laid_out = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer.encode(laid_out, add_special_tokens=False))

    def tok_encode(
        self, string: str, left_truncate_len: int | None = None, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """As `hf-extrapolate` splits it: with the tokenizer's BOS, without its EOS, and never cut; of a long text, each sentence once."""
        if add_special_tokens is False:
            return list(self.tokenizer.encode(string, add_special_tokens=False))
        return self._encode(string) if len(string) < LONG_TEXT else self.token_count.ids(string, self._encode)

    def _encode(self, string: str) -> list[int]:
        if has_bos_prefix(string, self.tokenizer.bos_token):
            return list(self.tokenizer.encode(string, add_special_tokens=False))
        ids = list(self.tokenizer.encode(string))
        return ids[: len(ids) - self._appended] if self._appended else ids

    @functools.cached_property
    def _appended(self) -> int:
        return count_appended(self.tokenizer)

    @functools.cached_property
    def token_count(self) -> TokenCount:
        return TokenCount(self.tokenizer)


def _sort_keys(sequences: Sequence[Sequence[int]]) -> list[bytes]:
    """Big-endian bytes, which sort as the tokens do."""
    return [np.asarray(sequence, dtype=">u4").tobytes() for sequence in sequences]


def _name_instead(names: Sequence[str]) -> str:
    """What can be asked of a server that only generates."""
    own = [f"{name}_generate" for name in names if name.endswith("_extrapolate") and not name.startswith("loss")]
    return f"use {', '.join(own)}" if own else "use tasks that generate"


def _make_chat(text: str) -> JsonChatStr:
    return JsonChatStr(json.dumps([{"role": "user", "content": text}]))


def _change_chat(prompt: str) -> str:
    """A chat whose longest message begins otherwise."""
    messages = json.loads(prompt)
    longest = max(messages, key=lambda message: len(message["content"]))
    longest["content"] = canary.change_text(longest["content"])
    return json.dumps(messages)
