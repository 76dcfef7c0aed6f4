"""Steps run side by side: each by one lane, on tokens that the lane holds, with the answers of a run in one lane."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_prefix_tree import SEQUENCES

from harness_ext.compare import Asked
from harness_ext.models.forward import Run
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.journal import Kept
from harness_ext.models.lanes import Lanes, split
from harness_ext.models.prefix_tree import Batch, Schedule, Step, plan
from harness_ext.models.side_by_side import run_threads
from harness_ext.models.state import Cuttable, ForkedLayer
from harness_ext.plan import plan_run

MOST = "harness_ext.models.foresight.MOST_LANES"


def make_plan(sequences: list[list[int]], **options: Any) -> Schedule:
    return plan(sequences, [len(sequence) - 1 for sequence in sequences], Batch(), **options)


def find_load(part: tuple[Step, ...]) -> int:
    return sum(len(step.rows) * (step.stop - step.start) for step in part)


def split_evenly(schedule: Schedule, count: int) -> Lanes:
    return split(schedule.steps, [find_load((step,)) for step in schedule.steps], count)


@given(SEQUENCES, st.integers(1, 4), st.integers(0, 20), st.booleans())
def test_each_step_is_one_lanes_and_stands_on_what_that_lane_holds(
    sequences: list[list[int]], count: int, leaves: int, cut: bool
) -> None:
    schedule = plan(sequences, [len(s) - 1 for s in sequences], Batch(leaves=leaves if cut else 0), cut=cut)
    lanes = split_evenly(schedule, count)
    assert len(lanes.parts) <= count
    assert sorted(map(id, itertools.chain(lanes.first, *lanes.parts))) == sorted(map(id, schedule.steps))
    first: list[int] = []
    for step in lanes.first:
        assert len(step.rows) == 1
        assert step.start == 0
        first = sequences[step.rows[0]][: step.stop]
    for part in lanes.parts:
        held, aside = first, list[list[int]]()
        for step in part:
            held = aside.pop() if step.resume else held
            assert len(held) >= step.start
            held = held[: step.start]
            if step.copy:
                aside.append(held)
            assert all(sequences[row][: step.start] == held for row in step.rows)
            if len(step.rows) == 1:
                held = sequences[step.rows[0]][: step.stop]


@given(SEQUENCES, st.integers(1, 4))
def test_no_lane_is_longer_than_its_share_and_one_item(sequences: list[list[int]], count: int) -> None:
    schedule = make_plan(sequences)
    lanes = split_evenly(schedule, count)
    roots = [number for number, step in enumerate(schedule.steps) if not step.start]
    largest = max(find_load(schedule.steps[one:two]) for one, two in zip(roots, [*roots[1:], len(schedule.steps)], strict=True))
    took = find_load(lanes.first) / count + max(map(find_load, lanes.parts), default=0)
    assert took <= schedule.computed / count + largest


def test_a_sweep_that_has_its_beginning_in_common_reads_that_once_and_shares_out_the_branches() -> None:
    hay = list(range(100, 200))
    prompts = [[*hay[:depth], 1, *hay[depth:], 2] for depth in (0, 25, 50, 75, 100)]
    lanes = split_evenly(make_plan(prompts), 2)
    assert [(step.start, step.stop) for step in lanes.first] == [(0, 75)]
    assert sorted(map(find_load, lanes.parts)) == [129, 156]  # 102 and 27, and 77, 52 and 27: one prompt stands on nothing


def test_samples_that_have_nothing_in_common_are_dealt_out_whole() -> None:
    lanes = split_evenly(make_plan([[sample] * 10 for sample in range(6)]), 2)
    assert not lanes.first
    assert [[step.rows[0] for step in part] for part in lanes.parts] == [[0, 2, 4], [1, 3, 5]]


def ask() -> list[tuple[None, list[int], list[int]]]:
    """Two samples of a sweep, each with prompts off one haystack, at lengths that take several chunks, and one that stands alone."""
    rng = random.Random(0)
    asked = []
    for _ in range(2):
        hay = [rng.randrange(3, 500) for _ in range(120)]
        asked += [(None, [*hay[:at], 7, 8, *hay[at:size], 9], [11, 12, 13]) for at in (5, 30, 60) for size in (70, 120)]
    return [*asked, (None, [5] * 90, [11])]


def build(saved: Any, chunk: int = 16) -> HFExtrapolate:
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32", chunk=chunk)
    model._reader.prepare(130)
    return model


@pytest.fixture(autouse=True)
def two_cores() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def read(model: HFExtrapolate, lanes: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(MOST, lanes)
    return list(model._loglikelihood_tokens(ask(), disable_tqdm=True))


def watch_runs(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None] = lambda: None) -> list[tuple[int, int, int]]:
    """(thread, first token, cores) of each piece that is read from now on; `before` is called before each."""
    read, seen = Run._read, []

    def watched(self: Run, state: Any, rows: Any, start: int, *args: Any, **options: Any) -> None:
        before()
        seen.append((threading.get_ident(), start, torch.get_num_threads()))
        read(self, state, rows, start, *args, **options)

    monkeypatch.setattr(Run, "_read", watched)
    return seen


@pytest.mark.parametrize("lanes", [2, 3])
def test_answers_are_those_of_one_lane_and_each_token_is_read_once(lanes: int, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(lanes)
    model = build(saved)
    expected = read(model, 1, monkeypatch)
    counts = [0]
    model.model.get_input_embeddings().register_forward_hook(lambda _, args, __: counts.append(args[0].numel()))
    seen = watch_runs(monkeypatch)
    computed = model._reader.computed
    found = read(model, lanes, monkeypatch)
    assert len({thread for thread, _, _ in seen} - {threading.get_ident()}) == lanes
    assert {cores for thread, _, cores in seen if thread != threading.get_ident()} == {1}
    assert torch.get_num_threads() == lanes
    assert sum(counts) == model._reader.computed - computed
    for (likelihood, greedy), (known, known_greedy) in zip(found, expected, strict=True):
        assert likelihood == pytest.approx(known, abs=1e-4)
        assert greedy == known_greedy
    assert read(model, lanes, monkeypatch) == found


def test_a_branch_has_the_room_and_the_ways_of_the_run_it_comes_from(saved: Any) -> None:
    model = build(saved)
    make = model._reader._make(120)
    sequences = [[*range(10, 60), end, end] for end in (3, 4, 5)]
    run = Run(model._reader.forward, sequences, make, 16)
    steps = plan([sequence[:-1] for sequence in sequences], [50] * 3, Batch(leaves=16)).steps
    run.run(steps[0])
    other = run.branch()
    for one in (run, other):
        assert isinstance(one._state, Cuttable)
        layer = one._state.cache.layers[0]
        before = layer.buffers[0].data_ptr()
        assert layer.buffers[0].shape[-2] == 120
        assert isinstance(one._state.forked(3).cache.layers[0], ForkedLayer)
        one.run(steps[1])
        assert layer.buffers[0].data_ptr() == before
    assert run.answers() == other.answers()
    assert run._state.cache.layers[0].buffers[0].data_ptr() != other._state.cache.layers[0].buffers[0].data_ptr()


@pytest.mark.parametrize(("chunk", "last"), [(16, 8), (128, 2)])
def test_where_memory_does_not_hold_two_lanes_all_is_read_in_one(
    chunk: int, last: int, saved: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(saved, chunk)
    expected = read(model, 1, monkeypatch)
    forward, main, calls, failed = model.model.forward, threading.get_ident(), itertools.count(), list[bool]()

    def failing(*args: Any, **kwargs: Any) -> Any:
        # In a step's later chunk, too, so that a part of what it reads is scored already.
        if threading.get_ident() != main and next(calls) > last:
            failed.append(True)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", failing)
    sizes: list[int] = []

    def note(_: Any, args: Any, __: Any) -> None:
        if threading.get_ident() == main and failed:
            sizes.append(args[0].shape[1])

    model.model.get_input_embeddings().register_forward_hook(note)
    found = read(model, 2, monkeypatch)
    assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in expected], abs=1e-4)
    assert [answer[1] for answer in found] == [answer[1] for answer in expected]
    assert "one at a time from here on" in caplog.text
    assert model._reader.lanes == 1
    assert not model._memory.too_large
    assert min(chunk, 65) <= max(sizes) <= chunk  # in pieces as large as ever, where lanes had come down to 64


def test_the_plan_has_room_for_each_lane(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(
        model=str(saved("llama")),
        methods=("none",),
        tasks=("passkey_extrapolate",),
        metadata={"lengths": [400], "samples": 2, "depths": 3},
        model_args={"device": "cpu", "dtype": "float32"},
    )
    states = []
    for lanes in (1, 2):
        monkeypatch.setattr(MOST, lanes)
        planned = plan_run(asked)
        states.append(planned.tasks[0].lengths[0].state_bytes)
        assert (planned.demand.side_by_side == 1.0) == (lanes == 1)
    assert states[1] == 2 * states[0]


def test_another_error_in_a_lane_ends_the_other_and_is_raised(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(saved)
    main, calls = threading.get_ident(), itertools.count()
    failed = threading.Event()

    def fail() -> None:
        if threading.get_ident() == main:
            return
        if next(calls) == 1:
            failed.set()
            raise IndexError("past the end of a table")
        failed.wait(10)

    seen = watch_runs(monkeypatch, fail)
    with pytest.raises(IndexError, match="end of a table"):
        read(model, 2, monkeypatch)
    assert len(seen) < 8  # of some thirty
    assert torch.get_num_threads() == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]


@pytest.mark.parametrize("lanes", [1, 2])
def test_what_was_answered_before_an_error_is_handed_over(lanes: int, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sequences = build(saved), [[*context, *answer] for _, context, answer in ask()]
    reader, schedule = model._reader, model._plan(sequences, [len(context) for _, context, _ in ask()], None)
    reader.lanes = lanes
    expected = reader.score(sequences, schedule, reader.open_bar("", [], quiet=True), Kept())
    forward, calls, written = model.model.forward, itertools.count(), dict[int, Any]()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 20:
            raise IndexError("past the end of a table")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", failing)
    with pytest.raises(IndexError, match="end of a table"):
        reader.score(sequences, schedule, reader.open_bar("", [], quiet=True), Kept({}, written.update))
    assert 2 <= len(written) < len(sequences)
    assert written == {index: expected[index] for index in written}


def test_whatever_ends_it_all_threads_are_told_and_waited_for() -> None:
    stop, ended = threading.Event(), []

    def call() -> None:
        ended.append(stop.wait(10))

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_threads([call, call, lambda: None], 3, stop=stop, meanwhile=interrupt)
    assert ended == [True, True]


@pytest.mark.parametrize("family", ["mamba2", "gpt_neo", "xglm"])
def test_a_model_whose_attention_is_its_own_is_read_in_one_lane(family: str, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HFExtrapolate(pretrained=str(saved(family)), device="cpu", dtype="float32", trained_length=40)
    seen = watch_runs(monkeypatch)
    model._loglikelihood_tokens([(None, [token] * 20, [9, 8]) for token in range(10, 16)], disable_tqdm=True)
    assert {thread for thread, _, _ in seen} == {threading.get_ident()}
    assert model._reader.describe()["lanes"] == 1


def test_there_are_as_many_lanes_as_cores_and_as_memory_has_plenty_for(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness_ext.models import foresight, machine

    model = build(saved)
    lanes = []
    for share in (3, 1, 0.4):
        need = 4 * 100 * foresight.guess_token(model.model) + 4 * foresight.SCORES
        monkeypatch.setattr(machine, "read_free", lambda share=share, need=need, **_: machine.Free(int(share * 8 * need), "test's"))
        foresight.look_ahead(model._reader, [100])
        lanes.append(model._reader.lanes)
    assert lanes == [2, 1, 1]
