"""The tasks through lm_eval itself, answered by scripted models whose curve is planted."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, curve
from tokenizers_here import make_tokenizer

from harness_ext.errors import HarnessExtError, HaystackError, LengthError, ModelError, TaskFileError
from harness_ext.sweep import haystack

SMALL = {"trained_length": 600, "multiples": [1, 2, 4], "depths": [0, 0.5, 1], "samples": 2}
ALL = [
    "passkey_extrapolate",
    "niah_single_extrapolate",
    "niah_multikey_extrapolate",
    "niah_multivalue_extrapolate",
    "niah_multiquery_extrapolate",
    "copy_extrapolate",
]


def tokens(text: str) -> list[int]:
    ids: list[int] = make_tokenizer("bpe").encode(text)
    return ids


@pytest.mark.parametrize("suffix", ["", "_generate"])
@pytest.mark.parametrize(("knows", "score"), [(True, 1.0), (False, 0.0)])
def test_a_model_that_knows_scores_one_at_every_length_and_one_that_does_not_zero(
    evaluate: Any, suffix: str, knows: bool, score: float
) -> None:
    names = [f"{name}{suffix}" for name in ALL]
    model = Scripted(lambda prompt, answer: knows, max_length=10_000)
    results = evaluate(model, names, tokenizer=make_tokenizer("bpe"), **SMALL)
    for name in names:
        assert curve(results, name) == {600: score, 1200: score, 2400: score}


def test_a_model_that_sees_the_last_tokens_fails_exactly_where_the_needle_is_further(evaluate: Any) -> None:
    def sees(prompt: str, answer: str) -> bool:
        ids = tokens(prompt)[-700:]
        return f"The pass key is {answer.strip()}. Remember it." in make_tokenizer("bpe").decode(ids)

    results = evaluate(
        Scripted(sees, max_length=10_000), ["passkey_extrapolate"], tokenizer=make_tokenizer("bpe"), **SMALL | {"depths": 5}
    )
    for sample in results["samples"]["passkey_extrapolate"]:
        prompt, answer = sample["arguments"][0]
        distance = len(tokens(prompt[prompt.index("The pass key is " + answer.strip()) :]))
        at = next(key for key in sample if key.startswith("exact@"))
        assert sample[at] == float(distance <= 700)
    scores = curve(results, "passkey_extrapolate")
    assert scores[600] == 1.0
    assert scores[600] > scores[1200] > scores[2400] > 0


def test_a_sample_carries_what_describes_and_regenerates_it_and_not_the_prompt_twice(evaluate: Any) -> None:
    results = evaluate(
        Scripted(lambda *_: True, 10_000), ["niah_single_extrapolate"], tokenizer=make_tokenizer("bpe"), seed=3, **SMALL
    )
    for sample in results["samples"]["niah_single_extrapolate"]:
        doc, (prompt, answer) = sample["doc"], sample["arguments"][0]
        assert doc["prompt_tokens"] == doc["length"] == len(tokens(prompt + answer))
        assert doc["multiple"] == doc["length"] / 600
        assert doc["seed"] == 3
        assert doc["answer"] == answer.strip()
        assert abs(doc["depth"] - doc["depth_realised"]) < 0.1
        assert len(json.dumps(doc)) < 400 < len(prompt)


def test_values_have_one_width_and_differ_between_samples(evaluate: Any) -> None:
    results = evaluate(
        Scripted(lambda *_: True, 10_000), ["passkey_extrapolate"], tokenizer=make_tokenizer("bpe"), **SMALL | {"samples": 30}
    )
    answers = {(doc["sample"], doc["answer"]) for doc in (sample["doc"] for sample in results["samples"]["passkey_extrapolate"])}
    assert len(answers) == len({answer for _, answer in answers}) == 30
    assert {len(answer) for _, answer in answers} == {5}


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("passkey", 0.47),
        ("niah_single", 0.52),
        ("niah_multikey", 0.60),
        ("niah_multivalue", 0.59),
        ("niah_multiquery", 0.60),
        ("copy", 0.53),
    ],
)
def test_of_the_tokens_of_a_default_sweep_only_a_part_is_distinct(load: Any, name: str, share: float) -> None:
    tokenizer = make_tokenizer("byte")
    task = load(f"{name}_extrapolate", tokenizer=tokenizer, lengths=[1000, 2000, 4000], samples=1, max_length=4000)
    task.build_all_requests()
    rows = [tokenizer.encode("".join(instance.args), add_special_tokens=False) for instance in task.instances]
    assert sum(map(len, rows)) == 10 * (999 + 1999 + 3999)
    nodes: dict[tuple[int, int], int] = {}
    for row in rows:
        node = 0
        for token in row:
            node = nodes.setdefault((node, token), len(nodes) + 1)
    assert len(nodes) / sum(map(len, rows)) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("suffix", ["", "_generate"])
def test_a_sweep_of_needles_costs_one_context_and_is_scored_at_every_depth(evaluate: Any, suffix: str) -> None:
    name = f"niah_sweep_extrapolate{suffix}"

    def knows_the_first_half(prompt: str, answer: str) -> bool:
        (key,) = re.findall(r"magic number for ([a-z-]+) mentioned in the provided text\?", prompt)
        assert prompt.count(f"for {key} is: {answer.strip()}.") == 1
        return prompt.index(answer.strip()) < len(prompt) / 2

    model = Scripted(knows_the_first_half, max_length=10_000)
    results = evaluate(model, [name], tokenizer=make_tokenizer("bpe"), lengths=[2000, 4000], samples=2)
    assert curve(results, name) == {2000: 0.5, 4000: 0.5}
    docs = [sample["doc"] for sample in results["samples"][name]]
    assert Counter((doc["length"], doc["sample"]) for doc in docs) == dict.fromkeys(
        itertools.product((2000, 4000), (0, 1)), len({doc["depth"] for doc in docs})
    )
    assert len({prompt.rpartition("\n")[0] for prompt in model.prompts}) == 4
    assert len({doc["answer"] for doc in docs}) == 2 * 16


def test_a_sweep_of_needles_leaves_out_what_is_too_short_for_all_of_them(evaluate: Any) -> None:
    results = evaluate(
        Scripted(lambda *_: True, 10_000),
        ["niah_sweep_extrapolate"],
        tokenizer=make_tokenizer("bpe"),
        trained_length=1000,
        samples=1,
    )
    lengths = results["configs"]["niah_sweep_extrapolate"]["lengths"]
    assert [cell["outcome"] for cell in lengths] == ["too_short", "measured", "measured", "measured", "measured"]


@pytest.mark.parametrize("limit", [1, 3, 7, 15])
def test_a_limit_takes_that_many_prompts_balanced_over_lengths_and_depths(evaluate: Any, limit: int) -> None:
    model = Scripted(lambda *_: True, 10_000)
    results = evaluate(model, ["passkey_extrapolate"], limit=limit, tokenizer=make_tokenizer("bpe"), **SMALL)
    docs = [sample["doc"] for sample in results["samples"]["passkey_extrapolate"]]
    assert len(docs) == len(model.prompts) == limit
    for axis, size in (("length", 3), ("depth", 3)):
        counts = Counter(doc[axis] for doc in docs)
        assert max(counts.values()) - (min(counts.values()) if len(counts) == size else 0) <= 1


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_prompts_and_each_has_every_length(load: Any, processes: int) -> None:
    task = load("passkey_extrapolate", tokenizer=make_tokenizer("bpe"), max_length=10_000, **SMALL)
    shares = [[doc_id for doc_id, _ in task.doc_iterator(rank=rank, world_size=processes)] for rank in range(processes)]
    assert sorted(itertools.chain(*shares)) == list(range(18))
    for share in shares:
        assert Counter(task.eval_docs[doc_id]["length"] for doc_id in share) == {
            length: len(share) // 3 for length in (600, 1200, 2400)
        }
    owners = [{task.eval_docs[doc_id]["sample"] for doc_id in share} for share in shares]
    assert max(map(len, owners)) <= (1 if processes == 2 else 2)  # a sample's prompts share their haystack: one process reads it
    with pytest.raises(LengthError, match="at least 6"):
        task.doc_iterator(rank=0, world_size=2, limit=4)


def test_lengths_past_a_models_max_length_are_left_out_and_said(evaluate: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = Scripted(lambda *_: True, max_length=1200)
    results = evaluate(model, ["passkey_extrapolate"], tokenizer=make_tokenizer("bpe"), **SMALL)
    assert set(curve(results, "passkey_extrapolate")) == {600, 1200}
    assert max(len(tokens(prompt)) for prompt in model.prompts) < 1200
    assert "left out 2400 (4x) tokens" in caplog.text
    assert "hf-extrapolate" in caplog.text
    plan = results["configs"]["passkey_extrapolate"]["lengths"]
    assert [(cell["length"], cell["outcome"]) for cell in plan] == [(600, "measured"), (1200, "measured"), (2400, "backend_limit")]


def test_a_model_that_says_no_max_length_is_run_up_to_the_trained_length(evaluate: Any) -> None:
    results = evaluate(Scripted(lambda *_: True), ["passkey_extrapolate"], tokenizer=make_tokenizer("bpe"), **SMALL)
    assert set(curve(results, "passkey_extrapolate")) == {600}


def test_no_length_in_reach_is_an_error(evaluate: Any) -> None:
    with pytest.raises(LengthError, match="no length can be run"):
        evaluate(Scripted(lambda *_: True, 300), ["passkey_extrapolate"], tokenizer=make_tokenizer("bpe"), **SMALL)


def test_the_plain_hf_backend_is_never_given_a_truncated_prompt(
    evaluate: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=400,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer("bpe").save_pretrained(tmp_path)
    asked = {"multiples": [0.5, 1, 2], "depths": 2, "samples": 1, "pretrained": str(tmp_path)}
    results = evaluate(HFLM(pretrained=str(tmp_path), device="cpu"), ["passkey_extrapolate"], **asked)
    assert set(curve(results, "passkey_extrapolate")) == {200, 400}
    results = evaluate(HFLM(pretrained=str(tmp_path), device="cpu", max_length=800), ["passkey_extrapolate"], **asked)
    assert set(curve(results, "passkey_extrapolate")) == {200, 400, 800}
    assert "runcat" not in caplog.text.replace("would be given a truncated prompt", "")


def test_chat_template_and_answer_budget_are_part_of_the_length(evaluate: Any) -> None:
    tokenizer = make_tokenizer("bpe")

    class Chat(Scripted):
        tokenizer_name = "chat"

        def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            text = "".join(f"<|{message['role']}|>{message['content']}" for message in messages)
            return text + ("<|assistant|>" if add_generation_prompt else "")

    options = {"apply_chat_template": True, "system_instruction": "Be brief."}
    for name in ("passkey_extrapolate", "passkey_extrapolate_generate"):
        results = evaluate(Chat(lambda *_: True, 10_000), [name], options=options, tokenizer=tokenizer, **SMALL)
        for sample in results["samples"][name]:
            prompt, rest = sample["arguments"][0]
            budget = 32 if name.endswith("_generate") else len(tokens(prompt + rest)) - len(tokens(prompt))
            assert not name.endswith("_generate") or rest["until"] == []  # an answer in chat may have paragraphs
            assert len(tokens(prompt)) + budget == sample["doc"]["length"]
            assert prompt.startswith("<|system|>Be brief.<|user|>There is")
            assert prompt.endswith("<|assistant|>" if name.endswith("_generate") else "<|assistant|>The pass key is")


def test_messages_that_a_chat_server_lays_out_are_counted_by_the_named_tokenizers_template(evaluate: Any) -> None:
    from lm_eval.models.api_models import JsonChatStr
    from transformers import PreTrainedTokenizerFast

    class ChatServer(Scripted):
        tokenizer_name = "chat"

        def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> JsonChatStr:
            return JsonChatStr(json.dumps(messages))

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer("bpe").backend_tokenizer)
    ask = {"options": {"apply_chat_template": True}, "tokenizer": tokenizer, **SMALL}
    with pytest.raises(ModelError, match="has its chat template"):
        evaluate(ChatServer(lambda *_: True, 10_000), ["passkey_extrapolate_generate"], **ask)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}\n{% endfor %}<|assistant|>"
    results = evaluate(ChatServer(lambda *_: True, 10_000), ["passkey_extrapolate_generate"], **ask)
    for sample in results["samples"]["passkey_extrapolate_generate"]:
        (message,) = json.loads(sample["arguments"][0][0][0])
        assert len(tokens(f"<|user|> {message['content']}\n<|assistant|>")) + 32 == sample["doc"]["length"]


@pytest.mark.parametrize("source", ["noise", "text", "needles", "file", "dataset"])
def test_every_haystack_serves(evaluate: Any, source: str, tmp_path: Path) -> None:
    text = "It was a dark night.\nThe wind blew; nobody slept. Who was it? " * 20
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in text.split("\n")))
    haystack: Any = source
    if source == "file":
        haystack = str(tmp_path / "book.txt")
    if source == "dataset":
        haystack = {"dataset": "json", "data_files": str(tmp_path / "rows.jsonl"), "column": "body"}
    results = evaluate(
        Scripted(lambda *_: True, 10_000), ["niah_single_extrapolate"], tokenizer=make_tokenizer("bpe"), haystack=haystack, **SMALL
    )
    prompts = [sample["arguments"][0][0] for sample in results["samples"]["niah_single_extrapolate"]]
    expected = {
        "noise": "The sky is blue.",
        "text": "Nobody",
        "needles": "One of the special",
        "file": "nobody slept",
        "dataset": "nobody slept",
    }
    assert all(prompt.count(expected[source]) > 1 for prompt in prompts)
    assert results["configs"]["niah_single_extrapolate"]["haystack"].startswith(source)


RUNS = {
    "Japanese without full stops": "これは日本語の文章で句点のないまま続いていくものであり、改行もなくずっと続いていきます、",
    "Thai": "ประเทศไทยเป็นประเทศที่ตั้งอยู่ในเอเชียตะวันออกเฉียงใต้และมีวัฒนธรรมที่หลากหลาย",
    "English without full stops": "the old man went to the river and saw a boat that had been left there ",
    "one long word": "abcdefghij",
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_text_without_sentences_is_a_haystack_too(evaluate: Any, kind: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(RUNS[kind] * 2000)
    asked = {"tokenizer": make_tokenizer("bpe"), "lengths": [2000], "depths": [0, 0.5, 1], "samples": 1}
    results = evaluate(Scripted(lambda *_: True, 10_000), ["passkey_extrapolate"], haystack=str(tmp_path / "text.txt"), **asked)
    samples = results["samples"]["passkey_extrapolate"]
    assert len({sample["doc"]["prompt_fingerprint"] for sample in samples}) == 3
    for sample in samples:
        assert sample["doc"]["depth_realised"] == pytest.approx(sample["doc"]["depth"], abs=0.1)
        assert sample["arguments"][0][0].count(RUNS[kind][:8]) > 4


def test_depths_that_come_out_as_one_place_are_said(evaluate: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text.txt").write_text(("word " * 55 + "end. ") * 50)
    asked = {"tokenizer": make_tokenizer("bpe"), "lengths": [200, 3000], "depths": [0, 1], "samples": 1}
    evaluate(Scripted(lambda *_: True, 10_000), ["passkey_extrapolate"], haystack=str(tmp_path / "text.txt"), **asked)
    said = [record.message for record in caplog.records if "all depths are one place" in record.message]
    assert len(said) == 1
    assert "at 200 tokens" in said[0]


@pytest.mark.parametrize(("haystack", "warned"), [("needles", True), ("text", False)])
def test_a_haystack_of_needles_that_nothing_tells_apart_is_said(
    load: Any, haystack: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("passkey_extrapolate", "niah_single_extrapolate"):
        load(name, haystack=haystack)
    assert [record.args[0] for record in caplog.records if "nothing tells the needle" in record.message] == [
        "passkey_extrapolate"
    ] * warned


def test_a_text_longer_than_what_is_read_may_end_inside_a_character(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(haystack, "MAX_CHARACTERS", 100)
    (tmp_path / "text.txt").write_text("\ufeff" + "これは日本語の文です。" * 100)
    found = haystack.open_haystack(str(tmp_path / "text.txt"), distractors=lambda *_: iter(()))
    assert found.source.startswith("これは")


BAD: list[tuple[dict[str, Any], type[HarnessExtError], str]] = [
    ({"multiples": [0]}, TaskFileError, "'multiples': found .* above 0"),
    ({"multiples": [-1]}, TaskFileError, "above 0"),
    ({"multiples": []}, TaskFileError, "above 0"),
    ({"multiples": [float("nan")]}, TaskFileError, "above 0"),
    ({"multiples": ["long"]}, TaskFileError, "above 0"),
    ({"lengths": [0]}, TaskFileError, "whole numbers of tokens"),
    ({"lengths": [512.5]}, TaskFileError, "whole numbers of tokens"),
    ({"lengths": [512], "multiples": [1]}, TaskFileError, "give one of them"),
    ({"depths": [1.5]}, TaskFileError, "'depths': found .* 0 to 1"),
    ({"depths": [-0.1]}, TaskFileError, "0 to 1"),
    ({"depths": "all"}, TaskFileError, "0 to 1"),
    ({"samples": 0}, TaskFileError, "'samples'"),
    ({"seed": "x"}, TaskFileError, "'seed'"),
    ({"multipels": [1]}, TaskFileError, "did you mean 'multiples'"),
    ({"trained_lenght": 512}, TaskFileError, "did you mean 'trained_length'"),
    ({"tokeniser": "org/name"}, TaskFileError, "did you mean 'tokenizer'"),
    ({"haystack": {"dataset": "json", "data_files": 5, "column": "body"}}, HaystackError, "cannot be loaded"),
    ({"haystack": "nowhere.txt"}, HaystackError, "'nowhere.txt', which is not there"),
    ({"haystack": {"fiel": "x"}}, HaystackError, "expected one of noise"),
    ({"haystack": {"dataset": "json"}}, HaystackError, "no column"),
]


@pytest.mark.parametrize(("metadata", "error", "message"), BAD)
def test_bad_metadata_is_one_error_when_the_task_loads(
    load: Any, metadata: Any, error: type[HarnessExtError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        load("passkey_extrapolate", **metadata)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n\n", "is empty"), (b"\xff\xfe\x00T", "expected UTF-8 text"), (b"abc\0def", "zero byte")],
)
def test_a_haystack_file_that_is_no_text_is_one_error(load: Any, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "hay").write_bytes(content)
    with pytest.raises(HaystackError, match=message):
        load("passkey_extrapolate", haystack=str(tmp_path / "hay"))


def test_a_dataset_column_that_is_not_there_names_those_that_are(load: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "One. Two."}\n')
    with pytest.raises(HaystackError, match="column 'text', found body"):
        load("passkey_extrapolate", haystack={"dataset": "json", "data_files": str(tmp_path / "rows.jsonl"), "column": "text"})


def test_a_length_too_short_says_what_would_do(evaluate: Any) -> None:
    model = Scripted(lambda *_: True, 10_000)
    with pytest.raises(LengthError, match=r"20 tokens was asked for, but this task's own text takes (\d+)"):
        evaluate(model, ["passkey_extrapolate"], tokenizer=make_tokenizer("bpe"), lengths=[20], samples=1)
    assert not model.prompts


def test_a_length_too_short_that_nobody_asked_for_is_left_out_and_said(evaluate: Any, caplog: pytest.LogCaptureFixture) -> None:
    asked = {"trained_length": 600, "depths": 2, "samples": 1}
    results = evaluate(Scripted(lambda *_: True, 10_000), ["niah_multiquery_extrapolate"], tokenizer=make_tokenizer("bpe"), **asked)
    assert set(curve(results, "niah_multiquery_extrapolate")) == {600, 1200, 2400, 4800}
    assert "left out 300 (0.5x) tokens, too_short: this task's own text takes" in caplog.text
    assert results["configs"]["niah_multiquery_extrapolate"]["lengths"][0]["outcome"] == "too_short"
    with pytest.raises(LengthError, match="300 tokens was asked for"):
        evaluate(
            Scripted(lambda *_: True, 10_000),
            ["niah_multiquery_extrapolate"],
            tokenizer=make_tokenizer("bpe"),
            multiples=[0.5, 1],
            **asked,
        )


def test_a_model_without_a_tokenizer_is_refused_and_never_guessed(evaluate: Any) -> None:
    with pytest.raises(ModelError, match="name one"):
        evaluate(Scripted(lambda *_: True, 10_000), ["passkey_extrapolate"], lengths=[400], samples=1)


def test_a_haystack_that_holds_every_value_is_refused(evaluate: Any, tmp_path: Path) -> None:
    (tmp_path / "numbers.txt").write_text(" ".join(f"{n}." for n in range(10)))
    (tmp_path / "t.yaml").write_text(
        "task: one_digit\nclass: !function harness_ext.Task\nneedle: It is {value}.\nquestion: What is it?\nvalue: digits:1\n"
    )
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_defaults=False,
        include_path=str(tmp_path),
        metadata={"tokenizer": make_tokenizer("bpe"), "lengths": [100], "haystack": str(tmp_path / "numbers.txt")},
    )
    task = manager.load(["one_digit"])["tasks"]["one_digit"]
    task.bind(Scripted(lambda *_: True, 1000))
    with pytest.raises(TaskFileError, match="ask for wider values"):
        task.build_all_requests()
