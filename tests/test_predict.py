"""Scores of lengths that were not run: predicted from cheaper arms, kept apart, and right where causes are independent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_causes import answer

from harness_ext.results.aggregate import make_curve
from harness_ext.results.causes import Scores
from harness_ext.results.predict import predict, read_packed

TRAINED = 256
shares = st.floats(0.05, 1)


def table(**arms: dict[int, float]) -> Scores:
    """Arm → multiple → score, without draws."""
    return {(arm, multiple * TRAINED): np.array([score]) for arm, found in arms.items() for multiple, score in found.items()}  # type: ignore[misc]


@given(st.tuples(*[shares] * 4))
def test_independent_causes_are_predicted_exactly(chances: tuple[float, ...]) -> None:
    positions, number, positions_further, number_further = chances
    (found,) = predict(
        table(
            long={1: 0.9, 2: 0.9 * positions * number},
            stretched={1: 1.0, 2: positions, 4: positions * positions_further},
            packed={2: 0.9 * number, 4: 0.9 * number * number_further},
        ),
        TRAINED,
    )
    assert (found.length, found.plain_from, found.packed_from) == (1024, 512, 1024)
    assert found.value == pytest.approx(0.9 * positions * number * positions_further * number_further)


def test_what_is_predicted_is_no_point_of_the_curve_and_what_was_measured_is_not_predicted() -> None:
    chance = {("long", 1): 1.0, ("long", 2): 0.9, ("packed", 2): 1.0, ("packed", 4): 0.9}
    chance |= {("stretched", m): share for m, share in ((1, 1.0), (2, 0.9), (4, 0.5), (8, 0.2))}
    curve = make_curve(answer(chance))
    assert [point.multiple for point in curve.points] == [1, 2]
    assert [(one.multiple, one.plain_from, one.packed_from) for one in curve.predictions] == [(4, 512, 1024), (8, 512, 1024)]
    for one in curve.predictions:
        assert one.lower is not None
        assert one.upper is not None
        assert 0 <= one.lower <= one.value <= one.upper <= 1
    assert make_curve(answer(chance | {("long", 4): 0.1, ("long", 8): 0.0})).predictions == []


def test_packed_scores_are_drawn_on_as_they_fell_and_never_rise() -> None:
    falling = table(long={1: 0.9}, packed={2: 0.8, 4: 0.6})
    further = read_packed(falling, 8 * TRAINED, TRAINED)
    assert further
    assert further[0][0] == pytest.approx(1 / (1 + np.exp(-(np.log(1.5) + np.log(1.5) - np.log(4)))))
    rising = read_packed(table(long={1: 0.8}, packed={2: 0.9}), 8 * TRAINED, TRAINED)
    assert rising
    assert rising[0][0] == pytest.approx(0.9)
    assert read_packed(table(long={1: 0.8}), 8 * TRAINED, TRAINED) is None


@pytest.mark.parametrize(
    "scores",
    [
        table(long={1: 0.9}, stretched={1: 1.0, 2: 0.5}),
        table(stretched={1: 1.0, 2: 0.5}, packed={2: 0.5}),
        table(long={1: 0.9}, stretched={2: 0.5}, packed={2: 0.5}),
        table(long={1: 0.3}, stretched={1: 1.0, 2: 0.5}, packed={2: 0.5}),
        table(long={1: 0.9}, stretched={1: 0.3, 2: 0.1}, packed={2: 0.5}),
        table(long={1: 0.9}, packed={2: 0.5}),
    ],
    ids=["packed", "long", "stretched at the trained length", "a good model", "a good short prompt", "stretched"],
)
def test_without_one_of_its_arms_nothing_is_predicted(scores: Scores) -> None:
    assert predict(scores, TRAINED) == []
