"""What rotary angles had to do with it: `python docs/angles.py` writes docs/angles.md and docs/angles.svg.

Reads the records of reference/rope in results/ and the model's rotary modules; no weight is read. Under each override that changes frequencies,
they are computed anew with the recorded factor and options, and have to have the slowest wavelength and attention factor that the record has.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
from transformers import AutoConfig

from harness_ext.angles import TURN, compute_critical_dimension
from harness_ext.model_view import resolve
from harness_ext.models.extensions.circles import Circles, isolate, read_circles
from harness_ext.models.extensions.effect import DIGITS, read_effect
from harness_ext.models.extensions.extension import METHODS
from harness_ext.models.extensions.method import Setting, Subject
from harness_ext.models.inspection import build_without_weights
from harness_ext.positions import read_schemes, read_trained_length
from harness_ext.results.charts import COLOURS, DASHES, MARKS
from harness_ext.results.records import Run, Task
from harness_ext.results.store import read_results
from harness_ext.results.tables import lay_out

REPOSITORY = Path(__file__).parent.parent
MODEL = "reference/rope"
TURNED = ("none", "linear", "yarn", "llama3", "ntk", "dynamic")
"""Overrides that change frequencies or nothing, in the figure's order."""
TASKS = {"passkey_extrapolate": "passkey", "niah_single_extrapolate": "single needle", "copy_extrapolate": "copy"}
AS_IS = "as it is"
GRID = [2 ** (step / 8) for step in range(-8, 25)]
"""Multiples at which angles are computed: they need no run."""
KNOWN = (
    ("Llama 2 7B", 128, 10_000, 4096),
    ("Code Llama 7B", 128, 1_000_000, 16_384),
    ("Llama 3 8B", 128, 500_000, 8192),
    ("SmolLM2-135M", 64, 100_000, 8192),
)
"""Model, dimensions of a head, base, trained length: by their configs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One recorded override of the model, and its angles."""

    name: str
    """As the figure calls it."""
    run: Run
    circles: dict[int, Circles]
    """Length in tokens → the pairs as they are in effect at it."""

    def find_share(self, length: int) -> float:
        """Share of the angles reached at that length which training did not show, in the mean over all pairs."""
        unseen = self.circles[length].find_unseen(length)
        return sum(unseen) / len(unseen)


def read_cases(results: Path) -> list[Case]:
    """Each override of the model in the records. Raises SystemExit where what is recorded of them is not that of what is computed here."""
    published, problems = read_results(results)
    assert not problems, problems
    runs = {
        found.run.override.method: found.run for found in published if found.run.model_info.id == MODEL and _is_sweep(found.run)
    }
    subject = read_subject()
    lengths = [round(multiple * subject.trained) for multiple in GRID]
    return [
        Case(
            name=_name(runs[method]), run=runs[method], circles={length: turn(subject, runs[method], length) for length in lengths}
        )
        for method in TURNED
        if method in runs
    ]


def read_subject() -> Subject:
    """The model, without its weights."""
    config = AutoConfig.from_pretrained(resolve(MODEL), trust_remote_code=False)
    model, trained = build_without_weights(config), read_trained_length(config)
    assert trained is not None
    return Subject(model=model, schemes=read_schemes(config, model), trained=trained.tokens)


def turn(subject: Subject, run: Run, length: int) -> Circles:
    """The model's pairs under a run's override at a length, held to what the record says of them where it does at that length."""
    alone = dataclasses.replace(subject, model=isolate(subject.model))
    (circles,) = read_circles(alone)
    if run.override.method != "none":
        method = METHODS[run.override.method]
        method.install(
            alone, Setting(tokens=length, factor=run.override.factor or 1.0, options={**method.options, **run.override.options})
        )
    recorded = run.override.after if run.override.method != "none" else {str(length): run.override.before}
    static = run.override.method != "none" and not METHODS[run.override.method].per_length
    known = next(iter(recorded.values())) if static else recorded.get(str(length))
    found = read_effect(alone.model)
    alike = known and all(
        math.isclose(found[name], known[name], rel_tol=10 ** (1 - DIGITS)) for name in ("slowest_wavelength", "attention_factor")
    )
    if known and not alike:
        raise SystemExit(
            f"{run.override.method} at {length} tokens: these are not the frequencies that the record was measured under"
        )
    return circles


