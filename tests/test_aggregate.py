"""Prompts to cells and cells to curves: what is counted, and what never becomes a number."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness_ext.results.aggregate import make_cell, make_curve, profile_depths
from harness_ext.results.records import Cell, Prompt
from harness_ext.results.statistics import t_interval, wilson

TRAINED = 256
VERDICTS = ("exact", "lenient", "wrong_value", "no_value", "cut_off", "missed")


def ask(sample: int, verdict: Any = "exact", **changes: Any) -> Prompt:
    fields = {"log_likelihood": -1.0, "tokens": 5, "prompt_tokens": 128, "fingerprint": "0" * 16, **changes}
    return Prompt(sample=sample, verdict=verdict, **fields)


def make(prompts: list[Prompt], length: int = 128, depth: float | None = 0.0, **changes: Any) -> Cell:
    fields: dict[str, Any] = {"multiple": length / TRAINED, "outcome": "measured", **changes}
    return make_cell(
        evaluation_result_id="0" * 16,
        evaluation_id="0" * 16,
        evaluation_name="passkey",
        length=length,
        depth=depth,
        prompts=prompts,
        **fields,
    )


def make_sweep(right: dict[int, float], haystacks: int = 10, depths: int = 10, seed: int = 0) -> list[Cell]:
    """Cells of a sweep: length → share of right answers."""
    rng = random.Random(seed)
    return [
        make(
            [ask(sample, "exact" if rng.random() < share else "missed") for sample in range(haystacks)],
            length,
            depth / (depths - 1),
        )
        for length, share in right.items()
        for depth in range(depths)
    ]


# ---------------------------------------------------------------------- cells


@given(st.lists(st.sampled_from(VERDICTS), min_size=1, max_size=30))
def test_a_cell_counts_each_answer_once_as_a_success_or_as_one_kind_of_miss(verdicts: list[str]) -> None:
    cell = make([ask(sample, verdict) for sample, verdict in enumerate(verdicts)])
    assert cell.n == len(verdicts) == (cell.successes or 0) + sum(cell.misses.values())
    assert "exact" not in cell.misses
    assert 0 not in cell.misses.values()
    assert cell.score_details
    interval = cell.score_details.uncertainty.confidence_interval
    assert interval
    assert (interval.lower, interval.upper, interval.method) == (*wilson(cell.successes or 0, cell.n), "wilson")
    assert cell.score_details.score == (cell.successes or 0) / cell.n


def test_prompts_come_by_sample_whatever_their_order() -> None:
    prompts = [ask(sample, "exact" if sample % 3 else "missed") for sample in range(9)]
    assert make(prompts[::-1]) == make(prompts)


def test_the_mean_log_likelihood_is_over_finite_ones_and_none_where_there_is_none() -> None:
    assert make([ask(0, log_likelihood=-1.0), ask(1, log_likelihood=None), ask(2, log_likelihood=-4.0)]).mean_log_likelihood == -2.5
    assert make([ask(0, log_likelihood=None)]).mean_log_likelihood is None


def test_a_cell_that_was_not_measured_has_no_score_and_takes_no_prompts() -> None:
    cell = make([], outcome="out_of_memory", reason="40 GB asked for")
    assert (cell.n, cell.successes, cell.score_details, cell.mean_log_likelihood, cell.misses) == (0, None, None, None, {})
    with pytest.raises(ValueError, match="2 prompts of a cell that is out_of_memory"):
        make([ask(0), ask(1)], outcome="out_of_memory")


def test_a_measured_cell_without_prompts_has_no_score() -> None:
    cell = make([])
    assert (cell.n, cell.successes, cell.score_details) == (0, None, None)


def test_a_loss_is_the_mean_over_texts_in_nats_per_token_with_students_interval() -> None:
    cell = make([ask(0, "loss", log_likelihood=-20.0, tokens=10), ask(1, "loss", log_likelihood=-15.0, tokens=5)], depth=None)
    assert cell.score_details
    assert cell.score_details.score == 2.5
    interval = cell.score_details.uncertainty.confidence_interval
    assert interval
    assert (interval.lower, interval.upper, interval.method) == (*(t_interval([2.0, 3.0]) or ()), "t")
    assert (cell.successes, cell.misses) == (None, {})


def test_a_loss_of_one_text_has_no_interval_and_an_infinite_one_no_score() -> None:
    one = make([ask(0, "loss", log_likelihood=-20.0, tokens=10)], depth=None).score_details
    assert one
    assert one.uncertainty.confidence_interval is None
    broken = make([ask(0, "loss", log_likelihood=-20.0), ask(1, "loss", log_likelihood=None)], depth=None)
    assert broken.score_details is None
    assert broken.reason == "the loss of a text is no finite number"


# ---------------------------------------------------------------------- curves


def test_a_point_pools_its_depths_and_its_interval_is_wider_than_if_prompts_were_independent() -> None:
    """Five haystacks are answered at every depth, and five at none."""
    cells = [
        make([ask(sample, "exact" if sample < 5 else "missed") for sample in range(10)], depth=depth / 9) for depth in range(10)
    ]
    (point,) = make_curve(cells).points
    assert point.score_details
    interval = point.score_details.uncertainty.confidence_interval
    assert interval
    assert (point.score_details.score, point.score_details.uncertainty.num_samples) == (0.5, 100)
    assert interval.method == "clustered_wilson"
    low, high = wilson(50, 100)
    assert interval.lower < low - 0.1
    assert interval.upper > high + 0.1


@given(st.integers(0, 2**31))
def test_a_curve_is_a_function_of_its_cells_whatever_their_order_and_ids(seed: int) -> None:
    cells = make_sweep({128: 1.0, 256: 0.9, 512: 0.6, 1024: 0.2}, haystacks=4, depths=3, seed=seed)
    mixed = [msgspec.structs.replace(cell, evaluation_id="f" * 16, evaluation_result_id="e" * 16) for cell in cells]
    random.Random(seed).shuffle(mixed)
    assert make_curve(mixed) == make_curve(cells)


def test_a_length_of_which_a_depth_is_missing_has_no_score_and_counts_nowhere() -> None:
    cells = make_sweep({128: 1.0, 256: 1.0, 512: 1.0, 1024: 0.0})
    whole = make_curve(cells)
    cells[-1] = make([], 1024, 1.0, outcome="interrupted", reason="stopped")
    curve = make_curve(cells)
    assert [point.outcome for point in curve.points] == ["measured", "measured", "measured", "interrupted"]
    assert curve.points[-1].score_details is None
    assert curve.points[-1].reason == "stopped"
    assert curve.points[:3] == whole.points[:3]
    for found in curve.effective_lengths:
        assert (found.outcome, found.tokens, found.reason) == ("at_least", 512, "1024 tokens: interrupted")
    assert curve.area_past.value == 1.0
    assert curve.half_length.value is None


def test_a_learned_tables_end_is_no_zero() -> None:
    cells = [
        *make_sweep({128: 1.0, 256: 1.0}),
        *(make([], 512, depth / 9, outcome="hard_limit", reason="ends") for depth in range(10)),
    ]
    curve = make_curve(cells)
    assert {found.tokens for found in curve.effective_lengths} == {256}
    assert curve.area_past.value is None
    assert curve.area_past.reason == "no length past the trained length was measured: 512 tokens: hard_limit"


def test_nothing_measured_gives_no_figure_and_says_so() -> None:
    curve = make_curve([make([], length, 0.0, outcome="out_of_memory", reason="") for length in (128, 256)])
    assert [point.score_details for point in curve.points] == [None, None]
    assert curve.effective_lengths == []
    assert curve.half_length.reason == curve.area_past.reason == "nothing was measured"


def test_controls_stand_beside_the_curve_and_not_in_it() -> None:
    sweep = make_sweep({128: 1.0, 256: 1.0, 512: 0.0})
    beside = [
        make([ask(sample) for sample in range(10)], 60, None, control="no_haystack"),
        *(make([ask(sample, "missed") for sample in range(10)], 512, depth, control="needle_absent") for depth in (0.0, 1.0)),
        make([], 512, 0.0, control="cropped", outcome="interrupted"),
    ]
    curve = make_curve([*beside, *sweep])
    found = [
        (one.control, one.length, one.score_details.score, one.score_details.uncertainty.num_samples) for one in curve.controls
    ]
    assert found == [("needle_absent", 512, 0.0, 20), ("no_haystack", None, 1.0, 10)]
    assert msgspec.structs.replace(curve, controls=[]) == make_curve(sweep)


def test_a_loss_has_points_and_no_figure_of_right_answers() -> None:
    cells = [
        make([ask(sample, "loss", log_likelihood=-length / 10 - sample) for sample in range(4)], length, None)
        for length in (64, 128, 512)
    ]
    curve = make_curve(cells)
    assert [point.score_details for point in curve.points] == [cell.score_details for cell in cells]
    assert curve.effective_lengths == []
    assert (curve.half_length.value, curve.half_length.reason) == (None, "a loss")


def test_without_a_trained_length_there_are_lengths_and_no_multiples() -> None:
    cells = [msgspec.structs.replace(cell, multiple=None) for cell in make_sweep({128: 1.0, 256: 1.0, 512: 0.0})]
    curve = make_curve(cells)
    assert {found.tokens for found in curve.effective_lengths} == {256}
    assert curve.half_length.reason == "the trained length is unknown"


def test_one_haystack_gives_scores_and_lengths_without_intervals() -> None:
    curve = make_curve(make_sweep({128: 1.0, 256: 1.0, 512: 0.0}, haystacks=1))
    assert curve.points[0].score_details
    assert curve.points[0].score_details.uncertainty.confidence_interval is None
    for found in curve.effective_lengths:
        assert (found.tokens, found.lower, found.upper) == (256, None, None)
    assert (curve.area_past.value, curve.area_past.lower) == (pytest.approx(0.5), None)


def test_a_depth_profile_pools_the_lengths_past_the_trained_one() -> None:
    cells = make_sweep({128: 1.0, 512: 0.5, 1024: 0.5}, depths=3)
    for length in (128, 512, 1024):
        cells.append(make([ask(sample) for sample in range(10)], length, 0.25))
    profile = profile_depths(cells)
    assert list(profile) == [0.0, 0.25, 0.5, 1.0]
    assert profile[0.25].score == 1.0
    assert profile[0.25].uncertainty.num_samples == 20
    inside = profile_depths(cells, above=0, up_to=1)
    assert {one.score for one in inside.values()} == {1.0}
    assert profile_depths([]) == {}


def test_a_default_curve_takes_about_a_millisecond() -> None:
    cells = make_sweep({128: 1.0, 256: 0.95, 512: 0.7, 1024: 0.4, 2048: 0.1})
    make_curve(cells)
    best = math.inf
    for _ in range(20):
        started = time.process_time()
        make_curve(cells)
        best = min(best, time.process_time() - started)
    assert best < 0.005
