"""The arms of the experiment on why a score falls: each changes one thing, and asks for the same."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Scripted
from tokenizers_here import KINDS, make_tokenizer

from harness_ext.cells import Length, Limit, Placing
from harness_ext.errors import LengthError, TaskFileError
from harness_ext.placement import list_positions
from harness_ext.sweep.arms import ARMS, EMPTY, PACKED, PLACED, SHORT, Bench, add_arms, list_left_out, pack, stretch
from harness_ext.sweep.controls import Cell
from harness_ext.sweep.spec import parse_spec

TRAINED = 800
SMALL = {"trained_length": TRAINED, "multiples": [0.5, 1, 2, 4], "depths": 3, "samples": 2}
NEEDLE = "One of the special magic numbers for {} is: {}."


class Placed(Scripted):
    """A scripted model that is told where its tokens stand; `knows` is asked (prompt, answer, positions)."""

    def __init__(self, knows: Any, placing: Placing | None = None) -> None:
        super().__init__(lambda prompt, answer: knows(prompt, answer, None), 100_000)
        self.knows_at, self.placing = knows, placing or Placing(outcome="measured", reason="scripted")

    def find_placing(self) -> Placing:
        return self.placing

    def loglikelihood_at(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(-1.0, self.knows_at(context, answer, at["positions"])) for context, answer, at in (r.args for r in requests)]


@functools.cache
def built(kind: str = "bpe", task: str = "extrapolate_why") -> Any:
    """The task, built for a model that takes positions."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, metadata={**SMALL, "tokenizer": make_tokenizer(kind)})
    loaded = manager.load([task])["tasks"][task]
    loaded.bind(Placed(lambda *_: True))
    loaded.build_all_requests()
    return loaded


def tokens_of(kind: str, instance: Any) -> list[int]:
    """The prompt's token ids, as the task counts them."""
    return list(built(kind)._view.encode_scored(*instance.args[:2])[0])


def text_at(kind: str, ids: list[int], span: slice = slice(None)) -> str:
    return str(make_tokenizer(kind).decode(ids[span])).lower().replace(" ", "")


def as_read(kind: str, text: str) -> str:
    """A text as the tokenizer gives it back."""
    return text_at(kind, make_tokenizer(kind).encode(text, add_special_tokens=False))


@pytest.mark.parametrize("kind", KINDS)
def test_every_arm_asks_for_the_same_facts_at_the_same_depths(kind: str) -> None:
    by_cell: dict[Any, set[Any]] = {}
    arms: dict[Any, set[str]] = {}
    for doc in built(kind).eval_docs:
        place = doc["sample"], doc["depth"], doc["multiple"]
        by_cell.setdefault(place[0], set()).add((tuple(doc["values"]), doc["answer"]))
        arms.setdefault(place, set()).add(doc.get("control", "long"))
    assert all(len(facts) == 1 for facts in by_cell.values())
    for (_, _, multiple), found in arms.items():
        expected = {"long"} if multiple < 1 else set(ARMS) - (PACKED if multiple == 1 else set())
        assert found == expected


@pytest.mark.parametrize("kind", KINDS)
def test_placed_prompts_reach_over_the_positions_that_their_arm_says(kind: str) -> None:
    task = built(kind)
    for instance in task.instances:
        doc, arm = instance.doc, instance.doc.get("control")
        assert (instance.request_type == "loglikelihood_at") == (arm in PLACED)
        if arm not in PLACED:
            continue
        ids = tokens_of(kind, instance)
        assert len(ids) == doc["prompt_tokens"]
        positions = list_positions(instance.args[2]["positions"], len(ids))
        steps = np.diff(positions)
        assert positions[-1] == (TRAINED if arm in PACKED else doc["length"]) - 1
        assert positions[0] == (doc["length"] - len(ids) if arm == "shifted" else 0)
        assert (steps >= 0).all()
        assert (steps <= 1).all() or arm == "stretched"
        assert (steps >= 1).all() or arm in PACKED
        assert len(ids) == doc["length"] or arm in SHORT


