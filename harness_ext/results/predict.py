"""What a plain prompt would score at a length at which it was not measured, from prompts that are cheap there.

docs/method.md says how the method was chosen, and how far off it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from harness_ext.results.causes import Scores, find_ends, find_faults
from harness_ext.results.records import Prediction

Floats = NDArray[np.float64]
NEAREST = 0.005
"""Scores nearer to 0 or 1 than this count as this far from it where they are divided by or odds taken: none of a hundred is no certainty."""


def predict(scores: Scores, trained: int) -> list[Prediction]:
    """The lengths at which stretched prompts were measured and plain ones were not, shortest first.

    From the longest plain prompt before it on, a plain prompt is taken to keep the share of its score that a stretched one keeps between
    the two lengths, times the share that a packed one keeps: to find its way past unseen positions and among many tokens independently.
    None where no packed prompt was measured past the trained length, and where plain or stretched ones fail at it already.
    """
    if any(arm in ("long", "stretched") for arm, _ in find_faults(scores, trained)):
        return []
    return [found for length in _list_lengths(scores, trained) if (found := _predict(scores, length, trained))]


def read_packed(scores: Scores, length: int, trained: int) -> tuple[Floats, int] | None:
    """The packed prompts' score at a length, and the length from which it is: itself, or the longest measured before it.

    Past the longest measured, log-odds go on falling over log2 of the length as they did between the last two measured (the plain prompt
    at the trained length is the first); they never rise. None where no packed prompt was measured past the trained length before it.
    """
    measured = sorted(found for arm, found in scores if arm == "packed" and found <= length)
    if not measured:
        return None
    last = measured[-1]
    if last == length:
        return scores["packed", length], length
    before = measured[-2] if len(measured) > 1 else trained
    first = _to_odds(scores["packed" if len(measured) > 1 else "long", before])
    second = _to_odds(scores["packed", last])
    slope = np.minimum(0.0, (second - first) / np.log2(last / before))
    return 1 / (1 + np.exp(-(second + slope * np.log2(length / last)))), last


def _list_lengths(scores: Scores, trained: int) -> Iterator[int]:
    for arm, length in sorted(scores, key=lambda place: place[1]):
        if arm == "stretched" and length > trained and ("long", length) not in scores:
            yield length


def _predict(scores: Scores, length: int, trained: int) -> Prediction | None:
    packed = read_packed(scores, length, trained)
    start = _find_start(scores, length, trained)
    if packed is None or start is None:
        return None
    was = scores["packed", start] if start > trained else scores["long", trained]
    kept = scores["stretched", length] / np.maximum(scores["stretched", start], NEAREST) * packed[0] / np.maximum(was, NEAREST)
    value = np.clip(scores["long", start] * kept, 0.0, 1.0)
    lower, upper = find_ends(value)
    return Prediction(
        length=length,
        multiple=length / trained,
        value=float(value[0]),
        lower=lower,
        upper=upper,
        plain_from=start,
        packed_from=packed[1],
    )


def _find_start(scores: Scores, length: int, trained: int) -> int | None:
    """The longest length before, from the trained one on, at which plain, stretched and packed prompts were measured."""
    whole = [
        found
        for arm, found in scores
        if arm == "long"
        and trained <= found < length
        and ("stretched", found) in scores
        and (found == trained or ("packed", found) in scores)
    ]
    return max(whole, default=None)


def _to_odds(share: Floats) -> Floats:
    bounded = np.clip(share, NEAREST, 1 - NEAREST)
    return np.asarray(np.log(bounded / (1 - bounded)))
