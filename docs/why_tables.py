"""What came out, as Markdown: scores, paired tests, bytes, seconds, distances. Judges nothing: why_verdicts.py does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from why_verdicts import TASKS, Finding, judge_running, judge_working, read_findings

from harness_ext.results.tables import lay_out, show_share

LOCATED = ("passkey", "needle")
"""Tasks whose needle's distance is in the facts."""
COUNTED = {
    "depending_on_length": "multiply-adds that depend on the length",
    "not_depending_on_length": "that do not",
    "output_layer_per_position": "output layer",
}
"""Kind of multiply-adds in the facts → its column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that the page is made of."""

    findings: dict[tuple[str, str], Finding]
    """(run, task) → what came out."""
    facts: dict[str, Any]
    """facts.json; empty where it was not written."""

    def of(self, *runs: str) -> list[Finding]:
        """The findings of some runs, task by task."""
        return [self.findings[run, task] for run in runs for task in TASKS.values() if (run, task) in self.findings]

    @property
    def multiples(self) -> list[float]:
        """Of the trained length, those that any run was asked for."""
        return sorted({cell.multiple for finding in self.findings.values() for cell in finding.cells})

    def locate(self, run: str) -> list[tuple[int, bool]]:
        """(distance of the value in tokens, exact) of each prompt past 1× whose distance is known."""
        known = self.facts.get("distance", {})
        cells = [cell for task in LOCATED for cell in self.findings[run, task].cells if cell.multiple > 1]
        return [(known[prompt], exact) for cell in cells for exact, prompt in cell.answers.values() if prompt in known]


def read_evidence(folder: Path) -> Evidence:
    """All that was kept in a folder."""
    facts = folder / "facts.json"
    known = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}
    return Evidence(findings=read_findings(folder), facts=known)


# ---------------------------------------------------------------------------- runs


def show_findings(evidence: Evidence, findings: Sequence[Finding]) -> Iterator[str]:
    """Scores, then paired tests, one row a run and task; then why a length was not measured."""
    rows = [[one.run, one.task, *(show_score(one, multiple) for multiple in evidence.multiples)] for one in findings]
    yield lay_out(["model", "task", *(f"{multiple:g}×" for multiple in evidence.multiples)], rows)
    tested = sorted({test.multiple for one in findings for test in one.tests})
    if tested:
        header = ["model", "task", *(f"1× : {multiple:g}×" for multiple in tested), "by the rules"]
        yield lay_out(header, [[one.run, one.task, *(show_test(one, m) for m in tested), say_working(one)] for one in findings])
    unmeasured = [cell.length for finding in findings for cell in finding.cells if cell.length.outcome != "measured"]
    for outcome, reason in dict.fromkeys((length.outcome, length.reason) for length in unmeasured):
        yield f"`{outcome}`: {reason}."


def show_score(finding: Finding, multiple: float) -> str:
    """A share with its interval; or the outcome, or that there is no run: never a number for what was not measured."""
    cell = next((cell for cell in finding.cells if cell.multiple == multiple), None)
    if cell is None:
        return "not run"
    if cell.n:
        return show_share(cell.exact, cell.n)
    return "no prompt" if cell.length.outcome == "measured" else cell.length.outcome


def show_test(finding: Finding, multiple: float) -> str:
    """Prompts answered only at 1× : only at the multiple, p, and in brackets p after Holm's correction."""
    test = next((test for test in finding.tests if test.multiple == multiple), None)
    if test is None:
        return "no test"
    p = show_p(test.p)
    return f"{test.only_window} : {test.only_here}, p {p if p.startswith('<') else f'= {p}'} ({show_p(test.p_holm)})"


def say_running(finding: Finding) -> str:
    """What became of the lengths, in words."""
    return {
        "runs": "runs at every length asked for",
        "hard limit": "hard limit past 1×",
        "in part": "some lengths were not measured",
        "not run": "not run",
    }[judge_running(finding)]


def say_working(finding: Finding) -> str:
    """What became of the scores, in words; of the lengths, where there is no score to compare."""
    working, window = judge_working(finding), finding.window
    if working == "cannot" and window:
        return f"cannot do the task within its window ({window.exact / window.n:.2f} at 1×)"
    if working == "degrades":
        return f"degrades at {join([f'{test.multiple:g}×' for test in finding.tests if test.lower])}"
    return "holds" if working == "holds" else say_running(finding)


def say_results(findings: Sequence[Finding]) -> str:
    """What each run did, one sentence a run."""
    groups: dict[str, dict[str, list[str]]] = {}
    for finding in findings:
        groups.setdefault(finding.run, {}).setdefault(say_working(finding), []).append(finding.task)
    return " ".join(
        f"`{run}`: " + "; ".join(f"{what} ({join(tasks)})" for what, tasks in said.items()) + "." for run, said in groups.items()
    )


