"""A task's prompts: what each sample hides, in which haystack, at which depth and length.

A sample keeps its facts and its haystack at every length and depth, so that cells are compared on the same question.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator

from harness_ext.errors import HaystackError, LengthError, TaskFileError
from harness_ext.sweep.fit import Filler, Fitted, count_bare, fit
from harness_ext.sweep.frame import Frame
from harness_ext.sweep.haystack import Haystack
from harness_ext.sweep.needle import Document, Facts, build_document, draw_facts, draw_facts_alike, draw_values, narrow
from harness_ext.sweep.seeds import generator
from harness_ext.sweep.spec import TaskSpec


class Prompts:
    """The prompts of `spec` over `haystack`, as they stand in `frame`. The same seed gives the same bytes, in any order."""

    def __init__(self, spec: TaskSpec, haystack: Haystack, frame: Frame) -> None:
        self.spec, self.haystack, self.frame = spec, haystack, frame
        self._values = draw_values(spec, self._rng("values"), taken=lambda value: value in haystack.source)
        self._facts: list[Facts] = []
        self._fillers: dict[int, Filler] = {}

    def beside(self, haystack: Haystack) -> Prompts:
        """Prompts that hide the same facts in another haystack."""
        other = copy.copy(self)  # what was drawn, and is drawn later, is one list for both
        other.haystack, other._fillers = haystack, {}
        return other

    def facts(self, sample: int, depth: float) -> Facts:
        """What the sample hides, and what of it is asked at `depth`.

        Raises TaskFileError where the task's kind of value has too few for so many samples.
        """
        try:
            while len(self._facts) <= sample:
                self._facts.append(self._draw_facts(self._rng("keys", len(self._facts))))
        except LookupError as error:
            raise TaskFileError(
                f"{self.spec.task}: field 'value': {self.spec.value} admits only {error}; ask for wider values"
            ) from None
        return narrow(self.spec, self._facts[sample], depth)

    def document(self, sample: int, depth: float) -> Document:
        """The sample's text without filler."""
        return build_document(self.spec, self.facts(sample, depth), depth, self._rng("depths", sample))

    def count_bare(self) -> int:
        """Tokens of the longest of all samples without filler: no length below it can be asked for."""
        return max(count_bare(self.document(sample, self.spec.depths[0]), self.frame) for sample in range(self.spec.samples))

    def build(self, sample: int, depth: float, length: int) -> tuple[Document, Fitted]:
        """One prompt of exactly `length` tokens. Raises as `fit`."""
        document = self.document(sample, depth)
        return document, self.fit(document, sample, length)

    def fit(self, document: Document, sample: int, length: int, like: Document | None = None) -> Fitted:
        """A document of the sample's in its haystack, in a prompt of exactly `length` tokens. `like` as for `fit.fit`.

        Raises LengthError where there is none, HaystackError where the haystack holds what is asked.
        """
        if sample not in self._fillers:
            self._fillers[sample] = Filler(self._sentences(sample), self.frame)
        try:
            fitted = fit(document, self._fillers[sample], length, self.frame, like)
        except LengthError as error:
            raise LengthError(f"{self.spec.task}: {error}") from None
        outside = fitted.body
        for needle in document.needles:
            outside = outside.replace(needle, "", 1)
        for value in self._facts[sample].values:
            if value in outside:
                raise HaystackError(f"{self.spec.task}: the value {value!r} stands outside its needle too; give another haystack")
        return fitted

    def _draw_facts(self, rng: random.Random) -> Facts:
        if not self.spec.every_depth:
            return draw_facts(self.spec, self._values, rng)
        alone = dataclasses.replace(self.spec, every_depth=False)

        def cost(facts: Facts) -> int:
            document = build_document(alone, facts, 0.0, rng)
            return count_bare(dataclasses.replace(document, needles=(), depths=()), self.frame)

        return draw_facts_alike(self.spec, self._values, rng, cost)

    def _sentences(self, sample: int) -> Iterator[str]:
        keys, values = zip(*self.facts(sample, self.spec.depths[0]).pairs, strict=True)
        rng = self._rng("haystack", sample)
        return self.haystack.sentences(rng, lambda text: text in keys or any(value in text for value in values))

    def _rng(self, *purpose: str | float) -> random.Random:
        return generator(self.spec.task, self.spec.seed, *purpose)