@pytest.mark.parametrize("kind", KINDS)
def test_needle_and_question_stay_in_one_piece_and_stand_at_their_depth(kind: str) -> None:
    for instance in built(kind).instances:
        doc, arm = instance.doc, instance.doc.get("control")
        if arm not in {"stretched", *PACKED}:
            continue
        ids = tokens_of(kind, instance)
        positions = list_positions(instance.args[2]["positions"], len(ids))
        bends = [index for index in range(1, len(ids)) if positions[index] - positions[index - 1] != 1]
        pieces = [text_at(kind, ids, slice(a, b)) for a, b in zip([0, *bends], [*bends, len(ids)], strict=True)]
        key = re.search(r"magic numbers for ([a-z-]+) is", instance.args[0])
        needle = as_read(kind, NEEDLE.format(key.group(1), doc["answer"]))  # type: ignore[union-attr]
        assert sum(needle.rstrip(".") in piece for piece in pieces) == 1, "no bend inside the needle"
        assert as_read(kind, "What is the special magic number for") in pieces[-1], "no bend inside the question"
        if arm == "stretched":
            first = max(i for i in range(len(ids)) if needle.rstrip(".") in text_at(kind, ids, slice(i, None)))
            filler = doc["length"] - len(ids) + 64  # in a prompt of that length
            before = len(ids) - 64 - (len(ids) - first)  # at least, of what is no filler
            assert int(positions[first]) - doc["depth"] * filler == pytest.approx(before + 64 * (1 - doc["depth"]), abs=70)


def test_fillers_are_what_their_arm_says() -> None:
    for instance in built().instances:
        prompt, arm = instance.args[0], instance.doc.get("control")
        keys = set(re.findall(r"special magic numbers for ([a-z-]+) is", prompt))
        assert (len(keys) > 1) == (arm == "distractors")
        assert (f" {EMPTY} {EMPTY} {EMPTY}" in prompt) == (arm in {"emptied", "packed_emptied"})
        assert ("The grass is green." in prompt and "There and back again." in prompt) == (arm == "other_text")


def test_prompts_of_different_arms_and_positions_have_different_fingerprints() -> None:
    found = [doc["prompt_fingerprint"] for doc in built().eval_docs]
    assert len(set(found)) == len(found)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=2, max_size=5), st.integers(0, 500), st.data())
@settings(max_examples=200)
def test_stretching_keeps_spans_whole_and_ends_at_the_length(gaps: list[tuple[int, int]], more: int, data: st.DataObject) -> None:
    ends = np.cumsum([0, *(part for gap in gaps for part in gap)]).tolist()
    kept = [(0, ends[0] + gaps[0][0] + gaps[0][1])]  # the head swallows the first gap
    for index in range(1, len(gaps)):
        kept.append((ends[2 * index + 1], ends[2 * index + 2]))
    depths = sorted(data.draw(st.lists(st.floats(0, 1), min_size=len(kept) - 2, max_size=len(kept) - 2)))
    tokens = kept[-1][1]
    positions = list_positions(stretch(kept, depths, tokens + more), tokens)
    assert positions[-1] == tokens + more - 1
    assert positions[0] == 0
    assert (np.diff(positions) >= 1).all()
    for start, stop in kept:
        assert (np.diff(positions[start:stop]) == 1).all()


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 30))
@settings(max_examples=200)
def test_packing_keeps_spans_whole_and_ends_at_the_trained_length(gaps: list[tuple[int, int]], room: int) -> None:
    kept, at = [(0, 3)], 3
    for filler, own in gaps:
        kept.append((at + filler, at + filler + own))
        at += filler + own
    whole = sum(stop - start for start, stop in kept)
    room = min(room, at - whole)
    positions = list_positions(pack(kept, whole + room), at)
    assert positions[0] == 0
    assert positions[-1] == whole + room - 1
    assert set(np.diff(positions)) <= {0, 1}
    for start, stop in kept:
        assert (np.diff(positions[start:stop]) == 1).all()


