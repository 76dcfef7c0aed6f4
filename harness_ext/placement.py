"""Where a prompt's tokens stand, when they do not stand at 0, 1, 2, …: runs of positions, and tokens and positions as one number each.

A run is `(first, position, origin, numerator, denominator)`: from token `first` on, up to the next run's, token k stands at
`position + (k − origin) × numerator // denominator`. `(first, p, first, 1, 1)` goes on one by one from p; a numerator below the
denominator squeezes, so that neighbours share positions, which never decrease.

A token that stands at its own index is its id. Elsewhere the distance to it goes into the upper half of the number, so that a prefix tree
over such numbers shares what has the same tokens at the same positions, and knows nothing of either. A token stands at most 2³⁰ after its index, and less before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
PlacementRun = tuple[int, int, int, int, int]
"""As above; in JSON, a list of them."""

_IDS = 2**32 - 1


def list_positions(runs: Sequence[Sequence[int]], tokens: int) -> Numbers:
    """(tokens,): the position of each token.

    >>> list_positions([(0, 0, 0, 1, 1), (2, 10, 2, 1, 1)], 4).tolist(), list_positions([(0, 0, 0, 1, 2)], 4).tolist()
    ([0, 1, 10, 11], [0, 0, 1, 1])
    """
    index = np.arange(tokens, dtype=np.int64)
    ends = [*(run[0] for run in runs[1:]), tokens]
    positions = index.copy()
    for (first, position, origin, numerator, denominator), end in zip(runs, ends, strict=True):
        positions[first:end] = position + (index[first:end] - origin) * numerator // denominator
    return positions


def join(ids: Sequence[int], positions: Numbers) -> Numbers:
    """(tokens,): token ids and their positions as one number each."""
    away = positions - np.arange(len(ids), dtype=np.int64)
    folded = np.where(away > 0, 2 * away - 1, -2 * away)
    return np.asarray(ids, dtype=np.int64) + (folded << 32)


def read_ids(numbers: Numbers) -> Numbers:
    """The token ids of such numbers, in any shape."""
    return numbers & _IDS


def read_positions(numbers: Numbers, first: int) -> Numbers | None:
    """The positions of numbers (rows, tokens), of which the first column stands at index `first`; None where all are their indices.

    >>> read_positions(join([7, 8, 9], np.array([0, 5, 1]))[None], 0).tolist(), read_positions(np.array([[7, 8]]), 3)
    ([[0, 5, 1]], None)
    """
    folded = numbers >> 32
    if not folded.any():
        return None
    away = np.where(folded & 1, (folded + 1) // 2, -(folded // 2))
    return np.asarray(away + np.arange(first, first + numbers.shape[1], dtype=np.int64))
