"""What every task of this package tells lm_eval: its lengths for the model it is for, and what became of each.

A class and not a plain YAML task, since only a class is told about `--limit`, the chat template and the process's rank
before prompts are built, and all three change what a prompt of exactly L tokens is.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task as HostTask
from lm_eval.config.task import TaskConfig

from harness_ext.cells import Length, Unmeasured
from harness_ext.errors import LengthError, ModelError
from harness_ext.model_view import ModelView
from harness_ext.sweep.haystack import Haystack
from harness_ext.sweep.lengths import plan_lengths
from harness_ext.sweep.spec import LossSpec, TaskSpec

log = logging.getLogger(__name__)

Doc = dict[str, Any]
"""A request's record in the sample log. It holds what regenerates the request, not the text, which is in `arguments`."""


def read_metadata(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The task's file, for messages, and what `--metadata` and `--model_args` say."""
    metadata = {key: value for key, value in (config.get("metadata") or {}).items() if key != "version"}
    return str(metadata.get("config_source", "task")), metadata


class SweepTask(HostTask):
    """A task over lengths."""

    spec: TaskSpec | LossSpec
    """Its YAML file, read."""
    higher_wins = True
    """Whether a higher value of its metrics is better."""
    own_text = "this task's own text"
    """What a length has to have room for, in words."""

    def __init__(
        self,
        config: Mapping[str, Any],
        spec: TaskSpec | LossSpec,
        haystack: Haystack,
        *,
        output_type: str = "loglikelihood",
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        # Not HostTask's own, which would look for a dataset.
        file, metadata = read_metadata(config)
        self.VERSION = (config.get("metadata") or {}).get("version", 0)
        self.OUTPUT_TYPE = output_type
        self.spec, self.haystack = spec, haystack
        self._asked_for_lengths = bool({"multiples", "lengths"} & {*config, *metadata})
        self._config = TaskConfig(
            task=spec.task,
            task_alias=config.get("task_alias"),
            output_type=output_type,
            num_fewshot=0,
            generation_kwargs=generation and dict(generation),
            metadata={**metadata, "version": self.VERSION, "config_source": Path(file).name},
        )
        self._instances: list[Instance] = []
        self.bind(None)

    def bind(self, lm: Any) -> None:
        """Tells the task which model its prompts are for; called before anything is planned or built.

        `lm` is lm_eval's model object, or None: then the model is known by the names in `--model_args` and `--metadata`.
        """
        if getattr(lm, "chat", False) is True and self.OUTPUT_TYPE == "loglikelihood":
            instead = f"use {self.spec.task}_generate" if isinstance(self.spec, TaskSpec) else "ask the server's completions"
            raise ModelError(f"{self.spec.task} is scored, and chat completions give no log-likelihoods of a prompt; {instead}")
        self._view = ModelView(lm, self.config.metadata or {})
        self._lengths: list[Length] = []
        self._docs: list[Doc] = []
        self._own = 0
        self._around: dict[str, Any] = {}
        """What stands around every prompt, where something can: whether the chat template does, and the system message."""
        self._unmeasured: dict[int, Unmeasured] = {}

    @property
    def lengths(self) -> list[Length]:
        """The sweep for the bound model, shortest first. Raises LengthError where no length of it can be run."""
        if not self._lengths:
            self._lengths = self._say_what_is_left_out(plan_lengths(self.spec, self._view.trained_length, self._view.limits))
        return self._lengths

    @property
    def measured(self) -> list[Length]:
        """The lengths that are run."""
        return [length for length in self.lengths if length.outcome == "measured"]

    @property
    def eval_docs(self) -> list[Doc]:
        """One record for each request, in the order in which `--limit` takes them."""
        if not self._docs:
            self._docs = self.plan_docs()
        return self._docs

    @abc.abstractmethod
    def plan_docs(self) -> list[Doc]:
        """The records, without what only building them tells."""

    @property
    @abc.abstractmethod
    def round(self) -> int:
        """Records, from the first on, that go to one process together: in them is one of every metric."""

    def doc_iterator(
        self, *, rank: int = 0, limit: int | None = None, world_size: int = 1, samples: list[int] | None = None
    ) -> Iterator[tuple[int, Doc]]:
        """This process's share: whole rounds in a row, so that every process has about as much to do, the same metrics, and samples whole.

        The prompts of a sample are those that share; dealt out round by round, each process would read every sample's haystack.
        """
        if samples:
            chosen: Iterator[tuple[int, Doc]] = super().doc_iterator(rank=rank, world_size=world_size, samples=samples)
            return chosen
        total = min(limit or len(self.eval_docs), len(self.eval_docs))
        if world_size > 1 and total < self.round * world_size:
            raise LengthError(
                f"{self.spec.task}: {total} prompts, {self.round} a round, leave some of {world_size} processes without one; "
                f"ask for at least {self.round * world_size} (--limit, samples), or for fewer processes"
            )
        rounds = -(-total // self.round)
        first, last = (rounds * share // world_size * self.round for share in (rank, rank + 1))
        return itertools.islice(enumerate(self.eval_docs), first, min(last, total))

    def check(self, metadata: Mapping[str, Any]) -> None:
        """Raises, from the names in `--model_args` and `--metadata` alone, what would else be raised after the weights have loaded.

        That is ModelError for a model or tokenizer that cannot be read, and LengthError for a length that is too short.
        """
        view = ModelView(None, metadata)
        view.check_files()
        self._find_too_short(plan_lengths(self.spec, view.trained_length, []), self.count_own_text(view))

    @abc.abstractmethod
    def count_own_text(self, view: ModelView) -> int:
        """Tokens of the shortest length that can be asked for, without chat template."""

    def lift(self, tokens: int) -> None:
        """Tells a model that goes past its `max_length` how far this task goes."""
        getattr(self._view.lm, "lift", lambda _: None)(tokens)

    def construct_requests(self, doc: Doc, ctx: tuple[str, Any], **options: Any) -> Instance:
        """One request: `ctx` holds its arguments, (context, continuation) or (context, generation arguments)."""
        return Instance(request_type=self.OUTPUT_TYPE, doc=doc, arguments=ctx, idx=0, metadata=options["metadata"])

    def construct_placed(self, doc: Doc, ctx: tuple[str, Any], *, metadata: Any) -> Instance:
        """A request whose tokens stand where the document's `positions` say: only a model that has `find_placing` knows it."""
        context, answer = ctx
        placed = {"positions": doc["positions"]}
        return Instance(request_type="loglikelihood_at", doc=doc, arguments=(context, answer, placed), idx=0, metadata=metadata)

    @abc.abstractmethod
    def list_metrics(self) -> list[str]:
        """The names of all metrics."""

    def aggregation(self) -> dict[str, Any]:
        """The mean of each metric: lm_eval knows its standard error."""
        return dict.fromkeys(self.list_metrics(), mean)

    def higher_is_better(self) -> dict[str, bool]:
        """The same for all."""
        return dict.fromkeys(self.list_metrics(), self.higher_wins)

    def name_place(self, tokens: int) -> str:
        """`@    512 (2x)`: of one width, since lm_eval sorts metrics by name."""
        trained = self._view.trained_length
        number, _, multiple = Length(tokens=tokens, multiple=tokens / trained.tokens if trained else None).label.partition(" ")
        return f"@{number:>8}" + (f" {multiple}" if multiple else "")

    def dump_config(self) -> dict[str, Any]:
        """The task as it ran, for lm_eval's results file: what was asked, what was planned, what was left out and why.

        With the model's tokenizer it repeats the prompts: a task of these fields, with `haystack_source` for its `haystack`, and of
        the `lengths` that were planned to run, has prompts of the same fingerprints.
        """
        trained = self._view.trained_length
        return {
            **super().dump_config(),
            **dataclasses.asdict(self.spec),
            "haystack": self.haystack.name,
            "haystack_source": self.spec.haystack,
            "haystack_sha256": self.haystack.source and hashlib.sha256(self.haystack.source.encode()).hexdigest(),
            **self._around,
            "trained_length": trained and {"tokens": trained.tokens, "source": trained.source},
            "lengths": [
                {"length": length.tokens, "multiple": length.multiple, "outcome": length.outcome, "reason": length.reason}
                for length in map(self._as_it_went, self.lengths)
            ],
        }

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def leave_out_too_short(self, own: int) -> None:
        """Plans anew without the lengths under `own` tokens. Raises LengthError where they were asked for."""
        kept = self._find_too_short(self.lengths, own)
        if kept != self._lengths:
            self._lengths = self._say_what_is_left_out(kept)
        self._own, self._docs = own, []

    def _find_too_short(self, lengths: list[Length], own: int) -> list[Length]:
        """`lengths`, those shorter than `own` tokens marked so. Raises LengthError where they were asked for."""
        reason = f"{self.own_text} takes {own} tokens"
        short = [length for length in lengths if length.tokens < own]
        if short and (self._asked_for_lengths or len(short) == len(lengths)):
            raise LengthError(
                f"{self.spec.task}: a prompt of {short[0].tokens} tokens was asked for, but {reason}; ask for {own} or more"
            )
        return [
            dataclasses.replace(length, outcome="too_short", reason=reason) if length in short else length for length in lengths
        ]

    def _say_what_is_left_out(self, lengths: list[Length]) -> list[Length]:
        for length in lengths:
            if length.outcome != "measured":
                log.warning("%s: left out %s tokens, %s: %s", self.spec.task, length.label, length.outcome, length.reason)
        if all(length.outcome != "measured" for length in lengths):
            raise LengthError(f"{self.spec.task}: no length can be run: {lengths[-1].reason}")
        return lengths

    def _as_it_went(self, length: Length) -> Length:
        """A planned length, with the outcome that a prompt of it had in the run."""
        found = self._unmeasured.get(length.tokens)
        return dataclasses.replace(length, outcome=found.outcome, reason=found.reason) if found else length
