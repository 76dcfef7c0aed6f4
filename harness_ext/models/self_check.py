"""What a model can go on from without a different answer, found out on the loaded model itself.

Random tokens are read in one plain forward, and again in chunks of several sizes, the last of them one by one, after going back to a
branch, in two rows, and past the trained length. How far logits may differ is found out too: the embeddings are shaken by one rounding
of their type, and what that does to the logits, position by position, is what rounding does to this model (a few positions of a trained model
are a hundred times as sensitive as the others). Where reading in pieces differs by more, that kind of state is not used; where
no kind holds, the model reads every prompt whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness_ext.model_view import first_line
from harness_ext.models import pieces
from harness_ext.models.forward import Forward
from harness_ext.models.state import Copied, Cuttable, State
from harness_ext.positions import read_schemes, read_window, text_config

TOKENS = 48
"""Tokens of each check, and how far past the trained length it goes."""
CHUNKS = (11, 20)
FEWEST = 16
"""Tokens that every model can read."""
NEW = 4
"""Tokens to generate."""
SINGLE = 3
"""Tokens that are read one by one."""
SHAKES = 2
FAR = 1024
"""Tokens that are read to get past the trained length; where it is longer, positions are given instead, if the model takes them."""
TOLERANCE = 100
"""Times the response to a shake. With random weights in float32, models that can be read in pieces differ by 2 times it at most, by
40 where they carry on a linear attention's state; those that cannot by 250 at least, most of them by 10,000 (`tests/test_sharing.py`)."""
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


def find_reach(forward: Forward, trained: int) -> int:
    """Tokens past which reading is no different any more: past the trained length, and past any window."""
    return max(trained, read_window(forward.model.config) or 0) + TOKENS


def find_state(forward: Forward, trained: int, most: int) -> Finding:
    """The state that a model can go on from. `trained`: its trained length, `most`: how far may be read, both in tokens."""
    model = forward.model
    if forward.dtype != torch.float32 and text_config(model.config).model_type in INEXACT:
        return Finding(make=None, said="chunks of this family differ from one forward, which rounding hides in this precision")
    kinds: list[tuple[str, Callable[[int], State]]] = [
        ("keys and values that are cut back", Cuttable),
        ("a copied state", lambda room: Copied(model)),
        ("a copied state, gone on from by two tokens at least", lambda room: Copied(model, alone=False)),
    ]
    if pieces.is_installed(model):
        kinds.insert(
            0, ("keys and values that are cut back, and gone on from without copies", functools.partial(Cuttable, forks=True))
        )
    found = []
    for name, make in kinds:
        try:
            times = _compare(forward, functools.partial(make, 2 * FAR), trained, max(most, FEWEST))
        except ERRORS as error:
            found.append(f"{name}: {type(error).__name__}: {first_line(error)}")
            continue
        said = f"{name}: logits differ from one forward's by {times:.2g} times what one rounding of the embeddings does"
        if times <= TOLERANCE:
            return Finding(make=make, said=said)
        found.append(said)
    return Finding(make=None, said="; ".join(found))


