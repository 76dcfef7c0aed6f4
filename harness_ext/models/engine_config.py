"""What an engine is told over a checkpoint's config, so that it runs longer prompts: the length, and the rope parameters.

vLLM and SGLang hold a prompt's length against the config's, and look rotary angles up in a table made beforehand. These are two things: a check that is
lifted alone reads past the table's end. A table has `max_position_embeddings` rows, or that many times a linear factor; YaRN's has
`original_max_position_embeddings` × `factor`, whatever the config calls its length (vLLM 0.32.0, `layers/rotary_embedding/yarn_scaling_rope.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from harness_ext import positions
from harness_ext.cells import Limit
from harness_ext.errors import ModelError
from harness_ext.model_view import first_line
from harness_ext.models import probe
from harness_ext.models.extensions import rotary
from harness_ext.models.extensions.extension import METHODS, check_applies
from harness_ext.models.extensions.method import Method, Setting, Subject
from harness_ext.models.inspection import build_without_weights

LENGTH_FIELDS = (*positions.LENGTH_FIELDS, "model_max_length", "max_sequence_length", "max_seq_length", "seq_len")
"""What engines read a length from; the smallest of them counts."""
YARN = ("yarn", "deepseek_yarn")
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""YaRN's own, where a checkpoint names none (Peng et al., arXiv 2309.00071, §3.2: α = 1, β = 32)."""


def read_config(pretrained: str, **source: Any) -> Any:
    """A checkpoint's config. Raises ModelError where there is none, or the model is no causal one."""
    try:
        config = AutoConfig.from_pretrained(pretrained, **source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model {pretrained!r} was asked for, but its config cannot be read: {first_line(error)}; "
            "give a folder with a config.json, a model's name on the hub, or reference/rope"
        ) from error
    if config.is_encoder_decoder:
        raise ModelError(f"{config.model_type} is an encoder-decoder, which is run by hf-extrapolate alone")
    return config


def find_limit(config: Any, **source: Any) -> Limit | None:
    """Where a model's positions end, by its config; of a family that nobody listed, by trying a small one of it."""
    if positions.is_listed(config):
        return positions.read_hard_limit(config)
    try:
        return probe.find_limit(config, build_without_weights(config, **source)).limit
    except ModelError:  # transformers has no such model; then the engine has to say it
        return None


def check_told(config: Any, method: Method | None, engine: str) -> None:
    """Raises ModelError where frequencies would have to change with each prompt's length, or a method is no change of parameters."""
    own = getattr(positions.text_config(config), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (own, *own.values()) if isinstance(part, Mapping)}
    if method is None and (found := kinds & set(rotary.PER_LENGTH)):
        raise ModelError(
            f"this checkpoint's rope type {found.pop()!r} depends on each prompt's length, and {engine} keeps one table for all prompts; "
            "use --model hf-extrapolate, which pins it to each length"
        )
    if method and method.parameters is None:
        known = ", ".join(name for name, other in METHODS.items() if other.parameters)
        raise ModelError(
            f"extend={method.name} changes more than rope parameters, and {engine} can be told nothing else; it runs {known}. "
            "Use --model hf-extrapolate"
        )


def scale_rope(config: Any, method: Method, setting: Setting, trained: int) -> dict[str, Any]:
    """The rope parameters of a method, merged into the checkpoint's. Raises ModelError where it does not apply, or changes nothing."""
    model = build_without_weights(config)
    subject = Subject(model=model, schemes=positions.read_schemes(config, model), trained=trained)
    check_applies(method, subject)
    assert method.parameters is not None
    if setting.factor == 1:
        raise ModelError(
            f"extend={method.name} changed nothing: up to {setting.tokens} tokens (trained length {trained}, factor 1) it leaves this model as it "
            "is; ask for longer prompts, or give factor=…"
        )
    parameters = dict(positions.text_config(config).rope_parameters)
    for found in rotary.extended(model):
        changed = {**found.own, **method.parameters(found.own, subject, setting)}
        told = {name: value for name, value in changed.items() if value is not None}
        parameters = told if found.layer_type is None else {**parameters, found.layer_type: told}
    return parameters


def stretch(config: Any, tokens: int, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields that differ from the checkpoint's so that an engine takes `tokens` tokens, and has as many rows of angles.

    `parameters`: rope parameters in place of the checkpoint's, all of them. No length is lowered.
    """
    text = positions.text_config(config)
    own = getattr(text, "rope_parameters", None)
    advertised = positions.read_advertised_length(config)
    fields = {name: getattr(text, name, None) for name in LENGTH_FIELDS}
    found: dict[str, Any] = {name: tokens for name, value in fields.items() if isinstance(value, int) and 0 < value < tokens}
    wanted = _lengthen(parameters or own, tokens, advertised.tokens if advertised else tokens)
    if wanted != own:
        found["rope_parameters"] = wanted
    return {"text_config": found} if found and text is not config else found


def _lengthen(parameters: Any, tokens: int, advertised: int) -> Any:
    """The same frequencies, from a table of at least `tokens` rows.

    YaRN's depend on `original_max_position_embeddings` by its ratio to the betas alone (Peng et al., arXiv 2309.00071, eq. 17: r = L / λ, held against α and β),
    so all three grow together, and its table with them.

    >>> _lengthen({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 512, 256)["original_max_position_embeddings"]
    128
    """
    if not isinstance(parameters, Mapping):
        return parameters
    if any(isinstance(value, Mapping) for value in parameters.values()):
        return {name: _lengthen(value, tokens, advertised) for name, value in parameters.items()}
    if parameters.get("rope_type") not in YARN:
        return dict(parameters)
    original, factor = parameters.get("original_max_position_embeddings") or advertised, parameters["factor"]
    if original * factor >= tokens:
        return dict(parameters)
    longer = math.ceil(tokens / factor)
    betas = {name: (parameters.get(name) or default) * longer / original for name, default in BETAS.items()}
    return {**parameters, "original_max_position_embeddings": longer, **betas}
