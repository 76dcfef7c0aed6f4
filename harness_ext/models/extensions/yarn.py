"""YaRN (Peng et al., arXiv 2309.00071): slow angles interpolated, fast ones left alone, a ramp between, and attention sharpened
by the factor (0.1 ln s + 1)² on the scores.
"""

from typing import Any

from harness_ext.models.extensions import rotary
from harness_ext.models.extensions.method import Method, Setting, Subject


def scale(own: dict[str, Any], subject: Subject, setting: Setting) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": setting.factor,
        "original_max_position_embeddings": subject.trained,
        "attention_factor": setting.options["attention_factor"],
        "beta_fast": setting.options["beta_fast"],
        "beta_slow": setting.options["beta_slow"],
    }


METHOD = Method(
    name="yarn",
    source="Peng et al., arXiv 2309.00071",
    changes="slow frequencies are divided by the factor, fast ones kept; attention is sharpened",
    why_not=rotary.why_not,
    install=rotary.install(scale),
    parameters=scale,
    options={"attention_factor": None, "beta_fast": 32.0, "beta_slow": 1.0},
)
