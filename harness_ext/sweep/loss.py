"""The loss of running text by absolute position, past the trained length, from one reading of each text.

check the YAML → know the model → plan lengths and buckets → cut texts → (lm_eval runs them) → one metric a bucket, in nats.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from harness_ext.cells import Unmeasured
from harness_ext.errors import HaystackError, LengthError
from harness_ext.model_view import ModelView
from harness_ext.sweep.buckets import MIN_TOKENS, Passage, build_passage, plan_edges
from harness_ext.sweep.fingerprint import fingerprint
from harness_ext.sweep.fit import Filler
from harness_ext.sweep.haystack import open_haystack
from harness_ext.sweep.host import Doc, SweepTask, read_metadata
from harness_ext.sweep.seeds import generator
from harness_ext.sweep.spec import LossSpec, parse_loss_spec

log = logging.getLogger(__name__)


class LossTask(SweepTask):
    """A task that scores running text, in nats per token. In YAML: `class: !function harness_ext.LossTask`.

    Each sample is one text of the longest length, cut into buckets of positions; a bucket is scored after all that stands before
    it. Two kinds of metric, named as in Press et al., ALiBi (arXiv 2108.12409, section 2 and appendix B):

    - `sliding@2048`: the loss of the bucket that ends at position 2048. It is what a sliding window of 2048 tokens with the
      bucket as its stride scores: its last tokens only.
    - `nonoverlapping@2048`: the loss of all positions up to 2048. It is what windows of 2048 tokens that do not overlap give,
      each scored from its beginning. It holds the early tokens, which have little before them (their "early token curse"): it
      falls with length for that reason alone, where `sliding` says whether a model still uses, or stands, what is far back.

    How ours differs: their windows score the same tokens of a corpus at every length; ours are the positions of one text, so that
    other tokens stand in each bucket, and the mean over samples, each with a text of its own, has to make that even. A text's first
    word is context only. Each bucket ends with a word, at its position or up to a word before it. Under an extension
    that depends on the prompt's length (`dynamic`, `longrope`), `nonoverlapping` joins buckets that were scored under several.
    """

    spec: LossSpec
    higher_wins = False
    own_text = "a bucket"

    def __init__(self, config: Mapping[str, Any]) -> None:
        file, metadata = read_metadata(config)
        spec = parse_loss_spec(config, file=file, overrides=metadata)
        super().__init__(config, spec, open_haystack(spec.haystack, distractors=lambda rng, taken: iter(())))

    def bind(self, lm: Any) -> None:
        """As every task's; and what an earlier model gave is forgotten."""
        super().bind(lm)
        self._nats: dict[tuple[int, int], tuple[float, int]] = {}
        """(sample, edge) → the bucket's loss in all, and its tokens."""

    @property
    def edges(self) -> list[int]:
        """Positions in tokens where buckets end, ascending; the longest length is the last."""
        return plan_edges([length.tokens for length in self.measured], self.spec.buckets)

    def plan_docs(self) -> list[Doc]:
        """One record for each bucket of each sample, sample by sample, so that `--limit` takes whole texts first."""
        edges, seed = self.edges, self.spec.seed
        return [{"sample": sample, "edge": edge, "seed": seed} for sample in range(self.spec.samples) for edge in edges]

    @property
    def round(self) -> int:
        """A text."""
        return len(self.edges)

    def build_all_requests(
        self,
        *,
        limit: int | None = None,
        samples: list[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        **_: Any,
    ) -> None:
        """Cuts this process's texts. lm_eval's own request cache is left aside: its key knows no lengths."""
        if apply_chat_template or system_instruction:
            log.warning("%s: text is scored as it is, without chat template and system instruction", self.spec.task)
        self.leave_out_too_short(MIN_TOKENS)
        docs = list(self.doc_iterator(rank=rank, limit=limit, world_size=world_size, samples=samples))
        self.lift(self.measured[-1].tokens)
        edges, passages = self.edges, dict[int, Passage]()
        self._instances = []
        for doc_id, doc in docs:
            sample, bucket = doc["sample"], edges.index(doc["edge"])
            if sample not in passages:
                passages[sample] = self._build_passage(sample, edges)
            text, (start, stop) = passages[sample].text, passages[sample].cuts[bucket : bucket + 2]
            doc |= {
                "start": start.tokens,
                "prompt_tokens": stop.tokens,
                "scored_tokens": stop.tokens - start.tokens,
                "prompt_fingerprint": fingerprint(passages[sample].ids[: stop.tokens], start.tokens),
            }
            arguments = (text[: start.characters], text[start.characters : stop.characters])
            self._instances.append(self.construct_requests(doc, arguments, metadata=(self.spec.task, doc_id, 1)))

    def count_own_text(self, view: ModelView) -> int:
        """Tokens of the shortest bucket."""
        return MIN_TOKENS

    def apply_filters(self) -> None:
        """Takes each bucket's loss, in nats per token, or its outcome: what lm_eval's sample log shows as filtered response."""
        for instance in self._instances:
            doc, answer = instance.doc, instance.resps[0]
            if isinstance(answer, Unmeasured):
                self._unmeasured |= {length.tokens: answer for length in self.measured if length.tokens >= doc["edge"]}
                instance.filtered_resps["none"] = answer.outcome
            else:
                self._nats[doc["sample"], doc["edge"]] = (-answer[0], doc["scored_tokens"])
                instance.filtered_resps["none"] = -answer[0] / doc["scored_tokens"]

    def process_results(self, doc: Doc, results: list[Any]) -> dict[str, float]:
        """The bucket's loss, and where it ends a length, that of all positions before; none for what was not measured."""
        if isinstance(results[0], str):
            return {}
        at = self.name_place(doc["edge"])
        scores = {f"sliding{at}": results[0]}
        parts = [self._nats.get((doc["sample"], edge)) for edge in self.edges if edge <= doc["edge"]]
        known = [part for part in parts if part]
        if len(known) == len(parts) and doc["edge"] in [length.tokens for length in self.measured]:
            scores[f"nonoverlapping{at}"] = sum(nats for nats, _ in known) / sum(tokens for _, tokens in known)
        return scores

    def list_metrics(self) -> list[str]:
        """One for each bucket, one for each length."""
        ends = {"sliding": self.edges, "nonoverlapping": [length.tokens for length in self.measured]}
        return [f"{kind}{self.name_place(tokens)}" for kind, places in ends.items() for tokens in places]

    def dump_config(self) -> dict[str, Any]:
        """As every task's, with the positions where the buckets end."""
        return {**super().dump_config(), "edges": self.edges}

    def doc_to_text(self, doc: Doc) -> str:
        """The text is in the request's arguments, and nothing is asked."""
        return ""

    def doc_to_target(self, doc: Doc) -> str:
        return ""

    def _build_passage(self, sample: int, edges: list[int]) -> Passage:
        sentences = self.haystack.sentences(generator(self.spec.task, self.spec.seed, "haystack", sample), lambda _: False)
        try:
            passage = build_passage(Filler(sentences, self._view), edges, self._view)
        except LengthError as error:
            raise LengthError(f"{self.spec.task}: {error}") from None
        held = len(self.haystack.source)
        if held and len(passage.text) > held:
            raise HaystackError(
                f"{self.spec.task}: {edges[-1]} tokens are {len(passage.text)} characters, and {self.haystack.name} holds {held}; "
                "what comes again is easy to predict: give a longer text, or shorter lengths"
            )
        return passage
