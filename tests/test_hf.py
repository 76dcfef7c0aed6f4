"""`hf-extrapolate` against lm_eval's own `hf`, on tiny models of many families with random weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from scripted import curve
from tokenizers_here import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from harness_ext import positions
from harness_ext.errors import ModelError, PromptTooLongError
from harness_ext.models.hf import HFExtrapolate

LENGTH = 64
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 600}
KV = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "pad_token_id": 0}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 600, "n_positions": LENGTH, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": KV,
    "mistral": {**KV, "sliding_window": 16},
    "qwen2": KV,
    "qwen3": {**KV, "head_dim": 8},
    "gemma2": {**KV, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "phi": {**KV, "partial_rotary_factor": 0.5},
    "gpt_neox": {**SMALL, "max_position_embeddings": LENGTH},
    "gpt2": GPT,
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "vocab_size": 600,
        "max_position_embeddings": LENGTH,
        "word_embed_proj_dim": 32,
        "pad_token_id": 1,
    },
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
        "vocab_size": 600,
        "max_position_embeddings": LENGTH,
    },
    "gptj": {**GPT, "rotary_dim": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 600},
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 600,
        "max_position_embeddings": LENGTH,
    },
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 600, "max_seq_len": LENGTH},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 600, "state_size": 4},
}
HARD = {"gpt2", "opt", "gpt_neo", "gptj", "mpt"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family → a folder with the model and the BPE tokenizer."""
    root = tmp_path_factory.mktemp("models")

    def save(family: str, **changes: Any) -> Path:
        folder: Path = root / f"{family}{len(changes)}"
        if not folder.exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**FAMILIES[family], **changes}))
            for parameter in model.parameters():  # flat initial weights make near-ties of every token
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(folder)
            make_tokenizer("bpe").save_pretrained(folder)
        return folder

    return save


