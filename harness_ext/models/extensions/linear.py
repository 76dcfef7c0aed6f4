"""Position interpolation (Chen et al., arXiv 2306.15595): positions divided by the factor, so that all lie in the trained range."""

from typing import Any

from harness_ext.models.extensions import rotary
from harness_ext.models.extensions.method import Method, Setting, Subject


def scale(own: dict[str, Any], subject: Subject, setting: Setting) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": setting.factor}


METHOD = Method(
    name="linear",
    source="Chen et al., arXiv 2306.15595",
    changes="every frequency is divided by the factor",
    why_not=rotary.why_not,
    install=rotary.install(scale),
    parameters=scale,
)
