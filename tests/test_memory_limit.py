"""Memory that really runs out: lm_eval's command line in a process that may take so much and no more (RLIMIT_AS, `ulimit -v`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness_ext.models import cards, demand, foresight, machine, onednn
from harness_ext.models.forward import SMALLEST_CHUNK
from harness_ext.models.hf import HFExtrapolate

LENGTHS = [200, 256, 1024, 2048]
WIDE = {"hidden_size": 64, "num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 256}
"""Of a model whose cache takes 256 KiB a token, and whose weights take 33 MiB."""
ALLOWED = 340 * 2**20
"""Bytes beside the loaded model: 256 tokens, with the self-check before them, take some 230 MiB, 1,024 tokens more than 540."""
RUN = """
import json, os, resource, sys
from pathlib import Path
from harness_ext.models.hf import HFExtrapolate

load, allowed, group, read = HFExtrapolate.__init__, int(sys.argv.pop(1)), sys.argv.pop(1), []
if group:
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))

def load_and_limit(self, *args, **options):
    load(self, *args, **options)
    self.model.get_input_embeddings().register_forward_hook(lambda module, given, output: read.append(given[0].numel()))
    if group:
        names = (("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current"))
        limit, used = next((Path(group) / most, Path(group) / now) for most, now in names if (Path(group) / most).exists())
        limit.write_text(str(int(used.read_text()) + allowed))
    elif allowed:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + allowed
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

