"""Outcomes in place of answers, and who understands them."""

from __future__ import annotations

from typing import TypeVar

from lm_eval.api.instance import Instance

from harness_ext.cells import Unmeasured
from harness_ext.errors import ModelError

Answer = TypeVar("Answer")


def check_understood(request: Instance, answer: Answer) -> Answer:
    """The answer to a request. Raises ModelError for an outcome that the request's task would take for a score."""
    ours = isinstance(request.doc, dict) and "prompt_tokens" in request.doc
    if isinstance(answer, Unmeasured) and not ours:
        raise ModelError(
            f"{answer.reason}: {request.task_name} has no score, and knows no outcome; use shorter prompts, or less memory for each"
        )
    return answer
