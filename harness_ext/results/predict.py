"""What a plain prompt would score at a length at which it was not measured, from prompts that are cheap there.

docs/method.md says how the method was chosen, and how far off it is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from harness_ext.results.causes import Scores, find_ends, find_faults
from harness_ext.results.records import Prediction

Floats = NDArray[np.float64]
NEAREST = 0.005
"""Scores nearer to 0 or 1 than this count as this far from it where odds are taken: none of a hundred is no certainty."""


def predict(scores: Scores, trained: int) -> list[Prediction]:
    """The lengths at which stretched prompts were measured and plain ones were not, shortest first; none without packed ones somewhere.

    A plain prompt has to find its way past unseen positions and among many tokens, and is taken to do the two independently: its score
    at the trained length, times the share of it that a stretched prompt keeps, times the share that a packed one keeps.
    """
    if any(arm in ("long", "stretched") for arm, _ in find_faults(scores, trained)):
        return []
    found = []
    for length in sorted(
        length for arm, length in scores if arm == "stretched" and length > trained and ("long", length) not in scores
    ):
        packed, last = read_packed(scores, length, trained)
        if packed is None or ("stretched", trained) not in scores:
            continue
        value = combine(scores["long", trained], scores["stretched", trained], scores["stretched", length], packed)
        ends = find_ends(value)
        found.append(
            Prediction(
                length=length,
                multiple=length / trained,
                value=float(value[0]),
                lower=ends[0],
                upper=ends[1],
                packed_from=None if last == length else last,
            )
        )
    return found


def combine(plain: Floats, short: Floats, stretched: Floats, packed: Floats) -> Floats:
    """The predicted score: `plain` and `short` at the trained length, `stretched` and `packed` at the one that is asked for.

    >>> combine(*(np.array([score]) for score in (1.0, 1.0, 0.5, 0.8))).tolist()
    [0.4]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.where(short > 0, stretched / short, 0.0) * np.where(plain > 0, packed / plain, 0.0)
    return np.asarray(np.clip(plain * kept, 0.0, 1.0))


def read_packed(scores: Scores, length: int, trained: int) -> tuple[Floats | None, int]:
    """The packed prompts' score at a length, and the length from which it is: itself, or the longest measured before it.

    Past the longest measured, log-odds go on falling over log2 of the length as they did between the last two measured (the plain prompt
    at the trained length is the first); they never rise. None where no packed prompt was measured past the trained length before it.
    """
    measured = sorted(found for arm, found in scores if arm == "packed" and found <= length)
    if ("long", trained) not in scores or not measured:
        return None, 0
    if measured[-1] == length:
        return scores["packed", length], length
    last = measured[-1]
    before = measured[-2] if len(measured) > 1 else trained
    first = _to_odds(scores["packed" if len(measured) > 1 else "long", before])
    second = _to_odds(scores["packed", last])
    slope = np.minimum(0.0, (second - first) / np.log2(last / before))
    return 1 / (1 + np.exp(-(second + slope * np.log2(length / last)))), last


def _to_odds(share: Floats) -> Floats:
    bounded = np.clip(share, NEAREST, 1 - NEAREST)
    return np.asarray(np.log(bounded / (1 - bounded)))
