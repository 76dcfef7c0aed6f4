"""Training text for the reference models: the task families' own prompts, and denser mixtures of them.

A prompt as evaluated asks once, after a long text: too little signal for a small model. So half of the examples hide
several needles and ask for several of them, or repeat a passage, until the window is full; the other half look exactly
like a prompt of the sweep.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from harness_ext.sweep import words
from harness_ext.sweep.fit import Filler, assemble, find_boundary
from harness_ext.sweep.haystack import GENERATED, open_haystack
from harness_ext.sweep.needle import Document, build_document, draw_distractors, draw_facts, draw_values
from harness_ext.sweep.spec import TaskSpec, parse_spec

TASKS = Path(__file__).parent.parent / "tasks"
FAMILIES = ("passkey", "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "copy")
PIECE = re.compile(r"\n|[^\S\n]?[^\s]+")
Piece = tuple[str, bool]
"""Some text, and whether it is an answer."""


def load_spec(name: str) -> TaskSpec:
    """The task of `tasks/NAME.yaml`, its `include` resolved."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)

    def read(file: str) -> dict[str, Any]:
        config = yaml.load((TASKS / file).read_text(), Loader=Loader)
        return {**read(config.pop("include")), **config} if "include" in config else config

    return parse_spec(read(f"{name}.yaml"), file=name, overrides={})


class Encoder:
    """Text → token ids, word by word with a cache; the tokenizer never merges across a space."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in PIECE.findall(text):
            if piece not in self.cache:
                self.cache[piece] = self.tokenizer.encode(piece, add_special_tokens=False)
            ids += self.cache[piece]
        return ids

    def count(self, texts: Any) -> list[int]:
        return [len(self(text)) for text in texts]

    def count_prompt(self, body: str, document: Document) -> int:
        return 1 + len(self(f"{body} {document.answer_prefix} {document.answer}"))


def filler_text(spec: TaskSpec, rng: random.Random, encode: Encoder) -> Filler:
    kind = spec.haystack if rng.random() < 0.5 else rng.choice(GENERATED)
    haystack = open_haystack(kind, distractors=lambda rng, taken: draw_distractors(spec, rng, taken=taken))
    return Filler(haystack.sentences(rng, lambda _: False), encode)


def as_evaluated(spec: TaskSpec, rng: random.Random, encode: Encoder, length: int) -> list[Piece] | None:
    """A prompt of at most `length` tokens as the sweep lays it, then its answer; None where `length` is too short."""
    facts = draw_facts(spec, draw_values(spec, rng, taken=lambda _: False), rng)
    document = build_document(spec, facts, rng.random(), rng)
    bare = encode.count_prompt(assemble(document, [], [0] * len(document.needles)), document) + 2
    if bare > length:
        return None
    body = fill(document, filler_text(spec, rng, encode), rng.randint(0, length - bare) if rng.random() < 0.5 else length - bare)
    return [(f"{body} {document.answer_prefix}", False), (f" {document.answer}.", True)]


def fill(document: Document, filler: Filler, budget: int) -> str:
    chosen = filler.texts[: filler.reach(budget)] if budget > 0 else []
    ends = filler.ends[: len(chosen) + 1]
    return assemble(document, chosen, [find_boundary(ends, depth * ends[-1]) for depth in document.depths])


def dense_needles(spec: TaskSpec, rng: random.Random, encode: Encoder, length: int) -> list[Piece]:
    """Several needles in some filler, then questions about them until the window is full."""
    count = rng.randint(1, max(1, length // 45))
    spec_keys = TaskSpec(task=spec.task, needle=spec.needle, question=spec.question, value=spec.value, keys=count)
    facts = draw_facts(spec_keys, draw_values(spec, rng, taken=lambda _: False), rng)
    document = build_document(spec_keys, facts, rng.random(), rng)
    document = Document(
        head=spec.description if rng.random() < 0.5 else "",
        needles=document.needles,
        depths=document.depths,
        target=0,
        question="",
        answer_prefix="",
        answer="",
        inline=rng.random() < 0.5,
    )
    needles = sum(encode.count(document.needles))
    pieces: list[Piece] = [
        (fill(document, filler_text(spec, rng, encode), rng.randint(0, max(0, length - 2 * needles - 40))), False)
    ]
    questions = list(facts.pairs)
    rng.shuffle(questions)
    for key, value in questions:
        asked = rng.choice((f"\n{spec.question} {spec.answer_prefix}", f"\n{spec.answer_prefix}")).format(key=key)
        pieces += [(asked, False), (f" {value}.", True)]
    return pieces


def repeats(spec: TaskSpec, rng: random.Random, encode: Encoder, length: int) -> list[Piece]:
    """A passage of words or digits, some filler, the passage again."""
    size = rng.randint(4, length // 3)
    if rng.random() < 0.5:
        passage = " ".join(rng.choice(words.NAMES_NOUNS) for _ in range(size))
    else:
        passage = "".join(rng.choice("0123456789") for _ in range(size))
    tokens = encode.count([passage])[0]
    filler = filler_text(spec, rng, encode)
    room = max(0, length - 2 * tokens - 12)
    between = " ".join(filler.texts[: filler.reach(rng.randint(0, room))]) if room else ""
    first, rest = passage[: len(passage) // 8], passage[len(passage) // 8 :]
    if " " in passage:
        head, _, rest = passage.partition(" ")
        first, rest = head, " " + rest
    return [(f"The passage to repeat is: {passage}.\n{between}\nThe passage to repeat is: {first}", False), (f"{rest}.", True)]


def examples(rng: random.Random, encode: Encoder, length: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids with BOS, at most `length` of them, and which of them are answers; without end."""
    specs = {name: load_spec(name) for name in FAMILIES}
    bos, eos = encode.tokenizer.bos_token_id, encode.tokenizer.eos_token_id
    makers: list[tuple[float, str, Callable[..., list[Piece] | None]]] = [
        (0.50, "", as_evaluated),
        (0.30, "niah_single", dense_needles),
        (0.20, "copy", repeats),
    ]
    while True:
        _, name, maker = rng.choices(makers, weights=[weight for weight, _, _ in makers])[0]
        family = name or rng.choices(FAMILIES, weights=(2, 2, 2, 1, 1, 2))[0]
        pieces = maker(specs[family], rng, encode, length)
        if pieces is None:
            continue
        ids, answer = [bos], [False]
        for text, is_answer in pieces:
            new = encode(text)
            ids += new
            answer += [is_answer] * len(new)
        ids, answer = [*ids, eos][:length], [*answer, True][:length]
        yield ids, answer
