"""lm_eval's `--use_cache`: an answer that is there is not computed again, and none is given that is not the model's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import serve
from test_api import load

from harness_ext.cells import Unmeasured
from harness_ext.errors import ModelError
from harness_ext.models import self_check
from harness_ext.models.api import ApiExtrapolate
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.progress import TokenBar

SMALL = {"lengths": [200, 400], "depths": 4, "samples": 2, "trained_length": 200}
OPTIONS = {"device": "cpu", "dtype": "float32", "trained_length": 200}


def describe(found: Any) -> str:
    return json.dumps([found["results"], found["samples"]], sort_keys=True, default=str)


def list_scores(found: Any, task: str) -> list[float]:
    return [answer[0] for sample in found["samples"][task] for answers in sample["resps"] for answer in answers]


class Ask:
    """A model loaded anew for each evaluation, with a cache."""

    def __init__(self, evaluate: Any, folder: Path, cache: Path) -> None:
        self.evaluate, self.folder, self.cache = evaluate, folder, cache

    def __call__(
        self, task: str = "passkey_extrapolate", options: dict[str, Any] | None = None, **metadata: Any
    ) -> tuple[Any, dict]:
        lm = HFExtrapolate(pretrained=str(self.folder), **{**OPTIONS, **(options or {})})
        lm.model.config._name_or_path = ""
        found = self.evaluate(lm, [task], options={"use_cache": str(self.cache)}, **{**SMALL, **metadata})
        return found, found["config"]["reading"]


@pytest.fixture
def ask(evaluate: Any, saved: Any, tmp_path: Path) -> Ask:
    return Ask(evaluate, saved("llama"), tmp_path / "answers")


@pytest.mark.parametrize("task", ["passkey_extrapolate", "loss_extrapolate", "passkey_extrapolate_generate"])
@pytest.mark.parametrize("options", [{}, {"exact": True}, {"batch_size": 3}])
def test_a_run_asked_for_again_reads_nothing_and_ends_byte_for_byte_as_it_did(task: str, options: dict[str, Any], ask: Ask) -> None:
    (first, read), (again, reread) = ask(task, options), ask(task, options)
    assert describe(again) == describe(first)
    assert (read["resumed"], reread["computed"]) == (0, 0)
    assert reread["resumed"] >= 16
    assert first["config"]["use_cache"] == str(ask.cache)


def test_answers_to_other_prompts_are_found_too_and_only_the_new_are_computed(ask: Ask, evaluate: Any) -> None:
    _, few = ask(lengths=[200])
    found, read = ask()
    alone = evaluate(HFExtrapolate(pretrained=str(ask.folder), **OPTIONS), ["passkey_extrapolate"], **SMALL)
    assert read["resumed"] == 8
    assert read["computed"] <= alone["config"]["reading"]["computed"] - few["computed"] / 4
    assert list_scores(found, "passkey_extrapolate") == pytest.approx(list_scores(alone, "passkey_extrapolate"), abs=1e-4)
    _, last = ask(samples=1)
    assert (last["resumed"], last["computed"]) == (8, 0)


def test_another_way_of_reading_finds_nothing(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer's last bits follow from it: here, from whether the last layer is cut short."""
    ask()
    monkeypatch.setattr(self_check, "_count_attentions", lambda forward: 0)
    _, read = ask()
    assert read["resumed"] == 0 < read["computed"]


@pytest.mark.parametrize("task", ["passkey_extrapolate", "passkey_extrapolate_generate"])
@pytest.mark.parametrize("options", [{}, {"batch_size": 3}])
def test_what_is_there_is_no_work_that_is_left(
    task: str, options: dict[str, Any], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[TokenBar] = []
    init = TokenBar.__init__

    def watched(self: TokenBar, *given: Any, **named: Any) -> None:
        init(self, *given, **named)
        bars.append(self)

    monkeypatch.setattr(TokenBar, "__init__", watched)
    ask(task, options, lengths=[200])
    ask(task, options)
    ask(task, options)
    before, more, nothing = bars
    assert [bar.done for bar in bars] == [bar.tokens for bar in bars]
    assert nothing.tokens == 0 < before.tokens < more.tokens


def test_an_encoder_decoders_answers_are_kept_too(saved: Any, tmp_path: Path) -> None:
    asked = [(None, list(range(5, 25)), [7, 8]), (None, list(range(6, 20)), [9])]

    def run(requests: Any) -> tuple[Any, int]:
        lm = HFExtrapolate(pretrained=str(saved("bart")), backend="seq2seq", device="cpu", dtype="float32")
        with lm.evaluating(tmp_path):
            return lm._loglikelihood_tokens(requests, disable_tqdm=True), lm._reader.resumed

    (first, none), (more, one), (again, two) = run(asked[:1]), run(asked), run(asked)
    assert (none, one, two) == (0, 1, 2)
    assert again == more
    assert more[0] == first[0]


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"mixed_precision_dtype": "bfloat16"},
        {"extend": "linear", "factor": 2.0},
        {"exact": True},
        {"chunk": 64},
    ],
)
def test_another_dtype_override_or_way_of_reading_finds_nothing(options: dict[str, Any], ask: Ask) -> None:
    ask()
    assert ask(options=options)[1]["resumed"] == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda lm: setattr(lm.model.generation_config, "repetition_penalty", 1.8),
        lambda lm: setattr(lm.model.generation_config, "eos_token_id", 7),
        lambda lm: setattr(lm, "think_end_token", 7),
        lambda lm: lm.tokenizer.add_special_tokens({"eos_token": "T"}),
    ],
    ids=["penalty", "end", "thought", "tokenizer"],
)
@pytest.mark.parametrize("exact", [False, True])
def test_another_way_of_answering_finds_nothing(change: Any, exact: bool, ask: Ask, evaluate: Any) -> None:
    task, options = "passkey_extrapolate_generate", {"use_cache": str(ask.cache)}
    ask(task, {"exact": exact})
    assert ask(task, {"exact": exact})[1]["resumed"] == 16
    lm = HFExtrapolate(pretrained=str(ask.folder), **OPTIONS, exact=exact)
    lm.model.config._name_or_path = ""
    change(lm)
    assert evaluate(lm, [task], options=options, **SMALL)["config"]["reading"]["resumed"] == 0


