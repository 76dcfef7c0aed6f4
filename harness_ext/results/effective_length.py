"""How far a model's scores reach: effective length by several rules, the half-length, and the area past the trained length.

Every figure is read off the measured lengths alone; one that was not measured is passed over, and never counts as 0. None is read
off a model that fails inside its own window, by `find_fault`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness_ext.results.records import Derived, EffectiveLength, RuleName
from harness_ext.results.statistics import take_middle

Floats = NDArray[np.float64]

FAILS_BELOW = 0.5
"""Score that a model has to reach at some length within its window: else it is more often wrong than right wherever it was trained,
and fails inside its own window. Ours; no paper of those named here says when its rule has no meaning."""
_CLOSE = 1e-9
"""Scores nearer than this are equal: 0.85 × 0.2 is not 0.17 in binary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a length has to score to count as reached; the longest that does is the effective length."""

    name: RuleName
    """As in a record."""
    threshold: float
    """Of the score, or for a relative rule of the score's share of the in-window score."""
    relative: bool = False
    """To the in-window score."""
    exceeds: bool = False
    """The threshold itself does not pass."""
    all_shorter: bool = False
    """All shorter lengths have to pass too."""


RULES = (
    # RULER, arXiv 2404.06654, section 4: "the maximum length exceeding the threshold", Llama-2-7B's score at 4K: table 3 (chat), table 12 (base).
    Rule(name="ruler_llama2_chat", threshold=0.856, exceeds=True),
    Rule(name="ruler_llama2_base", threshold=0.794, exceeds=True),
    # NoLiMa, arXiv 2502.05167, section 4.3. Theirs: base = mean over question-needle pairs of the best of 250, 500 and 1K tokens. Ours: the
    # in-window score, a mean, since the best of several measured scores is too high by what is chance in them.
    Rule(name="nolima", threshold=0.85, relative=True),
    # Position Interpolation, arXiv 2306.15595, section 3.3: the largest k with success of at least 20 % for all k' up to it.
    Rule(name="k_max", threshold=0.2, all_shorter=True),
    # YaRN, arXiv 2309.00071, table 5: the longest context with accuracy of at least 80 %.
    Rule(name="yarn", threshold=0.8),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A task's measured scores, shortest length first; at least one."""

    tokens: tuple[int, ...]
    """Lengths."""
    multiples: tuple[float, ...] | None
    """Of the trained length; None where that is unknown."""
    scores: Floats
    """(lengths,)"""
    draws: Floats | None
    """(lengths, draws): what the true scores may be; None where that cannot be told."""
    unmeasured: str = ""
    """Why no longer length was measured, where one was planned."""

    @property
    def within(self) -> NDArray[np.bool_]:
        """(lengths,): which lie in the window; where the trained length is unknown, the shortest stands for it."""
        if self.multiples is None:
            return np.array([place == 0 for place in range(len(self.tokens))], dtype=np.bool_)
        return np.array([multiple <= 1 for multiple in self.multiples], dtype=np.bool_)

    @property
    def in_window(self) -> float:
        """The in-window score: the mean over lengths within the window, each counting the same. NaN where there is none."""
        return float(self.scores[self.within].mean()) if self.within.any() else math.nan


def find_fault(reading: Reading) -> str:
    """Why no figure is read off: nothing was measured in the window, or the model fails there; empty where it does not."""
    if not reading.within.any():
        return f"no length up to the trained length was measured (shortest: {reading.tokens[0]} tokens)"
    best = float(reading.scores[reading.within].max())
    if best < FAILS_BELOW - _CLOSE:
        return f"it fails inside its own window: at best {best:.2f} of the answers are right there, less than {FAILS_BELOW}"
    return ""


def find_longest(rule: Rule, scores: Floats, within: NDArray[np.bool_]) -> NDArray[np.intp]:
    """(columns,): the place of the longest length that passes, −1 where none does. `scores`: (lengths, columns), `within`: (lengths,).

    >>> find_longest(RULES[4], np.array([[1.0, 0.7], [0.8, 0.1], [0.3, 0.0]]), np.array([True, False, False])).tolist()
    [1, -1]
    """
    bar = rule.threshold * (scores[within].mean(0) if rule.relative else 1.0)
    passes = scores > bar + _CLOSE if rule.exceeds else scores >= bar - _CLOSE
    if rule.all_shorter:
        passes = np.logical_and.accumulate(passes, axis=0)
    places = np.arange(1, len(scores) + 1)[:, None]
    return np.asarray((passes * places).max(0) - 1)


def measure_length(rule: Rule, reading: Reading) -> EffectiveLength:
    """The effective length by a rule, with the 95 % interval of `reading.draws`.

    Not measurable where `find_fault` says so, and where no length within the window passes the rule. Lengths are few, so the
    interval is one of lengths that were run, and holds the true one more often than 95 times of 100.
    """
    fault = find_fault(reading)
    reached = -1 if fault else int(find_longest(rule, reading.scores[:, None], reading.within)[0])
    if not fault and (reached < 0 or not _passes_within(rule, reading)):
        wanted = f"{rule.threshold:g} of its in-window score" if rule.relative else f"{rule.threshold:g}"
        fault = f"it fails inside its own window: no length there scores {'more than' if rule.exceeds else 'at least'} {wanted}"
    if fault:
        return EffectiveLength(
            rule=rule.name, threshold=rule.threshold, outcome="not_measurable", reason=fault, tokens=None, lower=None, upper=None
        )
    lower, upper = None, None
    if reading.draws is not None:
        low, high = take_middle(find_longest(rule, reading.draws, reading.within))
        lower = reading.tokens[min(int(low), reached)] if low >= 0 else 0
        upper = reading.tokens[max(int(high), reached)]
    longest = reached == len(reading.tokens) - 1
    return EffectiveLength(
        rule=rule.name,
        threshold=rule.threshold,
        outcome="at_least" if longest else "measured",
        reason=reading.unmeasured if longest else "",
        tokens=reading.tokens[reached],
        lower=lower,
        upper=upper,
    )


def find_half_length(reading: Reading) -> Derived:
    """The multiple of the trained length at which half of the in-window score is left, with its 95 % interval.

    Past the longest in-window length that has half, it is where the scores, joined by straight lines over the logarithm of the
    multiple, first fall below it. Where they never do, there is no value, and `lower` says from where on it can be.
    """
    if reading.multiples is None:
        return Derived(value=None, lower=None, upper=None, reason="the trained length is unknown")
    fault = find_fault(reading)
    if fault:
        return Derived(value=None, lower=None, upper=None, reason=fault)
    longest = reading.multiples[-1]
    value = float(_cross_half(reading, reading.scores[:, None])[0])
    reason, low, high = "", None, None
    if math.isinf(value):
        left = float(reading.scores[-1]) / reading.in_window
        reason = f"not reached: at {longest:g}x, the longest that was measured, {left:.2f} of the in-window score is left"
    if reading.draws is not None:
        ends = take_middle(_cross_half(reading, reading.draws))
        low = min(float(ends[0]), value, longest)
        high = None if math.isinf(ends[1]) else max(float(ends[1]), value)
    if math.isinf(value):
        return Derived(value=None, lower=low, upper=None, reason=reason)
    return Derived(value=value, lower=low, upper=high)


def find_area_past(reading: Reading) -> Derived:
    """The mean score over log2 of the multiple, from 1 to the longest measured, with its 95 % interval.

    By the trapezoidal rule; where the trained length itself was not run, its score is read off the line between its neighbours.
    Comparable between runs of the same longest multiple only.
    """
    if reading.multiples is None:
        return Derived(value=None, lower=None, upper=None, reason="the trained length is unknown")
    fault = find_fault(reading)
    if not fault and reading.multiples[-1] <= 1:
        fault = f"no length past the trained length was measured{': ' if reading.unmeasured else ''}{reading.unmeasured}"
    if fault:
        return Derived(value=None, lower=None, upper=None, reason=fault)
    weights = _weigh_area(np.log2(reading.multiples))
    value = float(weights @ reading.scores)
    if reading.draws is None:
        return Derived(value=value, lower=None, upper=None)
    low, high = take_middle(weights @ reading.draws)
    return Derived(value=value, lower=min(float(low), value), upper=max(float(high), value))


def weigh(scores: Sequence[float]) -> tuple[float, float]:
    """RULER's weighted averages of scores in order of length: (wAvg(inc), wAvg(dec)), arXiv 2404.06654, section 4.

    Σ i·sᵢ / Σ i, with i from 1, and the same with the weights reversed: use that is mostly long, and mostly short.

    >>> weigh([90.0, 60.0])
    (70.0, 80.0)
    """
    weights = range(1, len(scores) + 1)
    increasing = sum(weight * score for weight, score in zip(weights, scores, strict=True))
    decreasing = sum(weight * score for weight, score in zip(weights, reversed(scores), strict=True))
    return increasing / sum(weights), decreasing / sum(weights)


def _passes_within(rule: Rule, reading: Reading) -> bool:
    """Whether some length in the window passes."""
    scores, within = reading.scores[:, None], reading.within
    return bool(find_longest(rule, scores[within], within[within])[0] >= 0)


def _cross_half(reading: Reading, scores: Floats) -> Floats:
    """(columns,): the multiple at which each column of scores falls below half of its in-window score; infinite where it does not."""
    x, within, places = np.log2(np.array(reading.multiples)), reading.within, np.arange(len(scores))[:, None]
    half = scores[within].mean(0) / 2
    enough = scores >= half
    start = np.where(enough & within[:, None], places, -1).max(0)
    after = np.where(~enough & (places > start), places, len(scores)).min(0)
    crosses = after < len(scores)
    columns, after, half = np.flatnonzero(crosses), after[crosses], half[crosses]
    left, right = scores[after - 1, columns], scores[after, columns]
    found = np.full(scores.shape[1], np.inf)
    found[columns] = 2 ** (x[after - 1] + (left - half) / (left - right) * (x[after] - x[after - 1]))
    return found


def _weigh_area(x: Floats) -> Floats:
    """(lengths,): what each score counts in the mean from x = 0 to the last x, the scores joined by straight lines."""
    at_zero = np.array([np.interp(0.0, x, unit) for unit in np.eye(len(x))])
    past = x > 0
    nodes = np.concatenate([[0.0], x[past]])
    widths = np.diff(nodes)
    trapezoid = (np.append(widths, 0.0) + np.append(0.0, widths)) / 2
    weights = trapezoid[0] * at_zero
    weights[past] += trapezoid[1:]
    return np.asarray(weights / nodes[-1])
