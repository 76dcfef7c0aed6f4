"""What lm_eval calls for tasks with a question: a task class that reads top to bottom as a sweep does.

check the YAML → know the model → plan lengths → build prompts → (lm_eval runs them) → score → one metric a length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from harness_ext.cells import Unmeasured
from harness_ext.model_view import ModelView
from harness_ext.sweep.frame import Frame
from harness_ext.sweep.haystack import open_haystack
from harness_ext.sweep.host import Doc, SweepTask, read_metadata
from harness_ext.sweep.lengths import order_cells
from harness_ext.sweep.needle import draw_distractors
from harness_ext.sweep.prompts import Prompts
from harness_ext.sweep.scoring import copy_similarity, score_copy, score_retrieval
from harness_ext.sweep.spec import TaskSpec, parse_spec
from harness_ext.sweep.values import parse_kind

log = logging.getLogger(__name__)


class ExtrapolateTask(SweepTask):
    """A task that hides something and asks for it. In YAML: `class: !function harness_ext.Task`."""

    spec: TaskSpec

    def __init__(self, config: Mapping[str, Any]) -> None:
        file, metadata = read_metadata(config)
        spec = parse_spec(config, file=file, overrides=metadata)
        self._answers: dict[int, Any] = {}
        super().__init__(
            config,
            spec,
            open_haystack(spec.haystack, distractors=lambda rng, taken: draw_distractors(spec, rng, taken=taken)),
            output_type=spec.output_type,
            generation={"until": ["\n\n"], "do_sample": False, "max_gen_toks": spec.max_gen_toks}
            if spec.output_type == "generate_until"
            else None,
        )

    def plan_docs(self) -> list[Doc]:
        """One record for each prompt, in an order of which every beginning is balanced (`--limit`)."""
        lengths, spec = self.measured, self.spec
        return [
            {
                "length": lengths[length].tokens,
                "multiple": lengths[length].multiple,
                "depth": spec.depths[depth],
                "sample": sample,
                "seed": spec.seed,
            }
            for length, depth, sample in order_cells(len(lengths), len(spec.depths), spec.samples)
        ]

    @property
    def round(self) -> int:
        """A prompt of each length."""
        return len(self.measured)

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
        self.leave_out_too_short(prompts.count_bare())
        docs = list(self.doc_iterator(rank=rank, limit=limit, world_size=world_size, samples=samples))
        log.info("%s: building %d prompts on rank %d", self.spec.task, len(docs), rank)
        self.lift(max(doc["length"] for _, doc in docs))
        self._instances = []
        for doc_id, doc in docs:
            document, fitted = prompts.build(doc["sample"], doc["depth"], doc["length"])
            arguments = prompts.frame.arguments(fitted.body, document)
            doc |= {
                "depth_realised": fitted.depths[document.target],
                "prompt_tokens": fitted.prompt_tokens,
                **prompts.frame.identify(arguments),
                "answer": document.answer,
                "values": list(prompts.facts(doc["sample"], doc["depth"]).values),
            }
            self._instances.append(self.construct_requests(doc, arguments, metadata=(self.spec.task, doc_id, 1)))

    def count_own_text(self, view: ModelView) -> int:
        """Tokens of the longest of all samples without filler."""
        return self._prompts(view, None, None).count_bare()

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
        at = self.name_place(doc["length"])
        scores = {f"exact{at}": float(results[0] == "exact")}
        if self.OUTPUT_TYPE == "generate_until":
            scores[f"lenient{at}"] = float(results[0] in ("exact", "lenient"))
        if self.OUTPUT_TYPE == "generate_until" and self.spec.score == "copy":
            scores[f"similarity{at}"] = copy_similarity(self._answers[id(doc)], doc["answer"])
        return scores

    def list_metrics(self) -> list[str]:
        """A metric for each length that is run."""
        kinds = ["exact"] if self.OUTPUT_TYPE == "loglikelihood" else ["exact", "lenient", "similarity"]
        return [f"{kind}{self.name_place(length.tokens)}" for kind in kinds for length in self.measured]

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

    def _score(self, doc: Doc, answer: Any) -> str:
        if isinstance(answer, Unmeasured):
            self._unmeasured[doc["length"]] = answer
            return answer.outcome
        if self.OUTPUT_TYPE == "loglikelihood":
            return "exact" if answer[1] else "missed"
        if self.spec.score == "copy":
            return score_copy(answer, doc["answer"])
        return score_retrieval(answer, doc["values"], parse_kind(self.spec.value)[0])
