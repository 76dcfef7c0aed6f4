"""In half precision, too, a model goes on only from what holds all that it has read."""

from __future__ import annotations

import random
import re

import pytest
import torch
from conftest import build, build_long
from families import FAMILIES, LENGTH
from lm_eval.models.huggingface import HFLM
from tokenizers_here import make_tokenizer

from harness_ext.models import pieces, rounding
from harness_ext.models.forward import Forward
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.self_check import find_state

RECURRENT = ("mamba2", "rwkv", "minimax", "zamba2", "nemotron_h", "qwen3_next", "granitemoehybrid")


@pytest.mark.parametrize("family", sorted(name for name, family in FAMILIES.items() if not family.seq2seq))
def test_what_is_rounding_in_bfloat16_is_far_from_what_is_not(family: str) -> None:
    model = build_long(family).bfloat16()
    pieces.install(model)
    said = find_state(Forward(model, torch.device("cpu")), LENGTH, 400).said
    found = [float(times) for times in re.findall(r"forward's by (\S+) times", said)]
    assert all(times < rounding.HALF / 4 or times > 2 * rounding.HALF for times in found), said


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_answers_in_bfloat16_are_as_near_to_those_of_float32_as_hfs_are(family: str) -> None:
    rng = random.Random(0)
    hay = [rng.randrange(3, 500) for _ in range(140)]
    # what prompts share is longer than a chunk
    prompts = [(None, hay[:size], [rng.randrange(3, 500)]) for size in (30, 60, 100, 101, 120, 139)]
    given = {"tokenizer": make_tokenizer("bpe")}

    def score(lm: HFLM) -> list[float]:
        return [total for total, _ in lm._loglikelihood_tokens(prompts, disable_tqdm=True)]

    expected = score(HFLM(pretrained=build(family), max_length=512, **given))
    theirs = score(HFLM(pretrained=build(family).bfloat16(), max_length=512, **given))
    ours = score(HFExtrapolate(pretrained=build(family).bfloat16(), trained_length=LENGTH, chunk=16, **given))
    off, usual = (
        sum(abs(one - other) for one, other in zip(scores, expected, strict=True)) / len(prompts) for scores in (ours, theirs)
    )
    assert off <= 2 * usual + 0.02
