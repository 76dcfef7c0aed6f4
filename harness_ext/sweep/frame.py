"""From a document's text to what is sent: the chat template, the answer's prefix and the answer around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness_ext.model_view import ModelView
from harness_ext.sweep.fingerprint import fingerprint
from harness_ext.sweep.needle import Document


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What stands around every document of a run. Counts as the model does (`fit.Tokenizer`)."""

    view: ModelView
    chat_template: Callable[..., str] | None
    """Messages → prompt; None for a plain prompt."""
    system: str | None
    """The system message, if any."""
    generation: Mapping[str, Any] | None
    """lm_eval's generation arguments; None where the answer is scored and not generated."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, without special tokens."""
        return self.view.count(texts)

    def count_prompt(self, body: str, document: Document) -> int:
        """Tokens that the model consumes for `document` with this body, the answer or its budget included."""
        context = self.context(body, document)
        if self.generation is not None:
            return self.view.count_generated(context, self.generation["max_gen_toks"])
        return self.view.count_scored(context, f" {document.answer}")

    def context(self, body: str, document: Document) -> str:
        """The prompt. A model that generates a chat answer begins it by itself; otherwise the prefix begins it."""
        if self.chat_template is None:
            parts = (f"{self.system}\n\n" if self.system else "", body, " " if document.answer_prefix else "")
            return "".join(parts) + document.answer_prefix
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": body})
        prefilled = bool(document.answer_prefix) and self.generation is None
        if prefilled:
            messages.append({"role": "assistant", "content": document.answer_prefix})
        return self.chat_template(messages, add_generation_prompt=not prefilled)

    def arguments(self, body: str, document: Document) -> tuple[str, Any]:
        """What lm_eval's model method takes: (context, continuation), or (context, generation arguments)."""
        context = self.context(body, document)
        return (context, f" {document.answer}") if self.generation is None else (context, dict(self.generation))

    def identify(self, arguments: tuple[str, Any]) -> dict[str, Any]:
        """For a prompt's record: the fingerprint of what the model is given, and the tokens of it that are scored, 0 where it generates."""
        context, rest = arguments
        if isinstance(rest, str):
            ids, start = self.view.encode_scored(context, rest)
            return {"answer_tokens": len(ids) - start, "prompt_fingerprint": fingerprint(ids, start)}
        return {"answer_tokens": 0, "prompt_fingerprint": fingerprint(self.view.encode_generated(context), rest)}
