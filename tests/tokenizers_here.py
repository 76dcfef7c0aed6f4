"""Four kinds of tokenizer, made on the spot from the tasks' own kind of text."""

from __future__ import annotations

import functools
import itertools
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from harness_ext.sweep.haystack import open_haystack
from harness_ext.sweep.seeds import generator

KINDS = ("byte", "bpe", "sentencepiece", "wordpiece")


def corpus() -> list[str]:
    """Two thousand sentences of running text."""
    haystack = open_haystack("text", distractors=lambda rng, taken: iter(()))
    return list(itertools.islice(haystack.sentences(generator("corpus"), lambda _: False), 2000))


@functools.cache
def make_tokenizer(kind: str) -> Any:
    """`byte`: ByT5's, which ends each text with EOS. `bpe`: byte-level, as GPT-2's. `sentencepiece`: Unigram over ▁-marked
    words with a BOS, as Llama-2's. `wordpiece`: lower-casing, [CLS] and [SEP], unknown words [UNK], as BERT's."""
    if kind == "byte":
        return ByT5Tokenizer()
    if kind == "bpe":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        made.train_from_iterator(
            corpus(),
            trainers.BpeTrainer(vocab_size=600, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
        )
        return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    if kind == "sentencepiece":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        letters = sorted({*"".join(corpus()), *"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?-{}\n"})
        made.train_from_iterator(
            corpus(),
            trainers.UnigramTrainer(
                vocab_size=500, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", initial_alphabet=letters
            ),
        )
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        [*corpus(), "0 1 2 3 4 5 6 7 8 9"],
        trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"]),
    )
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
