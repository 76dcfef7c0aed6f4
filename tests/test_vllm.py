"""What is vLLM's own in `vllm-extrapolate`; the rest is in `test_engine`. Where vLLM is installed, the names that are used are held to it."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from engines import Played, SamplingParams, play_vllm
from test_engine import OURS, generated, same, scored

from harness_ext.errors import ModelError
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.vllm import _read_score

REAL = find_spec("vllm") is not None


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Played]]:
    for module, played in play_vllm(monkeypatch):
        yield module.VLLMExtrapolate, played


@pytest.mark.skipif(REAL, reason="vLLM is installed")
def test_without_vllm_one_line_says_what_to_install() -> None:
    command = [sys.executable, "-m", "lm_eval", "--model", "vllm-extrapolate", "--model_args", "pretrained=reference/rope"]
    ran = subprocess.run([*command, "--tasks", "passkey_extrapolate"], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "pip install" in ran.stderr
    assert "vllm" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr


def test_the_length_check_and_the_rope_table_are_lifted_together(vllm: Any, saved: Any) -> None:
    make, played = vllm
    model = make(str(saved("llama")))
    model.lift(200)
    model.loglikelihood(scored([20]))
    (started,) = played.started
    assert started["max_model_len"] == 201
    assert started["hf_overrides"] == {"max_position_embeddings": 201}
    assert started["enable_prefix_caching"] is True
    assert started["load_format"] == "safetensors"
    assert started["trust_remote_code"] is False
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in os.environ


def test_a_short_sweep_overrides_nothing(vllm: Any, saved: Any) -> None:
    make, played = vllm
    model = make(str(saved("llama")))
    model.loglikelihood(scored([20]))
    assert played.started[0]["hf_overrides"] == {}


def test_nested_and_scaled_parameters_stay_whole(vllm: Any, saved: Any) -> None:
    make, played = vllm
    for family in ("gemma3", "llama3"):
        model = make(str(saved(family)), extend="yarn")
        model.lift(200)
        model.loglikelihood(scored([20]))
    nested, flat = (started["hf_overrides"]["rope_parameters"] for started in played.started)
    assert set(nested) == {"full_attention", "sliding_attention"}
    assert nested["full_attention"]["rope_type"] == "yarn"
    assert nested["sliding_attention"]["rope_type"] == "default"
    assert nested["full_attention"]["rope_theta"] == 10000.0
    assert flat["rope_theta"] == 10000.0
    # 201 rows of 64 × (200 / 64) = 200 would be one short
    assert flat["original_max_position_embeddings"] * flat["factor"] >= 201


def test_the_users_rope_parameters_are_merged_into_the_checkpoints(vllm: Any, saved: Any) -> None:
    make, played = vllm
    folder = str(saved("gpt_neox"))
    wanted = {"rope_type": "linear", "factor": 2.0}
    requests = scored([60])
    expected = HFExtrapolate(folder, dtype="float32", device="cpu", rope_parameters=dict(wanted)).loglikelihood(requests)
    for options in ({"rope_parameters": dict(wanted)}, {"hf_overrides": {"rope_parameters": dict(wanted)}}):
        same(make(folder, **options).loglikelihood(requests), expected)
        assert played.started[-1]["hf_overrides"]["rope_parameters"]["partial_rotary_factor"] == 0.25


def test_other_overrides_of_the_user_are_laid_over_ours(vllm: Any, saved: Any) -> None:
    make, played = vllm
    model = make(str(saved("mistral-window")), hf_overrides={"sliding_window": 8}, max_model_len=100)
    assert model.length_limits[0].tokens == 100
    model.loglikelihood(scored([20]))
    assert played.started[0]["hf_overrides"] == {"max_position_embeddings": 101, "sliding_window": 8}
    with pytest.raises(ModelError, match="expected a mapping"):
        make(str(saved("llama")), hf_overrides="x")


def test_scored_prompts_read_the_prefix_cache_unless_their_answer_is_in_it(vllm: Any, saved: Any) -> None:
    make, played = vllm
    folder = str(saved("llama"))
    model, requests = make(folder), scored([60])
    model.loglikelihood(requests)
    assert played.told[0][0].skip_reading_prefix_cache is False
    same(model.loglikelihood(requests), HFExtrapolate(folder, dtype="float32", device="cpu").loglikelihood(requests))
    assert played.told[-1][0].skip_reading_prefix_cache is True


def test_a_place_without_a_number_is_no_score() -> None:
    place = {5: SimpleNamespace(logprob=float("nan"))}
    output = SimpleNamespace(prompt_token_ids=[3, 5], prompt_logprobs=[None, place])
    assert _read_score([3, 5], 1, output).outcome == "backend_error"
    output.prompt_logprobs = [None, {4: SimpleNamespace(logprob=-1.0)}]
    assert _read_score([3, 5], 1, output).outcome == "backend_error"
    output.prompt_logprobs = [None, {5: SimpleNamespace(logprob=-1.0), 4: SimpleNamespace(logprob=-0.5)}]
    assert _read_score([3, 5], 1, output) == (-1.0, False)


def test_where_memory_has_no_room_vllm_finds_what_it_has_room_for(vllm: Any, saved: Any) -> None:
    make, played = vllm
    played.capacity = 100
    model = make(str(saved("llama")))
    model.lift(300)
    model.loglikelihood(scored([20]))
    assert [started["max_model_len"] for started in played.started] == [301, -1]
    assert model.get_model_info()["engine"]["max_length"] == 100
    played.capacity = 0  # nor for one token
    with pytest.raises(ModelError, match="neither"):
        make(str(saved("llama"))).loglikelihood(scored([20]))


def test_replicas_are_told_what_one_engine_is_told(vllm: Any, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.machinery import ModuleSpec

    make, played = vllm
    ray = ModuleType("ray")
    ray.__spec__ = ModuleSpec("ray", None)
    replica = lambda call: SimpleNamespace(remote=call)  # noqa: E731
    vars(ray).update(remote=lambda **_: replica, get=lambda found: found, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    folder = str(saved("llama"))
    model, host = make(folder, data_parallel_size=2), HFExtrapolate(folder, dtype="float32", device="cpu")
    requests = scored([20, 150])
    model.lift(300)
    same(model.loglikelihood(requests), host.loglikelihood(requests))
    assert model.generate_until(generated([20, 60])) == host.generate_until(generated([20, 60]))
    assert len(played.started) >= 2
    assert all(started["max_model_len"] == 301 for started in played.started)
    assert all(started["hf_overrides"] == {"max_position_embeddings": 301} for started in played.started)
    assert model.get_model_info()["engine"]["data_parallel_size"] == 2


def test_what_vllm_cannot_run_is_said_before_any_prompt_is_built(vllm: Any, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make, _ = vllm

    def fail(self: Any) -> Any:
        raise ValueError("Model architectures ['X'] are not supported for now.\nmore")

    monkeypatch.setattr(sys.modules["vllm.engine.arg_utils"].EngineArgs, "create_model_config", fail)
    with pytest.raises(ModelError, match=r"vLLM cannot run .*not supported for now.$"):
        make(str(saved("llama")))


def test_stop_texts_end_an_answer_and_sampling_arguments_arrive(vllm: Any, saved: Any) -> None:
    make, played = vllm
    model = make(str(saved("llama")))
    (request,) = generated([20])
    (whole,) = model.generate_until([request])
    request.arguments[1]["until"] = [whole[2:4]]
    assert model.generate_until([request]) == [whole[:2]]
    assert played.told[-1][0].temperature == 0
    assert played.told[-1][0].max_tokens == 6
    assert request.doc is OURS


@pytest.mark.skipif(not REAL, reason="vLLM is not installed")
def test_the_names_that_are_used_are_those_of_the_real_vllm() -> None:
    from vllm import LLM
    from vllm import SamplingParams as Real
    from vllm.engine.arg_utils import EngineArgs

    used = set(vars(SamplingParams())) & set(inspect.signature(SamplingParams).parameters)
    assert used <= set(inspect.signature(Real).parameters) | set(Real.__struct_fields__)
    fields = set(inspect.signature(EngineArgs).parameters)
    assert {"max_model_len", "hf_overrides", "enable_prefix_caching", "load_format"} <= fields
    assert {"sampling_params", "use_tqdm", "lora_request"} <= set(inspect.signature(LLM.generate).parameters)
