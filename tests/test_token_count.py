"""A count put together from sentences is the count of the whole text, for every tokenizer, or it is not put together."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers_here import KINDS, corpus, make_tokenizer
from transformers import PreTrainedTokenizerFast

from harness_ext.token_count import TokenCount

ODD = ("merges across sentences", "one piece", "digits", "normalised")


@functools.cache
def odd_tokenizer(kind: str) -> Any:
    """Tokenizers that do something at the seam between two sentences."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.decoder = decoders.ByteLevel()
    if kind == "one piece":
        made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    if kind == "digits":
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()])
    if kind == "normalised":
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(". ", "."), normalizers.Lowercase()])
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([". ".join(corpus()[i : i + 3]) for i in range(0, 900, 3)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@functools.cache
def count(kind: str) -> TokenCount:
    return TokenCount(make_tokenizer(kind) if kind in KINDS else odd_tokenizer(kind))


sentence = st.sampled_from([
    "The sky is blue.", " There and back again.", " Here we go. ", "  Two spaces.", "\nA line.", "...", ". ", " 3.14 is. 7.", "e.g. this", " Ünïcödé. ",
    " 你好。", "?! ", "<eos>. ", " …", ".\u00a0Nobody", " the the.", "\0", ". .",
])  # fmt: skip


@settings(max_examples=400)
@given(st.sampled_from((*KINDS, *ODD)), st.lists(sentence, min_size=1, max_size=12).map("".join))
def test_the_count_is_that_of_the_whole_text(kind: str, text: str) -> None:
    tokenizer = count(kind).tokenizer
    assert count(kind).whole(text, lambda whole: len(tokenizer.encode(whole))) == len(tokenizer.encode(text))


@settings(max_examples=400)
@given(st.sampled_from((*KINDS, *ODD)), st.lists(sentence, min_size=1, max_size=12).map("".join))
def test_the_tokens_are_those_of_the_whole_text(kind: str, text: str) -> None:
    def encode(part: str) -> list[int]:
        return list(count(kind).tokenizer.encode(part, add_special_tokens=False))

    assert count(kind).ids(text, encode) == encode(text)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "wordpiece"])
def test_a_sentence_is_tokenised_once(kind: str) -> None:
    tokenizer, counted = make_tokenizer(kind), []

    def encode(text: str) -> int:
        counted.append(text)
        return len(tokenizer.encode(text))

    here = TokenCount(tokenizer)
    text = " ".join(corpus()[:500])
    assert here.whole(text, encode) == len(tokenizer.encode(text))
    assert sum(map(len, counted)) < len(text) / 100


@pytest.mark.parametrize("kind", ["merges across sentences", "one piece"])
def test_a_tokenizer_that_does_not_cut_there_is_given_the_whole_text(kind: str) -> None:
    counted: list[str] = []
    text = " ".join(corpus()[:5])
    TokenCount(odd_tokenizer(kind)).whole(text, lambda whole: counted.append(whole) or 0)
    assert counted == [text]


class Shouting(PreTrainedTokenizerFast):
    """A class of one's own, which changes each text before it is tokenised."""

    def _encode_plus(self, text: Any, *given: Any, **options: Any) -> Any:
        return super()._encode_plus(text.upper() if isinstance(text, str) else [one.upper() for one in text], *given, **options)


def make_spanning(kind: str) -> Any:
    """Tokenizers that look past the end of a sentence, and past what is shown of a seam."""
    made = copy.deepcopy(make_tokenizer("bpe"))
    if kind == "shouting":
        return Shouting(tokenizer_object=made.backend_tokenizer, eos_token="<eos>")
    if kind == "added":
        made.add_tokens([AddedToken(". Where the rivers end", normalized=False)])
    if kind == "replaced":
        made.backend_tokenizer.normalizer = normalizers.Replace("long ago. Where the rivers end", "there")
    return made


@pytest.mark.parametrize("kind", ["added", "replaced", "shouting"])
def test_what_spans_the_end_of_a_sentence_is_found_in_a_long_text_too(kind: str) -> None:
    made = make_spanning(kind)
    counted = TokenCount(made)
    plain, spanning = "It was long ago. Where a river ends. " * 5, "It was long ago. Where the rivers end. " * 5
    for text in (plain, spanning, plain + spanning):
        assert counted.ids(text, made.encode) == made.encode(text)
        assert counted.whole(text, lambda whole: len(made.encode(whole))) == len(made.encode(text))
    assert made.encode(spanning) != make_tokenizer("bpe").encode(spanning)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_truncation_that_an_earlier_call_left_behind_do_not_count(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    texts = ["The sky is blue.", " ".join(corpus()[:20])]
    expected = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer(texts, padding="longest", truncation=True, max_length=30)
    assert TokenCount(tokenizer).each(texts) == expected
