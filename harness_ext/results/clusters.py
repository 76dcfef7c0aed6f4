"""Scores of answers that share haystacks: how many independent prompts they are worth, and draws of what the true scores may be.

Prompts of one sample share their haystack over depths and lengths, so their answers may depend on each other. What is independent
is the haystack, of which there are few (ten by default): a plain percentile bootstrap over so few covers the truth too seldom, and
where all answers are right it has no width at all. docs/statistics.md has what was tried, and how often each covers.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness_ext.results.records import Cell
from harness_ext.results.statistics import t_quantile, wilson

Floats = NDArray[np.float64]

DRAWS = 2000
"""Of the true scores: the ends of a 95 % interval are then the 50th from either side."""
_Z = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Answers of several lengths (or of other groups, each with a score) on the same haystacks."""

    right: Floats
    """(lengths, haystacks, depths): prompts answered exactly."""
    asked: Floats
    """Likewise: prompts; 0 where there is none."""

    @property
    def scores(self) -> Floats:
        """(lengths,): share of exact answers."""
        return np.asarray(self.right.sum((1, 2)) / self.asked.sum((1, 2)))

    @property
    def residuals(self) -> Floats:
        """(lengths, haystacks): right answers more than the length's score would have given."""
        return np.asarray(self.right.sum(2) - self.scores[:, None] * self.asked.sum(2))


def tabulate(groups: Sequence[Sequence[Cell]]) -> Answers:
    """The answers of groups of cells; each group has a prompt at least."""
    samples = {prompt.sample for group in groups for cell in group for prompt in cell.prompts}
    depths = {cell.depth for group in groups for cell in group}
    row = {sample: index for index, sample in enumerate(sorted(samples))}
    column = {depth: index for index, depth in enumerate(sorted(depths, key=lambda depth: -1.0 if depth is None else depth))}
    shape = len(groups), len(row), len(column)
    places, exact = list[int](), list[bool]()
    for group, cells in enumerate(groups):
        for cell in cells:
            start = group * shape[1] * shape[2] + column[cell.depth]
            places += [start + row[prompt.sample] * shape[2] for prompt in cell.prompts]
            exact += [prompt.verdict == "exact" for prompt in cell.prompts]
    asked = np.bincount(places, minlength=math.prod(shape)).astype(float)
    right = np.bincount(places, weights=np.array(exact, dtype=float), minlength=math.prod(shape)).astype(float)
    return Answers(right=right.reshape(shape), asked=asked.reshape(shape))


