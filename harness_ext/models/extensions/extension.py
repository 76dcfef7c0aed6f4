"""One extension on one loaded model: refused or installed, and proved to be in effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness_ext.errors import ModelError
from harness_ext.models.extensions import (
    dynamic,
    linear,
    llama3,
    logn,
    longrope,
    ntk,
    regrow,
    rotary,
    self_extend,
    sinks,
    table,
    temperature,
    yarn,
)
from harness_ext.models.extensions.circles import find_new, read_circles
from harness_ext.models.extensions.effect import Effect, read_effect
from harness_ext.models.extensions.method import Method, Setting, Subject

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        linear.METHOD,
        ntk.METHOD,
        dynamic.METHOD,
        yarn.METHOD,
        llama3.METHOD,
        longrope.METHOD,
        temperature.METHOD,
        logn.METHOD,
        self_extend.METHOD,
        sinks.METHOD,
        table.TILE,
        table.CLAMP,
        table.INTERPOLATE,
        regrow.METHOD,
    )
}

PINNED = Method(
    name="none",
    source="the checkpoint's own",
    changes="the checkpoint's own frequencies, pinned to each prompt's length",
    why_not=lambda subject: "",
    install=rotary.pin_own,
    per_length=True,
)
"""What a checkpoint with `dynamic` or `longrope` frequencies runs under when no method is asked for."""


def find_method(name: str) -> Method:
    """The method of that name. Raises ModelError for an unknown one."""
    found = METHODS.get(str(name).replace("_", "-"))
    if found is None:
        raise ModelError(f"extend={name} was asked for; there is {', '.join(METHODS)}")
    return found


def check_applies(method: Method, subject: Subject) -> None:
    """Raises ModelError where a method does not apply to a model: with the reason, and the methods that do."""
    reason = method.why_not(subject)
    if reason:
        others = [name for name, other in METHODS.items() if not other.why_not(subject)]
        known = f"what applies: {', '.join(others)}" if others else "nothing does"
        raise ModelError(f"extend={method.name} was asked for, but {reason}; {known}")


class Extension:
    """A method on a model. `options`: the user's, `factor` among them. Raises ModelError where the method does not apply."""

    def __init__(self, method: Method, subject: Subject, options: Mapping[str, Any]) -> None:
        check_applies(method, subject)
        self.method, self.subject = method, subject
        self.factor = options.get("factor")
        if self.factor is not None and (
            isinstance(self.factor, bool) or not isinstance(self.factor, (int, float)) or self.factor < 1
        ):
            raise ModelError(f"factor={self.factor!r} was given; expected a number from 1, the longest length over the trained one")
        self.options = {**method.options, **{name: value for name, value in options.items() if name in method.options}}
        self.before = read_effect(subject.model)
        self.after: dict[int, Effect] = {}
        """Length in tokens → what was in effect at it. One entry for a method that does not depend on the prompt's length."""
        # Other methods leave frequencies alone, and some of them move positions.
        turns = method is PINNED or method.why_not is rotary.why_not
        self._circles = read_circles(subject) if turns else []
        self._new: dict[int, list[tuple[int, float]]] = {}
        self._installed: tuple[int, float] | None = None

    def prepare(self, tokens: int, longest: int) -> None:
        """Puts the method in effect for a prompt of `tokens`, where the longest of the run has `longest`.

        Raises ModelError where the method changes nothing, even at the longest.
        """
        target = tokens if self.method.per_length else longest
        factor = float(self.factor or max(longest, self.subject.trained) / self.subject.trained)
        if self._installed == (target, factor):
            return
        if self._installed is None and self.method is not PINNED and target != longest:
            self._install(longest, factor)
        self._install(target, factor)

    def _install(self, target: int, factor: float) -> None:
        first = self._installed is None
        self.method.install(self.subject, Setting(tokens=target, factor=factor, options=self.options))
        self._installed = (target, factor)
        effect = read_effect(self.subject.model)
        if first and effect == self.before and self.method is not PINNED:
            raise ModelError(
                f"extend={self.method.name} changed nothing: up to {target} tokens (trained length {self.subject.trained}, factor {factor:g}) "
                "it leaves this model as it is; ask for longer prompts, or give factor=…"
            )
        self.after = {**self.after, target: effect} if self.method.per_length else {target: effect}
        new = [find_new(circles, target) for circles in self._circles]
        self._new = {**self._new, target: new} if self.method.per_length else {target: new}

    def describe(self) -> dict[str, Any]:
        """For the results file: the method, its numbers, the fingerprints before and after, and what angles were new at which length."""
        found = {
            "method": self.method.name,
            "source": self.method.source,
            "factor": self._installed[1] if self._installed else self.factor,
            "options": self.options,
            "before": self.before,
            "after": {str(length): effect for length, effect in sorted(self.after.items())},
        }
        if not self._circles:
            return found
        return {**found, "angles": [self._describe_circles(index) for index in range(len(self._circles))]}

    def _describe_circles(self, index: int) -> dict[str, Any]:
        circles = self._circles[index]
        return {
            "layer_type": circles.layer_type,
            "pairs": len(circles.seen.frequencies),
            "critical_dimension": circles.seen.critical_dimension,
            "new": {
                str(length): dict(zip(("pairs", "share"), new[index], strict=True)) for length, new in sorted(self._new.items())
            },
        }
