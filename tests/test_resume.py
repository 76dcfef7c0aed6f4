"""A run that is killed and started again goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_prefix_tree import SEQUENCES

from harness_ext.cells import Unmeasured
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.journal import Journal, Kept, name_prompt, name_scope
from harness_ext.models.prefix_tree import Batch, leave_out, plan, plan_whole

KILLS = int(os.environ.get("HARNESS_EXT_TEST_KILLS", "1"))
SAMPLES = 3 * -(-KILLS // 5)
"""Enough that the last kill, too, comes before the end."""
RUN = """
import os, signal, sys, json, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests were started with it ignored
from harness_ext.models import journal, ledger, side_by_side
ledger.FLUSH, side_by_side.FLUSH, write = 0, 0.01, journal.Journal.write
def slowly(self, answers):
    write(self, answers)
    time.sleep(0.2 if answers else 0)
journal.Journal.write = slowly
import lm_eval, harness_ext
harness_ext.install()
from lm_eval.tasks import TaskManager
from harness_ext.models.hf import HFExtrapolate
options = json.loads(sys.argv[2])
lm = HFExtrapolate(pretrained=sys.argv[1], device="cpu", dtype="float32", **options)
tasks = TaskManager(include_defaults=False, metadata={"lengths": [200, 400], "samples": int(sys.argv[4]), "depths": 4, "trained_length": 200})
found = lm_eval.simple_evaluate(model=lm, tasks=sys.argv[3].split(","), task_manager=tasks, bootstrap_iters=0)
kept = {"results": found["results"], "samples": found["samples"]}
print("RESUMED", found["config"]["reading"]["resumed"])
print("FOUND", json.dumps(kept, sort_keys=True, default=str))
"""


def start(folder: Path, cache: Path, options: dict[str, Any], tasks: str, cores: int = 1) -> subprocess.Popen[str]:
    environment = {**os.environ, "HARNESS_EXT_CACHE": str(cache), "OMP_NUM_THREADS": str(cores)}
    command = [sys.executable, "-c", RUN, str(folder), json.dumps(options), tasks, str(SAMPLES)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(run: subprocess.Popen[str]) -> tuple[str, int, str]:
    """What it found, as bytes are compared; how many answers it did not compute; what it said."""
    out, said = run.communicate(timeout=300)
    assert run.returncode == 0, said[-2000:]
    resumed = int(next(line.split()[1] for line in out.splitlines() if line.startswith("RESUMED")))
    return next(line for line in out.splitlines() if line.startswith("FOUND")), resumed, said


def list_files(cache: Path) -> list[Path]:
    return sorted((cache / "interrupted").glob("*.sqlite"))


def count_kept(cache: Path) -> int:
    kept = 0
    for file in list_files(cache):
        try:
            with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as connection:
                kept += connection.execute("SELECT count(*) FROM answers").fetchone()[0]
        except sqlite3.Error:
            continue
    return kept


@pytest.mark.parametrize(
    ("family", "options", "tasks", "cores"),
    [
        ("llama", {"chunk": 64}, "passkey_extrapolate,loss_extrapolate", 1),
        ("llama", {"chunk": 64}, "passkey_extrapolate,loss_extrapolate", 2),
        ("mamba2", {"chunk": 64}, "passkey_extrapolate", 1),
        ("llama", {"batch_size": 2}, "passkey_extrapolate_generate", 1),
        ("llama", {"exact": True}, "passkey_extrapolate,passkey_extrapolate_generate", 1),
    ],
)
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(
    family: str, options: dict[str, Any], tasks: str, cores: int, saved: Any, tmp_path: Path
) -> None:
    folder, rng = saved(family), random.Random(0)
    expected, resumed, _ = finish(start(folder, tmp_path / "whole", options, tasks, cores))
    assert resumed == 0
    assert not list_files(tmp_path / "whole")
    cache, kept = tmp_path / "killed", 0
    for _ in range(KILLS):
        run, wanted, begun = start(folder, cache, options, tasks, cores), kept + rng.randint(1, 2), time.monotonic()
        while run.poll() is None and count_kept(cache) < wanted and time.monotonic() - begun < 120:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))  # so that it also falls into a forward, or into a write
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert list_files(cache), "it was killed before its end"
        assert count_kept(cache) >= kept, "nothing that was finished is lost"
        kept = count_kept(cache)
    assert kept > 0
    found, resumed, said = finish(start(folder, cache, options, tasks, cores))
    assert found == expected
    assert resumed >= kept
    assert "from an interrupted run" in said
    assert not list_files(cache)


def test_another_model_override_dtype_or_prompt_reads_nothing_of_an_interrupted_run(saved: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"chunk": 64}
    run = start(saved("llama"), tmp_path, options, "passkey_extrapolate")
    while run.poll() is None and count_kept(tmp_path) < 3:
        time.sleep(0.01)
    run.kill()
    run.communicate()
    assert count_kept(tmp_path) >= 3
    others = [(saved("llama", hidden_act="gelu"), options), (saved("llama"), {**options, "extend": "linear", "factor": 2.0})]
    for folder, other in others:
        assert finish(start(folder, tmp_path, other, "passkey_extrapolate"))[1] == 0


def test_only_the_same_weights_dtype_and_batches_go_on_from_each_other(saved: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, other = saved("llama"), tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(folder)
    next(model.parameters()).data.mul_(1.01)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(folder).save_pretrained(other)

    def name(pretrained: Path, **options: Any) -> str:
        lm = HFExtrapolate(pretrained=str(pretrained), device="cpu", **{"dtype": "float32", **options})
        lm.model.config._name_or_path = ""  # it is told apart by what it is, not by where
        with lm.evaluating():
            lm._resume("loglikelihood", [[1, 2, 3]], [2])
            assert lm._journals.opened
            return lm._journals.opened[0].file.name

    known = name(folder)
    assert name(folder) == known
    changed = [name(other), name(folder, dtype="bfloat16"), name(folder, batch_size=2), name(folder, chunk=64)]
    assert len({known, *changed}) == 5


def test_ctrl_c_says_what_is_finished_and_how_to_go_on(saved: Any, tmp_path: Path) -> None:
    run = start(saved("llama"), tmp_path, {"chunk": 64}, "passkey_extrapolate")
    while run.poll() is None and count_kept(tmp_path) < 2:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode != 0
    assert f"of {8 * SAMPLES} answers" in said
    assert "The same command goes on from them" in said


def test_an_outcome_is_not_kept_and_an_answer_is(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "3.sqlite", "abc")
    Kept({}, journal.write).add({0: (-1.5, True), 1: Unmeasured("out_of_memory", "it did not fit"), 2: "an answer"})
    journal.close()
    assert Journal(tmp_path / "3.sqlite", "abc").read() == {0: [-1.5, True], 2: "an answer"}


@pytest.mark.parametrize("damage", [b"", b"not a database at all, but long enough to be read as one" * 100])
def test_a_damaged_file_is_set_aside_and_nothing_else_is_lost(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = (Journal(tmp_path / name, "abc") for name in ("1.sqlite", "2.sqlite"))
    for journal in (one, other):
        journal.write({0: [-1.5, True], 2: [float("-inf"), False]})
        journal.close()
    one.file.write_bytes(damage)
    again = Journal(one.file, "abc")
    assert again.read() == {}
    assert ("is damaged" in caplog.text) == bool(damage)
    again.write({1: "an answer"})
    assert Journal(one.file, "abc").read() == {1: "an answer"}
    assert Journal(other.file, "abc").read() == {0: [-1.5, True], 2: [float("-inf"), False]}


@pytest.mark.parametrize("step", ["rename", "unlink"])
def test_a_damaged_file_that_cannot_be_set_aside_costs_a_warning_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "1.sqlite"
    file.write_bytes(b"no database at all" * 100)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, step, refuse)
    journal = Journal(file, "abc")
    assert journal.read() == {}
    journal.write({0: "an answer"})
    assert "is damaged" in caplog.text
    assert "cannot be put aside, and answers are not kept: [Errno 30] Read-only file system" in caplog.text
    assert file.read_bytes() == b"no database at all" * 100


def test_a_folder_that_cannot_be_written_to_costs_a_warning_and_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "interrupted").write_text("a file where the folder should be")
    journal = Journal(tmp_path / "interrupted" / "1.sqlite", "abc")
    journal.write({0: "x"})
    assert journal.read() == {}
    assert "not kept" in caplog.text


def test_two_processes_may_write_to_one_file(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from harness_ext.models.journal import Journal\n"
    code += "j = Journal(Path(sys.argv[1]), [str(n) for n in range(400)])\n"
    code += "for n in range(int(sys.argv[2]), 400, 2): j.write({n: n})"
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "1.sqlite"), str(first)]) for first in (0, 1)]
    assert [run.wait(120) for run in runs] == [0, 0]
    assert Journal(tmp_path / "1.sqlite", [str(number) for number in range(400)]).read() == {
        number: number for number in range(400)
    }


def test_a_file_that_others_are_making_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    connect, locked = Journal._connect_once, [3]

    def connect_late(self: Journal) -> sqlite3.Connection:
        locked[0] -= 1
        if locked[0] >= 0:
            raise sqlite3.OperationalError("database is locked")
        return connect(self)

    monkeypatch.setattr(Journal, "_connect_once", connect_late)
    Journal(tmp_path / "1.sqlite", "a").write({0: "an answer"})
    assert Journal(tmp_path / "1.sqlite", "a").read() == {0: "an answer"}
    locked[0] = 10**9
    monkeypatch.setattr("harness_ext.models.journal.WAIT", 0.1)
    Journal(tmp_path / "1.sqlite", "a")
    assert "not kept, should the run be interrupted" in caplog.text


def test_prompts_that_are_cut_otherwise_are_other_prompts() -> None:
    def name(facts: dict[str, int], *prompts: list[int]) -> str:
        return name_scope(facts, [name_prompt(prompt, "cut") for prompt in prompts])

    assert name({}, [1, 2], [3]) != name({}, [1], [2, 3])
    assert name({"a": 1}, [1]) != name({"a": 2}, [1])
    assert name_prompt([1, 2], 1) != name_prompt([1, 2], 2)


@given(SEQUENCES, st.data(), st.booleans())
def test_what_is_left_stands_on_the_same_tokens_computed_by_the_same_steps(
    sequences: list[list[int]], data: st.DataObject, cut: bool
) -> None:
    wanted = [data.draw(st.integers(0, len(sequence) - 1)) for sequence in sequences]
    batch = Batch(rows=data.draw(st.integers(1, 4)), tokens=data.draw(st.integers(0, 60)), leaves=data.draw(st.integers(0, 20)))
    schedule = plan(sequences, wanted, batch if cut else Batch(), cut=cut)
    known = set(data.draw(st.lists(st.integers(0, len(sequences) - 1))))
    steps = leave_out(schedule.steps, known)
    assert [step for step in schedule.steps if step in steps] == list(steps)
    written = {id(step): _below(schedule.steps, number) for number, step in enumerate(schedule.steps)}
    for number, step in enumerate(steps):
        assert _below(steps, number) == written[id(step)]
    left = {read.sequence for step in steps for read in step.reads}
    assert left >= set(range(len(sequences))) - known
    if known >= set(range(len(sequences))):
        assert not steps


def _below(steps: Any, number: int) -> list[int]:
    """For each token that a step stands on, the step that computed it, walked forwards."""
    cache: list[int] = []
    aside: dict[int, list[int]] = {}
    for step in steps[: number + 1]:
        if step.resume and step.start in aside:
            cache = aside.pop(step.start)
        cache = cache[: step.start]
        if step is steps[number]:
            assert len(cache) == step.start
            return cache
        if step.copy:
            aside[step.start] = list(cache)
        if len(step.rows) == 1:
            cache = cache + [id(step)] * (step.stop - step.start)
    raise AssertionError


def test_whole_prompts_that_are_known_are_left_out() -> None:
    schedule = plan_whole([[1, 2], [3], [4, 5, 6]], [0, 0, 0], Batch(rows=2, tokens=100))
    assert [step.rows for step in leave_out(schedule.steps, {2, 0})] == [(1,)]
