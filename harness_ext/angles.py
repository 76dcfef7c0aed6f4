"""Which rotary angles weights have seen, and which a longer prompt shows them for the first time: arithmetic on frequencies, without torch.

A pair of dimensions with the frequency θ (radians a token) turns by θ·n between two tokens n apart, and repeats itself every λ = 2π/θ tokens.
Trained on T tokens, it has shown the weights the angles from 0 to θ·T, each position counted with the step to the next. With λ ≤ T that
is the whole circle: no distance is ever new to it. With λ > T it is an arc, and L tokens reach past it where θ′·L > θ·T, for the frequency
θ′ in effect at L. An angle between two that were seen counts as seen: what a finer step does to the weights is not told here.

Liu et al., "Scaling Laws of RoPE-based Extrapolation" (arXiv 2310.05209), call the dimensions of the pairs that make their turn the critical
dimension, d_extra = 2·⌈d/2 · log_b(T/2π)⌉ for d dimensions and the base b. That is a count: θ_i = b^(−2i/d), so λ_i = 2π·b^(2i/d) < T exactly where
i < d/2 · log_b(T/2π). We count pairs by their real frequencies, of which the formula knows only those without any scaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TURN = 2 * math.pi
ROUNDING = 1e-5
"""Share of an arc that frequencies in float32 may exceed it by without meaning it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What training has shown of the circles of one set of rotary pairs."""

    frequencies: tuple[float, ...]
    """In radians a token, one a pair, under which the weights were trained."""
    tokens: int
    """That any query saw in training: the trained length, or a layer's window."""
    window: int | None = None
    """Tokens that a query sees at most, however long the prompt; None where it sees all of it."""

    @property
    def turning(self) -> int:
        """Pairs that complete a turn: no angle is new to them.

        >>> Seen(frequencies=compute_frequencies(128, 10_000), tokens=4096).turning
        46
        """
        return sum(frequency * self.tokens >= TURN for frequency in self.frequencies)

    @property
    def critical_dimension(self) -> int:
        """Of the dimensions that rotate, those of pairs that complete a turn (Liu et al.: 92 of 128 for Llama 2).

        >>> Seen(frequencies=compute_frequencies(128, 10_000), tokens=4096).critical_dimension
        92
        """
        return 2 * self.turning

    @property
    def slowest(self) -> float:
        """Turns that the slowest pair makes in training.

        >>> round(Seen(frequencies=compute_frequencies(128, 10_000), tokens=4096).slowest, 3)
        0.075
        """
        return min(self.frequencies, default=0.0) * self.tokens / TURN

    def find_unseen(self, in_effect: Sequence[float], length: int) -> tuple[float, ...]:
        """For each pair, the share of the angles reached in a prompt of `length` tokens that training did not show: 0 to below 1.

        `in_effect`: the frequencies at that length. Position interpolation brings all angles back into the arc that was seen:

        >>> seen = Seen(frequencies=(1.0, 0.01), tokens=100)
        >>> seen.find_unseen(seen.frequencies, 400)
        (0.0, 0.75)
        >>> seen.find_unseen([frequency / 4 for frequency in seen.frequencies], 400)
        (0.0, 0.0)
        """
        tokens = min(length, self.window or length)
        return tuple(
            measure_unseen(trained * self.tokens, now * tokens) for trained, now in zip(self.frequencies, in_effect, strict=True)
        )


def measure_unseen(seen: float, reached: float) -> float:
    """The share of the angles from 0 to `reached` (radians, a circle at most) that do not lie between 0 and `seen`.

    >>> measure_unseen(1.0, 4.0), measure_unseen(4.0, 1.0), measure_unseen(7.0, 100.0)
    (0.75, 0.0, 0.0)
    """
    seen, reached = min(seen, TURN), min(reached, TURN)
    return 1 - seen / reached if reached > seen * (1 + ROUNDING) else 0.0


def compute_frequencies(dims: int, base: float) -> tuple[float, ...]:
    """θ_i = base^(−2i/dims), in radians a token: those of plain rotary angles (Su et al., arXiv 2104.09864, §3.2.2).

    >>> compute_frequencies(4, 10_000)
    (1.0, 0.01)
    """
    return tuple(base ** (-2 * pair / dims) for pair in range(dims // 2))


def compute_critical_dimension(dims: int, base: float, tokens: int) -> int:
    """d_extra = 2·⌈d/2 · log_base(tokens/2π)⌉ (Liu et al., arXiv 2310.05209), within 0 and dims.

    >>> compute_critical_dimension(128, 10_000, 4096)
    92
    """
    return min(dims, max(0, 2 * math.ceil(dims / 2 * math.log(tokens / TURN, base))))
