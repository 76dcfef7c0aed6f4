"""Every extension against the paper's formula, transformers' own computation, or a readable twin; and the proof that it was in effect."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, build
from families import FAMILIES, LENGTH
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from scripted import curve
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from harness_ext import positions
from harness_ext.errors import ModelError
from harness_ext.models.extensions import attention
from harness_ext.models.extensions.effect import read_effect
from harness_ext.models.extensions.extension import METHODS, Extension
from harness_ext.models.extensions.method import Subject
from harness_ext.models.extensions.rotary import find_rotaries
from harness_ext.models.hf import HFExtrapolate

LONG = 4 * LENGTH
BASE, DIMS = 10000.0, 32
WIDE = {"hidden_size": 128}
FACTORS = {"short_factor": [1.0] * (DIMS // 2), "long_factor": [1.0 + i / 4 for i in range(DIMS // 2)]}
RECOMPUTED = ("llama-dynamic", "llama-longrope", "phi3-longrope")
IN_HALVES_AND_PAIRS = ("llama", "phi", "gpt_neox", "cohere", "glm4", "nanochat", "persimmon", "qwen3", "ernie4_5", "diffllama")


def extend(model: Any, method: str, tokens: int = LONG, longest: int = LONG, **options: Any) -> Extension:
    subject = Subject(model=model, schemes=positions.read_schemes(model.config, model), trained=LENGTH)
    extension = Extension(METHODS[method], subject, options)
    extension.prepare(tokens, longest)
    return extension


def logits(model: Any, tokens: int, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(3, 600, (1, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits[0]
    return found


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to float32's rounding over a few layers: 2e-5 of the largest logit."""
    assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def plain() -> torch.Tensor:
    return BASE ** (-torch.arange(0, DIMS, 2, dtype=torch.float64) / DIMS)


def by_linear(s: float) -> torch.Tensor:
    return plain() / s


def by_ntk(s: float) -> torch.Tensor:
    return (BASE * s ** (DIMS / (DIMS - 2))) ** (-torch.arange(0, DIMS, 2, dtype=torch.float64) / DIMS)


