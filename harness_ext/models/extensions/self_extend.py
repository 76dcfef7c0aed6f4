"""Self-Extend (Jin et al., arXiv 2401.01325): near keys at their own positions, far ones at positions divided by a group size, so that no
distance exceeds the trained length.

With a group size G and a neighbour window w: a key at distance d < w is seen at d, a farther one at i // G + w − w // G − j // G.
G by default is the smallest that fits the longest length, with w half of the trained length.
"""

import math

import torch

from harness_ext.errors import ModelError
from harness_ext.models.extensions import attention
from harness_ext.models.extensions.method import Method, Setting, Subject


def install(subject: Subject, setting: Setting) -> None:
    """Puts far keys at positions in groups. Raises ModelError for a window or a group that cannot be."""
    window = int(setting.options["window"] or subject.trained // 2)
    longest = math.ceil(setting.factor * subject.trained)
    group = int(setting.options["group"] or max(1, math.ceil((longest - window) / max(1, subject.trained - window))))
    if not 0 < window <= subject.trained or group < 1:
        raise ModelError(
            f"self-extend: found window={window}, group={group}; expected a window of 1 to {subject.trained} tokens (the trained "
            "length) and a group of at least 1"
        )
    shift = window - window // group

    def turn(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return queries // group + shift, keys // group

    attention.split(subject.model, f"self_extend(group={group},window={window})", window, None, turn)


METHOD = Method(
    name="self-extend",
    source="Jin et al., arXiv 2401.01325",
    changes="positions of far keys are divided by a group size; near ones are left alone",
    why_not=attention.why_not_turned,
    install=install,
    options={"group": None, "window": None},
)
