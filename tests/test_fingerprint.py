"""A prompt's fingerprint is over the tokens that the model is given, whichever backend gives them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from scripted import Scripted
from tokenizers_here import KINDS, corpus, make_tokenizer

from harness_ext.model_view import ModelView
from harness_ext.models.hf import HFExtrapolate
from harness_ext.sweep.fingerprint import DIGITS, fingerprint
from harness_ext.sweep.loss import LossTask
from harness_ext.sweep.spec import LossSpec, TaskSpec
from harness_ext.sweep.tasks import ExtrapolateTask

SMALL = {"lengths": [200, 700], "depths": 2, "samples": 2, "max_length": 1000}
TASKS = ["passkey_extrapolate", "niah_sweep_extrapolate", "copy_extrapolate", "loss_extrapolate"]


def given_to(model: Any) -> list[str]:
    """The fingerprints of what a model's innermost method is given, as it comes."""
    seen: list[str] = []
    score = model._loglikelihood_tokens

    def spy(requests: Any, **options: Any) -> Any:
        seen.extend(fingerprint([*context, *answer], len(context)) for _, context, answer in requests)
        return score(requests, **options)

    model._loglikelihood_tokens = spy
    return seen


@pytest.mark.parametrize("backend", [HFLM, HFExtrapolate])
@pytest.mark.parametrize("task", TASKS)
def test_it_is_over_the_tokens_that_the_model_is_given(backend: Any, task: str, evaluate: Any, saved: Any) -> None:
    folder = str(saved("llama", max_position_embeddings=1000))
    model = backend(pretrained=folder, device="cpu", max_length=1000, batch_size=4)
    seen = given_to(model)
    results = evaluate(model, [task], **SMALL | {"lengths": [800, 900]})
    docs = [sample["doc"] for sample in results["samples"][task]]
    assert sorted(seen) == sorted(doc["prompt_fingerprint"] for doc in docs)
    assert len(set(seen)) == len(docs)
    view = ModelView(None, {"tokenizer": folder})
    for sample in results["samples"][task]:
        ids, start = view.encode_scored(*sample["arguments"][0])
        assert sample["doc"]["prompt_fingerprint"] == fingerprint(ids, start)
        assert sample["doc"].get("answer_tokens", sample["doc"].get("scored_tokens")) == len(ids) - start