def by_yarn(s: float) -> torch.Tensor:
    """arXiv 2309.00071, definitions 2 and 3, with the cut dimensions rounded outwards as in the authors' code."""

    def dimension(rotations: float) -> float:
        return DIMS * math.log(LENGTH / (rotations * 2 * math.pi)) / (2 * math.log(BASE))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), DIMS - 1)
    ramp = ((torch.arange(DIMS // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain() / s * ramp + plain() * (1 - ramp)


def by_llama3(s: float) -> torch.Tensor:
    """Wavelengths over the trained length are divided, those under a quarter of it kept."""
    rows = []
    for frequency in plain():
        turns = LENGTH * frequency / (2 * math.pi)  # in the trained length
        smooth = min(1.0, max(0.0, (turns - 1) / (4 - 1)))
        rows.append((1 - smooth) * frequency / s + smooth * frequency)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("method", "options", "expected", "attention"),
    [
        ("linear", {}, by_linear(4), 1.0),
        ("linear", {"factor": 8}, by_linear(8), 1.0),
        ("ntk", {}, by_ntk(4), 1.0),
        ("dynamic", {}, by_ntk(4), 1.0),
        ("dynamic", {"alpha": 2.0}, by_ntk(2.0 * 4 - 1), 1.0),
        ("yarn", {}, by_yarn(4), 0.1 * math.log(4) + 1),
        ("yarn", {"attention_factor": 1.25}, by_yarn(4), 1.25),
        ("llama3", {}, by_llama3(4), 1.0),
        ("longrope", FACTORS, plain() / torch.tensor(FACTORS["long_factor"]), math.sqrt(1 + math.log(4) / math.log(LENGTH))),
    ],
)
def test_frequencies_in_effect_are_the_papers(
    method: str, options: dict[str, Any], expected: torch.Tensor, attention: float
) -> None:
    model = build("llama", **WIDE)
    extend(model, method, **options)
    (rotary,) = find_rotaries(model)
    torch.testing.assert_close(rotary.frequencies.double(), expected, rtol=1e-5, atol=0)
    assert rotary.attention_factor == pytest.approx(attention)


@pytest.mark.parametrize(("method", "options"), [("none", {}), ("ntk", {}), ("yarn", {}), ("longrope", FACTORS)])
def test_the_last_bits_of_a_frequency_are_no_other_effect(method: str, options: dict[str, Any]) -> None:
    """They differ from one kind of CPU to another; a factor that is a percent larger is another."""
    model = build("llama", **WIDE)
    if method != "none":
        extend(model, method, **options)
    effect, (rotary,) = read_effect(model), find_rotaries(model)
    exact = rotary.frequencies.clone()
    for towards in (0.0, 10.0):
        rotary.frequencies.copy_(torch.nextafter(exact, torch.full_like(exact, towards)))
        assert not torch.equal(rotary.frequencies, exact)
        assert read_effect(model) == effect
    rotary.frequencies.copy_(exact / 1.01)
    assert read_effect(model)["frequencies"] != effect["frequencies"]
    assert read_effect(model)["slowest_wavelength"] == pytest.approx(1.01 * effect["slowest_wavelength"], rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "phi", "gpt_neox", "gemma3", "smollm3"])
@pytest.mark.parametrize("method", ["linear", "dynamic", "yarn", "llama3", "longrope"])
def test_logits_are_those_of_transformers_with_the_same_parameters(method: str, family: str) -> None:
    """A model that transformers builds with the merged parameters, run once at that length, so that nothing ran before it."""
    model, theirs = build(family), build(family)
    pairs = len(find_rotaries(model)[0].frequencies)
    extra = {
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 1.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": LENGTH},
        "llama3": {"factor": 4.0, "original_max_position_embeddings": LENGTH, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": {
            "factor": 4.0,
            "original_max_position_embeddings": LENGTH,
            "short_factor": [1.0] * pairs,
            "long_factor": [1.0 + i for i in range(pairs)],
        },
    }[method]
    config = copy.deepcopy(theirs.config)
    own = config.rope_parameters
    change = {"rope_type": method, **extra}
    config.rope_parameters = (
        {**own, "full_attention": {**own["full_attention"], **change}} if family == "gemma3" else {**own, **change}
    )
    expected = AutoModelForCausalLM.from_config(config).eval()
    expected.load_state_dict(theirs.state_dict())
    extend(model, method, **{name: value for name, value in extra.items() if name in METHODS[method].options})
    assert_same(logits(model, LONG), logits(expected, LONG))


def test_a_static_base_change_is_what_transformers_computes_with_that_base() -> None:
    model = build("llama", **WIDE)
    expected = build("llama", **WIDE, rope_parameters={"rope_type": "default", "rope_theta": BASE * 4 ** (DIMS / (DIMS - 2))})
    extend(model, "ntk")
    assert_same(logits(model, LONG), logits(expected, LONG))


@pytest.mark.parametrize(
    ("method", "tokens", "options"),
    [
        ("dynamic", LENGTH, {}),
        ("longrope", LENGTH, {**FACTORS, "attention_factor": 1.0}),
        ("logn", LENGTH, {}),
        ("self-extend", LENGTH // 2, {}),
        ("sinks", LENGTH - 4, {}),
    ],
)
def test_below_the_trained_length_nothing_changes_where_nothing_should(method: str, tokens: int, options: dict[str, Any]) -> None:
    model = build("llama", **WIDE)
    before, beyond = logits(model, tokens), logits(model, LONG)
    extension = extend(model, method, tokens=tokens, **options)
    assert_same(logits(model, tokens), before)
    extension.prepare(LONG, LONG)
    assert (logits(model, LONG) - beyond).abs().max() > 0.1


@pytest.mark.parametrize("family", IN_HALVES_AND_PAIRS)
def test_turning_far_keys_by_nothing_changes_nothing(family: str) -> None:
    """A group of one, and a window over everything: whatever way the family turns, the far branch is the near one."""
    for method, options in (("self-extend", {"group": 1, "window": 8}), ("sinks", {"sinks": 0, "window": LONG})):
        model = build(family)
        before = logits(model, LONG)
        extend(model, method, **options)
        torch.testing.assert_close(logits(model, LONG), before, rtol=0, atol=3e-5)


@pytest.mark.parametrize("family", ["llama", "cohere", "phi"])
@pytest.mark.parametrize(
    ("method", "options"), [("self-extend", {"group": 4, "window": 16}), ("sinks", {"sinks": 3, "window": 20})]
)
def test_far_keys_are_seen_where_the_paper_puts_them(family: str, method: str, options: dict[str, int]) -> None:
    """Against a twin that goes pair by pair: turn the query by the distance that the paper gives to the pair, the key not at all."""
    model = build(family, num_attention_heads=4, num_key_value_heads=2)
    extend(model, method, **options)
    attention = next(m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx"))
    turn = inspect.getmodule(type(attention)).apply_rotary_pos_emb  # type: ignore[union-attr]
    (rotary,) = find_rotaries(model)
    tokens, width = 60, 8
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, tokens, width, generator=generator) for heads in (4, 2, 2))

    def turned(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        cos, sin = rotary.module(x, position)
        dims = cos.shape[-1]
        return torch.cat((turn(x[..., :dims], x[..., :dims], cos, sin)[0], x[..., dims:]), dim=-1)

    places = torch.arange(tokens)[None]
    found, _ = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation](
        attention, turned(query, places), turned(key, places), value, None, scaling=0.3, position_ids=places
    )

    def distance(i: int, j: int) -> int | None:
        if j > i:
            return None
        if method == "self-extend":
            w, g = options["window"], options["group"]
            return i - j if i - j < w else (i // g + w - w // g) - j // g
        w, s = options["window"], options["sinks"]
        if i - j < w:
            return i - j
        return min(i, s + w - 1) - j if j < s else None

    expected = torch.zeros(1, tokens, 4, width)
    for head in range(4):
        for i in range(tokens):
            scores = torch.full((tokens,), -math.inf)
            for j in range(tokens):
                apart = distance(i, j)
                if apart is not None:
                    q = turned(query[:, head : head + 1, i : i + 1], torch.tensor([[apart]]))
                    scores[j] = 0.3 * (q[0, 0, 0] @ key[0, head // 2, j])
            expected[0, i, head] = scores.softmax(0) @ value[0, head // 2]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_temperature_is_what_yarn_multiplies_cosine_and_sine_with() -> None:
    """transformers' YaRN at factor 1 with an attention factor of √t is a temperature of t, where all dimensions turn."""
    model = build("llama", **WIDE)
    yarn = {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": LENGTH, "attention_factor": math.sqrt(1.7)}
    expected = build("llama", **WIDE, rope_parameters={"rope_theta": BASE, **yarn})
    extend(model, "temperature", temperature=1.7)
    assert_same(logits(model, LONG), logits(expected, LONG))
    by_factor = build("llama", **WIDE)
    assert extend(by_factor, "temperature").after[LONG]["attention"].startswith("harness_ext_temperature(1.29648)")


def test_log_n_scales_each_query_by_the_tokens_it_sees() -> None:
    model, expected = build("llama", **WIDE), build("llama", **WIDE)
    scale = (torch.arange(1, LONG + 1).float().log() / math.log(LENGTH)).clamp(min=1)[None, :, None]
    for layer in expected.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: out * scale)
    extend(model, "logn")
    assert_same(logits(model, LONG), logits(expected, LONG))


LEARNED = ("gpt2", "gpt_bigcode", "openai-gpt", "opt", "gpt_neo", "biogpt", "xlm", "bert")


@pytest.mark.parametrize("family", LEARNED)
def test_a_learned_table_grows_and_keeps_what_it_knew(family: str) -> None:
    for method in ("table-tile", "table-clamp"):
        model = build(family)
        before = logits(model, LENGTH)
        effect = extend(model, method)
        assert torch.equal(logits(model, LENGTH), before)
        assert_same(logits(model, LONG)[:LENGTH], before)  # other numbers of rows are rounded otherwise on some processors
        assert (effect.before["limit"], effect.after[LONG]["limit"]) == (LENGTH, LONG)
        with pytest.raises((IndexError, RuntimeError)):
            logits(model, LONG + 1)
        effect.prepare(LONG + 9, LONG + 9)  # once more, from the grown one
        assert torch.equal(logits(model, LENGTH), before)
        assert_same(logits(model, LONG)[:LENGTH], before)
    model = build(family)
    table = positions.tables(model)[0]
    offset, trained = positions.table_offset(table), table.weight.detach().clone()
    extend(model, "table-interpolate")
    rows = table.weight[offset:]
    torch.testing.assert_close(rows[0], trained[offset])
    torch.testing.assert_close(rows[-1], trained[-1])
    torch.testing.assert_close(rows[85], trained[offset:][21], atol=1e-5, rtol=0)  # 85 / 255 of the way is 21 / 63 of it
    logits(model, LONG)


@pytest.mark.parametrize("family", ["gptj", "codegen", "ctrl", "mpt", "marian", "pegasus", "roformer"])
def test_a_fixed_table_grows_into_what_the_family_computes_at_that_length(family: str) -> None:
    known = FAMILIES[family]
    model, expected = build(family), build(family, **{str(known.length_field): LONG})
    own = {name: tensor for name, tensor in model.state_dict().items() if "embed_positions" not in name}
    assert not [name for name in expected.load_state_dict(own, strict=False).missing_keys if "embed_positions" not in name]
    extend(model, "regrow")
    ids = torch.arange(LONG)[None] % 500 + 3
    extra = {"decoder_input_ids": ids[:, :1]} if known.seq2seq else {}
    with torch.no_grad():
        torch.testing.assert_close(model(ids, **extra).logits, expected(ids, **extra).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "method", "reason"),
    [
        ("gpt2", "yarn", "no rotary angles that are computed; what applies: .*table-tile"),
        ("llama", "table-tile", "no learned position table; what applies: linear, ntk"),
        ("gptj", "linear", "no rotary angles that are computed; what applies: regrow"),
        ("bloom", "yarn", "no rotary angles"),
        ("mamba", "temperature", "no attention; nothing does"),
        ("falcon", "self-extend", "does not go through transformers' attention interface"),
        ("cohere2", "yarn", "layers that see all have no positions"),
        ("mistral-window", "linear", "every layer sees 16 tokens only"),
        ("smollm3", "self-extend", "only some of its layers take positions"),
        ("gemma3", "sinks", "layer types"),
        ("xglm", "regrow", "computes its sinusoids for any position"),
        ("t5", "temperature", "an encoder and a decoder"),
        ("reformer", "table-tile", "axes of its own"),
    ],
)
def test_a_method_that_does_not_apply_is_refused_with_what_does(family: str, method: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        extend(build(family), method)


def test_an_attention_that_is_accepted_and_never_called_is_found_out() -> None:
    with pytest.raises(ModelError, match="given another attention, and did not call it"):
        attention.place(build("xglm"), "nothing", lambda *args, **kwargs: pytest.fail("was called"), "sdpa")


def test_it_is_refused_before_any_weights(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFLM, "_create_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    with pytest.raises(ModelError, match="no rotary angles that are computed; what applies"):
        HFExtrapolate(pretrained=str(saved("gpt2")), device="cpu", extend="yarn")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"extend": "ntkk"}, "extend=ntkk was asked for; there is linear, ntk"),
        ({"factor": 4}, "no method that it is for; add extend=NAME"),
        ({"extend": "linear", "factor": 0.5}, "factor=0.5 was given; expected a number from 1"),
        ({"extend": "longrope"}, "longrope needs short_factor, a list of 4 numbers"),
        ({"extend": "self-extend", "window": 1000}, "expected a window of 1 to 64"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(arguments: dict[str, Any], said: str, saved: Any) -> None:
    def run() -> None:
        model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", **arguments)
        model.lift(LONG)
        model._loglikelihood_tokens([(None, [7] * 20, [9])])

    with pytest.raises(ModelError, match=said):
        run()


@pytest.mark.parametrize(
    ("method", "options"), [("linear", {"factor": 1}), ("dynamic", {}), ("table-tile", {}), ("yarn", {"factor": 1.0})]
)
def test_a_method_that_changes_nothing_is_an_error(method: str, options: dict[str, Any], saved: Any) -> None:
    family = "gpt2" if method == "table-tile" else "llama"
    model = HFExtrapolate(pretrained=str(saved(family)), device="cpu", extend=method, **options)
    model.lift(LENGTH)
    with pytest.raises(ModelError, match=f"extend={method} changed nothing"):
        model._loglikelihood_tokens([(None, [7] * 20, [9])])


def test_without_a_longest_length_the_factor_is_not_guessed(saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", extend="linear")
    with pytest.raises(ModelError, match="add factor=N or max_length=N"):
        model._loglikelihood_tokens([(None, [7] * 100, [9])])


@pytest.mark.parametrize(
    ("family", "arguments"),
    [("llama", {"extend": "dynamic"}), ("llama-dynamic", {}), ("llama-longrope", {}), ("phi3-longrope", {})],
)
def test_a_score_does_not_depend_on_what_ran_before_or_beside_it(family: str, arguments: dict[str, Any], saved: Any) -> None:
    prompts = [(None, [5 + (i * 7 + size) % 500 for i in range(size)], [9, 8]) for size in (40, 100, 100, 180)]
    alone = []
    for prompt in prompts:
        model = HFExtrapolate(pretrained=str(saved(family)), device="cpu", dtype="float32", **arguments)
        model.lift(200)
        alone.append(model._loglikelihood_tokens([prompt])[0])
    together = HFExtrapolate(pretrained=str(saved(family)), device="cpu", dtype="float32", batch_size=4, **arguments)
    together.lift(200)
    for order in (prompts, prompts[::-1]):
        expected = alone if order is prompts else alone[::-1]
        for (likelihood, greedy), (single, single_greedy) in zip(together._loglikelihood_tokens(order), expected, strict=True):
            assert likelihood == pytest.approx(single, abs=1e-4)
            assert greedy == single_greedy
    for prompt, (single, _) in zip(prompts, alone, strict=True):
        together._loglikelihood_tokens([prompt])
        logits(together.model, 250)  # a forward that nothing was prepared for; transformers' `dynamic` keeps its frequencies
        assert together._loglikelihood_tokens([prompt])[0][0] == pytest.approx(single, abs=1e-4)


def own_at(family: str, tokens: int) -> tuple[torch.Tensor, float]:
    """transformers' (frequencies, attention factor) of a checkpoint at a length."""
    config = build(family).config
    found: tuple[torch.Tensor, float] = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](
        config, torch.device("cpu"), seq_len=tokens
    )
    return found


@pytest.mark.parametrize("family", RECOMPUTED)
def test_a_checkpoints_own_frequencies_are_those_of_each_prompts_length_whatever_runs_in_between(family: str, saved: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved(family)), device="cpu", dtype="float32")
    (rotary,) = find_rotaries(model.model)
    for tokens in (180, 40, 100):
        frequencies, factor = own_at(family, tokens)
        model._loglikelihood_tokens([(None, list(range(5, 4 + tokens)), [9])])
        for between in (3, LENGTH - 1, 250):
            logits(model.model, between)
            assert torch.equal(rotary.frequencies, frequencies), (tokens, between)
            assert rotary.attention_factor == pytest.approx(factor)
    assert not torch.equal(own_at(family, 180)[0], own_at(family, 40)[0])


@pytest.mark.parametrize("family", RECOMPUTED)
def test_pinned_frequencies_make_chunks_equal_to_one_forward(family: str, saved: Any) -> None:
    """The first chunk ends within the trained length, where transformers' own frequencies are not yet those of the whole."""
    ids = torch.arange(5, 205)[None]

    def error(model: Any) -> float:
        with torch.no_grad():
            whole, cache, parts = model(ids).logits, None, []
            for chunk in ids.split((50, 3, 147), dim=1):
                found = model(chunk, past_key_values=cache, use_cache=True)
                cache, parts = found.past_key_values, [*parts, found.logits]
        return float((torch.cat(parts, dim=1) - whole).abs().max())

    model = HFExtrapolate(pretrained=str(saved(family)), device="cpu", dtype="float32")
    model._loglikelihood_tokens([(None, ids[0, :-1].tolist(), [9])])  # pins to 200 tokens
    assert error(model.model) <= 2e-5
    assert error(build(family)) > 1


@pytest.mark.parametrize("family", RECOMPUTED)
def test_an_answer_that_grows_past_the_trained_length_has_one_set_of_frequencies(family: str, saved: Any) -> None:
    """Decoded with a cache as it is without one, each token at the frequencies of the prompt and the whole budget."""
    prompt, budget = "The old farmer carried a box. " * 5, 40
    model = HFExtrapolate(pretrained=str(saved(family)), device="cpu", dtype="float32")
    ids = model.tok_encode(prompt)
    assert len(ids) < LENGTH < len(ids) + budget
    request = Instance("generate_until", {}, (prompt, {"until": ["@@@"], "max_gen_toks": budget}), 0, ("t", 0, 1))
    (answer,) = model.generate_until([request], disable_tqdm=True)
    expected, tokens = build(family), torch.tensor([ids])
    find_rotaries(expected)[0].pin(*own_at(family, len(ids) + budget))
    for _ in range(budget):
        with torch.no_grad():
            tokens = torch.cat((tokens, expected(tokens, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert answer == model.tok_decode(tokens[0, len(ids) :].tolist())


def test_what_was_in_effect_goes_into_the_results(saved: Any, evaluate: Any) -> None:
    folder = str(saved("llama", max_position_embeddings=200))
    sweep = {"multiples": [1, 2], "depths": 1, "samples": 1}
    found = {}
    for method in ("none", "yarn", "dynamic"):
        model = HFExtrapolate(pretrained=folder, device="cpu", dtype="float32", extend=method)
        results = evaluate(model, ["passkey_extrapolate"], **sweep)
        assert set(curve(results, "passkey_extrapolate")) == {200, 400}
        found[method] = results["config"]["override"]
    assert found["none"]["after"] == {}
    assert found["yarn"]["factor"] == 2.0
    assert set(found["yarn"]["after"]) == {"400"}
    assert set(found["dynamic"]["after"]) == {"200", "400"}
    for method in ("yarn", "dynamic"):
        assert found[method]["before"] == found["none"]["before"]
        assert found[method]["after"]["400"]["frequencies"] != found["none"]["before"]["frequencies"]
    assert found["dynamic"]["after"]["200"] == found["none"]["before"]
    assert found["yarn"]["after"]["400"]["attention_factor"] == pytest.approx(0.1 * math.log(2) + 1)


def test_an_extended_table_is_measured_past_its_end(saved: Any, evaluate: Any) -> None:
    model = HFExtrapolate(pretrained=str(saved("gpt2", n_positions=200)), device="cpu", dtype="float32", extend="table_tile")
    results = evaluate(model, ["passkey_extrapolate"], multiples=[1, 2], depths=1, samples=1)
    assert set(curve(results, "passkey_extrapolate")) == {200, 400}
    assert results["config"]["override"]["after"]["400"]["limit"] == 400


def test_generation_is_extended_too(saved: Any) -> None:
    request = Instance(
        "generate_until", {}, ("The old farmer carried a box. " * 12, {"until": ["@@@"], "max_gen_toks": 8}), 0, ("t", 0, 1)
    )
    given = {"device": "cpu", "dtype": "float32"}
    model = HFExtrapolate(pretrained=str(saved("llama")), extend="linear", factor=4, **given)
    theirs = HFExtrapolate(
        pretrained=str(saved("llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": BASE})), **given
    )
    assert model.generate_until([request], disable_tqdm=True) == theirs.generate_until([request], disable_tqdm=True)


def test_rope_parameters_that_the_user_gives_are_laid_over_the_checkpoints(saved: Any) -> None:
    """transformers puts them in their place: without the partial rotary factor Phi would turn all dimensions, without a word."""
    for family in ("phi", "gemma3"):
        given = {"rope_type": "linear", "factor": 2.0}
        model = HFExtrapolate(pretrained=str(saved(family)), device="cpu", rope_parameters=given)
        before = {rotary.layer_type: rotary for rotary in find_rotaries(build(family))}
        for rotary in find_rotaries(model.model):
            expected = before[rotary.layer_type].frequencies / (1 if rotary.layer_type == "sliding_attention" else 2)
            torch.testing.assert_close(rotary.frequencies, expected)


def test_the_checkpoints_config_is_left_alone() -> None:
    model = build("llama")
    before = model.config.to_dict()
    extend(model, "yarn")
    assert model.config.to_dict() == before


def test_the_page_of_methods_names_each_with_its_options_and_source() -> None:
    rows = {
        line.split("`")[1]: line for line in (REPOSITORY / "docs" / "extensions.md").read_text().splitlines() if "| `" in line[:3]
    }
    assert list(rows) == list(METHODS)
    for name, method in METHODS.items():
        assert method.source in rows[name]
        assert all(f"`{option}`" in rows[name] for option in method.options)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_inspect_promises_can_be_done(name: str) -> None:
    """Each method that is not refused changes what the model says past its trained length, and ends without an error."""
    family = FAMILIES[name]
    model = build(name)
    subject = Subject(model=model, schemes=positions.read_schemes(model.config, model), trained=LENGTH)
    applying = [method for method in METHODS.values() if not method.why_not(subject)]
    ids = torch.randint(3, 600, (1, LONG), generator=torch.Generator().manual_seed(0))
    extra = {"decoder_input_ids": ids[:, :1]} if family.seq2seq else {}
    with torch.no_grad():
        plain = None if family.hard else model(ids, **extra).logits
    for method in applying:
        if family.hard and not method.lifts_limit:
            continue  # it applies within the table, and the table still ends
        options: dict[str, Any] = {}
        if method.name == "longrope":
            pairs = len(find_rotaries(model)[-1].frequencies)
            options = {"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
        changed = build(name)
        extend(changed, method.name, **options)
        with torch.no_grad():
            found = changed(ids, **extra).logits
        assert bool(found.isfinite().all())
        assert plain is None or float((found - plain).abs().max()) > 1e-4, method.name
