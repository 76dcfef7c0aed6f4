"""Controls: what a sweep's scores are to be held against, on the same run and in none of the sweep's own metrics."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted import Scripted, curve
from tokenizers_here import KINDS, make_tokenizer

from harness_ext.cells import Length, Unmeasured
from harness_ext.compare import Asked, compare_methods
from harness_ext.errors import LengthError, TaskFileError
from harness_ext.model_view import ModelView
from harness_ext.sweep.controls import Cell, add_controls, build, crop, find_short
from harness_ext.sweep.fit import CHANGE, Fitted
from harness_ext.sweep.frame import Frame
from harness_ext.sweep.prompts import Prompts

TRAINED = 600
SMALL = {"trained_length": TRAINED, "multiples": [0.5, 1, 2, 4], "depths": 3, "samples": 2, "controls": True}
ALL = ("passkey", "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "niah_sweep", "copy")
HAYSTACKS = ("noise", "text", "needles")
CONTROLS = ("no_haystack", "needle_absent", "cropped", "short")


def run(evaluate: Any, knows: Any, task: str = "passkey_extrapolate", *, limit: int | None = None, **changes: Any) -> Any:
    return evaluate(Scripted(knows, 10_000), [task], limit=limit, tokenizer=make_tokenizer("bpe"), **SMALL | changes)


def find(results: Any, task: str, control: str) -> dict[int, float]:
    """Length → score of a control, from lm_eval's own results; of one without length at 0."""
    found = {}
    for key, value in results["results"][task].items():
        name, _, place = key.split(",")[0].partition("@")
        if name == control and "_stderr" not in key:
            found[int(place.split("(")[0]) if place else 0] = value
    return found


def reads(task: str) -> Any:
    """A model that answers what it finds by reading the prompt, and nothing where it does not find all that is asked."""

    def knows(prompt: str, answer: str) -> bool:
        if task.startswith("passkey"):
            return f"The pass key is {answer.strip()}. Remember it." in prompt
        if task.startswith("copy"):
            return f"The passage to repeat is: {answer.strip()}." in prompt
        question = re.search(r"magic numbers? for (.+) mentioned in the provided text\?", prompt)
        assert question
        keys = re.split(r", and |, | and ", question.group(1))
        hidden = re.findall(r"One of the special magic numbers for ([a-z-]+) is: (\d+)\.", prompt)
        values = [value for key in keys for hidden_key, value in hidden if hidden_key == key]
        return values == re.findall(r"\d+", answer)

    return knows


# ---------------------------------------------------------------------- what is scored


@pytest.mark.parametrize("suffix", ["", "_generate"])
@pytest.mark.parametrize("name", ALL)
def test_a_model_that_reads_the_prompt_needs_no_haystack_and_finds_no_needle_that_is_absent(
    evaluate: Any, name: str, suffix: str
) -> None:
    task = f"{name}_extrapolate{suffix}"
    lengths = {"trained_length": 1600} if name.startswith(("niah_multi", "niah_sweep")) else {}
    results = run(evaluate, reads(name), task, **lengths)
    assert set(curve(results, task).values()) == {1.0}
    measured = set(curve(results, task))
    assert find(results, task, "no_haystack") == {0: 1.0}
    assert find(results, task, "needle_absent") == dict.fromkeys(measured, 0.0)
    cropped = [sample for sample in results["samples"][task] if sample["doc"].get("control") == "cropped"]
    for sample in cropped:
        prompt, found = sample["arguments"][0][0], sample["filtered_resps"][0] == "exact"
        kept = sample["doc"]["needle_kept"]
        assert kept == all(value in prompt for value in sample["doc"]["values"])
        assert kept or not found
    kept = [sample["doc"]["needle_kept"] for sample in cropped]
    assert 0 < sum(kept) < len(kept) or name in ("niah_multivalue", "niah_multiquery")  # one of several is always cut off
    assert find(results, task, "short") == {}