HFExtrapolate.__init__ = load_and_limit
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
print("READ", json.dumps(read))
"""


class Ran:
    """What a run wrote and said."""

    def __init__(self, out: Path, ran: subprocess.CompletedProcess[str]) -> None:
        self.said = ran.stderr
        assert ran.returncode == 0, ran.stderr[-3000:]
        (results,) = out.rglob("results_*.json")
        (samples,) = out.rglob("samples_*.jsonl")
        self.results: dict[str, Any] = json.loads(results.read_text())
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in samples.read_text().splitlines()]
        (config,) = self.results["configs"].values()
        self.lengths = {cell["length"]: cell for cell in config["lengths"]}
        self.reading = self.results["config"]["reading"]
        read = next(line for line in ran.stdout.splitlines() if line.startswith("READ"))
        self.read: list[int] = json.loads(read.removeprefix("READ"))

    def answers(self, lengths: list[int]) -> list[Any]:
        return [(row["doc_id"], row["resps"]) for row in self.rows if row["doc"]["length"] in lengths]


@pytest.fixture(scope="module")
def wide(saved: Any) -> Path:
    folder: Path = saved("llama", **WIDE)
    return folder


def run(folder: Path, out: Path, allowed: int, task: str, model_args: str = "", group: str = "") -> Ran:
    metadata = {"samples": 1, "depths": 3, "lengths": LENGTHS, "trained_length": 256}
    asked = ["--model", "hf-extrapolate", "--device", "cpu", "--model_args", f"pretrained={folder},trained_length=256{model_args}"]
    asked += ["--tasks", task, "--metadata", json.dumps(metadata), "--output_path", str(out), "--log_samples"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", RUN, str(allowed), group, *asked]
    return Ran(out, subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600))


@pytest.mark.parametrize("task", ["passkey_extrapolate", "passkey_extrapolate_generate"])
def test_past_a_real_limit_long_lengths_have_an_outcome_and_short_ones_their_numbers(task: str, wide: Path, tmp_path: Path) -> None:
    free, limited = run(wide, tmp_path / "free", 0, task), run(wide, tmp_path / "limited", ALLOWED, task)
    assert {cell["outcome"] for cell in free.lengths.values()} == {"measured"}
    assert free.reading["too_large"] is None
    assert limited.reading["sharing"].startswith("keys and values that are cut back"), "the self-check had what it takes"
    assert {tokens: cell["outcome"] for tokens, cell in limited.lengths.items()} == {
        200: "measured",
        256: "measured",
        1024: "out_of_memory",
        2048: "out_of_memory",
    }
    known = limited.reading["too_large"]  # a part of the first prompt that did not fit, or all of it, as the allocator has it
    assert known <= 1024
    for tokens in (1024, 2048):
        before = f", as {known} before," if tokens > known else " do not fit"
        assert limited.lengths[tokens]["reason"].startswith(f"{tokens} tokens{before}")
    assert [row["filtered_resps"] for row in limited.rows if row["doc"]["length"] > 256] == [["out_of_memory"]] * 6
    assert len(limited.rows) == len(free.rows) == 12
    metrics = {name: value for name, value in next(iter(limited.results["results"].values())).items() if "@" in name}
    assert metrics == {name: value for name, value in next(iter(free.results["results"].values())).items() if name in metrics}
    assert all("1024" not in name and "2048" not in name for name in metrics)
    for (number, ours), (same, theirs) in zip(limited.answers([200, 256]), free.answers([200, 256]), strict=True):
        assert number == same
        if task.endswith("generate"):
            assert ours == theirs
        else:
            assert float(ours[0][0][0]) == pytest.approx(float(theirs[0][0][0]), abs=1e-4)
    # smaller chunks are tried before a length is given up, and what is longer is not tried at all
    assert limited.reading["smallest_chunk"] < limited.reading["chunk"] == free.reading["smallest_chunk"] == 512
    assert "tokens at a time from here on" in limited.said
    assert sum(limited.read) < sum(free.read)
    assert sum("tokens at once do not fit" in line for line in limited.said.splitlines()) <= 2


def test_in_a_real_container_the_plan_keeps_the_process_from_being_ended(wide: Path, tmp_path: Path) -> None:
    """Control groups, version 1 or 2, where the tests may make one; without the plan, the same run is ended by the kernel."""
    tops = [path for path in map(Path, ("/sys/fs/cgroup/memory", "/sys/fs/cgroup")) if (path / "cgroup.procs").exists()]
    if not tops:
        pytest.skip("no control groups here")
    allowed = 400 * 2**20  # 2,048 tokens take 550
    group = tops[0] / f"harness_ext-tests-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    try:
        ran = run(wide, tmp_path / "planned", allowed, "passkey_extrapolate", group=str(group))
        outcomes = {tokens: cell["outcome"] for tokens, cell in ran.lengths.items()}
        assert (outcomes[200], outcomes[256], outcomes[2048]) == ("measured", "measured", "out_of_memory")
        assert "the container's limit" in ran.lengths[2048]["reason"]
        with pytest.raises(AssertionError, match=f"assert -{signal.SIGKILL.value} == 0"):
            run(wide, tmp_path / "tried", allowed, "passkey_extrapolate", ",try_all=True", group=str(group))
    finally:
        group.rmdir()


def foresee(
    wide: Path, evaluate: Any, monkeypatch: pytest.MonkeyPatch, free: int, **options: Any
) -> tuple[Any, HFExtrapolate, int]:
    """Results of a run in a container that has `free` bytes left, the model, and the most tokens that any forward held."""
    lm = HFExtrapolate(pretrained=str(wide), device="cpu", trained_length=256, **options)
    monkeypatch.setattr(machine, "read_free", lambda **_: machine.Free(free, "the container's limit, here"))
    held: list[int] = []
    forward = lm.model.forward

    def watched(*given: Any, **options: Any) -> Any:
        past = options.get("past_key_values")
        held.append(given[0].shape[1] + (past.get_seq_length() if past is not None else 0))
        return forward(*given, **options)

    monkeypatch.setattr(lm.model, "forward", watched)
    task = options.get("task", "passkey_extrapolate")
    results = evaluate(lm, [task], samples=1, depths=2, lengths=[200, 256, 1024, 2048])
    return results["configs"][task]["lengths"], lm, max(held)


def test_what_a_container_will_not_hold_is_marked_before_it_ends_the_process(
    wide: Path, evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, _, held = foresee(wide, evaluate, monkeypatch, 200 * 2**20)
    assert [cell["outcome"] for cell in cells] == ["measured", "measured", "out_of_memory", "out_of_memory"]
    assert cells[2]["reason"].startswith("1024 tokens do not fit into the memory of cpu and were not tried: 1023 tokens take 0.")
    assert cells[2]["reason"].endswith("GiB are free (the container's limit, here); try_all=True tries all the same")
    assert held <= 304  # the self-check's


def test_only_smaller_pieces_are_read_where_larger_ones_would_end_the_process(
    wide: Path, evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, lm, _ = foresee(wide, evaluate, monkeypatch, 780 * 2**20)
    assert {cell["outcome"] for cell in cells} == {"measured"}
    assert lm._reader.describe()["chunk"] < 512


@pytest.mark.parametrize(("room", "outcome"), [(1.25, "out_of_memory"), (1.4, "measured")])
def test_a_length_is_tried_where_there_is_room_for_what_a_process_takes_beyond_the_plan(
    room: float, outcome: str, wide: Path, evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = foresight._strip(HFExtrapolate(pretrained=str(wide), device="cpu", trained_length=256)._reader)
    need = cards.find_need(bare, 2047, SMALLEST_CHUNK)
    times, more = demand.find_slack(torch.device("cpu"), torch.float32)
    cells, _, _ = foresee(wide, evaluate, monkeypatch, int(room * (need.cache + times * need.reading + more)))
    assert [cell["outcome"] for cell in cells] == ["measured", "measured", "measured", outcome]


def test_there_is_room_for_what_products_in_half_precision_leave_behind(wide: Path) -> None:
    float32, bfloat16 = (
        foresight._strip(HFExtrapolate(pretrained=str(wide), device="cpu", dtype=dtype)._reader)
        for dtype in ("float32", "bfloat16")
    )
    assert foresight._weigh(bfloat16, 64, 64) - foresight._weigh(float32, 64, 64) > 300 * 2**20
    assert foresight._weigh(bfloat16, 2**20, 64) < foresight._weigh(float32, 2**20, 64), "where the cache is most of it"


def test_what_onednn_keeps_is_bounded_unless_the_user_has_bounded_it() -> None:
    script = (
        "import os; from harness_ext.models.hf import HFExtrapolate; HFExtrapolate(pretrained='reference/rope', device='cpu'); "
        "print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'], os.environ['LRU_CACHE_CAPACITY'])"
    )
    free = {name: value for name, value in os.environ.items() if name not in onednn.KEPT}
    for given, expected in (({}, ["256", "64"]), ({"LRU_CACHE_CAPACITY": "7"}, ["256", "7"])):
        ran = subprocess.run([sys.executable, "-c", script], env={**free, **given}, stdout=subprocess.PIPE, text=True, check=True)
        assert ran.stdout.split() == expected


def test_what_will_not_fit_is_tried_where_the_user_says_so(wide: Path, evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, _, held = foresee(wide, evaluate, monkeypatch, 200 * 2**20, try_all=True)
    assert {cell["outcome"] for cell in cells} == {"measured"}
    assert held >= 2047
