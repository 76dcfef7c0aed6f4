"""`vllm-extrapolate` and `sglang-extrapolate` over played engines (`engines`), held to `hf-extrapolate`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import play_sglang, play_vllm
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers_here import make_tokenizer

from harness_ext.cells import Unmeasured
from harness_ext.errors import ModelError, PromptTooLongError
from harness_ext.models import engine_config
from harness_ext.models.hf import HFExtrapolate

TEXT = "The old farmer carried a box near the river. A green lamp stood on the table by the window. " * 20
OURS = {"prompt_tokens": 1}
Make = Callable[..., Any]


@pytest.fixture(params=["vllm", "sglang"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """`make(folder, **arguments)`: the model; `played`: what its engines did; `name`."""
    plays = {"vllm": (play_vllm, "VLLMExtrapolate"), "sglang": (play_sglang, "SGLangExtrapolate")}
    play, name = plays[request.param]
    for module, played in play(monkeypatch):
        kind = getattr(module, name)
        make = lambda folder, kind=kind, **arguments: kind(str(folder), **arguments)  # noqa: E731
        yield SimpleNamespace(make=make, played=played, name=request.param, kind=kind)


def scored(sizes: list[int], doc: dict[str, Any] | None = None) -> list[Instance]:
    """Requests with contexts of about so many tokens, four to a context."""
    ends = (" lamp", " the kettle", " 71432", " a b")
    asked = [(TEXT[: size * 3].rstrip(), end) for size in sizes for end in ends]
    return [
        Instance("loglikelihood", OURS if doc is None else doc, pair, i, ("passkey_extrapolate", i, 1))
        for i, pair in enumerate(asked)
    ]


def generated(sizes: list[int]) -> list[Instance]:
    settings = {"until": ["@@@"], "max_gen_toks": 6, "do_sample": False}
    return [
        Instance("generate_until", OURS, (TEXT[: size * 3].rstrip(), dict(settings)), i, ("passkey_extrapolate_generate", i, 1))
        for i, size in enumerate(sizes)
    ]


def longest(model: Any, requests: list[Instance]) -> int:
    return max(len(model.tok_encode("".join(request.args))) for request in requests)


def same(found: list[Any], expected: list[Any]) -> None:
    for (one, greedy), (other, also) in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
        assert greedy == also


ROTARY = ["llama", "llama3", "llama-linear", "llama-yarn", "mistral-window", "qwen2", "gemma3", "gpt_neox", "phi"]


@pytest.mark.parametrize("family", ROTARY)
def test_answers_past_the_configured_length_are_those_of_hf_extrapolate(backend: Any, saved: Any, family: str) -> None:
    folder = saved(family)
    host, model = HFExtrapolate(str(folder), dtype="float32", device="cpu"), backend.make(folder)
    requests = scored([20, 150, 60])
    for each in (host, model):
        each.lift(longest(host, requests) + 6)
    assert longest(host, requests) > 2 * 64  # past what any of these configs claims
    same(model.loglikelihood(requests), host.loglikelihood(requests))
    asked = generated([20, 150])
    assert model.generate_until(asked) == host.generate_until(asked)
    assert len(backend.played.started) == 1


@pytest.mark.parametrize("family", ["llama", "llama3", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "llama3"])
def test_an_extension_is_the_one_of_hf_extrapolate(backend: Any, saved: Any, family: str, method: str) -> None:
    folder = saved(family)
    host = HFExtrapolate(str(folder), dtype="float32", device="cpu", extend=method)
    model = backend.make(folder, extend=method)
    requests = scored([150, 40])
    for each in (host, model):
        each.lift(longest(host, requests))
    expected = host.loglikelihood(requests)
    same(model.loglikelihood(requests), expected)
    plain = HFExtrapolate(str(folder), dtype="float32", device="cpu").loglikelihood(requests)
    assert any(abs(one[0] - other[0]) > 1e-3 for one, other in zip(plain, expected, strict=True))
    info, theirs = model.get_model_info()["override"], host.get_model_info()["override"]
    assert (info["method"], info["factor"]) == (theirs["method"], theirs["factor"])
    assert info["factor"] > 1
    assert info["before"]["rope_parameters"] != next(iter(info["after"].values()))["rope_parameters"]


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_learned_table_ends_as_an_outcome_and_nothing_past_it_is_asked(backend: Any, saved: Any, family: str) -> None:
    folder = saved(family)
    model = backend.make(folder)
    (limit,) = model.length_limits
    assert (limit.outcome, limit.tokens) == ("hard_limit", 64 - backend.kind.room)
    assert "position table" in limit.reason
    with pytest.raises(PromptTooLongError):
        model.lift(limit.tokens + 1)
    with pytest.raises(PromptTooLongError):
        model.loglikelihood(scored([150]))
    assert not backend.played.started
    requests = scored([10])
    same(model.loglikelihood(requests), HFExtrapolate(str(folder), dtype="float32", device="cpu").loglikelihood(requests))


def test_the_users_max_length_is_a_limit_and_never_a_cut(backend: Any, saved: Any) -> None:
    model = backend.make(saved("llama"), max_length=100)
    assert [(limit.tokens, limit.outcome) for limit in model.length_limits] == [(100, "backend_limit")]
    assert model.max_length == 100
    with pytest.raises(PromptTooLongError, match="max_length=100"):
        model.loglikelihood(scored([150]))
    with pytest.raises(PromptTooLongError, match="max_length=100"):
        model.generate_until(generated([150]))
    assert not backend.played.started


def test_one_engine_starts_at_the_first_request_for_the_longest_prompt_of_all_tasks(backend: Any, saved: Any) -> None:
    model = backend.make(saved("llama"))
    assert not backend.played.started
    model.lift(150)
    model.lift(300)
    model.loglikelihood(scored([20]))
    model.loglikelihood(scored([60]))
    (started,) = backend.played.started
    assert started.get("max_model_len", started.get("context_length")) == 300 + backend.kind.room
    assert model.max_length == 300
    model.loglikelihood(scored([320]))  # that no task announced
    assert len(backend.played.started) == 2
    assert backend.played.shut_down == 1


def test_prompts_are_asked_in_the_order_of_their_tokens_and_found_in_the_prefix_cache(backend: Any, saved: Any) -> None:
    folder = saved("llama")
    model = backend.make(folder)
    requests = scored([20, 150, 60])
    shuffled = requests[::2] + requests[1::2]
    host = HFExtrapolate(str(folder), dtype="float32", device="cpu")
    same(model.loglikelihood(shuffled), host.loglikelihood(shuffled))
    asked = backend.played.asked[0]
    assert asked == sorted(asked)
    reading = model.get_model_info()["reading"]
    assert reading["asked"] == sum(map(len, asked))
    assert reading["computed"] < 0.8 * reading["asked"]


def test_the_same_question_twice_is_answered_twice_though_its_answer_is_in_the_cache(backend: Any, saved: Any) -> None:
    folder = saved("llama")
    model, host = backend.make(folder), HFExtrapolate(str(folder), dtype="float32", device="cpu")
    end = TEXT[120:220]
    requests = [Instance("loglikelihood", OURS, (TEXT[:120], end), i, ("passkey_extrapolate", i, 1)) for i in range(3)]
    same(model.loglikelihood(requests), host.loglikelihood(requests))


def test_what_has_no_room_in_memory_is_an_outcome_and_shorter_prompts_are_measured(backend: Any, saved: Any) -> None:
    folder = saved("llama")
    model, host = backend.make(folder), HFExtrapolate(str(folder), dtype="float32", device="cpu")
    backend.played.capacity = 100
    requests = scored([20, 150])
    model.lift(longest(host, requests))
    found = model.loglikelihood(requests)
    same(found[:4], host.loglikelihood(requests[:4]))
    assert all(isinstance(answer, Unmeasured) and answer.outcome == "out_of_memory" for answer in found[4:])
    assert all(len(ids) < 100 for asked in backend.played.asked for ids in asked)
    assert "has memory for" in found[-1].reason
    starts = len(backend.played.started)
    assert all(isinstance(answer, Unmeasured) for answer in model.loglikelihood(requests[4:]))
    assert len(backend.played.started) == starts
    with pytest.raises(ModelError, match="has no score"):
        model.loglikelihood(scored([150], doc={}))


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (RuntimeError("EngineCore died"), "backend_error"),
    ],
)
def test_an_engine_that_fails_over_a_length_is_started_again_for_the_others(
    backend: Any, saved: Any, error: BaseException, outcome: str
) -> None:
    folder = saved("llama")
    model, host = backend.make(folder), HFExtrapolate(str(folder), dtype="float32", device="cpu")
    requests = scored([20, 60, 150])
    limit = len(host.tok_encode(requests[4].args[0])) - 2
    backend.played.crash[limit] = error
    model.lift(longest(host, requests))
    found = model.loglikelihood(requests)
    same(found[:4], host.loglikelihood(requests[:4]))
    assert [answer.outcome for answer in found[4:]] == [outcome] * 8
    assert "failed" in found[-1].reason
    assert len(backend.played.started) > 1


def test_an_engine_with_little_memory_that_fails_is_started_again_with_all_the_memory_has_room_for(
    backend: Any, saved: Any
) -> None:
    folder = saved("llama")
    model, host = backend.make(folder), HFExtrapolate(str(folder), dtype="float32", device="cpu")
    backend.played.capacity = 150
    requests = scored([20, 60, 100, 200])
    backend.played.crash[len(host.tok_encode(requests[8].args[0])) - 2] = RuntimeError("EngineCore died")
    model.lift(longest(host, requests))
    found = model.loglikelihood(requests)
    same(found[:8], host.loglikelihood(requests[:8]))
    assert [answer.outcome for answer in found[8:]] == ["backend_error"] * 4 + ["out_of_memory"] * 4


def test_a_prompt_that_the_engine_cuts_has_no_score(backend: Any, saved: Any) -> None:
    model = backend.make(saved("llama"))
    backend.played.cut = 3
    found = [*model.loglikelihood(scored([20])), *model.generate_until(generated([20]))]
    assert all(isinstance(answer, Unmeasured) and answer.outcome == "backend_limit" for answer in found)


def test_an_engine_that_runs_by_another_config_than_it_was_told_ends_the_run(backend: Any, saved: Any) -> None:
    backend.played.loses_overrides = True
    model = backend.make(saved("llama-yarn"), max_length=100)  # fits the advertised length; only the method would be lost
    model.loglikelihood(scored([20]))
    model = backend.make(saved("llama"), extend="linear", factor=2.0)
    with pytest.raises(ModelError, match="was told"):
        model.loglikelihood(scored([10]))


@pytest.mark.parametrize("family", ["llama-dynamic", "llama-longrope", "phi3-longrope"])
def test_frequencies_that_change_with_each_prompt_are_refused(backend: Any, saved: Any, family: str) -> None:
    with pytest.raises(ModelError, match="hf-extrapolate"):
        backend.make(saved(family))


def test_methods_that_are_more_than_rope_parameters_are_refused_with_those_that_are_not(backend: Any, saved: Any) -> None:
    for method in ("logn", "self-extend", "table-tile", "dynamic"):
        with pytest.raises(ModelError, match=r"linear, ntk, yarn, llama3.*hf-extrapolate"):
            backend.make(saved("llama"), extend=method)
    with pytest.raises(ModelError, match=r"learned|rotary"):
        backend.make(saved("opt"), extend="yarn")
    with pytest.raises(ModelError, match="there is"):
        backend.make(saved("llama"), extend="nothing")
    with pytest.raises(ModelError, match="no method"):
        backend.make(saved("llama"), factor=2)


def test_rolling_windows_are_those_of_lm_evals_class_whatever_other_tasks_asked(backend: Any, saved: Any) -> None:
    folder = saved("llama")
    model = backend.make(folder)
    model.lift(300)
    asked = [Instance("loglikelihood_rolling", {}, (TEXT[:600],), 0, ("wikitext", 0, 1))]
    windows = HFLM(str(folder), dtype="float32", device="cpu", max_length=64 - (2 if backend.name == "vllm" else 1), batch_size=1)
    assert model.loglikelihood_rolling(asked) == pytest.approx(windows.loglikelihood_rolling(asked), abs=1e-3)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "wordpiece"])
def test_texts_are_split_as_hf_extrapolate_splits_them(backend: Any, saved: Any, tmp_path: Path, kind: str) -> None:
    import shutil

    folder = tmp_path / kind  # with a BOS, with an end mark that is left off, and with neither
    shutil.copytree(saved("llama"), folder)
    make_tokenizer(kind).save_pretrained(folder)
    host, model = HFExtrapolate(str(folder), dtype="float32", device="cpu"), backend.make(folder)
    for text in ("a", TEXT[:200], TEXT, "<s>" + TEXT[:50]):
        assert model.tok_encode(text) == host.tok_encode(text)
        assert model.tok_encode(text, add_special_tokens=False) == host.tok_encode(text, add_special_tokens=False)
    assert model.prefix_token_id == host.prefix_token_id
    assert model.eot_token_id == host.eot_token_id
    requests = [*scored([20]), Instance("loglikelihood", OURS, ("", " the lamp"), 9, ("passkey_extrapolate", 9, 1))]
    same(model.loglikelihood(requests), host.loglikelihood(requests))


def test_the_embedded_model_is_found_where_the_engine_can_load_it_and_swept_as_hf_extrapolate_sweeps_it(
    backend: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    found = []
    for model in (backend.make("reference/rope"), HFExtrapolate("reference/rope", dtype="float32", device="cpu", max_length=None)):
        task = load("passkey_extrapolate", lengths=[128, 512], samples=1)
        results = lm_eval.evaluate(lm=model, task_dict={"passkey_extrapolate": task})
        found.append(results["results"]["passkey_extrapolate"])
    assert found[0] == found[1]
    assert all(Path(started.get("model", started.get("model_path"))).is_dir() for started in backend.played.started)


def test_what_was_in_effect_is_read_back_from_the_engine(backend: Any, saved: Any) -> None:
    model = backend.make(saved("gpt_neox"))
    model.lift(200)
    model.loglikelihood(scored([20]))
    info = model.get_model_info()
    after = info["override"]["after"][str(200 + backend.kind.room)]
    assert info["override"]["before"]["max_position_embeddings"] == 64
    assert after["max_position_embeddings"] == 200 + backend.kind.room
    assert after["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert info["engine"]["prefix_caching"] is True
    assert info["engine"]["max_length"] == 200 + backend.kind.room
    assert info["packages"][backend.name] in ("0.32.0", "0.5.23")
    assert info["position_scheme"] == "rotary"


def test_wrong_arguments_say_what_to_do(backend: Any, saved: Any, tmp_path: Path) -> None:
    folder = saved("llama")
    for name in ("trained_length", "max_length"):
        with pytest.raises(ModelError, match=f"{name}: found"):
            backend.make(folder, **{name: 0})
    with pytest.raises(ModelError, match="encoder-decoder"):
        backend.make(saved("bart"))
    with pytest.raises(ModelError, match="config"):
        backend.make(tmp_path / "nothing")
    assert backend.make(folder, trained_length=32).trained_length.source == "user"
    assert backend.make(folder).trained_length.tokens == 64


@given(
    original=st.integers(16, 4096),
    factor=st.floats(1.0, 64.0),
    tokens=st.integers(1, 10**6),
    betas=st.none() | st.tuples(st.floats(8.0, 64.0), st.floats(0.5, 4.0)),
    base=st.sampled_from([1e4, 5e5]),
)
def test_yarns_frequencies_are_the_same_from_a_longer_table(
    original: int, factor: float, tokens: int, betas: Any, base: float
) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    own = {"rope_type": "yarn", "rope_theta": base, "factor": factor, "original_max_position_embeddings": original}
    own |= dict(zip(("beta_fast", "beta_slow"), betas, strict=True)) if betas else {}
    own |= {"truncate": False}  # which would make a difference of the last digit one of a whole dimension
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, max_position_embeddings=original, rope_parameters=own)
    told = engine_config.stretch(config, tokens)
    longer = told.get("rope_parameters", own)
    assert longer["original_max_position_embeddings"] * longer["factor"] >= tokens - 1e-6
    found = []
    for parameters in (own, longer):
        config.rope_parameters = parameters
        found.append(ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"), seq_len=None))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("llama", {"max_position_embeddings"}),
        ("llama3", {"max_position_embeddings"}),  # whose parameters stay whole
        ("gemma3", {"max_position_embeddings"}),
        ("gpt_neox", {"max_position_embeddings"}),
        ("mistral-window", {"max_position_embeddings"}),
        ("llama-yarn", {"max_position_embeddings", "rope_parameters"}),
    ],
)
def test_only_what_the_length_needs_is_overridden(saved: Any, family: str, changed: set[str]) -> None:
    config = engine_config.read_config(str(saved(family)))
    assert set(engine_config.stretch(config, 1000)) == changed
    assert engine_config.stretch(config, 1000)["max_position_embeddings"] == 1000
    assert engine_config.stretch(config, 10) == {}


def test_a_model_with_parts_is_told_in_its_text_part() -> None:
    config = SimpleNamespace(model_type="outer", text_config=SimpleNamespace(model_type="inner", max_position_embeddings=64))
    assert engine_config.stretch(config, 100) == {"text_config": {"max_position_embeddings": 100}}
    assert engine_config.stretch(config, 50) == {}


def test_every_method_of_parameters_alone_is_told(saved: Any) -> None:
    told = [name for name, method in engine_config.METHODS.items() if method.parameters]
    assert told == ["linear", "ntk", "yarn", "llama3"]
    assert list(itertools.islice(told, 1)) == ["linear"]
