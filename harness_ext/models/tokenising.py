"""lm_eval's `hf` as to its tokenizer: nothing is put after a prompt, long texts are tokenised sentence by sentence, and one without EOS will do."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from harness_ext.errors import ModelError
from harness_ext.model_view import first_line
from harness_ext.token_count import TokenCount, count_appended, find_end

log = logging.getLogger(__name__)

LONG_TEXT = 1000
"""Characters; shorter texts are tokenised whole."""
BEGINNINGS = 4096
"""Short texts of which the tokens are kept: every prompt of a task begins with the same sentence."""


class TokenisingHFLM(HFLM):
    """What `hf-extrapolate` changes of how HFLM tokenises."""

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        try:
            super()._create_tokenizer(pretrained, tokenizer, **options)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the tokenizer of {tokenizer or pretrained!r} cannot be read: {first_line(error)}; name one with tokenizer=…"
            ) from error
        # Its limit is only a warning, and one that says the opposite of what this class is for.
        self.tokenizer.model_max_length = int(1e30)

    def stop_appending_eos(self) -> None:
        """An EOS after the prompt would stand between the question and its answer, and shift what is scored."""
        self._appended = 0
        if self.backend != "causal":
            return
        self._appended = count_appended(self.tokenizer)
        if self._appended:
            log.warning(
                "the tokenizer ends each text with %r; left off, since the answer follows",
                self.tokenizer.decode(self.tokenizer.encode("a")[-self._appended :]),
            )

    @property
    def eot_token_id(self) -> int:
        """EOS, or what stands for it in a tokenizer that has none (HFLM cannot tokenise with such a one)."""
        return find_end(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """What goes before an empty context."""
        known = (self.custom_prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.cls_token_id, self.eot_token_id)
        return int(next(token for token in known if token is not None))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """HFLM's, without the special tokens that the tokenizer puts at the end; of a long text, each sentence is tokenised once."""
        if add_special_tokens is not None or options:
            return self._tok_encode(string, add_special_tokens=add_special_tokens, **options)
        return list(self._encode_known(string) if len(string) < LONG_TEXT else self.token_count.ids(string, self._encode_known))

    @functools.cached_property
    def token_count(self) -> TokenCount:
        """What is known of its tokenizer's sentences."""
        return TokenCount(self.tokenizer)

    def _encode_known(self, string: str) -> Sequence[int]:
        """`_tok_encode`, which asks the tokenizer once for each short text that comes again and again."""
        return self._short(string) if len(string) < LONG_TEXT else self._tok_encode(string)

    @functools.cached_property
    def _short(self) -> Callable[[str], tuple[int, ...]]:
        return functools.lru_cache(BEGINNINGS)(lambda string: tuple(self._tok_encode(string)))

    def _tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        ids = list(super().tok_encode(string, add_special_tokens=add_special_tokens, **options))
        return ids[: len(ids) - self._count_ending(string, ids)]

    def _count_ending(self, string: str, ids: list[int]) -> int:
        """How many of a text's tokens, at their end, are not the text's: none where it was tokenised without special tokens."""
        appended = getattr(self, "_appended", 0)
        return appended if appended and ids != self.tokenizer.encode(string, add_special_tokens=False) else 0

    def tok_batch_encode(
        self, strings: list[str], left_truncate_len: int | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """HFLM's, without the special tokens that the tokenizer puts at the end; (batch, tokens) each, padded on the left. None of a text's own is cut."""
        if not getattr(self, "_appended", 0):
            whole: tuple[torch.Tensor, torch.Tensor] = super().tok_batch_encode(
                strings, left_truncate_len=left_truncate_len, **options
            )
            return whole
        ids, mask = super().tok_batch_encode(strings, **options)
        # HFLM tokenises all of a batch as it does the first
        ended = self._count_ending(strings[0], ids[0][mask[0] > 0].tolist())
        ids, mask = ids[:, : ids.shape[1] - ended], mask[:, : mask.shape[1] - ended]
        return (ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]) if left_truncate_len else (ids, mask)