def _is_sweep(run: Run) -> bool:
    return {task.evaluation_name for task in run.tasks} >= {*TASKS}


def _name(run: Run) -> str:
    if run.override.method == "none":
        return AS_IS
    per_length = METHODS[run.override.method].per_length
    return run.override.method if per_length or not run.override.factor else f"{run.override.method} ×{run.override.factor:g}"


def read_loss(results: Path) -> Task:
    """The model's loss by position, as it is."""
    published, _ = read_results(results)
    tasks = (
        task
        for found in published
        for task in found.run.tasks
        if found.run.model_info.id == MODEL and found.run.override.method == "none"
    )
    return next(task for task in tasks if task.metric == "loss")


# ---------------------------------------------------------------------------- the page


def write_page(cases: Sequence[Case], loss: Task) -> str:
    """The page, as Markdown."""
    plain = cases[0].circles[min(cases[0].circles)].seen
    waves = [TURN / frequency for frequency in plain.frequencies]
    parts = [
        "# Rotary angles that training never showed",
        "`python docs/angles.py` writes this page from `results/` and from the rotary modules of `reference/rope`. "
        "`harness-ext inspect MODEL` says the same of any rotary model, without its weights.",
        "A pair of dimensions with the frequency θ turns by θ·n between two tokens n apart, and repeats itself every λ = 2π/θ tokens. Training on T "
        "tokens shows the weights the angles from 0 to θ·T. With λ ≤ T that is the whole circle, and no distance is ever new to the pair. "
        "With λ > T it is an arc, and a prompt of L tokens leaves it where θ′·L > θ·T, for the frequency θ′ in effect at L. The dimensions of the "
        "pairs that turn are the critical dimension of Liu et al. ([arXiv 2310.05209](https://arxiv.org/abs/2310.05209)): with λᵢ = 2π·b^(2i/d), λᵢ < T "
        "holds for i < d/2 · log_b(T/2π), which is 2·⌈d/2 · log_b(T/2π)⌉ dimensions of d. Here pairs are counted by the frequencies that the modules "
        "hold, so that scaled, partial and mixed ones count as they are; the formula knows none of those.",
        lay_out(["model", "d", "base", "T", "critical dimension"], list(_list_known()), right=(1, 2, 3, 4)),
        f"`reference/rope` was trained on {plain.tokens} tokens with {len(waves)} pairs. {plain.turning} of them turn within that length; "
        f"{len(waves) - plain.turning} have seen an arc, the slowest {plain.slowest:.2g} of its circle (a turn takes it {max(waves):,.0f} tokens).",
        "## Against what was measured",
        "![New angles by pair and by override, and beside them the measured scores and loss of reference/rope](angles.svg)",
        "New: the share of the angles reached at that length which training did not show, in the mean over all pairs. Exact: share of prompts answered "
        "exactly, in brackets 95 % intervals clustered by haystack.",
        *(lay_out(["override", *_heads(task)], list(_list_rows(cases, task)), right=(1, 2, 3)) for task in TASKS),
        "## What it says",
        "\n".join(f"- {line}" for line in _conclude(cases, loss)),
        "## What it does not say",
        "- An angle between two that were seen counts as seen, however much finer the step is: that a method shows no new angle is no promise.\n"
        "- It takes the trained length for trained: positions near it are rare in training where texts are shorter.\n"
        "- Pairs count alike, and weights need not use them alike. Nothing here is fitted, and no score is predicted from it.",
    ]
    return "\n\n".join(parts) + "\n"


def _list_known() -> Iterator[list[str]]:
    for name, dims, base, tokens in KNOWN:
        yield [name, str(dims), f"{base:,}", f"{tokens:,}", str(compute_critical_dimension(dims, base, tokens))]


