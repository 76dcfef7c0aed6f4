"""Scores of answers that share haystacks: by hand where they can be, and what holds of all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness_ext.results.clusters import DRAWS, Answers, draw_scores, list_intervals, size_effectively
from harness_ext.results.statistics import t_quantile, wilson


def make(right: Any, asked: Any = None) -> Answers:
    """One length, (haystacks, depths)."""
    found = np.array(right, dtype=float)[None]
    return Answers(right=found, asked=np.ones_like(found) if asked is None else np.array(asked, dtype=float)[None])


@st.composite
def several(draw: st.DrawFn) -> Answers:
    """Answers of one to four lengths, two haystacks or more, some prompts not asked."""
    lengths, haystacks, depths, seed = (draw(st.integers(*ends)) for ends in ((1, 4), (2, 12), (1, 6), (0, 2**31)))
    rng = np.random.default_rng(seed)
    asked = (rng.random((lengths, haystacks, depths)) < draw(st.sampled_from([0.7, 1.0]))).astype(float)
    asked[:, :2, 0] = 1
    return Answers(right=asked * (rng.random(asked.shape) < rng.random((lengths, haystacks, 1))), asked=asked)


@given(several())
def test_an_interval_holds_its_score_and_has_a_width(answers: Answers) -> None:
    for score, ends in zip(answers.scores, list_intervals(answers), strict=True):
        assert ends
        assert 0 <= ends[0] <= score <= ends[1] <= 1
        assert ends[1] - ends[0] > 0.01


@given(several())
def test_an_interval_of_right_answers_mirrors_that_of_wrong_ones(answers: Answers) -> None:
    mirrored = Answers(right=answers.asked - answers.right, asked=answers.asked)
    for ends, other in zip(list_intervals(answers), list_intervals(mirrored), strict=True):
        assert ends
        assert other
        assert ends == pytest.approx((1 - other[1], 1 - other[0]), abs=1e-9)


@given(several(), st.integers(0, 2**31))
def test_the_order_of_haystacks_makes_no_difference_to_an_interval(answers: Answers, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(answers.asked.shape[1])
    shuffled = Answers(right=answers.right[:, order], asked=answers.asked[:, order])
    np.testing.assert_allclose(np.array(list_intervals(shuffled)), np.array(list_intervals(answers)), atol=1e-9)


@given(several())
def test_draws_are_the_same_every_time_and_have_the_score_in_their_middle(answers: Answers) -> None:
    draws = draw_scores(answers)
    assert draws.shape == (len(answers.scores), DRAWS)
    np.testing.assert_array_equal(draws, draw_scores(answers))
    for row, score, ends in zip(draws, answers.scores, list_intervals(answers), strict=True):
        assert ends
        width = ends[1] - ends[0]
        assert np.median(row) == pytest.approx(score, abs=1e-9 + 0.02 * width)


def test_draws_have_the_ends_of_the_interval_as_quantiles() -> None:
    """Over 58 numbers of haystacks, each with 1,000 numbers of its own and their negatives: the standard error of 2.5 % is 0.05 %."""
    rng, below, above = np.random.default_rng(4), [], []
    for haystacks in range(2, 60):
        chances = 0.1 + 0.8 * rng.random((haystacks, 1))
        right = (rng.random((haystacks, 6)) < chances).astype(float)
        right[0, :2] = 0, 1
        answers = make(right)
        (row,), (ends,) = draw_scores(answers), list_intervals(answers)
        assert ends
        below.append(np.mean(row < ends[0] - 1e-12))
        above.append(np.mean(row > ends[1] + 1e-12))
    assert np.mean(below) == pytest.approx(0.025, abs=0.002)
    assert np.mean(above) == pytest.approx(0.025, abs=0.002)


@pytest.mark.parametrize("right", [0, 1])
def test_draws_have_the_other_end_of_the_interval_as_a_quantile_where_all_answers_are_alike(right: int) -> None:
    answers = make(np.full((9, 4), right))
    (row,), (ends,) = draw_scores(answers), list_intervals(answers)
    assert ends
    assert ends[right] == right
    within = row <= ends[1] if right == 0 else row >= ends[0]
    assert np.mean(within) == pytest.approx(0.975, abs=0.01)  # 1,000 numbers and their negatives: 0.3 %


def test_lengths_that_the_same_haystacks_make_hard_are_drawn_together_and_others_apart() -> None:
    rng = np.random.default_rng(5)
    haystacks = rng.random(30)
    alike = (rng.random((1, 30, 20)) < haystacks[None, :, None]).astype(float)
    apart = (rng.random((1, 30, 20)) < rng.permutation(haystacks)[None, :, None]).astype(float)
    right = np.concatenate([alike, alike, apart])
    correlation = np.corrcoef(draw_scores(Answers(right=right, asked=np.ones_like(right))))
    assert correlation[0, 1] > 0.99
    assert abs(correlation[0, 2]) < 0.5


def test_one_prompt_a_haystack_is_wilsons_own_interval() -> None:
    answers = make([[1], [1], [0], [1]])
    assert list_intervals(answers) == [wilson(3, 4)]


def test_haystacks_that_are_all_right_or_all_wrong_are_worth_less_than_one_prompt_each() -> None:
    """Half of ten haystacks right at all ten depths: variance 0.25 / 9, so worth 9 prompts, and less since it is known from ten."""
    size = size_effectively(make([[1] * 10] * 5 + [[0] * 10] * 5))[0]
    assert size == pytest.approx(9 * (1.959964 / t_quantile(9)) ** 2, rel=1e-6)


def test_a_model_that_always_finds_the_same_depths_is_known_better_than_by_prompts_and_not_for_certain() -> None:
    answers = make([[1] * 5 + [0] * 5] * 10)
    size = size_effectively(answers)[0]
    assert 100 < size < 1000
    ends = list_intervals(answers)[0]
    assert ends
    assert ends[0] < 0.5 < ends[1]


def test_all_right_is_less_certain_with_few_haystacks_and_never_certain() -> None:
    lows = []
    for haystacks in (2, 5, 10, 50):
        ends = list_intervals(make([[1] * 10] * haystacks))[0]
        assert ends
        assert ends[1] == 1
        lows.append(ends[0])
    assert lows == sorted(lows)
    assert lows[0] < 0.2 < 0.9 < lows[-1] < 1


def test_one_wrong_answer_of_a_hundred_gives_no_higher_lower_end_than_none() -> None:
    right = np.ones((10, 10))
    all_right = list_intervals(make(right))[0]
    right[3, 4] = 0
    one_wrong = list_intervals(make(right))[0]
    assert all_right
    assert one_wrong
    assert one_wrong[0] < all_right[0]


def test_many_prompts_of_one_haystack_have_no_interval() -> None:
    answers = make([[1, 0, 1]])
    assert list_intervals(answers) == [None]
    assert np.isnan(draw_scores(answers)).all()
