"""`hf-extrapolate` against lm_eval's own `hf`, on tiny models of many families with random weights."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES as KNOWN
from families import LENGTH
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from scripted import curve
from tokenizers import processors
from tokenizers_here import make_tokenizer

from harness_ext.errors import ModelError, PromptTooLongError
from harness_ext.models.hf import HFExtrapolate

FAMILIES = (
    *(
        "llama",
        "mistral-window",
        "qwen2",
        "qwen3",
        "gemma2",
        "phi",
        "gpt_neox",
        "gpt2",
        "opt",
        "gpt_neo",
        "gptj",
        "bloom",
        "falcon",
    ),
    *("mpt", "mamba", "llama-dynamic", "phi3-longrope"),
)


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


@pytest.mark.parametrize("exact", [True, False])
def test_only_the_scored_logits_are_computed(exact: bool, saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32", exact=exact)
    prompts = [(None, [7] * 50, [9, 8, 7])]
    model._loglikelihood_tokens(prompts)
    seen: list[int] = []
    model.model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model._loglikelihood_tokens(prompts)
    assert seen == [3]


def test_generation_past_the_trained_length_sees_the_whole_prompt(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32")
    prompt = "The old farmer carried a box near the river. " * 12
    ids = torch.tensor([model.tok_encode(prompt)])
    assert ids.shape[1] > LENGTH
    expected = model.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert generate(model, [prompt], max_gen_toks=8, do_sample=False) == [model.tok_decode(expected.tolist())]


@pytest.mark.parametrize("family", [name for name, known in KNOWN.items() if known.seq2seq])
def test_an_encoder_decoder_is_scored_as_hf_does_and_answers_with_as_many_tokens_as_were_asked_for(family: str, saved: Any) -> None:
    field = KNOWN[family].length_field
    folder = str(saved(family, **({field: 300} if field else {})))
    given = {"pretrained": folder, "device": "cpu", "dtype": "float32", "backend": "seq2seq"}
    ours, theirs = HFExtrapolate(**given, trained_length=LENGTH), HFLM(**given, max_length=300)
    prompts = [(None, list(range(20, 20 + count)), [9, 8, 7]) for count in (70, 9, 33)]
    if family != "fsmt":  # which hf cannot score: its forward takes the answer for the prompt's labels
        found, expected = (lm._loglikelihood_tokens(prompts, disable_tqdm=True) for lm in (ours, theirs))
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
    prompt = "The old farmer carried a box near the river. " * 9
    ids = torch.tensor([ours.tok_encode(prompt)])
    assert ids.shape[1] > LENGTH
    options = {"do_sample": False, "num_beams": 1, "pad_token_id": 0}
    expected_tokens = theirs.model.generate(ids, max_new_tokens=5, **options)[0].tolist()
    assert generate(ours, [prompt], do_sample=False, num_beams=1) == [ours.tok_decode(expected_tokens)]
    assert 2 <= len(expected_tokens) <= 6


def test_an_answer_ends_where_the_decoders_own_table_does(saved: Any) -> None:
    folder = str(saved("led", max_decoder_position_embeddings=12))
    model = HFExtrapolate(pretrained=folder, device="cpu", dtype="float32", backend="seq2seq", trained_length=LENGTH)

    def ask(budget: int) -> list[str]:
        return generate(model, ["The old farmer."], max_gen_toks=budget, do_sample=False, num_beams=1)

    def score(tokens: int) -> list[Any]:
        return list(model._loglikelihood_tokens([(None, list(range(20, 40)), [9] * tokens)], disable_tqdm=True))

    ends = model.model.generation_config
    ends.eos_token_id = ends.forced_eos_token_id = None  # so that the answer is as long as was asked for
    assert len(ask(12)) == len(score(12)) == 1
    with pytest.raises(IndexError):
        model.model(torch.full((1, 20), 7), decoder_input_ids=torch.full((1, 13), 9))
    for run in (ask, score):
        with pytest.raises(
            PromptTooLongError, match=r"an answer of 13 tokens was asked for: the decoder of led ends at 12 \(.*decoder"
        ):
            run(13)


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


def watch_generate(model: HFExtrapolate, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that generation is given from now on, without padding."""
    seen: list[list[int]] = []
    generate = model._model_generate

    def watched(context: Any, *given: Any, **options: Any) -> Any:
        seen.extend(row[kept > 0].tolist() for row, kept in zip(context, options["attention_mask"], strict=True))
        return generate(context, *given, **options)

    monkeypatch.setattr(model, "_model_generate", watched)
    return seen


