"""The arithmetic of docs/scale.md, held to operations that are counted."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from conftest import REPOSITORY
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", REPOSITORY / "docs" / "scale.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tokens", [64, 512])
def test_a_prompt_takes_the_operations_that_torch_counts(tokens: int, scale: ModuleType) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    config._attn_implementation = "eager"  # whose products are counted, the masked half too
    model = LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long))
    parameters = sum(parameter.numel() for parameter in model.parameters()) - model.get_input_embeddings().weight.numel()
    shape = scale.Model("tiny", parameters, 3, 64, 2 * 2 * 16, 1)
    assert shape.read(tokens) + 2 * shape.attend(0, tokens) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_prompt_read_in_two_pieces_takes_what_it_takes_in_one(scale: ModuleType) -> None:
    for model in scale.MODELS:
        assert model.compute(0, 300) + model.compute(300, 1000) == pytest.approx(model.compute(0, 1000))


def test_the_cache_is_what_a_model_keeps_of_its_tokens(scale: ModuleType) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    kept = LlamaForCausalLM(config).bfloat16()(torch.zeros(1, 100, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    assert scale.Model("tiny", 0, 3, 64, 2 * 2 * 16, 1).cache(100) == held


def test_the_thousand_are_a_thousand_and_sharing_never_costs(scale: ModuleType) -> None:
    assert sum(model.count for model in scale.MODELS) == 1000
    assert all(sweep.compute(model) <= sweep.compute(model, shared=False) for sweep in scale.SWEEPS for model in scale.MODELS)