def test_another_precision_finds_nothing_where_prompts_are_read_whole(ask: Ask) -> None:
    ask(options={"exact": True})
    assert ask(options={"exact": True})[1]["resumed"] == 16
    assert ask(options={"exact": True, "mixed_precision_dtype": "bfloat16"})[1]["resumed"] == 0


def test_an_adapter_with_another_strength_is_another_model(ask: Ask, saved: Any) -> None:
    def name(strength: int) -> str:
        lm = HFExtrapolate(pretrained=str(saved("llama")), **OPTIONS)
        lm.model.peft_config = {"default": types.SimpleNamespace(lora_alpha=strength, target_modules={"q_proj", "v_proj"})}
        with lm.evaluating():
            lm._resume("loglikelihood", [[1, 2, 3]], [2])
            assert lm._journals.opened
            return lm._journals.opened[0].file.name

    assert name(8) == name(8) != name(16)


def test_other_weights_find_nothing(ask: Ask, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ask()
    model = AutoModelForCausalLM.from_pretrained(ask.folder)
    next(model.parameters()).data.mul_(1.01)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(ask.folder).save_pretrained(tmp_path / "other")
    ask.folder = tmp_path / "other"
    assert ask()[1]["resumed"] == 0


def test_what_did_not_fit_is_tried_again(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    score = HFExtrapolate._score

    def short(self: Any, sequences: Any, *given: Any, **options: Any) -> list[Any]:
        self._memory.too_large = 300
        return score(self, sequences, *given, **options)

    monkeypatch.setattr(HFExtrapolate, "_score", short)
    found, read = ask()
    assert (
        sum(
            isinstance(answers[0][0], Unmeasured)
            for answers in (sample["resps"] for sample in found["samples"]["passkey_extrapolate"])
        )
        == 8
    )
    monkeypatch.setattr(HFExtrapolate, "_score", score)
    found, read = ask()
    assert read["resumed"] == 8
    assert not any(
        isinstance(answers[0][0], Unmeasured) for answers in (sample["resps"] for sample in found["samples"]["passkey_extrapolate"])
    )


def test_what_attention_is_watched_in_is_read_all_the_same(evaluate: Any, tmp_path: Path) -> None:
    def run() -> Any:
        lm = HFExtrapolate("reference/rope", device="cpu")
        options = {"use_cache": str(tmp_path)}
        return evaluate(lm, ["extrapolate_why"], options=options, multiples=[1, 2], depths=2, samples=1)["config"]["attention"]

    assert run() == run()


def test_the_command_line_and_two_processes_share_a_cache(tmp_path: Path) -> None:
    def run(out: str, *launcher: str) -> Any:
        asked = (
            "--model",
            "hf-extrapolate",
            "--model_args",
            "pretrained=reference/rope",
            "--tasks",
            "passkey_extrapolate",
        )
        kept = ("--use_cache", str(tmp_path / "answers"), "--output_path", str(tmp_path / out))
        few = ("--metadata", json.dumps({"samples": 2, "depths": 3, "lengths": [128, 256]}))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-m", *launcher, "lm_eval", *asked, *kept, *few]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stderr[-3000:]
        (results,) = (tmp_path / out).rglob("results_*.json")
        return json.loads(results.read_text())

    first = run("two", "torch.distributed.run", "--nproc-per-node", "2", "-m")
    again = run("one")
    assert first["config"]["reading"]["resumed"] == 0
    assert (again["config"]["reading"]["resumed"], again["config"]["reading"]["computed"]) == (12, 0)
    assert again["results"] == first["results"]
    assert again["config"]["use_cache"] == str(tmp_path / "answers")


@pytest.fixture
def server(saved: Any) -> Iterator[Any]:
    with serve(load(saved("llama"))) as served:
        yield served


def test_a_server_is_asked_only_whether_it_is_the_same(server: Any, saved: Any, evaluate: Any, tmp_path: Path) -> None:
    def run() -> tuple[str, int]:
        lm = ApiExtrapolate(base_url=server.url, model="tiny", tokenizer=str(saved("llama")))
        found = evaluate(lm, ["passkey_extrapolate"], options={"use_cache": str(tmp_path)}, **SMALL)
        return describe(found), found["config"]["server"]["resumed"]

    (first, none), (again, all_of_them) = run(), run()
    assert (again, none, all_of_them) == (first, 0, 16)
    with torch.no_grad():
        next(server.model.model.parameters()).mul_(1.001)
    assert run()[1] == 0


@pytest.mark.parametrize("model", ["vllm-extrapolate", "sglang-extrapolate"])
def test_a_model_whose_answers_are_not_kept_says_so(model: str, tmp_path: Path) -> None:
    import lm_eval

    with pytest.raises(ModelError, match=f"the answers of {model} are not kept; leave it out"):
        lm_eval.simple_evaluate(model=model, tasks=["passkey_extrapolate"], use_cache=str(tmp_path))


def test_a_file_in_the_way_is_named(ask: Ask) -> None:
    ask.cache.write_text("a file")
    with pytest.raises(ModelError, match=r"there can be no folder of that name: .* name another"):
        ask()
    assert ask.cache.read_text() == "a file"
