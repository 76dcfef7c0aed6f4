"""Whether a loaded model lets its tokens be put at other positions than 0, 1, 2, …, found out on the model itself.

That a forward takes `position_ids` proves little: a bias may be counted from the mask or the cache whatever they say, a jump may be
taken for the end of a packed sequence, after which nothing before it is seen, and a recurrent layer counts tokens by reading them. So
random tokens are read with positions given and without, with a jump, with neighbours that share positions, and in chunks, and held against
what one rounding of the embeddings does (`rounding`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness_ext.cells import Limit, Placing
from harness_ext.model_view import first_line
from harness_ext.models.forward import Forward
from harness_ext.models.rounding import ERRORS, Plain, draw, find_tolerance, read_whole
from harness_ext.models.self_check import CHUNKS, TOKENS, read_in_chunks
from harness_ext.models.state import State
from harness_ext.positions import SCHEMES, read_schemes

PLACELESS = frozenset({"none", "recurrent", "memory"})
"""Schemes that take no positions."""
SEGMENTS = "memory_length"
"""The field of a config whose relative positions reach over a segment and its memory, and so never leave what was seen in training."""
JUMP = 11


@dataclass(frozen=True, slots=True)
class _Check:
    """Random tokens of a model, read in one forward at any positions."""

    forward: Forward
    tokens: Tensor

    def at(self, positions: Sequence[int] | None, tokens: Tensor | None = None) -> Plain:
        """Read at these positions, in one forward; at their own for None."""
        placed = None if positions is None else torch.tensor([list(positions)])
        return read_whole(self.forward, self.tokens if tokens is None else tokens, placed)


def find_placing(forward: Forward, limit: Limit | None, make: Callable[[int], State] | None) -> Placing:
    """What becomes of prompts at chosen positions. `limit`: where positions end; `make`: what the model goes on from, if anything."""
    names = read_schemes(forward.model.config, forward.model)
    schemes = " and ".join(SCHEMES[name].title for name in names) or "no known way of taking positions"
    if not forward.takes_positions:
        return _without(forward, names, schemes, "its forward takes no position_ids")
    count = min(TOKENS, (limit.tokens if limit else TOKENS + JUMP) - JUMP)
    if count < 4:
        return Placing(outcome="not_admitted", reason=f"its {count + JUMP} positions are too few to tell")
    check = _Check(forward, draw(forward, count))
    try:
        return _try(check, names, schemes, limit, make)
    except ERRORS as error:
        return Placing(outcome="not_admitted", reason=f"{schemes}: {type(error).__name__}: {first_line(error)}")


@torch.inference_mode()
def _try(check: _Check, names: Sequence[str], schemes: str, limit: Limit | None, make: Callable[[int], State] | None) -> Placing:
    count = check.tokens.shape[1]
    half, tolerance = count // 2, find_tolerance(check.forward)
    jump = [index + (JUMP if index >= half else 0) for index in range(count)]
    plain, jumped = check.at(None), check.at(jump)
    if plain.measure(check.at(range(count)).logits) > tolerance:
        return Placing(outcome="not_admitted", reason=f"{schemes}: positions counted from 0 are not its own")
    if plain.measure(jumped.logits) <= tolerance:
        return _without(check.forward, names, schemes, "position_ids change nothing")
    other = check.tokens.clone()
    other[:, 0] = draw(check.forward, count + 1, seed=1)[:, -1]
    if plain.measure(check.at(None, other).logits, last=1) > tolerance >= jumped.measure(check.at(jump, other).logits, last=1):
        return Placing(
            outcome="not_admitted",
            reason=f"{schemes}: tokens after a jump do not see those before it, as in a packed sequence; "
            "try attn_implementation=sdpa",
        )
    shared = [index // 2 for index in range(count)]
    if make is not None:
        for positions, whole in ((jump, jumped), (shared, check.at(shared))):
            read = read_in_chunks(check.forward, make(count), check.tokens, CHUNKS[0], torch.tensor([positions]))
            if whole.measure(read) > tolerance:
                return Placing(
                    outcome="not_admitted", reason=f"{schemes}: read in chunks, positions come out otherwise than at once"
                )
    return Placing(outcome="measured", reason=schemes, past_end=_find_past_end(check.forward, limit))


def _without(forward: Forward, names: Sequence[str], schemes: str, why: str) -> Placing:
    placeless = PLACELESS | ({"relative"} if getattr(forward.model.config, SEGMENTS, 0) else set())
    outcome: Literal["no_positions", "not_admitted"] = "no_positions" if names and set(names) <= placeless else "not_admitted"
    counted = "; its biases are counted from the mask, or as the keys come" if "alibi" in names else ""
    return Placing(outcome=outcome, reason=f"{schemes}: {why}{counted}")


@torch.inference_mode()
def _find_past_end(forward: Forward, limit: Limit | None) -> str:
    """Why no more tokens can be read than there are positions, at positions that there are; empty where they can."""
    if limit is None:
        return ""
    count = limit.tokens + 2
    try:
        forward(draw(forward, count), None, (count - 1,), torch.arange(count)[None] // 2)
    except ERRORS as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return ""