def test_a_model_that_answers_where_there_is_nothing_to_find_is_found_out_by_the_absent_needle(evaluate: Any) -> None:
    def guesses(prompt: str, answer: str) -> bool:
        return f"The pass key is {answer.strip()}" not in prompt

    results = run(evaluate, guesses)
    assert set(curve(results, "passkey_extrapolate").values()) == {0.0}
    assert find(results, "passkey_extrapolate", "no_haystack") == {0: 0.0}
    assert set(find(results, "passkey_extrapolate", "needle_absent").values()) == {1.0}


@pytest.mark.parametrize("task", ["passkey_extrapolate", "niah_single_extrapolate"])
def test_a_model_that_reads_its_last_tokens_alone_scores_cropped_what_it_scores_long(evaluate: Any, task: str) -> None:
    def knows(prompt: str, answer: str) -> bool:
        ids = make_tokenizer("bpe").encode(prompt + answer)[-TRAINED:]
        return reads_all(make_tokenizer("bpe").decode(ids)[: -len(answer)], answer)

    reads_all = reads(task)
    results = run(evaluate, knows, task, depths=8, samples=5)
    scores, cropped = curve(results, task), find(results, task, "cropped")
    assert set(cropped) == {2 * TRAINED, 4 * TRAINED}
    for length, score in cropped.items():
        assert score == scores[length]
        assert 0 < score < 1


def test_no_control_enters_a_metric_of_the_sweep(evaluate: Any) -> None:
    """Here controls are all wrong, and the sweep is all right."""
    task = "passkey_extrapolate"
    plain = run(evaluate, lambda *_: True, controls=False)
    sweep = {sample["arguments"][0] for sample in plain["samples"][task]}
    results = run(evaluate, lambda *arguments: arguments in sweep)
    assert curve(results, task) == curve(plain, task) == dict.fromkeys((300, 600, 1200, 2400), 1.0)
    assert {control: set(find(results, task, control).values()) for control in CONTROLS[:3]} == {
        name: {0.0} for name in CONTROLS[:3]
    }
    own = [sample["doc"] for sample in results["samples"][task] if "control" not in sample["doc"]]
    assert own == [sample["doc"] for sample in plain["samples"][task]]
    assert results["higher_is_better"][task].keys() >= set(find_names(results, task))


def find_names(results: Any, task: str) -> list[str]:
    return [key.split(",")[0] for key in results["results"][task] if ",none" in key and "_stderr" not in key]


def test_what_does_not_fit_into_memory_is_no_score_of_a_control_and_no_outcome_of_a_length(evaluate: Any) -> None:
    class Small(Scripted):
        def loglikelihood(self, requests: list[Any]) -> Any:
            full = Unmeasured(outcome="out_of_memory", reason="full")
            return [full if request.doc.get("control") == "cropped" else (-1.0, True) for request in requests]

    task = "passkey_extrapolate"
    results = evaluate(Small(lambda *_: True, 10_000), [task], tokenizer=make_tokenizer("bpe"), **SMALL)
    assert find(results, task, "cropped") == {}
    assert find(results, task, "no_haystack") == {0: 1.0}
    assert {cell["outcome"] for cell in results["configs"][task]["lengths"]} == {"measured"}
    assert {s["filtered_resps"][0] for s in results["samples"][task] if s["doc"].get("control") == "cropped"} == {"out_of_memory"}


# ---------------------------------------------------------------------- what is asked


@functools.cache
def load_prompts(kind: str, name: str, haystack: str, seed: int) -> Prompts:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, metadata={"haystack": haystack, "seed": seed})
    task: Any = manager.load([f"{name}_extrapolate"])["tasks"][f"{name}_extrapolate"]
    view = ModelView(None, {"tokenizer": make_tokenizer(kind)})
    return Prompts(task.spec, task.haystack, Frame(view=view, chat_template=None, system=None, generation=None))


def count(kind: str, prompts: Prompts, document: Any, body: str) -> int:
    return len(make_tokenizer(kind).encode(prompts.frame.context(body, document) + f" {document.answer}"))


