"""What a model can go on from without a different answer, found out on the loaded model itself.

Random tokens are read in one plain forward, and again in chunks of several sizes, the last of them one by one, after going back to a
branch, in two rows, and past the trained length. Where that differs by more than rounding does (`rounding`), that kind of state is not used;
where no kind holds, the model reads every prompt whole.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness_ext.model_view import first_line
from harness_ext.models import last_layer, memory, pieces
from harness_ext.models.forward import Forward
from harness_ext.models.rounding import ERRORS, draw, find_difference, find_tolerance, list_special, read_whole
from harness_ext.models.state import Copied, Cuttable, State
from harness_ext.positions import is_listed, read_schemes, read_selection, read_window, text_config

log = logging.getLogger(__name__)

TOKENS = 48
"""Tokens of each check, and how far past the trained length it goes."""
CHUNKS = (11, 20)
FEWEST = 16
"""Tokens that every model can read."""
SINGLE = 3
"""Tokens that are read one by one."""
FAR = 1024
"""Tokens that are read to get past the trained length; where it is longer, positions are given instead, if the model takes them."""
FAR_UNLISTED = 8192
"""The same of a family that nobody listed: its code may ask how many tokens there are, whatever their positions."""
INEXACT = frozenset({"mamba", "falcon_mamba", "jamba", "recurrent_gemma", "bamba"})
"""Families whose chunks are known to differ, by less than what rounding hides in lower precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found."""

    make: Callable[[int], State] | None
    """A fresh state with room for so many tokens; None where prompts have to be read whole."""
    said: str
    """In words, why."""


def find_reach(forward: Forward, trained: int) -> int:
    """Tokens past which reading is no different any more: past the trained length, past any window, and past what sparse attention picks."""
    config = forward.model.config
    return max(trained, read_window(config) or 0, read_selection(config) or 0) + TOKENS


@torch.inference_mode()
def check_output(forward: Forward) -> None:
    """Lets the output layer have all columns from now on, where those that are wanted, alone, come out otherwise: some models add to logits, or
    scale them, by what stands where.
    """
    tokens, forward.picks = draw(forward, FEWEST), True
    try:
        whole = read_whole(forward, tokens)
    except ERRORS:  # which what is asked of it will say
        return

    def measure() -> float:
        """Of the last logits, asked for alone."""
        return max(whole.measure(_read_end(forward, None, tokens, last), last=last) for last in (SINGLE, 1))

    why = find_difference(forward, measure)
    forward.picks = not why
    if why:
        log.warning("logits are computed of all tokens, since those of some alone come out otherwise: %s", why)


def find_state(forward: Forward, trained: int, most: int) -> Finding:
    """The state that a model can go on from. `trained`: its trained length, `most`: how far may be read, both in tokens."""
    model = forward.model
    if forward.dtype != torch.float32 and text_config(model.config).model_type in INEXACT:
        return Finding(make=None, said="chunks of this family differ from one forward, which rounding hides in this precision")
    if (picked := read_selection(model.config) or most) < most:
        return Finding(make=None, said=f"its attention picks {picked} tokens, and other ones where two scores are a rounding apart")
    kept = "keys and values that are cut back"
    kinds: list[tuple[str, Callable[[int], State]]] = [
        (kept, Cuttable),
        ("a copied state", lambda room: Copied(model)),
        ("a copied state, gone on from by two tokens at least", lambda room: Copied(model, alone=False)),
    ]
    if pieces.is_installed(model):
        attentions = _count_attentions(forward)
        forks, short = f"{kept}, and gone on from without copies", "the last layer only where it is read"
        kinds[:0] = [
            (f"{forks}; {short}", functools.partial(Cuttable, forks=True, attentions=attentions)),
            (f"{kept}; {short}", functools.partial(Cuttable, attentions=attentions)),
            (forks, functools.partial(Cuttable, forks=True)),
        ]
    found, most = [], max(most, FEWEST)
    reach = min(find_reach(forward, trained), most)
    for name, make in kinds:
        times = _try(forward, make, most, reach)
        if isinstance(times, str):
            found.append(f"{name}: {times}")
            continue
        said = f"{name}: logits differ from one forward's by {times:.2g} times what one rounding of the embeddings does"
        if times <= find_tolerance(forward):
            return Finding(make=make, said=said)
        found.append(said)
    return Finding(make=None, said="; ".join(found))


def _try(forward: Forward, make: Callable[[int], State], most: int, reach: int) -> float | str:
    """How far reading in pieces is from reading at once, near and far; in words, why it cannot be done.

    Where memory runs out, it is freed and all is tried once more: what was left of something before may have taken it.
    """
    why = ""
    for _ in range(2):
        try:
            near = _compare(forward, functools.partial(make, TOKENS), most)  # and its states are gone before more is read
            return max(near, _compare_far(forward, make, reach))
        except ERRORS as error:
            why, out = f"{type(error).__name__}: {first_line(error)}", memory.is_out(error)
        if not out:
            break
        memory.free()
    return why


@torch.inference_mode()
def _count_attentions(forward: Forward) -> int:
    """How often a forward attends; 0 where one fails, which the checks will say."""
    try:
        return last_layer.count_attentions(lambda: forward(draw(forward, FEWEST), None, ()))
    except ERRORS:
        return 0


@torch.inference_mode()
def _compare(forward: Forward, make: Callable[[], State], most: int) -> float:
    """How far reading in pieces is from reading at once, at the worst, in responses to a shake.

    At once is read under SDPA itself, which a family may look for by its name.
    """
    count = min(TOKENS, most)
    tokens, other, half = _draw(forward, count), _draw(forward, count, seed=1), count // 2
    parted = torch.cat((tokens[:, :half], other[:, half:]), dim=1)
    with pieces.set_aside(forward.model):
        plain, branch = read_whole(forward, tokens), read_whole(forward, parted)
    times = [plain.measure(read_in_chunks(forward, make(), tokens, chunk)) for chunk in CHUNKS]
    together = torch.cat((tokens, parted))
    rows = read_in_chunks(forward, make(), together, CHUNKS[0])
    times += [plain.measure(rows[:1]), branch.measure(rows[1:])]
    state = make()
    if state.alone:
        times.append(plain.measure(_read_singly(forward, state, tokens), last=SINGLE))
        rows = _read_singly(forward, make(), together)
        times += [plain.measure(rows[:1], last=SINGLE), branch.measure(rows[1:], last=SINGLE)]
        state = make()
    forward(tokens[:, :half], state, ())
    aside = state if state.cuts else state.copied()
    times.append(plain.measure(read_in_chunks(forward, state, tokens[:, half:], half), last=count - half))
    if state.cuts:
        state.keep(half)
        times.append(plain.measure(_read_end(forward, state, tokens[:, half:], SINGLE), last=SINGLE))
        state.keep(half)
        both = torch.cat((parted, parted))[:, half:]
        for several in (state.copied(2), state.forked(2)):
            rows = read_in_chunks(forward, several, both, half)
            times += [branch.measure(row[None], last=count - half) for row in rows]
    times.append(branch.measure(read_in_chunks(forward, aside, parted[:, half:], half), last=count - half))
    return max(times)


def _draw(forward: Forward, count: int, seed: int = 0) -> Tensor:
    """Random tokens (1, count), and the special ones in the middle of each half: a prompt may have them, and a model do something of its own there."""
    tokens, special = draw(forward, count, seed), list_special(forward)[: count // 4]
    for start in (count // 4, 3 * count // 4):
        tokens[0, start : start + len(special)] = torch.tensor(special, dtype=tokens.dtype)
    return tokens


def _read_singly(forward: Forward, state: State, tokens: Tensor) -> Tensor:
    """The logits of the last tokens (1, count), read one by one: some recurrent families have a computation of their own for that."""
    before = tokens.shape[1] - SINGLE
    forward(tokens[:, :before], state, ())
    return read_in_chunks(forward, state, tokens[:, before:], 1)


@torch.inference_mode()
def _compare_far(forward: Forward, make: Callable[[int], State], reach: int) -> float:
    """The same past the trained length and past a window, by reading as far, or at positions as far."""
    if reach <= TOKENS:
        return 0.0
    if reach <= (FAR if is_listed(forward.model.config) else FAR_UNLISTED):
        tokens = _draw(forward, reach)
        with pieces.set_aside(forward.model):
            plain = read_whole(forward, tokens, last=TOKENS)
        state, before = make(reach), min(reach // 2, reach - TOKENS)
        forward(tokens[:, :before], state, ())
        return plain.measure(_read_end(forward, state, tokens[:, before:], TOKENS), last=TOKENS)
    if "rotary" not in read_schemes(forward.model.config, forward.model) or not forward.takes_positions:
        return 0.0
    positions = torch.arange(reach - TOKENS, reach)[None] - TOKENS // 2  # from before the end to behind it
    tokens = draw(forward, TOKENS)
    with pieces.set_aside(forward.model):
        plain = read_whole(forward, tokens, positions)
    return plain.measure(read_in_chunks(forward, make(TOKENS), tokens, CHUNKS[0], positions))


def _read_end(forward: Forward, state: State | None, tokens: Tensor, last: int) -> Tensor:
    """The logits of the last of tokens (rows, count), read at once."""
    return forward(tokens, state, range(tokens.shape[1] - last, tokens.shape[1])).float()


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
