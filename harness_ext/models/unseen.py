"""What is new to a model's rotary pairs past its trained length: for each set of them, as it is and under each method that changes frequencies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from harness_ext.models.extensions import rotary
from harness_ext.models.extensions.circles import Circles, find_new, isolate, read_circles
from harness_ext.models.extensions.extension import METHODS
from harness_ext.models.extensions.method import Method, Setting, Subject

MULTIPLES = (2, 4, 8)
AS_IS = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class New:
    """At one length."""

    extend: str
    """Method, its factor the multiple; `none` for the model as it is."""
    multiple: int
    """Length over trained length."""
    pairs: int
    """That meet angles which training did not show."""
    share: float
    """Of the angles that those pairs reach, the share that is new, in the mean over them; 0 where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Angles:
    """One set of rotary pairs, with what it saw in training."""

    layer_type: str
    """Of the layers that turn by it; empty where all are alike."""
    layers: int | None
    """How many those are; None where the config does not tell."""
    of_layers: int | None
    """How many layers there are in all."""
    pairs: int
    """That turn at all; each is two dimensions of a head."""
    turning: int
    """Of them, those that complete a turn within `tokens`."""
    critical_dimension: int
    """Dimensions of those (Liu et al., arXiv 2310.05209)."""
    slowest_turns: float
    """Turns of the slowest pair within `tokens`."""
    tokens: int
    """That a query saw in training: the trained length, or the window."""
    window: int | None
    """Tokens that these layers see at most; None where they see all."""
    before: str
    """The checkpoint's own rope type, where the trained length is that of the model before it was extended so."""
    new: tuple[New, ...]
    """Past the trained length."""


def find_angles(subject: Subject) -> tuple[Angles, ...]:
    """One for each set of rotary pairs; none where a model has none. Nothing is changed in the model.

    Raises ModelError where its modules cannot be built without weights.
    """
    sets = read_circles(subject)
    if not sets:
        return ()
    new: list[list[New]] = [[] for _ in sets]
    for method in _list_methods(subject):
        for multiple in MULTIPLES:
            for found, circles in zip(new, _read_under(method, multiple, subject), strict=True):
                pairs, share = find_new(circles, multiple * subject.trained)
                found.append(New(extend=method.name if method else AS_IS, multiple=multiple, pairs=pairs, share=share))
    return tuple(
        Angles(
            layer_type=circles.layer_type,
            layers=circles.layers,
            of_layers=circles.of_layers,
            pairs=len(circles.seen.frequencies),
            turning=circles.seen.turning,
            critical_dimension=circles.seen.critical_dimension,
            slowest_turns=circles.seen.slowest,
            tokens=circles.seen.tokens,
            window=circles.seen.window,
            before=circles.before,
            new=tuple(found),
        )
        for circles, found in zip(sets, new, strict=True)
    )


def _list_methods(subject: Subject) -> Iterator[Method | None]:
    """Those that change frequencies, or let a table go on; None is the model as it is. LongRoPE's factors have to be given."""
    if "rotary_table" in subject.schemes:
        yield METHODS["regrow"]
        return
    yield None
    yield from (
        method
        for name, method in METHODS.items()
        if method.why_not is rotary.why_not and name != "longrope" and not method.why_not(subject)
    )


def _read_under(method: Method | None, multiple: int, subject: Subject) -> list[Circles]:
    if method is None or "rotary_table" in subject.schemes:  # a table that is regrown goes on as it began
        return read_circles(subject)
    alone = dataclasses.replace(subject, model=isolate(subject.model))
    sets = read_circles(alone)
    method.install(alone, Setting(tokens=multiple * subject.trained, factor=float(multiple), options=method.options))
    return sets


def show_angles(found: Angles) -> Iterator[tuple[str, str]]:
    """Lines for a reader, each with its label."""
    still = found.pairs - found.turning
    where = f"its window of {found.tokens:,} tokens" if found.window else f"{found.tokens:,} tokens"
    layers = f"{found.layers} of {found.of_layers} layers; " if found.layers and found.layers != found.of_layers else ""
    before = f", before its {found.before} extension" if found.before else ""
    yield (
        f"rotary {found.layer_type}".strip(),
        f"{layers}{found.pairs} pairs of dimensions; {found.turning} turn at least once within {where}{before}",
    )
    slowest = f"{found.slowest_turns:.2g} of a turn" if still else f"{found.slowest_turns:.3g} turns"
    yield (
        "",
        f"critical dimension {found.critical_dimension} of {2 * found.pairs} (Liu et al., arXiv 2310.05209); "
        f"the slowest pair makes {slowest}",
    )
    if found.window:
        yield "new angles", "none at any length: these layers never see farther than their window"
        return
    if not still:
        yield "new angles", "none at any length: every pair has turned"
        return
    shown = {
        name: _show_new([new for new in found.new if new.extend == name]) for name in dict.fromkeys(new.extend for new in found.new)
    }
    alike: dict[str, list[str]] = {}
    for name, text in shown.items():
        alike.setdefault(text, []).append("as it is" if name == AS_IS else name)
    for number, (text, names) in enumerate(alike.items()):
        yield "" if number else "new angles", f"{', '.join(names)}: {text}"


def _show_new(found: list[New]) -> str:
    """Lengths, pairs, and how much of what those pairs reach is new."""
    if not any(new.pairs for new in found):
        return f"none up to {found[-1].multiple}×"
    return ", ".join(
        f"at {new.multiple}× {new.pairs} pair{'s' * (new.pairs != 1)} ({new.share:.0%} of the angles)" for new in found
    )