def test_prompts_that_begin_alike_are_placed_alike() -> None:
    early, late = ([(0, 4), (at, at + 3), (40, 45)] for at in (10, 30))
    one, other = (list_positions(pack(kept, 20), 45) for kept in (early, late))
    assert one[:10].tolist() == other[:10].tolist()


def lengths(*multiples: float, outcome: Any = "measured") -> list[Length]:
    return [Length(tokens=int(m * TRAINED), multiple=m, outcome="measured" if m <= 1 else outcome) for m in multiples]


def bench(limits: Any = (), placing: Placing | None = None, needle: str = NEEDLE.format("{key}", "{value}")) -> Bench:
    config = {"task": "t", "needle": needle, "question": "For {key}?" if "{key}" in needle else "What?"}
    spec = parse_spec(config, file="t", overrides={})
    return Bench(spec=spec, trained=TRAINED, limits=limits, placing=placing or Placing(outcome="measured", reason=""))


def arms_of(found: Bench, plan: list[Length]) -> dict[str, set[float]]:
    cells = add_arms([Cell(length, 0.5, 0) for length in plan], ARMS, TRAINED, found.refuse)
    arms: dict[str, set[float]] = {}
    for cell in cells:
        arms.setdefault(cell.control or "long", set()).add(cell.length.multiple or 0)
    return arms


def test_a_table_can_be_packed_past_its_end_and_neither_stretched_nor_shifted() -> None:
    end = Limit(tokens=TRAINED, outcome="hard_limit", reason="the table ends")
    plan = lengths(1, 2, outcome="hard_limit")
    found = arms_of(bench([end]), plan)
    assert found["packed"] == found["packed_emptied"] == {2}
    assert all(found[arm] == {1} for arm in ("long", "stretched", "shifted", "emptied", "other_text", "distractors"))
    cannot = bench([end], Placing(outcome="measured", reason="", past_end="RuntimeError: its mask ends too"))
    assert "packed" not in arms_of(cannot, plan)
    left = {(one.arm, one.length): one for one in list_left_out(plan, ARMS, TRAINED, cannot.refuse)}
    assert left["packed", None].outcome == "not_admitted"
    assert "mask ends" in left["packed", None].reason
    assert left["stretched", 2 * TRAINED].outcome == "hard_limit"


@pytest.mark.parametrize("own", [TRAINED, TRAINED + 40])
def test_a_text_that_fills_the_trained_length_has_no_arms_that_are_placed_within_it(own: int) -> None:
    full = dataclasses.replace(bench(), own=own)
    found = arms_of(full, lengths(1, 2))
    assert not {"stretched", "shifted", "packed", "packed_emptied"} & found.keys()
    assert {"long", "emptied", "other_text", "distractors"} <= found.keys()
    reasons = {one.reason for one in list_left_out(lengths(1, 2), ARMS, TRAINED, full.refuse)}
    assert reasons == {f"this task's own text takes {own} tokens, which leaves no room within the trained length of {TRAINED}"}


def test_arms_of_a_task_that_is_longer_than_the_window_leave_those_out_and_run(evaluate: Any) -> None:
    from harness_ext.models.hf import HFExtrapolate

    model = HFExtrapolate(pretrained="reference/rope", device="cpu")
    results = evaluate(model, ["niah_sweep_extrapolate"], arms=True, multiples=[4], samples=1, depths=16)
    left = {one["arm"] for one in results["configs"]["niah_sweep_extrapolate"]["arms_left_out"]}
    assert {"packed", "packed_emptied", "stretched", "shifted"} <= left
    assert not any(sample["doc"].get("control") in left for sample in results["samples"]["niah_sweep_extrapolate"])


def test_a_limit_of_tokens_leaves_the_short_arms_alone() -> None:
    wall = Limit(tokens=TRAINED, outcome="backend_limit", reason="max_length")
    found = arms_of(bench([wall]), lengths(1, 2, 128, outcome="backend_limit"))
    assert found["stretched"] == found["shifted"] == {1, 2, 128}
    assert "packed" not in found
    assert found["emptied"] == {1}


