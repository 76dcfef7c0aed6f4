"""What a curve's arms say of why it falls, for figures, tables and a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness_ext.results.causes import Arm, choose_headline, say_cause, say_points
from harness_ext.results.records import ArmPoint, CauseName, Curve, Difference, Point, Prediction

Row = dict[str, Any]
TITLES: Mapping[Arm, str] = {
    "long": "long: the plain prompt",
    "stretched": "stretched: few tokens, far apart",
    "packed": "packed: all tokens, at known positions",
    "emptied": "emptied: one word for filler",
    "packed_emptied": "packed and emptied",
    "shifted": "shifted: few tokens, further on",
    "other_text": "other text for filler",
    "distractors": "distractors: other needles for filler",
}
"""Arm → as a figure calls it, in the order in which arms are shown."""
HEADS: Mapping[CauseName, str] = {
    "positions": "positions",
    "number": "tokens",
    "content": "content",
    "number_and_content": "tokens and content",
    "positions_and_number": "positions and tokens",
}
"""Cause → over a column of its effects."""
ORDERS_SAID = (
    "effects are means over the orders in which causes can come (orders ±: half of what they differ by at most, where causes work "
    "through each other); 95 % intervals, paired and clustered by haystack; see docs/method.md"
)


def list_arms(curve: Curve) -> list[Row]:
    """A row an arm and length, the plain prompt among them; then what was predicted, as an arm of its own. None without arms."""
    if not curve.arms:
        return []
    measured = [_list_point(arm, point) for arm in TITLES for point in _find_points(curve, arm) if point.multiple]
    predicted = [
        {
            "arm": "predicted",
            "series": "predicted",
            "order": 0,
            "length": one.length,
            "multiple": one.multiple,
            "score": one.value,
            "low": one.lower,
            "high": one.upper,
            "n": 0,
            "outcome": "predicted",
            "reason": _say_source(one),
        }
        for one in curve.predictions
    ]
    return measured + predicted


def list_causes(curve: Curve) -> list[Row]:
    """A row a length past the trained one: what is lost, and of it each effect, in words for a table."""
    return [
        {
            "multiple": cause.multiple,
            "length": cause.length,
            "lost": next((_tell(loss) for loss in cause.losses if loss.arm == "long"), None),
            "effects": [
                {"cause": HEADS[effect.cause], **_tell(effect), "least": effect.least, "most": effect.most}
                for effect in cause.effects
            ],
        }
        for cause in curve.causes
    ]


def list_reasons(curve: Curve) -> list[str]:
    """Why effects are missing or taken together, a line a reason, with the lengths that have it."""
    found: dict[str, list[str]] = {}
    for cause in curve.causes:
        if cause.reason:
            found.setdefault(cause.reason, []).append(f"{cause.multiple:.3g}×")
    return [f"{', '.join(multiples)}: {reason}" for reason, multiples in found.items()]


def list_left_out(curve: Curve) -> list[Row]:
    """A row for each reason why arms were not run: which arms, at which multiples."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for point in curve.arms:
        if point.outcome != "measured":
            found.setdefault((point.outcome, point.reason), {}).setdefault(point.arm, []).append(point.multiple or 0)
    return [
        {
            "outcome": outcome,
            "reason": reason,
            "arms": [*arms],
            "multiples": sorted({multiple for multiples in arms.values() for multiple in multiples}),
        }
        for (outcome, reason), arms in found.items()
    ]


def say_why(curve: Curve) -> str:
    """The sentence of a curve; empty where no length past the trained one was run."""
    headline = choose_headline(curve.causes)
    return say_cause(headline) if headline else ""


def say_baselines(curve: Curve) -> str:
    """How far short and emptied prompts are from plain ones at the trained length; empty where that is unknown."""
    told = [f"{one.arm} {_sign(one)}" for one in curve.baselines if one.arm in ("stretched", "shifted", "emptied")]
    if not told:
        return ""
    return f"at the trained length, in points against the plain prompt: {', '.join(told)}; far from 0, that arm is another task"


