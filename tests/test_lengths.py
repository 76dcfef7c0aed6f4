from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness_ext.cells import Limit, TrainedLength
from harness_ext.errors import LengthError
from harness_ext.sweep.lengths import order_cells, plan_lengths
from harness_ext.sweep.spec import TaskSpec

SPEC = {"task": "t", "needle": "{value}", "question": "?"}


@given(st.integers(1, 9), st.integers(1, 13), st.integers(1, 3), st.data())
def test_any_first_prompts_are_balanced_over_lengths_and_depths(
    lengths: int, depths: int, samples: int, data: st.DataObject
) -> None:
    cells = order_cells(lengths, depths, samples)
    assert len(set(cells)) == len(cells) == lengths * depths * samples
    first = cells[: data.draw(st.integers(1, len(cells)))]
    for axis, size in ((0, lengths), (1, depths)):
        counts = Counter(cell[axis] for cell in first)
        assert max(counts.values()) - min(counts.get(i, 0) for i in range(size)) <= 1


def test_multiples_are_taken_of_the_trained_length() -> None:
    plan = plan_lengths(TaskSpec(**SPEC), TrainedLength(tokens=255, source="user"), [])
    assert [length.tokens for length in plan] == [128, 255, 510, 1020, 2040]
    assert [length.label for length in plan][1:3] == ["255 (1x)", "510 (2x)"]


def test_a_length_past_a_limit_says_which() -> None:
    limits = [Limit(tokens=600, outcome="hard_limit", reason="table"), Limit(tokens=300, outcome="backend_limit", reason="server")]
    plan = plan_lengths(TaskSpec(**SPEC), TrainedLength(tokens=256, source="user"), limits)
    assert [length.outcome for length in plan] == ["measured", "measured", "backend_limit", "hard_limit", "hard_limit"]


def test_multiples_of_an_unknown_length_are_refused_and_lengths_are_not() -> None:
    with pytest.raises(LengthError, match="trained_length=N"):
        plan_lengths(TaskSpec(**SPEC), None, [])
    (length,) = plan_lengths(TaskSpec(**SPEC, lengths=(100,)), None, [])
    assert length.multiple is None
