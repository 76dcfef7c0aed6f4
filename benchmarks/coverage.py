"""How often 95 % intervals hold a planted truth, ours and those that were dropped: `python benchmarks/coverage.py`.

docs/statistics.md has its tables. No model is run: answers are drawn from planted scores, with haystacks that make theirs alike.
`--curves N` sets how many curves a row has.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from harness_ext.results.aggregate import make_cell, make_curve
from harness_ext.results.clusters import Answers, list_intervals
from harness_ext.results.effective_length import RULES, Reading, find_area_past, find_half_length, measure_length
from harness_ext.results.records import Cell, Curve, Prompt
from harness_ext.results.statistics import flip_signs, mcnemar, t_quantile, wilson

Floats = NDArray[np.float64]
Interval = tuple[float, float]

HAYSTACKS = (5, 10, 20, 50)
DEPTHS = 10
CORRELATIONS = (0.0, 0.05, 0.1, 0.3, 0.5)
MULTIPLES = (0.5, 1.0, 2.0, 4.0, 8.0)
TRAINED = 256
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(61)


# ---------------------------------------------------------------------- one length


def draw_alike(rng: np.random.Generator, truths: Floats, haystacks: int, depths: int, correlation: float) -> Answers:
    """Answers to prompts of one true score each, in rows: those of one haystack have the correlation asked for.

    A haystack's own score is drawn from a beta distribution.
    """
    if correlation:
        size = (1 - correlation) / correlation
        own = rng.beta((truths * size)[:, None], ((1 - truths) * size)[:, None], (len(truths), haystacks))
    else:
        own = np.repeat(truths[:, None], haystacks, axis=1)
    right = (rng.random((len(truths), haystacks, depths)) < own[:, :, None]).astype(float)
    return Answers(right=right, asked=np.ones_like(right))


def count_covered(intervals: Sequence[Interval | None], truths: Sequence[float]) -> float:
    """Share of intervals that hold their truth."""
    return float(np.mean([ends is not None and ends[0] <= truth <= ends[1] for ends, truth in zip(intervals, truths, strict=True)]))


def list_dropped(rng: np.random.Generator, answers: Answers) -> dict[str, list[Interval]]:
    """Intervals of the methods that we do not use."""
    n, haystacks = answers.asked[0].sum(), answers.asked.shape[1]
    by_haystack, scores = answers.right.mean(2), answers.scores
    errors = by_haystack.std(1, ddof=1) / math.sqrt(haystacks)
    t = t_quantile(haystacks - 1)
    found = {
        "Wilson, prompts independent": [wilson(score * n, n) for score in scores],
        "t over haystacks": [(score - t * error, score + t * error) for score, error in zip(scores, errors, strict=True)],
    }
    for name, size in (("percentile bootstrap", haystacks), ("Rao-Wu bootstrap", haystacks - 1)):
        counts = rng.multinomial(size, [1 / haystacks] * haystacks, 1000) / size
        drawn = by_haystack @ counts.T
        found[name] = list(zip(*np.quantile(drawn, [0.025, 0.975], axis=1), strict=True))
    found["studentised bootstrap"] = [_studentise(rng, row) for row in by_haystack]
    return found


def _studentise(rng: np.random.Generator, by_haystack: Floats) -> Interval:
    """Efron's bootstrap-t; resamples without spread are left out."""
    n, mean, error = len(by_haystack), by_haystack.mean(), by_haystack.std(ddof=1) / math.sqrt(len(by_haystack))
    drawn = by_haystack[rng.integers(0, n, (500, n))]
    spread = drawn.std(1, ddof=1) / math.sqrt(n)
    t = (drawn.mean(1) - mean)[spread > 0] / spread[spread > 0]
    if not len(t):
        return mean, mean
    low, high = np.quantile(t, [0.025, 0.975])
    return mean - high * error, mean - low * error


# ---------------------------------------------------------------------- curves


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A model whose scores are known."""

    logits: Floats
    """(lengths, depths), of a right answer, for the middling haystack."""
    spread: float
    """Standard deviation of the haystacks' logits; half of the variance is the same at all lengths."""

    @property
    def scores(self) -> Floats:
        """(lengths,): the true scores, over all haystacks."""
        by_depth = expit(self.logits[..., None] + self.spread * _NODES) @ (_WEIGHTS / _WEIGHTS.sum())
        return np.asarray(by_depth.mean(1))


