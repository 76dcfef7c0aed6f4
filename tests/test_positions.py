"""What is said of a model beforehand, against what its forward does, over many families of transformers."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build
from families import FAMILIES, LENGTH
from scripted import curve
from transformers import AutoConfig

from harness_ext import positions
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.inspection import build_without_weights, describe, inspect_model, to_json, to_text
from harness_ext.models.probe import find_limit

UNLISTED = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from huggingface_hub.dataclasses import strict


@strict
class OwnConfig(PreTrainedConfig):
    model_type = "a_family_of_its_own"
    vocab_size: int = 600
    width: int = 32
    block_size: int = 200
    kind: str = "table"


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = torch.nn.Embedding(config.vocab_size, config.width)
        if config.kind == "table":
            self.wpe = torch.nn.Embedding(config.block_size, config.width)
        if config.kind == "mask":
            self.register_buffer("bias", torch.ones(config.block_size, config.width), persistent=False)
        self.head = torch.nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, **_):
        x = self.wte(input_ids)
        if self.config.kind == "table":
            x = x + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        if self.config.kind == "mask":
            x = x + self.bias[: input_ids.shape[1]]
        return CausalLMOutput(logits=self.head(x.cumsum(1)))


AutoConfig.register("a_family_of_its_own", OwnConfig, exist_ok=True)
AutoModelForCausalLM.register(OwnConfig, OwnModel, exist_ok=True)
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_the_scheme_and_the_limit_are_told_without_weights_and_are_what_the_forward_does(name: str) -> None:
    family = FAMILIES[name]
    config = AutoConfig.for_model(family.model_type, **copy.deepcopy(family.config))
    found = describe(name, config, build_without_weights(config))
    assert set(found.schemes) == set(family.schemes)
    assert found.decided == "by its family, config and modules"
    model = build(name)

    def runs(tokens: int) -> bool:
        ids = torch.full((1, tokens), 7)
        try:
            with torch.no_grad():
                model(ids, **({"decoder_input_ids": ids[:, :1]} if family.seq2seq else {}))
        except (IndexError, RuntimeError, ValueError):
            return False
        return True

    if found.hard_limit:
        assert runs(found.hard_limit.tokens)
        assert not runs(found.hard_limit.tokens + 1)
    else:
        assert runs(4 * LENGTH + 1)
    by_modules, by_config = positions.read_hard_limit(model.config, model), positions.read_hard_limit(config)
    assert (by_modules and by_modules.tokens) == (by_config and by_config.tokens)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.seq2seq])
def test_a_sweep_to_four_times_the_length_ends_well_and_scores_only_what_was_measured(name: str, saved: Any, evaluate: Any) -> None:
    family = FAMILIES[name]
    changes = {family.length_field: 200} if family.length_field else {}
    model = HFExtrapolate(pretrained=str(saved(name, **changes)), trained_length=200, device="cpu", dtype="float32")
    results = evaluate(model, ["passkey_extrapolate"], multiples=[1, 4], depths=1, samples=1)
    measured = {200} if family.hard else {200, 800}
    assert set(curve(results, "passkey_extrapolate")) == measured
    outcomes = {cell["length"]: cell["outcome"] for cell in results["configs"]["passkey_extrapolate"]["lengths"]}
    assert outcomes == {length: "measured" if length in measured else "hard_limit" for length in (200, 800)}


@pytest.mark.parametrize("kind", ["table", "mask", "neither"])
def test_a_family_that_nobody_listed_is_probed_and_says_so(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_family.py").write_text(UNLISTED)
    monkeypatch.syspath_prepend(tmp_path)
    import own_family  # type: ignore[import-not-found]

    config = own_family.OwnConfig(kind=kind)
    found = describe("own", config, build_without_weights(config))
    assert found.decided.startswith("probed")
    assert (found.hard_limit.tokens if found.hard_limit else None) == (None if kind == "neither" else 200)
    sys.modules.pop("own_family")


def test_a_probe_finds_what_the_table_of_families_says() -> None:
    for name in ("gpt2", "mpt", "llama", "xglm"):
        family = FAMILIES[name]
        config = AutoConfig.for_model(family.model_type, **copy.deepcopy(family.config))
        from harness_ext.models.probe import probe

        found = probe(config, build_without_weights(config))
        assert found.said.startswith("probed")
        assert (found.limit is not None) == family.hard
        assert found.limit is None or found.limit.tokens == LENGTH


def test_flags_are_not_believed() -> None:
    """MPT's `alibi: False` changes nothing in transformers; Falcon's does; a table that was resized counts as it is."""
    mpt = AutoConfig.for_model("mpt", **{**FAMILIES["mpt"].config, "attn_config": {"alibi": False}})
    assert positions.read_schemes(mpt) == ("alibi",)
    assert positions.read_schemes(AutoConfig.for_model("falcon", alibi=True)) == ("alibi",)
    assert positions.read_schemes(AutoConfig.for_model("falcon", alibi=False)) == ("rotary",)
    model = build("gpt2")
    model.transformer.wpe = torch.nn.Embedding(150, 32)
    assert model.config.n_positions == LENGTH
    limit = find_limit(model.config, model).limit
    assert limit is not None
    assert limit.tokens == 150


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt2", ["learned absolute", "64", "ends at 64", "table-tile", "refused"]),
        ("llama-yarn", ["rotary", "trained length   64", "advertised       128", "yarn"]),
        ("bloom", ["ALiBi", "unknown"]),
        ("gemma3", ["sliding window   16", "rope full_attention"]),
        ("llama-dynamic", ["recomputes"]),
        ("mamba", ["recurrent"]),
    ],
)
def test_inspect_says_it_in_words_and_as_json(name: str, said: list[str], saved: Any) -> None:
    found = inspect_model(str(saved(name)))
    text = to_text(found)
    for part in said:
        assert part in text, text
    again = json.loads(json.dumps(to_json(found)))
    assert again["schemes"] == list(found.schemes)
    assert {method["method"] for method in again["extends"]} >= {"linear", "yarn", "table-tile", "sinks"}


def test_inspect_on_the_command_line_loads_no_weights(saved: Any, tmp_path: Path) -> None:
    folder = saved("gpt2", n_positions=96)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())  # a config, and no weights at all
    ran = subprocess.run(
        [sys.executable, "-m", "harness_ext.cli", "inspect", str(tmp_path), "--json"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["hard_limit"]["tokens"] == 96
    lost = subprocess.run(
        [sys.executable, "-m", "harness_ext.cli", "inspect", str(tmp_path / "nowhere")], capture_output=True, text=True, check=False
    )
    assert lost.returncode == 1
    assert len(lost.stderr.strip().splitlines()) == 1
