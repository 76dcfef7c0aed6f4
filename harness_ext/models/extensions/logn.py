"""Log-n scaling (Su 2021; Chiang and Cholak, arXiv 2202.12172): scores multiplied by max(1, ln n / ln T) for the n tokens that a query
sees and the trained length T, so that the entropy of attention stays what it was.
"""

import math

import torch

from harness_ext.models.extensions import attention
from harness_ext.models.extensions.method import Method, Setting, Subject


def install(subject: Subject, setting: Setting) -> None:
    trained = subject.trained

    def scale(positions: torch.Tensor) -> torch.Tensor:
        return ((positions.float() + 1).clamp(min=1).log() / math.log(trained)).clamp(min=1)

    attention.scaled(subject.model, f"logn({trained})", scale)


METHOD = Method(
    name="logn",
    source="Chiang and Cholak, arXiv 2202.12172",
    changes="attention scores past the trained length grow with the logarithm of the position",
    why_not=attention.why_not,
    install=install,
)
