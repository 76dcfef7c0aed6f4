"""Prompts of exactly L tokens, over four kinds of tokenizer, counted by the tokenizer itself."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers_here import KINDS, make_tokenizer

from harness_ext.errors import LengthError, TaskFileError
from harness_ext.model_view import ModelView
from harness_ext.sweep.fit import DEPARTURE, Filler, Fitted, aim, fit
from harness_ext.sweep.frame import Frame
from harness_ext.sweep.needle import Document
from harness_ext.sweep.prompts import Prompts

TASKS = ("passkey", "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "copy")
HAYSTACKS = ("noise", "text", "needles")


@functools.cache
def load(kind: str, name: str, haystack: str, seed: int) -> Prompts:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, metadata={"haystack": haystack, "seed": seed})
    task: Any = manager.load([f"{name}_extrapolate"])["tasks"][f"{name}_extrapolate"]
    return Prompts(task.spec, task.haystack, frame(kind))


@functools.cache
def frame(kind: str) -> Frame:
    return Frame(view=ModelView(None, {"tokenizer": make_tokenizer(kind)}), chat_template=None, system=None, generation=None)


def build(kind: str, name: str, haystack: str, seed: int, depth: float, length: int) -> tuple[Document, Fitted]:
    return load(kind, name, haystack, seed).build(0, depth, length)


@functools.cache
def shortest(kind: str, name: str, haystack: str, seed: int) -> int:
    with pytest.raises(LengthError, match="own text takes") as error:
        build(kind, name, haystack, seed, 0.5, 1)
    found = re.search(r"takes (\d+)", str(error.value))
    assert found
    return int(found.group(1))


prompts = st.tuples(st.sampled_from(KINDS), st.sampled_from(TASKS), st.sampled_from(HAYSTACKS), st.integers(0, 3), st.floats(0, 1))


@settings(max_examples=150)
@given(prompts, st.integers(0, 200) | st.integers(200, 4000))
def test_a_prompt_has_exactly_the_length_asked_for(prompt: tuple[str, str, str, int, float], extra: int) -> None:
    kind, *_ = prompt
    length = shortest(*prompt[:4]) + extra
    document, fitted = build(*prompt, length)
    whole = frame(kind).context(fitted.body, document) + f" {document.answer}"
    assert len(make_tokenizer(kind).encode(whole)) == fitted.prompt_tokens == length


@settings(max_examples=60)
@given(prompts, st.integers(300, 3000))
@example(("bpe", "passkey", "needles", 0, 0.9296875), 790)
def test_each_needle_stands_once_at_the_boundary_nearest_to_its_depth(prompt: tuple[str, str, str, int, float], extra: int) -> None:
    _kind, name, haystack, _seed, depth = prompt
    document, fitted = build(*prompt, shortest(*prompt[:4]) + extra)
    filler = fitted.body.removeprefix(document.head).removesuffix(document.question)
    for needle in document.needles:
        assert filler.count(needle) == 1
        before = filler[: filler.index(needle)].rstrip()
        assert before == "" or before[-1] == "." or "\n" not in before[1:], "a needle stands inside a sentence"
    for value in document.answer.replace(" and ", ", ").split(", ") if name != "copy" else [document.answer]:
        outside = functools.reduce(lambda text, needle: text.replace(needle, ""), document.needles, fitted.body)
        assert value not in outside
    longest = max(len(sentence) for sentence in re.split(r"(?<=\.)\s", filler))
    if haystack == "needles":  # which stand together as a needle's sentences do: none stands inside another
        longest = max(longest, *map(len, document.needles))
    assert abs(fitted.depths[document.target] - depth) <= DEPARTURE + 2 * longest / max(
        1, len(filler) - sum(map(len, document.needles))
    )


@settings(max_examples=40)
@given(st.sampled_from(KINDS), st.sampled_from(HAYSTACKS), st.integers(0, 3), st.floats(0, 1), st.integers(1500, 4000))
@example("bpe", "needles", 1, 0.875, 1500)  # filled up with words
def test_the_depth_recorded_is_where_the_needle_stands_by_tokens(
    kind: str, haystack: str, seed: int, depth: float, extra: int
) -> None:
    document, fitted = build(kind, "niah_single", haystack, seed, depth, shortest(kind, "niah_single", haystack, seed) + extra)
    filler = fitted.body[fitted.body.index("\n") : fitted.body.rindex("\n")]
    before, after = (len(make_tokenizer(kind).encode(text, add_special_tokens=False)) for text in filler.split(document.needles[0]))
    assert fitted.depths == (pytest.approx(before / (before + after), abs=0.01),)
    longest = max(len(make_tokenizer(kind).encode(sentence)) for sentence in filler.split(". "))
    assert abs(fitted.depths[0] - depth) <= DEPARTURE + (longest / 2 + 3) / (before + after)


@given(st.integers(100, 100_000), st.integers(1, 100), st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True))
def test_a_needle_is_put_near_its_depth_and_never_past_a_deeper_one(length: int, bare: int, depths: list[float]) -> None:
    low, high = (aim(length, bare, depth) for depth in sorted(depths))
    assert low <= high
    for depth, target in zip(sorted(depths), (low, high), strict=True):
        assert abs(target - depth * (length - bare)) <= (DEPARTURE + 1e-9) * (length - bare)
    assert aim(length, bare, 1.0) == length - bare


def as_encoded(kind: str, document: Document, fitted: Fitted) -> tuple[str, list[int]]:
    """The prompt up to its question, and its tokens without the tokenizer's own at the ends."""
    text = frame(kind).context(fitted.body, document).rpartition(document.question)[0]
    return text, make_tokenizer(kind).encode(text, add_special_tokens=False)