def _heads(task: str) -> list[str]:
    return [*(f"new at {multiple}×" for multiple in (2, 4, 8)), *(f"{TASKS[task]} at {multiple}×" for multiple in (1, 2, 4, 8))]


def _list_rows(cases: Sequence[Case], task: str) -> Iterator[list[str]]:
    for case in cases:
        points = {point["multiple"]: point for point in list_scores(case, task)}
        tokens = case.run.trained_length.tokens if case.run.trained_length else 0
        new = [f"{case.find_share(multiple * tokens):.0%}" for multiple in (2, 4, 8)]
        yield [case.name, *new, *(_show(points.get(multiple)) for multiple in (1.0, 2.0, 4.0, 8.0))]


def _show(point: dict[str, Any] | None) -> str:
    if point is None:
        return "not measured"
    return f"{100 * point['score']:.0f} [{100 * point['low']:.0f}, {100 * point['high']:.0f}]"


def _conclude(cases: Sequence[Case], loss: Task) -> Iterator[str]:
    """Sentences whose numbers are read from the records; which sentence stands follows from them."""
    scores = {
        case.name: {point["multiple"]: point["score"] for point in list_scores(case, "passkey_extrapolate")} for case in cases
    }
    new = {case.name: case.find_share(8 * (case.run.trained_length.tokens if case.run.trained_length else 0)) for case in cases}
    yield (
        f"As it is, {new[AS_IS]:.0%} of the angles at 8× are new, and the passkey falls from {scores[AS_IS][1.0]:.0%} to {scores[AS_IS][8.0]:.0%}; "
        f"the loss rises from {_loss_at(loss, 1.0):.2f} to {_loss_at(loss, 8.0):.2f} nats a token."
    )
    kept = [name for name in scores if name != AS_IS and new[name] == 0 and scores[name][8.0] >= 0.85]
    lost = [name for name in scores if name != AS_IS and new[name] == 0 and scores[name][8.0] < 0.85]
    between = sorted((name for name in scores if name != AS_IS and new[name] > 0), key=lambda name: new[name])
    if kept:
        yield f"Without a new angle at 8×, it is kept: {_list_scores(kept, scores)} at 8×."
    if between and all(scores[name][8.0] > scores[AS_IS][8.0] and new[name] < new[AS_IS] for name in between):
        yield f"With fewer of them, less is lost: {'; '.join(f'{name} {new[name]:.0%} new and {scores[name][8.0]:.0%} exact' for name in between)}, at 8×."
    if any(name.startswith("linear") for name in lost) and any(name.startswith("llama3") for name in kept):
        yield (
            f"And yet a model may meet no new angle and fail: {_list_scores(lost, scores)} at 8×, and at 1×, within the trained length, "
            f"{_list_scores(lost, scores, 1.0)}. Slow pairs are divided alike by linear and by llama3; linear divides those that turn too, and there "
            "lies the difference. So new angles are one cause of what is lost past the trained length, and frequencies that were never trained are another."
        )


def _list_scores(names: Sequence[str], scores: dict[str, dict[float, float]], multiple: float = 8.0) -> str:
    return ", ".join(f"{name} {scores[name][multiple]:.0%}" for name in names)


def _loss_at(loss: Task, multiple: float) -> float:
    return next(point.score_details.score for point in loss.curve.points if point.multiple == multiple and point.score_details)


def list_scores(case: Case, task: str) -> list[dict[str, Any]]:
    """One for each multiple at which a task was measured."""
    (found,) = (one for one in case.run.tasks if one.evaluation_name == task)
    return [point | {"override": case.name} for point in list_points(found)]


def list_points(task: Task) -> list[dict[str, Any]]:
    """Multiple, score and interval of what was measured."""
    points = []
    for point in task.curve.points:
        details = point.score_details
        if details and (interval := details.uncertainty.confidence_interval):
            points.append({"multiple": point.multiple, "score": details.score, "low": interval.lower, "high": interval.upper})
    return points


