"""How far scores reach: RULER's own table as the oracle, the figures by hand, and what is never read off."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness_ext.results.effective_length import (
    RULES,
    Reading,
    Rule,
    find_area_past,
    find_fault,
    find_half_length,
    find_longest,
    measure_length,
    weigh,
)

BY_NAME = {rule.name: rule for rule in RULES}
RULER_TOKENS = tuple(1024 * thousand for thousand in (4, 8, 16, 32, 64, 128))

RULER_README = {
    # README.md of github.com/NVIDIA/RULER at commit ebe802cd6c0a12684ddebc6a9ec603282b42ce2c (of 2025): scores at 4K to 128K, and the
    # length that the rule "exceeds 85.6" gives by hand, in K; None where the shortest does not pass.
    "Gemini-1.5-pro": ((96.7, 95.8, 96.0, 95.9, 95.9, 94.4), 128),
    "GPT-4-1106-preview": ((96.6, 96.3, 95.2, 93.2, 87.0, 81.2), 64),
    "Llama3.1 (70B)": ((96.5, 95.8, 95.4, 94.8, 88.4, 66.6), 64),
    "Mistral-Large-2411": ((96.4, 96.3, 95.3, 94.0, 85.9, 48.1), 64),
    "Command-R-plus-0824": ((96.0, 95.1, 94.0, 92.4, 85.4, 64.6), 32),
    "Mixtral-8x7B": ((94.9, 92.1, 92.5, 85.9, 72.4, 44.5), 32),
    "GradientAI/Llama3 (70B)": ((95.1, 94.4, 90.8, 85.4, 80.9, 72.1), 16),
    "GradientAI/Llama3 (8B)": ((92.8, 90.3, 85.7, 79.9, 76.3, 69.5), 16),
    "DBRX": ((95.1, 93.8, 83.6, 63.1, 2.4, 0.0), 8),
    "InternLM2.5": ((88.1, 85.5, 84.5, 82.7, 75.5, 68.9), 4),
    "LWM": ((82.3, 78.4, 73.7, 69.1, 68.1, 65.0), None),
    "LongAlpaca": ((60.6, 57.0, 56.6, 43.6, 0.0, 0.0), None),
    # Where the README's own column says another length: >128K, >128K, >128K, 64K, 64K and 32K. All are scores that its authors were sent.
    "Qwen3-14B": ((98.0, 97.8, 96.4, 96.1, 94.0, 85.1), 64),
    "Qwen3-32B": ((98.4, 96.0, 96.2, 94.4, 91.8, 85.6), 64),  # 85.6 does not exceed 85.6
    "Qwen2.5-7B-Instruct-1M": ((96.8, 95.3, 93.0, 91.1, 90.4, 84.4), 64),
    "Qwen3-8B": ((96.3, 96.0, 91.8, 91.2, 82.1, 77.4), 32),
    "Qwen3-4B": ((95.1, 93.6, 91.0, 87.8, 77.8, 66.0), 32),
    "EXAONE-4.0-1.2B": ((87.0, 86.7, 88.8, 81.1, 77.4), 16),  # not run at 128K
}

RULER_AVERAGES = {
    # Likewise: wAvg. (inc), wAvg. (dec), where the README has them.
    "Gemini-1.5-pro": (95.5, 96.1),
    "GPT-4-1106-preview": (89.0, 94.1),
    "Llama3.1 (70B)": (85.5, 93.7),
    "Mistral-Large-2411": (79.5, 92.5),
    "Command-R-plus-0824": (83.4, 92.4),
    "Mixtral-8x7B": (72.8, 87.9),
    "GradientAI/Llama3 (70B)": (82.6, 90.3),
    "GradientAI/Llama3 (8B)": (78.5, 86.3),
    "DBRX": (38.0, 74.7),
    "InternLM2.5": (77.8, 83.9),
    "LWM": (69.9, 75.7),
    "LongAlpaca": (24.7, 47.9),
}


def read(scores: list[float], multiples: tuple[float, ...] | None = None, draws: bool = False) -> Reading:
    """Scores at 0.5, 1, 2, … of a trained length of 256, each known exactly."""
    chosen = multiples or tuple(2.0 ** (place - 1) for place in range(len(scores)))
    known = np.repeat(np.array(scores)[:, None], 100, axis=1) if draws else None
    return Reading(tokens=tuple(int(256 * one) for one in chosen), multiples=chosen, scores=np.array(scores), draws=known)


# ---------------------------------------------------------------------- RULER


@pytest.mark.parametrize("model", RULER_README)
def test_rulers_published_scores_give_the_length_that_its_rule_gives_by_hand(model: str) -> None:
    scores, thousand = RULER_README[model]
    found = measure_length(
        BY_NAME["ruler_llama2_chat"],
        Reading(tokens=RULER_TOKENS[: len(scores)], multiples=None, scores=np.array(scores) / 100, draws=None),
    )
    assert found.tokens == (thousand and thousand * 1024)
    assert found.outcome == {None: "not_measurable", 128: "at_least"}.get(thousand, "measured")


@pytest.mark.parametrize("model", RULER_AVERAGES)
def test_rulers_weighted_averages_are_the_published_ones_within_their_rounding(model: str) -> None:
    """Each score is rounded to 0.1, and so is the average: together they may differ by 0.1."""
    assert weigh(RULER_README[model][0]) == pytest.approx(RULER_AVERAGES[model], abs=0.1)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_the_decreasing_average_is_the_increasing_one_of_the_scores_reversed(scores: list[float]) -> None:
    assert weigh(scores)[0] == pytest.approx(weigh(scores[::-1])[1])
    assert sum(weigh(scores)) / 2 == pytest.approx(np.mean(scores), abs=1e-9)


# ---------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("rule", "scores", "tokens"),
    [
        ("ruler_llama2_chat", [1.0, 0.9, 0.857, 0.856, 0.1], 512),
        ("ruler_llama2_base", [1.0, 0.9, 0.795, 0.794, 0.1], 512),
        ("yarn", [1.0, 0.9, 0.8, 0.79, 0.1], 512),
        ("yarn", [1.0, 0.9, 0.1, 0.8, 0.1], 1024),
        ("k_max", [1.0, 0.9, 0.3, 0.2, 0.1], 1024),
        ("k_max", [1.0, 0.9, 0.1, 0.9, 0.9], 256),
        ("nolima", [0.8, 0.6, 0.595, 0.594, 0.1], 512),
        ("nolima", [0.8, 0.1, 0.3, 0.1, 0.1], 128),
    ],
)
def test_each_rule_gives_the_longest_length_that_does_what_it_asks(rule: str, scores: list[float], tokens: int) -> None:
    """NoLiMa's base is the mean in the window: 0.7 of the first row, of which 0.595 is 85 %."""
    if scores[:2] == [0.8, 0.1]:
        assert find_fault(read(scores)) == ""
    assert measure_length(BY_NAME[rule], read(scores)).tokens == tokens  # type: ignore[index]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=7), st.sampled_from(RULES))
