"""What can go wrong, as one small tree. Each message says what was asked, what was found and what to do.

`HarnessExtError` is a user's mistake or a limit of the run, never a defect of ours: on the command line it prints
without a traceback (`_bridge.quiet_errors`).
"""


class HarnessExtError(ValueError):
    """The root: catch this to catch whatever this package raises on purpose."""


class TaskFileError(HarnessExtError):
    """A task's YAML file, or what `--metadata` laid over it, is wrong."""


class HaystackError(HarnessExtError):
    """The filler text cannot be read, or does not serve."""


class LengthError(HarnessExtError):
    """No prompt of the asked length can be made, or no length can be run."""


class ModelError(HarnessExtError):
    """The model, its tokenizer or its trained length cannot be found."""


class PromptTooLongError(HarnessExtError):
    """A prompt does not fit the model, and truncating it would falsify the score."""


class ComparisonError(HarnessExtError):
    """Runs cannot be compared, or a comparison was asked for that cannot be made."""


class PairingError(ComparisonError):
    """Runs were given different prompts, so their answers are no pairs."""


class PublishError(HarnessExtError):
    """A run cannot be published as it is, or cannot be written where it should go."""


class RecordError(HarnessExtError):
    """Published records cannot be read, or do not say what their own prompts say."""


class ReportError(HarnessExtError):
    """A page or a figure cannot be made of what was given."""


class ShardError(HarnessExtError):
    """A part of an evaluation cannot be made, or parts cannot be joined."""