# ---------------------------------------------------------------------------- the figure

WIDTH, HEIGHT = 350, 230
OVERLAP = 1.005
"""Of neighbouring cells, so that no light shows between them."""


def draw(cases: Sequence[Case], loss: Task) -> alt.ConcatChart:
    """What is computed above, what was measured below, over the same multiples."""
    panels = [draw_circles(cases[0]), draw_shares(cases), draw_scores(cases), draw_loss(loss)]
    return (
        alt.concat(*(panel.properties(width=WIDTH, height=HEIGHT) for panel in panels), columns=2, spacing=28)
        .resolve_scale(color="independent", shape="independent", strokeDash="independent")
        .configure(background="white")
        .configure_legend(labelFontSize=12)
        .configure_title(anchor="start", fontSize=13)
    )


def _axis(title: str = "length, as a multiple of the trained length") -> alt.X:
    axis = {"values": [0.5, 1, 2, 4, 8], "labelExpr": "format(datum.value, '.3~g') + '×'", "grid": False}
    return alt.X("multiple:Q", title=title).scale(type="log", base=2, domain=[0.48, 8.4], nice=False).axis(**axis)


def _rule() -> alt.Chart:
    return alt.Chart(alt.InlineData(values=[{}])).mark_rule(color="#777777", strokeWidth=1.5).encode(x=alt.XDatum(1))


def draw_circles(case: Case) -> alt.LayerChart:
    """Pair by multiple: the share of the angles reached that is new."""
    rows = []
    edges = [multiple for multiple in GRID if multiple >= 0.5]
    for low, high in itertools.pairwise(edges):
        _, length = min((abs(length - high * _trained(case)), length) for length in case.circles)
        for pair, share in enumerate(case.circles[length].find_unseen(length)):
            rows.append({"multiple": low, "end": high * OVERLAP, "pair": pair, "bottom": pair + 1.04, "new": share})
    seen = case.circles[min(case.circles)].seen
    waves = [TURN / frequency for frequency in seen.frequencies]
    ticks = [pair for pair in range(len(waves)) if pair % 3 == 0]
    named = ", ".join(f"'{waves[pair]:,.0f}'" for pair in ticks)
    y = (
        alt.Y("pair:Q", title="tokens that a pair takes for a turn")
        .scale(domain=[0, len(waves)], reverse=True, nice=False)
        .axis(values=[pair + 0.5 for pair in ticks], labelExpr=f"[{named}][(datum.value - 0.5) / 3]", grid=False)
    )
    legend = alt.Legend(title="new", format="%", gradientLength=140, tickCount=3)
    colour = (
        alt.Color("new:Q")
        .scale(range=["#f3f4f6", "#E69F00", "#D55E00", "#661100"], domain=[0, 1], interpolate="rgb")
        .legend(legend)
    )
    cells = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_rect(stroke=None)
        .encode(x=_axis(), x2="end:Q", y=y, y2="bottom:Q", color=colour)
    )
    line = alt.Chart(alt.InlineData(values=[{"turning": seen.turning}])).encode(y=alt.Y("turning:Q", title=""))
    edge = line.mark_rule(color="#000000", strokeDash=[4, 3])
    said = line.mark_text(align="left", dx=5, dy=-7, fontSize=11).encode(
        x=alt.XDatum(0.5),
        text=alt.value(f"↑ turn within {seen.tokens} tokens: critical dimension {seen.critical_dimension} of {2 * len(waves)}"),
    )
    return alt.layer(cells, edge, said, _rule()).properties(title="Computed: angles that training never showed, as it is")


def _trained(case: Case) -> int:
    assert case.run.trained_length is not None
    return case.run.trained_length.tokens