def show_why(curve: Curve, width: int) -> Iterator[str]:
    """Lines for a terminal: the sentence, the arms' scores, the effects, what was left out, and apart from them what is predicted."""
    if not curve.arms:
        return
    yield from fold(f"why: {say_why(curve)}" if curve.causes else "why: no length past the trained length was run", width)
    multiples = sorted({row["multiple"] for row in list_arms(curve) if row["arm"] != "predicted"})
    yield from _show_table(
        ["arm, exact in percent", *(f"{multiple:.3g}×" for multiple in multiples)],
        [
            [arm, *(_say_score(next((p for p in points if p.multiple == multiple), None)) for multiple in multiples)]
            for arm in TITLES
            if (points := _find_points(curve, arm))
        ],
    )
    rows = list_causes(curve)
    heads = list(dict.fromkeys(effect["cause"] for row in rows for effect in row["effects"]))
    if heads:
        yield from _show_table(
            ["points lost at", "all", *heads, "orders ±"],
            [
                [
                    f"{row['multiple']:.3g}×",
                    row["lost"]["said"],
                    *(next((e["said"] for e in row["effects"] if e["cause"] == head), "·") for head in heads),
                    f"{50 * max(effect['most'] - effect['least'] for effect in row['effects']):.0f}",
                ]
                for row in rows
                if row["effects"]
            ],
        )
        yield from fold(ORDERS_SAID, width)
    for line in list_reasons(curve):
        yield from fold(line, width)
    if said := say_baselines(curve):
        yield from fold(said, width)
    for left in list_left_out(curve):
        at = ", ".join(f"{multiple:.3g}×" for multiple in left["multiples"])
        yield from fold(f"left out: {', '.join(left['arms'])} at {at}, {left['outcome']}: {left['reason']}", width)
    for row in list_arms(curve):
        if row["arm"] == "predicted":
            ends = f" [{100 * row['low']:.0f}, {100 * row['high']:.0f}]" if row["low"] is not None else ""
            yield from fold(
                f"predicted, not measured, at {row['multiple']:.3g}×: {100 * row['score']:.0f}{ends} percent; {row['reason']}",
                width,
            )


def _find_points(curve: Curve, arm: Arm) -> Sequence[Point | ArmPoint]:
    return curve.points if arm == "long" else [point for point in curve.arms if point.arm == arm]


def _list_point(arm: Arm, point: Point | ArmPoint) -> Row:
    details = point.score_details
    interval = details.uncertainty.confidence_interval if details else None
    return {
        "arm": arm,
        "series": TITLES[arm],
        "order": [*TITLES].index(arm),
        "length": point.length,
        "multiple": point.multiple,
        "score": details.score if details else None,
        "low": interval.lower if interval else None,
        "high": interval.upper if interval else None,
        "n": details.uncertainty.num_samples if details else 0,
        "outcome": point.outcome,
        "reason": point.reason,
    }


def _tell(found: Any) -> Row:
    return {"value": found.value, "lower": found.lower, "upper": found.upper, "said": say_points(found)}


def _say_source(found: Prediction) -> str:
    drawn_on = f"{found.packed_from:,}, drawn on" if found.packed_from < found.length else "as many"
    return (
        f"from plain prompts of {found.plain_from:,} tokens, stretched ones that far and packed ones of {drawn_on}; "
        "the interval is of chance alone, see docs/method.md"
    )


def _say_score(point: Point | ArmPoint | None) -> str:
    if point is None:
        return "·"
    return f"{100 * point.score_details.score:.0f}" if point.score_details else "none"


def _sign(found: Difference) -> str:
    return f"{'+' if found.value > 0 else ''}{say_points(found)}"


def _show_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    for row in [heads, *rows]:
        yield "    " + "  ".join(
            [f"{row[0]:<{widths[0]}}", *(f"{text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True))]
        )


def fold(text: str, width: int) -> list[str]:
    """The text in lines of a terminal, all but the first further in."""
    return textwrap.wrap(text, max(40, width), subsequent_indent="    ", break_on_hyphens=False, initial_indent="  ")
