"""95 % intervals against planted truths: they hold them 93 to 97 times of 100, and where they hold them more often, why.

Answers are drawn from true scores, with haystacks that make theirs alike, and go through the functions that publish a run. Seeds
are fixed. Each mean is over enough draws that its own standard error is below 0.7 points, so that 93 to 97 is more than two of them.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from harness_ext.results.clusters import Answers, draw_scores, list_intervals
from harness_ext.results.effective_length import RULES, Reading, find_longest, measure_length
from harness_ext.results.statistics import t_interval, wilson

SPREADS = (0.0, 1.0, 2.0)


def load_coverage() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_of_intervals", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


coverage = load_coverage()


@functools.cache
def simulate_curves() -> dict[str, list[tuple[bool, float | None]]]:
    """Figure → (held, error), over numbers of haystacks and how much they differ."""
    rng = np.random.default_rng(11)
    found: dict[str, list[Any]] = {}
    for haystacks in coverage.HAYSTACKS:
        for spread in SPREADS:
            for figure, rows in coverage.simulate(rng, haystacks, spread, 100).items():
                found.setdefault(figure, []).extend(rows)
    return found


def share_held(figure: str) -> float:
    return float(np.mean([held for held, _ in simulate_curves()[figure]]))


@functools.cache
def cover_points() -> dict[tuple[int, float], float]:
    """(haystacks, correlation) → coverage of one length's interval, true scores even between 0.02 and 0.98."""
    rng = np.random.default_rng(12)
    found = {}
    for haystacks in coverage.HAYSTACKS:
        for correlation in coverage.CORRELATIONS:
            truths = rng.uniform(0.02, 0.98, 1500)
            answers = coverage.draw_alike(rng, truths, haystacks, coverage.DEPTHS, correlation)
            found[haystacks, correlation] = coverage.count_covered(list_intervals(answers), truths.tolist())
    return found


def test_cells_intervals_hold_the_planted_accuracy() -> None:
    rng = np.random.default_rng(13)
    truths, sizes = rng.uniform(0.02, 0.98, 20_000), rng.choice([10, 20, 50, 100], 20_000)
    right = rng.binomial(sizes, truths)
    held = [low <= truth <= high for truth, (low, high) in zip(truths, map(wilson, right.tolist(), sizes.tolist()), strict=True)]
    assert 0.93 <= np.mean(held) <= 0.97


@pytest.mark.parametrize("haystacks", coverage.HAYSTACKS)
def test_points_intervals_hold_the_planted_score_with_few_haystacks_and_many(haystacks: int) -> None:
    by_correlation = [held for (count, _), held in cover_points().items() if count == haystacks]
    assert 0.93 <= np.mean(by_correlation) <= 0.97


def test_at_no_correlation_of_haystacks_does_a_points_interval_fall_far_from_95() -> None:
    """With five haystacks it is too wide where they do not differ, and too narrow where half of what answers differ by is theirs."""
    assert min(cover_points().values()) > 0.91
    assert max(cover_points().values()) < 0.99


def test_intervals_that_take_prompts_as_independent_hold_it_too_seldom_by_far() -> None:
    rng = np.random.default_rng(14)
    truths = rng.uniform(0.02, 0.98, 1000)
    answers = coverage.draw_alike(rng, truths, 10, coverage.DEPTHS, 0.3)
    dropped = coverage.list_dropped(rng, answers)
    assert coverage.count_covered(dropped["Wilson, prompts independent"], truths.tolist()) < 0.8
    assert coverage.count_covered(dropped["percentile bootstrap"], truths.tolist()) < 0.92


@pytest.mark.parametrize("figure", ["point", "area past", "half-length"])
def test_a_curves_intervals_hold_the_planted_figure(figure: str) -> None:
    assert 0.93 <= share_held(figure) <= 0.97


