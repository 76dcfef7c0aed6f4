"""Kept runs → what they say: scores, paired tests and verdicts, each by a rule that stands in this file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jsonlines

from harness_ext.cells import Length
from harness_ext.results.statistics import holm, mcnemar

MODELS = ("learned", "sinusoidal", "relative", "transformer-xl", "memformer", "alibi", "nope", "rope")
EXTENDED = ("learned-table-tile", "learned-table-clamp", "learned-table-interpolate")
BARE = "learned"
"""The model that the extended ones are."""
TASKS = {"passkey_extrapolate": "passkey", "niah_single_extrapolate": "needle", "copy_extrapolate": "copy"}
"""lm_eval's name → ours."""
ALPHA = 0.05
"""The level of the page's tests together."""
ABLE = 0.85
"""The score at 1× from which a model is said to do a task."""
SQUARE = 1.5
"""The exponent from which growth is nearer to the square than to proportion."""
ROUNDING = 1e-5
"""The share of the largest logit up to which a difference is rounding in float32."""

RULES = {
    "runs": "every length asked for was measured.",
    "hard limit": "every length past 1× has the outcome `hard_limit`: the model has no position for it.",
    "cannot do the task within its window": f"the score at 1× is below {ABLE}. Then nothing is said of length.",
    "degrades": f"the score at a multiple is lower than at 1×, with p < {ALPHA} after Holm's correction over all tests of this page.",
    "holds": "no such difference, at every length past 1×. That is no proof that there is none.",
    "exception, degradation, nothing": "in a task, at a length past 1×, a model shows an exception if that length is a hard limit; "
    "degradation if it degrades there; nothing if it does not.",
    "borne out": "each check under the claim says yes; *not borne out*: each says no; *in part*: some do; *not settled*: one could "
    "not be made.",
    "square": f"an exponent of time of {SQUARE} or more between the two longest lengths.",
    "rounding": f"a difference of at most {ROUNDING:.5f} of the largest logit.",
    "still answers": f"a share of {ABLE} or more.",
}
"""Word → rule, as the page states them."""

