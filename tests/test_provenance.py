"""What a run says it was made with is read from what is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build
from tokenizers_here import make_tokenizer

from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.provenance import hash_vocabulary, hash_weights


def test_weights_that_are_stored_otherwise_have_the_same_fingerprint_and_other_weights_another(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = build("llama")
    known = hash_weights(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hash_weights(loaded) == known
    with torch.no_grad():
        next(loaded.parameters()).mul_(1.01)
    assert hash_weights(loaded) != known


def test_weights_that_are_not_at_hand_have_no_fingerprint() -> None:
    assert hash_weights(build("llama").to("meta")) == ""


def test_a_results_file_says_what_the_run_was_made_with(saved: Callable[..., Path], evaluate: Callable[..., Any]) -> None:
    lm = HFExtrapolate(str(saved("gpt2", n_positions=256)), device="cpu", trained_length=20)
    config = evaluate(lm, ["passkey_extrapolate"], limit=2, lengths=[200])["config"]
    assert (config["model_type"], config["position_scheme"]) == ("gpt2", "learned")
    assert config["config_trained_length"]["tokens"] == config["hard_limit"] == lm.model.config.n_positions
    assert config["hardware"]["device"] == "cpu"
    assert config["hardware"]["memory_bytes"] > 2**30
    assert config["packages"]["torch"] == torch.__version__.partition("+")[0] or config["packages"]["torch"] == torch.__version__
    assert 0 < config["reading"]["seconds"] < 600


@pytest.mark.parametrize("family", ["llama", "mamba", "bloom"])
def test_every_family_has_a_fingerprint(family: str) -> None:
    assert len(hash_weights(build(family))) == 64


def test_a_vocabularys_hash_tells_apart_which_tokens_are_special() -> None:
    plain, special = (copy.deepcopy(make_tokenizer("bpe")) for _ in range(2))
    special.add_special_tokens({"additional_special_tokens": ["Ġnear"]})
    assert plain.get_vocab() == special.get_vocab()
    assert hash_vocabulary(plain) == hash_vocabulary(make_tokenizer("bpe"))
    assert hash_vocabulary(plain) != hash_vocabulary(special)
