"""What a task has to know of the model it is for: its tokenizer, its trained length and how far it goes.

Asked of the lm_eval model object where it tokenises for itself, since that is what the prompts will meet; of the model's
files, by the names in `--model_args` and `--metadata`, where it does not (scripted models, chat APIs).
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from harness_ext import positions
from harness_ext.cells import Limit, TrainedLength
from harness_ext.credentials import hide
from harness_ext.errors import ModelError, PromptTooLongError
from harness_ext.token_count import TokenCount

REFERENCE = "reference/"
SHORTER_BY = {"VLLM": 1}
"""lm_eval model class → tokens of its `max_length` that no prompt can use: vLLM generates one token beside the scored ones."""


class ModelView:
    """One model as a task sees it. `lm` is lm_eval's model object, or None where none is at hand."""

    def __init__(self, lm: Any, metadata: Mapping[str, Any]) -> None:
        self.lm = lm.lm if type(lm).__name__ == "CachingLM" else lm
        self.metadata = metadata
        self._why_no_config = "no model was named"
        # A chat API's class has the methods, but without a tokenizer they give back text.
        without = hasattr(lm, "tokenized_requests") and getattr(lm, "tokenizer", None) is None
        self._tokenizes = callable(getattr(lm, "_encode_pair", None)) and not without

    @cached_property
    def trained_length(self) -> TrainedLength | None:
        """The user's word first, then the model's own, then its config's. Raises ModelError where the user's is no length."""
        if "trained_length" in self.metadata:
            tokens = self.metadata["trained_length"]
            if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
                raise ModelError(f"trained_length: found {tokens!r}; expected a whole number of tokens from 1")
            return TrainedLength(tokens=tokens, source="user")
        own = getattr(self.lm, "trained_length", None)
        if isinstance(own, TrainedLength):
            return own
        config = getattr(self.lm, "config", None) or self._config
        return positions.read_trained_length(config) if config is not None else None

    @cached_property
    def limits(self) -> list[Limit]:
        """What the model cannot run, the firmest first."""
        own = getattr(self.lm, "length_limits", None)
        if own is not None:
            return list(own)
        if getattr(self.lm, "truncation", False) is True:
            raise ModelError("truncation=True cuts prompts without a word; take it out of --model_args")
        host = getattr(self.lm, "max_length", None)
        tokens, field = (host, "the model's max_length") if _is_length(host) else (self.metadata.get("max_length"), "max_length")
        if not _is_length(tokens):
            tokens, field = (self.trained_length.tokens, "the trained length") if self.trained_length else (None, "")
        if tokens is None:
            return []
        usable = tokens - next((SHORTER_BY[c.__name__] for c in type(self.lm).__mro__ if c.__name__ in SHORTER_BY), 0)
        return [
            Limit(
                tokens=usable,
                outcome="backend_limit",
                reason=f"this model takes {usable} tokens ({field}) and would be given a truncated prompt; "
                "use --model hf-extrapolate, or max_length=N in --model_args where the model can go on",
            )
        ]

    def check_files(self) -> None:
        """Raises ModelError where the model that `--model_args` names has no config or no tokenizer that can be read."""
        if self._config is None:
            raise ModelError(
                f"model {self.metadata.get('pretrained')!r} was asked for, but its config cannot be read: {self._why_no_config}; "
                "give a folder with a config.json, a model's name on the hub, or reference/rope"
            )
        self.count(["a"])

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, without special tokens."""
        return self._counts.each(texts)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that something may follow, as the model splits it: BOS first where it has one.

        Raises ModelError for an encoder-decoder, which splits no text but two.
        """
        if self._splits_in_two:
            raise ModelError(
                "an encoder-decoder reads a context and writes an answer, and has no loss by position; use a causal model"
            )
        ids = self._encode(text)
        return ids if self._tokenizes else ids[: len(ids) - len(self._ending)]

    def encode_scored(self, context: str, answer: str) -> tuple[list[int], int]:
        """Token ids of a context and the answer scored after it, and at which of them the answer begins, as lm_eval splits them."""
        if self._splits_in_two:
            before, after = self.lm._encode_pair(context, answer)
            return [*before, *after], len(before)
        ids = self._counts.ids(context + answer, self._encode, self._ending)
        return ids, self._counts.whole(context.rstrip(), lambda text: len(self._encode(text)))  # a space there is the answer's

    def encode_generated(self, context: str) -> list[int]:
        """Token ids of a context that an answer is generated after. Raises ModelError for messages that cannot be laid out here."""
        return self._counts.ids(self._lay_out(context), lambda text: self._encode_context(context, text), self._ending)

    def count_scored(self, context: str, answer: str) -> int:
        """Tokens of a context and the answer scored after it, as the model splits them."""
        if self._splits_in_two:
            return len(self.encode_scored(context, answer)[0])
        return self._counts.whole(context + answer, lambda text: len(self._encode(text)))

    def count_generated(self, context: str, budget: int) -> int:
        """Tokens of a context and the most that may be generated after it. Raises ModelError as `encode_generated`."""
        return self._counts.whole(self._lay_out(context), lambda text: len(self._encode_context(context, text))) + budget

    def _lay_out(self, context: str) -> str:
        """The text of a context, which may be lm_eval's JsonChatStr: the messages that a chat server will lay out itself."""
        if not isinstance(context, tuple):
            return context
        if not getattr(self._tokenizer, "chat_template", None):
            raise ModelError(
                "this model lays out chat messages by itself; to count them, name a tokenizer that has its chat template"
            )
        return str(self._tokenizer.apply_chat_template(json.loads(context[0]), add_generation_prompt=True, tokenize=False))

    def _encode_context(self, context: str, text: str) -> list[int]:
        """Token ids of `text`, laid out of `context`, or of a beginning of it, that an answer is generated after."""
        if isinstance(context, tuple):
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        if self._tokenizes and isinstance(getattr(self.lm, "AUTO_MODEL_CLASS", None), type):  # HFLM tokenises batches its own way
            return [int(token) for token in self.lm.tok_batch_encode([text])[0][0]]
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        """Token ids of a whole text."""
        return list(self.lm.tok_encode(text) if self._tokenizes else self._tokenizer.encode(text))

    @property
    def _splits_in_two(self) -> bool:
        """Whether context and answer are two texts to the model: an encoder-decoder's."""
        return self._tokenizes and getattr(self.lm, "backend", "causal") != "causal"

    @cached_property
    def _counts(self) -> TokenCount:
        known = getattr(self.lm, "token_count", None) if self._tokenizes else None
        return known if isinstance(known, TokenCount) else TokenCount(self._tokenizer)

    @cached_property
    def _ending(self) -> list[int]:
        """What the tokenizer puts after every text, such as EOS: no model that scores a continuation reads it."""
        ids, bare = self._encode("a"), self._tokenizer(["a"], add_special_tokens=False)["input_ids"][0]
        kept = len(list(itertools.dropwhile(lambda token: token not in bare, reversed(ids))))
        return ids[kept:] if bare else []

    @cached_property
    def _tokenizer(self) -> Any:
        if self._tokenizes and callable(getattr(self.lm, "tokenizer", None)):
            return self.lm.tokenizer
        if self._tokenizes:  # a tokenizer of another library, or none to be seen
            return lambda texts, **_: {"input_ids": [self.lm.tok_encode(text, add_special_tokens=False) for text in texts]}
        name = self.metadata.get("tokenizer") or self.metadata.get("pretrained") or self.metadata.get("model")
        if name is None:
            raise ModelError(
                "prompts of an exact length need the model's tokenizer, and this model brings none; "
                'name one: --metadata \'{"tokenizer": "NAME OR PATH"}\''
            )
        return name if not isinstance(name, str) else load_tokenizer(name, self.metadata)

    @cached_property
    def _config(self) -> Any:
        name = self.metadata.get("pretrained") or self.metadata.get("model") or self.metadata.get("tokenizer")
        if not isinstance(name, str):
            return getattr(name, "config", None)
        from transformers import AutoConfig  # seconds to import, and only here

        try:
            return AutoConfig.from_pretrained(resolve(name), **_source(self.metadata))
        except (OSError, ValueError) as error:  # a tokenizer without a model, or a server's model name: no length is known
            self._why_no_config = first_line(error)
            return None


