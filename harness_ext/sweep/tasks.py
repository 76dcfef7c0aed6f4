"""What lm_eval calls for tasks with a question: a task class that reads top to bottom as a sweep does.

check the YAML → know the model → plan lengths → build prompts → (lm_eval runs them) → score → one metric a length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from harness_ext.cells import Length, Placing, Unmeasured
from harness_ext.errors import LengthError
from harness_ext.model_view import ModelView
from harness_ext.sweep.arms import PACKED, PLACED, WATCHED, ArmPrompts, Bench, LeftOut, Made, add_arms, find_asked, list_left_out
from harness_ext.sweep.controls import Cell, add_controls, build, describe, find_short
from harness_ext.sweep.fingerprint import fingerprint
from harness_ext.sweep.frame import Frame
from harness_ext.sweep.haystack import open_haystack
from harness_ext.sweep.host import Doc, SweepTask, read_metadata
from harness_ext.sweep.lengths import order_cells
from harness_ext.sweep.needle import draw_distractors
from harness_ext.sweep.prompts import Prompts
from harness_ext.sweep.scoring import copy_similarity, score_copy, score_retrieval
from harness_ext.sweep.spec import ARMS, TaskSpec, parse_spec
from harness_ext.sweep.values import parse_kind

log = logging.getLogger(__name__)

UNTIL = ["\n\n"]
"""Ends a generated answer where nothing else does."""
NO_PLACING = Placing(outcome="not_admitted", reason="this backend takes no positions; use --model hf-extrapolate")


class ExtrapolateTask(SweepTask):
    """A task that hides something and asks for it. In YAML: `class: !function harness_ext.Task`."""

    spec: TaskSpec

    def __init__(self, config: Mapping[str, Any]) -> None:
        file, metadata = read_metadata(config)
        spec = parse_spec(config, file=file, overrides=metadata)
        self._answers: dict[int, Any] = {}
        self._arms_failed: dict[LeftOut, None] = {}
        super().__init__(
            config,
            spec,
            open_haystack(spec.haystack, distractors=lambda rng, taken: draw_distractors(spec, rng, taken=taken)),
            output_type=spec.output_type,
            generation={"until": [*UNTIL], "do_sample": False, "max_gen_toks": spec.max_gen_toks}
            if spec.output_type == "generate_until"
            else None,
        )
        if spec.haystack == "needles" and "{key}" not in spec.needle:
            log.warning(
                "%s: haystack needles: nothing tells the needle that is asked for from the others, since they have no {key}; "
                "its scores are of guessing",
                spec.task,
            )

    def plan_docs(self) -> list[Doc]:
        """One record for each prompt, in an order of which every beginning is balanced (`--limit`), each before its controls.

        Raises LengthError where controls are asked for and no trained length is known.
        """
        lengths, depths = self.lengths if self.spec.arms else self.measured, self.spec.depths
        cells: Iterable[Cell] = (
            Cell(lengths[length], depths[depth], sample)
            for length, depth, sample in order_cells(len(lengths), len(depths), self.spec.samples)
        )
        if self.spec.controls:
            trained = self._find_trained(self._view)
            own = Length(tokens=self._own, multiple=self._own / trained)
            cells = add_controls(cells, trained=trained, own=own, short=find_short(lengths, trained, self._own))
        if self.spec.arms:
            cells = add_arms(cells, self.spec.arms, self._find_trained(self._view), self._bench.refuse)
        return [
            {
                **({"control": cell.control} if cell.control else {}),
                "length": cell.length.tokens,
                "multiple": cell.length.multiple,
                "depth": cell.depth,
                "sample": cell.sample,
                "seed": self.spec.seed,
            }
            for cell in cells
        ]

    @property
    def round(self) -> int:
        """A prompt of each length; with controls or arms, which not every such round has all of, a sample."""
        whole = self.spec.controls or self.spec.arms
        return len(self.eval_docs) // self.spec.samples if whole else len(self.measured)

    def check(self, metadata: Mapping[str, Any]) -> None:
        """As every task's; and LengthError where there can be no controls, or no arms."""
        super().check(metadata)
        if self.spec.controls or self.spec.arms:
            self._find_trained(ModelView(None, metadata))

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
        self._around = {"chat_template": template is not None, "system_instruction": system_instruction}
        prompts = self._prompts(self._view, template, system_instruction)
        self.leave_out_too_short(prompts.count_bare())
        docs = list(self.doc_iterator(rank=rank, limit=limit, world_size=world_size, samples=samples))
        log.info("%s: building %d prompts on rank %d", self.spec.task, len(docs), rank)
        self.lift(max(self._find_span(doc) for _, doc in docs))
        self._instances, trained = [], self._view.trained_length
        arms = ArmPrompts(prompts, trained.tokens if trained else 0, self._own)
        for doc_id, doc in docs:
            cell = _read_cell(doc)
            if self.spec.arms and cell.control in (None, *ARMS):
                made = arms.build(cell)
                said = describe(prompts.facts(cell.sample, cell.depth or 0.0), made.fitted.depths[made.document.target])
            else:
                document, fitted, said = build(prompts, cell, trained.tokens if trained else 0)
                made = Made(prompts.frame, document, fitted)
            document, arguments = made.document, made.arguments
            doc |= {
                **said,
                "prompt_tokens": made.fitted.prompt_tokens,
                **prompts.frame.identify(arguments),
                "answer": document.answer,
            }
            metadata = (self.spec.task, doc_id, 1)
            arm = cell.control or "long"
            watched = self.spec.attention and arm in WATCHED
            if watched:
                kept = made.located[1]
                needle = find_asked(arguments[0], document, doc["values"], kept)
                doc["watch"] = {"arm": arm, "length": cell.length.tokens, "needle": needle, "question": kept[-1][0]}
            if arm in PLACED:
                ids, kept = made.located
                doc["positions"] = arms.place(cell, ids, kept, sorted(document.depths))
                doc["prompt_fingerprint"] = fingerprint(
                    ids, {"answer": len(ids) - doc["answer_tokens"], "positions": doc["positions"]}
                )
                self._instances.append(self.construct_placed(doc, arguments, metadata=metadata))
            else:
                self._instances.append(self.construct_requests(doc, arguments, metadata=metadata))
        self._warn_of_one_place([doc for _, doc in docs if "control" not in doc])

    def _warn_of_one_place(self, docs: Iterable[Doc]) -> None:
        """Says at which lengths all depths came out as one place, as where a haystack's sentences are longer than its prompts."""
        realised: dict[int, set[tuple[float, float]]] = {}
        for doc in docs:
            realised.setdefault(doc["length"], set()).add((doc["depth"], doc["depth_realised"]))
        for length, found in sorted(realised.items()):
            if len({depth for depth, _ in found}) > 1 and len({place for _, place in found}) == 1:
                log.warning(
                    "%s: at %d tokens all depths are one place, since the haystack has no shorter sentences; give another one, or longer lengths",
                    self.spec.task,
                    length,
                )

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
        if "control" in doc:
            return {self._name_control(doc): float(results[0] == "exact")}
        at = self.name_place(doc["length"])
        scores = {f"exact{at}": float(results[0] == "exact")}
        if self.OUTPUT_TYPE == "generate_until":
            scores[f"lenient{at}"] = float(results[0] in ("exact", "lenient"))
        if self.OUTPUT_TYPE == "generate_until" and self.spec.score == "copy":
            scores[f"similarity{at}"] = copy_similarity(self._answers[id(doc)], doc["answer"])
        return scores

    def list_metrics(self) -> list[str]:
        """A metric for each length that is run, and for each that a control is run at."""
        kinds = ["exact"] if self.OUTPUT_TYPE == "loglikelihood" else ["exact", "lenient", "similarity"]
        controls = dict.fromkeys(self._name_control(doc) for doc in self.eval_docs if "control" in doc)
        return [*(f"{kind}{self.name_place(length.tokens)}" for kind in kinds for length in self.measured), *controls]

    def dump_config(self) -> dict[str, Any]:
        """As every task's; and the arms that were left out, each with the reason."""
        dumped = super().dump_config()
        if self.spec.arms:
            bench = self._bench
            left = [*list_left_out(self.lengths, self.spec.arms, bench.trained, bench.refuse), *self._arms_failed]
            dumped["arms_left_out"] = [one._asdict() for one in left]
        return dumped

    @property
    def _bench(self) -> Bench:
        """What decides which arms this model admits."""
        find: Callable[[], Placing] = getattr(self._view.lm, "find_placing", lambda: NO_PLACING)
        placing = find() if self._view.lm is not None else Placing(outcome="measured", reason="not known yet")
        trained = self._find_trained(self._view)
        return Bench(spec=self.spec, trained=trained, limits=self._view.limits, placing=placing, own=self._own)

    def _find_span(self, doc: Doc) -> int:
        """Positions that a record's prompt reaches over."""
        return self._find_trained(self._view) if doc.get("control") in PACKED else int(doc["length"])

    def doc_to_text(self, doc: Doc) -> str:
        """The prompt is in the request's arguments; here, what it asks."""
        return self.spec.question

    def doc_to_target(self, doc: Doc) -> str:
        return str(doc["answer"])

    def _prompts(self, view: ModelView, chat_template: Callable[..., str] | None, system: str | None) -> Prompts:
        generation = self.config.generation_kwargs
        if chat_template is not None and generation is not None and generation.get("until") == UNTIL:
            generation = {**generation, "until": []}  # an answer in chat has its own end, and may have paragraphs before it
        return Prompts(
            self.spec, self.haystack, Frame(view=view, chat_template=chat_template, system=system, generation=generation)
        )

    def _find_trained(self, view: ModelView) -> int:
        """The trained length in tokens. Raises LengthError where it is unknown, since controls need it."""
        if view.trained_length is None:
            raise LengthError(
                f"{self.spec.task}: {'controls' if self.spec.controls else 'arms'} were asked for, but no trained length is known for "
                "this model; give it (trained_length=N), or leave them out"
            )
        return view.trained_length.tokens

    def _name_control(self, doc: Doc) -> str:
        """`cropped@    512 (2x)`, beside `exact@    512 (2x)`."""
        return str(doc["control"]) + (self.name_place(doc["length"]) if doc["control"] != "no_haystack" else "")

    def _score(self, doc: Doc, answer: Any) -> str:
        if isinstance(answer, Unmeasured):
            if "control" not in doc:
                self._unmeasured[doc["length"]] = answer
            elif doc["control"] in ARMS:
                self._arms_failed[LeftOut(doc["control"], doc["length"], *answer)] = None
            return answer.outcome
        if self.OUTPUT_TYPE == "loglikelihood":
            return "exact" if answer[1] else "missed"
        if self.spec.score == "copy":
            return score_copy(answer, doc["answer"])
        return score_retrieval(answer, doc["values"], parse_kind(self.spec.value)[0])


def _read_cell(doc: Doc) -> Cell:
    """The cell that a record is of."""
    length = Length(tokens=doc["length"], multiple=doc["multiple"])
    return Cell(length, doc["depth"], doc["sample"], doc.get("control"))
