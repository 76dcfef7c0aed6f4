"""What is seen of a model's attention is what the model computes, changes no answer, and is said of no model whose attention is not seen."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build
from families import FAMILIES, LENGTH
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from scripted import Scripted
from tokenizers_here import make_tokenizer

from harness_ext.errors import TaskFileError
from harness_ext.models import watching
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.watching import SPANS, Asked, assign
from harness_ext.placement import join, list_positions
from harness_ext.results.attention import choose_heads, draw_attention, read_attention

SEEN = (
    *("llama", "mistral-window", "qwen2", "gemma2", "gemma3", "gpt2", "opt", "phi", "gpt_oss", "smollm3", "deepseek_v3"),
    *("gpt_neox", "llama-longrope", "jamba", "qwen3_next"),
)
UNSEEN = ("gpt_neo", "bloom", "falcon-alibi", "gptj", "mamba")
CLOSE = 5e-6
"""Of a share, and of an entropy in nats; float32."""
Prompt = tuple[list[int], list[int], tuple[int, int], int]
"""Context, answer, the needle's span and where the question begins."""


def longer(family: str) -> dict[str, Any]:
    known = FAMILIES[family]
    return {known.length_field: 2 * LENGTH} if known.hard and known.length_field else {}


def prompts() -> list[Prompt]:
    """Past the trained length: they share a haystack up to their needle, and two of them up to the answer."""
    rng = random.Random(0)

    def draw(count: int) -> list[int]:
        return [rng.randrange(3, 500) for _ in range(count)]

    hay, made = draw(LENGTH - 4), []
    for depth in (0, 10, 30, 30, 50):
        needle = draw(5)
        made += [(hay[:depth] + needle + hay[depth:] + draw(6), draw(2), (depth, depth + 5), LENGTH + 1) for _ in range(2)]
    return [*made, (made[0][0], draw(3), made[0][2], made[0][3])]


def watched(model: Any, given: list[Prompt], runs: Any = None, **options: Any) -> tuple[Any, list[Any]]:
    """What was seen, each prompt a cell of its own, and the answers."""
    known = {"device": "cpu", "tokenizer": make_tokenizer("bpe"), "trained_length": LENGTH, "chunk": 16, "batch_size": 4}
    lm = HFExtrapolate(model, **{**known, **options})
    lm._watcher.asked = [Asked(task="t", arm="long", length=i, needle=(p[2],), question=p[3]) for i, p in enumerate(given)]
    sequences = [[*context, *answer] for context, answer, *_ in given]
    spans = [len(sequence) for sequence in sequences]
    if runs:
        placed = [list_positions(runs, len(sequence)) for sequence in sequences]
        spans = [int(positions.max()) + 1 for positions in placed]
        sequences = [join(*pair).tolist() for pair in zip(sequences, placed, strict=True)]
    answers = lm._score(sequences, [len(context) for context, *_ in given], spans, "test", disable_tqdm=True)
    return lm._watcher.seen, answers


def expect(model: Any, prompt: Prompt, runs: Any = None) -> list[torch.Tensor]:
    """Of each layer (heads, spans and entropy), from transformers' own attention matrices."""
    context, _, needle, question = prompt
    options = {"position_ids": torch.from_numpy(list_positions(runs, len(context)))[None]} if runs else {}
    options |= {"attention_mask": torch.ones(1, len(context), dtype=torch.long)} if runs else {}
    with torch.inference_mode():
        found = model(torch.tensor([context]), output_attentions=True, use_cache=False, **options).attentions
    which = assign(len(context), [needle], question)
    rows = [layer[0, :, -1].double() for layer in found if layer is not None]
    return [
        torch.stack([*(row[:, which == span].sum(-1) for span in range(len(SPANS))), torch.special.entr(row).sum(-1)], -1)
        for row in rows
    ]


def differ(model: Any, seen: Any, runs: Any = None) -> float:
    """The largest difference of what was seen from transformers' own."""
    assert not seen.why_not
    model.set_attn_implementation("eager")
    worst = 0.0
    for index, prompt in enumerate(prompts()):
        cell, layers = seen.cells["t", "long", index], expect(model, prompt, runs)
        assert cell.prompts == cell.asked == 1
        assert len(layers) == len(cell.layers) == len(seen.layers)
        worst = max(worst, *(float((own - layer).abs().max()) for own, layer in zip(cell.layers, layers, strict=True)))
    return worst


@pytest.mark.parametrize("family", SEEN)
def test_rows_are_those_of_transformers_own_matrices_in_chunks_and_batches(family: str) -> None:
    model = build(family, **longer(family))
    seen, _ = watched(model, prompts())
    assert differ(model, seen) < CLOSE


