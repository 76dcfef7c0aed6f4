"""Why a score falls past the trained length: what unseen positions take of it, the number of tokens, and what the filler says.

Arms of one experiment, on the same facts at the same depths, take the causes apart (docs/method.md). Read as a game whose players are
the causes, what a set of causes takes is the loss of the arm in which they are at work and the others are not; each cause is given the
mean of what it adds over all orders in which causes can come. That is the Shapley value (Shapley 1953, "A value for n-person games",
Contributions to the Theory of Games II), over the orders that a precedence admits (Faigle and Kern 1992, "The Shapley value for
cooperative games under precedence constraints", International Journal of Game Theory 21(3)): the filler says nothing where there are no
tokens, so content comes after number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from harness_ext.results.effective_length import FAILS_BELOW
from harness_ext.results.records import ArmName, ArmPoint, Cause, CauseName, Difference, Effect
from harness_ext.results.statistics import take_middle

Floats = NDArray[np.float64]
Arm = Literal["long", ArmName]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
BASES: Mapping[Arm, Arm] = {"packed": "long", "packed_emptied": "emptied"}
"""Arm → the arm that it is at the trained length, where that is another: packed there, a prompt is the plain one."""
PAST_ONLY = frozenset(BASES)
"""Arms that are run past the trained length alone."""
Player = frozenset[str]
POSITIONS, NUMBER, CONTENT = (frozenset({name}) for name in ("positions", "number", "content"))
ARM_OF: Mapping[Player, Arm] = {
    POSITIONS: "stretched",
    NUMBER: "packed_emptied",
    NUMBER | CONTENT: "packed",
    POSITIONS | NUMBER: "emptied",
    POSITIONS | NUMBER | CONTENT: "long",
}
"""Causes → the arm in which they are at work, and no others."""
ORDERS: Mapping[tuple[CauseName, ...], tuple[tuple[Player, ...], ...]] = {
    ("positions", "number", "content"): (
        (POSITIONS, NUMBER, CONTENT),
        (NUMBER, POSITIONS, CONTENT),
        (NUMBER, CONTENT, POSITIONS),
    ),
    ("positions", "number_and_content"): ((POSITIONS, NUMBER | CONTENT), (NUMBER | CONTENT, POSITIONS)),
    ("positions_and_number", "content"): ((POSITIONS | NUMBER, CONTENT),),
}
"""What can be told apart → the orders in which it can come; the finest first. Where an arm is missing, two causes are one player."""
Scores = Mapping[tuple[Arm, int], Floats]
"""(Arm, length) → its score, and then the draws of what it may be, if there are any; all of one length, drawn together."""


def measure_baselines(scores: Scores, trained: int) -> list[Difference]:
    """How far each arm's score at the trained length is from the plain prompt's; empty where that was not measured."""
    plain = scores.get(("long", trained))
    if plain is None:
        return []
    return [_measure(arm, scores[arm, trained] - plain) for arm in ARMS if (arm, trained) in scores]


def explain(scores: Scores, points: Sequence[ArmPoint], lengths: Mapping[int, str], trained: int) -> list[Cause]:
    """What takes how much at each of the `lengths` past the trained one, shortest first.

    `lengths`: length → what became of the plain prompt there. `points` of the arms say why one was left out. Every loss is against the
    same arm at the trained length, so that what a short or an emptied prompt costs of itself is no effect of the length.
    """
    return [_explain(scores, points, length, lengths[length], trained) for length in sorted(lengths) if length > trained]


def find_losses(scores: Scores, length: int, trained: int) -> dict[Arm, Floats]:
    """Arm → what it loses at a length against its own score at the trained length; without those of which either is missing."""
    arms: tuple[Arm, ...] = ("long", *ARMS)
    bases = {arm: (BASES.get(arm, arm), trained) for arm in arms}
    return {arm: scores[bases[arm]] - scores[arm, length] for arm in arms if (arm, length) in scores and bases[arm] in scores}


def share_out(losses: Mapping[Arm, Floats]) -> dict[CauseName, Floats]:
    """Cause → what it adds in each order, (orders, …) over what a loss has. By as many causes as the arms tell apart; none without `long`.

    The mean over orders is the effect. Effects sum to the loss of `long`, whatever the arms say:

    >>> losses = {"long": 0.6, "stretched": 0.5, "packed": 0.1, "emptied": 0.6, "packed_emptied": 0.1}
    >>> {cause: round(float(parts.mean()), 3) for cause, parts in share_out({arm: np.array(loss) for arm, loss in losses.items()}).items()}
    {'positions': 0.5, 'number': 0.1, 'content': 0.0}
    """
    for causes, orders in ORDERS.items():
        if {arm for order in orders for arm in _list_arms(order)} <= losses.keys():
            added = {cause: [] for cause in causes}  # type: dict[CauseName, list[Floats]]
            for order in orders:
                reached = [np.zeros_like(losses["long"]), *(losses[arm] for arm in _list_arms(order))]
                for player, before, after in zip(order, reached, reached[1:], strict=False):
                    added[_name(player)].append(after - before)
            return {cause: np.array(parts) for cause, parts in added.items()}
    return {}


def say_cause(cause: Cause) -> str:
    """What a length's record says, as a sentence.

    >>> lost = Difference(arm="long", value=0.63, lower=0.5, upper=0.7)
    >>> effects = [Effect(cause=name, value=v, lower=v - 0.05, upper=v + 0.05, least=v, most=v) for name, v in (("positions", 0.6), ("number_and_content", 0.03))]
    >>> say_cause(Cause(length=1024, multiple=4, losses=[lost], effects=effects))
    'of the 63 points lost at 4×, 60 [55, 65] are due to unseen positions, 3 [-2, 8] to the number of tokens and what they say'
    """
    at = f"{cause.multiple:.3g}×"
    if not cause.effects:
        alone = next((loss for loss in cause.losses if loss.arm == "stretched"), None)
        also = f"; a short prompt loses {say_points(alone)} points to unseen positions alone" if alone else ""
        return f"at {at} not measurable: {cause.reason}{also}"
    lost = next(loss for loss in cause.losses if loss.arm == "long")
    if _may_be_chance(lost):
        return f"at {at} nothing is lost that could be told from chance: {say_points(lost)} points"
    first, *others = (
        f"{say_points(effect)} {'are due to' if not place else 'to'} {SAID[effect.cause]}"
        for place, effect in enumerate(cause.effects)
    )
    return ", ".join([f"of the {_points(lost.value)} points lost at {at}", first, *others])


SAID: Mapping[CauseName, str] = {
    "positions": "unseen positions",
    "number": "the number of tokens attended to",
    "content": "what the filler says",
    "number_and_content": "the number of tokens and what they say",
    "positions_and_number": "unseen positions and the number of tokens",
}
"""Cause → in words."""


def say_points(found: Difference | Effect) -> str:
    """`55 [48, 60]`, in points of a hundred; `0 (by construction)` where nothing else can come out."""
    if found.lower == found.upper == 0:
        return "0 (by construction)"
    if found.lower is None or found.upper is None:
        return _points(found.value)
    return f"{_points(found.value)} [{_points(found.lower)}, {_points(found.upper)}]"


def choose_headline(causes: Sequence[Cause]) -> Cause | None:
    """The length to say a sentence of: the first at which, past chance, half is lost of what is lost at most; or the longest.

    Further on everything is lost, whatever the cause. None where no length past the trained one was run.
    """
    told = [cause for cause in causes if cause.effects]
    lost = {cause.length: next(loss for loss in cause.losses if loss.arm == "long") for cause in told}
    most = max((loss.value for loss in lost.values()), default=0)
    enough = [cause for cause in told if lost[cause.length].value >= most / 2 and not _may_be_chance(lost[cause.length])]
    return next(iter([*enough, *reversed(told), *reversed(causes)]), None)


def _may_be_chance(loss: Difference) -> bool:
    return (loss.value if loss.lower is None else loss.lower) <= 0


def _explain(scores: Scores, points: Sequence[ArmPoint], length: int, became: str, trained: int) -> Cause:
    losses = find_losses(scores, length, trained)
    left_out: dict[Arm, str] = {
        point.arm: point.outcome for point in points if point.length == length and point.outcome != "measured"
    }
    known = _add_implied(losses, left_out)
    faults = {**dict(find_faults(scores, trained)), **dict(find_harm(known))}
    usable = {arm: loss for arm, loss in known.items() if BASES.get(arm, arm) not in faults}
    shares = share_out(usable) if "long" in usable else {}
    missing = {
        arm: faults.get(BASES.get(arm, arm), left_out.get(arm, "was not run")) for arm in ARM_OF.values() if arm not in usable
    }
    if "long" in missing and "long" not in faults:
        missing["long"] = f"no plain prompt of {trained} tokens was measured" if became == "measured" else became
    return Cause(
        length=length,
        multiple=length / trained,
        losses=[_measure(arm, loss) for arm, loss in losses.items()],
        effects=[_sum_up(cause, parts) for cause, parts in shares.items()],
        reason="" if len(shares) == 3 else _say_missing(missing),
    )


def _add_implied(losses: Mapping[Arm, Floats], left_out: Mapping[Arm, str]) -> dict[Arm, Floats]:
    """The losses, with those that follow where positions do nothing by construction: none, and that of the prompt as it is."""
    found = dict(losses)
    if "long" in losses:
        same: dict[Arm, Floats | None] = {
            "stretched": np.zeros_like(losses["long"]),
            "packed": losses["long"],
            "packed_emptied": losses.get("emptied"),
        }
        found.update({arm: loss for arm, loss in same.items() if loss is not None and left_out.get(arm) == "no_positions"})
    return found


def find_faults(scores: Scores, trained: int) -> Iterator[tuple[Arm, str]]:
    """The arms that fail already where the model was trained, so that no loss can be told."""
    families: tuple[Arm, ...] = ("long", "stretched", "emptied")
    for arm in families:
        score = scores.get((arm, trained))
        if score is not None and score[0] < FAILS_BELOW:
            yield arm, f"{score[0]:.2f} of the answers are right at the trained length already, less than {FAILS_BELOW}"


def find_harm(losses: Mapping[Arm, Floats]) -> Iterator[tuple[Arm, str]]:
    """The emptied arms, where a filler that says nothing loses more than one that says something: then it is not empty to this model."""
    pairs: tuple[tuple[Arm, Arm], ...] = (("emptied", "long"), ("packed_emptied", "packed"))
    for emptied, plain in pairs:
        if emptied in losses and plain in losses:
            more = losses[emptied] - losses[plain]
            low, high = find_ends(more)
            if low is not None and high is not None and low > 0:
                points = f"{_points(float(more[0]))} [{_points(low)}, {_points(high)}]"
                yield (
                    "emptied",
                    f"one word over and over loses {points} points more than text does, so it is no empty filler to this model",
                )
                return


def _say_missing(missing: Mapping[Arm, str]) -> str:
    """Each reason once, with its arms; without the plain prompt nothing else matters."""
    found: dict[str, list[str]] = {}
    for arm, why in missing.items():
        if "long" not in missing or arm == "long":
            found.setdefault(why, []).append(arm)
    return "; ".join(f"{', '.join(arms)}: {why}" for why, arms in found.items())


def _sum_up(cause: CauseName, parts: Floats) -> Effect:
    mean = parts.mean(0)
    ends = find_ends(mean)
    return Effect(
        cause=cause,
        value=float(mean[0]),
        lower=ends[0],
        upper=ends[1],
        least=float(parts[:, 0].min()),
        most=float(parts[:, 0].max()),
    )


def _measure(arm: Arm, difference: Floats) -> Difference:
    ends = find_ends(difference)
    return Difference(arm=arm, value=float(difference[0]), lower=ends[0], upper=ends[1])


def find_ends(found: Floats) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of a value that its draws follow; None twice where there are none."""
    if len(found) == 1:
        return None, None
    low, high = take_middle(found[1:])
    return min(low, float(found[0])), max(high, float(found[0]))


def _list_arms(order: Sequence[Player]) -> list[Arm]:
    """The arms in which the first cause of an order is at work, the first two, and so on."""
    return [ARM_OF[frozenset().union(*order[: place + 1])] for place in range(len(order))]


def _name(player: Player) -> CauseName:
    name: CauseName = "_and_".join(sorted(player, key=["positions", "number", "content"].index))  # type: ignore[assignment]
    return name


def _points(share: float) -> str:
    return f"{100 * share + 0.0:.0f}".replace("-0", "0") if abs(share) < 0.005 else f"{100 * share:.0f}"
