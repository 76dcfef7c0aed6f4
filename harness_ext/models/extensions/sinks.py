"""Attention sinks with a window (StreamingLLM; Xiao et al., arXiv 2309.17453): each token sees the first few tokens and a window before it,
at positions in that cache. What lies between is evicted by design: a negative control, which cannot find a far needle.
"""

import torch

from harness_ext.errors import ModelError
from harness_ext.models.extensions import attention
from harness_ext.models.extensions.method import Method, Setting, Subject


def install(subject: Subject, setting: Setting) -> None:
    sinks = int(setting.options["sinks"])
    window = int(setting.options["window"] or subject.trained - sinks)
    if sinks < 0 or window < 1:
        raise ModelError(
            f"sinks: found sinks={sinks}, window={window}; expected none or more sinks and a window of at least 1 token"
        )

    def turn(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return queries.clamp(max=sinks + window - 1), keys

    attention.split(subject.model, f"sinks(sinks={sinks},window={window})", window, sinks, turn)


METHOD = Method(
    name="sinks",
    source="Xiao et al., arXiv 2309.17453",
    changes="each token sees the first few tokens and a window; everything between is evicted",
    why_not=attention.why_not_turned,
    install=install,
    options={"sinks": 4, "window": None},
)