def test_where_nearly_all_answers_are_right_or_wrong_intervals_hold_it_more_often() -> None:
    """Ten or a hundred answers have few counts there, and an interval that holds no less than 95 % holds more (Brown, Cai and
    DasGupta 2001, "Interval estimation for a binomial proportion", Statistical Science 16(2))."""
    assert 0.95 <= share_held("point outside 0.02 to 0.98") < 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_an_effective_lengths_interval_holds_the_planted_one_and_mostly_more_often(rule: Any) -> None:
    """It is one of lengths that were run, and most truths are far from the next: 95 % is the least, not the mean."""
    assert share_held(rule.name) >= 0.97


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_estimate_of_the_effective_length_is_unbiased_within_a_grid_step(rule: Any) -> None:
    """The grid's step is a doubling; so is the error's unit. It is a tenth of one, where one is allowed."""
    errors = [error for _, error in simulate_curves()[rule.name] if error is not None]
    assert len(errors) > 500
    assert abs(np.mean(errors)) < 0.1
    assert np.mean(np.abs(errors)) < 0.5


def test_the_estimates_of_scores_area_and_half_length_are_unbiased() -> None:
    for figure, most in (("point", 0.005), ("area past", 0.005), ("half-length", 0.05)):
        errors = [error for _, error in simulate_curves()[figure] if error is not None]
        assert abs(np.mean(errors)) < most


@pytest.mark.parametrize("planted", coverage.MULTIPLES)
def test_a_model_that_answers_up_to_a_planted_length_and_no_further_has_that_length_by_every_rule(planted: float) -> None:
    rng = np.random.default_rng(15)
    truth = np.array([0.97 if multiple <= planted else 0.05 for multiple in coverage.MULTIPLES])
    for _ in range(20):
        answers = coverage.draw_alike(rng, truth, 10, coverage.DEPTHS, 0.1)
        for rule in RULES:
            found = measure_length(rule, read(answers))
            assert found.tokens == planted * coverage.TRAINED
            assert found.outcome == ("at_least" if planted == coverage.MULTIPLES[-1] else "measured")
            assert found.lower is not None
            assert found.upper is not None
            assert found.lower <= planted * coverage.TRAINED <= found.upper


def test_where_a_score_is_next_to_the_threshold_an_interval_misses_as_often_as_one_of_95_percent_may() -> None:
    """The hardest truth: one length's score is just above the threshold, or just below. Only one end can miss: 2.5 times of 100."""
    rng = np.random.default_rng(16)
    shares = []
    for rule, side in itertools.product(RULES, (-1, 1)):
        critical = rule.threshold * (0.95 if rule.relative else 1.0) + side * 1e-4
        truth = np.array([0.95, 0.95, critical, min(0.1, critical / 4), 0.02])
        true = place_longest(rule, truth)
        assert true == coverage.TRAINED * (2 if side > 0 else 1)
        found = [measure_length(rule, read(coverage.draw_alike(rng, truth, 10, coverage.DEPTHS, 0.1))) for _ in range(400)]
        shares.append(np.mean([(one.lower or 0) <= true <= (one.upper or 0) for one in found]))
    assert 0.965 <= np.mean(shares) <= 0.985
    assert min(shares) > 0.94


def place_longest(rule: Any, truth: Any) -> float:
    within = np.array(coverage.MULTIPLES) <= 1
    return float(coverage.MULTIPLES[int(find_longest(rule, truth[:, None], within)[0])] * coverage.TRAINED)


def read(answers: Answers) -> Reading:
    tokens = tuple(int(multiple * coverage.TRAINED) for multiple in coverage.MULTIPLES)
    return Reading(tokens=tokens, multiples=coverage.MULTIPLES, scores=answers.scores, draws=draw_scores(answers))


def test_a_losss_interval_holds_the_planted_loss() -> None:
    rng = np.random.default_rng(17)
    held = []
    for _ in range(4000):
        ends = t_interval(rng.gamma(20, 0.1, rng.choice([5, 10, 20])).tolist())
        assert ends
        held.append(ends[0] <= 2.0 <= ends[1])
    assert 0.93 <= np.mean(held) <= 0.97


def test_two_models_that_are_right_equally_often_seldom_differ_by_haystacks_and_often_by_prompts() -> None:
    rng = np.random.default_rng(18)
    by_prompt, by_haystack = coverage.reject_alike(rng, 10, 1.0, 800)
    assert by_haystack <= 0.065
    assert by_prompt > 0.15
