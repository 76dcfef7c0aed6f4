"""A stranger's model runs no code of its own unless that is asked for, and no secret is written down anywhere."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import Model, serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness_ext import credentials
from harness_ext.cli import main
from harness_ext.errors import ModelError
from harness_ext.model_view import resolve
from harness_ext.models import checkpoint
from harness_ext.models.api import ApiExtrapolate
from harness_ext.models.hf import HFExtrapolate

SECRET = "hf_ThisIsNobodysTokenButLooksLikeOne1234"
PASSWORD = "correct-horse-battery"
TINY = {"samples": 1, "depths": 1, "lengths": [256], "trained_length": 128}
KEEPING = "from harness_ext.models.journal import Journal; Journal.forget = Journal.close; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
"""A run whose journals stay."""
CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("it ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class StrangeConfig(LlamaConfig):
    model_type = "strange"
class StrangeModel(LlamaForCausalLM):
    config_class = StrangeConfig
class StrangeTokenizer(PreTrainedTokenizerFast):
    pass
"""


def lm_eval(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KEEPING, "--tasks", "passkey_extrapolate", "--metadata", json.dumps(TINY), *arguments]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "HARNESS_EXT_CACHE": str(cwd / "cache"), **environment}
    return subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


# ---------------------------------------------------------------------- strangers' code


