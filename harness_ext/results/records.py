"""What is published of a run: one record a run and one a cell, JSON Lines in one file a run. The schema is made from these classes.

Names are those of every_eval_ever 0.3.0 (evaleval) where it has them: `schema_version`, `evaluation_id`, `evaluation_timestamp`,
`source_metadata`, `eval_library`, `model_info`, `evaluation_name`, `score_details`, `uncertainty`, `confidence_interval`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from harness_ext.cells import Outcome

SCHEMA_VERSION = "1.1.0"
"""Of these records. A reader takes the same major version; an older one is converted or refused by name."""

LARGEST = 2**53 - 1
"""The largest whole number that every reader of JSON holds exactly."""
PLAIN = r"^(?![\s\S]*[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff])"
"""Text without control characters, and without those that hide or reorder what stands beside them."""

Count = Annotated[int, Meta(ge=0, le=LARGEST)]
Tokens = Annotated[int, Meta(ge=1, le=LARGEST)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0)]
Name = Annotated[str, Meta(min_length=1, max_length=200, pattern=PLAIN)]
Label = Annotated[str, Meta(max_length=200, pattern=PLAIN)]
Text = Annotated[str, Meta(max_length=4000, pattern=PLAIN)]
ModelId = Annotated[str, Meta(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?(?!\n)$")]
Moment = Annotated[str, Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z(?!\n)$")]
Fingerprint = Annotated[str, Meta(pattern=r"^[0-9a-f]{16,64}(?!\n)$")]
ArmName = Literal["stretched", "packed", "shifted", "emptied", "packed_emptied", "other_text", "distractors"]
"""An arm of the experiment that asks why a model degrades, beside the sweep itself (docs/method.md)."""
PlainControlName = Literal["no_haystack", "needle_absent", "cropped", "short"]
ControlName = Literal[PlainControlName, ArmName]
CellOutcome = Literal[Outcome, "not_admitted", "no_positions"]
"""Of an arm's cell also `not_admitted`, where tokens cannot be put at chosen positions, and `no_positions`, where there are none to put
them at, or none that ever leave what the model saw: then the arm would be the plain prompt."""
CauseName = Literal["positions", "number", "content", "number_and_content", "positions_and_number"]
RuleName = Literal["ruler_llama2_chat", "ruler_llama2_base", "nolima", "k_max", "yarn"]


def to_plain(text: str, limit: int = 4000) -> str:
    """`text` on one line as `PLAIN` asks, at most `limit` characters.

    >>> to_plain("out of\\n memory\\x1b[0m")
    'out of memory[0m'
    """
    kept = "".join(c for c in " ".join(text.split()) if re.match(PLAIN, c))
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


def says(description: str) -> Meta:
    """What a field holds, for the schema."""
    return Meta(description=description)


class Record(Struct, frozen=True, forbid_unknown_fields=True):
    """Any part of a record: nothing in it that the schema does not name."""


# ---------------------------------------------------------------------- a cell


class ConfidenceInterval(Record, frozen=True, kw_only=True, gc=False):
    """An interval of a score."""

    lower: Annotated[float, says("Lower end, in the score's unit.")]
    upper: Annotated[float, says("Upper end, in the score's unit.")]
    confidence_level: Annotated[Share, says("Share of such intervals that hold the true value.")] = 0.95
    method: Annotated[Literal["wilson", "clustered_wilson", "t"], says("How it was computed (docs/statistics.md).")]


class Uncertainty(Record, frozen=True, kw_only=True):
    """How far a score can be trusted."""

    confidence_interval: Annotated[ConfidenceInterval | None, says("None where there are too few prompts for one.")]
    num_samples: Annotated[Count, says("Prompts that were scored.")]


class ScoreDetails(Record, frozen=True, kw_only=True):
    """A score, with its uncertainty."""

    score: Annotated[float, says("Mean over prompts: the share of exact answers (0 to 1), or nats per token for a loss.")]
    uncertainty: Annotated[Uncertainty, says("Of the score.")]


class Prompt(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One prompt of a cell, written as an array to keep files small."""

    sample: Annotated[
        Count, says("Number of the haystack: prompts of one sample share haystack, keys and values, over lengths and depths.")
    ]
    verdict: Annotated[
        Literal["exact", "lenient", "wrong_value", "no_value", "cut_off", "missed", "loss"],
        says("`exact`, or the kind of miss; `missed` where the answer was scored and not generated; `loss` for running text."),
    ]
    log_likelihood: Annotated[
        float | None,
        says("Of the answer, or of the bucket's tokens: natural logarithm. None where it was generated or no finite number."),
    ]
    tokens: Annotated[Count, says("That were scored or, where the answer was generated, 0.")]
    prompt_tokens: Annotated[Tokens, says("Every token that the model was given, answer included: at most the cell's length.")]
    fingerprint: Annotated[Fingerprint, says("SHA-256 of the prompt's token ids, first 16 hex digits.")]