def plant(rng: np.random.Generator, spread: float) -> Planted:
    """A model that does well up to some multiple, and falls after it, gently or steeply; near ends may be easier."""
    edge, fall, top = rng.uniform(0, 3.5), rng.choice([1, 2, 4, 10]), rng.uniform(1.5, 5)
    by_length = np.minimum(top, (edge - np.log2(MULTIPLES)) * fall)
    by_depth = np.linspace(-1, 1, DEPTHS) * rng.choice([0, 2])
    return Planted(logits=by_length[:, None] + by_depth, spread=spread)


def answer(rng: np.random.Generator, planted: Planted, haystacks: int) -> NDArray[np.bool_]:
    """(lengths, haystacks, depths): whether each prompt was answered."""
    lengths, depths = planted.logits.shape
    shared, own = rng.standard_normal((1, haystacks, 1)), rng.standard_normal((lengths, haystacks, 1))
    logits = planted.logits[:, None, :] + planted.spread * (shared + own) / math.sqrt(2)
    return np.asarray(rng.random((lengths, haystacks, depths)) < expit(logits))


def make_cells(right: NDArray[np.bool_], multiples: Sequence[float] = MULTIPLES) -> list[Cell]:
    """The cells of answers, as a publisher makes them."""
    lengths, _, depths = right.shape
    return [
        make_cell(
            evaluation_result_id="0" * 16,
            evaluation_id="0" * 16,
            evaluation_name="planted",
            length=int(multiples[length] * TRAINED),
            multiple=multiples[length],
            depth=depth / max(1, depths - 1),
            outcome="measured",
            prompts=[
                Prompt(
                    sample=sample,
                    verdict="exact" if verdict else "missed",
                    log_likelihood=-1.0,
                    tokens=5,
                    prompt_tokens=int(multiples[length] * TRAINED),
                    fingerprint="0" * 16,
                )
                for sample, verdict in enumerate(right[length, :, depth].tolist())
            ],
        )
        for length, depth in itertools.product(range(lengths), range(depths))
    ]


def read_truth(planted: Planted) -> Reading:
    """What the figures of the true scores are read off."""
    return Reading(tokens=tuple(int(one * TRAINED) for one in MULTIPLES), multiples=MULTIPLES, scores=planted.scores, draws=None)


def check_curve(curve: Curve, planted: Planted) -> Iterator[tuple[str, bool, float | None]]:
    """(figure, whether its interval holds the truth, estimate less truth: of lengths in doublings), for what both have."""
    truth = read_truth(planted)
    for point, score in zip(curve.points, truth.scores.tolist(), strict=True):
        if point.score_details and point.score_details.uncertainty.confidence_interval:
            ends = point.score_details.uncertainty.confidence_interval
            kind = "point" if 0.02 <= score <= 0.98 else "point outside 0.02 to 0.98"
            yield kind, ends.lower <= score <= ends.upper, point.score_details.score - score
    area, true_area = curve.area_past, find_area_past(truth).value
    if area.value is not None and area.lower is not None and area.upper is not None and true_area is not None:
        yield "area past", area.lower <= true_area <= area.upper, area.value - true_area
    half, true_half = curve.half_length, find_half_length(truth)
    if half.lower is not None and not true_half.reason.startswith("it fails"):
        true = math.inf if true_half.value is None else true_half.value
        upper = math.inf if half.upper is None else half.upper
        error = math.log2(half.value / true) if half.value and true_half.value else None
        # A half-length past the longest length is held by an interval that is open above.
        yield "half-length", min(half.lower, MULTIPLES[-1]) <= true <= upper, error
    for rule, found in zip(RULES, curve.effective_lengths, strict=True):
        true_length = measure_length(rule, truth).tokens
        if found.tokens and true_length and found.lower is not None and found.upper:
            yield rule.name, found.lower <= true_length <= found.upper, math.log2(found.tokens / true_length)


def simulate(rng: np.random.Generator, haystacks: int, spread: float, curves: int) -> dict[str, list[tuple[bool, float | None]]]:
    """Figure → (whether held, error) of each curve that has it."""
    found = defaultdict(list)
    for _ in range(curves):
        planted = plant(rng, spread)
        for figure, held, error in check_curve(make_curve(make_cells(answer(rng, planted, haystacks))), planted):
            found[figure].append((held, error))
    return dict(found)


# ---------------------------------------------------------------------- pairs


