"""Weights are shared out among cards so that the longest prompt's cache has room beside them. The cards are made up; their sizes are all that is
asked of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models import huggingface
from transformers import AutoConfig, AutoModelForCausalLM

from harness_ext.models import cards
from harness_ext.models.cards import LARGEST_MULTIPLE, Need, find_longest, find_need, leave_room, share_out
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.inspection import build_without_weights
from harness_ext.sweep.spec import MULTIPLES

GIB = 2**30
EIGHT_B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
"""Llama-3-8B's shapes: 15 GiB of weights, 128 KiB of cache a token."""


def config(**changes: Any) -> Any:
    return AutoConfig.for_model("llama", **{**EIGHT_B, **changes})


@pytest.fixture(scope="module")
def need() -> Need:
    return find_need(build_without_weights(config()).to(torch.bfloat16), 65536, 2048)


def test_what_the_longest_prompt_needs_is_read_off_shapes_alone(need: Need) -> None:
    assert need.cache == 65536 * 2 * 32 * 8 * 128 * 2
    assert need.weights == pytest.approx(15 * GIB, rel=0.01)
    one_chunk_of_activations = 2048 * (4096 + 3 * 14336) * 2
    assert one_chunk_of_activations < need.reading < GIB
    batch = find_need(build_without_weights(config()).to(torch.bfloat16), 65536, 2048, rows=3)
    assert (batch.cache, batch.reading, batch.weights) == (3 * need.cache, 3 * need.reading, need.weights)


@pytest.mark.parametrize("family", ["mamba2", "gpt2", "gemma4", "qwen3_next", "llama-dynamic"])
def test_a_model_without_shapes_to_read_has_the_cache_of_its_config(family: str) -> None:
    import copy

    from families import FAMILIES

    known = FAMILIES[family]
    model = build_without_weights(AutoConfig.for_model(known.model_type, **copy.deepcopy(known.config)))
    assert find_need(model, 64, 16).cache > 0


def fits(need: Need, free: Mapping[int, int], weights: Mapping[Any, int]) -> bool:
    """Whether every card has room: for its weights, for the cache of its layers and of those that are brought to the first, and a forward."""
    on = {card: weights.get(card, 0) for card in free}
    brought = need.weights - sum(on.values())
    caches = {card: need.cache * (size + (brought if card == next(iter(free)) else 0)) / need.weights for card, size in on.items()}
    return all(
        on[card] + caches[card] + need.reading <= free[card] * (1 + 1e-9) + len(free) for card in free if on[card] + caches[card]
    )


@settings(max_examples=300)
@given(
    st.integers(1, 200),
    st.integers(0, 400),
    st.integers(0, 20),
    st.lists(st.integers(1, 200), min_size=1, max_size=8),
    st.integers(0, 500),
)
def test_shares_leave_room_or_say_that_they_cannot(
    weights: int, cache: int, reading: int, sizes: list[int], elsewhere: int
) -> None:
    need = Need(tokens=1000, weights=weights * GIB, cache=cache * GIB, reading=reading * GIB)
    free = {card: size * GIB for card, size in enumerate(sizes)}
    shares = share_out(need, free, elsewhere * GIB)
    taken = {card: min(shares.weights[card], need.weights) for card in free}
    if not shares.said:
        assert sum(taken.values()) >= need.weights
        assert all(taken[card] * (1 + cache / weights) + need.reading <= free[card] + 1 for card in free if taken[card])
    elif "have no room" not in shares.said:
        assert fits(need, free, taken)
        assert shares.weights["cpu"] == elsewhere * GIB


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((24, 24), ""),
        ((12, 12, 12), ""),
        ((11, 11), "go to the CPU or the disk, so that 65536 tokens have"),
        ((4,), "65536 tokens have no room"),
    ],
)
def test_what_transformers_makes_of_the_shares_has_room(
    sizes: tuple[int, ...], says: str, need: Need, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's own placement of the model's layers, by the `max_memory` that it is given."""
    monkeypatch.setattr(cards.machine, "read_free", lambda **_: cards.machine.Free(64 * GIB, "made up"))
    free = {card: size * GIB for card, size in enumerate(sizes)}
    shares = leave_room(config(), {}, dict(free), tokens=65536, chunk=2048, rows=1)
    assert (says in caplog.text) if says else not caplog.text
    model = build_without_weights(config()).to(torch.bfloat16)
    monkeypatch.setattr("accelerate.utils.modeling.get_max_memory", lambda given: given)  # which looks whether there are such cards
    placed = infer_auto_device_map(model, max_memory=shares, no_split_module_classes=["LlamaDecoderLayer"])
    weights: dict[Any, int] = {}
    for name, tensor in model.named_parameters():
        card = next(card for prefix, card in placed.items() if not prefix or name == prefix or name.startswith(f"{prefix}."))
        weights[card] = weights.get(card, 0) + tensor.nbytes
    if "no room" not in says:
        layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
        assert fits(need, {card: size + layer * need.cache // need.weights for card, size in free.items()}, weights)
    if not says:
        assert set(weights) <= set(free)


def test_hf_extrapolate_gives_transformers_the_shares(
    saved: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Up to transformers' border: what it would place, and that a user's own word stands."""
    given: list[dict[str, Any]] = []
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name: str, **options: Any) -> Any:
        given.append({field: options.pop(field, None) for field in ("device_map", "max_memory", "offload_folder")})
        return load(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", staticmethod(from_pretrained))
    monkeypatch.setattr(huggingface, "get_max_memory", lambda: {0: 10**6, 1: 10**6, "cpu": 10**9})
    options = {"pretrained": str(saved("llama")), "device": "cpu", "dtype": "float32", "batch_size": 2}
    with caplog.at_level(logging.INFO):
        HFExtrapolate(**options, device_map="auto", max_length=100)
    weights = find_need(build_without_weights(AutoConfig.from_pretrained(options["pretrained"])).float(), 100, 2048, rows=2)
    assert given[-1]["device_map"] == "auto"
    assert given[-1]["max_memory"] == dict(share_out(weights, {0: 10**6, 1: 10**6}, 0).weights)
    HFExtrapolate(**options, parallelize=True)
    assert (
        given[-1]["max_memory"][0] < share_out(weights, {0: 10**6, 1: 10**6}, 0).weights[0]
    )  # eight times the trained length takes more
    HFExtrapolate(**options, device_map="auto", max_memory_per_gpu=7)
    assert 10**6 not in given[-1]["max_memory"].values()
    HFExtrapolate(**options)
    assert given[-1]["max_memory"] is None


def test_the_longest_prompt_is_the_ladders_unless_a_table_ends_before() -> None:
    assert max(MULTIPLES) == LARGEST_MULTIPLE
    assert find_longest(config(), 8192, lifted=False) == 65536
    learned = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert find_longest(learned, 64, lifted=False) == 64
    assert find_longest(learned, 64, lifted=True) == 512


def test_quantised_weights_are_placed_as_ever_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert leave_room(config(), {"load_in_8bit": True}, {0: 5}, tokens=9, chunk=9, rows=1) == {0: 5}
    assert "no room is left for the cache" in caplog.text