made = st.tuples(st.sampled_from(KINDS), st.sampled_from(ALL), st.sampled_from(HAYSTACKS), st.integers(0, 2))


@settings(max_examples=40)
@given(made, st.integers(0, 9), st.integers(0, 1000), st.integers(300, 3000))
def test_a_cropped_prompt_is_the_end_that_fits_and_would_not_with_a_word_more(
    which: tuple[str, str, str, int], place: int, room: int, extra: int
) -> None:
    kind, prompts = which[0], load_prompts(*which)
    trained = prompts.count_bare() + room
    depth = prompts.spec.depths[place]
    cell = Cell(Length(tokens=trained + extra, multiple=None), depth, 0, "cropped")
    _, whole = prompts.build(0, depth, trained + extra)
    document, cropped, said = build(prompts, cell, trained)
    assert whole.body.endswith(cropped.body)
    assert cropped.body.endswith(document.question)
    assert cropped.prompt_tokens == count(kind, prompts, document, cropped.body) <= trained
    before = whole.body[: -len(cropped.body)]
    assert before[-1].isspace()
    longer = before.split()[-1] + before[len(before.rstrip()) :] + cropped.body
    assert whole.body.endswith(longer)
    assert count(kind, prompts, document, longer) > trained
    assert said["needle_kept"] == all(value in cropped.body for value in prompts.facts(0, depth).values)


@pytest.mark.parametrize("filler", ["ab " * 4000, "ab" * 4000, "ab" * 200 + " ab" * 3000 + "ab" * 900, " ".join(["ab" * 700] * 6)])
def test_words_of_any_length_are_cropped_before(filler: str) -> None:
    prompts = load_prompts("byte", "passkey", "noise", 0)
    document = prompts.document(0, 0.5)
    body = f"{filler}\n{document.question}"
    whole = Fitted(body=body, depths=(0.5,), prompt_tokens=prompts.frame.count_prompt(body, document))
    for tokens in (60, 1000, 4000, 7000):
        cropped = crop(document, whole, tokens, prompts.frame)
        before = body.removesuffix(cropped.body)
        assert before + cropped.body == body
        assert cropped.prompt_tokens == count("byte", prompts, document, cropped.body) <= tokens
        assert count("byte", prompts, document, before.split()[-1] + " " + cropped.body) > tokens
    with pytest.raises(LengthError, match="question alone takes more"):
        crop(document, whole, 30, prompts.frame)


@settings(max_examples=40)
@example(("bpe", "copy", "needles", 0), 1020)
@given(made, st.integers(0, 3000))
def test_a_prompt_without_its_needle_has_its_length_and_begins_as_the_one_with_the_deepest(
    which: tuple[str, str, str, int], room: int
) -> None:
    kind, prompts = which[0], load_prompts(*which)
    length = prompts.count_bare() + room
    document, absent, said = build(prompts, Cell(Length(tokens=length, multiple=None), None, 0, "needle_absent"), 0)
    assert absent.prompt_tokens == count(kind, prompts, document, absent.body) == length
    deepest = prompts.spec.depths[-1]
    whole_document, whole = prompts.build(0, deepest, length)
    facts = prompts.facts(0, deepest)
    assert document.question == whole_document.question
    assert said["values"] == list(facts.values)
    for (key, value), needle in zip(facts.pairs, whole_document.needles, strict=True):
        assert (needle in absent.body) == (key not in facts.asked)
        assert (value in absent.body) == (key not in facts.asked)
    first = min(whole.body.index(needle) for needle in whole_document.needles if needle not in absent.body)
    shared = next((i for i, (a, b) in enumerate(zip(whole.body, absent.body, strict=False)) if a != b), len(whole.body))
    # A line break may stand for a space before the needle; filler of a few sentences makes up the last tokens of either.
    filler = itertools.islice(prompts.haystack.sentences(random.Random(0), lambda _: False), 100)
    sentence = max(60, *map(len, filler))  # needles of a passage are three times as long
    assert shared >= min(first - 1, len(whole.body) - CHANGE * sentence * (1 + len(document.needles)))


