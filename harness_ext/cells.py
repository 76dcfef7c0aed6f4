"""The frozen records that pass between the wings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Outcome = Literal["measured", "hard_limit", "backend_limit", "out_of_memory", "backend_error", "interrupted", "too_short"]
"""What became of a cell. One that was not measured has no score: not 0, not −1, and it enters no mean. `backend_error`: a server
failed, or answered nothing that can be believed. `too_short`: the task's own text does not fit (only where nobody asked for that length;
otherwise it is an error)."""


class Unmeasured(NamedTuple):
    """What a model answers in place of a score, where a prompt turned out not to be measurable."""

    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedLength:
    """The longest sequence the model saw in training."""

    tokens: int
    """At least 1."""
    source: str
    """Where it was read: a config field, `rope_parameters…`, or `user`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The longest prompt that can be run."""

    tokens: int
    """Answer included."""
    outcome: Outcome
    """What becomes of a longer one."""
    reason: str
    """Why, and how to go further if that is possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """Whether a model's tokens can be put at chosen positions."""

    outcome: Literal["measured", "not_admitted", "no_positions"]
    """`no_positions`: it takes none, or none that ever leave what it saw in training, so that there is nothing to place."""
    reason: str
    """In words."""
    past_end: str = ""
    """Why more tokens than it has positions cannot be read at those positions; empty where they can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """One length of a sweep."""

    tokens: int
    """Every token that the model consumes: BOS, chat template, prompt, answer prefix, answer."""
    multiple: float | None
    """Of the trained length; None where that is unknown."""
    outcome: Outcome = "measured"
    """`measured`, or why it will not be."""
    reason: str = ""
    """In words, where it will not be."""

    @property
    def label(self) -> str:
        """
        >>> Length(tokens=512, multiple=2.0).label, Length(tokens=512, multiple=None).label
        ('512 (2x)', '512')
        """
        return f"{self.tokens}" if self.multiple is None else f"{self.tokens} ({self.multiple:.4g}x)"
