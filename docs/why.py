"""Why a transformer cannot simply be run on longer inputs, by measurement: `python docs/why.py` writes docs/why.md and docs/why.svg.

Reads results/schemes, which benchmarks/schemes.py writes, and the records of the arms; loads no model. Every number and every verdict on the page is computed
from those files: why_verdicts.py holds the rules, why_claims.py the claims and their checks, why_tables.py how things are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import altair as alt
from why_arms import Experiment, draw_arms, read_experiments, write_arms
from why_claims import CLAIMS, Claim
from why_tables import Evidence, join, read_evidence, say_results, show_findings
from why_verdicts import MODELS, RULES, Check, Finding, conclude, count_tests, find_smallest, judge_outcome, judge_running

from harness_ext.positions import SCHEMES
from harness_ext.results.charts import Point, draw_lines, make_point
from harness_ext.results.tables import lay_out

RESULTS = Path(__file__).parent.parent / "results" / "schemes"
TITLES = {"passkey": "passkey", "needle": "single needle", "copy": "copy of 16 words"}
"""Task → as the figure calls it."""
EQUAL = {
    "trained_length": "trained length",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "vocab_size": "vocabulary",
    "steps": "training steps",
    "seed": "seed",
}
"""Fact about a model → in words; named as equal where it is."""
OWN = ("clip_distance", "segment_length", "memory_length", "memory_slots")
"""Facts that only some models have."""
SPREAD = 0.035
"""Octaves between lines at one multiple, so that marks and intervals do not hide each other."""
LIMITS = """\
- The models are tiny, and each scheme was trained once, with one seed: another seed may fall elsewhere.
- The tasks are synthetic, and the models were trained on their kind alone; nothing here is about language.
- Prompts of one sample share their haystack and their value over depths and lengths. Tests and intervals take them as independent,
  so p-values are too small and intervals too narrow by what such prompts have in common.
- An answer that is missed by one token counts as missed."""
ANGLES = (
    "### What RoPE saw",
    """\
