"""NTK-aware scaling (bloc97 2023; Peng et al., arXiv 2309.00071, §3.1): the base grows, so that slow angles are interpolated
and fast ones are left alone: base · s^(d / (d − 2)) for d rotary dimensions.
"""

from typing import Any

from harness_ext.models.extensions import rotary
from harness_ext.models.extensions.method import Method, Setting, Subject


def scale_base(own: dict[str, Any], subject: Subject, setting: Setting) -> dict[str, Any]:
    """The checkpoint's base, scaled; its own rope type, if it has one, is left behind."""
    dims = 2 * len(rotary.extended(subject.model)[0].frequencies)
    return {"rope_type": "default", "rope_theta": own["rope_theta"] * setting.factor ** (dims / (dims - 2))}


METHOD = Method(
    name="ntk",
    source="bloc97 2023, in Peng et al., arXiv 2309.00071, §3.1",
    changes="the base of the frequencies grows with the factor",
    why_not=rotary.why_not,
    install=rotary.install(scale_base),
    parameters=scale_base,
)
