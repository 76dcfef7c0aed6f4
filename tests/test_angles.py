"""Which rotary angles were seen: against the papers' published figures, transformers' own frequencies, and a twin that walks every position."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from typing import Any

import msgspec
import pytest
import torch
from conftest import REPOSITORY, build
from families import FAMILIES, LENGTH
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from harness_ext import positions
from harness_ext.angles import TURN, Seen, compute_critical_dimension, compute_frequencies, measure_unseen
from harness_ext.models.extensions.circles import Circles, read_circles
from harness_ext.models.extensions.extension import METHODS, Extension
from harness_ext.models.extensions.method import Setting, Subject
from harness_ext.models.inspection import build_without_weights, describe, to_json, to_text
from harness_ext.models.unseen import MULTIPLES, find_angles

ROTARY = [name for name, family in FAMILIES.items() if {"rotary", "rotary_table"} & {*family.schemes} and not family.seq2seq]
LLAMA2 = {"hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 8}
"""One head of 128 dimensions, as Llama 2 has."""


def subject_of(config: Any, model: Any = None) -> Subject:
    model = model or build_without_weights(config)
    length = positions.read_trained_length(config)
    return Subject(model=model, schemes=positions.read_schemes(config, model), trained=length.tokens if length else LENGTH)


def llama(tokens: int, base: float = 10000.0, **rope: Any) -> Subject:
    parameters = {"rope_theta": base, "rope_type": "default", **rope}
    return subject_of(LlamaConfig(**LLAMA2, max_position_embeddings=tokens, rope_parameters=parameters))


def critical_dimension(found: Subject) -> int:
    (circles,) = read_circles(found)
    return circles.seen.critical_dimension


# ---------------------------------------------------------------------- Liu et al., arXiv 2310.05209


def test_llama_2_has_the_published_critical_dimension() -> None:
    assert critical_dimension(llama(4096)) == 92


@pytest.mark.parametrize(("base", "dimensions"), [(652, 128), (500, 128), (10_000, 92)])
def test_a_base_up_to_the_length_over_two_pi_turns_every_pair(base: float, dimensions: int) -> None:
    """T/2π = 652 for T = 4096; with such a base every dimension has seen its whole circle."""
    assert round(4096 / TURN) == 652
    assert critical_dimension(llama(4096, base)) == dimensions


def test_a_base_and_length_that_keep_the_critical_dimension_are_the_papers() -> None:
    """The critical base for tuning on 16K tokens, β0 = β^(log_{T/2π}(T_tune/2π)): as many dimensions as 4K at base 10,000."""
    base = 10_000 ** math.log(16384 / TURN, 4096 / TURN)
    assert 70_000 < base < 73_000
    assert critical_dimension(llama(16384, base * 1.001)) == 92


def test_a_large_base_reaches_as_far_as_the_paper_says() -> None:
    """Pairs that turned within 4K tokens at base 10,000 turn within about 100K at Code Llama's base 1,000,000 (Rozière et al., arXiv 2308.12950)."""
    slowest_trained = compute_frequencies(128, 1e6)[92 // 2 - 1]
    assert 90_000 < TURN / slowest_trained < 131_072


@given(st.integers(1, 128).map(lambda n: 2 * n), st.floats(100, 1e7), st.integers(8, 1 << 20))
def test_the_formula_is_a_count_of_wavelengths(dims: int, base: float, tokens: int) -> None:
    frequencies = compute_frequencies(dims, base)
    if any(math.isclose(TURN / frequency, tokens, rel_tol=1e-9) for frequency in frequencies):
        return
    counted = Seen(frequencies=frequencies, tokens=tokens).critical_dimension
    assert (
        counted == compute_critical_dimension(dims, base, tokens) == 2 * sum(TURN / frequency < tokens for frequency in frequencies)
    )


# ---------------------------------------------------------------------- arithmetic


@given(st.floats(1e-4, 3.0), st.floats(0.1, 1.0), st.integers(2, 400), st.integers(1, 1600))
def test_what_is_unseen_is_what_a_walk_over_every_position_finds(trained: float, slower: float, tokens: int, length: int) -> None:
    """Bins of a circle that a prompt enters and training did not, of all that it enters; each position fills the step to the next."""
    bins = 3600

    def enter(frequency: float, positions: int) -> set[int]:
        entered: set[int] = set()
        for position in range(positions):
            ends = (math.floor(step * frequency * bins / TURN) for step in (position, position + 1))
            entered.update(number % bins for number in range(next(ends), next(ends)))
            if len(entered) == bins:
                break
        return entered

    reached = enter(trained * slower, length)
    if len(reached) < 100:
        return
    (found,) = Seen(frequencies=(trained,), tokens=tokens).find_unseen([trained * slower], length)
    assert found == pytest.approx(len(reached - enter(trained, tokens)) / len(reached), abs=0.02)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 100))
def test_more_seen_is_less_new_and_farther_is_more(seen: float, more: float, reached: float) -> None:
    assert 0 <= measure_unseen(seen + more, reached) <= measure_unseen(seen, reached) <= 1
    assert measure_unseen(seen, reached) <= measure_unseen(seen, reached + more)
    assert measure_unseen(seen, min(seen, reached)) == 0


