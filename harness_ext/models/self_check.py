"""What a model can go on from without a different answer, found out on the loaded model itself.

Random tokens are read in one plain forward, and again in chunks of several sizes, after going back to a branch, and past the
trained length. Where the logits differ by more than rounding, that kind of state is not used; where no kind holds, the model
runs every prompt whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness_ext.model_view import first_line
from harness_ext.models.forward import Forward
from harness_ext.models.state import Copied, Cuttable, State
from harness_ext.positions import read_schemes, read_window, text_config

TOKENS = 96
"""Tokens of each check, and how far past the trained length it goes."""
CHUNKS = (13, 40)
NEW = 4
"""Tokens to generate."""
FAR = 1024
"""Tokens that are read to get past the trained length; where it is longer, positions are given instead, if the model takes them."""
TOLERANCE = 1e-4
"""Of the logits' standard deviation. In float32 one forward and many differ by 1e-6 to 1e-5 of it; of the families whose chunks
are another computation, none differs by less than 5e-4, with random weights."""
ROUNDINGS = 32
"""In lower precision: so many times the type's rounding of that deviation (one forward and many in bfloat16 differ by about 7)."""
INEXACT = frozenset({"mamba", "falcon_mamba", "jamba", "recurrent_gemma", "bamba"})
"""Families whose chunks are known to differ, by less than what rounding hides in lower precision."""
ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found."""

    make: Callable[[int], State] | None
    """A fresh state with room for so many tokens; None where prompts have to be read whole."""
    said: str
    """In words, why."""


def find_state(forward: Forward, trained: int) -> Finding:
    """The state that a model can go on from. `trained`: its trained length, in tokens."""
    model = forward.model
    precise = next(model.parameters()).dtype == torch.float32 and forward.autocast is None
    if not precise and text_config(model.config).model_type in INEXACT:
        return Finding(make=None, said="chunks of this family differ from one forward, which rounding hides in this precision")
    kinds: dict[str, Callable[[int], State]] = {
        "keys and values that are cut back": Cuttable,
        "a copied state": lambda room: Copied(model),
    }
    found = []
    for name, make in kinds.items():
        try:
            difference, allowed = _compare(forward, functools.partial(make, 2 * FAR), trained)
        except ERRORS as error:
            found.append(f"{name}: {type(error).__name__}: {first_line(error)}")
            continue
        if difference <= allowed:
            return Finding(
                make=make, said=f"{name}: logits differ from one forward's by {difference:.1e} of their deviation at most"
            )
        found.append(
            f"{name}: logits differ from one forward's by {difference:.1e} of their deviation, where {allowed:.0e} may be rounding"
        )
    return Finding(make=None, said="; ".join(found))


def check_generation(forward: Forward, make: Callable[[int], State]) -> Finding:
    """Whether `generate` goes on from a state as it does from the whole prompt: on random tokens, greedily."""
    tokens = _draw(forward, TOKENS // 2).to(forward.device)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    options |= {"pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    try:
        with torch.inference_mode():
            state = make(TOKENS)
            forward(tokens[:, :-1], state, ())
            given = {name: value for name, value in state.arguments().items() if name != "use_cache"}
            ours, theirs = (forward.model.generate(tokens, **options, **shared).logits for shared in (given, {}))
    except ERRORS as error:
        return Finding(make=None, said=f"{type(error).__name__}: {first_line(error)}")
    difference = _differ(ours[0].float(), theirs[0].float()) / float(theirs[0].float().std())
    if difference > _allow(forward):
        return Finding(
            make=None, said=f"the first logits differ by {difference:.1e} of their deviation from those of the whole prompt"
        )
    return Finding(make=make, said="the first logits are those of the whole prompt")


def _allow(forward: Forward) -> float:
    """The largest difference that may be rounding."""
    dtype = forward.autocast or next(forward.model.parameters()).dtype
    return float(max(TOLERANCE, ROUNDINGS * torch.finfo(dtype).eps))


@torch.inference_mode()
def _compare(forward: Forward, make: Callable[[], State], trained: int) -> tuple[float, float]:
    """The largest difference of any logit from a plain forward's, as a share of their standard deviation, and the largest that may be rounding."""
    tokens, other = _draw(forward, TOKENS), _draw(forward, TOKENS)
    whole = _read_whole(forward, tokens)
    differences = [_differ(_read_in_chunks(forward, make(), tokens, chunk), whole) for chunk in CHUNKS]
    half = TOKENS // 2
    state = make()
    _read_in_chunks(forward, state, tokens[:, :half], half)
    aside = state if state.cuts else state.copied()
    differences.append(_differ(_read_in_chunks(forward, state, tokens[:, half:], half), whole[:, half:]))
    if state.cuts:
        state.keep(half)
        rows = aside.copied(2)
        both = torch.cat((tokens, other))[:, half:]
        expected = torch.cat((whole, _read_whole(forward, torch.cat((tokens[:, :half], other[:, half:]), dim=1))))[:, half:]
        differences.append(_differ(_read_in_chunks(forward, rows, both, half), expected))
    branch = torch.cat((tokens[:, :half], other[:, half:]), dim=1)
    differences.append(_differ(_read_in_chunks(forward, aside, branch[:, half:], half), _read_whole(forward, branch)[:, half:]))
    differences += _compare_far(forward, make, trained)
    return max(differences) / float(whole.std()), _allow(forward)


def _compare_far(forward: Forward, make: Callable[[], State], trained: int) -> list[float]:
    """The differences past the trained length and past a window, by reading as far, or at positions as far."""
    reach = max(trained, read_window(forward.model.config) or 0)
    if reach <= FAR:
        tokens = _draw(forward, reach + TOKENS)
        whole = _read_whole(forward, tokens, TOKENS)
        return [_differ(_read_in_chunks(forward, make(), tokens, reach // 2 + 1)[:, -TOKENS:], whole)]
    if "rotary" not in read_schemes(forward.model.config, forward.model) or not forward.takes_positions:
        return []
    tokens = _draw(forward, TOKENS)
    positions = torch.arange(trained - TOKENS // 2, trained + TOKENS // 2)[None]
    whole = forward(tokens, None, range(TOKENS), positions).float()
    return [_differ(_read_in_chunks(forward, make(), tokens, CHUNKS[0], positions=positions), whole)]


def _draw(forward: Forward, count: int) -> Tensor:
    """Random tokens (1, count), none of the special ones."""
    config: Any = text_config(forward.model.config)
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    usual = [token for token in range(min(forward.vocabulary, 4096)) if token not in special]
    generator = torch.Generator().manual_seed(count)
    return torch.tensor(usual)[torch.randint(len(usual), (1, count), generator=generator)]


def _read_whole(forward: Forward, tokens: Tensor, last: int = 0) -> Tensor:
    count = tokens.shape[1]
    return forward(tokens, None, range(count - last if last else 0, count)).float()


def _read_in_chunks(forward: Forward, state: State, tokens: Tensor, chunk: int, positions: Tensor | None = None) -> Tensor:
    """All logits of tokens (rows, count), read on top of a state."""
    parts = [slice(start, start + chunk) for start in range(0, tokens.shape[1], chunk)]
    return torch.cat(
        [
            forward(
                tokens[:, part], state, range(tokens[:, part].shape[1]), None if positions is None else positions[:, part]
            ).float()
            for part in parts
        ],
        dim=1,
    )


def _differ(one: Tensor, other: Tensor) -> float:
    difference = float((one - other).abs().max())
    return difference if difference == difference else float("inf")  # no number differs from any
