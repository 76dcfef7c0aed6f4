"""What lm_eval calls: a task class that reads top to bottom as a sweep does.

check the YAML → know the model → plan lengths → build prompts → (lm_eval runs them) → score → one metric a length.

A class and not a plain YAML task, since only a class is told about `--limit`, the chat template and the process's rank
before prompts are built, and all three change what a prompt of exactly L tokens is.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task as HostTask
from lm_eval.config.task import TaskConfig

from harness_ext.cells import Length, Unmeasured
from harness_ext.errors import LengthError
from harness_ext.model_view import ModelView
from harness_ext.sweep.frame import Frame
from harness_ext.sweep.haystack import open_haystack
from harness_ext.sweep.lengths import order_cells, plan_lengths
from harness_ext.sweep.needle import draw_distractors
from harness_ext.sweep.prompts import Prompts
from harness_ext.sweep.scoring import copy_similarity, score_copy, score_retrieval
from harness_ext.sweep.spec import parse_spec
from harness_ext.sweep.values import parse_kind

log = logging.getLogger(__name__)

Doc = dict[str, Any]
"""A prompt's record in the sample log. It holds what regenerates the prompt, not the prompt, which is in `arguments`."""


class ExtrapolateTask(HostTask):
    """A task of this package, as its YAML file states it. In YAML: `class: !function harness_ext.Task`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        # Not HostTask's own, which would look for a dataset.
        metadata = dict(config.get("metadata") or {})
        self.VERSION = metadata.pop("version", 0)
        self.file = str(metadata.get("config_source", "task"))
        self.spec = spec = parse_spec(config, file=self.file, overrides=metadata)
        self.OUTPUT_TYPE = spec.output_type
        self._asked_for_lengths = bool({"multiples", "lengths"} & {*config, *metadata})
        self._config = TaskConfig(
            task=spec.task,
            task_alias=config.get("task_alias"),
            output_type=spec.output_type,
            num_fewshot=0,
            generation_kwargs={"until": ["\n\n"], "do_sample": False, "max_gen_toks": spec.max_gen_toks}
            if spec.output_type == "generate_until"
            else None,
            metadata={**metadata, "version": self.VERSION, "config_source": Path(self.file).name},
        )
        self.haystack = open_haystack(spec.haystack, distractors=lambda rng, taken: draw_distractors(spec, rng, taken=taken))
        self._instances: list[Instance] = []
        self._answers: dict[int, Any] = {}
        self.bind(None)

    def bind(self, lm: Any) -> None:
        """Tells the task which model its prompts are for; called before anything is planned or built.

        `lm` is lm_eval's model object, or None: then the model is known by the names in `--model_args` and `--metadata`.
        """
        self._view = ModelView(lm, self.config.metadata or {})
        self._lengths: list[Length] = []
        self._docs: list[Doc] = []
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
        """One record for each prompt, in an order of which every beginning is balanced (`--limit`)."""
        if not self._docs:
            lengths, spec = self.measured, self.spec
            self._docs = [
                {
                    "length": lengths[length].tokens,
                    "multiple": lengths[length].multiple,
                    "depth": spec.depths[depth],
                    "sample": sample,
                    "seed": spec.seed,
                }
                for length, depth, sample in order_cells(len(lengths), len(spec.depths), spec.samples)
            ]
        return self._docs

    def doc_iterator(
        self, *, rank: int = 0, limit: int | None = None, world_size: int = 1, samples: list[int] | None = None
    ) -> Iterator[tuple[int, Doc]]:
        """This process's share: whole rounds of all lengths, so that every process has as much to do as any other."""
        if samples:
            chosen: Iterator[tuple[int, Doc]] = super().doc_iterator(rank=rank, world_size=world_size, samples=samples)
            return chosen
        lengths = len(self.measured)
        total = min(limit or len(self.eval_docs), len(self.eval_docs))
        if world_size > 1 and total < lengths * world_size:
            raise LengthError(
                f"{self.spec.task}: {total} prompts of {lengths} lengths leave some of {world_size} processes without one; "
                f"ask for at least {lengths * world_size} (--limit), or for fewer processes"
            )
        docs = enumerate(itertools.islice(self.eval_docs, total))
        return ((doc_id, doc) for doc_id, doc in docs if doc_id // lengths % world_size == rank)

    def build_all_requests(
        self,
        *,
        limit: int | None = None,
        samples: list[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        chat_template: Callable[..., str] | None = None,
        **_: Any,
    ) -> None:
        """Builds this process's prompts. lm_eval's own request cache is left aside: its key knows no lengths."""
        template = chat_template if apply_chat_template else None
        prompts = self._prompts(self._view, template, system_instruction)
        self._leave_out_too_short(prompts)
        docs = list(self.doc_iterator(rank=rank, limit=limit, world_size=world_size, samples=samples))
        log.info("%s: building %d prompts on rank %d", self.spec.task, len(docs), rank)
        getattr(self._view.lm, "lift", lambda tokens: None)(max(doc["length"] for _, doc in docs))
        self._instances = []
        for doc_id, doc in docs:
            document, fitted = prompts.build(doc["sample"], doc["depth"], doc["length"])
            doc |= {
                "depth_realised": fitted.depths[document.target],
                "prompt_tokens": fitted.prompt_tokens,
                "answer": document.answer,
                "values": list(prompts.facts(doc["sample"], doc["depth"]).values),
            }
            arguments = prompts.frame.arguments(fitted.body, document)
            self._instances.append(self.construct_requests(doc, arguments, metadata=(self.spec.task, doc_id, 1)))

    def check(self, metadata: Mapping[str, Any]) -> None:
        """Raises, from the names in `--model_args` and `--metadata` alone, what would else be raised after the weights have loaded.

        That is ModelError for a model or tokenizer that cannot be read, and LengthError for a length that is too short.
        """
        view = ModelView(None, metadata)
        view.check_files()
        self._find_too_short(plan_lengths(self.spec, view.trained_length, []), self._prompts(view, None, None))

    def construct_requests(self, doc: Doc, ctx: tuple[str, Any], **options: Any) -> Instance:
        """One request: `ctx` holds its arguments, (context, continuation) or (context, generation arguments)."""
        return Instance(request_type=self.spec.output_type, doc=doc, arguments=ctx, idx=0, metadata=options["metadata"])

    def apply_filters(self) -> None:
        """Scores each answer: the verdict is what lm_eval's sample log shows as the filtered response."""
        for instance in self._instances:
            answer = instance.resps[0]
            instance.filtered_resps["none"] = self._score(instance.doc, answer)
            self._answers[id(instance.doc)] = answer

    def process_results(self, doc: Doc, results: list[Any]) -> dict[str, float]:
        """One metric for each length, so that lm_eval's table is the curve; none for a prompt that was not measured."""
        if isinstance(self._answers[id(doc)], Unmeasured):
            return {}
        at = self._at(doc["length"])
        scores = {f"exact{at}": float(results[0] == "exact")}
        if self.OUTPUT_TYPE == "generate_until":
            scores[f"lenient{at}"] = float(results[0] in ("exact", "lenient"))
        if self.OUTPUT_TYPE == "generate_until" and self.spec.score == "copy":
            scores[f"similarity{at}"] = copy_similarity(self._answers[id(doc)], doc["answer"])
        return scores

    def aggregation(self) -> dict[str, Any]:
        """The mean of each metric: lm_eval knows its standard error."""
        return dict.fromkeys(self._metric_names(), mean)

    def higher_is_better(self) -> dict[str, bool]:
        """Always."""
        return dict.fromkeys(self._metric_names(), True)

    def dump_config(self) -> dict[str, Any]:
        """The task as it ran, for lm_eval's results file: what was asked, what was planned, what was left out and why."""
        trained = self._view.trained_length
        return {
            **super().dump_config(),
            **dataclasses.asdict(self.spec),
            "haystack": self.haystack.name,
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

    def doc_to_text(self, doc: Doc) -> str:
        """The prompt is in the request's arguments; here, what it asks."""
        return self.spec.question

    def doc_to_target(self, doc: Doc) -> str:
        return str(doc["answer"])

    def _prompts(self, view: ModelView, chat_template: Callable[..., str] | None, system: str | None) -> Prompts:
        generation = self.config.generation_kwargs
        return Prompts(
            self.spec, self.haystack, Frame(view=view, chat_template=chat_template, system=system, generation=generation)
        )

    def _as_it_went(self, length: Length) -> Length:
        """A planned length, with the outcome that a prompt of it had in the run."""
        found = self._unmeasured.get(length.tokens)
        return dataclasses.replace(length, outcome=found.outcome, reason=found.reason) if found else length

    def _say_what_is_left_out(self, lengths: list[Length]) -> list[Length]:
        for length in lengths:
            if length.outcome != "measured":
                log.warning("%s: left out %s tokens, %s: %s", self.spec.task, length.label, length.outcome, length.reason)
        if all(length.outcome != "measured" for length in lengths):
            raise LengthError(f"{self.spec.task}: no length can be run: {lengths[-1].reason}")
        return lengths

    def _leave_out_too_short(self, prompts: Prompts) -> None:
        kept = self._find_too_short(self.lengths, prompts)
        if kept != self._lengths:
            self._lengths, self._docs = self._say_what_is_left_out(kept), []

    def _find_too_short(self, lengths: list[Length], prompts: Prompts) -> list[Length]:
        """`lengths`, those shorter than the task's own text marked so. Raises LengthError where they were asked for."""
        bare = prompts.count_bare()
        reason = f"this task's own text takes {bare} tokens"
        short = [length for length in lengths if length.tokens < bare]
        if short and (self._asked_for_lengths or len(short) == len(lengths)):
            raise LengthError(
                f"{self.spec.task}: a prompt of {short[0].tokens} tokens was asked for, but {reason}; ask for {bare} or more"
            )
        return [
            dataclasses.replace(length, outcome="too_short", reason=reason) if length in short else length for length in lengths
        ]

    def _score(self, doc: Doc, answer: Any) -> str:
        if isinstance(answer, Unmeasured):
            self._unmeasured[doc["length"]] = answer
            return answer.outcome
        if self.OUTPUT_TYPE == "loglikelihood":
            return "exact" if answer[1] else "missed"
        if self.spec.score == "copy":
            return score_copy(answer, doc["answer"])
        return score_retrieval(answer, doc["values"], parse_kind(self.spec.value)[0])

    def _at(self, tokens: int) -> str:
        """`@    512 (2x)`: of one width, since lm_eval sorts metrics by name."""
        label = next(length.label for length in self.lengths if length.tokens == tokens)
        number, _, multiple = label.partition(" ")
        return f"@{number:>8}" + (f" {multiple}" if multiple else "")

    def _metric_names(self) -> list[str]:
        kinds = ["exact"] if self.OUTPUT_TYPE == "loglikelihood" else ["exact", "lenient", "similarity"]
        return [f"{kind}{self._at(length.tokens)}" for kind in kinds for length in self.measured]
