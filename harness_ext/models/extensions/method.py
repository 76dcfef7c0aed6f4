"""What an extension is: a name, a paper, when it applies, and what it does to a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model that is extended."""

    model: Any
    """A transformers model; on the meta device where only `why_not` is asked."""
    schemes: tuple[str, ...]
    """Names in `positions.SCHEMES`."""
    trained: int
    """Trained length in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What it is extended to."""

    tokens: int
    """The length under test: the prompt's own for a method `per_length`, else the longest of the run."""
    factor: float
    """The user's, or the longest length over the trained one."""
    options: Mapping[str, Any]
    """The method's other options, all of them, with their defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to run a model past its trained length without training it."""

    name: str
    source: str
    """The paper."""
    changes: str
    """What it changes, in a few words."""
    why_not: Callable[[Subject], str]
    """Why it cannot be applied to a model; empty where it can."""
    install: Callable[[Subject, Setting], None]
    """Changes the model in place, from whatever an earlier call made of it. Raises ModelError where it cannot."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Name → default, beside `factor`."""
    lifts_limit: bool = False
    """Whether it makes a position table longer, so that its end is no limit."""
    per_length: bool = False
    """Whether it depends on each prompt's length, and is installed anew for each."""
    parameters: Callable[[dict[str, Any], Subject, Setting], dict[str, Any]] | None = None
    """(the checkpoint's rope parameters, subject, setting) → what is laid over them, where that is all: an engine can be told it."""
