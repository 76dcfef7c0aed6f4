"""A row of a batch is answered as it is alone, however long the others are; where it would not be, it is not put beside them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import build, build_long
from families import LENGTH
from lm_eval.api.instance import Instance
from test_sharing import DECODERS, longer, prompts

from harness_ext.models import foresight, machine
from harness_ext.models.batch_check import BatchChecks
from harness_ext.models.forward import Forward
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.prefix_tree import Batch
from harness_ext.models.rounding import draw
from harness_ext.models.self_check import find_state
from harness_ext.models.state import Cuttable

SEEN_ON_THE_RIGHT = {"cpmant", "reformer", "xlnet"}
"""Families whose logits depend on tokens that come after."""
MIXED = {"reformer", "rwkv"}
"""Families whose rows are not answered as they are alone, even beside others of their length."""
SEEN_ON_THE_LEFT = {"minimax", "recurrent_gemma", "xlnet"}
"""Families that read the padding before a prompt, mask or no mask."""
COUNTED = {"roformer"}
"""Families that count positions from the cache, padding included, where they go on from it."""
WORDS = "the a river stone bird walks slowly under bright old tree and we saw many more of them near town where night fell".split()


def list_contexts() -> list[str]:
    """Beginnings that branch off one another, of many lengths, one of them twice."""
    rng = random.Random(3)
    hay = [rng.choice(WORDS) for _ in range(40)]
    places = [rng.randrange(3, 28) for _ in range(9)]
    branches = [[*hay[:place], rng.choice(WORDS), *hay[place : rng.randrange(place, 34)]] for place in places]
    return [" ".join(words) for words in [*branches, hay[:30], hay[:30], hay[:31], [*hay[:29], "river"], ["bird"]]]


def ask(budget: int = 6) -> list[Instance]:
    asked = {"until": ["@@@"], "max_gen_toks": budget}
    return [Instance("generate_until", {}, (context, asked), 0, ("t", number, 1)) for number, context in enumerate(list_contexts())]


@pytest.mark.parametrize("family", DECODERS)
def test_what_padding_does_to_a_family_is_found_out(family: str) -> None:
    model = build_long(family)
    forward = Forward(model, torch.device("cpu"))
    checks, made, asked = BatchChecks(forward), find_state(forward, LENGTH, 40).make, Batch(rows=4)
    equal, one = Batch(rows=4, equal=True), Batch()
    assert checks.limit("read", asked, 40) == (equal if family in SEEN_ON_THE_RIGHT else asked)
    assert made is None or family not in SEEN_ON_THE_RIGHT  # so it need not be asked of those that can be read in chunks
    assert checks.limit("answered", asked, 40) == (one if family in MIXED else equal if family in SEEN_ON_THE_LEFT else asked)
    if made is not None and made(0).joins and checks.generates(made, 40):
        assert checks.limit("gone on from", asked, 40, made) == (equal if family in COUNTED else asked)


@pytest.mark.parametrize("options", [{}, {"exact": True}], ids=["shared", "exact"])
@pytest.mark.parametrize("family", ["llama", "gpt2", *sorted(SEEN_ON_THE_RIGHT)])
def test_a_scored_row_is_what_it_is_alone(family: str, options: dict[str, Any], saved: Any) -> None:
    given = {"pretrained": str(saved(family, **longer(family))), "trained_length": LENGTH, "device": "cpu", "dtype": "float32"}
    alone = HFExtrapolate(**given, exact=True)._loglikelihood_tokens(prompts(), disable_tqdm=True)
    for batch_size in (4, "auto"):
        found = HFExtrapolate(**given, **options, batch_size=batch_size)._loglikelihood_tokens(prompts(), disable_tqdm=True)
        assert [answer[1] for answer in found] == [answer[1] for answer in alone]
        assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in alone], abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"exact": True}], ids=["shared", "exact"])
@pytest.mark.parametrize(
    "family",
    [
        *(
            "llama",
            "mistral-window",
            "gemma3n",
            "gpt2",
            "bloom",
            "mpt",
            "phi",
            "deepseek_v3",
            "qwen3_next",
            "mamba2",
            "llama-dynamic",
        ),
        *sorted(SEEN_ON_THE_LEFT | MIXED | COUNTED),
    ],
)
def test_a_generated_answer_is_what_it_is_alone(family: str, options: dict[str, Any], saved: Any) -> None:
    given = {"pretrained": str(saved(family, **longer(family))), "trained_length": LENGTH, "device": "cpu", "dtype": "float32"}
    whole = HFExtrapolate(**given, exact=True)
    alone = [whole.generate_until([request], disable_tqdm=True)[0] for request in ask()]
    for batch_size in (3, 16):
        assert HFExtrapolate(**given, **options, batch_size=batch_size).generate_until(ask(), disable_tqdm=True) == alone


def count_forwards(lm: HFExtrapolate) -> list[tuple[int, int]]:
    """Rows and tokens of each later forward."""
    shapes: list[tuple[int, int]] = []
    lm.model.get_input_embeddings().register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    return shapes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_branches_are_answered_together_a_token_of_each_at_a_time(family: str, saved: Any) -> None:
    given = {"pretrained": str(saved(family, **longer(family))), "trained_length": LENGTH, "device": "cpu", "dtype": "float32"}
    lm = HFExtrapolate(**given, batch_size=16)
    lm.generate_until(ask(), disable_tqdm=True)  # with the checks
    before, shapes = lm._reader.computed, count_forwards(lm)
    lm.generate_until(ask(), disable_tqdm=True)
    contexts = {tuple(lm.tok_encode(context)) for context in list_contexts()}
    beginnings = {context[: end + 1] for context in contexts for end in range(len(context) - 1)}
    steps = [(rows, tokens) for rows, tokens in shapes if rows == len(contexts)]
    assert steps == [(len(contexts), 1)] * 6
    assert len(beginnings) + len(contexts) <= lm._reader.computed - before < 1.2 * (len(beginnings) + len(contexts))
    read = sum(rows * tokens for rows, tokens in shapes) - sum(rows for rows, _ in steps)
    assert len(beginnings) <= read < 1.5 * len(beginnings)  # some branches are read together, padded


def test_prompts_that_begin_alike_for_a_few_tokens_are_scored_in_full_batches(saved: Any) -> None:
    given = {"pretrained": str(saved("llama")), "trained_length": LENGTH, "device": "cpu", "dtype": "float32"}
    rng = random.Random(0)
    asked = [(None, [2, *[30 + number % 5] * 3, *(rng.randrange(40, 500) for _ in range(9))], [7]) for number in range(16)]
    alone = HFExtrapolate(**given, exact=True)._loglikelihood_tokens(asked, disable_tqdm=True)
    lm = HFExtrapolate(**given, batch_size=8)
    lm._loglikelihood_tokens(asked, disable_tqdm=True)
    shapes = count_forwards(lm)
    found = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    assert shapes == [(8, 13)] * 2
    assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in alone], abs=1e-4)


def test_no_more_rows_are_held_at_once_than_asked_for(saved: Any) -> None:
    lm = HFExtrapolate(pretrained=str(saved("llama")), trained_length=LENGTH, device="cpu", dtype="float32", batch_size=3)
    lm.generate_until(ask(), disable_tqdm=True)
    shapes = count_forwards(lm)
    lm.generate_until(ask(), disable_tqdm=True)
    assert max(rows for rows, _ in shapes) == 3
    assert sum(rows for rows, tokens in shapes if tokens == 1 and rows > 1) >= 6 * 9


def test_a_batch_that_does_not_fit_is_answered_in_halves_and_the_answers_are_the_same(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"pretrained": str(saved("llama")), "trained_length": LENGTH, "device": "cpu", "dtype": "float32"}
    alone = HFExtrapolate(**given).generate_until(ask(), disable_tqdm=True)
    lm, tried = HFExtrapolate(**given, batch_size=8), list[int]()
    generate = lm.model.generate

    def limited(tokens: Any, **options: Any) -> Any:
        tried.append(len(tokens))
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(tokens, **options)

    lm._reader.prepare(40)
    reader = lm._reader
    assert reader.sharing is not None
    assert reader.sharing.make is not None
    assert reader.checks.limit("gone on from", Batch(rows=8), 40, reader.sharing.make) == Batch(rows=8)
    monkeypatch.setattr(lm.model, "generate", lambda input_ids, **options: limited(input_ids, **options))
    assert lm.generate_until(ask(), disable_tqdm=True) == alone
    assert max(tried) == 8
    assert lm._memory.too_large > 3 * 30


def test_an_interrupted_batch_is_answered_again_as_a_whole(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"pretrained": str(saved("llama")), "trained_length": LENGTH, "device": "cpu", "dtype": "float32", "batch_size": 4}
    known = HFExtrapolate(**given).generate_until(ask(), disable_tqdm=True)
    lm, calls = HFExtrapolate(**given), list[int]()
    own = HFExtrapolate._model_generate

    def stop(self: Any, context: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(context))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(self, context, *args, **options)

    monkeypatch.setattr(HFExtrapolate, "_model_generate", stop)
    with pytest.raises(KeyboardInterrupt), lm.evaluating():
        lm.generate_until(ask(), disable_tqdm=True)
    monkeypatch.setattr(HFExtrapolate, "_model_generate", own)
    again = HFExtrapolate(**given)
    with again.evaluating():
        shapes = count_forwards(again)
        assert again.generate_until(ask(), disable_tqdm=True) == known
    assert again._reader.resumed >= sum(calls[:2])
    assert sum(rows for rows, tokens in shapes if tokens == 1 and rows > 2) < 6 * len(known)


def test_rows_put_together_hold_what_their_own_states_held_at_their_right_end() -> None:
    forward = Forward(build("llama"), torch.device("cpu"))
    states, lengths = [], (9, 5, 7)
    for seed, length in enumerate(lengths):
        states.append(Cuttable(20))
        with torch.inference_mode():
            forward(draw(forward, length + 2, seed=seed), states[-1], ())
    joined = states[0].joined(3, 9, 15)
    with torch.inference_mode():
        for row, (state, length) in enumerate(zip(states, lengths, strict=True)):
            joined.put(row, state, length)
    for number, layer in enumerate(joined.cache.layers):
        assert layer.keys.shape[2] == layer.values.shape[2] == 9
        assert layer.buffers[0].shape[2] == 15
        for row, (state, length) in enumerate(zip(states, lengths, strict=True)):
            own = state.cache.layers[number]
            assert torch.equal(layer.keys[row, :, 9 - length :], own.keys[0, :, :length])
            assert torch.equal(layer.values[row, :, 9 - length :], own.values[0, :, :length])
            assert not layer.keys[row, :, : 9 - length].any()


def test_a_tokenizer_that_makes_other_tokens_in_a_batch_gets_its_prompts_answered_whole(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm_eval looks at a batch's first text to decide on BOS for all of it."""
    given = {"pretrained": str(saved("llama")), "trained_length": LENGTH, "device": "cpu", "dtype": "float32"}
    lm = HFExtrapolate(**given, batch_size=8)
    encode = lm.tok_batch_encode

    def other(strings: list[str], **options: Any) -> Any:
        ids, mask = encode(strings, **options)
        return (torch.where(ids == ids[0, -1], 7, ids), mask) if len(strings) > 1 else (ids, mask)

    monkeypatch.setattr(lm, "tok_batch_encode", other)
    theirs = HFExtrapolate(**given, exact=True, batch_size=8)
    monkeypatch.setattr(theirs, "tok_batch_encode", other)
    requests = ask()[:5]
    assert lm.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)