def requests(count: int, longest: int) -> list[Instance]:
    rng, text = random.Random(0), "The old farmer carried a box near the river. " * 40
    made = []
    for index in range(count):
        start, size = rng.randrange(200), rng.randrange(8, longest)
        words = text[start:].split(" ")[: size // 4 + 1]
        made.append(
            Instance("loglikelihood", {}, (" ".join(words), rng.choice((" lamp", " the kettle", " 71432"))), index, ("t", index, 1))
        )
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_scores_within_the_trained_length_are_those_of_hf(family: str, batch_size: Any, saved: Any) -> None:
    options = {"pretrained": str(saved(family)), "device": "cpu", "dtype": "float32"}
    theirs = HFLM(**options, batch_size=1).loglikelihood(requests(12, 48), disable_tqdm=True)
    ours = HFExtrapolate(**options, batch_size=batch_size).loglikelihood(requests(12, 48), disable_tqdm=True)
    for (likelihood, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert likelihood == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


def test_a_greedy_match_is_found_where_there_is_one(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32")
    context = model.tok_encode("The old farmer carried")
    with torch.no_grad():
        best = int(model.model(torch.tensor([context])).logits[0, -1].argmax())
    assert model._loglikelihood_tokens([(None, context, [best]), (None, context, [best - 1])]) == [
        (pytest.approx(model._loglikelihood_tokens([(None, context, [best])])[0][0]), True),
        (pytest.approx(model._loglikelihood_tokens([(None, context, [best - 1])])[0][0]), False),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_past_the_trained_length_it_goes_on_or_says_that_it_cannot(family: str, saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved(family)), device="cpu", dtype="float32")
    long = [(None, [7] * (2 * LENGTH), [9])]
    if family in HARD:
        assert [limit.tokens for limit in model.length_limits] == [LENGTH]
        with pytest.raises(PromptTooLongError, match=f"ends at {LENGTH}"):
            model._loglikelihood_tokens(long)
    else:
        assert not model.length_limits
        (answer,) = model._loglikelihood_tokens(long)
        with torch.no_grad():
            logits = model.model(torch.tensor([[7] * (2 * LENGTH)])).logits[0, -1].log_softmax(-1)
        assert answer[0] == pytest.approx(float(logits[9]), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_past_the_trained_length_ends_well_in_every_family(family: str, saved: Any, evaluate: Any) -> None:
    field = positions.TABLES.get(family, "max_position_embeddings")
    model = HFExtrapolate(pretrained=str(saved(family, **{field: 200})), trained_length=200, device="cpu", dtype="float32")
    results = evaluate(model, ["passkey_extrapolate"], multiples=[1, 2, 4], depths=2, samples=1)
    measured = {200} if family in HARD else {200, 400, 800}
    assert set(curve(results, "passkey_extrapolate")) == measured
    outcomes = {cell["length"]: cell["outcome"] for cell in results["configs"]["passkey_extrapolate"]["lengths"]}
    assert outcomes == {length: "measured" if length in measured else "hard_limit" for length in (200, 400, 800)}


def test_the_limit_found_is_where_the_forward_fails(saved: Any) -> None:
    for family in sorted(HARD):
        model = AutoModelForCausalLM.from_pretrained(saved(family))
        model(torch.zeros(1, LENGTH, dtype=torch.long))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.zeros(1, LENGTH + 1, dtype=torch.long))


def test_a_config_argument_that_extends_a_table_moves_the_limit_and_not_the_trained_length(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("gptj")), n_positions=4 * LENGTH, device="cpu", dtype="float32")
    assert [limit.tokens for limit in model.length_limits] == [4 * LENGTH]
    assert model.trained_length is not None
    assert model.trained_length.tokens == LENGTH


def test_max_length_is_a_limit_and_never_a_truncation(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), max_length=100, device="cpu", dtype="float32")
    assert model.max_length == 100
    with pytest.raises(PromptTooLongError, match="max_length=100"):
        model._loglikelihood_tokens([(None, [7] * 101, [9])])
    with pytest.raises(ModelError, match="truncation"):
        HFExtrapolate(pretrained=str(saved("llama")), truncation=True)


def test_only_the_scored_logits_are_computed(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32")
    seen: list[int] = []
    model.model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model._loglikelihood_tokens([(None, [7] * 50, [9, 8, 7])])
    assert seen == [3]


def test_generation_past_the_trained_length_sees_the_whole_prompt(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32")
    prompt = "The old farmer carried a box near the river. " * 12
    ids = torch.tensor([model.tok_encode(prompt)])
    assert ids.shape[1] > LENGTH
    expected = model.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    request = Instance("generate_until", {}, (prompt, {"until": ["@@@"], "max_gen_toks": 8, "do_sample": False}), 0, ("t", 0, 1))
    assert model.generate_until([request], disable_tqdm=True) == [model.tok_decode(expected.tolist())]


def test_an_automatic_batch_of_long_prompts_is_probed_at_the_trained_length(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32", batch_size="auto", max_batch_size=8)
    probed: list[tuple[int, ...]] = []
    call = HFLM._model_call
    monkeypatch.setattr(
        HFLM, "_model_call", lambda self, tokens, **rest: probed.append(tuple(tokens.shape)) or call(self, tokens, **rest)
    )
    request = Instance(
        "generate_until", {}, ("The old farmer carried a box. " * 20, {"until": ["@@@"], "max_gen_toks": 4}), 0, ("t", 0, 1)
    )
    assert len(model.generate_until([request] * 3, disable_tqdm=True)) == 3
    assert set(probed) == {(8, LENGTH)}


def test_rolling_windows_do_not_depend_on_what_another_task_asked_for(saved: Any) -> None:
    text = Instance("loglikelihood_rolling", {}, ("The old farmer carried a box near the river. " * 20,), 0, ("t", 0, 1))
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32")
    before = model.loglikelihood_rolling([text], disable_tqdm=True)
    model.lift(4 * LENGTH)
    assert model.max_length == 4 * LENGTH
    assert model.loglikelihood_rolling([text], disable_tqdm=True) == before
    assert before == pytest.approx(
        HFLM(pretrained=str(saved("llama")), device="cpu").loglikelihood_rolling([text], disable_tqdm=True), abs=1e-3
    )


@pytest.mark.parametrize("kind", ["byte", "wordpiece"])
def test_an_eos_that_the_tokenizer_appends_does_not_stand_before_the_answer(kind: str, saved: Any) -> None:
    tokenizer = make_tokenizer(kind)
    model = HFExtrapolate(pretrained=str(saved("llama")), tokenizer=tokenizer, device="cpu", dtype="float32")
    context, answer = model._encode_pair("What is the box?", " The box")
    assert context + answer == tokenizer.encode("What is the box? The box")[:-1]
    assert tokenizer.decode(answer).strip().lower() == "the box"
    assert model.tok_batch_encode(["What is"])[0].tolist() == [tokenizer.encode("What is")[:-1]]


def test_without_a_device_it_runs_where_it_can(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")))
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert found is not None
    assert model.device.type == found.type
    assert len(model._loglikelihood_tokens([(None, [7, 8], [9])])) == 1


def test_alibi_in_low_precision_is_said_to_be_a_confound(saved: Any, caplog: pytest.LogCaptureFixture) -> None:
    HFExtrapolate(pretrained=str(saved("bloom")), device="cpu", dtype="float32")
    assert "ALiBi" not in caplog.text
    HFExtrapolate(pretrained=str(saved("bloom")), device="cpu", dtype="bfloat16")
    assert "rounding grows with the position" in caplog.text


def test_an_unknown_model_is_one_error_before_any_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model '.*nowhere' was asked for"):
        HFExtrapolate(pretrained=str(tmp_path / "nowhere"), device="cpu")
    with pytest.raises(ModelError, match="embedded: reference/rope"):
        HFExtrapolate(pretrained="reference/nothing", device="cpu")


def test_an_unreadable_tokenizer_is_one_error_before_any_weights(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFLM, "_create_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(ModelError, match="tokenizer of"):
        HFExtrapolate(pretrained=str(saved("llama")), tokenizer=str(tmp_path), device="cpu")