def generate(model: Any, texts: list[str], **asked: Any) -> list[str]:
    asked = {"until": ["@@@"], "max_gen_toks": 5, **asked}
    requests = [Instance("generate_until", {}, (text, dict(asked)), 0, ("t", 0, 1)) for text in texts]
    return list(model.generate_until(requests, disable_tqdm=True))


def make_ending(begins: bool) -> Any:
    """A tokenizer that puts something after each text."""
    tokenizer = copy.deepcopy(make_tokenizer("sentencepiece"))
    special = [("<s>", 0), ("</s>", 1)]
    template = "<s> $A </s>" if begins else "$A </s>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize(
    "text", ["The old farmer carried a box near the river. ", "<s>The old farmer carried a box near the river. "]
)
@pytest.mark.parametrize("options", [{}, {"exact": True}, {"batch_size": 2}])
def test_an_answer_is_generated_from_all_of_its_prompt_and_nothing_else(
    begins: bool, text: str, options: dict[str, Any], saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HFExtrapolate(
        pretrained=str(saved("llama")),
        tokenizer=make_ending(begins),
        device="cpu",
        dtype="float32",
        trained_length=LENGTH,
        **options,
    )
    seen = watch_generate(model, monkeypatch)
    texts = [text + "Nobody knows what is in the box. " * count for count in (12, 11)]
    assert len(generate(model, texts)) == 2
    bare = [model.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    front = [0] if begins and not text.startswith("<s>") else []
    assert seen == [front + ids for ids in bare]


@pytest.mark.parametrize("family", ["mamba2", "llama"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "asked", [{"num_beams": 2}, {"do_sample": True, "temperature": 1.0}, {"exponential_decay_length_penalty": (2, 1.5)}]
)
def test_beams_and_drawn_answers_are_hfs(family: str, rows: int, asked: dict[str, Any], saved: Any) -> None:
    if rows > 1 and "exponential_decay_length_penalty" in asked:
        pytest.skip("hf goes on past a row's end until all have ended")
    texts = ["A box.", "The old car.", "A man ran.", "The box.", "The old car that ran.", "A hat.", "It ran."]
    given = {"pretrained": str(saved(family)), "device": "cpu", "dtype": "float32", "batch_size": rows}
    found = []
    for model in (HFLM(**given, max_length=LENGTH), HFExtrapolate(**given, trained_length=LENGTH)):
        model.model.generation_config.eos_token_id = 7 if "exponential_decay_length_penalty" in asked else None
        torch.manual_seed(0)
        found.append(generate(model, texts, **asked))
    assert found[0] == found[1]


def test_tokens_of_answers_that_share_nothing_are_counted_too(saved: Any) -> None:
    texts = ["The old farmer.", "A box near the river.", "The old farmer ran."]
    for options, asked in (({"exact": True}, {}), ({}, {"num_beams": 2})):
        model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32", **options)
        generate(model, texts, **asked)
        read = sum(len(model.tok_encode(text)) for text in texts)
        assert (model._reader.asked, model._reader.computed) == (read, read)
        assert model._reader.seconds > 0


def test_a_prompt_without_tokens_cannot_be_answered_and_says_so(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32")
    with pytest.raises(ModelError, match="the prompt '' has no tokens, so that nothing can be generated after it"):
        generate(model, ["The old farmer.", ""])


def test_an_encoder_reads_as_much_as_its_table_has_whatever_the_answer(saved: Any) -> None:
    given = {"pretrained": str(saved("bart")), "device": "cpu", "dtype": "float32", "backend": "seq2seq"}
    ours, theirs = HFExtrapolate(**given), HFLM(**given)
    prompts = [(None, [20 + index for index in range(LENGTH)], [9] * 10), (None, [7] * 5, [9] * LENGTH)]
    found, expected = (lm._loglikelihood_tokens(prompts, disable_tqdm=True) for lm in (ours, theirs))
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-3)
    text = Instance("loglikelihood_rolling", {}, ("The old farmer carried a box near the river. " * 20,), 0, ("t", 0, 1))
    rolled, known = (lm.loglikelihood_rolling([text], disable_tqdm=True) for lm in (ours, theirs))
    assert rolled == pytest.approx(known, abs=1e-2)
    with pytest.raises(PromptTooLongError):
        ours._loglikelihood_tokens([(None, [7] * (LENGTH + 1), [9])], disable_tqdm=True)


@pytest.mark.parametrize("kind", ["bpe", "byte", "wordpiece", "sentencepiece"])
def test_a_long_text_has_the_tokens_that_its_tokenizer_gives_it(kind: str, saved: Any) -> None:
    options = {"pretrained": str(saved("llama")), "tokenizer": make_tokenizer(kind), "device": "cpu"}
    text = "The old farmer carried a box near the river. What is 71432? Nobody knows. " * 40
    ours, whole = HFExtrapolate(**options).tok_encode(text), make_tokenizer(kind).encode(text)
    assert ours == (whole[:-1] if kind in ("byte", "wordpiece") else whole)  # these two end each text with a token of their own


def test_without_a_device_it_runs_where_it_can(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")))
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert found is not None
    assert model.device.type == found.type
    assert len(model._loglikelihood_tokens([(None, [7, 8], [9])])) == 1


@pytest.mark.parametrize(
    ("family", "option", "of", "said"),
    [
        ("bloom", "dtype", "ALiBi", "rounding grows with the position"),
        (
            "llama",
            "softmax_dtype",
            "softmax_dtype",
            "softmax_dtype=torch.bfloat16 was asked for; log-likelihoods are computed in float32",
        ),
    ],
)
def test_what_a_lower_precision_does_to_the_scores_or_not_is_said(
    family: str, option: str, of: str, said: str, saved: Any, caplog: pytest.LogCaptureFixture
) -> None:
    HFExtrapolate(pretrained=str(saved(family)), device="cpu", **{option: "float32"})
    assert of not in caplog.text
    HFExtrapolate(pretrained=str(saved(family)), device="cpu", **{option: "bfloat16"})
    assert said in caplog.text


def test_an_unknown_model_is_one_error_before_any_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model '.*nowhere' was asked for"):
        HFExtrapolate(pretrained=str(tmp_path / "nowhere"), device="cpu")
    with pytest.raises(ModelError, match=r"embedded: reference/.*reference/rope"):
        HFExtrapolate(pretrained="reference/nothing", device="cpu")


def test_an_unreadable_tokenizer_is_one_error_before_any_weights(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HFLM, "_create_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(ModelError, match="tokenizer of"):
        HFExtrapolate(pretrained=str(saved("llama")), tokenizer=str(tmp_path), device="cpu")


def fail_past(model: HFExtrapolate, tokens: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a forward that holds more than `tokens` tokens, all rows and what they have cached together, raises `error`."""
    forward = model.model.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        ids = args[0] if args else kwargs["input_ids"]
        past = kwargs.get("past_key_values")
        if ids.numel() + len(ids) * (past.get_seq_length() if past is not None else 0) > tokens:
            raise error
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", failing)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()],
)
@pytest.mark.parametrize("task", ["passkey_extrapolate", "passkey_extrapolate_generate"])
def test_memory_that_runs_out_is_an_outcome_and_no_score(
    task: str, error: Exception, saved: Any, evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), trained_length=200, device="cpu", dtype="float32", batch_size=3)
    fail_past(model, 500, error, monkeypatch)
    results = evaluate(model, [task], multiples=[1, 2, 4], depths=2, samples=2)
    assert set(curve(results, task)) == {200, 400}
    outcomes = {cell["length"]: cell["outcome"] for cell in results["configs"][task]["lengths"]}
    assert outcomes == {200: "measured", 400: "measured", 800: "out_of_memory"}
    assert [s["filtered_resps"] for s in results["samples"][task] if s["doc"]["length"] == 800] == [["out_of_memory"]] * 4


def test_a_batch_that_does_not_fit_is_halved_and_scored_all_the_same(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [(None, [5 + i] * 60, [9]) for i in range(7)]
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32", batch_size=7)
    expected = model._loglikelihood_tokens(prompts)
    fail_past(model, 150, torch.OutOfMemoryError("out of memory"), monkeypatch)
    for found, known in zip(model._loglikelihood_tokens(prompts), expected, strict=True):
        assert found == (pytest.approx(known[0], abs=1e-4), known[1])


def test_where_the_longest_prompts_cache_does_not_fit_shorter_ones_are_still_measured(
    saved: Any, evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = torch.Tensor.new_empty

    def limited(self: torch.Tensor, *size: int, **options: Any) -> torch.Tensor:
        if len(size) == 4 and size[2] > 500:
            raise torch.OutOfMemoryError("out of memory")
        return make(self, *size, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", limited)
    model = HFExtrapolate(pretrained=str(saved("llama")), trained_length=200, device="cpu", dtype="float32", chunk=64)
    results = evaluate(model, ["passkey_extrapolate"], multiples=[1, 2, 4], depths=2, samples=1)
    outcomes = {cell["length"]: cell["outcome"] for cell in results["configs"]["passkey_extrapolate"]["lengths"]}
    assert outcomes == {200: "measured", 400: "measured", 800: "out_of_memory"}


def test_another_error_of_the_model_is_no_outcome(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32")
    fail_past(model, 50, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes"):
        model._loglikelihood_tokens([(None, [7] * 100, [9])])


def test_a_task_that_knows_no_outcomes_is_given_an_error_and_no_zero(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32")
    fail_past(model, 50, torch.OutOfMemoryError("out of memory"), monkeypatch)
    request = Instance("loglikelihood", {"question": "?"}, ("The old farmer carried a box. " * 20, " lamp"), 0, ("foreign", 0, 1))
    with pytest.raises(ModelError, match="do not fit into the memory of cpu: foreign has no score"):
        model.loglikelihood([request], disable_tqdm=True)


def test_a_rolling_window_that_does_not_fit_is_an_error_and_no_partial_sum(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32")
    fail_past(model, 50, torch.OutOfMemoryError("out of memory"), monkeypatch)
    text = Instance("loglikelihood_rolling", {}, ("The old farmer carried a box near the river. " * 20,), 0, ("t", 0, 1))
    with pytest.raises(ModelError, match="do not fit into the memory of cpu; use a smaller max_length"):
        model.loglikelihood_rolling([text], disable_tqdm=True)


@pytest.mark.parametrize("family", ["llama", "llama-dynamic", "mamba2", "qwen3_next", "mamba"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_answers_generated_from_a_shared_beginning_are_those_of_hf(family: str, batch_size: int, saved: Any) -> None:
    hay = "The old farmer carried a box near the river. "
    contexts = [hay * 2, hay * 2 + "The box", hay * 2 + "The hat", hay + "A box", hay * 2, "One"]
    requests = [
        Instance("generate_until", {}, (context, {"until": ["@@@"], "max_gen_toks": 5}), 0, ("t", index, 1))
        for index, context in enumerate(contexts)
    ]
    options = {"pretrained": str(saved(family)), "device": "cpu", "dtype": "float32"}
    ours = HFExtrapolate(**options, batch_size=batch_size)
    assert ours.generate_until(requests, disable_tqdm=True) == [
        HFExtrapolate(**options, exact=True).generate_until([request], disable_tqdm=True)[0] for request in requests
    ]


def test_an_outcome_of_one_model_does_not_stand_in_the_next_ones_results(
    saved: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    task = load("passkey_extrapolate", multiples=[1, 2], depths=1, samples=1)
    outcomes = []
    for small in (True, False):
        model = HFExtrapolate(pretrained=str(saved("llama")), trained_length=200, device="cpu", dtype="float32")
        if small:
            fail_past(model, 300, torch.OutOfMemoryError("out of memory"), monkeypatch)
        results = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
        outcomes.append([cell["outcome"] for cell in results["configs"]["passkey_extrapolate"]["lengths"]])
    assert outcomes == [["measured", "out_of_memory"], ["measured", "measured"]]