@settings(max_examples=20)
@given(made, st.integers(0, 20))
def test_without_haystack_there_are_the_needles_and_the_question_and_nothing_else(
    which: tuple[str, str, str, int], sample: int
) -> None:
    kind, prompts = which[0], load_prompts(*which)
    document, fitted, said = build(prompts, Cell(Length(tokens=0, multiple=None), None, sample, "no_haystack"), 0)
    rest = functools.reduce(lambda text, needle: text.replace(needle, "", 1), document.needles, fitted.body)
    assert rest.split() == f"{document.head} {document.question}".split()
    assert fitted.prompt_tokens == count(kind, prompts, document, fitted.body)
    assert all(value in fitted.body for value in said["values"])
    assert list(document.depths) == sorted(document.depths)


def test_a_needle_among_others_stands_first_and_last_where_there_is_no_haystack() -> None:
    prompts = load_prompts("bpe", "niah_multikey", "text", 0)
    cells = (Cell(Length(tokens=0, multiple=None), None, sample, "no_haystack") for sample in range(10))
    places = [document.target for document, _, _ in (build(prompts, cell, 0) for cell in cells)]
    assert {0, 3} <= set(places)


@pytest.mark.parametrize("suffix", ["", "_generate"])
def test_controls_stand_beside_the_prompts_that_they_belong_to(evaluate: Any, suffix: str) -> None:
    task = f"niah_single_extrapolate{suffix}"
    results = run(evaluate, lambda *_: True, task)
    docs = [sample["doc"] for sample in results["samples"][task]]
    by_control = defaultdict(list)
    for doc in docs:
        by_control[doc.get("control")].append(doc)
    assert {control: len(found) for control, found in by_control.items()} == {
        None: 4 * 3 * 2,
        "no_haystack": 2,
        "needle_absent": 4 * 2,
        "cropped": 2 * 3 * 2,
    }
    twins = {(doc["length"], doc["depth"], doc["sample"]): doc for doc in by_control[None]}
    for doc in by_control["cropped"]:
        twin = twins[doc["length"], doc["depth"], doc["sample"]]
        assert doc["length"] > TRAINED >= doc["prompt_tokens"] > TRAINED - 60
        assert {doc[name] == twin[name] for name in ("answer", "values", "multiple", "depth_realised")} == {True}
        assert doc["prompt_fingerprint"] != twin["prompt_fingerprint"]
    for doc in by_control["needle_absent"]:
        assert (doc["prompt_tokens"], doc["depth"]) == (doc["length"], None)
    (own,) = {doc["length"] for doc in by_control["no_haystack"]}
    assert own == max(doc["prompt_tokens"] for doc in by_control["no_haystack"]) < 300
    for doc in docs:
        assert re.fullmatch("[0-9a-f]{16}", doc["prompt_fingerprint"])
        assert (doc["answer_tokens"] > 0) == (suffix == "")
        assert len(json.dumps(doc)) < 500


@pytest.mark.parametrize(
    ("name", "asked", "short"),
    [
        ("niah_single", {"multiples": [2, 4]}, 300),
        ("niah_single", {"lengths": [1200, 2400]}, 300),
        ("niah_single", {"multiples": [1, 2]}, None),
        ("niah_single", {"multiples": [0.5, 2]}, None),
        ("niah_multikey", {"multiples": [2], "trained_length": 500}, 500),  # half of it has no room for four needles
        ("niah_multikey", {"multiples": [2], "trained_length": 300}, None),
    ],
)
def test_a_short_prompt_is_added_where_the_sweep_has_none(evaluate: Any, name: str, asked: Any, short: int | None) -> None:
    task = f"{name}_extrapolate"
    asked = {"trained_length": TRAINED, "depths": 3, "samples": 2, "controls": True, **asked}
    results = evaluate(Scripted(reads(name), 10_000), [task], tokenizer=make_tokenizer("bpe"), **asked)
    assert find(results, task, "short") == ({short: 1.0} if short else {})
    docs = [sample["doc"] for sample in results["samples"][task] if sample["doc"].get("control") == "short"]
    assert len({(doc["depth"], doc["sample"]) for doc in docs}) == len(docs) == (6 if short else 0)
    assert all(doc["prompt_tokens"] == doc["length"] == short for doc in docs)