# ---------------------------------------------------------------------- read from modules


@pytest.mark.parametrize("name", ROTARY)
def test_frequencies_without_weights_are_those_of_the_loaded_model(name: str) -> None:
    model = build(name)
    without = read_circles(subject_of(model.config))
    loaded = read_circles(subject_of(model.config, model))
    assert [circles.seen for circles in without] == [circles.seen for circles in loaded]
    assert without
    for length in (LENGTH, 4 * LENGTH):
        assert [circles.find_unseen(length) for circles in without] == [circles.find_unseen(length) for circles in loaded]
    assert not any(any(circles.find_unseen(LENGTH)) for circles in loaded if not circles.before), "trained, so seen"


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "dynamic", "longrope"])
def test_a_scaled_checkpoint_turns_by_transformers_own_frequencies(kind: str) -> None:
    config = LlamaConfig(
        **LLAMA2,
        max_position_embeddings=512 if kind in ("linear", "dynamic") else 4096,
        rope_parameters={"rope_theta": 10000.0, "rope_type": kind, "factor": 8.0}
        | ({} if kind in ("linear", "dynamic") else {"original_max_position_embeddings": 512})
        | ({"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {})
        | ({"short_factor": [1.0] * 64, "long_factor": [1 + pair / 8 for pair in range(64)]} if kind == "longrope" else {}),
    )
    (circles,) = read_circles(subject_of(config))
    assert circles.seen.tokens == 512
    expected, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=4096)
    assert circles.read(4096) == pytest.approx(expected.tolist())
    plain = pytest.approx(compute_frequencies(128, 10_000))
    if kind == "linear":  # trained so, by what the config says
        assert circles.seen.frequencies == pytest.approx(expected.tolist())
        assert circles.before == ""
    else:
        assert circles.seen.frequencies == plain
        assert circles.before == ("" if kind in ("dynamic", "longrope") else kind)
    assert any(circles.find_unseen(4096)) == (kind in ("linear", "dynamic", "longrope"))


@pytest.mark.parametrize("name", ["gptj", "codegen", "roformer"])
def test_a_tables_angles_are_the_formulas(name: str) -> None:
    (circles,) = read_circles(subject_of(build(name).config))
    dims = 8 if name == "roformer" else FAMILIES[name].config["rotary_dim"]
    assert circles.seen.frequencies == pytest.approx(compute_frequencies(dims, 10_000))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma3", {"full_attention": (1, LENGTH, None), "sliding_attention": (1, 16, 16)}),
        ("mistral-window", {"": (None, 16, 16)}),
        ("gemma2", {"": (2, LENGTH, None)}),  # one set for layers of both kinds
        ("cohere2", {"": (1, 16, 16)}),  # the other layer has no positions
        ("exaone4", {"": (1, 16, 16)}),
        ("llama4", {"": (1, 16, 16)}),
        ("smollm3", {"": (1, LENGTH, None)}),
        ("qwen3_next", {"": (1, LENGTH, None)}),  # the other layer keeps a state
    ],
)
def test_layers_are_told_apart_by_what_turns_and_how_far_it_sees(name: str, expected: dict[str, Any]) -> None:
    found = read_circles(subject_of(build(name).config))
    assert {one.layer_type: (one.layers, one.seen.tokens, one.seen.window) for one in found} == expected
    for circles in found:
        assert any(circles.find_unseen(8 * LENGTH)) == (circles.seen.window is None)


def test_only_the_part_of_a_head_that_turns_is_counted() -> None:
    (phi,) = read_circles(subject_of(build("phi").config))
    full, _ = read_circles(subject_of(build("gemma4").config))
    assert len(phi.seen.frequencies) == 2  # half of 8 dimensions
    assert len(full.seen.frequencies) == 2  # a quarter of 16, beside zeros
    assert all(full.seen.frequencies)


def test_a_model_that_turns_nothing_or_reads_both_ways_has_no_circles() -> None:
    for name in ("gpt2", "bloom", "mamba", "t5gemma"):
        assert read_circles(subject_of(build(name).config)) == []


# ---------------------------------------------------------------------- under an override


def under(method: str, tokens: int, factor: float, **options: Any) -> Circles:
    found = llama(tokens)
    found = dataclasses.replace(found, model=AutoModelForCausalLM.from_config(found.model.config))
    (circles,) = read_circles(found)
    setting = Setting(tokens=int(factor * tokens), factor=factor, options={**METHODS[method].options, **options})
    METHODS[method].install(found, setting)
    return circles


@pytest.mark.parametrize("factor", [2.0, 4.0, 16.0])
@pytest.mark.parametrize("method", ["linear", "yarn", "llama3"])
def test_interpolated_angles_were_all_seen_up_to_the_factor_and_not_past_it(method: str, factor: float) -> None:
    """Chen et al., arXiv 2306.15595: interpolated positions stay within the trained range. YaRN divides every pair that makes no turn."""
    circles = under(method, 4096, factor)
    assert not any(circles.find_unseen(int(4096 * factor)))
    assert any(circles.find_unseen(int(4096 * factor * 2)))