Key = tuple[float, int]
"""(depth, sample): prompts of one key hide the same thing at the same depth, at every length."""
Answer = tuple[bool, str]
"""(exact, the prompt's hash)."""
Running = Literal["runs", "hard limit", "in part", "not run"]
Working = Literal["holds", "degrades", "cannot", "untested"]
Outcome = Literal["exception", "degradation", "nothing", "cannot do the task", "not settled"]
Conclusion = Literal["borne out", "not borne out", "in part", "not settled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run on the prompts of one task and length."""

    length: Length
    """With what became of it."""
    answers: Mapping[Key, Answer]
    """None where the length was not measured."""

    @property
    def n(self) -> int:
        """Prompts."""
        return len(self.answers)

    @property
    def exact(self) -> int:
        """Of them, those answered exactly."""
        return sum(exact for exact, _ in self.answers.values())

    @property
    def multiple(self) -> float:
        """Of the trained length; 0 where it is unknown."""
        return self.length.multiple or 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """One length against the model's own window, on the prompts of the same samples and depths."""

    multiple: float
    """Of the trained length."""
    n: int
    """Pairs of prompts."""
    only_window: int
    """Pairs answered exactly only at 1×."""
    only_here: int
    """Pairs answered exactly only at this length."""
    p: float
    """McNemar's, exact and two-sided."""
    p_holm: float = 1.0
    """After Holm's correction over all tests of the page."""

    @property
    def lower(self) -> bool:
        """Whether the score is lower here, beyond chance."""
        return self.only_window > self.only_here and self.p_holm < ALPHA


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One run on one task."""

    run: str
    """A model, or `learned` under an extension."""
    task: str
    """Our name of it."""
    cells: tuple[Cell, ...]
    """Shortest first; none where there is no such run."""
    window: Cell | None
    """The model at 1×, without any extension."""
    tests: tuple[Paired, ...] = ()
    """Of the lengths past 1×; under an extension of 1× too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A part of a claim, as a question with the answer that the numbers give."""

    asked: str
    """A statement that can be so or not."""
    answer: bool | None
    """None where it was not measured."""
    evidence: str = ""
    """The numbers."""


# ---------------------------------------------------------------------------- reading


def read_findings(folder: Path) -> dict[tuple[str, str], Finding]:
    """(run, task) → its finding, tests corrected together; one without cells for what is not in `folder`.

    Raises ValueError where two runs were given different prompts.
    """
    cells = {(run, TASKS[task]): read_cells(folder / run, task) for run in (*MODELS, *EXTENDED) for task in _asked(run)}
    check_prompts(cells)
    findings = {}
    for (run, task), found in cells.items():
        window = _find(cells[_bare(run), task], 1.0)
        finding = Finding(run=run, task=task, cells=found, window=window)
        findings[run, task] = replace(finding, tests=tuple(make_tests(finding)))
    return correct(findings)


def read_cells(folder: Path, task: str) -> tuple[Cell, ...]:
    """The lengths of one task in a kept run, shortest first; only measured ones have answers."""
    if not (folder / f"{task}.jsonl").is_file():
        return ()
    plan = json.loads((folder / "results.json").read_text(encoding="utf-8"))["configs"][task]["lengths"]
    answers: dict[int, dict[Key, Answer]] = {}
    with jsonlines.open(folder / f"{task}.jsonl") as rows:
        for row in rows:
            key = (row["doc"]["depth"], row["doc"]["sample"])
            answers.setdefault(row["doc"]["length"], {})[key] = (row["filtered_resps"] == ["exact"], row["prompt_hash"])
    lengths = [Length(tokens=one["length"], multiple=one["multiple"], outcome=one["outcome"], reason=one["reason"]) for one in plan]
    return tuple(Cell(length=one, answers=answers.get(one.tokens, {}) if one.outcome == "measured" else {}) for one in lengths)


def check_prompts(cells: Mapping[tuple[str, str], Sequence[Cell]]) -> None:
    """Raises ValueError where two runs have different prompts under one task, length, depth and sample."""
    seen: dict[tuple[str, int, Key], tuple[str, str]] = {}
    for (run, task), found in cells.items():
        answers = [(cell.length.tokens, key, prompt) for cell in found for key, (_, prompt) in cell.answers.items()]
        for tokens, key, prompt in answers:
            first, other = seen.setdefault((task, tokens, key), (run, prompt))
            if other != prompt:
                raise ValueError(f"{first} and {run} were given different prompts ({task}, {tokens} tokens); run both anew")


def make_tests(finding: Finding) -> Iterator[Paired]:
    """Each length against 1×, past it; under an extension at 1× too, since it may change what the window does."""
    window = finding.window
    first = 1.0 if finding.run in EXTENDED else 1.0 + 1e-9
    for cell in finding.cells:
        shared = [key for key in cell.answers if window and key in window.answers]
        if cell.multiple < first or not window or not shared:
            continue
        pairs = [(window.answers[key][0], cell.answers[key][0]) for key in shared]
        only_window, only_here = pairs.count((True, False)), pairs.count((False, True))
        yield Paired(
            multiple=cell.multiple, n=len(pairs), only_window=only_window, only_here=only_here, p=mcnemar(only_window, only_here)
        )


def correct(findings: Mapping[tuple[str, str], Finding]) -> dict[tuple[str, str], Finding]:
    """The findings with all their tests as one family."""
    adjusted = iter(holm([test.p for finding in findings.values() for test in finding.tests]))
    return {
        name: replace(finding, tests=tuple(replace(test, p_holm=next(adjusted)) for test in finding.tests))
        for name, finding in findings.items()
    }


def count_tests(findings: Mapping[tuple[str, str], Finding]) -> int:
    """Tests of the family."""
    return sum(len(finding.tests) for finding in findings.values())


def find_smallest(tests: int) -> int:
    """The fewest prompts that, all lost and none won, are a difference among so many tests even where no other test helps.

    >>> find_smallest(1), find_smallest(70)
    (6, 12)
    """
    return next(count for count in range(1, 1000) if mcnemar(count, 0) * tests < ALPHA)


# ---------------------------------------------------------------------------- the rules


def judge_running(finding: Finding) -> Running:
    """Whether the lengths that were asked for could be run at all."""
    if not finding.cells:
        return "not run"
    if all(cell.n for cell in finding.cells):
        return "runs"
    past = [cell for cell in finding.cells if cell.multiple > 1]
    return "hard limit" if past and all(cell.length.outcome == "hard_limit" for cell in past) else "in part"


def judge_working(finding: Finding) -> Working:
    """Whether the model still does past its window what it does in it."""
    window, past = finding.window, [cell for cell in finding.cells if cell.multiple > 1]
    if window is None or not window.n:
        return "untested"
    if window.exact / window.n < ABLE:
        return "cannot"
    if any(test.lower for test in finding.tests):
        return "degrades"
    return "holds" if past and all(cell.n for cell in past) else "untested"


def judge_outcome(finding: Finding, multiple: float) -> Outcome:
    """What a model shows in a task at one multiple past its window."""
    here = replace(
        finding,
        cells=tuple(cell for cell in finding.cells if cell.multiple == multiple),
        tests=tuple(test for test in finding.tests if test.multiple == multiple),
    )
    running, working = judge_running(here), judge_working(here)
    if running == "hard limit":
        return "exception"
    known: dict[Working, Outcome] = {"degrades": "degradation", "holds": "nothing", "cannot": "cannot do the task"}
    return known.get(working, "not settled") if running == "runs" else "not settled"


def conclude(checks: Sequence[Check]) -> Conclusion:
    """
    >>> conclude([Check(asked="a", answer=True), Check(asked="b", answer=False)])
    'in part'
    """
    answers = {check.answer for check in checks}
    if None in answers or not answers:
        return "not settled"
    if answers == {True}:
        return "borne out"
    return "not borne out" if answers == {False} else "in part"


# ---------------------------------------------------------------------------- checks that several claims make


def check_runs(findings: Sequence[Finding]) -> Check:
    """Whether all of them run at every length."""
    running = [judge_running(finding) for finding in findings]
    answer = None if "not run" in running else all(one == "runs" for one in running)
    measured = sum(bool(cell.n) for finding in findings for cell in finding.cells)
    asked = sum(len(finding.cells) for finding in findings)
    missing = [*dict.fromkeys(finding.run for finding in findings if not finding.cells)]
    shown = f"{measured} of {asked} scores" + (f"; not run: {', '.join(missing)}" if missing else "")
    return Check(asked="every length asked for was measured", answer=answer, evidence=shown)


def check_hard_limit(findings: Sequence[Finding]) -> Check:
    """Whether none of them runs past 1×, for want of positions."""
    running = [judge_running(finding) for finding in findings]
    answer = None if "not run" in running else all(one == "hard limit" for one in running)
    past = [cell for finding in findings for cell in finding.cells if cell.multiple > 1]
    stopped = sum(cell.length.outcome == "hard_limit" for cell in past)
    return Check(asked="every length past 1× is a hard limit", answer=answer, evidence=f"{stopped} of {len(past)} scores")


def check_degrades(findings: Sequence[Finding]) -> Check:
    """Whether a task that the model does within its window degrades past it; None where it does none."""
    able = [finding for finding in findings if judge_working(finding) in ("holds", "degrades")]
    worse = [finding.task for finding in able if judge_working(finding) == "degrades"]
    answer = True if worse else (False if _is_settled(findings, able) else None)
    return Check(
        asked="a task that it does within its window degrades past it", answer=answer, evidence=f"{len(worse)} of {len(able)} tasks"
    )


def check_holds(findings: Sequence[Finding]) -> Check:
    """Whether every task that the model does within its window holds past it; None where it does none."""
    able = [finding for finding in findings if judge_working(finding) in ("holds", "degrades")]
    held = [finding.task for finding in able if judge_working(finding) == "holds"]
    answer = False if len(held) < len(able) else (True if _is_settled(findings, able) else None)
    return Check(
        asked="every task that it does within its window holds past it", answer=answer, evidence=f"{len(held)} of {len(able)} tasks"
    )


def _is_settled(findings: Sequence[Finding], able: Sequence[Finding]) -> bool:
    return bool(able) and all(judge_working(finding) != "untested" for finding in findings)


def _asked(run: str) -> list[str]:
    return list(TASKS)[:1] if run in EXTENDED else list(TASKS)


def _bare(run: str) -> str:
    return BARE if run in EXTENDED else run


def _find(cells: Sequence[Cell], multiple: float) -> Cell | None:
    return next((cell for cell in cells if cell.multiple == multiple), None)
