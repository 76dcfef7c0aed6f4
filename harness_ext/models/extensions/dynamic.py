"""Dynamic NTK scaling (emozilla 2023; Peng et al., arXiv 2309.00071, §3.3): `ntk`, with the factor of each length under test.

Below the trained length nothing changes. Pinned to the prompt's length, answer included: transformers takes the longest of the batch,
and keeps it for what comes after.
"""

from harness_ext.models.extensions import rotary
from harness_ext.models.extensions.method import Method

METHOD = Method(
    name="dynamic",
    source="emozilla 2023, in Peng et al., arXiv 2309.00071, §3.3",
    changes="the base of the frequencies grows with each prompt's length over the trained one",
    why_not=rotary.why_not,
    install=rotary.install(
        lambda own, subject, setting: {
            "rope_type": "dynamic",
            "factor": setting.options["alpha"],
            "original_max_position_embeddings": subject.trained,
        }
    ),
    options={"alpha": 1.0},
    per_length=True,
)
