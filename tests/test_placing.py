"""What a model does with tokens at chosen positions: held against transformers' own forward, family by family."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from conftest import build
from families import FAMILIES, LENGTH
from lm_eval.api.instance import Instance

from harness_ext import placement, positions
from harness_ext.errors import ModelError, PromptTooLongError
from harness_ext.models.forward import Forward
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.placing import find_placing
from harness_ext.models.self_check import find_state

CAUSAL = [name for name, family in FAMILIES.items() if not family.seq2seq]
COUNTED_OTHERWISE = {"roformer", "falcon-alibi", "bloom", "mpt", "cpmant", "xlnet"}
PLACELESS = {"mamba", "mamba2", "falcon_mamba", "rwkv", "zamba2", "jamba", "granitemoehybrid", "kimi_linear", "nemotron_h"}
AS_MANY_AS_POSITIONS = {"openai-gpt", "gpt_neo", "reformer"}
PROMPT = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def ask(context: str, answer: str, runs: Any) -> Instance:
    doc = {"prompt_tokens": 0}
    return Instance(request_type="loglikelihood_at", doc=doc, arguments=(context, answer, {"positions": runs}), idx=0)


def read_plainly(lm: Any, context: str, answer: str, runs: Any) -> float:
    """The answer's log-likelihood by one forward of transformers' own, with position_ids."""
    before, after = lm._encode_pair(context, answer)
    ids, at = torch.tensor([before + after]), torch.tensor(placement.list_positions(runs, len(before + after)))[None]
    with torch.no_grad():
        logits = lm.model(ids, attention_mask=torch.ones_like(ids), position_ids=at, use_cache=False).logits
    scores = logits[0, len(before) - 1 : -1].float().log_softmax(-1)
    return float(scores.gather(1, torch.tensor(after)[:, None]).sum())


@pytest.mark.parametrize("name", CAUSAL)
def test_each_family_is_told_by_what_it_does(name: str) -> None:
    model = build(name)
    forward, limit = Forward(model, torch.device("cpu")), positions.read_hard_limit(model.config, model)
    logging.disable(logging.WARNING)
    try:
        make = find_state(forward, LENGTH, LENGTH if limit else LENGTH + 48).make
        found = find_placing(forward, limit, make)
    finally:
        logging.disable(logging.NOTSET)
    expected = "not_admitted" if name in COUNTED_OTHERWISE else "no_positions" if name in PLACELESS else "measured"
    assert found.outcome == expected, found.reason
    assert bool(found.past_end) == (name in AS_MANY_AS_POSITIONS), found.past_end


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt_neox", "gpt2", "opt", "gemma3", "phi", "smollm3", "gptj"])
@pytest.mark.parametrize("exact", [False, True])
def test_placed_prompts_have_the_log_likelihoods_of_one_forward_with_position_ids(saved: Any, name: str, exact: bool) -> None:
    field = FAMILIES[name].length_field
    lm = HFExtrapolate(pretrained=str(saved(name, **{field: 200})), chunk=16, exact=exact, device="cpu")
    near, nearer = len(lm.tok_encode(PROMPT)) - 12, len(lm.tok_encode(PROMPT)) - 5
    runs = [
        [(0, 0, 0, 1, 1)],
        [(0, 0, 0, 1, 1), (near, near + 11, near, 1, 1)],
        [(0, 0, 0, 1, 1), (near, near + 11, near, 1, 1), (nearer, nearer + 14, nearer, 1, 1)],
        [(0, 0, 0, 1, 1), (near, near, near, 1, 2), (nearer, near + 4, nearer, 1, 1)],
        [(0, 7, 0, 1, 1)],
    ]
    answers = lm.loglikelihood_at([ask(PROMPT, " 71432", run) for run in runs])
    found = [answer[0] for answer in answers]
    assert found == pytest.approx([read_plainly(lm, PROMPT, " 71432", run) for run in runs], abs=1e-3)
    assert len({round(value, 2) for value in found[:-1]}) == len(runs) - 1
    relative = "rotary" in FAMILIES[name].schemes or "rotary_table" in FAMILIES[name].schemes
    assert (abs(found[0] - found[-1]) < 1e-2) == relative, "a shift does nothing to a relative scheme, and something to a table"


def test_a_jump_is_not_taken_for_the_end_of_a_packed_sequence(saved: Any) -> None:
    """transformers masks what stands before a jump, where neither a mask nor a cache is given."""
    lm = HFExtrapolate(pretrained=str(saved("llama")), exact=True, device="cpu")
    jump = [(0, 0, 0, 1, 1), (20, 31, 20, 1, 1)]
    other = PROMPT.replace("grass", "glass")
    first, second = lm.loglikelihood_at([ask(text, " 71432", jump) for text in (PROMPT, other)])
    assert abs(first[0] - second[0]) > 1e-3


def test_a_model_that_masks_what_stands_before_a_jump_is_not_admitted(saved: Any) -> None:
    lm = HFExtrapolate(pretrained=str(saved("llama")), device="cpu")
    forward = Forward(lm.model, torch.device("cpu"))
    forward._parameters = {name: kind for name, kind in forward._parameters.items() if name != "attention_mask"}  # type: ignore[assignment]
    found = find_placing(forward, None, None)
    assert found.outcome == "not_admitted"
    assert "packed sequence" in found.reason


def test_a_model_without_position_ids_refuses_to_be_asked(saved: Any) -> None:
    lm = HFExtrapolate(pretrained=str(saved("bloom")), trained_length=LENGTH, device="cpu")
    with pytest.raises(ModelError, match=r"chosen positions.*position_ids.*mask"):
        lm.loglikelihood_at([ask(PROMPT, " 7", [(0, 0, 0, 1, 1)])])


def test_positions_past_a_table_are_refused_before_any_forward_and_more_tokens_than_positions_are_read(saved: Any) -> None:
    lm = HFExtrapolate(pretrained=str(saved("gpt2")), device="cpu")
    with pytest.raises(PromptTooLongError, match="table"):
        lm.loglikelihood_at([ask(PROMPT, " 71432", [(0, LENGTH, 0, 1, 1)])])
    twice, packed = f"{PROMPT} {PROMPT}", [(0, 0, 0, 1, 3)]
    assert len(lm.tok_encode(twice)) > LENGTH
    (answer,) = lm.loglikelihood_at([ask(twice, " 71432", packed)])
    assert answer[0] == pytest.approx(read_plainly(lm, twice, " 71432", packed), abs=1e-3)