@pytest.fixture
def strange(saved: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A model with a type, a class and a tokenizer of its own, and the file that appears where their code runs."""
    folder, marker = tmp_path / "strange", tmp_path / "marker"
    AutoModelForCausalLM.from_pretrained(saved("llama")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(saved("llama")).save_pretrained(folder)
    (folder / "modeling_strange.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "architectures": ["StrangeModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_strange.StrangeConfig", "AutoModelForCausalLM": "modeling_strange.StrangeModel"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "StrangeTokenizer",
        "auto_map": {"AutoTokenizer": [None, "modeling_strange.StrangeTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, marker


@pytest.mark.parametrize("command", [["inspect"], ["plan", "--tasks", "passkey_extrapolate"], ["compare"]])
def test_no_command_runs_a_models_own_code_or_asks_whether_to(
    command: list[str], strange: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked at the terminal"))
    folder, marker = strange
    assert main([*command, str(folder)]) == 1
    assert "trust_remote_code" in capsys.readouterr().err
    assert not marker.exists()


def test_inspect_runs_a_models_own_code_when_it_is_asked_to(strange: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, marker = strange
    assert main(["inspect", str(folder), "--trust_remote_code"]) == 0
    assert marker.exists()
    assert "strange" in capsys.readouterr().out


def test_the_model_classes_run_a_models_own_code_only_when_asked(
    strange: tuple[Path, Path], saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked at the terminal"))
    folder, marker = strange
    with pytest.raises(ModelError, match="trust_remote_code"):
        HFExtrapolate(pretrained=str(folder), device="cpu")
    with pytest.raises(ModelError, match="trust_remote_code"):
        HFExtrapolate(pretrained=str(saved("llama")), tokenizer=str(folder), device="cpu")
    with pytest.raises(ModelError, match="trust_remote_code"):
        ApiExtrapolate(base_url="http://127.0.0.1:9/v1/completions", model="x", tokenizer=str(folder), trained_length=128)
    assert not marker.exists()
    trusted = HFExtrapolate(pretrained=str(folder), device="cpu", dtype="float32", trust_remote_code=True)
    assert type(trusted.model).__name__ == "StrangeModel"
    assert marker.exists()


def test_a_run_of_a_model_with_code_of_its_own_ends_in_one_line(strange: tuple[Path, Path], tmp_path: Path) -> None:
    folder, marker = strange
    ran = lm_eval("--model", "hf-extrapolate", "--model_args", f"pretrained={folder}", cwd=tmp_path)
    assert ran.returncode != 0
    assert "trust_remote_code" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
    assert not marker.exists()


# ---------------------------------------------------------------------- pickles


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (self.marker, "it ran")


@pytest.fixture
def pickled(saved: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A model whose weights are a pickle that writes the file."""
    folder, marker = tmp_path / "pickled", tmp_path / "exploded"
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    model.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(saved("llama")).save_pretrained(folder)
    torch.save({**model.state_dict(), "bomb": Bomb(marker)}, folder / "pytorch_model.bin")
    return folder, marker


def test_pickled_weights_are_refused_in_one_line_that_names_what_allows_them(
    pickled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, marker = pickled
    ran = lm_eval("--model", "hf-extrapolate", "--model_args", f"pretrained={folder}", cwd=tmp_path)
    assert ran.returncode != 0
    assert "use_safetensors=False" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
    assert main(["plan", str(folder), "--tasks", "passkey_extrapolate", "--limit", "2"]) == 1
    assert "use_safetensors=False" in capsys.readouterr().err
    assert not marker.exists()
    with (folder / "pytorch_model.bin").open("rb") as file, pytest.raises(pickle.UnpicklingError):
        torch.load(file)


def test_pickled_weights_are_read_when_they_are_asked_for(saved: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    model.config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(saved("llama")).save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    read = HFExtrapolate(pretrained=str(tmp_path), device="cpu", dtype="float32", use_safetensors=False)
    safe = HFExtrapolate(pretrained=str(saved("llama")), device="cpu", dtype="float32")
    assert read._weights == safe._weights


def test_pickled_deltas_and_adapters_are_refused(pickled: tuple[Path, Path], saved: Any, tmp_path: Path) -> None:
    folder, marker = pickled
    with pytest.raises(ModelError, match=r"pickled has no model\.safetensors.*use_safetensors=False"):
        HFExtrapolate(pretrained=str(saved("llama")), delta=str(folder), device="cpu", dtype="float32")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(saved("llama")), "peft_type": "LORA"}))
    torch.save({"bomb": Bomb(marker)}, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter has no adapter_model\.safetensors.*use_safetensors=False"):
        HFExtrapolate(pretrained=str(saved("llama")), peft=str(adapter), device="cpu", dtype="float32")
    assert not marker.exists()


def test_weights_of_another_format_are_left_to_their_own_arguments() -> None:
    for given in ({"gguf_file": "a.gguf"}, {"gptqmodel": True}, {"use_safetensors": None}):
        assert checkpoint.prefer_safetensors("org/name", given) == given


# ---------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "arguments",
    [
        {"pretrained": "x", "token": "abc"},
        {"pretrained": "x", "use_auth_token": "abc"},
        {"model": "x", "base_url": f"https://ann:{PASSWORD}@host/v1/completions"},
        {"model": "x", "base_url": "https://host/v1/completions?api-key=abc"},
        {"header": {"Authorization": "Bearer abc"}},
        {"header": '{"X": "abc"}'},
        {"header": {"X": "abc"}},
        {"model_args": {"headers": {"x-api-key": "abc"}}},
        {"model": "x", "api-key": "abc"},
        {"revision": SECRET},
        {"metadata": {"nested": [{"api_key": "abc"}]}},
        {"model_args": "pretrained=x,hf_token=abc"},
    ],
)
def test_an_argument_that_holds_a_secret_is_refused_by_its_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="HF_TOKEN") as error:
        credentials.refuse(arguments)
    assert "abc" not in str(error.value)
    assert SECRET not in str(error.value)
    assert PASSWORD not in str(error.value)