class Cell(Record, frozen=True, kw_only=True, tag_field="kind", tag="cell"):
    """One task, length and depth of a run (or one control of it)."""

    evaluation_result_id: Annotated[
        Fingerprint, says("SHA-256 of what identifies the cell: the run's `evaluation_id`, task, control, length and depth.")
    ]
    evaluation_id: Annotated[Fingerprint, says("The run's.")]
    evaluation_name: Annotated[Name, says("lm_eval's name of the task.")]
    control: Annotated[ControlName | None, says("None for the sweep itself; otherwise which control.")] = None
    length: Annotated[Tokens, says("Tokens of each prompt, answer included; for a loss, the position at which the bucket ends.")]
    multiple: Annotated[float | None, says("Length over trained length; None where that is unknown.")]
    depth: Annotated[
        Share | None, says("Where the needle stands, as planned: 0 before all filler, 1 after it. None where there is none.")
    ]
    outcome: Annotated[CellOutcome, says("`measured`, or why not; then there is no score.")]
    reason: Annotated[Text, says("In words, where it was not measured.")] = ""
    n: Annotated[Count, says("Prompts scored.")]
    successes: Annotated[Count | None, says("Of them, those answered exactly. None for a loss, and where nothing was measured.")]
    misses: Annotated[dict[str, Count], says("Verdict → prompts, without `exact`.")] = field(default_factory=dict)
    mean_log_likelihood: Annotated[float | None, says("Over prompts that have a finite one.")]
    score_details: Annotated[ScoreDetails | None, says("None where nothing was measured: never 0.")]
    prompts: Annotated[list[Prompt], says("One each, by sample.")]


# ---------------------------------------------------------------------- a run


class Point(Record, frozen=True, kw_only=True):
    """A task's score at one length, all depths together."""

    length: Annotated[Tokens, says("Tokens of each prompt.")]
    multiple: Annotated[float | None, says("Length over trained length.")]
    outcome: Annotated[CellOutcome, says("`measured`, or why not.")]
    reason: Annotated[Text, says("In words, where it was not measured.")] = ""
    score_details: Annotated[ScoreDetails | None, says("Its interval is clustered by haystack. None where nothing was measured.")]


class ControlPoint(Record, frozen=True, kw_only=True):
    """A control's score, beside the curve's at the same length."""

    control: Annotated[PlainControlName, says("Which.")]
    length: Annotated[Tokens | None, says("The sweep's length that it stands beside; None where it has none (`no_haystack`).")]
    score_details: Annotated[ScoreDetails, says("As a point's.")]


