"""How far two ways of computing the same logits are from each other, measured in what one rounding does to them.

The embeddings are shaken by one rounding of their type, and what that does to the logits, position by position, is what rounding does to
this model (a few positions of a trained model are a hundred times as sensitive as the others).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness_ext.model_view import first_line
from harness_ext.models.forward import Forward
from harness_ext.positions import text_config

SHAKES = 2
TOLERANCE = 100
"""Times the response to a shake, in float32. With random weights, models that can be read in pieces differ by 2 times it at most, by
40 where they carry on a linear attention's state; those that cannot by 250 at least, most of them by 10,000 (`tests/test_sharing.py`)."""
HALF = 10
"""The same in half precision, where a rounding is larger and what is more than one is a smaller part of it: models that can be read in pieces
differ by less than a quarter of it, others by more than twice as much (`tests/test_half_precision.py`)."""
ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)
"""What a model raises that is read in a way it is not made for."""


def find_tolerance(forward: Forward) -> float:
    """How many responses to a shake are still rounding, in the precision that a model computes in."""
    return TOLERANCE if torch.finfo(forward.dtype).bits >= 32 else HALF


class Plain:
    """The logits (rows, positions, vocabulary) that `read` gives, and what one rounding of the embeddings does to them."""

    @torch.inference_mode()
    def __init__(self, forward: Forward, read: Callable[[], Tensor]) -> None:
        self.logits = read()
        epsilon = torch.finfo(forward.dtype).eps
        generator = torch.Generator().manual_seed(0)

        def shake(_: torch.nn.Module, __: Any, output: Tensor) -> Tensor:
            noise = torch.randn(output.shape, generator=generator).to(output.device)
            return (output.float() * (1 + epsilon * noise)).to(output.dtype)

        hooks = [module.register_forward_hook(shake) for module in _list_embeddings(forward.model)]
        try:
            self.response = torch.stack([_differ(read(), self.logits) for _ in range(SHAKES)]).amax(0)
        finally:
            for hook in hooks:
                hook.remove()

    def measure(self, logits: Tensor, last: int = 0) -> float:
        """How far logits (rows, last or all, vocabulary) of the same tokens are, in responses to a shake; at the worst position."""
        last = last or logits.shape[1]
        usual = self.response.clamp(min=float(self.response.median()))
        differences = _differ(logits[:, -last:], self.logits[:, -last:])
        times = float(torch.where(differences == 0, 0, differences / usual[:, -last:]).max())
        return times if times == times else float("inf")  # no number is far from any


def read_whole(forward: Forward, tokens: Tensor, positions: Tensor | None = None, last: int = 0) -> Plain:
    """Tokens (rows, count) read in one forward, on nothing. `last`: how many positions to look at, all for 0."""
    count = tokens.shape[1]
    return Plain(forward, lambda: forward(tokens, None, range(count - (last or count), count), positions).float())


@torch.inference_mode()
def find_difference(forward: Forward, measure: Callable[[], float]) -> str:
    """What is measured (`Plain.measure`) in words, where it is more than rounding does or cannot be read; empty where it is not."""
    try:
        times = measure()
    except ERRORS as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return (
        "" if times <= find_tolerance(forward) else f"logits differ by {times:.2g} times what one rounding of the embeddings does"
    )


def draw(forward: Forward, count: int, seed: int = 0) -> Tensor:
    """Random tokens (1, count), none of the special ones."""
    special = list_special(forward)
    usual = [token for token in range(min(forward.vocabulary, 4096)) if token not in special]
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(usual)[torch.randint(len(usual), (1, count), generator=generator)]


def list_special(forward: Forward) -> list[int]:
    """The tokens that pad, begin and end a text, as far as the model's config has them; it may have several of a kind."""
    config: Any = text_config(forward.model.config)
    given = (getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    ids = itertools.chain.from_iterable(one if isinstance(one, list | tuple) else [one] for one in given)
    return sorted({token for token in ids if isinstance(token, int) and 0 <= token < forward.vocabulary})


def _list_embeddings(model: Any) -> list[torch.nn.Module]:
    """What turns tokens into vectors: an encoder has a module of its own for it, with the same weights."""
    own = model.get_input_embeddings()
    same = [module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module.weight is own.weight]
    return [own, *(module for module in same if module is not own)]


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """The largest difference of any logit, (rows, positions)."""
    return (one - other).abs().amax(-1)
