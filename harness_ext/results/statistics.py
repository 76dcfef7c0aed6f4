"""The statistics of a comparison: intervals of a share, a paired test, and a correction for many tests."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import binomtest


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of the share `successes / n`.

    The score interval without a continuity correction: Wilson 1927, "Probable inference, the law of succession, and statistical
    inference", JASA 22(158). It takes the n answers as independent. Raises ValueError where n is below 1: no answer, no share.

    >>> [round(bound, 4) for bound in wilson(60, 100)]
    [0.502, 0.6906]
    >>> [round(bound, 4) for bound in wilson(0, 10)]
    [0.0, 0.2775]
    """
    interval = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of "both methods are right equally often", from the prompts that exactly one of them answered.

    McNemar 1947, "Note on the sampling error of the difference between correlated proportions or percentages", Psychometrika
    12(2). His statistic is compared with χ²; here its exact form is used, a binomial test of the discordant prompts against one
    half, since they may be few. Prompts are taken as independent. Without a discordant prompt nothing speaks against it: 1.

    >>> mcnemar(0, 0), mcnemar(3, 3), mcnemar(0, 6)
    (1.0, 1.0, 0.03125)
    """
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


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