A rotary pair of the wavelength λ has shown the weights its whole circle if λ ≤ T, and an arc of it otherwise; only the latter can meet an angle that training never showed
([angles.md](angles.md), `harness-ext inspect MODEL`). The fewer new angles, the less is lost, with one exception: linear interpolation shows none and fails all the same, since it divides the
pairs that turn as well. New angles are one cause of what is lost, frequencies that were never trained are another.""",
    "![New angles by pair and override, against measured scores](angles.svg)",
)
COMMANDS = """\
```
python benchmarks/schemes.py     # the runs and the facts: results/schemes
python docs/why.py               # this page and its figure
```"""


def write_page(evidence: Evidence, experiments: Sequence[Experiment] = ()) -> str:
    """The page, as Markdown."""
    judged = [(claim, [check(evidence) for check in claim.checks]) for claim in CLAIMS]
    sections = [part for number, (claim, checks) in enumerate(judged, 1) for part in write_section(number, claim, checks, evidence)]
    summary = [
        [str(number), claim.said, say_verdict(checks), say_results(evidence.of(*claim.runs)), claim.shown]
        for number, (claim, checks) in enumerate(judged, 1)
    ]
    parts = [
        "# Why can a transformer not simply be run on a longer input than it was trained on?",
        *introduce(evidence),
        "## What came out",
        sum_up(evidence),
        "![Exact matches of the eight models against length, one panel a task](why.svg)",
        "At each multiple the models stand side by side. × marks the last length that a position table has positions for.",
        *sections,
        *(write_arms(experiments) if experiments else ()),
        *(ANGLES if experiments else ()),
        "## Claims and verdicts",
        lay_out(["", "claim", "verdict", "what the models did", "shown by"], summary),
        *("## Limits", LIMITS, "## Made by", COMMANDS),
    ]
    return "\n\n".join(parts) + "\n"


def introduce(evidence: Evidence) -> Iterator[str]:
    """Question, method, models and rules."""
    models, cells = evidence.facts.get("models", {}), [cell for one in evidence.findings.values() for cell in one.cells if cell.n]
    tests, keys = count_tests(evidence.findings), {key for cell in cells for key in cell.answers}
    depths, samples = (len(set(values)) for values in zip(*keys, strict=True)) if keys else (0, 0)
    sizes = join([str(n) for n in sorted({cell.n for cell in cells})]) or "no"
    yield (
        "The usual answers, each put to small models that differ in how they take positions. `docs/why.py` writes this page from kept "
        "runs, numbers and verdicts alike."
    )
    lines = [
        f"Equal: {say_equal(models)}.",
        "Different: the position scheme and what it brings with it (the table below).",
        f"Tasks: {join(list(TITLES.values()))}, on prompts of exactly the length named and the same for all models; {sizes} prompts a "
        f"score ({depths} depths, {samples} samples).",
        "Exact: every token of the answer is the most likely one, given those before it. In brackets 95 % Wilson intervals.",
        "Tests: exact McNemar, two-sided, each length against 1× on the same samples and depths. Prompts answered only at 1× : only at the "
        f"length; p; in brackets p after Holm's correction over the {tests} tests of this page"
        + (f", where a loss of fewer than {find_smallest(tests)} prompts may not show." if tests else "."),
    ]
    yield "\n".join(f"- {line}" for line in lines)
    yield show_models(models)
    yield "The rules of the verdicts:"
    yield "\n".join(f"- *{word}*: {rule}" for word, rule in RULES.items())


def sum_up(evidence: Evidence) -> str:
    """How many models run past 1× at all, and how many of those do at the longest length what they do at 1×."""
    running = {model: {judge_running(finding) for finding in evidence.of(model)} for model in MODELS}
    runs, ends = ([model for model in MODELS if running[model] == {word}] for word in ("runs", "hard limit"))
    longest = max(evidence.multiples, default=0.0)
    outcomes = {
        model: {judge_outcome(finding, longest) for finding in evidence.of(model)} & {"degradation", "nothing"} for model in runs
    }
    groups = {
        "were measured at every length": runs,
        "end with their position table": ends,
        "were not measured, or not at every length": [model for model in MODELS if model not in (*runs, *ends)],
        f"of those measured degrade at {longest:g}× in every task that they do at 1×": _having(outcomes, {"degradation"}),
        f"of those degrade at {longest:g}× in some": _having(outcomes, {"degradation", "nothing"}),
        f"of those degrade at {longest:g}× in none": _having(outcomes, {"nothing"}),
        "of those do none of the tasks at 1×": _having(outcomes, set()),
    }
    said = [f"- {len(names)} {what}" + (f": {join(names)}." if names else ".") for what, names in groups.items()]
    return "\n".join([f"Of the {len(MODELS)} models", "", *said])


def _having(outcomes: Mapping[str, AbstractSet[str]], wanted: AbstractSet[str]) -> list[str]:
    return [model for model, found in outcomes.items() if found == wanted]


def say_equal(models: dict[str, Any]) -> str:
    """What is the same for all models, by their configs and training logs."""
    values = {title: {model[field] for model in models.values()} for field, title in EQUAL.items()}
    same = [f"{title} {next(iter(found))}" for title, found in values.items() if len(found) == 1]
    return ", ".join(["training text, tokenizer, body (pre-norm, SwiGLU, tied embeddings; `training/train.py`)", *same])


def show_models(models: dict[str, Any]) -> str:
    """What differs, one row a model."""
    rows = []
    for name in MODELS:
        model = models.get(name, {})
        schemes = [SCHEMES[scheme] for scheme in model.get("schemes", [])]
        title, source = ("; ".join(getattr(scheme, part) for scheme in schemes) for part in ("title", "source"))
        own = ", ".join(f"{field.replace('_', ' ')} {model[field]}" for field in OWN if field in model)
        sizes = [f"{model['parameters']:,}", str(model["intermediate_size"])] if model else ["not measured", "not measured"]
        rows.append([name, title, source, *sizes, own])
    return lay_out(["model", "positions", "source", "parameters", "feed-forward width", "its own"], rows, right=(3, 4))


def write_section(number: int, claim: Claim, checks: Sequence[Check], evidence: Evidence) -> Iterator[str]:
    """One claim: as said, the scores, the checks and the verdict."""
    findings = evidence.of(*claim.runs)
    yield f"## {number}. {claim.title}"
    yield f"> {claim.said}"
    if findings:
        yield from show_findings(evidence, findings)
    for show in claim.show:
        yield from show(evidence)
    yield "\n".join(show_check(check) for check in checks)
    yield f"**Verdict: {say_verdict(checks)}.** {say_results(findings)}".rstrip()


def show_check(check: Check) -> str:
    """A list item: what was asked, the answer, the numbers."""
    answer = "not measured" if check.answer is None else ("yes" if check.answer else "no")
    return f"- {check.asked[0].upper()}{check.asked[1:]}: **{answer}**" + (f" ({check.evidence})." if check.evidence else ".")


def say_verdict(checks: Sequence[Check]) -> str:
    """The conclusion, with how many checks say yes where it is in between."""
    said = conclude(checks)
    return f"{said} ({sum(bool(check.answer) for check in checks)} of {len(checks)} checks)" if said == "in part" else said


# ---------------------------------------------------------------------------- the figure


def draw(evidence: Evidence) -> alt.ConcatChart:
    """One panel a task, one line a model; where a position table ends, a cross."""
    panels = [draw_panel(evidence, task).properties(title=title, width=330, height=270) for task, title in TITLES.items()]
    return alt.concat(*panels, columns=2).configure(background="white").configure_legend(labelFontSize=12)


def draw_panel(evidence: Evidence, task: str) -> alt.LayerChart:
    """Scores of one task with their intervals as rules, lines side by side at each multiple."""
    findings = {model: evidence.findings[model, task] for model in MODELS}
    points = [point for finding in findings.values() for point in list_points(finding)]
    moved = [{**point, "multiple": point["multiple"] * 2 ** (SPREAD * (MODELS.index(point["model"]) - 3.5))} for point in points]
    lines = draw_lines(points, "model", MODELS)
    # Without the bands: eight of them over each other hide what is under them.
    layers = [layer for layer in lines.layer if getattr(layer.mark, "type", layer.mark) != "area"]
    ends = [
        {**point, "end": f"{point['model']}:\ntable ends"}
        for point in moved
        if ends_after(findings[point["model"]], point["length"])
    ]
    if ends:
        marked = alt.Chart(alt.InlineData(values=ends)).encode(x=alt.X("multiple:Q"), y=alt.Y("score:Q"))
        layers.append(marked.mark_text(text="×", fontSize=24, fontWeight="bold"))
        place: dict[str, Any] = {"align": "right", "dx": -4, "dy": 18, "lineBreak": "\n"}
        for outline in ({"stroke": "white", "strokeWidth": 4}, {}):  # a white edge first, since lines may pass under the words
            layers.append(marked.mark_text(**place, **outline).encode(text="end:N"))
    return alt.LayerChart(layer=layers, data=alt.InlineData(values=moved))


def list_points(finding: Finding) -> list[Point]:
    """One for each length that was measured."""
    return [
        make_point(cell.exact, cell.n, cell.length.tokens, cell.multiple, model=finding.run, task=finding.task)
        for cell in finding.cells
        if cell.n
    ]


def ends_after(finding: Finding, tokens: int) -> bool:
    """Whether this is the last length that the model has positions for."""
    later = [cell for cell in finding.cells if cell.length.tokens > tokens]
    return bool(later) and all(cell.length.outcome == "hard_limit" for cell in later)


def main(results: Path = RESULTS, docs: Path = Path(__file__).parent) -> None:
    """Writes the page and its figure."""
    evidence, experiments = read_evidence(results), read_experiments(results.parent)
    (docs / "why.md").write_text(write_page(evidence, experiments), encoding="utf-8")
    if experiments:
        draw_arms([one for one in experiments if one.curve.points]).save(docs / "why-arms.svg")
    if evidence.multiples:
        draw(evidence).save(docs / "why.svg")


if __name__ == "__main__":
    main()
