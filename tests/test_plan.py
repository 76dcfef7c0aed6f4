"""`harness-ext plan`: what it says of a run, held against the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build
from families import LENGTH

from harness_ext import plan as command
from harness_ext.cli import main
from harness_ext.compare import Asked, build_model, load_tasks
from harness_ext.errors import ModelError
from harness_ext.models import demand, foresight, machine, pieces
from harness_ext.models.demand import Probed, _features, _fit, find_peak
from harness_ext.models.forward import Forward, Run
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.prefix_tree import ALIKE
from harness_ext.models.rehearsal import rehearsing
from harness_ext.models.self_check import find_state
from harness_ext.plan import plan_run

TASK = "passkey_extrapolate"
CPU = {"device": "cpu"}
SMALL = {"samples": 1, "depths": 3, "multiples": [1, 2]}


def ask(model: str = "reference/rope", *tasks: str, **changes: Any) -> Asked:
    given = {"metadata": SMALL, "model_args": CPU, **changes}
    return Asked(model=model, methods=("none",), tasks=tasks or (TASK,), **given)


def count_read(lm: HFExtrapolate, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each later forward reads, in tokens with padding, while requests are answered and not while the model is checked."""
    counts: list[int] = []
    within = [0]

    def watch(name: str) -> None:
        own = getattr(lm._reader, name)

        def watched(*args: Any, **options: Any) -> Any:
            within[0] += 1
            try:
                return own(*args, **options)
            finally:
                within[0] -= 1

        monkeypatch.setattr(lm._reader, name, watched)

    watch("score")
    watch("generate")
    lm.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: counts.append(args[0].numel()) if within[0] else None
    )
    return counts


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"exact": True}),
        ("llama", {"chunk": 50}),
        ("llama", {"extend": "dynamic"}),
        ("mistral-window", {}),
        ("mamba2", {}),
    ],
)
def test_a_run_reads_what_was_planned_forward_by_forward(
    family: str, options: dict[str, Any], batch_size: Any, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    model_args = {**CPU, "dtype": "float32", "trained_length": 128, **options}
    metadata = {"lengths": [200, 400], "samples": 2, "depths": 3}
    asked = ask(str(saved(family)), TASK, "loss_extrapolate", metadata=metadata, model_args=model_args, batch_size=batch_size)
    manager, tasks = load_tasks(asked)
    lm = build_model(asked, "none")
    requests = [request for name, task in tasks.items() for request in command.build_requests(name, task, lm, None)]
    reader = lm._reader
    with rehearsing(lm) as rehearse:
        planned = rehearse(requests)
    assert lm._reader is reader
    assert "_detect_batch_size" not in vars(lm)
    counts = count_read(lm, monkeypatch)
    lm_eval.simple_evaluate(model=lm, tasks=list(asked.tasks), task_manager=manager, bootstrap_iters=0)
    expected = [piece.rows * (piece.stop - piece.start) for piece in planned.pieces]
    assert counts == expected if planned.lanes == 1 else sorted(counts) == sorted(expected)
    assert (lm._reader.asked, lm._reader.computed) == (planned.asked, planned.computed)
    if batch_size == 1:
        assert planned.computed <= sum(counts) <= ALIKE * planned.computed  # leaves of about one length are padded to it


@pytest.mark.parametrize(("batch_size", "fitting"), [(1, 9), (3, 9), (8, 2)])
def test_a_generating_run_reads_what_was_planned_and_then_a_token_at_a_time(
    batch_size: int, fitting: int, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    free = 2**33
    monkeypatch.setattr(foresight.machine, "read_free", lambda **_: machine.Free(free, "what is free, here"))
    monkeypatch.setattr(foresight, "guess_token", lambda model: free // (2 * fitting * 400))
    metadata = {"lengths": [200, 400], "samples": 2, "depths": 3}
    model_args = {**CPU, "dtype": "float32"}
    asked = ask(str(saved("llama")), f"{TASK}_generate", metadata=metadata, model_args=model_args, batch_size=batch_size)
    manager, tasks = load_tasks(asked)
    lm = build_model(asked, "none")
    with rehearsing(lm) as rehearse:
        requests = command.build_requests(TASK, tasks[f"{TASK}_generate"], lm, None)
        planned = rehearse(requests)
    assert sum(piece.rows for piece in planned.pieces if piece.budget) == len({request.args[0] for request in requests})
    assert max(piece.rows for piece in planned.pieces if piece.budget) == min(batch_size, fitting)
    counts = count_read(lm, monkeypatch)
    lm_eval.simple_evaluate(model=lm, tasks=list(asked.tasks), task_manager=manager, bootstrap_iters=0)
    read = sum(piece.rows * (piece.stop - piece.start) for piece in planned.pieces)
    assert read < sum(counts) <= read + sum(piece.rows * (piece.budget - 1) for piece in planned.pieces if piece.budget)


@pytest.mark.parametrize(
    ("family", "heads", "width"), [("llama", 2, 8), ("qwen2", 2, 8), ("mistral-window", 2, 8), ("mamba2", 0, 0)]
)
def test_a_token_takes_keys_and_values_of_each_layer(family: str, heads: int, width: int, saved: Any) -> None:
    """Grouped heads and windows that are kept in full come out as they are, and a recurrent state takes nothing for a token."""
    asked = ask(
        str(saved(family)), metadata={"lengths": [200, 400], "samples": 1, "depths": 1}, model_args={**CPU, "dtype": "float32"}
    )
    found = plan_run(asked).demand
    assert found.state_token == 2 * 2 * heads * width * 4
    assert (found.state_fixed > 0) == (family == "mamba2")


def test_lengths_that_are_left_out_are_said_with_their_reason(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--tasks", TASK, "--metadata", json.dumps(SMALL), "--model_args", "device=cpu"]
    assert main(["plan", "reference/learned", *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if " 512 (2x)" in line)
    assert row.split("|")[-2].strip() == "hard_limit"
    assert any(line.startswith(f"- hard_limit, {TASK}: the position table of") for line in lines)
    (row,) = (line for line in lines if " 256 (1x)" in line)
    assert row.split("|")[-2].strip() == "fits"


def test_a_length_that_cannot_fit_is_said_not_to(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fitting = plan_run(ask())
    assert fitting.fits
    short, long = fitting.tasks[0].lengths
    assert [length.verdict for length in (short, long)] == ["fits", "fits"]
    assert short.least_bytes is not None
    assert long.least_bytes is not None
    assert short.least_bytes < long.least_bytes <= (long.planned_bytes or 0)
    monkeypatch.setattr(demand, "read_free", lambda model: int(foresight.MARGIN * (short.least_bytes + long.least_bytes) / 2))
    arguments = ["--tasks", TASK, "--metadata", json.dumps(SMALL), "--model_args", "device=cpu", "--json"]
    assert main(["plan", "reference/rope", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["tasks"][0]["lengths"]
    assert first["verdict"] in ("fits", "fits in smaller pieces")
    assert second["verdict"].startswith("will not fit: needs ")
    assert found["fits"] is False


@pytest.mark.parametrize("try_all", [False, True])
def test_a_length_that_a_run_would_leave_out_to_be_safe_is_said_not_to_fit(try_all: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    least = plan_run(ask()).tasks[0].lengths[-1].least_bytes
    assert least is not None
    monkeypatch.setattr(demand, "read_free", lambda model: int(least * (1 + (foresight.MARGIN - 1) / 2)))
    found = plan_run(ask(model_args={**CPU, "try_all": True} if try_all else CPU))
    verdict = found.tasks[0].lengths[-1].verdict
    assert verdict.startswith("fits") if try_all else (" to spare, " in verdict and verdict.startswith("will not fit"))


def test_memory_and_time_grow_with_length_and_prompts() -> None:
    few, many = (plan_run(ask(metadata={"samples": samples, "depths": 3, "multiples": [1, 2, 4]})) for samples in (1, 4))
    needs = [length.planned_bytes or 0 for length in many.tasks[0].lengths]
    assert needs == sorted(needs)
    assert needs[0] > 0
    assert many.total.computed > 2 * few.total.computed
    assert few.total.seconds > 0
    assert (many.total.asked, many.total.prompts) == (4 * few.total.asked, 4 * few.total.prompts)


def test_tasks_share_in_one_run_and_are_counted_apart_too() -> None:
    found = plan_run(ask("reference/rope", TASK, "loss_extrapolate"))
    assert [task.task for task in found.tasks] == [TASK, "loss_extrapolate"]
    assert found.total.prompts == sum(task.reading.prompts for task in found.tasks)
    assert found.total.asked == sum(task.reading.asked for task in found.tasks)
    assert found.total.computed <= sum(task.reading.computed for task in found.tasks)
    for task in found.tasks:
        assert [length.length.tokens for length in task.lengths] == [256, 512]
        assert sum(length.prompts for length in task.lengths) == task.reading.prompts
        assert all(length.verdict == "fits" for length in task.lengths)


def test_nothing_is_scored_or_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.model import CacheHook

    monkeypatch.setattr(Run, "_score", lambda *_: pytest.fail("a prompt was scored"))
    monkeypatch.setattr(CacheHook, "add_partial", lambda *_: pytest.fail("an answer was kept"))
    monkeypatch.setattr(HFExtrapolate, "_model_generate", lambda *_, **__: pytest.fail("an answer was generated"))
    found = plan_run(ask("reference/rope", TASK, f"{TASK}_generate"))
    assert found.total.generated > 0
    assert found.demand.step_seconds > 0


def test_a_program_reads_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tasks", TASK, "--limit", "4", "--metadata", json.dumps(SMALL), "--model_args", "device=cpu,extend=yarn"]
    assert main(["plan", "reference/rope", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trained_length"] == {"tokens": 256, "source": "config.max_position_embeddings"}
    assert found["fits"] is True
    (task,) = found["tasks"]
    assert [(length["length"]["tokens"], length["length"]["multiple"], length["prompts"]) for length in task["lengths"]] == [
        (256, 1, 2),
        (512, 2, 2),
    ]
    for length in task["lengths"]:
        assert length["planned_bytes"] == length["state_bytes"] + length["reading_bytes"] > 0
    assert task["reading"] == found["total"]
    assert 0 < found["total"]["computed"] < found["total"]["asked"] == 2 * 255 + 2 * 511
    assert found["demand"]["weights"] > 1_000_000
    assert all(piece["seconds"] > 0 and piece["bytes"] > 0 for piece in found["demand"]["probed"])


def test_a_task_of_lm_evals_own_is_planned_at_its_longest_prompt(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text(
        "task: plain\ndataset_path: json\ndataset_kwargs: {data_files: "
        + str(tmp_path / "rows.jsonl")
        + "}\ntest_split: train\ndoc_to_text: q\ndoc_to_target: a\noutput_type: loglikelihood\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"q": "one", "a": "two"}\n{"q": "one and two", "a": "three"}\n')
    found = plan_run(ask("reference/rope", "plain", include_path=str(tmp_path)))
    lm = HFExtrapolate(pretrained="reference/rope", **CPU)
    longest = sum(map(len, lm._encode_pair("one and two", "three")))
    (length,) = found.tasks[0].lengths
    assert (length.length.tokens, length.prompts, length.verdict) == (longest, 2, "fits")


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reference/rope", "--tasks", "passkey_extrapolat.yaml"], "did you mean passkey_extrapolate?"),
        (["reference/rop", "--tasks", TASK], "is not embedded here"),
        (["reference/rope", "--tasks", TASK, "--metadata", '{"multipels": [1]}'], "did you mean 'multiples'?"),
        (["reference/rope", "--tasks", TASK, "--model_args", "extend=yarm"], "extend=yarm was asked for"),
    ],
)
def test_a_mistake_is_one_line_and_status_one(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_weights_that_do_not_fit_are_one_error_before_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "build_model", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr(demand, "read_free_of", lambda device: 1000)
    with pytest.raises(
        ModelError, match=r"the weights of reference/rope take 1\.\d MiB in float32, and 1000 B are free; use a lower"
    ):
        plan_run(ask())


def test_weights_that_a_device_refuses_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(command, "build_model", refuse)
    with pytest.raises(ModelError, match="the weights of reference/rope do not fit into memory: CUDA out of memory"):
        plan_run(ask())


def test_an_encoder_decoder_is_refused(saved: Any) -> None:
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        plan_run(ask(str(saved("t5")), metadata={"lengths": [200]}))


# ---------------------------------------------------------------------- what is measured


def test_the_peak_is_what_is_held_at_once() -> None:
    block = 2**18  # of four bytes
    held = [torch.zeros(block)]

    def run() -> None:
        one = held[0] + 1
        two = one * 2
        del one
        held[0] = two.view(-1) + two  # the first is dropped here, when three are there
        two.add_(1)

    peak = find_peak(torch.device("cpu"), run, list(held))
    assert peak == 2 * 4 * block


def test_a_surface_through_four_pieces_is_what_they_were_made_of() -> None:
    terms = (0.003, 2e-5, 1e-7, 4e-9)
    pieces = [(0, 8), (0, 512), (3000, 3008), (3000, 3512)]
    values = [float(sum(a * b for a, b in zip(terms, _features(*piece), strict=True))) for piece in pieces]
    probed = [Probed(start=start, stop=stop, seconds=0, bytes=0) for start, stop in pieces]
    found = _fit(probed, values)
    assert (found.fixed, found.token, found.held, found.pair) == pytest.approx(terms)
    assert found.at(1, 3000, 3512) == pytest.approx(values[-1])


def test_what_a_chunk_takes_is_weighed_where_it_is_read_to_its_end() -> None:
    """A chunk of which nothing is scored ends when the last layer's keys are kept; the others have that layer's widest tensor, too."""
    chunk, wide = 128, 4096
    model = build("llama", num_hidden_layers=1, intermediate_size=wide)
    assert pieces.install(model)
    forward = Forward(model, torch.device("cpu"))
    make = find_state(forward, LENGTH, 400).make
    assert make is not None
    assert make(0).attentions, "or nothing is cut short"
    found = demand.measure(forward, make, chunk=chunk, longest=400, generates=False)
    assert found.bytes.at(1, 0, chunk) > chunk * wide * 4