@pytest.mark.parametrize(("chunk", "batch_size", "exact"), [(512, 1, False), (7, 3, False), (512, 4, True)])
def test_how_prompts_are_read_makes_no_difference(chunk: int, batch_size: int, exact: bool) -> None:
    model = build("llama")
    seen, _ = watched(model, prompts(), chunk=chunk, batch_size=batch_size, exact=exact)
    assert differ(model, seen) < CLOSE


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "phi"])
@pytest.mark.parametrize("runs", [[(0, 0, 0, 1, 1), (20, 35, 20, 1, 1)], [(0, 0, 0, 1, 1), (20, 20, 20, 1, 2), (60, 40, 60, 1, 1)]])
def test_rows_at_chosen_positions_are_transformers_own(family: str, runs: Any) -> None:
    model = build(family, **longer(family))
    seen, _ = watched(model, prompts(), runs)
    assert differ(model, seen, runs) < CLOSE


@pytest.mark.parametrize("family", UNSEEN)
def test_of_a_family_that_is_not_seen_the_reason_is_said_and_no_number(family: str) -> None:
    seen, _ = watched(build(family, **longer(family)), prompts()[:3])
    said = watching.describe([seen])["attention"]
    assert said["outcome"] == "not_seen"
    assert "attention" in said["reason"]
    assert "cells" not in said


def test_a_row_that_does_not_give_what_the_attention_put_out_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family with something in its scores that is not known here."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from harness_ext.models import pieces

    def change(attend: Any) -> Any:
        return lambda m, q, k, v, mask, **rest: attend(m, q * 1.05, k, v, mask, **rest)

    monkeypatch.setattr(pieces, "attend", change(pieces.attend))
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", change(sdpa_attention_forward))
    seen, _ = watched(build("llama"), prompts()[:3])
    assert "is not what softmax(q·Kᵀ) gives" in seen.why_not


@pytest.mark.parametrize(("method", "is_seen"), [("temperature", True), ("yarn", True), ("self-extend", False)])
def test_an_extension_is_seen_as_it_attends_or_not_at_all(method: str, is_seen: bool) -> None:
    """Temperature turns scores up in front of the model's attention; self-extend puts its own in place."""
    options = {"temperature": 1.3} if method == "temperature" else {"factor": 2}
    plain, _ = watched(build("llama"), prompts()[:3])
    seen, _ = watched(build("llama"), prompts()[:3], extend=method, max_length=2 * LENGTH, **options)
    assert bool(seen.why_not) != is_seen
    if is_seen:
        place = ("t", "long", 0)
        assert float((seen.cells[place].layers[0] - plain.cells[place].layers[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2", "jamba"])
def test_watching_changes_no_answer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, answers = watched(build(family), prompts())
    assert not seen.why_not
    monkeypatch.setattr(watching.Watcher, "watch", lambda *_: None)
    assert watched(build(family), prompts())[1] == answers


@given(st.integers(1, 200), st.data())
def test_each_token_is_in_one_span(tokens: int, data: Any) -> None:
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, tokens)] * 2)))
    question = data.draw(st.integers(stop, tokens))
    counts = torch.bincount(assign(tokens, [(start, stop)], question), minlength=4).tolist()
    assert sum(counts) == tokens
    assert counts[1] == stop - start


def test_means_over_processes_are_those_of_one() -> None:
    seen, _ = watched(build("llama"), prompts())
    parts = [
        watching.Seen(layers=seen.layers, cells=dict(half))
        for half in (list(seen.cells.items())[::2], list(seen.cells.items())[1::2])
    ]
    assert watching.describe(parts) == watching.describe([seen])


def test_a_request_that_a_process_is_given_again_counts_once() -> None:
    lm = HFExtrapolate(build("llama"), tokenizer=make_tokenizer("bpe"), device="cpu", trained_length=LENGTH)
    record = {"watch": {"arm": "long", "length": 9, "needle": [[2, 4]], "question": 6}}
    one = Instance("loglikelihood", record, ("It is seven of all that there was to be seen", " seven"), 0, metadata=("t", 0, 1))
    with contextlib.suppress(KeyboardInterrupt), lm.evaluating():
        lm.loglikelihood([one, one], disable_tqdm=True)
        (cell,) = lm.get_model_info()["attention"]["cells"]
        raise KeyboardInterrupt
    assert (cell["asked"], cell["prompts"]) == (1, 1)
    with lm.evaluating():
        lm.loglikelihood([one, one], disable_tqdm=True)
        (cell,) = lm.get_model_info()["attention"]["cells"]
    assert (cell["asked"], cell["prompts"]) == (1, 0), "what an interrupted run has left is not computed again"


SMALL = {"multiples": [1, 2], "depths": 2, "samples": 1}


@pytest.mark.parametrize("name", ["rope", "nope", "alibi", "learned", "relative", "transformer-xl", "sinusoidal"])
def test_reference_models_are_seen_and_all_attention_goes_somewhere(name: str, evaluate: Any) -> None:
    found = evaluate(HFExtrapolate(f"reference/{name}", device="cpu"), ["extrapolate_why"], **SMALL)["config"]["attention"]
    assert found["outcome"] == "measured", found["reason"]
    assert {"long"} < {cell["arm"] for cell in found["cells"]}
    for cell in found["cells"]:
        assert cell["prompts"] == cell["asked"] == 2
        for layer in range(2):
            shares = [[float(share) for share in cell[span][layer].split()] for span in SPANS]
            sums = [sum(head) for head in zip(*shares, strict=True)]
            assert (
                all(total == pytest.approx(1, abs=4e-4) for total in sums) or name == "transformer-xl"
            )  # reads what it carries on


