"""How language models degrade past the length they were trained on: a plugin for lm-evaluation-harness.

This module imports nothing, since Python's start-up reaches through it (`_startup`); what it offers is looked up when used.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from harness_ext._startup import install
    from harness_ext.sweep.loss import LossTask
    from harness_ext.sweep.tasks import ExtrapolateTask as Task

__all__ = ["LossTask", "Task", "install"]


def __getattr__(name: str) -> object:
    if name == "Task":
        from harness_ext.sweep.tasks import ExtrapolateTask

        return ExtrapolateTask
    if name == "LossTask":
        from harness_ext.sweep.loss import LossTask

        return LossTask
    if name == "install":
        from harness_ext._startup import install

        return install
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
