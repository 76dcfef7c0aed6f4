"""The tokens of long texts that differ in a sentence, and their number: each sentence is tokenised once.

Tokenizers that cut text into words before anything else (a `pre_tokenizer`: byte-level BPE, WordPiece, most SentencePiece
conversions) treat each word by itself, so the tokens of a text are those of its sentences, wherever the pre-tokenizer cuts
between them. Where it does is asked of the pre-tokenizer itself, at each kind of seam. Where it does not, or there is none, or
where something else may span a seam (an added token, a class of one's own around the tokenizer), the whole text is tokenised. Either way the tokens are those of the whole final string.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

WINDOW = 4
"""Characters on each side of a seam, between a full stop and a space, that the pre-tokenizer is shown."""
MARK = "\0"
SEAM = ". "


class TokenCount:
    """Tokens and counts for one tokenizer (transformers', fast or slow)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        if (
            getattr(self._fast, "pre_tokenizer", None) is None
            or not hasattr(self._fast, "encode_batch_fast")
            or _is_changed(tokenizer)
        ):
            self._fast = None
        self._replaces = self._fast is not None and "Replace" in repr(self._fast.normalizer)
        self._sentences: dict[str, int] = {}
        self._ids: dict[str, list[int]] = {}
        self._heads: dict[str, str] = {}
        self._tails: dict[str, str] = {}
        self._seams: dict[tuple[str, str], bool] = {}
        self._last: tuple[str, list[str] | None] = ("", None)

    def each(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, without special tokens."""
        if not texts:
            return []
        if self._fast is not None:
            return list(map(len, self._encode(texts)))
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        assert self._fast is not None
        self._fast.no_padding()  # transformers leaves behind what its last call asked for
        self._fast.no_truncation()
        return [encoding.ids for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def whole(self, text: str, encode: Callable[[str], int]) -> int:
        """Tokens of `text` by `encode`, which counts a whole text as its model does, special tokens included."""
        parts = self._split(text)
        return encode(text) if parts is None else encode(parts[0]) + sum(map(self._sentences.__getitem__, parts[1:]))

    def ids(self, text: str, encode: Callable[[str], Sequence[int]], ending: Sequence[int] = ()) -> list[int]:
        """The tokens of `text` by `encode`, which tokenises a whole text as its model does, and puts `ending` at its end."""
        parts = self._split(text)
        if parts is None:
            return list(encode(text))
        first = list(encode(parts[0]))
        ended = ending if ending and first[-len(ending) :] == list(ending) else ()
        return list(itertools.chain(first[: len(first) - len(ended)], *map(self._ids.__getitem__, parts[1:]), ended))

    def _split(self, text: str) -> list[str] | None:
        """`text` in pieces that are tokenised each by itself, all but the first of them known by now; None where there are none such."""
        last, parts = self._last
        surplus = len(last) - len(text)
        if parts and len(parts) > 1 and 0 < surplus < len(parts[-1]) - WINDOW and last.startswith(text):
            # A prompt without its answer is asked for right after the whole: the seams are the same.
            parts = [*parts[:-1], parts[-1][:-surplus]]
            self._learn(parts[-1:])
        elif surplus or last != text:
            parts = self._find_parts(text)
        self._last = text, parts
        return parts

    def _find_parts(self, text: str) -> list[str] | None:
        if self._fast is None or MARK in text:
            return None
        # Dictionaries and marks where loops and regular expressions would do: this runs over every prompt's whole text.
        first, *rest = text.replace(". ", f".{MARK} ").split(MARK)
        self._learn(rest)
        tails = itertools.chain([first[-WINDOW:]], map(self._tails.__getitem__, rest))
        seams = set(zip(tails, map(self._heads.__getitem__, rest), strict=False))
        if not all(itertools.starmap(self._cuts, seams)) or (self._replaces and self._is_replaced([first, *rest], text)):
            return None
        return [first, *rest]

    def _is_replaced(self, parts: Sequence[str], text: str) -> bool:
        """Whether a normalizer that replaces patterns of any length makes something else of a whole text than of its parts."""
        assert self._fast is not None
        normalize = self._fast.normalizer.normalize_str
        return bool(normalize(text) != "".join(map(normalize, parts)))

    def _learn(self, parts: Sequence[str]) -> None:
        """Tokenises those of `parts` that are new, each as it stands after a sentence."""
        new = [part for part in dict.fromkeys(parts) if part not in self._sentences]
        if new:
            stop, *found = self._encode([".", *(f".{part}" for part in new)])
            self._ids.update((part, ids[len(stop) :]) for part, ids in zip(new, found, strict=True))
            self._sentences.update((part, len(self._ids[part])) for part in new)
            self._heads.update((part, part[:WINDOW]) for part in new)
            self._tails.update((part, part[-WINDOW:]) for part in new)

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


def _is_changed(tokenizer: Any) -> bool:
    """Whether tokens of a text are not those of its sentences whatever the pre-tokenizer does: a class that is not transformers' own may do anything to a
    text before, and an added token that has the end of a sentence in it is found before all else.
    """
    encode = getattr(type(tokenizer), "_encode_plus", None)
    own = getattr(encode, "__module__", "").startswith("transformers.")
    return not own or any(SEAM in token for token in tokenizer.get_added_vocab())


def count_appended(tokenizer: Any) -> int:
    """Tokens that a tokenizer puts after every text, such as EOS: an answer follows, so they are left off."""
    ids, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    return len(list(itertools.takewhile(lambda token: token not in bare, reversed(ids)))) if bare else 0


def find_end(tokenizer: Any) -> int:
    """EOS, or what stands for it in a tokenizer that has none."""
    known = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, 0)
    return int(next(token for token in known if token is not None))
