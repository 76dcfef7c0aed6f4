"""A model in several places (some layers on the CPU, some on the disk) answers as in one piece, prompt for prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from test_sharing import prompts

from harness_ext.errors import ModelError
from harness_ext.models import demand, machine, pieces
from harness_ext.models.hf import HFExtrapolate

CPU = {"device": "cpu", "dtype": "float32"}
LLAMA = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "disk",
    "model.rotary_emb": "disk",
    "lm_head": "disk",
}
GPT2 = {"transformer.wte": "cpu", "transformer.wpe": "disk", "transformer.h": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"}
HAY = "The old farmer carried a box near the river. "


def load(folder: Path, tmp_path: Path, places: dict[str, str] | None, **options: Any) -> HFExtrapolate:
    placed = {"device_map": places, "offload_folder": str(tmp_path)} if places else {}
    return HFExtrapolate(pretrained=str(folder), **CPU, **placed, **options)


def generate(lm: HFExtrapolate) -> list[str]:
    contexts = [HAY * 2, HAY * 2 + "The box", HAY + "A hat", HAY * 4]
    asked = {"until": ["@@@"], "max_gen_toks": 6}
    requests = [Instance("generate_until", {}, (context, asked), 0, ("t", number, 1)) for number, context in enumerate(contexts)]
    return list(lm.generate_until(requests, disable_tqdm=True))


@pytest.mark.parametrize(
    ("family", "changes", "places", "options"),
    [
        ("llama", {}, LLAMA, {}),
        ("llama", {}, LLAMA, {"extend": "yarn", "factor": 4.0}),
        ("llama", {}, LLAMA, {"extend": "dynamic", "factor": 2.0}),
        ("llama", {}, dict.fromkeys(LLAMA, "disk"), {"batch_size": 3}),
        ("llama", {"tie_word_embeddings": True}, {**LLAMA, "lm_head": "cpu"}, {}),
        ("mamba2", {}, {"": "disk"}, {}),
        ("gpt2", {"n_positions": 200}, GPT2, {}),
        ("gpt2", {}, {**GPT2, "transformer.wpe": "cpu"}, {"extend": "table-interpolate", "max_length": 200}),
    ],
)
def test_an_offloaded_model_answers_as_in_one_piece(
    family: str, changes: dict[str, Any], places: dict[str, str], options: dict[str, Any], saved: Any, tmp_path: Path
) -> None:
    folder = saved(family, **changes)
    whole, apart = (load(folder, tmp_path, given, trained_length=64, **options) for given in (None, places))
    assert {weight.device.type for weight in whole.model.parameters()} == {"cpu"}
    assert "meta" in {weight.device.type for weight in apart.model.parameters()}
    for (likelihood, greedy), (known, known_greedy) in zip(
        apart._loglikelihood_tokens(prompts(), disable_tqdm=True),
        whole._loglikelihood_tokens(prompts(), disable_tqdm=True),
        strict=True,
    ):
        assert likelihood == pytest.approx(known, abs=1e-4)
        assert greedy == known_greedy
    assert generate(apart) == generate(whole)
    assert apart._reader.lanes == 1  # weights that are brought in are one forward's at a time
    whole._reader.lanes = 1
    assert apart._reader.describe_way() == whole._reader.describe_way()  # what it goes on from was found out as well
    info, known_info = apart.get_model_info(), whole.get_model_info()
    assert info["weights_fingerprint"] == known_info["weights_fingerprint"] != ""
    assert info["override"] == known_info["override"]
    assert info["position_scheme"] == known_info["position_scheme"]
    assert pieces.is_installed(apart.model) == pieces.is_installed(whole.model)
    assert demand.count_weights(apart.model) >= demand.count_weights(whole.model)  # tied weights are taken apart


def test_what_an_interrupted_run_left_of_an_offloaded_model_is_gone_on_from(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("harness_ext.models.journal._finished", [])
    found = []
    for resumed in (0, len(prompts())):
        lm = load(saved("llama"), tmp_path, LLAMA)
        with lm.evaluating():
            found.append(lm._loglikelihood_tokens(prompts(), disable_tqdm=True))
        assert lm._reader.resumed == resumed
        monkeypatch.setattr("harness_ext.models.journal._finished", [])  # as if it had been killed
    assert found[0] == found[1]
    elsewhere = load(saved("llama"), tmp_path, None)
    with elsewhere.evaluating():
        elsewhere._loglikelihood_tokens(prompts(), disable_tqdm=True)
    assert elsewhere._reader.resumed == 0


def test_a_device_map_is_never_dropped_without_a_word(saved: Any, tmp_path: Path) -> None:
    assert load(saved("llama"), tmp_path, LLAMA).model.hf_device_map == LLAMA


def test_a_position_table_that_is_offloaded_is_not_made_longer(saved: Any, tmp_path: Path) -> None:
    lm = load(saved("gpt2"), tmp_path, GPT2, trained_length=64, extend="table-interpolate", max_length=200)
    with pytest.raises(ModelError, match=r"position table .* is offloaded"):
        lm._loglikelihood_tokens(prompts(), disable_tqdm=True)


def test_memory_of_an_offloaded_model_is_counted_once(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_free", lambda **_: machine.Free(7, "here"))
    assert demand.read_free(load(saved("llama"), tmp_path, LLAMA).model) == 7
