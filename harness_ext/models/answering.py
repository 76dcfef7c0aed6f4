"""lm_eval's `hf` as to how it generates: a batch at a time, from what is held of the prompts, and each row to its own end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance

from harness_ext.models.state import State
from harness_ext.models.tokenising import TokenisingHFLM

ASSISTED = (
    "prompt_lookup_num_tokens",
    "assistant_model",
    "assistant_early_exit",
    "penalty_alpha",
    "dola_layers",
    "custom_generate",
)
"""Generation arguments with which an answer is made otherwise than token by token, and of one prompt at a time."""
Held = tuple[State, list[list[int]]]
"""A state, and the prompts that its rows are of."""


class AnsweringHFLM(TokenisingHFLM):
    """What `hf-extrapolate` changes of how HFLM generates."""

    _held: Held | None = None

    def is_greedy(self, asked: dict[str, Any]) -> bool:
        """Whether generation arguments, over the model's own, ask for the one answer that is always the same."""
        return not asked.get("do_sample") and not asked.get("temperature") and self._count_beams(asked) == 1

    def _count_beams(self, asked: dict[str, Any]) -> int:
        return asked.get("num_beams") or getattr(self.model.generation_config, "num_beams", None) or 1

    def goes_on(self, asked: dict[str, Any]) -> bool:
        """Whether they ask for what can go on from a held state: the next most likely token, one by one, on that state and no cache of another kind."""
        return self.is_greedy(asked) and not self.is_assisted(asked) and not self._find_any(asked, ["cache_implementation"])

    def is_assisted(self, asked: dict[str, Any]) -> bool:
        """Whether they ask for one of `ASSISTED`."""
        return self._find_any(asked, ASSISTED)

    def _find_any(self, asked: dict[str, Any], names: Sequence[str]) -> bool:
        own = self.model.generation_config
        return any(asked.get(name) or getattr(own, name, None) for name in names)

    def answer(self, requests: Sequence[Instance], held: Held | None = None) -> list[str]:
        """HFLM's answers to requests, all in one batch, from what is `held` of their prompts."""
        own: Any = self.batch_size_per_gpu  # type: ignore[has-type]
        self.batch_size_per_gpu, self._held = len(requests), held
        try:
            return list(super().generate_until(list(requests), disable_tqdm=True))
        finally:
            self.batch_size_per_gpu, self._held = own, None

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """HFLM's, from the state that holds the beginnings of the rows of context (rows, tokens, padded on the left), which it has in its own order."""
        if len(context) > 1 and self._count_beams(options) == 1:
            # HFLM stops at the tokenizer's EOS only when all rows have come to it, and what a row says after its own would be left in its answer.
            ends = self.model.generation_config.eos_token_id
            ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
            options.setdefault("eos_token_id", sorted({*ends, self.eot_token_id}))
        if self.backend != "causal":
            # HFLM counts the prompt, which an encoder reads, among the tokens of the answer; those begin with one that is given.
            max_length = max(2, max_length - context.shape[1] + 1)
        order, state = self._find_rows(context, options["attention_mask"]), {}
        if self._held is not None and order:
            state = {name: value for name, value in self._held[0].arguments().items() if name != "use_cache"}
            context, options["attention_mask"] = context[order], options["attention_mask"][order]
        with torch.inference_mode():  # as what is held was made in
            tokens: torch.Tensor = super()._model_generate(context, max_length, stop, **options, **state)
        return tokens[[order.index(row) for row in range(len(order))]] if order else tokens

    def _find_rows(self, context: torch.Tensor, mask: torch.Tensor) -> list[int]:
        """Which row of a batch each of the prompts is that are held, by their tokens; empty where not all are there: then nothing is gone on from."""
        if self._held is None:
            return []
        lengths = mask.sum(1).tolist()
        rows = {tuple(row[-count:]): at for at, (row, count) in enumerate(zip(context.tolist(), lengths, strict=True))}
        found = [rows.get(tuple(prompt), -1) for prompt in self._held[1]]
        return [] if -1 in found else found
