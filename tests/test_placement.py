"""Tokens at chosen positions: one number each, from which both come back, and which share where both are equal."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from harness_ext.models.prefix_tree import Batch, plan
from harness_ext.placement import join, list_positions, read_ids, read_positions

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20)


@given(IDS, st.data())
def test_ids_and_positions_come_back(ids: list[int], data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, 2**30), min_size=len(ids), max_size=len(ids)))
    numbers = join(ids, np.array(positions))
    assert read_ids(numbers).tolist() == ids
    found = read_positions(numbers[None], 0)
    assert positions == (list(range(len(ids))) if found is None else found[0].tolist())
    assert (numbers >= 0).all()


@given(IDS)
def test_tokens_at_their_own_index_are_their_ids(ids: list[int]) -> None:
    assert join(ids, np.arange(len(ids))).tolist() == ids


def test_a_part_is_read_where_it_stands_in_the_whole() -> None:
    numbers = join([5, 6, 7, 8], np.array([0, 1, 9, 10]))
    found = read_positions(numbers[None, 2:], 2)
    assert found is not None
    assert found.tolist() == [[9, 10]]
    assert read_positions(numbers[None, :2], 0) is None


def test_a_tree_shares_what_has_the_same_tokens_at_the_same_positions_and_no_more() -> None:
    plain, jumped, farther = (join([7, 8, 9, 4], np.array(p)) for p in ([0, 1, 2, 3], [0, 1, 6, 7], [0, 1, 6, 8]))
    found = plan([plain, jumped, farther], [3, 3, 3], Batch())
    assert (found.asked, found.computed) == (12, 2 + 2 + 1 + 2)


@given(st.integers(1, 50), st.integers(1, 7), st.integers(1, 7))
def test_squeezed_positions_never_decrease_and_fill_their_room(tokens: int, room: int, rest: int) -> None:
    positions = list_positions([(0, 3, 0, room, room + rest)], tokens)
    assert (np.diff(positions) >= 0).all()
    assert (np.diff(positions) <= 1).all()
    assert positions[0] == 3
    assert positions[-1] == 3 + (tokens - 1) * room // (room + rest)