def test_a_rules_length_is_the_longest_that_passes_when_each_is_looked_at(scores: list[float], rule: Rule) -> None:
    """A readable twin of `find_longest`."""
    within = [multiple <= 1 for multiple in read(scores).multiples or ()]
    bar = rule.threshold
    if rule.relative:
        bar *= float(np.mean([score for score, inside in zip(scores, within, strict=True) if inside]))
    passes = [score > bar + 1e-9 if rule.exceeds else score >= bar - 1e-9 for score in scores]
    if rule.all_shorter:
        passes = [all(passes[: place + 1]) for place in range(len(passes))]
    expected = max((place for place, one in enumerate(passes) if one), default=-1)
    assert find_longest(rule, np.array(scores)[:, None], np.array(within)).tolist() == [expected]


@given(st.lists(st.floats(0, 1), min_size=3, max_size=7), st.sampled_from(RULES), st.integers(0, 2**31))
def test_an_interval_of_lengths_holds_the_estimate(scores: list[float], rule: Rule, seed: int) -> None:
    reading = read(scores)
    draws = np.clip(np.random.default_rng(seed).normal(reading.scores[:, None], 0.2, (len(scores), 200)), 0, 1)
    found = measure_length(rule, Reading(tokens=reading.tokens, multiples=reading.multiples, scores=reading.scores, draws=draws))
    if found.tokens is None:
        assert (found.outcome, found.lower, found.upper) == ("not_measurable", None, None)
        assert found.reason
    else:
        assert found.lower is not None
        assert found.upper is not None
        assert found.lower <= found.tokens <= found.upper
        assert {found.lower, found.upper} <= {0, *reading.tokens}
        assert (found.outcome == "at_least") == (found.tokens == reading.tokens[-1])


def test_scores_that_are_known_exactly_have_an_interval_of_one_length() -> None:
    found = measure_length(BY_NAME["yarn"], read([1.0, 1.0, 0.9, 0.2], draws=True))
    assert (found.lower, found.tokens, found.upper) == (512, 512, 512)


def test_a_length_that_may_not_pass_anywhere_has_0_for_its_lower_end() -> None:
    reading = read([0.81, 0.81, 0.1])
    draws = np.stack([np.linspace(0.7, 0.9, 100), np.linspace(0.7, 0.9, 100), np.full(100, 0.1)])
    found = measure_length(
        BY_NAME["yarn"], Reading(tokens=reading.tokens, multiples=reading.multiples, scores=reading.scores, draws=draws)
    )
    assert (found.lower, found.tokens, found.upper) == (0, 256, 256)


# ---------------------------------------------------------------------- not measurable


def test_a_model_that_fails_inside_its_own_window_has_no_figure_at_all() -> None:
    """A fourth of the answers right, as by chance among four keys, and the same past the window: no rule calls that a length."""
    reading = read([0.22, 0.25, 0.25, 0.9])
    for rule in RULES:
        found = measure_length(rule, reading)
        assert (found.outcome, found.tokens, found.lower, found.upper) == ("not_measurable", None, None, None)
        assert "fails inside its own window" in found.reason
    for derived in (find_half_length(reading), find_area_past(reading)):
        assert (derived.value, derived.lower, derived.upper) == (None, None, None)
        assert "fails inside its own window" in derived.reason