def test_an_encoder_decoders_is_over_both_of_its_texts(evaluate: Any, saved: Any) -> None:
    family = next(name for name, known in FAMILIES.items() if known.seq2seq)
    model = HFExtrapolate(pretrained=str(saved(family)), device="cpu", backend="seq2seq", trained_length=300)
    seen = given_to(model)
    results = evaluate(model, [TASKS[0]], **SMALL | {"lengths": [200, 300]})
    assert sorted(seen) == sorted(sample["doc"]["prompt_fingerprint"] for sample in results["samples"][TASKS[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_where_an_answer_is_generated_it_is_over_the_context_and_the_settings(kind: str, evaluate: Any) -> None:
    name = "passkey_extrapolate_generate"
    found = {}
    for settings in ({}, {"max_gen_toks": 40}, {"until": ["."]}):
        results = evaluate(
            Scripted(lambda *_: True, 10_000),
            [name],
            options={"gen_kwargs": settings or None},
            tokenizer=make_tokenizer(kind),
            **SMALL | {"lengths": [800]},
        )
        for sample in results["samples"][name]:
            context, asked = sample["arguments"][0]
            ids = make_tokenizer(kind).encode(context)
            assert sample["doc"]["prompt_fingerprint"] == fingerprint(ids, asked)
            assert sample["doc"]["answer_tokens"] == 0
            assert sample["doc"]["prompt_tokens"] == len(ids) + asked["max_gen_toks"] == 800
        found[str(settings)] = {sample["doc"]["prompt_fingerprint"] for sample in results["samples"][name]}
    assert len(set.union(*found.values())) == sum(map(len, found.values()))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.integers(0, 20), st.data())
def test_it_changes_with_every_token_and_with_what_is_done_with_them(ids: list[int], start: int, data: st.DataObject) -> None:
    own = fingerprint(ids, start)
    assert len(own) == DIGITS
    assert own == fingerprint(tuple(ids), start)
    others = [fingerprint([*ids, 0], start), fingerprint(ids, start + 1), fingerprint(ids, {"max_gen_toks": start})]
    if ids:
        place = data.draw(st.integers(0, len(ids) - 1))
        others.append(fingerprint([*ids[:place], (ids[place] + 1) % 2**32, *ids[place + 1 :]], start))
    assert len({own, *others}) == len(others) + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", ["The sky is blue. What is it? It is", "One. Two. Three \n", "A.", "One. It. "])
def test_an_answer_begins_where_the_tokens_of_its_context_end(kind: str, context: str) -> None:
    tokenizer = make_tokenizer(kind)
    ids, start = ModelView(None, {"tokenizer": tokenizer}).encode_scored(context, " 123 and 45.")
    assert ids == tokenizer.encode(context + " 123 and 45.")
    assert start == len(tokenizer.encode(context.rstrip()))


def rebuild(config: dict[str, Any], lm: Any) -> list[dict[str, Any]]:
    """The records of a task made again, from what lm_eval's results file holds of it and the model's tokenizer."""
    kind, spec = (LossTask, LossSpec) if "edges" in config else (ExtrapolateTask, TaskSpec)
    fields = {field.name: config[field.name] for field in dataclasses.fields(spec)}
    planned = [cell["length"] for cell in config["lengths"] if cell["outcome"] in ("measured", "out_of_memory", "interrupted")]
    fields |= {"haystack": config["haystack_source"], "lengths": planned}
    known = {"version": config["metadata"]["version"], "trained_length": config["trained_length"]["tokens"]}
    task = kind({**fields, "metadata": {**known, "tokenizer": make_tokenizer("bpe"), "max_length": max(planned)}})
    if "generation_kwargs" in config:
        task.set_config("generation_kwargs", config["generation_kwargs"])
    around = {"apply_chat_template": config.get("chat_template"), "system_instruction": config.get("system_instruction")}
    task.build_all_requests(chat_template=lm.apply_chat_template, **around)
    return [instance.doc for instance in task.instances]


class Chat(Scripted):
    """Lays messages out."""

    tokenizer_name = "chat"

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return (
            "".join(f"<|{message['role']}|>{message['content']}" for message in messages) + "<|assistant|>" * add_generation_prompt
        )

    def chat_template(self, _: Any = False) -> str:
        return "a template"


@pytest.mark.parametrize(
    ("names", "options", "changes"),
    [
        (["passkey_extrapolate", "niah_multikey_extrapolate", "copy_extrapolate"], {}, {"controls": True, "multiples": [1, 1.5]}),
        (
            ["niah_sweep_extrapolate", "niah_multiquery_extrapolate"],
            {},
            {"haystack": "needles", "seed": 7, "multiples": [1.7, 2.3]},
        ),
        (["loss_extrapolate"], {}, {"buckets": 5, "seed": 3}),
        (["loss_extrapolate", "passkey_extrapolate"], {}, {"haystack": "FILE"}),
        (
            ["niah_single_extrapolate", "niah_multivalue_extrapolate_generate"],
            {"apply_chat_template": True, "system_instruction": "Be brief.", "gen_kwargs": {"max_gen_toks": 60}},
            {"multiples": [1, 2]},
        ),
    ],
)
def test_a_results_file_repeats_its_prompts(
    evaluate: Any, tmp_path: Path, names: list[str], options: dict[str, Any], changes: dict[str, Any]
) -> None:
    if changes.get("haystack") == "FILE":
        (tmp_path / "book.txt").write_text(" ".join(corpus()))
        changes = {**changes, "haystack": str(tmp_path / "book.txt")}
    asked = {"trained_length": 800, "multiples": [1], "depths": 3, "samples": 2, **changes}
    if any("sweep" in name for name in names):
        asked["depths"] = 4
    lm = Chat(lambda *_: True, 10_000)
    tracker = EvaluationTracker(output_path=str(tmp_path))
    options = {**options, "evaluation_tracker": tracker}
    results = evaluate(lm, names, options=options, tokenizer=make_tokenizer("bpe"), **asked)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    (file,) = tmp_path.rglob("results_*.json")
    configs = json.loads(file.read_text())["configs"]
    for name in names:
        again = rebuild(configs[name], lm)
        assert again == [sample["doc"] for sample in samples[name]]
        assert len({doc["prompt_fingerprint"] for doc in again}) > len(again) / 2
        assert len(configs[name]["haystack_sha256"]) == (64 if "book" in configs[name]["haystack"] else 0)