# ---------------------------------------------------------------------------- facts


def show_state(evidence: Evidence) -> Iterator[str]:
    """Bytes carried on, one row a model."""
    state = evidence.facts.get("state", {})
    lengths = sorted({int(tokens) for sizes in state.values() for tokens in sizes})
    if not lengths:
        return
    yield "Bytes carried on after so many tokens, the most within the segment that follows; for comparison the cache of rope:"
    rows = [
        [name, *(f"{sizes[str(tokens)]:,}" if str(tokens) in sizes else "not measured" for tokens in lengths)]
        for name, sizes in state.items()
    ]
    yield lay_out(["model", *(f"{tokens:,} tokens" for tokens in lengths)], rows, right=range(1, len(lengths) + 1))


def show_sight(evidence: Evidence, *runs: str) -> Iterator[str]:
    """How far back the last logits depend on a token at all."""
    sight = {run: found for run, found in evidence.facts.get("sight", {}).items() if run in runs}
    said = [f"{run} {found['farthest']:,} of {found['tokens'] - 1:,}" for run, found in sight.items()]
    if said:
        yield f"Tokens back to the farthest one that the last logits depend on at all, by their gradient: {join(said)}."


def show_reach(evidence: Evidence, *runs: str) -> Iterator[str]:
    """Scores by the needle's distance, one row a model."""
    edges, located = list_edges(evidence), {run: evidence.locate(run) for run in runs}
    if not edges or not any(located.values()):
        return
    bins = list(zip([0, *edges[:-1]], edges, strict=True))
    rows = [
        [run, *(show_answers([exact for distance, exact in found if low < distance <= high]) for low, high in bins)]
        for run, found in located.items()
    ]
    yield f"Exact answers by how far back the value stands, in tokens ({join(LOCATED)}, all lengths past 1×):"
    yield lay_out(["model", *(f"{low + 1}–{high}" for low, high in bins)], rows)


def show_answers(answers: Sequence[bool]) -> str:
    """Their share with its interval and n; or that there is none."""
    return f"{show_share(sum(answers), len(answers))}, n = {len(answers)}" if answers else "no prompt"


def list_edges(evidence: Evidence) -> list[int]:
    """Upper ends of the distances' bins: what one layer of Transformer-XL remembers, what all see, 4 and 8 times the trained length."""
    models, sight = (evidence.facts.get(name, {}) for name in ("models", "sight"))
    trained = max((model["trained_length"] for model in models.values()), default=0)
    memory = models.get("transformer-xl", {}).get("memory_length", trained)
    seen = sight.get("transformer-xl", {}).get("farthest", 2 * trained)
    return sorted({memory, seen, 4 * trained, 8 * trained} - {0})


def show_cost(evidence: Evidence) -> Iterator[str]:
    """Seconds and multiply-adds of each model that was timed."""
    for name, cost in evidence.facts.get("cost", {}).items():
        exponents = ["", *(f"{value:.2f}" for value in cost["exponents"])]
        columns = zip(cost["tokens"], cost["seconds"], exponents, cost["multiply_adds_per_token"], strict=True)
        rows = [
            [f"{tokens:,}", f"{seconds:.3g}", exponent, *(f"{counts[kind]:,.0f}" for kind in COUNTED)]
            for tokens, seconds, exponent, counts in columns
        ]
        yield f"{name}, seconds of one forward, the best of {cost['best_of']} ({cost['machine']}):"
        yield lay_out(["tokens", "seconds", "exponent", *COUNTED.values()], rows, right=range(6))
    if evidence.facts.get("cost"):
        yield (
            "The exponent is the logarithm to base 2 of the time over the time at half the length: 1 is proportion, 2 the square. "
            "Multiply-adds are counted from the config, per token, for the keys that a query may see; the output layer's are paid for "
            "each position whose logits are asked for, here the last."
        )


# ---------------------------------------------------------------------------- words


def join(words: Sequence[str]) -> str:
    """
    >>> join(["2×", "4×", "8×"]), join(["2×"]), join([])
    ('2×, 4× and 8×', '2×', '')
    """
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), *words[-1:]])


def show_p(p: float) -> str:
    """
    >>> show_p(0.031249), show_p(1.0), show_p(0.0000076), show_p(2e-17)
    ('0.031', '1', '7.6e-6', '< 1e-9')
    """
    return "< 1e-9" if p < 1e-9 else show_small(p, 2)


def show_small(value: float, digits: int = 1) -> str:
    """
    >>> show_small(0.000001), show_small(0.25)
    ('1e-6', '0.2')
    """
    return f"{value:.{digits}g}".replace("e-0", "e-")
