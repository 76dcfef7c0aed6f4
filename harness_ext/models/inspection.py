"""What can be said of a model before any weight is read: its config, and its modules built without memory.

The modules stand on torch's meta device: names, classes and shapes without numbers. So a model of any size is inspected in seconds,
unless nobody listed its family, which is then tried on a small one (`probe`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from harness_ext import positions
from harness_ext.cells import Limit, TrainedLength
from harness_ext.errors import ModelError
from harness_ext.model_view import first_line, resolve
from harness_ext.models.extensions.extension import METHODS
from harness_ext.models.extensions.method import Subject
from harness_ext.models.extensions.rotary import find_rotaries, is_recomputed
from harness_ext.models.probe import find_limit
from harness_ext.models.unseen import Angles, find_angles, show_angles


@dataclass(frozen=True, slots=True, kw_only=True)
class Extends:
    """One method, and whether it can extend the model."""

    method: str
    applies: bool
    says: str
    """What it would change; or why it does not apply."""
    source: str
    """The paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What is known of a model."""

    model: str
    model_type: str
    schemes: tuple[str, ...]
    """Names in `positions.SCHEMES`; empty where the family is unknown and its modules tell nothing."""
    trained_length: TrainedLength | None
    advertised_length: TrainedLength | None
    """The config's own claim, a rope extension included."""
    hard_limit: Limit | None
    """Where it ends; None where it goes on."""
    past: str
    """What happens past the trained length, or where it ends."""
    decided: str
    """How that is known: by the family, or probed."""
    window: int | None
    """Tokens that a sliding-window layer sees."""
    rope: Mapping[str, Any]
    """Layer type (empty where all are alike) → the checkpoint's rope parameters."""
    angles: tuple[Angles, ...]
    """What training has shown of the circles of rotary pairs, and what is new past it; empty where there are none."""
    extends: tuple[Extends, ...]
    warnings: tuple[str, ...]


def inspect_model(name: str, **options: Any) -> Inspection:
    """What is known of the model `name`: a folder, a name on the hub, `reference/…`. `options`: for transformers' `from_pretrained`.

    Raises ModelError where its config cannot be read or no model can be built of it.
    """
    options = {"trust_remote_code": False, **options}  # where it is not said, transformers asks at the terminal
    try:
        config = AutoConfig.from_pretrained(resolve(name), **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model {name!r} was asked for, but its config cannot be read: {first_line(error)}; "
            "give a folder with a config.json, a model's name on the hub, or reference/rope"
        ) from error
    model = build_without_weights(config, **options)
    return describe(name, config, model)


def build_without_weights(config: Any, **options: Any) -> Any:
    """The model of `config` on the meta device. Raises ModelError where transformers has no language model of it."""
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=bool(options.get("trust_remote_code")))
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"transformers cannot build a language model of type {config.model_type!r}: {first_line(error)}"
        ) from error


def describe(name: str, config: Any, model: Any) -> Inspection:
    """What is known of a model: `model` with its weights or on the meta device."""
    schemes = positions.read_schemes(config, model)
    trained, advertised = positions.read_trained_length(config), positions.read_advertised_length(config)
    found = find_limit(config, model)
    rows = [positions.SCHEMES[scheme] for scheme in schemes]
    subject = Subject(model=model, schemes=schemes, trained=trained.tokens if trained else 1)
    angles, lost = _find_angles(subject) if trained else ((), [])
    past = found.limit.reason if found.limit else "; ".join(row.past for row in rows) or "unknown"
    return Inspection(
        model=name,
        model_type=str(positions.text_config(config).model_type),
        schemes=schemes,
        trained_length=trained,
        advertised_length=advertised,
        hard_limit=found.limit,
        past=past,
        decided=found.said,
        window=positions.read_window(config),
        rope={rotary.layer_type or "": rotary.own for rotary in find_rotaries(model)} if "rotary" in schemes else {},
        angles=angles,
        extends=tuple(_try_methods(subject)),
        warnings=(*_warn(config, model, trained, advertised), *lost),
    )


def to_json(found: Inspection) -> dict[str, Any]:
    """`found` as plain values, with the schemes' titles and papers."""
    known = [positions.SCHEMES[scheme] for scheme in found.schemes]
    return {
        **dataclasses.asdict(found),
        "scheme_titles": [row.title for row in known],
        "scheme_sources": [row.source for row in known],
    }


def to_text(found: Inspection) -> str:
    """`found` for a reader, line by line."""
    rows = [positions.SCHEMES[scheme] for scheme in found.schemes]
    trained = found.trained_length
    lines = [
        ("model", f"{found.model} ({found.model_type})"),
        ("positions", "; ".join(f"{row.title} ({row.source})" for row in rows) or "unknown"),
        ("trained length", f"{trained.tokens} ({trained.source})" if trained else "unknown; give trained_length=N"),
    ]
    if found.advertised_length and found.advertised_length != trained:
        lines.append(("advertised", f"{found.advertised_length.tokens} ({found.advertised_length.source})"))
    if found.window:
        lines.append(("sliding window", f"{found.window} tokens"))
    lines += [(f"rope {layer}".strip(), _flat(parameters)) for layer, parameters in found.rope.items()]
    lines += [line for angles in found.angles for line in show_angles(angles)]
    lines += [
        ("hard limit", f"{found.hard_limit.tokens}" if found.hard_limit else "none"),
        ("past it", found.past),
        ("known", found.decided),
        *(("warning", warning) for warning in found.warnings),
    ]
    applying = [method for method in found.extends if method.applies]
    lines += [("extend=" if not index else "", f"{method.method:<18} {method.says}") for index, method in enumerate(applying)]
    refused: dict[str, list[str]] = {}
    for method in found.extends:
        if not method.applies:
            refused.setdefault(method.says, []).append(method.method)
    lines += [("refused", f"{', '.join(names)}: {reason}") for reason, names in refused.items()]
    return "\n".join(f"{label:<16} {text}" for label, text in lines)


def _find_angles(subject: Subject) -> tuple[tuple[Angles, ...], list[str]]:
    """(each set of rotary pairs, why they are not known)."""
    try:
        return find_angles(subject), []
    except ModelError as error:  # a stranger's module
        return (), [f"what its rotary angles were trained on is not known: {error}"]


def _try_methods(subject: Subject) -> Iterator[Extends]:
    for name, method in METHODS.items():
        reason = method.why_not(subject)
        yield Extends(method=name, applies=not reason, says=reason or method.changes, source=method.source)


def _warn(config: Any, model: Any, trained: TrainedLength | None, advertised: TrainedLength | None) -> Iterator[str]:
    dtype = str(getattr(config, "dtype", None) or torch.float32)
    if rounding := positions.find_rounding(config, dtype):
        yield rounding
    if is_recomputed(model):
        yield (
            "transformers recomputes these frequencies from the longest prompt of a batch, and keeps them for later ones; "
            "hf-extrapolate pins them to each prompt's length, hf does not"
        )
    if trained and advertised and advertised.tokens != trained.tokens:
        yield f"multiples count from {trained.tokens}; trained_length={advertised.tokens} counts from the advertised length"


def _flat(parameters: Mapping[str, Any]) -> str:
    shown = {name: value if not isinstance(value, list) else f"{len(value)} numbers" for name, value in parameters.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items() if value is not None)
