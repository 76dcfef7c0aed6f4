"""Intervals and tests, against their formulas written out and against scipy's."""

from __future__ import annotations

import itertools
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from harness_ext.results.statistics import flip_signs, holm, mcnemar, t_interval, wilson

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
p_values = st.lists(st.floats(0, 1), max_size=12)


@given(counts)
def test_wilsons_interval_is_where_the_score_test_does_not_reject(count: tuple[int, int]) -> None:
    """Its ends solve |share − p| = z √(p (1 − p) / n)."""
    successes, n = count
    share, z = successes / n, 1.959963984540054
    for end in wilson(successes, n):
        assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-6)


@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
def test_wilsons_interval_is_scipys(count: tuple[int, int], confidence: float) -> None:
    expected = binomtest(*count).proportion_ci(confidence_level=confidence, method="wilson")
    assert wilson(*count, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_intervals_of_a_million_cells_take_seconds() -> None:
    started = time.process_time()
    for successes in range(100_000):
        wilson(successes % 101, 100)
    assert time.process_time() - started < 1


@given(counts)
def test_wilsons_interval_holds_its_share_and_narrows_with_n(count: tuple[int, int]) -> None:
    successes, n = count
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    wider = wilson(2 * successes, 2 * n)
    assert wider[1] - wider[0] < high - low


def test_the_published_example_of_wilsons_interval() -> None:
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, Statistics in Medicine 17, table I, method 3)."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@given(counts)
def test_wilsons_interval_ends_at_0_or_1_exactly_where_none_or_all_are_right(count: tuple[int, int]) -> None:
    successes, n = count
    low, high = wilson(successes, n)
    assert (low == 0) == (successes == 0)
    assert (high == 1) == (successes == n)


@pytest.mark.parametrize("count", [(0, 0), (2, 1), (-1, 3)])
def test_what_is_no_share_has_no_interval(count: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="n must be"):
        wilson(*count)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30).filter(lambda values: max(values) - min(values) > 1e-3))
def test_the_interval_of_a_mean_is_scipys(values: list[float]) -> None:
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_one_value_has_no_spread_and_no_interval() -> None:
    assert t_interval([3.0]) is None


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemars_p_is_twice_the_smaller_tail_of_fair_coins(first: int, second: int) -> None:
    n = first + second
    tail = sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2**n
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail))


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemars_p_is_symmetric_and_falls_as_one_side_gains(first: int, second: int) -> None:
    low, high = sorted((first, second))
    assert mcnemar(first, second) == mcnemar(second, first)
    assert mcnemar(low, high + 1) <= mcnemar(low, high) <= 1


def test_without_a_discordant_prompt_p_is_one() -> None:
    assert mcnemar(0, 0) == 1.0


@given(st.lists(st.integers(-6, 6), max_size=9))
def test_the_test_of_haystacks_is_the_share_of_all_signs_that_are_as_far_from_zero(differences: list[int]) -> None:
    """A readable twin: every choice of signs, one by one."""
    sums = [abs(sum(map(int.__mul__, signs, differences))) for signs in itertools.product((-1, 1), repeat=len(differences))]
    expected = sum(one >= abs(sum(differences)) for one in sums) / len(sums)
    assert flip_signs(differences) == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_test_of_haystacks_is_mcnemars_where_each_has_one_discordant_prompt(first: int, second: int) -> None:
    assert flip_signs([1] * first + [-1] * second + [0]) == pytest.approx(mcnemar(first, second), abs=1e-12)


@given(p_values)
def test_holms_p_is_the_largest_of_its_predecessors_products(values: list[float]) -> None:
    ordered = sorted(values)
    products = [min(1.0, (len(values) - rank) * p) for rank, p in enumerate(ordered)]
    adjusted = holm(values)
    for p, found in zip(values, adjusted, strict=True):
        last = max(rank for rank, other in enumerate(ordered) if other == p)
        assert found <= max(products[: last + 1])
        assert p <= found <= min(1.0, len(values) * p)
    assert sorted(adjusted) == [max(products[: rank + 1]) for rank in range(len(values))]


@given(p_values)
def test_holm_rejects_what_stepping_down_rejects(values: list[float]) -> None:
    """The procedure as published: from the smallest, compared with α / (m − rank), up to the first that is not below."""
    for alpha in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
            if values[index] * (len(values) - rank) > alpha:
                break
            rejected.add(index)
        assert {index for index, p in enumerate(holm(values)) if p <= alpha} == rejected


def test_holm_of_one_test_is_that_test() -> None:
    assert holm([0.03]) == [0.03]
    assert holm([]) == []