def count_shared(one: list[int], other: list[int]) -> int:
    return next(
        (index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


MERGED = 3
"""Tokens at a seam that may join what stands before and after it."""


@settings(max_examples=30)
@given(
    st.sampled_from(KINDS), st.sampled_from(TASKS), st.sampled_from(HAYSTACKS), st.integers(0, 3),
    st.floats(0, 0.7), st.floats(0, 1), st.integers(2500, 5000),
)  # fmt: skip
def test_prompts_of_a_sample_and_length_are_the_same_up_to_the_earlier_of_their_needles(
    kind: str, name: str, haystack: str, seed: int, early: float, late: float, extra: int
) -> None:
    length = shortest(kind, name, haystack, seed) + extra
    made = [build(kind, name, haystack, seed, depth, length) for depth in (early, late)]
    (one, ids), (other, other_ids) = (as_encoded(kind, *prompt) for prompt in made)
    place = min(text.index(document.needles[document.target]) for text, (document, _) in zip((one, other), made, strict=True))
    before = one[:place].rstrip()  # a line break in the one may be a space in the other
    assert other.startswith(before)
    assert count_shared(ids, other_ids) >= len(make_tokenizer(kind).encode(before, add_special_tokens=False)) - MERGED


@settings(max_examples=30)
@given(
    st.sampled_from(KINDS), st.sampled_from(("passkey", "niah_single", "copy")), st.sampled_from(HAYSTACKS), st.integers(0, 3),
    st.floats(0, 0.7), st.integers(1500, 3000),
)  # fmt: skip
def test_a_prompt_begins_as_the_one_of_half_its_length_at_twice_its_depth_wherever_that_is_near_its_depth(
    kind: str, name: str, haystack: str, seed: int, depth: float, extra: int
) -> None:
    bare = shortest(kind, name, haystack, seed)
    # Half the length at twice the depth is depth · bare off; half of DEPARTURE is left for what the shorter prompt is off itself.
    length = max(bare + extra, int(depth * bare / DEPARTURE))
    short, long = build(kind, name, haystack, seed, depth, length), build(kind, name, haystack, seed, depth / 2, 2 * length)
    (one, ids), (other, other_ids) = as_encoded(kind, *short), as_encoded(kind, *long)
    needle = short[0].needles[0]
    assert one[: one.index(needle)] == other[: other.index(needle)]
    through = one[: one.index(needle) + len(needle)]
    assert count_shared(ids, other_ids) >= len(make_tokenizer(kind).encode(through, add_special_tokens=False)) - MERGED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("haystack", HAYSTACKS)
@pytest.mark.parametrize("room", [0, 2500])
def test_a_sweep_of_needles_is_one_context_that_is_asked_for_each_of_them(kind: str, haystack: str, room: int) -> None:
    prompts = load(kind, "niah_sweep", haystack, 1)
    length = prompts.count_bare() + room
    contexts = []
    for sample in range(2):
        seen = set()
        for depth in prompts.spec.depths:
            document, fitted = prompts.build(sample, depth, length)
            whole = frame(kind).context(fitted.body, document) + f" {document.answer}"
            assert len(make_tokenizer(kind).encode(whole)) == length
            context, _, asked = whole.rpartition("\n")
            (value,) = prompts.facts(sample, depth).values
            ((key, found),) = re.findall(r"numbers for ([a-z-]+) is: (\d+)\.", document.needles[document.target])
            assert (found, document.answer) == (value, value)
            assert asked.startswith(f"What is the special magic number for {key} ")
            assert asked.endswith(value)
            assert abs(fitted.depths[document.target] - depth) <= DEPARTURE + 0.01 or room < 2500
            seen.add(context)
        assert len(seen) == 1
        needles = re.findall(r"One of the special magic numbers for ([a-z-]+) is: (\d+)\.", context)
        hidden = prompts.facts(sample, 0.0).pairs
        assert [needle for needle in needles if needle in hidden] == list(hidden)
        assert len(dict(hidden)) == len(prompts.spec.depths) == 16
        contexts.append(context)
    assert len(set(contexts)) == 2


class EachToItsOwn:
    """Counts every text as another number of tokens."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def count_prompt(self, body: str, document: Document) -> int:
        return self.texts.setdefault(f"{body} {document.answer}", len(self.texts))


def test_needles_that_never_cost_the_same_are_an_error_that_says_how_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness_ext.sweep.needle.MAX_DRAWS", 50)
    prompts = load("bpe", "niah_sweep", "text", 0)
    with pytest.raises(TaskFileError, match="ask for 1 depths or fewer"):
        Prompts(prompts.spec, prompts.haystack, EachToItsOwn()).build(0, 0.0, 1000)  # type: ignore[arg-type]


def test_each_sample_has_a_haystack_of_its_own_and_keeps_it_at_every_length_and_depth() -> None:
    prompts = load("bpe", "niah_single", "text", 0)
    bodies = {(sample, depth): prompts.build(sample, depth, 900)[1].body for sample in (0, 1, 2) for depth in (0.0, 1.0)}
    assert len({body.split(".")[-6] for (_, depth), body in bodies.items() if depth == 0.0}) == 3
    for sample in (0, 1, 2):
        first, last = (
            bodies[sample, depth].replace(prompts.document(sample, depth).needles[0], "").split() for depth in (0.0, 1.0)
        )
        assert first == last
        longer = prompts.build(sample, 1.0, 1800)[1].body.split()
        assert longer[: len(last) // 2] == last[: len(last) // 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_32768_tokens_is_exact(kind: str) -> None:
    document, fitted = build(kind, "passkey", "text", 0, 0.5, 32768)
    whole = frame(kind).context(fitted.body, document) + f" {document.answer}"
    assert len(make_tokenizer(kind).encode(whole)) == 32768


@settings(max_examples=20)
@given(prompts, st.integers(0, 600))
def test_the_same_seed_gives_the_same_bytes_whatever_was_built_before(prompt: tuple[str, str, str, int, float], extra: int) -> None:
    length = shortest(*prompt[:4]) + extra
    first = build(*prompt, length)[1].body
    load.cache_clear()
    load(*prompt[:4]).build(2, 0.3, length + 50)
    assert build(*prompt, length)[1].body == first


def test_whole_sentences_make_up_the_length_where_they_can() -> None:
    document, fitted = build("bpe", "passkey", "noise", 0, 0.5, 700)
    sentences = {"The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."}
    filler = fitted.body.removeprefix(document.head).removesuffix(document.question).replace(document.needles[0], "")
    assert set(re.split(r"(?<=\.)\s+", filler.strip())) == sentences


class OddTokenizer:
    """Counts every text as an even number of tokens."""

    def count(self, texts: list[str]) -> list[int]:
        return [2 * len(text) for text in texts]

    def count_prompt(self, body: str, document: Document) -> int:
        return 2 * len(body)


def test_a_length_that_a_tokenizer_cannot_hit_is_an_error_and_not_a_shorter_prompt() -> None:
    prompts = load("bpe", "passkey", "noise", 0)
    with pytest.raises(LengthError, match="no prompt of exactly 2001 tokens"):
        fit(prompts.document(0, 0.5), Filler(prompts._sentences(0), OddTokenizer()), 2001, OddTokenizer())