def _tell_apart(cases: Sequence[Case], legend: bool) -> dict[str, Any]:
    names = [case.name for case in cases]
    shown = alt.Legend(symbolOpacity=1, symbolSize=90, symbolStrokeWidth=0) if legend else None
    return {
        "color": alt.Color("override:N", title=None, legend=shown).scale(domain=names, range=list(COLOURS[: len(names)])),
        "shape": alt.Shape("override:N", title=None, legend=shown).scale(domain=names, range=list(MARKS[: len(names)])),
        "strokeDash": alt.StrokeDash("override:N", legend=None).scale(
            domain=names, range=[list(dash) for dash in DASHES[: len(names)]]
        ),
    }


def draw_shares(cases: Sequence[Case]) -> alt.LayerChart:
    """The mean of that share over all pairs, one line an override."""
    rows = [
        {"multiple": length / _trained(case), "new": case.find_share(length), "override": case.name}
        for case in cases
        for length in case.circles
    ]
    marked = [row for row in rows if row["multiple"] in (0.5, 1.0, 2.0, 4.0, 8.0)]
    y = alt.Y("new:Q", title="new, mean over pairs").scale(domain=[0, 0.5]).axis(format="%", tickCount=5)
    styles = _tell_apart(cases, legend=True)
    lines = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_line()
        .encode(x=_axis(), y=y, color=styles["color"], strokeDash=styles["strokeDash"])
    )
    points = (
        alt.Chart(alt.InlineData(values=marked))
        .mark_point(filled=True, opacity=1, size=60)
        .encode(x=_axis(), y=y, color=styles["color"], shape=styles["shape"])
    )
    none = [case.name for case in cases if not any(row["new"] for row in rows if row["override"] == case.name)]
    said = alt.Chart(alt.InlineData(values=[{"said": ",\n".join(none) + ":\nnone"}] if none else []))
    words = said.mark_text(align="left", baseline="line-bottom", dx=6, dy=-14 * len(none) - 8, fontSize=11, lineBreak="\n").encode(
        x=alt.XDatum(0.5), y=alt.YDatum(0), text="said:N"
    )
    return alt.layer(_rule(), lines, points, words).properties(title="Computed: share of new angles, by override")


def draw_scores(cases: Sequence[Case]) -> alt.LayerChart:
    """Exact matches, one line an override."""
    rows = [point for case in cases for point in list_scores(case, "passkey_extrapolate")]
    y = alt.Y("score:Q", title="exact matches").scale(domain=[0, 1]).axis(format="%", tickCount=5)
    styles = _tell_apart(cases, legend=False)
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=_axis(), color=styles["color"])
    ends = base.mark_rule(opacity=0.6).encode(y=alt.Y("low:Q", title="exact matches"), y2="high:Q")
    lines = base.mark_line().encode(y=y, strokeDash=styles["strokeDash"])
    points = base.mark_point(filled=True, opacity=1, size=60).encode(y=y, shape=styles["shape"])
    return alt.layer(_rule(), ends, lines, points).properties(title="Measured: passkey, by override")


def draw_loss(loss: Task) -> alt.LayerChart:
    """Nats a token by position, as it is."""
    rows = [point for point in list_points(loss) if point["multiple"] >= 0.5]
    y = alt.Y("score:Q", title="loss, nats a token").scale(zero=False).axis(tickCount=5)
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=_axis("position, as a multiple of the trained length"))
    band = base.mark_area(opacity=0.18, color=COLOURS[0]).encode(
        y=alt.Y("low:Q", title="loss, nats a token").scale(zero=False), y2="high:Q"
    )
    line = base.mark_line(color=COLOURS[0], point={"size": 25, "filled": True, "color": COLOURS[0]}).encode(y=y)
    return alt.layer(_rule(), band, line).properties(title="Measured: loss by position, as it is")


def main(results: Path = REPOSITORY / "results", docs: Path = Path(__file__).parent) -> None:
    """Writes the page and its figure."""
    cases, loss = read_cases(results), read_loss(results)
    (docs / "angles.md").write_text(write_page(cases, loss), encoding="utf-8")
    draw(cases, loss).save(docs / "angles.svg")


if __name__ == "__main__":
    main()
