"""Counting the tokens of long texts that differ in a sentence: each sentence is tokenised once.

Tokenizers that cut text into words before anything else (a `pre_tokenizer`: byte-level BPE, WordPiece, most SentencePiece
conversions) treat each word by itself, so the tokens of a text are those of its sentences, wherever the pre-tokenizer cuts
between them. Where it does is asked of the pre-tokenizer itself, at each kind of seam. Where it does not, or there is none,
the whole text is tokenised. Either way the count is that of the whole final string.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

WINDOW = 4
"""Characters on each side of a seam, between a full stop and a space, that the pre-tokenizer is shown."""
MARK = "\0"


class TokenCount:
    """Counts for one tokenizer (transformers', fast or slow)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        if getattr(self._fast, "pre_tokenizer", None) is None or not hasattr(self._fast, "encode_batch_fast"):
            self._fast = None
        self._sentences: dict[str, int] = {}
        self._heads: dict[str, str] = {}
        self._tails: dict[str, str] = {}
        self._seams: dict[tuple[str, str], bool] = {}

    def each(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, without special tokens."""
        if not texts:
            return []
        if self._fast is not None:
            self._fast.no_padding()  # transformers leaves behind what its last call asked for
            self._fast.no_truncation()
            return [len(encoding) for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def whole(self, text: str, encode: Callable[[str], int]) -> int:
        """Tokens of `text` by `encode`, which counts a whole text as its model does, special tokens included."""
        if self._fast is None or MARK in text:
            return encode(text)
        # Dictionaries and marks where loops and regular expressions would do: this runs over every prompt's whole text.
        first, *rest = text.replace(". ", f".{MARK} ").split(MARK)
        new = set(rest) - self._sentences.keys()
        if new:
            stop, *counts = self.each([".", *(f".{part}" for part in new)])
            self._sentences.update((part, count - stop) for part, count in zip(new, counts, strict=True))
            self._heads.update((part, part[:WINDOW]) for part in new)
            self._tails.update((part, part[-WINDOW:]) for part in new)
        tails = itertools.chain([first[-WINDOW:]], map(self._tails.__getitem__, rest))
        seams = set(zip(tails, map(self._heads.__getitem__, rest), strict=False))
        if not all(itertools.starmap(self._cuts, seams)):
            return encode(text)
        return encode(first) + sum(map(self._sentences.__getitem__, rest))

    def _cuts(self, before: str, after: str) -> bool:
        """Whether the pre-tokenizer cuts between `before` and `after`, and after a full stop in its place too."""
        key = (before, after)
        if key not in self._seams:
            self._seams[key] = self._cuts_at(before, after) and self._cuts_at(".", after)
        return self._seams[key]

    def _cuts_at(self, before: str, after: str) -> bool:
        assert self._fast is not None
        normalizer = self._fast.normalizer
        if normalizer is not None:
            joined = normalizer.normalize_str(before + after)
            before, after = normalizer.normalize_str(before), normalizer.normalize_str(after)
            if joined != before + after:
                return False
        pieces = [
            [piece for piece, _ in self._fast.pre_tokenizer.pre_tokenize_str(text)] for text in (before, after, before + after)
        ]
        return pieces[0] + pieces[1] == pieces[2]