def test_a_question_that_is_longer_than_the_trained_length_cannot_be_cropped_to(evaluate: Any) -> None:
    with pytest.raises(LengthError, match=r"niah_single_extrapolate: .* 20 tokens was asked for, .* leave controls out"):
        run(evaluate, lambda *_: True, "niah_single_extrapolate", trained_length=20, multiples=[50])


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=6, unique=True).map(sorted), st.integers(10, 2000), st.integers(1, 800))
def test_a_short_length_is_within_the_trained_one_and_has_room_for_the_tasks_own_text(
    tokens: list[int], trained: int, own: int
) -> None:
    lengths = [Length(tokens=count, multiple=None) for count in tokens]
    short = find_short(lengths, trained, own)
    assert (short is None) == (tokens[0] <= trained or own > trained)
    assert short is None or own <= short.tokens <= trained


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.booleans())
def test_the_first_so_many_prompts_hold_the_controls_of_the_sweeps_among_them(
    lengths: int, depths: int, samples: int, past: int, short: bool
) -> None:
    from harness_ext.sweep.lengths import order_cells

    known = [Length(tokens=100 * (index + 1), multiple=None) for index in range(lengths)]
    own, small = Length(tokens=9, multiple=None), Length(tokens=50, multiple=None) if short else None
    cells = [Cell(known[length], depth / 4, sample) for length, depth, sample in order_cells(lengths, depths, samples)]
    planned = list(add_controls(cells, trained=100 * past, own=own, short=small))
    assert [cell for cell in planned if not cell.control] == cells
    assert len(planned) == len(set(planned)) == len(planned) // samples * samples
    for end in range(1, len(planned) + 1):
        counts = Counter(cell.control for cell in planned[:end])
        sweep = [cell for cell in planned[:end] if not cell.control]
        owed = {
            "no_haystack": len({cell.sample for cell in sweep}),
            "needle_absent": len({(cell.sample, cell.length) for cell in sweep}),
            "cropped": sum(cell.length.tokens > 100 * past for cell in sweep),
            "short": len({(cell.sample, cell.depth) for cell in sweep}) if short else 0,
        }
        missing = sum(owed.values()) - sum(counts[control] for control in owed)
        assert 0 <= missing <= (4 if planned[end - 1] == sweep[-1] else 3)
        assert end < len(planned) or not missing


def test_a_limit_counts_controls_and_stays_balanced(evaluate: Any) -> None:
    results = run(evaluate, lambda *_: True, limit=14)
    docs = [sample["doc"] for sample in results["samples"]["passkey_extrapolate"]]
    assert len(docs) == 14
    lengths = Counter(doc["length"] for doc in docs if "control" not in doc)
    assert max(lengths.values()) - min(lengths.values()) <= 1
    assert {doc["control"] for doc in docs if "control" in doc} == set(CONTROLS[:3])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_whole_samples_so_that_each_has_every_metric(load: Any, processes: int) -> None:
    task = load("passkey_extrapolate", tokenizer=make_tokenizer("bpe"), max_length=10_000, **SMALL | {"samples": 4})
    task.build_all_requests()
    shares = [list(task.doc_iterator(rank=rank, world_size=processes)) for rank in range(processes)]
    assert sorted(doc_id for share in shares for doc_id, _ in share) == list(range(len(task.eval_docs)))
    names = [
        list(dict.fromkeys(name for _, doc in share for name in task.process_results(doc, ["exact"])))
        for share in answered(task, shares)
    ]
    assert all(own == names[0] for own in names)
    assert set(names[0]) == set(task.list_metrics()) - {
        name for name in task.list_metrics() if name.startswith(("lenient", "similarity"))
    }
    samples = [{doc["sample"] for _, doc in share} for share in shares]
    assert all(not one & other for one, other in itertools.combinations(samples, 2))
    with pytest.raises(LengthError, match="leave some of 5 processes without one"):
        task.doc_iterator(rank=0, world_size=5)