def reject_alike(rng: np.random.Generator, haystacks: int, spread: float, pairs: int) -> tuple[float, float]:
    """How often McNemar's test, and that of haystacks, reject at 5 % two models that are right equally often.

    Each model has its own easy and hard haystacks.
    """
    rejected = np.zeros(2)
    for _ in range(pairs):
        planted = Planted(logits=np.full((3, DEPTHS), rng.uniform(-2, 2)), spread=spread)
        first, second = answer(rng, planted, haystacks), answer(rng, planted, haystacks)
        by_haystack = (first.sum((0, 2), dtype=int) - second.sum((0, 2), dtype=int)).tolist()
        rejected += (
            mcnemar(int((first & ~second).sum()), int((second & ~first).sum())) <= 0.05,
            flip_signs(by_haystack) <= 0.05,
        )
    return float(rejected[0] / pairs), float(rejected[1] / pairs)


# ---------------------------------------------------------------------- tables


def print_points(replicates: int) -> None:
    """Table 1: coverage of one score's interval by method, haystacks and correlation; true scores even between 0.02 and 0.98."""
    rng = np.random.default_rng(1)
    print("| method | haystacks | " + " | ".join(f"{correlation:g}" for correlation in CORRELATIONS) + " | mean | median width |")
    print("|---|---:|" + "---:|" * (len(CORRELATIONS) + 2))
    rows = defaultdict(list)
    for haystacks, correlation in itertools.product(HAYSTACKS, CORRELATIONS):
        truths = rng.uniform(0.02, 0.98, replicates)
        answers = draw_alike(rng, truths, haystacks, DEPTHS, correlation)
        methods: dict[str, Sequence[Interval | None]] = {"ours": list_intervals(answers), **list_dropped(rng, answers)}
        for method, intervals in methods.items():
            width = float(np.median([ends[1] - ends[0] for ends in intervals if ends]))
            rows[method, haystacks].append((count_covered(intervals, truths.tolist()), width))
    for (method, haystacks), found in sorted(rows.items(), key=lambda row: (row[0][0] != "ours", row[0])):
        shown = " | ".join(f"{100 * covered:.1f}" for covered, _ in found)
        print(
            f"| {method} | {haystacks} | {shown} | {100 * np.mean([one for one, _ in found]):.1f} | {np.mean([one for _, one in found]):.2f} |"
        )


def print_scores(replicates: int) -> None:
    """Table 2: coverage of our interval by true score, ten haystacks."""
    rng = np.random.default_rng(4)
    print("| true score | " + " | ".join(f"{correlation:g}" for correlation in CORRELATIONS) + " |")
    print("|---:|" + "---:|" * len(CORRELATIONS))
    for score in (0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98):
        truths = np.full(replicates, score)
        found = [draw_alike(rng, truths, 10, DEPTHS, correlation) for correlation in CORRELATIONS]
        print(
            f"| {score:g} | "
            + " | ".join(f"{100 * count_covered(list_intervals(one), truths.tolist()):.1f}" for one in found)
            + " |"
        )


def print_curves(curves: int) -> None:
    """Table 3: coverage of a curve's figures, and in brackets the mean error (lengths in doublings)."""
    rng = np.random.default_rng(2)
    figures = ["point", "point outside 0.02 to 0.98", "area past", "half-length", *(rule.name for rule in RULES)]
    print("| haystacks | spread | " + " | ".join(figures) + " |")
    print("|---:|---:|" + "---:|" * len(figures))
    for haystacks, spread in itertools.product(HAYSTACKS, (0.0, 1.0, 2.0)):
        found = simulate(rng, haystacks, spread, curves)
        cells = []
        for figure in figures:
            held = 100 * np.mean([one for one, _ in found[figure]])
            errors = [error for _, error in found[figure] if error is not None]
            cells.append(f"{held:.1f} ({np.mean(errors):+.3f})")
        print(f"| {haystacks} | {spread:g} | " + " | ".join(cells) + " |")


def print_pairs(pairs: int) -> None:
    """Table 4: false alarms at 5 %."""
    rng = np.random.default_rng(3)
    print("| haystacks | spread | McNemar, prompts independent | signs of haystacks |\n|---:|---:|---:|---:|")
    for haystacks, spread in itertools.product(HAYSTACKS, (0.0, 1.0, 2.0)):
        by_prompt, by_haystack = reject_alike(rng, haystacks, spread, pairs)
        print(f"| {haystacks} | {spread:g} | {100 * by_prompt:.1f} | {100 * by_haystack:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--curves", type=int, default=2000, help="curves a row")
    options = parser.parse_args()
    print_points(options.curves)
    print()
    print_scores(options.curves)
    print()
    print_curves(options.curves)
    print()
    print_pairs(options.curves)


if __name__ == "__main__":
    main()
