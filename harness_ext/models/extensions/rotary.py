"""The rotary frequencies that a loaded model has in effect: found, computed as transformers computes them, and pinned.

Each method of this kind is a change of a checkpoint's `rope_parameters`, merged into them and never put in their place: left
out, `rope_theta` is a crash and `partial_rotary_factor` a silent rotation of all dimensions.

Pinned means that the frequencies no longer depend on what the forward sees. transformers recomputes `dynamic` and `longrope` from the
longest position of a batch, and keeps the result: the same prompt then scores differently after a longer one, beside a longer
one, or in chunks.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from harness_ext.errors import ModelError
from harness_ext.models.extensions.method import Setting, Subject
from harness_ext.positions import read_window

FULL = "full_attention"
PER_LENGTH = ("dynamic", "longrope")
"""Rope types that transformers recomputes in the forward."""
Parameters = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rotary:
    """One set of frequencies of a model: a rotary module's, or those of one layer type of it."""

    module: Any
    layer_type: str | None

    def _name(self, name: str) -> str:
        return name if self.layer_type is None else f"{self.layer_type}_{name}"

    @property
    def frequencies(self) -> torch.Tensor:
        """In radians a token, (rotary dims / 2,)."""
        found: torch.Tensor = getattr(self.module, self._name("inv_freq"))
        return found

    @property
    def attention_factor(self) -> float:
        """What cosine and sine are multiplied by."""
        return float(getattr(self.module, self._name("attention_scaling"), 1.0))

    @property
    def own(self) -> Parameters:
        """The checkpoint's rope parameters."""
        parameters = self.module.config.rope_parameters
        return dict(parameters if self.layer_type is None else parameters[self.layer_type])

    @property
    def kind(self) -> str:
        """The rope type in effect: the checkpoint's, or a family's own that it stands for (HunYuan's `dynamic` with an `alpha` is no function of the length)."""
        inside = getattr(self.module, "rope_type", None)
        inside = inside.get(self.layer_type) if isinstance(inside, Mapping) else inside
        own = str(self.own.get("rope_type", "default"))
        return own if inside in (None, "default", *ROPE_INIT_FUNCTIONS) else str(inside)

    def compute(self, change: Mapping[str, Any], tokens: int | None, trained: int | None = None) -> tuple[torch.Tensor, float]:
        """(frequencies, attention factor) under the checkpoint's parameters with `change` merged in, at a length of `tokens`.

        `trained`: the length to extend from; the config's own fields where it is None. The model's config is left alone.
        """
        config = copy.deepcopy(self.module.config)
        if trained:
            config.max_position_embeddings = trained
            if hasattr(config, "original_max_position_embeddings"):  # which transformers prefers to the parameters' own
                config.original_max_position_embeddings = trained
        if getattr(config, "head_dim", 0) is None:  # Mixtral's, which transformers' YaRN and dynamic do not see through
            config.head_dim = config.hidden_size // config.num_attention_heads
        merged = {**self.own, **change}
        config.rope_parameters = merged if self.layer_type is None else {**config.rope_parameters, self.layer_type: merged}
        layer = {} if self.layer_type is None else {"layer_type": self.layer_type}
        if merged.get("rope_type", "default") == "default":
            frequencies, factor = self.module.compute_default_rope_parameters(config, **layer)
        else:
            function = ROPE_INIT_FUNCTIONS[merged["rope_type"]]
            frequencies, factor = function(config, torch.device("cpu"), seq_len=tokens, **layer)
        return frequencies, float(factor)

    def measure(self) -> tuple[torch.Tensor, float]:
        """(frequencies, slowest first; attention factor), from what the module gives at position 1, and not from what it holds."""
        layer = {} if self.layer_type is None else {"layer_type": self.layer_type}
        with torch.no_grad():
            given = self.module(
                torch.zeros(1, 1, 1, device=self.frequencies.device), torch.ones_like(self.frequencies[None, :1]).long(), **layer
            )
        turned = torch.complex(given[0].float(), given[1].float()) if isinstance(given, tuple) else given
        angles = turned.flatten().angle().sort().values
        return angles[:: len(angles) // len(self.frequencies)], float(turned.abs().flatten()[0])

    def pin(self, frequencies: torch.Tensor, factor: float) -> None:
        """Puts frequencies and attention factor in effect, whatever the forward sees from now on.

        Raises ModelError where the module turns otherwise all the same.
        """
        if frequencies.shape != self.frequencies.shape:
            raise ModelError(
                f"{type(self.module).__name__} turns {len(self.frequencies)} pairs of dimensions, and transformers computes "
                f"{len(frequencies)} for it; this method does not apply"
            )
        placed = frequencies.to(self.frequencies.device, torch.float32)
        for name in ("inv_freq", "original_inv_freq"):
            self.module.register_buffer(self._name(name), placed.clone(), persistent=False)
        setattr(self.module, self._name("attention_scaling"), factor)
        if self.layer_type is None:
            self.module.rope_type = "default"
        else:
            self.module.rope_type = {**self.module.rope_type, self.layer_type: "default"}
        if hasattr(self.module, "rope_init_fn"):  # PhiMoE's module asks it anew in each forward
            self.module.rope_init_fn = lambda *_, **__: (placed, factor)
        measured, measured_factor = self.measure()
        if not torch.allclose(measured, placed.sort().values, atol=1e-6) or abs(measured_factor - factor) > 1e-4:
            raise ModelError(
                f"{type(self.module).__name__} turns by other angles than those put in place; this method does not apply"
            )


def find_rotaries(model: Any) -> list[Rotary]:
    """Every set of rotary frequencies in the model's modules, in their order."""
    found = []
    for module in model.modules():
        if isinstance(getattr(module, "rope_type", None), Mapping):
            found += [Rotary(module, layer) for layer in module.rope_type if hasattr(module, f"{layer}_inv_freq")]
        elif hasattr(module, "inv_freq") and getattr(getattr(module, "config", None), "rope_parameters", None):
            found.append(Rotary(module, None))
    return found


def extended(model: Any) -> list[Rotary]:
    """Those of `find_rotaries` that see far: all, but where layer types have their own, those of full attention."""
    found = find_rotaries(model)
    return [rotary for rotary in found if rotary.layer_type in (None, FULL)] or found


def why_not(subject: Subject) -> str:
    """Why frequencies of a model cannot be changed; empty where they can."""
    if "rotary" not in subject.schemes:
        return "it has no rotary angles that are computed"
    config = subject.model.config
    window, layers = read_window(config), getattr(config, "layer_types", None) or []
    bounded = window is not None and window <= subject.trained
    if bounded and "none" in subject.schemes and layers:
        return f"its rotary layers see {window} tokens only, and the layers that see all have no positions: no angle is unfamiliar"
    if bounded and ("sliding_attention" in layers or not layers) and FULL not in layers and "recurrent" not in subject.schemes:
        return f"every layer sees {window} tokens only: no angle is unfamiliar"
    rotaries = extended(subject.model)
    if not rotaries:
        return "its frequencies are not where transformers keeps them"
    for rotary in rotaries:
        if not hasattr(rotary.module, "compute_default_rope_parameters"):
            return f"{type(rotary.module).__name__} computes its angles in a way of its own"
        kind = rotary.kind
        if kind not in ("default", *ROPE_INIT_FUNCTIONS) or kind == "proportional":
            return f"its rope type {kind!r} has no counterpart in this method"
        try:
            frequencies, _ = rotary.compute({"rope_type": "linear", "factor": 1.0}, None)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            return f"transformers cannot compute its frequencies anew: {error!r}"
        if frequencies.shape != rotary.frequencies.shape:
            return f"transformers computes {len(frequencies)} frequencies for it, and it has {len(rotary.frequencies)}"
    return ""


def install(parameters: Callable[[Parameters, Subject, Setting], Parameters]) -> Callable[[Subject, Setting], None]:
    """A method that merges `parameters(the checkpoint's, subject, setting)` into the checkpoint's and pins the result."""

    def install_in(subject: Subject, setting: Setting) -> None:
        for rotary in extended(subject.model):
            change = parameters(rotary.own, subject, setting)
            rotary.pin(*rotary.compute(change, setting.tokens, subject.trained))

    return install_in


def is_recomputed(model: Any) -> bool:
    """Whether a checkpoint's own frequencies depend on what the forward sees (`dynamic`, `longrope`)."""
    return any(rotary.kind in PER_LENGTH for rotary in find_rotaries(model))


def pin_own(subject: Subject, setting: Setting) -> None:
    """Pins a checkpoint's own `dynamic` or `longrope` frequencies to the length under test; leaves other types as they are."""
    for rotary in find_rotaries(subject.model):
        if rotary.kind in PER_LENGTH:
            rotary.pin(*rotary.compute({}, setting.tokens))


def merge(own: Any, given: Any) -> Any:
    """A user's `rope_parameters` laid over a checkpoint's, kind by kind where layer types have their own; nothing is dropped.

    >>> merge({"rope_theta": 1e4, "rope_type": "default"}, {"rope_type": "linear", "factor": 2.0})
    {'rope_theta': 10000.0, 'rope_type': 'linear', 'factor': 2.0}
    >>> merge({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}, {"factor": 2.0})
    {'full_attention': {'rope_theta': 1000000.0, 'factor': 2.0}, 'sliding_attention': {'rope_theta': 10000.0}}
    """
    if not isinstance(own, Mapping) or not isinstance(given, Mapping):
        return given
    nested = any(isinstance(value, Mapping) for value in own.values())
    if nested and not any(isinstance(value, Mapping) for value in given.values()):
        given = {FULL if FULL in own else next(iter(own)): given}
    return {**own, **{key: merge(own[key], value) if key in own else value for key, value in given.items()}}


def rotate(module: Any, rotary: Rotary, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """states (batch, heads, tokens, head_dim) turned on by positions (batch or 1, tokens), which may be negative.

    By the family's own function, so in its own layout (halves, or pairs as Cohere and GLM have them). `module` is the attention module.
    Raises ModelError where the family turns in another way.
    """
    apply = getattr(inspect.getmodule(type(module)), "apply_rotary_pos_emb", None)
    layer = {} if rotary.layer_type is None else {"layer_type": rotary.layer_type}
    turned = rotary.module(states.float(), positions, **layer)
    if apply is None or not isinstance(turned, tuple) or list(inspect.signature(apply).parameters)[:4] != ["q", "k", "cos", "sin"]:
        raise ModelError(f"{type(module).__name__} turns queries and keys in a way of its own; this method does not apply")
    cos, sin = (angle / rotary.attention_factor for angle in turned)
    width = cos.shape[-1]
    part, rest = states[..., :width].float(), states[..., width:]
    return torch.cat((apply(part, part, cos, sin)[0].to(states.dtype), rest), dim=-1)
