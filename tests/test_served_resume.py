"""A run through a server that is killed goes on where it was, while the server is what it was; else nothing that was kept is read."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import servers
from servers import Fault, serve
from test_api import load

from harness_ext.cells import Unmeasured
from harness_ext.models import likeness
from harness_ext.models.answers import Text

RUN = """
import json, sys
import lm_eval, harness_ext
harness_ext.install()
from lm_eval.tasks import TaskManager
from harness_ext.models.api import ApiExtrapolate
lm = ApiExtrapolate(**json.loads(sys.argv[1]))
tasks = TaskManager(include_defaults=False, metadata={"lengths": [200, 400], "samples": 3, "depths": 4, "trained_length": 200})
found = lm_eval.simple_evaluate(model=lm, tasks=[sys.argv[2]], task_manager=tasks, bootstrap_iters=0, apply_chat_template=lm.chat)
print("RESUMED", found["config"]["server"]["resumed"])
print("FOUND", json.dumps({"results": found["results"], "samples": found["samples"]}, sort_keys=True, default=str))
"""
TASKS = ["passkey_extrapolate", "passkey_extrapolate_generate"]


def start(arguments: dict[str, Any], task: str, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "HARNESS_EXT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, json.dumps(arguments), task]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(run: subprocess.Popen[str]) -> tuple[str, int, str]:
    """What it found, how many answers it did not ask for, what it said."""
    out, said = run.communicate(timeout=300)
    assert run.returncode == 0, said[-2000:]
    return out.partition("FOUND ")[2], int(out.partition("RESUMED ")[2].split()[0]), said


def count_kept(cache: Path) -> int:
    kept = 0
    for file in (cache / "interrupted").glob("*.sqlite"):
        try:
            with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
                kept += connection.execute("SELECT count(*) FROM answers WHERE name NOT LIKE '-%'").fetchone()[0]
        except sqlite3.Error:
            continue
    return kept


def kill(arguments: dict[str, Any], task: str, cache: Path, after: int) -> int:
    """Starts a run and ends it after some answers; how many it left."""
    run = start(arguments, task, cache)
    while run.poll() is None and count_kept(cache) < after:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert count_kept(cache) < 24, "it was killed before its end"
    return count_kept(cache)


def name(server: servers.Served, saved: Any, **options: Any) -> dict[str, Any]:
    return {"base_url": server.url, "model": "tiny", "tokenizer": str(saved("llama")), **options}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes its time, so that a run can be killed in the middle."""
    complete = servers.Model.complete
    monkeypatch.setattr(servers.Model, "complete", lambda *given: (time.sleep(0.05), complete(*given))[1])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("slow")
