"""The embedded model: small, able within its trained length, degraded past it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import curve

from harness_ext.model_view import load_tokenizer, resolve
from harness_ext.models.hf import HFExtrapolate


def test_the_weights_are_safetensors_of_at_most_two_megabytes() -> None:
    folder = REPOSITORY / "harness_ext" / "models" / "reference" / "rope"
    (weights,) = (path for path in folder.iterdir() if path.suffix not in (".json", ".jinja"))
    assert weights.name == "model.safetensors"
    assert weights.stat().st_size <= 2_000_000


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_its_tokenizer_takes_any_text(text: str) -> None:
    tokenizer = load_tokenizer("reference/rope", {})
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_it_finds_passkeys_within_its_trained_length_and_loses_them_past_it(evaluate: Any) -> None:
    model = HFExtrapolate(pretrained="reference/rope", device="cpu", batch_size="auto")
    assert model.trained_length is not None
    assert (model.trained_length.tokens, model.trained_length.source) == (256, "config.max_position_embeddings")
    results = evaluate(model, ["passkey_extrapolate"], multiples=[0.5, 1, 4, 8])
    scores = curve(results, "passkey_extrapolate")
    assert min(scores[128], scores[256]) >= 0.95
    assert scores[256] - 0.3 > scores[1024] >= scores[2048]
    assert results["max_length"] == 2048


def test_it_answers_by_generation_too(evaluate: Any) -> None:
    model = HFExtrapolate(pretrained="reference/rope", device="cpu", batch_size=8)
    results = evaluate(model, ["passkey_extrapolate_generate"], multiples=[1], samples=2)
    assert curve(results, "passkey_extrapolate_generate")[256] >= 0.8


def test_a_name_that_is_no_embedded_model_is_left_alone() -> None:
    assert resolve("org/model") == "org/model"


@pytest.mark.parametrize("multiple", [0.5, 2])
def test_a_scored_and_a_generated_answer_agree(evaluate: Any, multiple: float) -> None:
    """The greedy match of one forward is what greedy decoding gives."""
    model = HFExtrapolate(pretrained="reference/rope", device="cpu", batch_size=4)
    metadata = {"multiples": [multiple], "samples": 1, "depths": 4}
    scored = evaluate(model, ["passkey_extrapolate"], **metadata)["samples"]["passkey_extrapolate"]
    for sample in scored:
        prompt, answer = sample["arguments"][0]
        ids = model.tok_encode(prompt)
        new = model.model.generate(
            torch.tensor([ids]), max_new_tokens=len(model.tok_encode(prompt + answer)) - len(ids), do_sample=False
        )[0, len(ids) :]
        assert (model.tok_decode(new.tolist()) == answer) == sample["resps"][0][0][1]
