"""The claims that docs/why.md puts to the test: what is said, which models test it, and the checks that make its verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from why_tables import Evidence, join, show_cost, show_findings, show_reach, show_sight, show_small, show_state
from why_verdicts import (
    ABLE,
    EXTENDED,
    MODELS,
    ROUNDING,
    SQUARE,
    Check,
    check_degrades,
    check_hard_limit,
    check_holds,
    check_runs,
    judge_outcome,
)

from harness_ext.results.tables import lay_out

OUTCOMES = {"exception": "exceptions", "degradation": "degradation", "nothing": "nothing at all"}
"""Outcome → as the claim calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One answer to the question, and what is asked of it."""

    title: str
    """Of its section."""
    said: str
    """As people say it."""
    runs: tuple[str, ...] = ()
    """The models that test it; none where only the facts do."""
    checks: tuple[Callable[[Evidence], Check], ...]
    """The verdict's parts."""
    show: tuple[Callable[[Evidence], Iterator[str]], ...] = ()
    """More paragraphs."""
    shown: str
    """Where on the page it is seen."""


# ---------------------------------------------------------------------------- learned, relative


def check_raises(evidence: Evidence) -> Check:
    """Whether the learned model itself fails one token past its table."""
    asked, table = "the bare forward fails one token past the table", evidence.facts.get("table")
    if not table:
        return Check(asked=asked, answer=None)
    shown = f"`{table['error']}: {table['message']}`" if table["error"] else "no error"
    return Check(asked=asked, answer=bool(table["error"]), evidence=f"{shown} at {table['tokens']} tokens")


def show_extended(evidence: Evidence) -> Iterator[str]:
    """The learned model under the extensions of its table."""
    yield (
        "A longer table can be made without training: `table-tile` repeats it, `table-clamp` gives every later position its last row, "
        "`table-interpolate` stretches it over the longest prompt, so that positions within the window change too. "
        "Each is compared with the bare model at 1×, on the same passkeys."
    )
    yield from show_findings(evidence, evidence.of(*EXTENDED))


def check_alike(evidence: Evidence) -> Check:
    """Whether a query's scores have one position term for all distances past the clip, and more than one before it."""
    asked, alike = "all distances past the clip have the same position term in a query's scores", evidence.facts.get("alike")
    if not alike:
        return Check(asked=asked, answer=None)
    past, below, clip = alike["largest_difference_past_clip"], alike["spread_below_clip"], alike["clip_distance"]
    shown = f"largest difference {show_small(past)} from distance {clip} on, {show_small(below, 2)} before it"
    return Check(asked=asked, answer=past == 0.0 < below, evidence=shown)


# ---------------------------------------------------------------------------- recurrence


def check_state(evidence: Evidence) -> Check:
    """Whether the recurrent models carry on as many bytes after a long text as after a short one."""
    state = evidence.facts.get("state", {})
    sizes = {name: set(state[name].values()) for name in ("transformer-xl", "memformer") if name in state}
    shown = "; ".join(f"{name} {join([f'{size:,}' for size in sorted(found)])} bytes" for name, found in sizes.items())
    answer = all(len(found) == 1 for found in sizes.values()) if len(sizes) == 2 else None
    return Check(asked="what is carried on does not grow with the text", answer=answer, evidence=shown)


def check_sight(evidence: Evidence) -> Check:
    """Whether Transformer-XL sees no farther than its memory reaches, layer by layer, and its own segment."""
    asked = "Transformer-XL sees at most layers × memory, and the segment's own tokens, back"
    model, sight = (evidence.facts.get(name, {}).get("transformer-xl") for name in ("models", "sight"))
    if not model or not sight:
        return Check(asked=asked, answer=None)
    layers, memory, segment = (model[name] for name in ("num_hidden_layers", "memory_length", "segment_length"))
    bound, farthest = layers * memory + segment - 1, sight["farthest"]
    shown = f"{layers} × {memory} + {segment} − 1 = {bound}; by the gradient {farthest} of {sight['tokens'] - 1}"
    return Check(asked=asked, answer=farthest <= bound, evidence=shown)


