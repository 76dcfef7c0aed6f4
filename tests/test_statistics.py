"""Intervals and tests, against their formulas written out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness_ext.results.statistics import holm, mcnemar, wilson

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
p_values = st.lists(st.floats(0, 1), max_size=12)


@given(counts)
def test_wilsons_interval_is_where_the_score_test_does_not_reject(count: tuple[int, int]) -> None:
    """Its ends solve |share − p| = z √(p (1 − p) / n)."""
    successes, n = count
    share, z = successes / n, 1.959963984540054
    for end in wilson(successes, n):
        assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-6)


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


def test_no_answers_have_no_share() -> None:
    with pytest.raises(ValueError, match="n must be"):
        wilson(0, 0)


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
