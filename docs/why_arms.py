"""What takes the score: the section of docs/why.md on the arms, from the records in results/, with its figure.

`results/DEVELOPER__MODEL/` holds the runs of `extrapolate_why` (`python benchmarks/records.py OUT --publish`). Sentences, shares and
intervals are those of the records; what a scheme's construction implies is put beside them as checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt

from harness_ext.results.causes import say_points
from harness_ext.results.records import ArmPoint, Curve, PublishedRun, Run
from harness_ext.results.store import read_results
from harness_ext.results.tables import lay_out
from harness_ext.results.why import HEADS, TITLES, list_left_out, say_why

TASK = "extrapolate_why"
SHOWN = ("long", "stretched", "packed", "emptied", "shifted")
"""Arms of the figure."""
COLOURS = {"long": "#000000", "stretched": "#D55E00", "packed": "#0072B2", "emptied": "#999999", "shifted": "#009E73"}
DASHES = {"long": [1, 0], "stretched": [1, 0], "packed": [1, 0], "emptied": [4, 3], "shifted": [1, 3]}
RELATIVE = ("reference/rope", "reference/alibi", "reference/relative")
"""Models in which only distances count."""
HEAD = """\
The same needles, on prompts in which only one thing is new ([method.md](method.md)): *stretched*, few tokens at the positions of a long prompt; *packed*, all its tokens at
positions of the trained range; *emptied*, one word over and over for filler; *shifted*, a short prompt further on. What is lost at a length is shared out among unseen
positions, the number of tokens, and what the filler says; the shares sum to what is lost. Where attention goes meanwhile: [attention.md](attention.md)."""
FAR = """\
Each prompt has the same 163 tokens, whatever length it stands for: 80 of them (`--metadata '{"arms": ["stretched", "shifted"], "multiples": [1, 2, 4, 8, 16, 32, 64, 128], "samples": 1}'`), out to 1,048,576 positions, take SmolLM2-135M
43 s on two idle cores, 19 of them in the model. A shift does nothing, as in any rotary model. A stretch to twice the trained length takes all answers, those too whose needle stands right before the question: what stands far then is the beginning of the
prompt alone, on which much of this model's attention rests ([attention.md](attention.md)). At 1.5× above the needle stands in the middle, within the trained distance of the question, and stretched prompts are answered: four prompts a score, so no more than a look."""
COMMAND = """\
```
python benchmarks/records.py OUT --publish --only rope-why learned-why …   # the runs: lm_eval --tasks extrapolate_why
```"""


@dataclass(frozen=True)
class Experiment:
    """A model's arms."""

    run: Run
    curve: Curve

    @property
    def name(self) -> str:
        """The model's, and its override if it has one."""
        method = self.run.override.method
        return self.run.model_info.id + ("" if method == "none" else f", {method}")


def read_experiments(results: Path) -> list[Experiment]:
    """All runs with arms, each model's together."""
    published, problems = read_results(results)
    assert not problems, problems
    return sorted(_list_experiments(published), key=lambda one: (not one.name.startswith("reference/rope"), one.name))


def _list_experiments(published: Sequence[PublishedRun]) -> Iterator[Experiment]:
    for found in published:
        for task in found.run.tasks:
            if task.evaluation_name == TASK:
                yield Experiment(found.run, task.curve)


def write_arms(experiments: Sequence[Experiment]) -> Iterator[str]:
    """The section, part by part."""
    swept = [one for one in experiments if one.curve.points]
    yield "## What takes the score: unseen positions, more tokens, or what they say"
    yield HEAD
    yield "![Exact matches of each model against length, one line an arm](why-arms.svg)"
    yield "\n".join(f"- `{one.name}`: {say_why(one.curve) or 'nothing past the trained length was run'}." for one in swept)
    yield lay_out(["model", "length", "points lost", *("positions", "tokens", "content", "orders ±")], [*list_effects(swept)])
    yield (
        "In points of a hundred, in brackets 95 % intervals, paired and clustered by haystack. *Orders ±* is half of what a share differs by over the orders in which causes can "
        "come: where it is large, causes work through each other and a share is a convention."
    )
    yield "What the construction of each model implies, and what was measured:"
    yield "\n".join(f"- {said}: **{'yes' if held else 'no'}** ({shown})." for said, held, shown in check_construction(swept))
    left = [line for one in experiments for line in _say_left_out(one)]
    if left:
        yield "Left out:"
        yield "\n".join(left)
    far = [one for one in experiments if not one.curve.points]
    if far:
        yield "Positions alone, as far as they go:"
        yield from (show_far(one) for one in far)
        yield FAR
    yield COMMAND


def list_effects(experiments: Sequence[Experiment]) -> Iterator[list[str]]:
    """A row a model and length past the trained one."""
    for one in experiments:
        for cause in one.curve.causes:
            lost = next((say_points(loss) for loss in cause.losses if loss.arm == "long"), "")
            shares = {HEADS[effect.cause]: say_points(effect) for effect in cause.effects}
            apart = [HEADS["positions"], HEADS["number"], HEADS["content"]]
            cells = [shares.pop(head, "") for head in apart]
            joined = "; ".join(f"{head} {share}" for head, share in shares.items())
            widest = max(((effect.most - effect.least) / 2 for effect in cause.effects), default=0.0)
            cells[1] = " ".join(part for part in (cells[1], joined, "" if cause.effects else "not measurable") if part)
            yield [one.name, f"{cause.multiple:g}×", lost, *cells, f"{100 * widest:.0f}" if cause.effects else ""]


