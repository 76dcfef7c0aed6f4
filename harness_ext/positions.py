"""What a model's config says about positions: the trained length, and where it ends.

Read from the config alone, so that it is known before any weights load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness_ext.cells import Limit, TrainedLength

LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "context_length")
"""In this order; the first that holds a positive number is the advertised length."""

TABLES: dict[str, str] = {
    "gpt2": "n_positions",
    "gpt_bigcode": "n_positions",
    "openai-gpt": "n_positions",
    "opt": "max_position_embeddings",
    "gpt_neo": "max_position_embeddings",
    "biogpt": "max_position_embeddings",
    "xlm": "max_position_embeddings",
    "ctrl": "n_positions",
    "gptj": "n_positions",
    "codegen": "n_positions",
    "mpt": "max_seq_len",
}
"""Model type → the field that sizes its position table, where a longer input is an error and not merely unfamiliar: learned
tables, fixed sinusoids (CTRL), rotary angles from a fixed table (GPT-J, CodeGen), and MPT's ALiBi bias, built once."""

ROUNDED_ALIBI: dict[str, str] = {
    "bloom": "in the model's dtype",
    "falcon": "in bfloat16, whatever the model's dtype",
}
"""Model type → how transformers computes slope × absolute key index. Its rounding grows with the position: among the last 256
keys at position 8,192, bfloat16 tells 7 to 9 apart. MPT counts from the end, in float32, and is free of it."""


def read_trained_length(config: Any) -> TrainedLength | None:
    """The trained length by `config` (a transformers config), or None where it names none.

    The length before a rope extension comes first, since the advertised one is the extension's; then the advertised one.
    """
    text = _text_config(config)
    for source, value in (
        *_rope_originals(getattr(text, "rope_parameters", None)),
        ("original_max_position_embeddings", getattr(text, "original_max_position_embeddings", None)),
        *((field, getattr(text, field, None)) for field in LENGTH_FIELDS),
    ):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return TrainedLength(tokens=value, source=f"config.{source}")
    return None


def read_hard_limit(config: Any) -> Limit | None:
    """The length past which the model cannot run at all, or None where it can go on."""
    text = _text_config(config)
    field = TABLES.get(getattr(text, "model_type", ""))
    tokens = getattr(text, field, None) if field else None
    if not isinstance(tokens, int):
        return None
    return Limit(
        tokens=tokens,
        outcome="hard_limit",
        reason=f"the position table of {text.model_type} ends at {tokens} (config.{field}); no position after it exists",
    )


def find_rounding(config: Any, dtype: str) -> str:
    """A warning where low precision alone would look like degradation with length; empty otherwise.

    `dtype` is the model's, such as `bfloat16` or `torch.bfloat16`.
    """
    text = _text_config(config)
    kind = getattr(text, "model_type", "")
    low = "float16" in dtype  # bfloat16 too
    if kind not in ROUNDED_ALIBI or (kind == "falcon" and not getattr(text, "alibi", False)) or (kind == "bloom" and not low):
        return ""
    return (
        f"ALiBi biases of {kind} are computed {ROUNDED_ALIBI[kind]}: rounding grows with the position and looks like "
        "degradation with length" + ("; run in float32 (dtype=float32) to tell them apart" if kind == "bloom" else "")
    )


def _text_config(config: Any) -> Any:
    return getattr(config, "text_config", None) or config


def _rope_originals(parameters: Any) -> list[tuple[str, Any]]:
    if not isinstance(parameters, Mapping):
        return []
    field = "original_max_position_embeddings"
    nested = [
        (f"rope_parameters.{name}.{field}", value.get(field)) for name, value in parameters.items() if isinstance(value, Mapping)
    ]
    return [(f"rope_parameters.{field}", parameters.get(field)), *nested]