class ArmPoint(Record, frozen=True, kw_only=True):
    """An arm's score, on the same axis as the curve's."""

    arm: Annotated[ArmName, says("Which.")]
    length: Annotated[Tokens, says("The sweep's length that it stands for; a stretched or shifted prompt reads fewer tokens.")]
    multiple: Annotated[float | None, says("Length over trained length.")]
    outcome: Annotated[CellOutcome, says("`measured`, or why not.")]
    reason: Annotated[Text, says("In words, where it was not measured.")] = ""
    score_details: Annotated[ScoreDetails | None, says("As a point's. None where nothing was measured.")]


class Difference(Record, frozen=True, kw_only=True):
    """A difference of two scores, with its 95 % interval."""

    arm: Annotated[Literal["long", ArmName], says("Which arm; `long` is the sweep itself.")]
    value: Annotated[float, says("As a share: 0.1 is ten points.")]
    lower: Annotated[float | None, says("95 %, paired and clustered by haystack; None with one haystack.")]
    upper: Annotated[float | None, says("95 %; None with one haystack.")]


class Effect(Record, frozen=True, kw_only=True):
    """What one cause takes, of what is lost."""

    cause: Annotated[
        CauseName, says("Unseen positions, the number of tokens, what the filler says; or two of them that cannot be told apart.")
    ]
    value: Annotated[float, says("As a share of all prompts; the effects of a length sum to what is lost there. May be negative.")]
    lower: Annotated[float | None, says("95 %, paired and clustered by haystack; None with one haystack.")]
    upper: Annotated[float | None, says("95 %; None with one haystack.")]
    least: Annotated[float, says("The smallest that it is in any of the orders that `value` is the mean of.")]
    most: Annotated[float, says("The largest; far from `least` where causes work through each other.")]


class Cause(Record, frozen=True, kw_only=True):
    """Why the score at one length is not that at the trained length."""

    length: Annotated[Tokens, says("Of the plain prompt.")]
    multiple: Annotated[float, says("Length over trained length; above 1.")]
    losses: Annotated[
        list[Difference],
        says("What each arm loses against the trained length: the arm's own score there, or that of what it packs."),
    ]
    effects: Annotated[list[Effect], says("Empty where not measurable.")]
    reason: Annotated[Text, says("In words, where there is no effect, or where two are one.")] = ""


class Prediction(Record, frozen=True, kw_only=True):
    """What the plain prompt would score at a length at which it was not measured: never a point of the curve."""

    length: Annotated[Tokens, says("Of the plain prompt.")]
    multiple: Annotated[float, says("Length over trained length.")]
    value: Annotated[Share, says("The predicted score.")]
    lower: Annotated[
        Share | None,
        says("95 % of what chance does to the arms' scores; what the formula misses is not in it. None with one haystack."),
    ]
    upper: Annotated[Share | None, says("Likewise.")]
    plain_from: Annotated[
        Tokens, says("The longest plain prompt before it that was measured: from its score the prediction goes on.")
    ]
    packed_from: Annotated[
        Tokens, says("The longest packed prompt up to it that was measured; past it, packed scores are drawn on.")
    ]


class EffectiveLength(Record, frozen=True, kw_only=True):
    """The longest length at which a model still does what a rule asks, with an interval."""

    rule: Annotated[RuleName, says("By which rule.")]
    threshold: Annotated[float, says("Score that a length has to reach (for a relative rule, the share of the in-window score).")]
    outcome: Annotated[
        Literal["measured", "at_least", "not_measurable"],
        says("`at_least`: the longest measured length still passes. `not_measurable`: the model fails inside its own window."),
    ]
    reason: Annotated[Text, says("In words, where it is not measurable; with `at_least`, why no longer length was measured.")] = ""
    tokens: Annotated[Tokens | None, says("The length. None where not measurable.")]
    lower: Annotated[
        Count | None, says("95 %; 0 where it may be that no length passes. None where not measurable, and with one haystack.")
    ]
    upper: Annotated[Tokens | None, says("95 %; the longest measured length is an end that says `or more`. None likewise.")]


