"""Whether a model answers a row of a batch as it answers it alone, found out on the loaded model itself.

Rows of unequal lengths are padded: on the right where they are scored, since a causal model's tokens do not see what comes after them, and
on the left where answers are generated, with a mask. Some models see the padding all the same: a recurrence runs over it, an
attention in buckets or by relative distance counts it; and some mix up the rows of a batch as they generate. So random tokens are put beside
others, longer and as long, and held against themselves alone, in units of what one rounding of the embeddings does (`rounding`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from harness_ext.models.forward import Forward
from harness_ext.models.prefix_tree import Batch
from harness_ext.models.rounding import Plain, draw, find_difference, read_whole
from harness_ext.models.self_check import FEWEST, TOKENS
from harness_ext.models.state import State

log = logging.getLogger(__name__)

Make = Callable[[int], State]
NEW = 4
"""Tokens to generate."""
PADDING = 5
"""Tokens."""


class BatchChecks:
    """The checks of a model. Each is made when it is first asked about, and again where later prompts are longer than those were.

    `make`: what makes a state with room for so many tokens; `most`: how far may be read, in tokens.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self._found: dict[str, tuple[int, bool]] = {}

    def forget(self) -> None:
        """The model reads otherwise from here on."""
        self._found.clear()

    def generates(self, make: Make, most: int) -> bool:
        """Whether `generate` goes on from a state as it does from the whole prompt."""
        return self._holds("answers are generated from whole prompts", _measure_going_on, most, make)

    def limit(self, kind: Kind, batch: Batch, most: int, *given: Make) -> Batch:
        """What of a batch holds for the model: all of it, rows of one length, or one row. `given`: what makes a state, if one is gone on from."""
        if batch.rows == 1:
            return batch
        measure = MEASURES[kind]
        if self._holds(f"only prompts of one length are {kind} together", measure, most, PADDING, *given):
            return batch
        if self._holds(f"prompts are {kind} one at a time", measure, most, 0, *given):
            return dataclasses.replace(batch, equal=True)
        return dataclasses.replace(batch, rows=1)

    def _holds(self, otherwise: str, measure: Callable[..., float], most: int, *given: Any) -> bool:
        count = min(TOKENS, max(most, FEWEST))
        checked, found = self._found.get(otherwise, (0, True))
        if found and checked < count:
            why = find_difference(self.forward, functools.partial(measure, self.forward, count - NEW, *given))
            found = not why
            if why:
                log.warning("%s: %s", otherwise, why)
            self._found[otherwise] = count, found
        return found


def _measure_going_on(forward: Forward, count: int, make: Make) -> float:
    tokens, state = draw(forward, count), make(TOKENS)
    if not state.alone:
        raise NotImplementedError("one token after others is computed in another way than among them")
    forward(tokens[:, :-1], state, ())
    return _compare_rows(forward, [tokens], _answer(forward, tokens, state=state))


def _measure_read(forward: Forward, count: int, padding: int) -> float:
    """Logits, where other tokens come after those of a shorter row."""
    prompts = _draw(forward, count, padding)
    padded = [F.pad(tokens, (0, count - tokens.shape[1])) for tokens in prompts]
    logits = forward(torch.cat(padded), None, range(count)).float()
    alone = [read_whole(forward, tokens) for tokens in prompts]
    return max(plain.measure(logits[row : row + 1, : plain.logits.shape[1]]) for row, plain in enumerate(alone))


def _measure_answered(forward: Forward, count: int, padding: int) -> float:
    """What `generate` says to whole prompts."""
    prompts = _draw(forward, count, padding)
    return _compare_rows(forward, prompts, _answer(forward, *_pad(prompts)))


def _measure_gone_on(forward: Forward, count: int, padding: int, make: Make) -> float:
    """What `generate` says from the states of prompts, put together."""
    prompts, joined = _draw(forward, count, padding), None
    for row, tokens in enumerate(prompts):
        state = make(TOKENS)
        forward(tokens[:, :-1], state, ())
        joined = joined or state.joined(len(prompts), count - 1, TOKENS)
        joined.put(row, state, tokens.shape[1] - 1)
    return _compare_rows(forward, prompts, _answer(forward, *_pad(prompts), state=joined))


def _draw(forward: Forward, count: int, padding: int) -> list[Tensor]:
    """Two random prompts, (1, tokens) each, the second shorter by so much."""
    return [draw(forward, count), draw(forward, count - padding, seed=1)]


Kind = Literal["read", "answered", "gone on from"]
MEASURES: dict[Kind, Callable[..., float]] = {
    "read": _measure_read,
    "answered": _measure_answered,
    "gone on from": _measure_gone_on,
}


def _compare_rows(forward: Forward, prompts: list[Tensor], answers: Tensor) -> float:
    """How far the worst of `answers` is from what each of the prompts is answered alone."""
    alone = [Plain(forward, functools.partial(_answer, forward, tokens)) for tokens in prompts]
    return max(plain.measure(answers[row : row + 1]) for row, plain in enumerate(alone))


def _pad(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts, (1, count) each, padded on the left to one length, and the mask that says so: (rows, width) both."""
    width = max(tokens.shape[1] for tokens in prompts)
    padded = [F.pad(tokens, (width - tokens.shape[1], 0)) for tokens in prompts]
    mask = [torch.arange(width)[None] >= width - tokens.shape[1] for tokens in prompts]
    return torch.cat(padded), torch.cat(mask).long()


def _answer(forward: Forward, tokens: Tensor, mask: Tensor | None = None, *, state: State | None = None) -> Tensor:
    """The logits (rows, NEW, vocabulary) by which `generate` goes on from tokens (rows, count), each step after the same token."""
    (always,) = draw(forward, 1, seed=2).flatten().tolist()
    tokens, mask = tokens.to(forward.device), torch.ones_like(tokens) if mask is None else mask
    given: dict[str, Any] = state.arguments() if state is not None else {}
    given = {name: value for name, value in given.items() if name != "use_cache"}
    with torch.autocast(forward.device.type, dtype=forward.autocast, enabled=forward.autocast is not None):
        output = forward.model.generate(
            tokens,
            attention_mask=mask.to(forward.device),
            max_new_tokens=NEW,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            prefix_allowed_tokens_fn=lambda row, before: [always],
            return_dict_in_generate=True,
            output_logits=True,
            **given,
        )
    return torch.stack(output.logits, dim=1).float()