def test_a_row_that_has_ended_says_nothing_more_while_others_go_on(saved: Any) -> None:
    """Where the tokenizer's EOS is not among the model's, HFLM ends a batch when all of its rows have come to it."""
    given = {"pretrained": str(saved("llama")), "trained_length": LENGTH, "device": "cpu", "dtype": "float32"}
    lms = [HFExtrapolate(**given, batch_size=batch_size) for batch_size in (1, 16)]
    ids, mask = lms[0].tok_batch_encode([list_contexts()[0]])
    said = lms[0].model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)[0, -1].item()
    answers = []
    for lm in lms:
        lm.model.generation_config.eos_token_id = None
        lm.tokenizer.add_special_tokens({"eos_token": lm.tokenizer.convert_ids_to_tokens(said)})  # so that decoding drops it
        answers.append(lm.generate_until(ask(), disable_tqdm=True))
    assert answers[0] == answers[1]
    assert len({len(lms[0].tok_encode(answer)) for answer in answers[0]}) > 1


@pytest.mark.parametrize(("free", "rows"), [(7, 3), (100, 8), (0.1, 1)])
def test_a_batch_that_a_cpu_holds_at_once_takes_half_of_what_is_free_at_most(
    free: float, rows: int, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux refuses nothing: a batch that is too large ends the process."""
    lm = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32")
    tokens = 1000
    each = 2 * 2 * 2 * 8 * 4 * tokens  # keys and values, layers, heads, width, bytes
    monkeypatch.setattr(foresight.machine, "read_free", lambda **_: machine.Free(int(free * each), "what is free, here"))
    assert foresight.limit_rows(lm._reader, tokens, 8) == rows
    tried = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32", try_all=True)
    assert foresight.limit_rows(tried._reader, tokens, 8) == 8