class Derived(Record, frozen=True, kw_only=True):
    """A number derived from a whole curve, with its 95 % interval."""

    value: Annotated[float | None, says("None where it is not measurable, and for a half-length that was not reached.")]
    lower: Annotated[float | None, says("95 %; stands also for a half-length that was not reached. None with one haystack.")]
    upper: Annotated[float | None, says("95 %; None for a half-length that may not be reached, and with one haystack.")]
    reason: Annotated[Text, says("In words, where there is no value.")] = ""


class Curve(Record, frozen=True, kw_only=True):
    """A task over its lengths."""

    points: Annotated[list[Point], says("Shortest first.")]
    controls: Annotated[list[ControlPoint], says("Empty where they were not run.")] = field(default_factory=list)
    effective_lengths: Annotated[list[EffectiveLength], says("One for each rule; empty for a loss.")]
    half_length: Annotated[
        Derived, says("Multiple of the trained length at which half of the in-window score is left, log-interpolated.")
    ]
    area_past: Annotated[Derived, says("Mean score over log2 of the multiple, from 1 to the longest measured length.")]
    arms: Annotated[list[ArmPoint], says("By arm and length; empty where none was asked for.")] = field(default_factory=list)
    baselines: Annotated[
        list[Difference],
        says("Each arm's score at the trained length less the plain prompt's there: far from 0, it is another task."),
    ] = field(default_factory=list)
    causes: Annotated[list[Cause], says("One a length past the trained length; empty without arms.")] = field(default_factory=list)
    predictions: Annotated[
        list[Prediction], says("Of lengths at which stretched prompts were measured and plain ones were not.")
    ] = field(default_factory=list)


class Task(Record, frozen=True, kw_only=True):
    """A task of a run: what was asked, and its curve."""

    evaluation_name: Annotated[Name, says("lm_eval's name of it.")]
    version: Annotated[Label, says("The task's; prompts of different versions are not compared.")]
    metric: Annotated[
        Literal["exact", "loss"], says("What the score is: a share, higher is better; or nats per token, lower is better.")
    ]
    output_type: Annotated[Literal["loglikelihood", "generate_until"], says("Whether the answer was scored or generated.")]
    seed: Annotated[Count, says("From which every draw is derived.")]
    samples: Annotated[Count, says("Haystacks asked for, at each length and depth.")]
    prompts_fingerprint: Annotated[
        Fingerprint, says("SHA-256 over the fingerprints of all prompts, in order of length, depth, sample and control.")
    ]
    settings: Annotated[
        dict[str, Any], says("The task file as it was read, apart from what stands elsewhere: what repeats its prompts.")
    ]
    curve: Annotated[Curve, says("Derived from the cells.")]


class TrainedLengthRecord(Record, frozen=True, kw_only=True):
    """The longest sequence that the model saw in training."""

    tokens: Annotated[Tokens, says("The length.")]
    source: Annotated[Name, says("A field of the config, or `user`.")]
    config_tokens: Annotated[Tokens | None, says("What the config says, where it says something.")] = None
    evidence: Annotated[Text, says("Paper or page, where a user says other than the config.")] = ""


class Override(Record, frozen=True, kw_only=True):
    """What was changed in the model to go past its trained length, as read from the loaded model."""

    method: Annotated[Name, says("`none`, the extension's name, or `unknown` where the backend does not say.")]
    factor: Annotated[float | None, says("Longest length over trained length, where the method has one.")] = None
    options: Annotated[dict[str, Any], says("The method's own.")] = field(default_factory=dict)
    before: Annotated[dict[str, Any], says("Fingerprint of what was in effect without it.")] = field(default_factory=dict)
    after: Annotated[dict[str, Any], says("Length → fingerprint of what was in effect with it; empty for `none`.")] = field(
        default_factory=dict
    )
    fingerprint: Annotated[Fingerprint, says("SHA-256 of the canonical JSON of the other fields.")]