def test_arguments_that_are_only_called_alike_are_none() -> None:
    credentials.refuse(
        {
            "pretrained": "reference/rope",
            "tokenizer": "org/name",
            "tokenized_requests": "False",
            "add_bos_token": True,
            "prefix_token_id": 1,
            "think_end_token": "</think>",
            "logit_bias": {"5": 1.0},
            "num_key_value_heads": 2,
            "use_auth_token": True,
            "max_gen_toks": "32",
            "rope_parameters": {"rope_type": "yarn", "factor": 2.0},
            "base_url": "http://localhost:8000/v1/completions?version=3",
        }
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "hf-extrapolate", "--model_args", f"pretrained=reference/rope,token={SECRET}"),
        ("--model", "hf-extrapolate", "--model_args", "pretrained=reference/rope", "--metadata", json.dumps({"api_key": SECRET})),
        ("--model", "hf", "--model_args", f"pretrained=reference/rope,max_length=512,token={SECRET}"),
        (
            "--model",
            "api-extrapolate",
            "--model_args",
            f"base_url=http://ann:{SECRET}@127.0.0.1:9/v1/completions,model=x,tokenizer=reference/rope",
        ),
        ("--config", "config.yaml"),
        ("--config", "config.yaml", "--hf_hub_log_args", f"token={SECRET}"),
    ],
)
def test_a_run_with_a_secret_among_its_arguments_ends_before_anything_is_written(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    own = "" if "--hf_hub_log_args" in arguments else f",token={SECRET}"
    (tmp_path / "config.yaml").write_text(f"model: hf-extrapolate\nmodel_args: pretrained=reference/rope{own}\n")
    ran = lm_eval(*arguments, "--output_path", "out", "--log_samples", "--verbosity", "DEBUG", cwd=tmp_path)
    assert ran.returncode != 0
    assert ran.stderr.splitlines()[-1].startswith("ModelError: ")
    assert "HF_TOKEN" in ran.stderr
    assert SECRET not in ran.stdout + ran.stderr
    assert not (tmp_path / "out").exists()


def test_a_script_is_refused_before_lm_eval_logs_its_arguments(caplog: pytest.LogCaptureFixture) -> None:
    import lm_eval as host

    import harness_ext

    harness_ext.install()
    with caplog.at_level("DEBUG"), pytest.raises(ModelError, match="HF_TOKEN"):
        host.simple_evaluate(
            model="hf-extrapolate", model_args={"pretrained": "reference/rope", "token": SECRET}, tasks=["passkey_extrapolate"]
        )
    assert SECRET not in caplog.text


@pytest.mark.parametrize("command", [["plan"], ["compare", "--output_path", "out"]])
def test_our_commands_refuse_secrets_too(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, "reference/rope", "--tasks", "passkey_extrapolate", "--model_args", f"token={SECRET}"]) == 1
    said = capsys.readouterr()
    assert "HF_TOKEN" in said.err
    assert SECRET not in said.out + said.err
    assert not list(tmp_path.rglob("*.*"))


def test_secrets_of_the_environment_are_in_no_output_and_no_file(tmp_path: Path) -> None:
    secrets = {"HF_TOKEN": SECRET, "OPENAI_API_KEY": PASSWORD, "HF_ENDPOINT": f"http://ann:{PASSWORD}@127.0.0.1:9"}
    folder = resolve("reference/rope")
    model = Model(AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
    kept = ("--output_path", "out", "--log_samples", "--verbosity", "DEBUG", "--show_config")
    with serve(model) as server:
        of = {
            "hf-extrapolate": "pretrained=reference/rope",
            "api-extrapolate": f"base_url={server.url},model=rope,tokenizer=reference/rope",
        }
        runs = [lm_eval("--model", name, "--model_args", given, *kept, cwd=tmp_path, **secrets) for name, given in of.items()]
        assert server.keys == {f"Bearer {PASSWORD}"}
    runs.append(lm_eval("--model", "hf-extrapolate", "--model_args", "pretrained=nobody/nothing", *kept, cwd=tmp_path, **secrets))
    assert [run.returncode for run in runs] == [0, 0, 1]
    said = "".join(run.stdout + run.stderr for run in runs).encode()
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert {".sqlite", ".json", ".jsonl"} <= {file.suffix for file in files}
    for text in (said, *files.values()):
        assert SECRET.encode() not in text
        assert PASSWORD.encode() not in text


def test_an_error_of_a_stranger_is_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", PASSWORD)
    said = credentials.hide(f"GET https://ann:pw@mirror/x?y with {SECRET} and {PASSWORD}")
    assert said == "GET https://***@mirror/x?y with *** and ***"