def check_near(evidence: Evidence) -> Check:
    """Whether Transformer-XL answers what stands within one layer's memory, in texts longer than it was trained on."""
    memory = evidence.facts.get("models", {}).get("transformer-xl", {}).get("memory_length", 0)
    near = [exact for distance, exact in evidence.locate("transformer-xl") if distance <= memory]
    return Check(
        asked="past 1× it still answers what stands within one layer's memory",
        answer=sum(near) / len(near) >= ABLE if near else None,
        evidence=f"{sum(near)} of {len(near)} at most {memory} tokens back",
    )


def check_far(evidence: Evidence) -> Check:
    """Whether Transformer-XL answers nothing from where it cannot see."""
    sight = evidence.facts.get("sight", {}).get("transformer-xl", {}).get("farthest", 0)
    far = [exact for distance, exact in evidence.locate("transformer-xl") if sight and distance > sight]
    asked, shown = "it answers nothing from beyond what it sees", f"{sum(far)} of {len(far)} more than {sight} tokens back"
    return Check(asked=asked, answer=not any(far) if far else None, evidence=shown)


# ---------------------------------------------------------------------------- all models


def show_longest(evidence: Evidence) -> Iterator[str]:
    """How far rope was run, scores or not."""
    cost, model = (evidence.facts.get(name, {}).get("rope") for name in ("cost", "models"))
    if cost and model:
        longest = max(cost["tokens"])
        times = longest / model["trained_length"]
        yield f"The longest forward that it was given (for its time, below) is {longest:,} tokens, {times:g} times the trained length."


def check_outcome(outcome: str) -> Callable[[Evidence], Check]:
    """A check: whether some model shows this outcome in some task at some length."""

    def check(evidence: Evidence) -> Check:
        found = list_outcomes(evidence)
        seen = [name for name in MODELS if any(name in row.get(outcome, []) for row in found.values())]
        unsettled = not found or any("not settled" in row for row in found.values())
        shown = f"{len(seen)} of {len(MODELS)} models" + (f": {join(seen)}" if seen else "")
        asked = f"{OUTCOMES[outcome]} in some task at some length"
        return Check(asked=asked, answer=True if seen else (None if unsettled else False), evidence=shown)

    return check


def show_outcomes(evidence: Evidence) -> Iterator[str]:
    """Which models show what, one row a length and task."""
    found = list_outcomes(evidence)
    columns = [*OUTCOMES, *sorted({outcome for row in found.values() for outcome in row} - {*OUTCOMES})]
    rows = [
        [f"{multiple:g}×", task, *(f"{len(row[name])}: {', '.join(row[name])}" if name in row else "none" for name in columns)]
        for (multiple, task), row in found.items()
    ]
    yield lay_out(["length", "task", *columns], rows)


def list_outcomes(evidence: Evidence) -> dict[tuple[float, str], dict[str, list[str]]]:
    """(multiple past 1×, task) → outcome → the models that show it there."""
    found: dict[tuple[float, str], dict[str, list[str]]] = {}
    for multiple in [multiple for multiple in evidence.multiples if multiple > 1]:
        for finding in evidence.of(*MODELS):
            row = found.setdefault((multiple, finding.task), {})
            row.setdefault(judge_outcome(finding, multiple), []).append(finding.run)
    return found


# ---------------------------------------------------------------------------- output layer, cost


def check_positions(evidence: Evidence) -> Check:
    """Whether the output layer gives a whole sequence what it gives each position alone."""
    heads = evidence.facts.get("head", {}).values()
    asked = "the layer gives a whole sequence the logits that it gives each position alone, but for rounding"
    if not heads:
        return Check(asked=asked, answer=None)
    worst = max(head["largest_difference"] / head["largest_logit"] for head in heads)
    counts = join(sorted({f"{head['positions']:,}" for head in heads}))
    shown = f"{counts} positions in each of {len(heads)} models: at most {show_small(worst)} of the largest logit"
    return Check(asked=asked, answer=worst <= ROUNDING, evidence=shown)


def check_parameters(evidence: Evidence) -> Check:
    """Whether the output layer has no parameter for a position."""
    heads, models = evidence.facts.get("head", {}), evidence.facts.get("models", {})
    expected = {name: models[name]["hidden_size"] * models[name]["vocab_size"] for name in heads}
    answer = all(heads[name]["parameters"] == count for name, count in expected.items()) if heads else None
    shown = join(sorted({f"{head['parameters']:,}" for head in heads.values()}))
    return Check(asked="it has width × vocabulary parameters, none of them for a position", answer=answer, evidence=shown)


