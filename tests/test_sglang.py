"""What is SGLang's own in `sglang-extrapolate`; the rest is in `test_engine`. Where SGLang is installed, the names that are used are held to it."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from engines import GENERATE, SERVER_ARGS, Played, play_sglang
from test_engine import generated, same, scored

from harness_ext.cells import Unmeasured
from harness_ext.errors import ModelError
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.sglang import LONGER, _find_cut, _read_score

REAL = find_spec("sglang") is not None


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Played]]:
    for module, played in play_sglang(monkeypatch):
        yield module.SGLangExtrapolate, played


@pytest.mark.skipif(REAL, reason="SGLang is installed")
def test_without_sglang_one_line_says_what_to_install() -> None:
    command = [sys.executable, "-m", "lm_eval", "--model", "sglang-extrapolate", "--model_args", "pretrained=reference/rope"]
    ran = subprocess.run([*command, "--tasks", "passkey_extrapolate"], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "pip install sglang" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr


def test_the_engine_is_told_the_length_and_its_table_which_lm_eval_keeps_to_itself(sglang: Any, saved: Any) -> None:
    make, played = sglang
    model = make(str(saved("llama")), device="cuda:0")
    model.lift(200)
    model.loglikelihood(scored([20]))
    (started,) = played.started
    assert started["context_length"] == 200 + make.room
    assert json.loads(started["json_model_override_args"]) == {"max_position_embeddings": 200 + make.room}
    assert started["disable_radix_cache"] is False
    assert started["trust_remote_code"] is False  # lm_eval's class says True
    assert started["device"] == "cuda"
    assert played.environment == ["1"]
    assert LONGER not in os.environ


def test_the_longest_prompt_fits_to_the_token(sglang: Any, saved: Any) -> None:
    make, _ = sglang
    folder = str(saved("llama"))
    model, host = make(folder), HFExtrapolate(folder, dtype="float32", device="cpu")
    requests = scored([60])
    model.lift(max(len(model.tok_encode("".join(request.args))) for request in requests))
    same(model.loglikelihood(requests), host.loglikelihood(requests))


def test_nested_and_scaled_parameters_stay_whole(sglang: Any, saved: Any) -> None:
    make, played = sglang
    model = make(str(saved("gemma3")), extend="linear")
    model.lift(256)
    model.loglikelihood(scored([20]))
    told = json.loads(played.started[0]["json_model_override_args"])["rope_parameters"]
    assert told["full_attention"] == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    assert told["sliding_attention"]["rope_type"] == "default"


def test_scored_prompts_read_the_prefix_cache_up_to_their_answer(sglang: Any, saved: Any) -> None:
    make, played = sglang
    folder = str(saved("llama"))
    model, requests = make(folder), scored([60])
    expected = HFExtrapolate(folder, dtype="float32", device="cpu").loglikelihood(requests)
    same(model.loglikelihood(requests), expected)
    same(model.loglikelihood(requests), expected)  # all of it in the cache
    for asked in played.told:
        assert all(0 < start < len(ids) for start, ids in zip(asked["logprob_start_len"], asked["input_ids"], strict=True))
    assert model.get_model_info()["reading"]["computed"] < model.get_model_info()["reading"]["asked"] / 2


def test_the_users_words_for_the_length_are_limits_and_his_overrides_are_laid_over_ours(sglang: Any, saved: Any) -> None:
    make, played = sglang
    for name in ("max_length", "max_model_len", "context_length"):
        assert make(str(saved("llama")), **{name: 90}).length_limits[0].tokens == 90
    model = make(str(saved("mistral-window")), json_model_override_args='{"sliding_window": 8}', context_length=100)
    model.loglikelihood(scored([20]))
    told = json.loads(played.started[0]["json_model_override_args"])
    assert told == {"max_position_embeddings": 100 + make.room, "sliding_window": 8}


def test_arguments_that_would_falsify_a_score_are_refused(sglang: Any, saved: Any) -> None:
    make, _ = sglang
    with pytest.raises(ModelError, match="allow_auto_truncate"):
        make(str(saved("llama")), allow_auto_truncate=True)


@pytest.mark.parametrize("options", [{"extend": "yarn", "attention_factor": 1.2}, {"rope_parameters": {"attention_factor": 1.2}}])
def test_a_scale_of_attention_that_sglang_would_pass_over_is_refused(sglang: Any, saved: Any, options: dict[str, Any]) -> None:
    make, _ = sglang
    with pytest.raises(ModelError, match=r"attention_factor=1\.2"):
        make(str(saved("llama")), **options)
    make(str(saved("llama")), extend="yarn")
    with pytest.raises(ModelError, match="CUDA alone"):
        make(str(saved("llama")), device="cpu")


def test_several_cards_and_another_card_are_passed_on(sglang: Any, saved: Any) -> None:
    make, played = sglang
    model = make(str(saved("llama")), dp_size=2, tp_size=2, device="cuda:3")
    model.generate_until(generated([20]))
    assert {name: played.started[0][name] for name in ("dp_size", "tp_size", "base_gpu_id")} == {
        "dp_size": 2,
        "tp_size": 2,
        "base_gpu_id": 3,
    }
    assert model.get_model_info()["engine"]["data_parallel_size"] == 2


def test_an_answer_to_other_tokens_or_without_a_number_is_no_score() -> None:
    def output(places: list[Any], tops: list[Any], **said: Any) -> dict[str, Any]:
        return {"text": "", "meta_info": {"prompt_tokens": 3, "input_token_logprobs": places, "input_top_logprobs": tops, **said}}

    right = [(None, 1, None), (-0.5, 2, None), (-1.0, 3, None)]
    tops = [None, [(-0.5, 2, None)], [(-0.1, 9, None)]]
    assert _read_score([1, 2, 3], 1, output(right, tops)) == (-1.5, False)
    assert _read_score([1, 2, 3], 1, output([*right[:2], (-1.0, 4, None)], tops)).outcome == "backend_error"
    assert _read_score([1, 2, 3], 1, output([*right[:2], (float("nan"), 3, None)], tops)).outcome == "backend_error"
    assert _read_score([1, 2, 3], 1, output(right, tops, prompt_tokens=2)).outcome == "backend_limit"
    given_up = output(right, tops, finish_reason={"type": "abort", "message": "out of pages"})
    found = _find_cut([1, 2, 3], given_up)
    assert isinstance(found, Unmeasured)
    assert "out of pages" in found.reason


@pytest.mark.skipif(not REAL, reason="SGLang is not installed")
def test_the_names_that_are_used_are_those_of_the_real_sglang() -> None:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

    assert list(inspect.signature(Engine.generate).parameters)[1 : len(GENERATE) + 1] == GENERATE
    assert set(SERVER_ARGS) <= set(inspect.signature(ServerArgs).parameters)