def size_effectively(answers: Answers) -> Floats:
    """(lengths,): how many independent prompts each length's are worth; NaN where all are of one haystack, which cannot tell.

    Where each haystack has one prompt, as many as there are. Else the smaller of two:

    - what the haystacks' differences say: share × (1 − share) over the variance of the share between haystacks (its ratio
      estimator), times (z / t)², which makes up for a variance known from few haystacks only. Korn and Graubard 1998, "Confidence
      intervals for proportions with small expected number of positive counts estimated from survey data", Survey Methodology 24(2).
    - what it would be if answers were independent, which they cut it to. We count depths as strata, since every haystack has
      all of them: a model that finds whatever stands near the end, and nothing else, has the same score on every haystack. A
      depth's share is drawn to the length's by one prompt, so that ten of ten is not taken for certainty; the divisor
      undoes what that takes off where depth makes no difference.

    Where all answers are right, or all wrong, neither can be estimated; then as many as there are, times (z / t)².
    """
    asked_by_haystack, asked_by_depth = answers.asked.sum(2), answers.asked.sum(1)
    n, haystacks, scores = asked_by_haystack.sum(1), (asked_by_haystack > 0).sum(1), answers.scores[:, None]
    few = np.array([(_Z / t_quantile(int(count) - 1)) ** 2 if count > 1 else np.nan for count in haystacks])
    by_depth = (answers.right.sum(1) + scores) / (asked_by_depth + 1)
    spread = by_depth * (1 - by_depth) / (1 - asked_by_depth / (asked_by_depth + 1) ** 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (answers.residuals**2).sum(1) * haystacks / (haystacks - 1)
        within = (asked_by_depth * spread).sum(1)
        binomial = (scores * (1 - scores))[:, 0] * n**2
        known = np.minimum(few * binomial / between, binomial / within)
    clustered = np.where(binomial > 0, known, few * n)
    return np.where(haystacks == n, n, np.where(haystacks > 1, clustered, np.nan))


def list_intervals(answers: Answers) -> list[tuple[float, float] | None]:
    """(low, high) of each length's score: Wilson's with the effective number of prompts; None where all are of one haystack.

    Franco, Little, Louis and Slud 2019, "Comparative study of confidence intervals for proportions in complex sample surveys",
    Journal of Survey Statistics and Methodology 7(3), find this one of the best of those that they compare.
    """
    pairs = zip(answers.scores.tolist(), size_effectively(answers).tolist(), strict=True)
    return [wilson(score * size, size) if size > 0 else None for score, size in pairs]


def draw_scores(answers: Answers, own: float = 0.0) -> Floats:
    """(lengths, `DRAWS`): what the true scores may be, jointly; NaN where a length has no interval.

    A bootstrap clustered by haystack, with normal multipliers: each draw weighs the haystacks' residuals with one normal number
    a haystack, the same for all lengths, which keeps together what lengths have in common (van der Vaart and Wellner 1996, "Weak
    convergence and empirical processes", section 2.9; for few clusters Cameron, Gelbach and Miller 2008, "Bootstrap-based
    improvements for inference with clustered errors", Review of Economics and Statistics 90(3)). The sum, over its standard
    error, is standard normal; it is turned into a score by Wilson's formula with the effective number of prompts. So each
    length's draws have the ends of its interval as their quantiles, also where all answers are right.

    The numbers are the same for every curve of as many haystacks (seeded by a hash), so equal answers have equal draws.

    `own`: prompts that a score's standard error has of its own, whatever the others are. Two groups with the same answers would
    else have a difference of 0 without doubt; so many prompts may have come out otherwise in each (as Agresti and Min 2005, "Simple
    improved confidence intervals for comparing matched proportions", Statistics in Medicine 24(5), add some to either side).
    """
    residuals = answers.residuals
    lengths = np.sqrt((residuals**2).sum(1))
    alike = lengths < 1e-9
    weights = residuals / np.where(alike, 1, lengths)[:, None]
    z = weights @ _draw_normal("haystacks", residuals.shape[1])
    if alike.any():  # no haystack differs from another: nothing in common with other lengths can be seen
        z[alike] = _draw_normal("lengths", len(lengths))[alike]
    n = size_effectively(answers)[:, None]
    if own:
        variances = answers.scores * (1 - answers.scores) / n[:, 0]
        apart = np.minimum(1.0, (own / answers.asked.sum((1, 2))) ** 2 / np.where(alike, 1, variances))[:, None]
        z = np.where(alike[:, None], z, np.sqrt(1 - apart) * z + np.sqrt(apart) * _draw_normal("lengths", len(lengths)))
    right = answers.scores[:, None] * n
    square = z * z
    return np.asarray((right + square / 2 + z * np.sqrt(right * (n - right) / n + square / 4)) / (n + square))


@functools.lru_cache(maxsize=64)
def _draw_normal(name: str, rows: int) -> Floats:
    """(rows, `DRAWS`), each with its negative. RandomState, since its numbers are promised never to change (NumPy's NEP 19)."""
    seed = int.from_bytes(hashlib.sha256(f"harness_ext {name} {rows}".encode()).digest()[:4], "big")
    half = np.random.RandomState(seed).standard_normal((rows, DRAWS // 2))
    return np.concatenate([half, -half], axis=1)