def test_a_run_through_a_server_that_is_killed_ends_as_one_that_was_not(task: str, saved: Any, tmp_path: Path) -> None:
    with serve(load(saved("llama"))) as server:
        arguments = name(server, saved, num_concurrent=2)
        expected, resumed, _ = finish(start(arguments, task, tmp_path / "whole"))
        assert resumed == 0
        assert not list((tmp_path / "whole" / "interrupted").iterdir())
        kept = 0
        for _ in range(2):
            left = kill(arguments, task, tmp_path / "killed", kept + 4)
            assert left >= kept + 4
            kept = left
        asked = len(server.asked)
        found, resumed, said = finish(start(arguments, task, tmp_path / "killed"))
        assert found == expected
        assert resumed >= kept
        assert "from an interrupted run" in said
        assert len(server.asked) - asked <= 24 - kept + 50, "what was kept is not asked again, but for the checks"
    assert not list((tmp_path / "killed" / "interrupted").glob("*.sqlite"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("slow")
def test_nothing_is_read_of_a_run_whose_server_has_another_model_now(task: str, saved: Any, tmp_path: Path) -> None:
    import torch

    with serve(load(saved("llama"))) as server:
        arguments = name(server, saved)
        kept = kill(arguments, task, tmp_path, 4)
        server.model = load(saved("llama"))
        with torch.no_grad():
            next(server.model.model.parameters()).mul_(1.001)
        expected, _, _ = finish(start(arguments, task, tmp_path / "alone"))
        found, resumed, said = finish(start(arguments, task, tmp_path))
    assert kept >= 4
    assert resumed == 0
    assert found == expected
    assert "is not gone on from: after" in said
    assert list((tmp_path / "interrupted").glob("*.stale-*"))


@pytest.mark.usefixtures("slow")
def test_nothing_is_read_where_only_long_prompts_are_answered_otherwise(saved: Any, tmp_path: Path) -> None:
    def change(body: dict[str, Any]) -> dict[str, Any]:
        return body

    with serve(load(saved("llama"))) as server:
        arguments = name(server, saved)
        assert kill(arguments, TASKS[0], tmp_path, 20) >= 20
        server.fault = Fault(ask=change, say=servers.each_logprobs(lower), least=300)
        found, resumed, said = finish(start(arguments, TASKS[0], tmp_path))
    assert resumed == 0
    assert "tokens is answered otherwise now" in said
    assert found


def lower(found: dict[str, Any]) -> dict[str, Any]:
    """Each log-probability a little lower, and those of the likeliest too."""
    found["token_logprobs"] = [value and value - 0.01 for value in found["token_logprobs"]]
    found["top_logprobs"] = [top and {text: value - 0.01 for text, value in top.items()} for top in found["top_logprobs"]]
    return found


@pytest.mark.usefixtures("slow")
def test_a_chat_goes_on_too(saved: Any, tmp_path: Path) -> None:
    model = load(saved("llama"))
    folder = tmp_path / "tokenizer"
    model.tokenizer.save_pretrained(folder)
    with serve(model) as server:
        arguments = {**name(server, saved), "base_url": server.chat, "tokenizer": str(folder), "trained_length": 200}
        kept = kill(arguments, TASKS[1], tmp_path, 4)
        found, resumed, _ = finish(start(arguments, TASKS[1], tmp_path))
        assert resumed >= kept
        assert found == finish(start(arguments, TASKS[1], tmp_path / "whole"))[0]


def test_a_server_is_known_by_what_it_says_and_by_how_likely() -> None:
    def make(noise: float, shift: float = 0.0, word: str = "yes") -> Any:
        turns = iter(range(1000))
        return likeness.take(lambda text: Text(word, {"a": -1.0 + shift + noise * (next(turns) % 3), "b": -2.0}, 5))

    exact = make(0.0)
    assert exact is not None
    assert likeness.find_change(exact, make(0.0)) == ""
    assert "likely tokens" in likeness.find_change(exact, make(0.0, shift=1e-4))
    assert "now says 'no'" in likeness.find_change(exact, make(0.0, word="no"))
    assert "nothing says" in likeness.find_change(None, exact)
    noisy = make(0.05)
    assert likeness.find_change(noisy, make(0.05, shift=0.04)) == ""
    assert "likely tokens" in likeness.find_change(noisy, make(0.05, shift=0.2))
    assert likeness.take(lambda text: Unmeasured("backend_error", "gone")) is None


def test_a_log_likelihood_may_differ_by_what_repeats_do_and_a_flag_may_not() -> None:
    def ask(*found: Any) -> Any:
        turns = iter(found)
        return lambda index: next(turns)

    kept = {7: [-3.0, True]}
    sizes = [10] * 8
    assert likeness.find_stale(kept, sizes, ask((-3.0, True))) == ""
    assert likeness.find_stale(kept, sizes, ask((-3.01, True), (-3.02, True))) == ""
    for found in ([(-3.01, True), (-3.01, True)], [(-3.0, False)], [Unmeasured("backend_error", "gone")]):
        assert "answered otherwise" in likeness.find_stale(kept, sizes, ask(*found))
    assert likeness.find_stale({0: "an answer"}, sizes, ask("an answer")) == ""
    assert "answered otherwise" in likeness.find_stale({0: "an answer"}, sizes, ask("another"))
