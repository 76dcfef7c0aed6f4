"""Memory that runs out: told from other errors, remembered, and answered by less at a time or by an outcome."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from harness_ext.cells import Unmeasured
from harness_ext.model_view import first_line

log = logging.getLogger(__name__)

SAID = re.compile(r"out of memory|(can't|cannot) allocate memory|not enough memory|bad_alloc|ALLOC_FAILED", re.IGNORECASE)
"""What torch's allocators, the C++ library (`std::bad_alloc`) and CUDA's (`CUBLAS_STATUS_ALLOC_FAILED`) say, beside raising OutOfMemoryError
on some devices."""

Found = TypeVar("Found")


def is_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(SAID.search(str(error)))


def free() -> None:
    """Gives back what nobody holds; outside the handler of an error, which holds the failed forward's tensors."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


class Memory:
    """What fits into the memory of a device, as far as it was tried."""

    def __init__(self, device: torch.device, *, foresees: bool = False) -> None:
        self.device, self.foresees = device, foresees
        self.too_large = 0
        """Tokens at once that did not fit; 0 where everything did."""
        self.foreseen = ""
        """Why so many will not, where that was not tried."""

    def unless_out(self, tokens: int, run: Callable[[], Found], failed: Callable[[], int] | None = None) -> Found | Unmeasured:
        """What `run` gives, or Unmeasured where memory runs out; then nothing of as many tokens is tried again.

        `failed`: asked afterwards how many tokens did not fit, where that may be fewer than all `tokens`.
        """
        if not self.too_large or tokens < self.too_large:
            try:
                return run()
            except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
                if not is_out(error):
                    raise
                self.too_large, self.foreseen = min(tokens, failed()) if failed else tokens, ""
                log.warning(
                    "%d tokens at once do not fit into the memory of %s: %s", self.too_large, self.device, first_line(error)
                )
            free()
        return self.refuse(tokens)

    def refuse(self, tokens: int) -> Unmeasured:
        """The answer to a prompt that does not fit."""
        before = f", as {self.too_large} before," if self.too_large and tokens > self.too_large and not self.foreseen else ""
        reason = f"{tokens} tokens{before} do not fit into the memory of {self.device}"
        return Unmeasured(
            outcome="out_of_memory", reason=reason + (f" and were not tried: {self.foreseen}" if self.foreseen else "")
        )

    def list_refused(self, sizes: Sequence[int], *, unheld: int = 0) -> dict[int, Unmeasured]:
        """What is known not to fit of prompts of `sizes` tokens, of which so many are never held, by index: nothing is read for their sake."""
        large = self.too_large
        return {index: self.refuse(size) for index, size in enumerate(sizes) if large and size - unheld >= large}

    def settle(self, sizes: Sequence[int], answers: Sequence[Any]) -> list[Any]:
        """Answers to prompts of `sizes` tokens, where a length is measured whole or not at all.

        Where one did not fit, others of its length may have, with another needle before them or from an interrupted run: a mean over those
        would be one over prompts that were not chosen for it.
        """
        refused = [size for size, answer in zip(sizes, answers, strict=True) if isinstance(answer, Unmeasured)]
        if not refused:
            return list(answers)
        return [self.refuse(size) if size >= min(refused) else answer for size, answer in zip(sizes, answers, strict=True)]

    def what_fits(self, requests: Sequence[Any], sizes: Sequence[int], run: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        """What `run` answers to requests of `sizes` tokens; where memory runs out, to half as many at a time.

        One that does not fit alone is answered by the outcome `out_of_memory`.
        """
        answers = self.unless_out(max(sizes) * len(requests), lambda: run(requests))
        if not isinstance(answers, Unmeasured):
            return list(answers)
        if len(requests) == 1:
            return [answers]
        half = (len(requests) + 1) // 2
        return self.what_fits(requests[:half], sizes[:half], run) + self.what_fits(requests[half:], sizes[half:], run)
