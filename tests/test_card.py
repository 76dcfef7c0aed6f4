"""On a CUDA card: nothing but where it is computed changes. Skipped where there is none."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_long
from families import LENGTH
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from test_sharing import APART, COPIED, DECODERS, PAIRS, SAME_AS_HF, longer, prompts, score

from harness_ext.cells import Unmeasured
from harness_ext.models import pieces
from harness_ext.models.forward import Forward
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.self_check import find_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")

CARD = {"device": "cuda", "dtype": "float32"}
EXACT = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Type → how far an output may be from the softmax computed in float64."""


def attend_in_double(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: int) -> torch.Tensor:
    """(rows, heads, tokens, width) of queries after `past` keys, by the definition."""
    groups = query.shape[1] // key.shape[1]
    every_key, every_value = (states.double().repeat_interleave(groups, dim=1) for states in (key, value))
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(past)
    scores = (0.3 * query.double() @ every_key.transpose(-1, -2)).masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, dim=-1) @ every_value


def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def make_module(groups: int) -> torch.nn.Module:
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    return module


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(("tokens", "past"), [(1, 30), (7, 1), (7, 30), (30, 7), (30, 0), (300, 0), (600, 100), (40, 3000)])
@pytest.mark.parametrize("width", [16, 20, 64, 128, 256, 264])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_to_what_is_cached_is_softmax_over_all_keys_up_to_each_querys(
    heads: int, key_heads: int, tokens: int, past: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    query = draw(dtype, 2, heads, tokens, width)
    room = draw(dtype, 2, 2, key_heads, past + tokens + 50, width)  # keys and values are the beginning of a buffer
    key, value = room[:, :, :, : past + tokens]
    found = pieces.attend(make_module(heads // key_heads), query, key, value, None, scaling=0.3)[0].transpose(1, 2)
    torch.testing.assert_close(found.double(), attend_in_double(query, key, value, past), atol=EXACT[dtype], rtol=EXACT[dtype])


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(("tokens", "past"), [(1, 30), (9, 30), (9, 3000), (70, 1)])
@pytest.mark.parametrize("width", [16, 20, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_begin_with_the_same_keys_attend_to_them_as_if_each_had_a_copy(
    heads: int, key_heads: int, tokens: int, past: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    query, own = draw(dtype, 5, heads, tokens, width), draw(dtype, 2, 5, key_heads, tokens, width)
    shared = draw(dtype, 2, 1, key_heads, past, width)
    given = pieces.put_after((shared[0], shared[1]), own[0].clone(), own[1].clone())
    found = pieces.attend(make_module(heads // key_heads), query, *given, None, scaling=0.3)[0].transpose(1, 2)
    key, value = torch.cat([shared.expand(-1, 5, -1, -1, -1), own], dim=3)
    torch.testing.assert_close(found.double(), attend_in_double(query, key, value, past), atol=EXACT[dtype], rtol=EXACT[dtype])


@pytest.mark.parametrize("family", DECODERS)
def test_what_a_family_can_go_on_from_is_what_it_is_on_the_cpu(family: str) -> None:
    model = build_long(family).cuda()
    pieces.install(model)
    forward = Forward(model, torch.device("cuda"))
    found = find_state(forward, LENGTH, 400)
    assert (found.make is None) == (family in APART), found.said
    if found.make is not None:
        assert found.make(0).cuts == (family not in COPIED), found.said
        assert found.make(0).alone == (family not in PAIRS), found.said


@pytest.mark.parametrize("family", SAME_AS_HF)
def test_shared_answers_past_the_trained_length_are_those_of_hf(family: str, saved: Any) -> None:
    folder = str(saved(family, **longer(family)))
    if family in ("llama-dynamic", "phi3-longrope"):  # hf's depend on what it ran before
        alone = HFExtrapolate(pretrained=folder, exact=True, trained_length=LENGTH, **CARD)
        expected = [alone._loglikelihood_tokens([prompt], disable_tqdm=True)[0] for prompt in prompts()]
    else:
        expected = HFLM(pretrained=folder, max_length=2 * LENGTH, **CARD)._loglikelihood_tokens(prompts(), disable_tqdm=True)
    for chunk, batch_size in ((512, 1), (16, 4)):
        model = HFExtrapolate(pretrained=folder, chunk=chunk, batch_size=batch_size, trained_length=LENGTH, **CARD)
        for (likelihood, greedy), (known, known_greedy) in zip(score(model), expected, strict=True):
            assert likelihood == pytest.approx(known, abs=1e-4 * max(1.0, abs(known) / 10))
            assert greedy == known_greedy


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_shares_within_its_rounding(saved: Any, dtype: str) -> None:
    made = {"pretrained": str(saved("llama")), "device": "cuda", "dtype": dtype}
    shared = HFExtrapolate(**made)
    for (likelihood, _), (known, _) in zip(score(shared), score(HFExtrapolate(**made, exact=True)), strict=True):
        assert likelihood == pytest.approx(known, rel=0.03, abs=0.3)
    assert shared._reader.sharing is not None
    assert shared._reader.sharing.make is not None, shared._reader.sharing.said
    assert shared._reader.sharing.make(0).forks


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_next", "mamba2", "gemma3", "falcon-alibi", "mixtral"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_generated_answers_are_those_of_hf(family: str, batch_size: int, saved: Any) -> None:
    made = {"pretrained": str(saved(family, **longer(family))), **CARD}
    hay = "The old farmer carried a box near the river. "
    contexts = [hay * 2, hay * 2 + "The box", hay + "A hat", hay * 2 + "The bag", "A hat"]
    asked = {"until": ["@@@"], "max_gen_toks": 6}
    requests = [Instance("generate_until", {}, (context, asked), 0, ("t", number, 1)) for number, context in enumerate(contexts)]
    found = HFExtrapolate(**made, batch_size=batch_size, trained_length=LENGTH).generate_until(requests, disable_tqdm=True)
    assert found == HFLM(**made, batch_size=1, max_length=2 * LENGTH).generate_until(requests, disable_tqdm=True)


def count_waits(model: HFExtrapolate, asked: Any) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model._loglikelihood_tokens(asked, disable_tqdm=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen)


def test_the_card_is_not_waited_for_with_each_request(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), trained_length=LENGTH, **CARD)
    asked = [(None, [number, *range(5, 90)], [7, 8]) for number in range(3, 103)]
    count_waits(model, asked)  # with the self-check
    few, many = count_waits(model, asked[:10]), count_waits(model, asked)
    assert many == few


def test_layers_on_the_card_and_on_the_cpu_answer_as_in_one_piece(saved: Any) -> None:
    folder = str(saved("llama"))
    places: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), 0)
    spread = HFExtrapolate(pretrained=folder, device_map={**places, "model.layers.1": "cpu"}, trained_length=LENGTH, **CARD)
    assert {weight.device.type for weight in spread.model.parameters()} == {"cuda", "meta"}
    whole = HFExtrapolate(pretrained=folder, trained_length=LENGTH, exact=True, **CARD)
    for found, known in zip(score(spread), score(whole), strict=True):
        assert found == (pytest.approx(known[0], abs=1e-4), known[1])
    assert pieces.is_installed(spread.model)


def test_lengths_that_do_not_fit_on_the_card_are_outcomes_and_the_others_are_measured(saved: Any) -> None:
    wide = {"hidden_size": 64, "num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 256}  # 256 KiB of cache a token
    model = HFExtrapolate(pretrained=str(saved("llama", **wide)), chunk=64, **CARD)
    model._reader.prepare(LENGTH)
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_allocated() + 3 * 2**28
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        asked = [(None, [5 + number, *range(5, 3 + size)], [7]) for size in (100, 600, 6000) for number in range(2)]
        asked = [(key, [token % 500 for token in context], answer) for key, context, answer in asked]
        found = model._loglikelihood_tokens(asked, disable_tqdm=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [isinstance(answer, Unmeasured) and answer.outcome for answer in found] == [False] * 4 + ["out_of_memory"] * 2
    again = model._loglikelihood_tokens(asked[:4], disable_tqdm=True)
    assert [answer[0] for answer in again] == pytest.approx([answer[0] for answer in found[:4]], abs=1e-4)  # type: ignore[index]


def test_a_prompt_takes_its_cache_and_a_chunk_and_not_its_length_times_the_vocabulary(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama", vocab_size=50_000)), chunk=256, **CARD)
    asked = [(None, [token % 500 + 3 for token in range(8_000)], [7])]
    model._loglikelihood_tokens(asked, disable_tqdm=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model._loglikelihood_tokens(asked, disable_tqdm=True)
    taken = torch.cuda.max_memory_allocated() - before
    cache = 8_000 * 2 * 2 * 2 * 8 * 4  # tokens × keys and values × layers × heads × head_dim × bytes
    assert taken < 4 * cache + 32 * 2**20 < 8_000 * 50_000 * 4 / 20


def test_a_sweep_finds_on_the_card_what_it_finds_on_the_cpu(evaluate: Any, tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        model = HFExtrapolate(pretrained="reference/rope", device=device, dtype="float32")
        results = evaluate(model, ["passkey_extrapolate", "niah_sweep_extrapolate"], multiples=[0.5, 1, 2], samples=2)
        found[device] = [results["samples"][task] for task in ("passkey_extrapolate", "niah_sweep_extrapolate")]
        assert results["config"]["reading"]["computed"] < results["config"]["reading"]["asked"]
    for known, seen in zip(*found.values(), strict=True):
        for one, other in zip(known, seen, strict=True):
            for (likelihood, greedy), (same, also) in zip(list_answers(one), list_answers(other), strict=True):
                assert math.isclose(likelihood, same, abs_tol=1e-3)
                assert greedy == also


def list_answers(sample: Any) -> list[Any]:
    return [answer for answers in sample["resps"] for answer in answers]
