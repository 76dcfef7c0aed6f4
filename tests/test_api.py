"""`api-extrapolate` against servers that run here: one that behaves, held to lm_eval's `hf`, and many that do not."""

from __future__ import annotations

import contextlib
import copy
import email.utils
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import servers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from servers import Fault, Served, serve
from tokenizers_here import make_tokenizer

from harness_ext.cells import Unmeasured
from harness_ext.errors import ModelError, PromptTooLongError
from harness_ext.models import answers, served
from harness_ext.models.api import ApiExtrapolate
from harness_ext.models.hf import HFExtrapolate

KEY = "sk-this-is-nobodys-business"
LONG = "The old farmer carried a box near the river. A green lamp stood on the table by the window. " * 8


@pytest.fixture(scope="module")
def model(saved: Any) -> servers.Model:
    return load(saved("llama"))


def load(folder: Path) -> servers.Model:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = servers.TEMPLATE
    return servers.Model(AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer)


@pytest.fixture
def ask(saved: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ApiExtrapolate]:
    """(server, **arguments) → the model, patient for a moment only."""
    monkeypatch.setattr(served, "LONGEST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def make(server: Served, **options: Any) -> ApiExtrapolate:
        given: dict[str, Any] = {
            "base_url": server.url,
            "model": "tiny",
            "tokenizer": str(saved("llama")),
            "timeout": 20,
            **options,
        }
        return ApiExtrapolate(**given)

    return make


def scored(count: int, doc: dict[str, Any] | None = None, text: str = LONG) -> list[Instance]:
    ends = (" lamp", " the kettle", " 71432", " a b")
    asked = [(text[: 40 + 97 * (index % 7)].rstrip(), ends[index % 4]) for index in range(count)]
    return [
        Instance("loglikelihood", doc or {"prompt_tokens": 1}, pair, i, ("passkey_extrapolate", i, 1))
        for i, pair in enumerate(asked)
    ]


def generated(texts: list[str], **asked: Any) -> list[Instance]:
    wanted = {"until": ["@@@"], "max_gen_toks": 6, "do_sample": False, **asked}
    return [
        Instance("generate_until", {"prompt_tokens": 1}, (text, copy.deepcopy(wanted)), i, ("passkey_extrapolate_generate", i, 1))
        for i, text in enumerate(texts)
    ]


# ---------------------------------------------------------------------- a server that behaves


@pytest.mark.parametrize("family", [("llama",), ("gpt2", "n_positions"), ("gemma2",)])
@pytest.mark.parametrize("options", [{}, {"num_concurrent": 4}, {"batch_size": 3}, {"tokenized_requests": False}])
def test_log_likelihoods_over_a_server_are_those_of_hf(
    family: tuple[str, ...], options: dict[str, Any], saved: Any, ask: Any
) -> None:
    asked, folder = scored(12, text=LONG[:150]), saved(family[0], **dict.fromkeys(family[1:], 512))
    expected = HFLM(pretrained=str(folder), device="cpu", dtype="float32").loglikelihood(asked, disable_tqdm=True)
    with serve(load(folder)) as server:
        found = ask(server, tokenizer=str(folder), **options).loglikelihood(asked, disable_tqdm=True)
    for (likelihood, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert likelihood == pytest.approx(wanted, abs=1e-4)
        assert greedy == wanted_greedy


def test_the_tests_own_server_answers_batches_of_texts_and_of_tokens_alike(model: servers.Model) -> None:
    texts = [LONG[:60], LONG[30:120]]
    body = {"model": "tiny", "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    with serve(model) as server:
        both = [
            requests.post(server.url, json={**body, "prompt": prompt}, timeout=20).json()
            for prompt in (texts, [*map(model.encode, texts)])
        ]
        alone = [requests.post(server.url, json={**body, "prompt": text}, timeout=20).json()["choices"][0] for text in texts]
    assert both[0]["choices"] == both[1]["choices"]
    assert [choice["logprobs"] for choice in both[0]["choices"]] == [choice["logprobs"] for choice in alone]
    assert [choice["index"] for choice in both[0]["choices"]] == [0, 1]


@pytest.mark.parametrize("options", [{}, {"num_concurrent": 3}, {"tokenized_requests": False}])
def test_generated_answers_over_a_server_are_those_of_hf(
    options: dict[str, Any], saved: Any, model: servers.Model, ask: Any
) -> None:
    texts = [LONG[:40], LONG, LONG[10:200], LONG[:41]]
    expected = HFLM(pretrained=str(saved("llama")), device="cpu", dtype="float32", max_length=2048).generate_until(
        generated(texts), disable_tqdm=True
    )
    with serve(model) as server:
        assert ask(server, **options).generate_until(generated(texts), disable_tqdm=True) == expected


@pytest.mark.parametrize("task", ["passkey_extrapolate", "niah_multikey_extrapolate", "passkey_extrapolate_generate"])
def test_a_task_gives_equal_answers_through_hf_hf_extrapolate_and_a_server(
    task: str, saved: Any, model: servers.Model, ask: Any, evaluate: Any
) -> None:
    sweep = {"lengths": [400, 800], "depths": [0, 1], "samples": 1}
    local = {"pretrained": str(saved("llama")), "device": "cpu", "dtype": "float32"}
    with serve(model) as server:
        runs = [
            evaluate(made, [task], trained_length=64, **sweep)
            for made in (ask(server), HFExtrapolate(**local), HFLM(**local, max_length=1024))
        ]
    first, *others = [run["samples"][task] for run in runs]
    assert len(first) == 4
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert one["doc"]["prompt_fingerprint"] == two["doc"]["prompt_fingerprint"]
            assert one["filtered_resps"] == two["filtered_resps"]
            if task.endswith("_generate"):
                assert one["resps"] == two["resps"]
            else:
                assert one["resps"][0][0][0] == pytest.approx(two["resps"][0][0][0], abs=1e-4)
                assert one["resps"][0][0][1] == two["resps"][0][0][1]


def test_a_tokenizer_with_bos_is_asked_with_its_bos_and_one_that_ends_texts_without_its_end(ask: Any, tmp_path: Path) -> None:
    from conftest import build

    for kind, first in (("sentencepiece", 0), ("wordpiece", 1)):
        tokenizer = make_tokenizer(kind)
        tokenizer.save_pretrained(tmp_path / kind)
        with serve(servers.Model(build("llama"), tokenizer)) as server:
            made = ask(server, tokenizer=str(tmp_path / kind), trained_length=64)
            ids = made.tok_encode("the farmer carried a box")
            assert ids[0] == first
            assert ids[-1] != tokenizer.sep_token_id
            assert made.tok_encode(LONG * 3) == tokenizer.encode(LONG * 3)[: len(made.tok_encode(LONG * 3))]


def test_prompts_that_begin_alike_are_asked_one_after_the_other(model: servers.Model, ask: Any) -> None:
    texts = [f"{name} carried a box to the river{end}" for end in (" and", " or", " then") for name in ("Anna", "Berta", "Carl")]
    with serve(model) as server:
        found = ask(server).generate_until(generated(texts), disable_tqdm=True)
        asked = [tuple(body["prompt"]) for body in server.asked[-len(texts) :]]
        assert asked == sorted(asked)
        again = ask(server, num_concurrent=1).generate_until(generated(texts[::-1]), disable_tqdm=True)
    assert again == found[::-1]


# ---------------------------------------------------------------------- refused before anything is asked


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokenizer": None}, "add tokenizer="),
        ({"tokenizer_backend": "tiktoken"}, "add tokenizer="),
        ({"model": None}, "add model="),
        ({"tokenizer": "/nowhere/at-all"}, "cannot be read"),
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"base_url": None}, "base_url"),
        ({"base_url": "http://me:secret@host/v1/completions"}, "OPENAI_API_KEY"),
        ({"base_url": "http://host/v1/completions?api_key=secret"}, "OPENAI_API_KEY"),
        ({"auth_token": "secret"}, "OPENAI_API_KEY"),
        ({"header": {"Authorization": "secret"}}, "OPENAI_API_KEY"),
        ({"trained_length": 0}, "trained_length"),
        ({"max_length": "long"}, "max_length"),
        ({"timeout": -1}, "timeout"),
        ({"max_retries": 0}, "max_retries"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_asked(
    options: dict[str, Any], said: str, model: servers.Model, ask: Any
) -> None:
    with serve(model) as server:
        with pytest.raises(ModelError, match=said) as error:
            ask(server, **options)
        assert "secret" not in str(error.value)
        assert server.asked == []


def test_a_trained_length_is_read_beside_the_tokenizer_or_given_and_else_refused(
    model: servers.Model, ask: Any, tmp_path: Path
) -> None:
    make_tokenizer("bpe").save_pretrained(tmp_path)
    with serve(model) as server:
        assert ask(server).trained_length.tokens == 64
        given = ask(server, tokenizer=str(tmp_path), trained_length=300).trained_length
        assert (given.tokens, given.source) == (300, "user")
        count = len(server.asked)
        with pytest.raises(ModelError, match="add trained_length=N"):
            ask(server, tokenizer=str(tmp_path))
        assert len(server.asked) == count


def test_max_length_is_a_limit_and_never_a_truncation(model: servers.Model, ask: Any) -> None:
    with serve(model) as server:
        made = ask(server, max_length=40)
        with pytest.raises(PromptTooLongError, match="max_length=40"):
            made.loglikelihood(scored(3), disable_tqdm=True)
        with pytest.raises(PromptTooLongError, match="max_length=40"):
            made.generate_until(generated([LONG]), disable_tqdm=True)
        with pytest.raises(PromptTooLongError, match="max_length=40"):
            made.lift(41)


# ---------------------------------------------------------------------- log-likelihoods that cannot be believed


def most(found: dict[str, Any]) -> dict[str, Any]:
    """The likeliest token's log-probability in place of that of the token that is there."""
    best = [top and max(top.values()) for top in found["top_logprobs"]]
    return {**found, "token_logprobs": best}


def flat(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "token_logprobs": [None] + [-1.0] * (len(found["tokens"]) - 1)}


def rotated(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "tokens": found["tokens"][1:] + found["tokens"][:1]}


UNBELIEVABLE = {
    "llama-cpp-python's shift": (Fault(say=servers.each_logprobs(servers.shift)), "came back"),
    "a shift of the right length": (Fault(say=servers.each_logprobs(servers.shift_whole)), "off by one|likelier"),
    "echo ignored": (Fault(ask=lambda body: {**body, "echo": False}), "came back"),
    "llama.cpp's logprobs": (
        Fault(say=servers.each_logprobs(lambda found: {"content": [{"token": "a", "logprob": -1.0, "top_logprobs": []}]})),
        "an object of content",
    ),
    "no logprobs at all": (Fault(ask=lambda body: {**body, "logprobs": None}), "logprobs are None"),
    "the likeliest in place of its own": (Fault(say=servers.each_logprobs(most)), "off by one|likelier"),
    "one number for all": (Fault(say=servers.each_logprobs(flat)), "likelier|less likely|other tokens"),
    "tokens of another prompt": (Fault(say=servers.each_logprobs(rotated)), "another prompt"),
    "a number for the first token": (
        Fault(say=servers.each_logprobs(lambda found: {**found, "token_logprobs": [-1.0, *found["token_logprobs"][1:]]})),
        "first token",
    ),
    "NaN": (
        Fault(
            say=servers.each_logprobs(
                lambda found: {**found, "token_logprobs": [None] + [float("nan")] * (len(found["tokens"]) - 1)}
            )
        ),
        "log-probability at 1 is nan",
    ),
    "null": (
        Fault(say=servers.each_logprobs(lambda found: {**found, "token_logprobs": [None] * len(found["tokens"])})),
        "log-probability at 1 is None",
    ),
    "logits": (
        Fault(say=servers.each_logprobs(lambda found: {**found, "token_logprobs": [None] + [7.5] * (len(found["tokens"]) - 1)})),
        "log-probability at 1 is 7.5",
    ),
    "one log-probability too few": (
        Fault(say=servers.each_logprobs(lambda found: {**found, "token_logprobs": found["token_logprobs"][:-1]})),
        "log-probabilities and",
    ),
    "lists of the wrong kind": (
        Fault(say=servers.each_logprobs(lambda found: {**found, "tokens": "none"})),
        "no log-probabilities",
    ),
    "no likeliest tokens": (
        Fault(say=servers.each_logprobs(lambda found: {**found, "top_logprobs": [None] * len(found["tokens"])})),
        "likeliest",
    ),
}


@pytest.mark.parametrize("name", UNBELIEVABLE)
def test_log_likelihoods_that_cannot_be_believed_are_refused_before_the_first_prompt(
    name: str, model: servers.Model, ask: Any
) -> None:
    fault, said = UNBELIEVABLE[name]
    with serve(model, fault) as server:
        made = ask(server, max_retries=1)
        with pytest.raises(ModelError, match=said) as error:
            made.loglikelihood(scored(4), disable_tqdm=True)
        assert "use passkey_extrapolate_generate" in str(error.value)
        prompts = [made.tok_encode("".join(request.args)) for request in scored(4)]
        assert not any(body["prompt"] in prompts for body in server.asked)
        assert made.generate_until(generated([LONG]), disable_tqdm=True) != [""]


def test_a_tokenizer_that_is_not_the_servers_is_found_out(model: servers.Model, ask: Any, tmp_path: Path) -> None:
    make_tokenizer("byte").save_pretrained(tmp_path)
    with serve(model) as server, pytest.raises(ModelError, match="another tokenizer"):
        ask(server, tokenizer=str(tmp_path), trained_length=64)


# ---------------------------------------------------------------------- prompts that are cut

LENGTHS = {"lengths": [256, 512, 1024], "depths": [0, 1], "samples": 1}


def outcomes(results: Any, task: str) -> dict[int, tuple[str, str]]:
    return {length["length"]: (length["outcome"], length["reason"]) for length in results["configs"][task]["lengths"]}


def say_nothing(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "usage"}


@pytest.mark.parametrize("task", ["passkey_extrapolate", "passkey_extrapolate_generate"])
@pytest.mark.parametrize("said", [None, say_nothing])
def test_a_prompt_that_the_server_cuts_is_no_score_but_an_outcome_of_its_length(
    task: str, said: Any, model: servers.Model, ask: Any, evaluate: Any
) -> None:
    with serve(model, Fault(cut=512, say=said)) as server:
        results = evaluate(ask(server), [task], trained_length=64, **LENGTHS)
    found = outcomes(results, task)
    assert [found[length][0] for length in (256, 512, 1024)] == ["measured", "measured", "backend_limit"]
    assert "1024 tokens" in found[1024][1]
    scores = results["results"][task]
    assert any(key.startswith("exact@     512") and isinstance(value, float) for key, value in scores.items())
    assert not any(key.startswith("exact@    1024") and isinstance(value, float) for key, value in scores.items())


@pytest.mark.parametrize("chat", [True, False])
def test_a_server_that_says_it_read_all_and_did_not_is_found_out_by_another_beginning(
    chat: bool, model: servers.Model, ask: Any, evaluate: Any, tmp_path: Path
) -> None:
    task = "passkey_extrapolate_generate"
    model.tokenizer.save_pretrained(tmp_path)

    def lie(answer: dict[str, Any]) -> dict[str, Any]:
        return answer

    with serve(model, Fault(cut=400, say=lie)) as server:
        real = servers.Handler.answer

        def answer(self: Any, status: int, text: bytes, *rest: Any, **options: Any) -> None:
            body = server.asked[-1]
            found = json.loads(text)
            if chat:
                laid_out = model.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
                found["usage"]["prompt_tokens"] = len(model.tokenizer.encode(laid_out, add_special_tokens=False))
            else:
                found["usage"]["prompt_tokens"] = len(model.encode(body["prompt"]))
            real(self, status, json.dumps(found).encode(), *rest, **options)

        servers.Handler.answer = answer  # type: ignore[method-assign]
        try:
            made = ask(server, base_url=server.chat if chat else server.url, tokenizer=str(tmp_path), trained_length=64)
            options = {"apply_chat_template": True} if chat else {}
            results = evaluate(made, [task], options=options, **LENGTHS)
        finally:
            servers.Handler.answer = real  # type: ignore[method-assign]
    found = outcomes(results, task)
    assert [found[length][0] for length in (256, 512, 1024)] == ["measured", "backend_limit", "backend_limit"]
    assert "with another beginning" in found[512][1]


def test_a_chat_that_the_server_cuts_is_an_outcome(model: servers.Model, ask: Any, evaluate: Any, tmp_path: Path) -> None:
    task = "passkey_extrapolate_generate"
    model.tokenizer.save_pretrained(tmp_path)
    with serve(model, Fault(cut=600)) as server:
        made = ask(server, base_url=server.chat, tokenizer=str(tmp_path), trained_length=64)
        results = evaluate(made, [task], options={"apply_chat_template": True}, **LENGTHS)
        assert all("messages" in body for body in server.asked)
    assert [found for found, _ in outcomes(results, task).values()] == ["measured", "measured", "backend_limit"]


def test_an_answer_that_the_context_had_no_room_for_is_an_outcome(model: servers.Model, ask: Any) -> None:
    short = Fault(ask=lambda body: {**body, "max_tokens": min(3, body["max_tokens"])})
    with serve(model, short) as server:
        (answer,) = ask(server).generate_until(generated([LONG]), disable_tqdm=True)
    assert isinstance(answer, Unmeasured)
    assert answer.outcome == "backend_limit"
    assert "after 3 of 6 tokens" in answer.reason


def test_a_server_that_says_nothing_by_which_truncation_shows_is_not_measured(model: servers.Model, ask: Any) -> None:
    silent = Fault(ask=lambda body: {**body, "logprobs": None}, say=say_nothing)
    with serve(model, silent) as server, pytest.raises(ModelError, match="cannot be found out"):
        ask(server).generate_until(generated([LONG]), disable_tqdm=True)


def test_a_model_that_forgets_its_beginning_is_measured_only_where_the_user_trusts_what_is_reported(saved: Any, ask: Any) -> None:
    forgetful = load(saved("mistral-window"))  # two layers, each over 16 tokens
    for trust in (False, True):
        with serve(forgetful) as server:
            made = ask(server, tokenizer=str(saved("mistral-window")), trust_usage=trust)
            (answer,) = made.generate_until(generated([LONG]), disable_tqdm=True)
        assert isinstance(answer, Unmeasured) != trust
        if not trust:
            assert answer.outcome == "backend_limit"
            assert "trust_usage" in answer.reason


REFUSALS = {
    "openai": (400, "This model's maximum context length is 512 tokens. However, your messages resulted in 1024 tokens."),
    "vllm": (400, "The decoder prompt (length 1024) is longer than the maximum model length of 512."),
    "sglang": (400, "The input (1024 tokens) is longer than the model's context length (512 tokens)."),
    "llama.cpp": (400, "the request exceeds the available context size. try increasing the context size or enable context shift"),
    "llama-cpp-python": (500, "Requested tokens (1024) exceed context window of 512"),
    "tgi": (422, "Input validation error: `inputs` must have less than 512 tokens. Given: 1024"),
    "a proxy": (413, "Payload Too Large"),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("task", ["passkey_extrapolate", "passkey_extrapolate_generate"])
def test_a_length_that_is_refused_is_an_outcome_and_longer_ones_are_not_asked(
    name: str, task: str, model: servers.Model, ask: Any, evaluate: Any
) -> None:
    with serve(model, Fault(wire=servers.fail(*REFUSALS[name]), least=450)) as server:
        results = evaluate(ask(server), [task], trained_length=64, **LENGTHS)
        refused = [len(body["prompt"]) for body in server.asked if len(body["prompt"]) >= 450]
    found = outcomes(results, task)
    assert [found[length][0] for length in (256, 512, 1024)] == ["measured", "backend_limit", "backend_limit"]
    assert REFUSALS[name][1][:40] in found[512][1]
    assert len(refused) == 2  # the longest, once, and the next, once


def test_memory_that_runs_out_on_the_server_is_that_outcome(model: servers.Model, ask: Any) -> None:
    with serve(model, Fault(wire=servers.fail(500, "CUDA out of memory. Tried to allocate 2 GiB"), least=180)) as server:
        found = ask(server, max_retries=2).loglikelihood(scored(7), disable_tqdm=True)
    assert {answer.outcome for answer in found if isinstance(answer, Unmeasured)} == {"out_of_memory"}
    assert any(not isinstance(answer, Unmeasured) for answer in found)


# ---------------------------------------------------------------------- answers that are late, wrong or none


def twice(answer: dict[str, Any]) -> dict[str, Any]:
    return {**answer, "choices": answer["choices"] * 2}


def nobodys(answer: dict[str, Any]) -> dict[str, Any]:
    for choice in answer["choices"]:
        choice["logprobs"]["tokens"][3] = " somebody else"
    return answer


def not_a_number(answer: dict[str, Any]) -> dict[str, Any]:
    answer["choices"][0]["logprobs"]["token_logprobs"][-2] = float("nan")
    return answer


MISBEHAVING = {
    "late": (Fault(wire=servers.wait(1.5)), "no answer within|no whole answer within"),
    "never whole": (Fault(wire=servers.drip), "not whole in time|no whole answer|no answer within"),
    "twice in one answer": (Fault(say=twice), "2 choices"),
    "two documents": (Fault(wire=servers.send(b'{"choices": []}{"choices": []}')), "no JSON"),
    "no choice": (Fault(say=lambda answer: {**answer, "choices": []}), "0 choices"),
    "an index that was not asked": (
        Fault(say=lambda answer: {**answer, "choices": [{**answer["choices"][0], "index": 1}]}),
        "index 0",
    ),
    "another prompt's answer": (Fault(say=nobodys), "another prompt"),
    "half a document": (Fault(wire=servers.send(b'{"choices": [{"text": "a')), "no JSON"),
    "fewer bytes than promised": (Fault(wire=servers.send(b'{"choices": [', length=5000)), "connection failed|no JSON"),
    "a page": (Fault(wire=servers.send(b"<html>Bad gateway</html>", "text/html")), "no JSON .*text/html.*Bad gateway"),
    "nothing": (Fault(wire=servers.send(b"")), "no JSON .0 bytes"),
    "a list": (Fault(wire=servers.send(b"[1, 2]")), "no choices"),
    "no UTF-8": (Fault(wire=servers.send(b"\xff\xfe{}")), "no JSON"),
    "nested past all bounds": (Fault(wire=servers.send(b"[" * 200_000)), "no JSON"),
    "hung up": (Fault(wire=servers.hang_up), "connection failed"),
    "an error in an answer": (Fault(wire=servers.send(b'{"error": {"message": "overloaded"}}')), "overloaded"),
    "rate limited": (Fault(wire=servers.fail(429, "slow down")), "429: slow down"),
    "broken": (Fault(wire=servers.fail(500, "oops")), "500: oops"),
    "unavailable": (Fault(wire=servers.fail(503, "loading")), "503: loading"),
    "bad request": (Fault(wire=servers.fail(400, "unknown field seed")), "400: unknown field seed"),
    "unprocessable": (Fault(wire=servers.fail(422, "prompt must be a string")), "422: prompt must be a string"),
    "not a number": (Fault(say=not_a_number), "is nan"),
    "too long an answer": (Fault(wire=servers.send(b" " * (3 << 20))), "longer than"),
}
PATIENCE = {"late": 0.7, "never whole": 0.7}
"""Seconds that an answer is waited for, where that is what is tested; elsewhere a slow moment of the machine is no fault."""


@pytest.mark.parametrize("name", MISBEHAVING)
def test_a_prompt_without_an_answer_is_an_outcome_in_words_and_the_others_have_their_scores(
    name: str, model: servers.Model, ask: Any
) -> None:
    fault, said = MISBEHAVING[name]
    with serve(model) as server:
        good = ask(server).loglikelihood(scored(7), disable_tqdm=True)
    with serve(model, Fault(wire=fault.wire, say=fault.say, least=180)) as server:
        found = ask(server, max_retries=2, timeout=PATIENCE.get(name, 20)).loglikelihood(scored(7), disable_tqdm=True)
    lost = [answer for answer in found if isinstance(answer, Unmeasured)]
    assert 0 < len(lost) < len(found)
    assert {answer.outcome for answer in lost} == {"backend_error"}
    assert all(served.re.search(said, answer.reason) for answer in lost), lost
    for answer, expected in zip(found, good, strict=True):
        assert isinstance(answer, Unmeasured) or answer == pytest.approx(expected)


@pytest.mark.parametrize(
    "name", [name for name in MISBEHAVING if name not in ("bad request", "unprocessable", "too long an answer")]
)
def test_a_fault_that_passes_is_asked_again_and_changes_no_score(name: str, model: servers.Model, ask: Any) -> None:
    fault, _ = MISBEHAVING[name]
    with serve(model) as server:
        good = ask(server).loglikelihood(scored(7), disable_tqdm=True)
    with serve(model, Fault(wire=fault.wire, say=fault.say, least=100, times=2)) as server:
        lm = ask(server, max_retries=5, timeout=PATIENCE.get(name, 20))
        assert lm.loglikelihood(scored(7), disable_tqdm=True) == good
        assert server.misbehaved == 2


@pytest.mark.parametrize("status", [401, 403, 404, 301])
def test_what_concerns_every_prompt_ends_the_run_at_once_in_one_line(status: int, model: servers.Model, ask: Any) -> None:
    for after in (0, 20):  # at the first question, and in the middle of a run
        with serve(model, Fault(wire=servers.fail(status, "no such thing", Location="http://elsewhere/"), after=after)) as server:
            with pytest.raises(ModelError, match=f"the server answered {status}: .*; ") as error:
                ask(server).loglikelihood(scored(12), disable_tqdm=True)
            assert "\n" not in str(error.value)
            assert len(server.asked) == after + 1


def test_no_server_at_all_is_one_line(model: servers.Model, ask: Any) -> None:
    with serve(model) as server:
        pass
    with pytest.raises(ModelError, match=r"does not answer a short prompt: the connection failed: .*refused") as error:
        ask(server, max_retries=1)
    assert "\n" not in str(error.value)


def test_a_rate_limit_is_waited_for_as_long_as_it_asks(model: servers.Model, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(served.time, "sleep", pauses.append)
    for value, least, most in (("7", 7, 7), (email.utils.formatdate(time.time() + 20, usegmt=True), 15, 20), ("soon", 0, 1)):
        with serve(model, Fault(wire=servers.fail(429, "slow down", Retry_After=value), after=4, times=1)) as server:
            pauses.clear()
            assert len(ask(server).loglikelihood(scored(2), disable_tqdm=True)) == 2
        assert len(pauses) == 1
        assert least <= pauses[0] <= most


def test_a_pause_that_is_past_the_bound_is_not_waited_for(model: servers.Model, ask: Any) -> None:
    begun = time.monotonic()
    with serve(model, Fault(wire=servers.fail(429, "slow down", Retry_After="3600"), least=180)) as server:
        found = ask(server, max_seconds=5).loglikelihood(scored(7), disable_tqdm=True)
    assert time.monotonic() - begun < 30
    assert any(
        "another attempt in 3.6e+03 s would be past the 5 s of max_seconds" in a.reason for a in found if isinstance(a, Unmeasured)
    )


def test_a_server_that_has_gone_is_not_asked_for_every_prompt_that_is_left(model: servers.Model, ask: Any) -> None:
    with serve(model, Fault(wire=servers.hang_up, after=20)) as server:
        found = ask(server, max_retries=2).loglikelihood(scored(200), disable_tqdm=True)
        assert len(server.asked) < 60
    assert sum(isinstance(answer, Unmeasured) for answer in found) > 150
    assert any(answer.reason.startswith("not asked: ") for answer in found if isinstance(answer, Unmeasured))


# ---------------------------------------------------------------------- what does not know outcomes


def test_a_task_that_knows_no_outcomes_gets_an_error_and_no_score(model: servers.Model, ask: Any) -> None:
    with serve(model, Fault(wire=servers.fail(500), least=180)) as server:
        made = ask(server, max_retries=1)
        with pytest.raises(ModelError, match="knows no outcome"):
            made.loglikelihood(scored(7, doc={"question": "?"}), disable_tqdm=True)
        rolling = [Instance("loglikelihood_rolling", {}, (LONG,), 0, ("wikitext", 0, 1))]
        assert made.loglikelihood_rolling(rolling, disable_tqdm=True)[0] < 0
    with serve(model) as server:
        made = ask(server, max_retries=1)
        made.loglikelihood_rolling(rolling, disable_tqdm=True)
        server.fault = Fault(wire=servers.fail(500))
        with pytest.raises(ModelError, match="a sum over the others would be a false number"):
            made.loglikelihood_rolling(rolling, disable_tqdm=True)


def test_rolling_windows_are_those_of_hf(saved: Any, model: servers.Model, ask: Any) -> None:
    asked = [Instance("loglikelihood_rolling", {}, (LONG,), 0, ("wikitext", 0, 1))]
    expected = HFLM(pretrained=str(saved("llama")), device="cpu", dtype="float32").loglikelihood_rolling(asked, disable_tqdm=True)
    with serve(model) as server:
        made = ask(server)
        made.lift(1000)
        (found,) = made.loglikelihood_rolling(asked, disable_tqdm=True)
        assert max(len(body["prompt"]) for body in server.asked[-3:]) <= 64
    assert found == pytest.approx(expected[0], rel=0.05)  # a window of one token less


@pytest.mark.parametrize("named", ["passkey_extrapolate", "niah_single_extrapolate"])
def test_a_scored_task_on_a_chat_server_is_told_which_one_generates(
    named: str, model: servers.Model, ask: Any, evaluate: Any, tmp_path: Path
) -> None:
    model.tokenizer.save_pretrained(tmp_path)
    with serve(model) as server:
        made = ask(server, base_url=server.chat, tokenizer=str(tmp_path), trained_length=64)
        with pytest.raises(ModelError, match=f"use {named}_generate"):
            evaluate(made, [named], lengths=[400], depths=[0], samples=1)
        with pytest.raises(ModelError, match=f"use {named}_generate"):
            evaluate(made, [named], lengths=[400], depths=[0], samples=1, options={"apply_chat_template": True})
        with pytest.raises(ModelError, match="--apply_chat_template"):
            evaluate(made, [f"{named}_generate"], lengths=[400], depths=[0], samples=1)


def test_a_chat_answer_withheld_or_spent_on_reasoning_is_no_wrong_answer(model: servers.Model, ask: Any, tmp_path: Path) -> None:
    model.tokenizer.save_pretrained(tmp_path)
    messages = json.dumps([{"role": "user", "content": LONG}])

    def reason(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["message"]["content"] = None
        return answer

    def withhold(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["finish_reason"] = "content_filter"
        return answer

    for say, said in ((reason, "no content"), (withhold, "content filter")):
        with serve(model, Fault(say=say, after=5)) as server:
            made = ask(server, base_url=server.chat, tokenizer=str(tmp_path), trained_length=64)
            asked = generated([messages])
            asked[0].arguments = (type(made.apply_chat_template([]))(messages), asked[0].args[1])
            (answer,) = made.generate_until(asked, disable_tqdm=True)
        assert isinstance(answer, Unmeasured)
        assert said in answer.reason


# ---------------------------------------------------------------------- keys


def test_a_key_is_sent_and_appears_nowhere_else(
    model: servers.Model, ask: Any, evaluate: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, capfd: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    wires = [
        servers.fail(500, f"Incorrect API key provided: {KEY}"),
        servers.send(f"<html>{KEY}</html>".encode(), KEY),
        servers.send(json.dumps({"choices": [{"index": 0, "text": KEY, "logprobs": {KEY: 1}}]}).encode()),
        servers.hang_up,
    ]
    said = []
    for wire in wires:
        with serve(model, Fault(wire=wire, least=450)) as server:
            made = ask(server, max_retries=2)
            monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
            made = ask(server, max_retries=2)
            results = evaluate(made, ["passkey_extrapolate"], trained_length=64, **LENGTHS)
            assert f"Bearer {KEY}" in server.keys
            monkeypatch.delenv("OPENAI_API_KEY")
        said += [
            json.dumps(results, default=str),
            json.dumps(made.get_model_info()),
            *outcomes(results, "passkey_extrapolate")[512],
        ]
    for status in (401, 403):
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        with (
            serve(model, Fault(wire=servers.fail(status, f"Incorrect API key provided: {KEY}"))) as server,
            pytest.raises(ModelError) as error,
        ):
            ask(server)
        said += [str(error.value), str(error.value.__cause__)]
        assert "***" in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
    with serve(model) as server, pytest.raises(ModelError, match="no header can carry") as error:
        ask(server)
    captured = capfd.readouterr()
    for text in (*said, str(error.value), caplog.text, captured.out, captured.err):
        assert KEY not in text


def test_a_key_is_never_sent_to_where_a_server_points(model: servers.Model, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve(model) as other, serve(model, Fault(wire=servers.fail(307, "moved", Location=other.url))) as server:
        with pytest.raises(ModelError, match="moved"):
            ask(server)
        assert other.keys == set()


# ---------------------------------------------------------------------- any answer at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["choices", "text", "logprobs", "usage", "index"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def answer(model: servers.Model) -> Iterator[tuple[list[int], dict[str, Any]]]:
    ids = model.encode(LONG[:80])
    body = {"model": "tiny", "prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True}
    with serve(model) as server:
        yield ids, requests.post(server.url, json=body, timeout=20).json()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_answered_is_read_as_it_stands_or_refused(data: st.DataObject, answer: Any, model: servers.Model) -> None:
    ids, whole = answer
    spelling = answers.Spelling(model.tokenizer)
    expected = answers.read_echo(whole, ids, spelling)
    broken = copy.deepcopy(whole)
    node: Any = broken
    while isinstance(node, (dict, list)) and node:
        place = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[place], (dict, list)) or not node[place] or data.draw(st.booleans()):
            node[place] = data.draw(JSON)
            break
        node = node[place]
    try:
        found = answers.read_echo(broken, ids, spelling)
    except answers.AttemptError:
        return
    assert len(found.logprobs) == len(expected.logprobs)
    assert all(value <= answers.CLOSE for value in found.logprobs[:-1])


@settings(max_examples=200)
@given(JSON, st.booleans())
def test_whatever_is_answered_to_a_question_is_a_text_or_refused(found: Any, chat: bool) -> None:
    with contextlib.suppress(answers.AttemptError):
        assert isinstance(answers.read_text(found, sent=5, budget=4, chat=chat).text, str)