def test_a_model_below_a_rules_threshold_in_its_window_is_not_measurable_by_that_rule_alone() -> None:
    reading = read([0.7, 0.7, 0.9, 0.1])
    assert "at least 0.8" in measure_length(BY_NAME["yarn"], reading).reason
    assert measure_length(BY_NAME["yarn"], reading).outcome == "not_measurable"
    assert measure_length(BY_NAME["k_max"], reading).tokens == 512
    assert find_half_length(reading).value is not None


def test_without_a_measured_length_in_the_window_nothing_is_read_off() -> None:
    reading = read([0.9, 0.8], multiples=(2.0, 4.0))
    for rule in RULES:
        assert "no length up to the trained length" in measure_length(rule, reading).reason
    assert find_half_length(reading).value is None
    assert find_area_past(reading).value is None


def test_without_a_trained_length_there_are_lengths_but_no_multiples() -> None:
    reading = Reading(tokens=(128, 256, 512), multiples=None, scores=np.array([0.9, 0.9, 0.1]), draws=None)
    assert measure_length(BY_NAME["yarn"], reading).tokens == 256
    assert find_half_length(reading).reason == find_area_past(reading).reason == "the trained length is unknown"


def test_a_longest_length_that_passes_says_why_no_longer_one_was_measured() -> None:
    reading = Reading(
        tokens=(128, 256), multiples=(0.5, 1.0), scores=np.array([1.0, 1.0]), draws=None, unmeasured="512 tokens: hard_limit"
    )
    found = measure_length(BY_NAME["yarn"], reading)
    assert (found.outcome, found.tokens, found.reason) == ("at_least", 256, "512 tokens: hard_limit")
    assert find_area_past(reading).reason == "no length past the trained length was measured: 512 tokens: hard_limit"


# ---------------------------------------------------------------------- half-length and area


def test_half_of_the_in_window_score_is_left_where_the_line_over_the_logarithm_says() -> None:
    """From 0.6 at 2x to 0.4 at 4x: 0.5 is half-way between them on a logarithmic axis."""
    assert find_half_length(read([1.0, 1.0, 0.6, 0.4])).value == pytest.approx(2**1.5)


def test_a_fall_inside_the_window_has_its_half_length_there_and_a_dip_at_short_lengths_is_none() -> None:
    assert find_half_length(read([0.2, 1.0, 1.0, 0.1])).value == pytest.approx(2 ** (1 + 0.7 / 0.9))
    fallen = find_half_length(read([1.0, 0.2, 0.0]))
    assert fallen.value == pytest.approx(0.5 * 2 ** (0.7 / 0.8))


def test_a_half_length_that_was_not_reached_has_no_value_and_says_from_where_on_it_can_be() -> None:
    found = find_half_length(read([1.0, 1.0, 0.9, 0.75], draws=True))
    assert (found.value, found.lower, found.upper) == (None, 4.0, None)
    assert found.reason == "not reached: at 4x, the longest that was measured, 0.75 of the in-window score is left"


@given(st.floats(0.5, 1), st.integers(3, 7))
def test_a_flat_curve_has_its_own_height_as_area_and_no_half_length(height: float, lengths: int) -> None:
    reading = read([height] * lengths)
    assert find_area_past(reading).value == pytest.approx(height)
    assert find_half_length(reading).value is None


@given(st.lists(st.floats(0, 1), min_size=4, max_size=7))
def test_the_area_is_the_mean_over_the_logarithm_by_fine_steps(scores: list[float]) -> None:
    scores[1] = 1.0
    reading = read(scores)
    steps = np.linspace(0, math.log2(reading.multiples[-1]), 200_001)  # type: ignore[index]
    fine = np.interp(steps, np.log2(reading.multiples), scores)  # type: ignore[arg-type]
    assert find_area_past(reading).value == pytest.approx(fine.mean(), abs=1e-4)


def test_the_area_begins_at_the_trained_length_where_that_itself_was_not_run() -> None:
    """0.8 at half of it and 0.4 at twice: 0.6 at it, and so 0.5 on the way to twice."""
    assert find_area_past(read([0.8, 0.4], multiples=(0.5, 2.0))).value == pytest.approx(0.5)


@pytest.mark.parametrize(("first", "second"), list(itertools.pairwise([0.1, 0.4, 0.7, 1.0])))
def test_a_higher_score_past_the_window_never_gives_a_smaller_figure(first: float, second: float) -> None:
    low, high = read([1.0, 1.0, first, 0.05]), read([1.0, 1.0, second, 0.05])
    assert (find_half_length(low).value or 0) < (find_half_length(high).value or 0)
    assert (find_area_past(low).value or 0) < (find_area_past(high).value or 0)
    for rule in RULES:
        assert (measure_length(rule, low).tokens or 0) <= (measure_length(rule, high).tokens or 0)