@pytest.mark.parametrize("outcome", ["not_admitted", "no_positions"])
def test_a_model_without_positions_to_choose_runs_the_other_arms(outcome: Any) -> None:
    found = bench(placing=Placing(outcome=outcome, reason="why not"))
    assert set(arms_of(found, lengths(1, 2))) == {"long", "emptied", "other_text", "distractors"}
    left = list_left_out(lengths(1, 2), ARMS, TRAINED, found.refuse)
    assert {(one.arm, one.length, one.outcome, one.reason) for one in left} == {(arm, None, outcome, "why not") for arm in PLACED}


def test_needles_without_keys_have_no_distractors() -> None:
    found = bench(needle="The code is {value}.")
    assert "distractors" not in arms_of(found, lengths(1, 2))


def test_a_backend_that_takes_no_positions_says_so_in_the_results(evaluate: Any) -> None:
    found = evaluate(Scripted(lambda *_: True, 100_000), ["extrapolate_why"], tokenizer=make_tokenizer("bpe"), **SMALL)
    left = found["configs"]["extrapolate_why"]["arms_left_out"]
    assert {one["arm"] for one in left} == PLACED
    assert all(one["outcome"] == "not_admitted" and "hf-extrapolate" in one["reason"] for one in left)
    assert any(key.startswith("emptied@") for key in found["results"]["extrapolate_why"])
    assert not any(key.startswith("stretched@") for key in found["results"]["extrapolate_why"])


def test_arms_alone_run_without_the_sweep(evaluate: Any) -> None:
    changes = {**SMALL, "multiples": [1, 64], "arms": ["stretched", "shifted"]}
    model = Placed(lambda *_: True)
    found = evaluate(model, ["extrapolate_why"], tokenizer=make_tokenizer("bpe"), **changes)
    names = {key.split("@")[0] for key in found["results"]["extrapolate_why"] if "@" in key}
    assert names == {"stretched", "shifted"}
    assert not model.prompts, "no plain prompt was asked"


def test_any_needle_task_has_arms_and_passkeys_have_no_distractors(evaluate: Any) -> None:
    found = evaluate(Placed(lambda *_: True), ["passkey_extrapolate"], tokenizer=make_tokenizer("bpe"), **SMALL, arms=True)
    left = found["configs"]["passkey_extrapolate"]["arms_left_out"]
    assert [(one["arm"], one["outcome"]) for one in left] == [("distractors", "not_admitted")]


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("extrapolate_why", {"arms": ["strechted"]}, "metadata: field 'arms': found .*; expected true for all, or some of long"),
        ("extrapolate_why", {"arms": 3}, "metadata: field 'arms'"),
        ("passkey_extrapolate_generate", {"arms": True}, "generated"),
        ("loss_extrapolate", {"arms": True}, "hides nothing"),
    ],
)
def test_arms_that_cannot_be_are_refused(load: Any, task: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskFileError, match=message):
        load(task, **SMALL | changes, tokenizer=make_tokenizer("bpe"))


def test_without_a_trained_length_there_are_no_arms(load: Any) -> None:
    task = load("extrapolate_why", lengths=[600, 1200], tokenizer=make_tokenizer("bpe"), samples=1)
    task.bind(Placed(lambda *_: True))
    with pytest.raises(LengthError, match="arms were asked for, but no trained length"):
        task.build_all_requests()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_out_whole_samples_and_all_arms(world: int) -> None:
    task = built()
    shares = [[doc for _, doc in task.doc_iterator(rank=rank, world_size=2)] for rank in range(2)]
    assert sum(map(len, shares)) == len(task.eval_docs)
    assert all({doc.get("control") for doc in share} == {None, *ARMS[1:]} for share in shares)
    assert not {doc["sample"] for doc in shares[0]} & {doc["sample"] for doc in shares[1]}