def check_generation(forward: Forward, make: Callable[[int], State], most: int) -> Finding:
    """Whether `generate` goes on from a state as it does from the whole prompt: on random tokens, greedily."""
    if not make(0).alone:
        return Finding(make=None, said="one token after others is computed in another way than among them")
    tokens = draw(forward, min(TOKENS, max(most, FEWEST)) - NEW).to(forward.device)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    options |= {"pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    try:
        with torch.inference_mode():
            state = make(TOKENS)
            forward(tokens[:, :-1], state, ())
            given = {name: value for name, value in state.arguments().items() if name != "use_cache"}
            ours = forward.model.generate(tokens, **options, **given).logits
    except ERRORS as error:
        return Finding(make=None, said=f"{type(error).__name__}: {first_line(error)}")
    times = Plain(forward, tokens.cpu()).measure(ours[0][:, None].float(), last=1)
    if times > TOLERANCE:
        return Finding(
            make=None, said=f"its first logits differ from the whole prompt's by {times:.2g} times what one rounding does"
        )
    return Finding(make=make, said="the first logits are those of the whole prompt")


class Plain:
    """Tokens (rows, count) read in one forward, and what one rounding of the embeddings does to it."""

    @torch.inference_mode()
    def __init__(self, forward: Forward, tokens: Tensor, positions: Tensor | None = None, last: int = 0) -> None:
        """`last`: how many positions to look at, all for 0."""
        count = tokens.shape[1]

        def read() -> Tensor:
            return forward(tokens, None, range(count - (last or count), count), positions).float()

        self.tokens, self.logits = tokens, read()
        epsilon = torch.finfo(forward.dtype).eps
        generator = torch.Generator().manual_seed(0)

        def shake(_: torch.nn.Module, __: Any, output: Tensor) -> Tensor:
            noise = torch.randn(output.shape, generator=generator).to(output.device)
            return (output.float() * (1 + epsilon * noise)).to(output.dtype)

        hook = forward.model.get_input_embeddings().register_forward_hook(shake)
        try:
            self.response = torch.stack([_differ(read(), self.logits) for _ in range(SHAKES)]).amax(0)
        finally:
            hook.remove()

    def measure(self, logits: Tensor, last: int = 0) -> float:
        """How far logits (rows, last or all, vocabulary) of the same tokens are, in responses to a shake; at the worst position."""
        last = last or logits.shape[1]
        usual = self.response.clamp(min=float(self.response.median()))
        times = float((_differ(logits[:, -last:], self.logits[:, -last:]) / usual[:, -last:]).max())
        return times if times == times else float("inf")  # no number is far from any


@torch.inference_mode()
def _compare(forward: Forward, make: Callable[[], State], trained: int, most: int) -> float:
    """How far reading in pieces is from reading at once, at the worst, in responses to a shake."""
    count = min(TOKENS, most)
    tokens, other, half = draw(forward, count), draw(forward, count, seed=1), count // 2
    plain = Plain(forward, tokens)
    branch = Plain(forward, torch.cat((tokens[:, :half], other[:, half:]), dim=1))
    times = [plain.measure(read_in_chunks(forward, make(), tokens, chunk)) for chunk in CHUNKS]
    state = make()
    if state.alone:
        times.append(plain.measure(_read_singly(forward, state, tokens), last=SINGLE))
        state = make()
    read_in_chunks(forward, state, tokens[:, :half], half)
    aside = state if state.cuts else state.copied()
    times.append(plain.measure(read_in_chunks(forward, state, tokens[:, half:], half), last=count - half))
    if state.cuts:
        state.keep(half)
        both = torch.cat((branch.tokens, branch.tokens))[:, half:]
        for several in (state.copied(2), state.forked(2)):
            rows = read_in_chunks(forward, several, both, half)
            times += [branch.measure(row[None], last=count - half) for row in rows]
    times.append(branch.measure(read_in_chunks(forward, aside, branch.tokens[:, half:], half), last=count - half))
    return max(times + _compare_far(forward, make, trained, most))


def _read_singly(forward: Forward, state: State, tokens: Tensor) -> Tensor:
    """The logits of the last tokens (1, count), read one by one: some recurrent families have a computation of their own for that."""
    before = tokens.shape[1] - SINGLE
    read_in_chunks(forward, state, tokens[:, :before], before)
    return read_in_chunks(forward, state, tokens[:, before:], 1)


def _compare_far(forward: Forward, make: Callable[[], State], trained: int, most: int) -> list[float]:
    """The same past the trained length and past a window, by reading as far, or at positions as far."""
    reach = min(find_reach(forward, trained), most)
    if reach <= TOKENS:
        return []
    if reach <= FAR:
        plain = Plain(forward, draw(forward, reach), last=TOKENS)
        return [plain.measure(read_in_chunks(forward, make(), plain.tokens, reach // 2), last=TOKENS)]
    if "rotary" not in read_schemes(forward.model.config, forward.model) or not forward.takes_positions:
        return []
    positions = torch.arange(reach - TOKENS, reach)[None]
    plain = Plain(forward, draw(forward, TOKENS), positions)
    return [plain.measure(read_in_chunks(forward, make(), plain.tokens, CHUNKS[0], positions))]


def draw(forward: Forward, count: int, seed: int = 0) -> Tensor:
    """Random tokens (1, count), none of the special ones."""
    config: Any = text_config(forward.model.config)
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    usual = [token for token in range(min(forward.vocabulary, 4096)) if token not in special]
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(usual)[torch.randint(len(usual), (1, count), generator=generator)]


def read_in_chunks(forward: Forward, state: State, tokens: Tensor, chunk: int, positions: Tensor | None = None) -> Tensor:
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


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """The largest difference of any logit, (rows, positions)."""
    return (one - other).abs().amax(-1)