def check_construction(experiments: Sequence[Experiment]) -> Iterator[tuple[str, bool, str]]:
    """(what is implied, whether it held, the numbers)."""
    for one in experiments:
        scores = _scores(one.curve)
        past = sorted({multiple for _, multiple in scores if multiple > 1})
        if one.name in RELATIVE:
            at = [scores["shifted", multiple] for multiple in [1.0, *past] if ("shifted", multiple) in scores]
            yield (f"`{one.name}`: a shift does nothing, since only distances count", len(set(at)) == 1, _percent(at))
        if one.name == "reference/learned":
            ended = [point for point in one.curve.arms if point.arm in ("stretched", "shifted") and (point.multiple or 0) > 1]
            refused = [point.outcome for point in ended]
            yield (
                f"`{one.name}`: it can be stretched no further than its table",
                set(refused) == {"hard_limit"},
                ", ".join(sorted(set(refused))),
            )
            packed = [scores["packed", multiple] for multiple in past if ("packed", multiple) in scores]
            yield (
                f"`{one.name}`: more tokens than its table has rows can be read at the table's positions",
                bool(packed),
                _percent(packed),
            )


def show_far(one: Experiment) -> str:
    """A table of the arms that were run without the sweep."""
    points: dict[tuple[str, float], ArmPoint] = {
        (point.arm, point.multiple or 0): point for point in one.curve.arms if point.score_details
    }
    multiples = sorted({multiple for _, multiple in points})
    arms = [arm for arm in TITLES if any(name == arm for name, _ in points)]
    rows = [[arm, *(_show(points.get((arm, multiple))) for multiple in multiples)] for arm in arms]
    return lay_out([f"{one.name}, exact in percent", *(f"{multiple:g}×" for multiple in multiples)], rows)


def _show(point: ArmPoint | None) -> str:
    if point is None or point.score_details is None:
        return ""
    interval = point.score_details.uncertainty.confidence_interval
    ends = f" [{100 * interval.lower:.0f}, {100 * interval.upper:.0f}]" if interval else ""
    return f"{100 * point.score_details.score:.0f}{ends}"


def _scores(curve: Curve) -> Mapping[tuple[str, float], float]:
    found = {("long", point.multiple or 0): point.score_details.score for point in curve.points if point.score_details}
    return found | {(point.arm, point.multiple or 0): point.score_details.score for point in curve.arms if point.score_details}


def _say_left_out(one: Experiment) -> Iterator[str]:
    for row in list_left_out(one.curve):
        multiples = ", ".join(f"{multiple:g}×" for multiple in row["multiples"])
        yield f"- `{one.name}`: {', '.join(row['arms'])} at {multiples}: {row['outcome']}, {row['reason']}."


def _percent(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.0f}" for value in values) or "none"


def draw_arms(experiments: Sequence[Experiment]) -> alt.ConcatChart:
    """A panel a model, a line an arm."""
    panels = []
    for one in experiments:
        points: list[dict[str, Any]] = [
            {"multiple": point.multiple, "score": point.score_details.score, "arm": arm, **_ends(point)}
            for arm in SHOWN
            for point in (one.curve.points if arm == "long" else [point for point in one.curve.arms if point.arm == arm])
            if point.score_details and point.multiple and point.multiple >= 1
        ]
        multiples = sorted({point["multiple"] for point in points})
        x = alt.X("multiple:Q", title=None).scale(type="log", base=2, nice=False, padding=10)
        x = x.axis(values=multiples, labelExpr="format(datum.value, '.3~g') + '×'", grid=False)
        y = alt.Y("score:Q", title=None).scale(domain=[0, 1]).axis(format="%", tickCount=3)
        colour = (
            alt.Color("arm:N")
            .scale(domain=[*COLOURS], range=[*COLOURS.values()])
            .legend(title=None, orient="bottom", symbolType="stroke", symbolStrokeWidth=3)
        )
        dash = alt.StrokeDash("arm:N").scale(domain=[*DASHES], range=[*DASHES.values()]).legend(None)
        base = alt.Chart(alt.InlineData(values=points))
        layers = [
            base.mark_rule(opacity=0.35).encode(x=x, y="low:Q", y2="high:Q", color=colour),
            base.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour, strokeDash=dash),
            base.mark_point(filled=True, size=28, opacity=1).encode(x=x, y=y, color=colour),
        ]
        panels.append(alt.layer(*layers).properties(title=one.name, width=210, height=130))
    return (
        alt.concat(*panels, columns=3)
        .configure(background="white")
        .configure_title(fontSize=12, anchor="start")
        .configure_legend(labelFontSize=12)
    )


def _ends(point: object) -> dict[str, float]:
    details = getattr(point, "score_details", None)
    interval = details.uncertainty.confidence_interval if details else None
    return {"low": interval.lower, "high": interval.upper} if interval else {}