def answered(task: Any, shares: list[Any]) -> list[Any]:
    """The shares, once every prompt has an answer."""
    for instance in task.instances:
        instance.resps.append((-1.0, True))
    task.apply_filters()
    return shares


def test_the_chat_template_stays_around_what_is_cropped(evaluate: Any) -> None:
    class Chat(Scripted):
        tokenizer_name = "chat"

        def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            text = "".join(f"<|{message['role']}|>{message['content']}" for message in messages)
            return text + ("<|assistant|>" if add_generation_prompt else "")

    options = {"apply_chat_template": True, "system_instruction": "Be brief."}
    for task in ("passkey_extrapolate", "passkey_extrapolate_generate"):
        results = evaluate(Chat(lambda *_: True, 10_000), [task], options=options, tokenizer=make_tokenizer("bpe"), **SMALL)
        assert results["configs"][task]["chat_template"] is True
        assert results["configs"][task]["system_instruction"] == "Be brief."
        cropped = [sample for sample in results["samples"][task] if sample["doc"].get("control") == "cropped"]
        for sample in cropped:
            prompt, rest = sample["arguments"][0]
            assert prompt.startswith("<|system|>Be brief.<|user|>")
            assert "There is an important info" not in prompt
            own = len(make_tokenizer("bpe").encode(prompt + (rest if isinstance(rest, str) else "")))
            assert own + (0 if isinstance(rest, str) else rest["max_gen_toks"]) == sample["doc"]["prompt_tokens"] <= TRAINED
        assert len(cropped) == 12


# ---------------------------------------------------------------------- where there can be none


def test_a_task_of_losses_refuses_controls(load: Any) -> None:
    with pytest.raises(TaskFileError, match="metadata: field 'controls': found True, but loss_extrapolate hides nothing"):
        load("loss_extrapolate", controls=True)
    load("loss_extrapolate", controls=False)


def test_without_a_trained_length_there_are_no_controls(evaluate: Any) -> None:
    with pytest.raises(LengthError, match="controls were asked for, but no trained length is known"):
        evaluate(
            Scripted(lambda *_: True, 10_000),
            ["passkey_extrapolate"],
            tokenizer=make_tokenizer("bpe"),
            lengths=[400],
            controls=True,
        )


def test_controls_are_asked_for_by_true_alone(load: Any) -> None:
    with pytest.raises(TaskFileError, match="field 'controls': found 'cropped'; expected true or false"):
        load("passkey_extrapolate", controls="cropped")
    with pytest.raises(TaskFileError, match="unknown field 'control'; did you mean 'controls'"):
        load("passkey_extrapolate", control=True)


def test_a_task_file_may_ask_for_controls(evaluate: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("include: passkey.yaml\ntask: mine\ncontrols: true\n")
    from harness_ext._bridge import tasks_dir

    (tmp_path / "passkey.yaml").write_text((tasks_dir() / "passkey.yaml").read_text())
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_defaults=False,
        include_path=str(tmp_path),
        metadata={"tokenizer": make_tokenizer("bpe"), **{name: SMALL[name] for name in ("trained_length", "samples", "depths")}},
    )
    results = lm_eval.simple_evaluate(Scripted(lambda *_: True, 10_000), tasks=["mine"], task_manager=manager, bootstrap_iters=0)
    assert find(results, "mine", "no_haystack") == {0: 1.0}


def test_a_comparison_leaves_controls_aside() -> None:
    from test_compare import METADATA, Planted

    asked = Asked(
        model="reference/rope", methods=("none", "yarn"), tasks=("passkey_extrapolate",), metadata={**METADATA, "controls": True}
    )
    found = compare_methods(asked, build=lambda *_: Planted(100_000))
    assert {(cell.method, cell.n) for cell in found.cells} == {("none", 6), ("yarn", 6)}
