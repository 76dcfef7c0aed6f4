"""What a model was given, in sixteen characters: equal where two runs saw the same tokens and were asked the same of them."""

from __future__ import annotations

import array
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

DIGITS = 16
"""Hexadecimal, of SHA-256's 64: among ten million prompts two that differ share them with a chance of 3 in a million."""


def fingerprint(ids: Sequence[int], rest: int | Mapping[str, Any]) -> str:
    """The first 16 hex digits of SHA-256 over the token ids (four bytes each, the lowest first) and, as JSON, what is done with them.

    `rest` is at which of them the answer begins, where it is scored; where one is generated, by which settings.

    >>> fingerprint([5, 6, 7], 2), fingerprint([5, 6, 7], 1), fingerprint([5, 6, 7], {"max_gen_toks": 8})
    ('31d79d8df019a601', 'bba12a08edf4c4dd', '37b89f549e840930')
    """
    numbers = array.array("I", ids)  # twice as fast as numpy here, and fast enough to be nothing beside tokenising
    if sys.byteorder == "big":
        numbers.byteswap()
    digest = hashlib.sha256(numbers.tobytes())
    digest.update(json.dumps(rest, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:DIGITS]