def load_tokenizer(name: str, options: Mapping[str, Any]) -> Any:
    """The tokenizer `name`. Raises ModelError where there is none that can be read."""
    from transformers import AutoTokenizer  # seconds to import, and only here

    try:
        return AutoTokenizer.from_pretrained(resolve(name), **_source(options))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"tokenizer {name!r} cannot be read: {first_line(error)}; give the name or path of one") from error


def resolve(name: str) -> str:
    """The folder of an embedded model (`reference/rope`), any other name as it is. Raises ModelError for an unknown one.

    A folder that holds a model type of this package makes the type known to transformers.
    """
    folder = Path(name)
    if name.startswith(REFERENCE):
        embedded = Path(__file__).parent / "models" / "reference"
        known = sorted(f"{REFERENCE}{path.parent.name}" for path in embedded.glob("*/config.json"))
        if name not in known:
            raise ModelError(f"model {name!r} is not embedded here; embedded: {', '.join(known)}")
        folder = embedded / name.removeprefix(REFERENCE)
    config = folder / "config.json"
    if config.is_file() and "harness_ext_reference" in config.read_text(encoding="utf-8"):
        importlib.import_module("harness_ext.models.reference.modeling")  # torch, and only where it is needed
    return str(folder) if name.startswith(REFERENCE) else name


def check_fits(tokens: int, limits: Sequence[Limit], what: str = "a prompt") -> None:
    """Raises PromptTooLongError where a prompt, or whatever it is, of `tokens` tokens exceeds one of `limits`."""
    for limit in limits:
        if tokens > limit.tokens:
            raise PromptTooLongError(f"{what} of {tokens} tokens was asked for: {limit.reason}")


def first_line(error: BaseException) -> str:
    """What an exception says, in one line and without secrets."""
    if "trust_remote_code=True" in str(error):
        return "it brings code of its own, which is run only where trust_remote_code=True is given"
    return hide(next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__))


def _source(options: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the model arguments that says which files to read."""
    named = {key: options[key] for key in ("revision", "subfolder", "gguf_file") if options.get(key)}
    # Where it is not said, transformers asks at the terminal.
    return {**named, "trust_remote_code": bool(options.get("trust_remote_code"))}


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