class ModelInfo(Record, frozen=True, kw_only=True):
    """Which model, and how it was loaded."""

    id: Annotated[ModelId, says("`developer/name`, as on the hub; a folder's name alone, where nobody says which model it holds.")]
    name: Annotated[Name, says("As it was named to lm_eval; of a path, the last part.")]
    developer: Annotated[Label, says("Organisation, where the id has one.")]
    revision: Annotated[Label, says("Commit on the hub; empty for a folder, and where it is not known.")]
    weights_fingerprint: Annotated[
        Label,
        says("SHA-256 over every parameter's name, shape and a sample of its values; empty where the backend shows no weights."),
    ]
    dtype: Annotated[Label, says("Of the weights as loaded; empty where unknown.")]
    num_parameters: Annotated[Count | None, says("None where it is not known.")]
    model_type: Annotated[Label, says("transformers' name of the family; empty where unknown.")]
    position_scheme: Annotated[
        Name, says("How it takes positions, from its config and modules; `unknown` where the backend shows neither.")
    ]
    hard_limit: Annotated[Tokens | None, says("Where its positions end; None where they do not, or where that is unknown.")]
    inference_platform: Annotated[Name, says("lm_eval's name of the model class.")]
    model_args: Annotated[dict[str, Any], says("As given to lm_eval, without keys, tokens, addresses and folders.")]


class EvalLibrary(Record, frozen=True, kw_only=True):
    """What ran the evaluation."""

    name: Annotated[Name, says("lm_eval.")]
    version: Annotated[Label, says("Its version.")]


class SourceMetadata(Record, frozen=True, kw_only=True):
    """Who made the run."""

    source_organization_name: Annotated[Label, says("Of the submitter; empty where not said.")]
    evaluator_relationship: Annotated[
        Literal["first_party", "third_party", "collaborative", "other"], says("To the model's developer.")
    ]


class Hardware(Record, frozen=True, kw_only=True):
    """What it ran on."""

    device: Annotated[Label, says("cpu, cuda, mps, …; empty where unknown.")]
    name: Annotated[Label, says("Of the processor or card.")]
    count: Annotated[Count, says("Devices.")]
    memory_bytes: Annotated[Count | None, says("Of one.")]
    platform: Annotated[Label, says("Operating system and machine type.")]


class Run(Record, frozen=True, kw_only=True, tag_field="kind", tag="run"):
    """One run of a model under one override: the first line of its file."""

    schema_version: Annotated[Label, says("Of this record.")]
    evaluation_id: Annotated[
        Fingerprint,
        says(
            "SHA-256 of what identifies the run: weights (or where those are not seen, the model's id, revision and arguments), dtype, "
            "backend, override, trained length, and each task's version and prompts."
        ),
    ]
    evaluation_timestamp: Annotated[Moment, says("When it was made, UTC, ISO 8601.")]
    source_metadata: Annotated[SourceMetadata, says("Who made it.")]
    eval_library: Annotated[EvalLibrary, says("What ran it.")]
    packages: Annotated[dict[str, Label], says("harness_ext, transformers, torch → version.")]
    model_info: Annotated[ModelInfo, says("Which model.")]
    trained_length: Annotated[TrainedLengthRecord | None, says("None where it is unknown; then there are no multiples.")]
    override: Annotated[Override, says("In effect.")]
    hardware: Annotated[Hardware | None, says("What it ran on; None where the backend does not say.")]
    wall_seconds: Annotated[Seconds | None, says("From start to end, loading included.")]
    compute_seconds: Annotated[Seconds | None, says("In the model.")]
    tokens_asked: Annotated[Count | None, says("Of all prompts.")]
    tokens_computed: Annotated[Count | None, says("After sharing what prompts have in common.")]
    command: Annotated[Text, says("That repeats the run.")]
    tasks: Annotated[list[Task], says("By name.")]


class PublishedRun(Struct, frozen=True, kw_only=True):
    """A file of results."""

    run: Run
    cells: tuple[Cell, ...]
