"""Models that are no models: what they know is planted, so what the sweep must find is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.model import LM

Knows = Callable[[str, str], bool]
"""(prompt, answer) → whether the model gives that answer."""


class Scripted(LM):
    """Answers by `knows`; `max_length` tokens at most, where given."""

    def __init__(self, knows: Knows, max_length: int | None = None) -> None:
        super().__init__()
        self.knows = knows
        if max_length:
            self.max_length = max_length
        self.prompts: list[str] = []

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.prompts += [request.args[0] for request in requests]
        return [(-1.0, self.knows(*request.args)) for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [
            f" {request.doc['answer']}." if self.knows(request.args[0], request.doc["answer"]) else " nothing"
            for request in requests
        ]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError


def curve(results: Any, task: str) -> dict[int, float]:
    """Length → score, from lm_eval's own results."""
    return {
        int(key.split(",")[0].removeprefix("exact@").split("(")[0]): value
        for key, value in results["results"][task].items()
        if key.startswith("exact@") and "_stderr" not in key
    }
