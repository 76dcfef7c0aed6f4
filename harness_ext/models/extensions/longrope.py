"""LongRoPE (Ding et al., arXiv 2402.13753): each frequency divided by a factor of its own, one set up to the trained length and one
past it. The factors are searched for each model, so they have to be given; none can be derived.
"""

from typing import Any

from harness_ext.errors import ModelError
from harness_ext.models.extensions import rotary
from harness_ext.models.extensions.method import Method, Setting, Subject


def take_factors(own: dict[str, Any], subject: Subject, setting: Setting) -> dict[str, Any]:
    """The given factors, the checkpoint's where one of the sets is left out. Raises ModelError where there are none."""
    pairs = len(rotary.extended(subject.model)[0].frequencies)
    found = {name: setting.options[name] or own.get(name) for name in ("short_factor", "long_factor")}
    for name, factors in found.items():
        if not isinstance(factors, (list, tuple)) or len(factors) != pairs:
            raise ModelError(
                f"longrope needs {name}, a list of {pairs} numbers found for this model; found {factors!r}. "
                "They are searched for each model: take them from its long version's config"
            )
    return {
        "rope_type": "longrope",
        "factor": setting.factor,
        "original_max_position_embeddings": subject.trained,
        "attention_factor": setting.options["attention_factor"],
        **found,
    }


METHOD = Method(
    name="longrope",
    source="Ding et al., arXiv 2402.13753",
    changes="each frequency is divided by its own given factor; attention is sharpened",
    why_not=rotary.why_not,
    install=rotary.install(take_factors),
    options={"short_factor": None, "long_factor": None, "attention_factor": None},
    per_length=True,
)
