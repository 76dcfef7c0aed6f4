"""The statistics of single numbers: intervals of a share and of a mean, paired tests, and a correction for many tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtri, stdtrit


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of the share `successes / n`.

    The score interval without a continuity correction: Wilson 1927, "Probable inference, the law of succession, and statistical
    inference", JASA 22(158). It takes the n answers as independent; where they are not, an effective n, which may be a fraction,
    makes it (`clusters`). Raises ValueError where n is not above 0: no answer, no share. scipy has it too (the tests compare),
    at a thousand times the cost, and a leaderboard has a million cells.

    >>> [round(bound, 4) for bound in wilson(60, 100)]
    [0.502, 0.6906]
    >>> [round(bound, 4) for bound in wilson(0, 10)]
    [0.0, 0.2775]
    """
    if not n > 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: n must be above 0, and successes between 0 and n")
    z = _normal_quantile(confidence)
    centre = successes + z * z / 2
    half = z * math.sqrt(successes * (n - successes) / n + z * z / 4)
    # Where none or all are right, one end is 0 or 1 exactly, which rounding would miss.
    low = 0.0 if successes == 0 else (centre - half) / (n + z * z)
    high = 1.0 if successes == n else (centre + half) / (n + z * z)
    return low, high


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """(low, high) of the mean of independent values, by Student's t; None for fewer than two, which have no spread.

    Student 1908, "The probable error of a mean", Biometrika 6(1).

    >>> [round(bound, 4) for bound in t_interval([1.0, 2.0, 3.0])]
    [-0.4841, 4.4841]
    """
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    half = t_quantile(len(values) - 1, confidence) * spread
    return mean - half, mean + half


@functools.cache
def t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """How many standard errors a two-sided interval reaches on either side, with the error known to so many degrees of freedom.

    >>> round(t_quantile(9), 3)
    2.262
    """
    return float(stdtrit(degrees, (1 + confidence) / 2))


@functools.cache
def _normal_quantile(confidence: float) -> float:
    return float(ndtri((1 + confidence) / 2))


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of "both methods are right equally often", from the prompts that exactly one of them answered.

    McNemar 1947, "Note on the sampling error of the difference between correlated proportions or percentages", Psychometrika
    12(2). His statistic is compared with χ²; here its exact form is used, a binomial test of the discordant prompts against one
    half, since they may be few. Prompts are taken as independent. Without a discordant prompt nothing speaks against it: 1.

    >>> mcnemar(0, 0), mcnemar(3, 3), mcnemar(0, 6)
    (1.0, 1.0, 0.03125)
    """
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def flip_signs(differences: Sequence[int]) -> float:
    """The two-sided p-value of "both methods are right equally often" from each haystack's difference in right answers.

    The randomisation test of paired differences: under the hypothesis either method may have got either of a haystack's two
    counts, so every choice of signs is as likely, and p is the share of choices whose sum is as far from 0 as the one found.
    Fisher 1935, "The Design of Experiments", section 21; for clusters Gail, Mark, Carroll, Green and Pee 1996, "On design
    considerations and randomization-based inference for community intervention trials", Statistics in Medicine 15(11). Prompts of
    one haystack may depend on each other in any way. All choices are counted, by convolution, so it is exact. Where no haystack
    has more than one discordant prompt it is `mcnemar`; with few haystacks it cannot be small: five give 0.0625 at best.

    >>> flip_signs([1, 1, 1, 1, 1, 1]) == mcnemar(6, 0), flip_signs([3, 3, 3, 3, 3]), flip_signs([])
    (True, 0.0625, 1.0)
    """
    sizes = [abs(difference) for difference in differences if difference]
    chances = np.ones(1)
    for size in sizes:
        step = np.zeros(2 * size + 1)
        step[0] = step[-1] = 0.5
        chances = np.convolve(chances, step)
    sums = np.arange(-sum(sizes), sum(sizes) + 1)
    return min(1.0, float(chances[np.abs(sums) >= abs(sum(differences))].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, each adjusted for all of them, in the order given: one at most α is significant at α for the whole family.

    Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6(2). Asks nothing
    of how the tests depend on each other.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def take_middle(values: NDArray[np.generic]) -> tuple[float, float]:
    """The ends of the middle 95 %, rounded outwards to values that occur (some may be infinite)."""
    low, high = math.floor(0.025 * (len(values) - 1)), math.ceil(0.975 * (len(values) - 1))
    ordered = np.partition(values, (low, high))
    return float(ordered[low]), float(ordered[high])
