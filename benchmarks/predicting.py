"""How far off predicted scores are: `python benchmarks/predicting.py OUT…`, folders that lm_eval's --output_path named, of `extrapolate_why`.

Each plain score past the trained length is left out, with all longer ones, and predicted from the arms and the shorter ones; once with packed
prompts of that length, and once with shorter ones drawn on. docs/method.md has its table, and other formulas that were tried.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness_ext.results.aggregate import draw_arms
from harness_ext.results.causes import Scores
from harness_ext.results.outputs import find_outputs, read_output
from harness_ext.results.predict import NEAREST, predict
from harness_ext.results.publish import Submission, make_records
from harness_ext.results.records import PublishedRun
from harness_ext.results.statistics import t_interval

Floats = NDArray[np.float64]


def list_runs(places: list[Path]) -> Iterator[PublishedRun]:
    """The runs that have arms."""
    for file in find_outputs(places):
        yield make_records(read_output(file), Submission(evidence="not said"))


def leave_out(scores: Scores, length: int, packed_too: bool) -> Scores:
    """The scores without plain ones of that length and longer, and where asked without packed ones either."""
    gone = ("long", "packed") if packed_too else ("long",)
    return {(arm, found): score for (arm, found), score in scores.items() if arm not in gone or found < length}


def try_others(scores: Scores, length: int, trained: int) -> dict[str, float]:
    """Formulas that were not chosen → what they predict; all go on from the trained length."""
    plain, short = float(scores["long", trained][0]), float(scores["stretched", trained][0])
    s, p = float(scores["stretched", length][0]), float(scores["packed", length][0])
    return {
        "product, from T": min(1.0, s / short * p),
        "sum of losses, from T": max(0.0, plain - (short - s) - (plain - p)),
        "log-odds, from T": 1 / (1 + math.exp(-(_to_odds(s) - _to_odds(short) + _to_odds(p)))),
        "the smaller of the two": min(s, p),
        "the last plain score": float(scores["long", max(found for arm, found in scores if arm == "long" and found < length)][0]),
    }


def _to_odds(share: float) -> float:
    bounded = min(max(share, NEAREST), 1 - NEAREST)
    return math.log(bounded / (1 - bounded))


def main() -> None:
    """Prints a row a length, and each formula's error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="+", type=Path)
    errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    held: dict[str, list[bool]] = defaultdict(list)
    print("| model | multiple | measured | predicted | 95 % | packed drawn on | 95 % |\n|---|---|---|---|---|---|---|")
    for published in list_runs(parser.parse_args().out):
        name, trained = published.run.model_info.id, published.run.trained_length
        scores = draw_arms(published.cells)
        for length in sorted(found for arm, found in scores if arm == "long" and trained and found > trained.tokens):
            assert trained
            measured = scores["long", length]
            cells = []
            for title, packed_too in (("chosen", False), ("chosen, packed drawn on", True)):
                found = [one for one in predict(leave_out(scores, length, packed_too), trained.tokens) if one.length == length]
                if not found:
                    cells += ["none", ""]
                    continue
                (one,) = found
                cells += [f"{one.value:.2f}", f"{one.lower:.2f} to {one.upper:.2f}"]
                errors[title][name].append(one.value - measured[0])
                held[title].append(one.lower is not None and one.upper is not None and one.lower <= measured[0] <= one.upper)
            print(f"| {name} | {length / trained.tokens:g} | {measured[0]:.2f} | {' | '.join(cells)} |")
            if cells[0] != "none":
                for title, value in try_others(scores, length, trained.tokens).items():
                    errors[title][name].append(value - measured[0])
    print(
        "\n| formula | mean absolute error, over models | 95 % | mean error | largest | measured inside the interval | lengths |\n|---|---|---|---|---|---|---|"
    )
    for title, by_model in errors.items():
        means = [float(np.mean(np.abs(found))) for found in by_model.values()]
        every = np.concatenate(list(by_model.values()))
        ends = t_interval(means)
        interval = f"{max(0.0, ends[0]):.2f} to {ends[1]:.2f}" if ends else "none"
        met = f"{sum(held[title])} of {len(held[title])}" if title in held else ""
        print(
            f"| {title} | {np.mean(means):.2f} | {interval} | {every.mean():+.2f} | {np.abs(every).max():.2f} | {met} | {len(every)} |"
        )


if __name__ == "__main__":
    main()
