"""From how many tokens on a server is not asked any more, since it has shown that it cannot."""

from __future__ import annotations

import threading

from harness_ext.cells import Unmeasured

IN_A_ROW = 3
"""Prompts without an answer, one after the other, after which prompts as long as the shortest of them are not asked."""


class Ceiling:
    """Shared by the threads that ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: tuple[int, Unmeasured] | None = None
        self._failed: list[int] = []

    def find(self, tokens: int) -> Unmeasured | None:
        """Why a prompt of so many tokens is not asked; None where it is."""
        with self._lock:
            if self._found is None or tokens < self._found[0]:
                return None
            return self._found[1]

    def note(self, tokens: int, answer: object) -> None:
        """Takes in what came of a prompt. A length that was refused or cut is never asked again; one without an answer, after some."""
        with self._lock:
            if not isinstance(answer, Unmeasured):
                self._failed.clear()
            elif answer.outcome != "backend_error":
                self._lower(tokens, answer)
            else:
                self._failed.append(tokens)
                if len(self._failed) >= IN_A_ROW:
                    self._lower(min(self._failed), answer)

    def _lower(self, tokens: int, answer: Unmeasured) -> None:
        if self._found is None or tokens < self._found[0]:
            reason = answer.reason.removeprefix("not asked: ")
            self._found = tokens, Unmeasured(answer.outcome, f"not asked: a prompt of {tokens} tokens had failed: {reason}")