def shares_of(evaluate: Any, model: str, span: str = "needle", **metadata: Any) -> dict[tuple[str, int], list[str]]:
    """(Arm, length) → the heads' shares, a string a layer."""
    found = evaluate(HFExtrapolate(f"reference/{model}", device="cpu"), ["extrapolate_why"], samples=1, **metadata)
    return {(cell["arm"], cell["length"]): cell[span] for cell in found["config"]["attention"]["cells"]}


def test_to_clipped_distances_a_stretched_prompt_looks_the_same_however_far(evaluate: Any) -> None:
    found = shares_of(evaluate, "relative", arms=["stretched"], multiples=[2, 8], depths=[0.5])
    assert found["stretched", 512] == found["stretched", 2048]


def test_what_is_out_of_reach_of_segments_is_not_attended_to(evaluate: Any) -> None:
    """Reach: 192 positions of memory, and the segment."""
    found = shares_of(evaluate, "transformer-xl", arms=["long"], multiples=[2], depths=[0])
    assert found["long", 512] == ["0.0000 0.0000 0.0000 0.0000"] * 2
    near = shares_of(evaluate, "transformer-xl", arms=["long"], multiples=[2], depths=[1])
    assert max(map(float, " ".join(near["long", 512]).split())) > 0.9


def test_slots_of_a_memory_are_no_tokens(evaluate: Any) -> None:
    found = evaluate(HFExtrapolate("reference/memformer", device="cpu"), ["extrapolate_why"], **SMALL)["config"]["attention"]
    assert (found["outcome"], "memory" in found["reason"]) == ("not_seen", True)


def test_the_spans_of_a_task_hold_the_needle_and_the_question(load: Any) -> None:
    task = load("extrapolate_why", tokenizer=make_tokenizer("bpe"), trained_length=800, **SMALL)
    task.bind(Scripted(lambda *_: True, 100_000))
    task.build_all_requests()
    docs = [(instance, instance.doc["watch"]) for instance in task.instances if "watch" in instance.doc]
    assert {watch["arm"] for _, watch in docs} == {"long", "emptied"}, "this backend takes no positions"
    for instance, watch in docs:
        ids, _ = task._view.encode_scored(*instance.args)
        ((start, stop),) = watch["needle"]
        text = make_tokenizer("bpe").decode(ids[start:stop])
        assert instance.doc["answer"] in text
        assert "magic number" in text
        assert len(text) < 100
        assert make_tokenizer("bpe").decode(ids[watch["question"] :]).strip().startswith("What is the special magic number")


def test_a_task_that_generates_is_not_watched(load: Any) -> None:
    with pytest.raises(TaskFileError, match="attention"):
        load("niah_single_extrapolate_generate", attention=True)


def test_a_report_shows_the_heads_that_attend_to_the_needle(evaluate: Any, tmp_path: Path) -> None:
    results = evaluate(HFExtrapolate("reference/rope", device="cpu"), ["extrapolate_why"], **SMALL)
    said = json.loads(
        json.dumps({"config": {"attention": results["config"]["attention"]}, "configs": results["configs"]}, default=str)
    )
    (attention,) = read_attention(said)
    heads = choose_heads(attention)
    assert len(heads) == 8
    home = next(cell for cell in attention.cells if cell.arm == "long" and cell.multiple == 1)
    assert max(home.shares["needle"][1]) > 0.9, "the model that answers looks at what it is asked for"
    figures = list(draw_attention(attention))
    assert [end for end, *_ in figures] == ["", "-arms"]
    assert all(0 <= row["share"] <= 1 for *_, rows in figures for row in rows)


def test_of_many_heads_a_report_chooses_those_that_attend_most_to_the_needle() -> None:
    def cell(length: int, share: float) -> dict[str, Any]:
        by_head = [" ".join(f"{share * (layer * 10 + head) / 100:.4f}" for head in range(10)) for layer in range(5)]
        rest = dict.fromkeys(("sinks", "question", "rest", "entropy"), by_head)
        tokens = dict.fromkeys(SPANS, 4.0)
        return {"task": "t", "arm": "long", "length": length, "asked": 1, "prompts": 1, "tokens": tokens, "needle": by_head, **rest}

    said = {"layers": [0, 1, 2, 3, 4], "cells": [cell(200, 0.1), cell(100, 1.0)]}
    (attention,) = read_attention({"config": {"attention": said}, "configs": {"t": {"trained_length": {"tokens": 100}}}})
    assert choose_heads(attention) == [(4, head) for head in range(9, 1, -1)]
    assert [end for end, *_ in draw_attention(attention)] == ["", "-map"]


def test_results_without_it_have_no_figure() -> None:
    assert read_attention({"config": {}, "configs": {}}) == []
    assert read_attention({"config": {"attention": {"outcome": "not_seen", "reason": "no"}}, "configs": {}}) == []
