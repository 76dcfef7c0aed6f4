"""The prefix tree: every token computed once, every asked position read once, and caches held within their bound."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from harness_ext.models.prefix_tree import ALIKE, Batch, Schedule, gather, leave_out_whole, plan, plan_whole

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)
SEQUENCES = st.lists(TOKENS, min_size=1, max_size=14)


def count_distinct(sequences: list[list[int]]) -> int:
    """By the definition: two tokens are the same where everything up to them is."""
    return len({tuple(sequence[: end + 1]) for sequence in sequences for end in range(len(sequence))})


def run(schedule: Schedule, sequences: list[list[int]], cut: bool) -> tuple[Counter[tuple[int, int]], list[int], int]:
    """Reads of each (sequence, position), the tokens that each step ran, and the most caches held, by a cache that checks itself."""
    cache: list[int] = []
    aside: list[list[int]] = []
    reads: Counter[tuple[int, int]] = Counter()
    ran, held = [], 0
    for step in schedule.steps:
        if step.resume:
            cache = aside.pop()
        if step.start == 0 and not cut:
            cache = []
        if step.copy:
            aside.append(list(cache))
        held = max(held, len(aside))
        assert len(cache) == step.start if not cut else len(cache) >= step.start
        cache = cache[: step.start]
        stops = [step.stop] if len(step.rows) == 1 else [len(sequences[row]) for row in step.rows]
        assert max(stops) == step.stop
        for row in step.rows:
            assert sequences[row][: step.start] == cache
        for read in step.reads:
            assert step.start <= read.start < read.stop <= stops[read.row]
            assert sequences[read.sequence][: read.stop] == sequences[step.rows[read.row]][: read.stop]
            reads.update((read.sequence, position) for position in range(read.start, read.stop))
        ran.append(sum(stop - step.start for stop in stops))
        if len(step.rows) == 1:
            cache = sequences[step.rows[0]][: step.stop]
    assert not aside
    return reads, ran, held


@given(SEQUENCES, st.data(), st.booleans())
def test_each_distinct_token_is_computed_once_and_each_asked_position_read_once(
    sequences: list[list[int]], data: st.DataObject, cut: bool
) -> None:
    wanted = [data.draw(st.integers(0, len(sequence) - 1)) for sequence in sequences]
    batch = Batch(rows=data.draw(st.integers(1, 4)), tokens=data.draw(st.integers(0, 60)))
    schedule = plan(sequences, wanted, batch if cut else Batch(), cut=cut)
    reads, ran, held = run(schedule, sequences, cut)
    assert reads == Counter((i, p) for i, sequence in enumerate(sequences) for p in range(wanted[i], len(sequence)))
    assert sum(ran) == schedule.computed == count_distinct(sequences)
    assert schedule.asked == sum(map(len, sequences))
    assert held <= schedule.copies <= max(0, math.log2(len(sequences)))


@given(SEQUENCES, st.data())
def test_where_no_token_may_be_read_alone_only_what_nothing_stands_on_is(sequences: list[list[int]], data: st.DataObject) -> None:
    wanted = [data.draw(st.integers(0, len(sequence) - 1)) for sequence in sequences]
    schedule = plan(sequences, wanted, Batch(), cut=False, alone=False)
    reads, ran, held = run(schedule, sequences, cut=False)
    assert reads == Counter((i, p) for i, sequence in enumerate(sequences) for p in range(wanted[i], len(sequence)))
    assert sum(ran) == schedule.computed >= count_distinct(sequences)
    assert held <= schedule.copies <= max(0, math.log2(len(sequences)))
    for step, tokens, after in zip(schedule.steps, ran, [*schedule.steps[1:], None], strict=True):
        goes_on = after is not None and after.start == step.stop and not after.resume
        assert tokens > 1 or not goes_on
        assert tokens > 1 or step.stop == len(sequences[step.rows[0]])


def test_a_token_that_may_not_be_read_alone_is_read_again_on_each_branch_and_no_other_is() -> None:
    prompts = [[1, 2, 3, 4, 5], [1, 2, 3, 6, 7], [1, 2, 3], [1, 2, 8, 9]]
    assert plan(prompts, [2] * 4, Batch(), cut=False).computed == 9
    assert plan(prompts, [2] * 4, Batch(), cut=False, alone=False).computed == 11  # 3 stands at the end of one, and before 4 and 6


@given(SEQUENCES, st.integers(1, 5), st.integers(0, 40))
def test_a_batch_keeps_its_bounds_and_nothing_is_run_on_it(sequences: list[list[int]], rows: int, tokens: int) -> None:
    for step in plan(sequences, [len(s) - 1 for s in sequences], Batch(rows=rows, tokens=tokens)).steps:
        assert len(step.rows) == 1 or (len(step.rows) <= rows and len(step.rows) * step.stop <= tokens)


@given(SEQUENCES, st.integers(1, 40))
def test_leaves_that_need_no_copies_are_run_together_within_their_bound_and_hardly_padded(
    sequences: list[list[int]], leaves: int
) -> None:
    schedule = plan(sequences, [len(s) - 1 for s in sequences], Batch(leaves=leaves))
    reads, ran, _ = run(schedule, sequences, cut=True)
    assert reads == Counter((i, len(sequence) - 1) for i, sequence in enumerate(sequences))
    assert sum(ran) == schedule.computed == count_distinct(sequences)
    for step, tokens in zip(schedule.steps, ran, strict=True):
        padded = len(step.rows) * (step.stop - step.start)
        assert len(step.rows) == 1 or (step.start and padded <= min(leaves, ALIKE * tokens))


def test_the_needles_of_a_context_are_asked_for_in_one_step() -> None:
    prompts = [[*range(100), needle, needle, 7] for needle in range(200, 216)]
    schedule = plan(prompts, [102] * 16, Batch(leaves=512))
    assert [(len(step.rows), step.start, step.stop) for step in schedule.steps] == [(1, 0, 100), (16, 100, 103)]


@given(SEQUENCES, st.booleans())
def test_apart_each_distinct_sequence_ends_in_a_step_of_its_own(sequences: list[list[int]], cut: bool) -> None:
    schedule = plan(sequences, [len(s) - 1 for s in sequences], Batch(), cut=cut, apart=True)
    ends = [(step.reads[0].sequence, step.stop) for step in schedule.steps if step.reads]
    distinct = {tuple(sequence) for sequence in sequences}
    assert len(ends) == len(distinct)
    assert {tuple(sequences[index][:stop]) for index, stop in ends} == distinct
    heads = count_distinct([sequence[:-1] for sequence in sequences if len(sequence) > 1])
    assert schedule.computed == heads + len(distinct)


def test_a_sweep_of_depths_goes_down_once_and_comes_back_branch_by_branch() -> None:
    hay = list(range(100, 200))
    prompts = [[*hay[:depth], 1, *hay[depth:], 2] for depth in (0, 25, 50, 75, 100)]
    schedule = plan(prompts, [len(p) - 1 for p in prompts], Batch())
    assert [(step.start, step.stop) for step in schedule.steps] == [(0, 75), (75, 102), (75, 102), (50, 102), (25, 102), (0, 102)]
    assert (schedule.asked, schedule.computed) == (510, 75 + 27 + 27 + 52 + 77 + 102)
    copied = plan(prompts, [len(p) - 1 for p in prompts], Batch(), cut=False)
    assert copied.computed == schedule.computed
    assert copied.copies == 1


def test_prompts_that_share_nothing_fill_batches_longest_first() -> None:
    prompts = [[index] * size for index, size in enumerate((3, 9, 5, 8))]
    schedule = plan(prompts, [0] * 4, Batch(rows=2, tokens=100))
    assert [step.rows for step in schedule.steps] == [(1, 3), (2, 0)]


def test_a_chain_of_ten_thousand_branches_needs_no_deep_recursion() -> None:
    chain = list(range(10_000))
    prompts = [[*chain[:at], 50_000] for at in range(1, 10_000)]
    for cut in (True, False):
        schedule = plan(prompts, [len(p) - 1 for p in prompts], Batch(), cut=cut)
        assert schedule.computed == 9_999 + 9_999
        assert schedule.copies <= 1


def test_an_empty_plan_has_no_steps() -> None:
    assert plan([], [], Batch()).steps == ()


@given(SEQUENCES, st.integers(1, 5), st.integers(0, 60), st.booleans())
def test_companies_are_the_steps_in_their_order_and_keep_within_the_batch(
    sequences: list[list[int]], rows: int, tokens: int, equal: bool
) -> None:
    batch = Batch(rows=rows, tokens=tokens, equal=equal)
    schedule = plan(sequences, [len(s) - 1 for s in sequences], batch, apart=True)
    lengths_of = list(map(len, sequences))
    gathered, companies = gather(schedule, lengths_of, batch, joins=True)
    assert [step for company in companies for step in company] == [*gathered.steps]
    assert run(gathered, sequences, cut=True)[:1] == run(schedule, sequences, cut=True)[:1]
    for company in companies:
        lengths = [len(sequences[row]) for step in company if step.reads for row in step.rows]
        assert company[-1].reads
        assert len(lengths) == 1 or (len(lengths) <= rows and len(lengths) * max(lengths) <= tokens)
        assert not equal or len(set(lengths)) == 1
    for before, after in itertools.pairwise(companies):  # no two that follow one another would have fitted into one
        lengths = [len(sequences[row]) for step in before if step.reads for row in step.rows]
        first = next(step for step in after if step.reads)
        together = [*lengths, len(sequences[first.rows[0]])]
        assert len(together) > rows or len(together) * max(together) > tokens or (equal and len(set(together)) > 1)


@given(SEQUENCES, st.data())
def test_a_company_is_run_as_a_whole_or_left_out_as_a_whole(sequences: list[list[int]], data: st.DataObject) -> None:
    batch = Batch(rows=3, tokens=30)
    schedule = plan(sequences, [len(s) - 1 for s in sequences], batch, apart=True)
    schedule, companies = gather(schedule, list(map(len, sequences)), batch, joins=True)
    known = data.draw(st.sets(st.integers(0, len(sequences) - 1)))
    for company, left in zip(companies, leave_out_whole(schedule.steps, companies, known), strict=True):
        reads = {read.sequence for step in company for read in step.reads}
        if reads <= known:
            assert not any(step.reads for step in left)
        else:
            assert left == company


@given(SEQUENCES, st.integers(1, 5))
def test_rows_of_one_length_are_asked_for_and_given(sequences: list[list[int]], rows: int) -> None:
    batch = Batch(rows=rows, tokens=100, equal=True)
    wanted = [len(sequence) - 1 for sequence in sequences]
    for schedule in (plan(sequences, wanted, batch), plan_whole(sequences, wanted, batch)):
        assert sorted({read.sequence for step in schedule.steps for read in step.reads}) == [*range(len(sequences))]
        for step in schedule.steps:
            assert len(step.rows) == 1 or {len(sequences[row]) for row in step.rows} == {step.stop}


@given(SEQUENCES, st.data(), st.booleans())
def test_what_is_not_worth_a_forward_is_read_with_each_branch(sequences: list[list[int]], data: st.DataObject, cut: bool) -> None:
    wanted = [data.draw(st.integers(0, len(sequence) - 1)) for sequence in sequences]
    worth = data.draw(st.integers(0, 20))
    batch = Batch(rows=data.draw(st.integers(1, 4)) if cut else 1, tokens=60, forward=worth)
    schedule = plan(sequences, wanted, batch, cut=cut)
    reads, ran, _ = run(schedule, sequences, cut)
    assert reads == Counter((i, p) for i, sequence in enumerate(sequences) for p in range(wanted[i], len(sequence)))
    assert sum(ran) == schedule.computed
    strict = plan(sequences, wanted, dataclasses.replace(batch, forward=0), cut=cut)
    nodes = 2 * len(sequences)  # no tree of so many sequences has more that branch, or that one ends in
    assert strict.computed <= schedule.computed <= strict.computed + worth * nodes


def test_prompts_that_begin_alike_for_a_few_tokens_are_read_in_full_batches() -> None:
    prompts = [[1, first, *range(10 * number, 10 * number + 50)] for number, first in enumerate([2, 3, 4, 5] * 4)]
    wanted = [len(prompt) - 1 for prompt in prompts]
    assert [len(step.rows) for step in plan(prompts, wanted, Batch(rows=8, tokens=1000, forward=64)).steps] == [8, 8]
    assert len(plan(prompts, wanted, Batch(rows=8, tokens=1000)).steps) == 8


def test_a_beginning_that_many_share_is_read_once_however_few_its_tokens() -> None:
    prompts = [[1, 2, number, *range(20)] for number in range(100, 140)]
    steps = plan(prompts, [20] * 40, Batch(rows=8, tokens=1000, forward=64)).steps
    assert [(len(step.rows), step.start) for step in steps] == [(1, 0), *[(8, 2)] * 5]


@given(SEQUENCES, st.integers(1, 6), st.integers(1, 20))
def test_no_more_is_padded_than_a_forward_is_worth(sequences: list[list[int]], rows: int, worth: int) -> None:
    schedule = plan(sequences, [len(s) - 1 for s in sequences], Batch(rows=rows, tokens=100, forward=worth))
    for step, tokens in zip(schedule.steps, run(schedule, sequences, cut=True)[1], strict=True):
        padding = len(step.rows) * (step.stop - step.start) - tokens
        assert len(step.rows) == 1 or padding <= max(worth, (ALIKE - 1) * tokens)
