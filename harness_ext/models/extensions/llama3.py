"""Llama-3 scaling (Dubey et al., arXiv 2407.21783; transformers' `llama3`): frequencies whose wavelength exceeds the trained length
over `low_freq_factor` are divided by the factor, those under it over `high_freq_factor` are kept, a ramp between.
"""

from typing import Any

from harness_ext.models.extensions import rotary
from harness_ext.models.extensions.method import Method, Setting, Subject


def scale(own: dict[str, Any], subject: Subject, setting: Setting) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": setting.factor,
        "original_max_position_embeddings": subject.trained,
        "low_freq_factor": setting.options["low_freq_factor"],
        "high_freq_factor": setting.options["high_freq_factor"],
    }


METHOD = Method(
    name="llama3",
    source="Dubey et al., arXiv 2407.21783",
    changes="frequencies with a wavelength near or past the trained length are divided by the factor",
    why_not=rotary.why_not,
    install=rotary.install(scale),
    parameters=scale,
    options={"low_freq_factor": 1.0, "high_freq_factor": 4.0},
)
