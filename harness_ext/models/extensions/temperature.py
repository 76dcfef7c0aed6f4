"""Attention temperature: every score multiplied by a constant t, against attention that thins out over more tokens.

By default YaRN's, (0.1 ln s + 1)² for a factor s (Peng et al., arXiv 2309.00071, §3.4), without its change of frequencies.
"""

import math

import torch

from harness_ext.models.extensions import attention
from harness_ext.models.extensions.method import Method, Setting, Subject


def install(subject: Subject, setting: Setting) -> None:
    given = setting.options["temperature"]
    t = float(given) if given is not None else (0.1 * math.log(setting.factor) + 1) ** 2
    attention.scaled(subject.model, f"temperature({t:.6g})", lambda positions: torch.full_like(positions, t, dtype=torch.float32))


METHOD = Method(
    name="temperature",
    source="Peng et al., arXiv 2309.00071, §3.4",
    changes="all attention scores are multiplied by a constant",
    why_not=attention.why_not,
    install=install,
    options={"temperature": None},
)