@pytest.mark.parametrize("method", ["ntk", "dynamic"])
def test_ntk_leaves_some_pairs_slightly_out_of_bounds(method: str) -> None:
    """Peng et al., arXiv 2309.00071, §3.1: NTK-aware scaling is no mere interpolation, and some dimensions go out of bounds."""
    circles = under(method, 4096, 8.0)
    new = [share for share in circles.find_unseen(8 * 4096) if share]
    plain = [share for share in circles.seen.find_unseen(circles.seen.frequencies, 8 * 4096) if share]
    assert len(new) == len(plain) - 1  # the slowest alone is divided by the whole factor
    assert sum(new) < sum(plain) / 2


def test_inspect_says_what_every_method_leaves_new_and_changes_nothing() -> None:
    found = llama(4096)
    before = found.model.model.rotary_emb.rope_type
    (angles,) = find_angles(found)
    assert (angles.pairs, angles.turning, angles.critical_dimension, angles.slowest_turns) == (
        64,
        46,
        92,
        pytest.approx(0.0753, abs=1e-4),
    )
    pairs = {(new.extend, new.multiple): new.pairs for new in angles.new}
    assert {multiple: pairs["none", multiple] for multiple in MULTIPLES} == dict.fromkeys(MULTIPLES, 18)
    assert {pairs[method, multiple] for method in ("linear", "yarn", "llama3") for multiple in MULTIPLES} == {0}
    assert {pairs[method, multiple] for method in ("ntk", "dynamic") for multiple in MULTIPLES} == {17}
    assert found.model.model.rotary_emb.rope_type == before
    assert found.model.model.rotary_emb.inv_freq.is_meta
    told = describe("llama", found.model.config, found.model)
    text = to_text(told)
    for said in (
        "46 turn at least once within 4,096 tokens",
        "critical dimension 92 of 128",
        "linear, yarn, llama3: none up to 8×",
    ):
        assert said in text
    assert json.loads(json.dumps(to_json(told)))["angles"][0]["critical_dimension"] == 92


@pytest.mark.parametrize("name", [*ROTARY, "gpt2", "mamba", "t5gemma"])
def test_inspect_describes_every_family(name: str) -> None:
    family = FAMILIES[name]
    config = AutoConfig.for_model(family.model_type, **family.config)
    model = build_without_weights(config)
    told = describe(name, config, model)
    assert not [warning for warning in told.warnings if "rotary angles" in warning]
    assert bool(told.angles) == (name in ROTARY and told.trained_length is not None)
    assert ("critical dimension" in to_text(told)) == bool(told.angles)


def test_a_strangers_module_is_said_to_be_unknown() -> None:
    found = llama(4096)
    module = found.model.model.rotary_emb

    class Own(type(module)):  # type: ignore[misc]
        def __init__(self, config: Any, head: int) -> None:
            super().__init__(config)

    module.__class__ = Own
    told = describe("own", found.model.config, found.model)
    assert told.angles == ()
    assert "cannot be built by itself" in " ".join(told.warnings)


def test_the_results_file_says_what_was_new_under_the_override() -> None:
    found = llama(64)
    found = dataclasses.replace(found, model=AutoModelForCausalLM.from_config(found.model.config))
    extension = Extension(METHODS["ntk"], found, {})
    extension.prepare(256, 256)
    (said,) = extension.describe()["angles"]
    expected = [share for share in under("ntk", 64, 4.0).find_unseen(256) if share]
    assert said == {
        "layer_type": "",
        "pairs": 64,
        "critical_dimension": compute_critical_dimension(128, 10_000, 64),
        "new": {"256": {"pairs": len(expected), "share": pytest.approx(sum(expected) / len(expected), abs=1e-4)}},
    }
    sinks = Extension(METHODS["sinks"], dataclasses.replace(found, model=AutoModelForCausalLM.from_config(found.model.config)), {})
    assert "angles" not in sinks.describe()


def test_the_pages_angles_are_those_that_the_records_were_measured_under(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies computed without weights are as slow as the runs' were; those of another factor are not."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs"))
    page = importlib.import_module("angles")
    monkeypatch.setattr(page, "GRID", [1.0, 8.0])
    cases = page.read_cases(REPOSITORY / "results")
    assert [case.run.override.method for case in cases] == list(page.TURNED)
    new = {case.run.override.method: case.find_share(2048) for case in cases}
    assert new["linear"] == new["yarn"] == new["llama3"] == 0
    assert new["ntk"] == pytest.approx(new["dynamic"], abs=1e-6)
    assert 0 < new["ntk"] < new["none"]
    other = next(case.run for case in cases if case.run.override.method == "yarn")
    other = msgspec.structs.replace(other, override=msgspec.structs.replace(other.override, factor=7.0))
    with pytest.raises(SystemExit, match="not the frequencies"):
        page.turn(page.read_subject(), other, 2048)