def check_growth(name: str, asked: str, square: bool) -> Callable[[Evidence], Check]:
    """A check: whether a model's time grows as the square between the two longest lengths, or not."""

    def check(evidence: Evidence) -> Check:
        cost = evidence.facts.get("cost", {}).get(name)
        if not cost:
            return Check(asked=asked, answer=None)
        last, tokens = cost["exponents"][-1], cost["tokens"]
        shown = f"exponent {last:.2f} from {tokens[-2]:,} to {tokens[-1]:,} tokens"
        return Check(asked=asked, answer=(last >= SQUARE) is square, evidence=shown)

    return check


# ---------------------------------------------------------------------------- the claims


def _of(check: Callable[..., Check], *runs: str) -> Callable[[Evidence], Check]:
    return lambda evidence: check(evidence.of(*runs))


CLAIMS = (
    Claim(
        title="A learned table",
        said="With learned absolute positions a longer input cannot be run: positions past the table have no embedding.",
        runs=("learned",),
        checks=(_of(check_hard_limit, "learned"), check_raises),
        show=(show_extended,),
        shown="figure, line `learned`; the table of extensions",
    ),
    Claim(
        title="A sinusoidal table",
        said="Sinusoids can be computed for any position, but the weights are unfamiliar with what comes out.",
        runs=("sinusoidal",),
        checks=(_of(check_runs, "sinusoidal"), _of(check_degrades, "sinusoidal")),
        shown="figure, line `sinusoidal`",
    ),
    Claim(
        title="Relative positions, clipped",
        said="With relative positions clipped at a distance any length can be run, and all far tokens look equally far.",
        runs=("relative",),
        checks=(_of(check_runs, "relative"), check_alike),
        show=(lambda evidence: show_reach(evidence, "relative"),),
        shown="figure, line `relative`; its second check",
    ),
    Claim(
        title="Segment recurrence",
        said="Transformer-XL and Memformer take inputs longer than a segment, carry a state of fixed size, and see as far as that reaches.",
        runs=("transformer-xl", "memformer"),
        checks=(_of(check_runs, "transformer-xl", "memformer"), check_state, check_sight, check_near, check_far),
        show=(
            show_state,
            lambda evidence: show_sight(evidence, "transformer-xl", "memformer"),
            lambda evidence: show_reach(evidence, "transformer-xl", "memformer"),
        ),
        shown="figure, lines `transformer-xl` and `memformer`; the tables of bytes and distances",
    ),
    Claim(
        title="Rotary angles",
        said="Rotary angles can be computed for any position, so that nothing stops the model; the scores fall all the same.",
        runs=("rope",),
        checks=(_of(check_runs, "rope"), _of(check_degrades, "rope")),
        show=(show_longest,),
        shown="figure, line `rope`",
    ),
    Claim(
        title="A maximum length overridden",
        said="Overriding a model's maximum length gives exceptions, performance degradation, or nothing at all.",
        checks=tuple(check_outcome(outcome) for outcome in OUTCOMES),
        show=(show_outcomes,),
        shown="figure, all lines; the table of outcomes",
    ),
    Claim(
        title="ALiBi",
        said="With a bias linear in the distance a model trained on short inputs works on long ones.",
        runs=("alibi",),
        checks=(_of(check_runs, "alibi"), _of(check_holds, "alibi")),
        show=(lambda evidence: show_reach(evidence, "alibi"),),
        shown="figure, line `alibi`",
    ),
    Claim(
        title="No positions",
        said="A decoder without any position embedding extrapolates, since it has no position that could be unfamiliar.",
        runs=("nope",),
        checks=(_of(check_runs, "nope"), _of(check_holds, "nope")),
        show=(lambda evidence: show_reach(evidence, "nope"),),
        shown="figure, line `nope`",
    ),
    Claim(
        title="The output layer",
        said="The output layer does not fix a length: it is applied position by position.",
        checks=(check_positions, check_parameters),
        shown="its checks",
    ),
    Claim(
        title="Cost",
        said="Attention compares each token with each before it, so that time grows with the square of the length, unless memory is bounded.",
        checks=(
            check_growth("rope", "a forward of rope grows as the square", square=True),
            check_growth("transformer-xl", "a forward of transformer-xl, whose memory is bounded, does not", square=False),
        ),
        show=(show_cost,),
        shown="the tables of seconds",
    ),
)
