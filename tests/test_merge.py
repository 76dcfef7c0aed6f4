"""Parts of an evaluation, joined, are the whole; and what is no part of it is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_outputs import edit_results, hash_rows, read_rows, write_rows

from harness_ext.cli import main
from harness_ext.errors import ShardError
from harness_ext.merging import join, join_attention, join_lengths
from harness_ext.models import journal, ledger, side_by_side
from harness_ext.publishing import prepare_run
from harness_ext.results.outputs import find_outputs
from harness_ext.results.publish import Submission
from harness_ext.results.records import PublishedRun
from harness_ext.sharding import check_tasks
from harness_ext.shards import Shard

PARTS = 3
TASKS = ["passkey_extrapolate", "passkey_extrapolate_generate", "loss_extrapolate"]
METADATA = {"samples": 3, "depths": 2, "lengths": [128, 256]}
OF_THE_MOMENT = {"git_hash", "date", "start_time", "end_time", "total_evaluation_time_seconds", "parts"}


def evaluate(out: Path, *more: str, shard: str = "", exact: bool = True) -> None:
    """One run, or one part of it, by the command."""
    model = ["--model", "hf-extrapolate", "--device", "cpu", "--model_args", f"pretrained=reference/rope,exact={exact}"]
    part = ["--shard", shard] if shard else []
    asked = ["--tasks", ",".join(TASKS), "--metadata", json.dumps(METADATA), "--output_path", str(out), "--log_samples"]
    assert main(["run", *part, *model, *asked, *more]) == 0


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, `whole`, and its parts, each prompt read alone."""
    folder = tmp_path_factory.mktemp("parts")
    evaluate(folder / "whole")
    for index in range(1, PARTS + 1):
        evaluate(folder / f"part-{index}", shard=f"{index}/{PARTS}")
    return folder


@pytest.fixture
def parts(made: Path, tmp_path: Path) -> list[Path]:
    """Copies of the parts, to be changed."""
    return [Path(shutil.copytree(made / f"part-{index}", tmp_path / f"part-{index}")) for index in range(1, PARTS + 1)]


def read_run(place: Path) -> PublishedRun:
    [file] = find_outputs([place])
    return prepare_run(file, Submission())


def find_results(place: Path) -> Path:
    [file] = place.rglob("results_*.json")
    return file


def find_samples(place: Path, task: str) -> Path:
    [file] = place.rglob(f"samples_{task}_2*.jsonl")
    return file


def refuse(places: list[Path], out: Path) -> list[str]:
    """What keeps parts from being joined, line by line; nothing was written."""
    with pytest.raises(ShardError) as refused:
        join(places, out / "joined")
    assert not (out / "joined").exists()
    return str(refused.value).splitlines()


def test_parts_joined_are_byte_for_byte_the_whole(made: Path, parts: list[Path], tmp_path: Path) -> None:
    joined = join(parts, tmp_path / "out")
    for task in TASKS:
        assert find_samples(tmp_path / "out", task).read_bytes() == find_samples(made / "whole", task).read_bytes()
    found, whole = (json.loads(file.read_text()) for file in (joined.file, find_results(made / "whole")))
    for results in (found, whole):
        results["config"]["reading"].pop("seconds")
    assert {**found, **dict.fromkeys(OF_THE_MOMENT)} == {**whole, **dict.fromkeys(OF_THE_MOMENT)}
    assert list(found["results"]) == list(whole["results"])
    assert (joined.parts, joined.tasks, joined.prompts) == (
        PARTS,
        3,
        sum(len(read_rows(f)) for f in (made / "whole").rglob("*.jsonl")),
    )


def test_what_is_published_of_joined_parts_is_what_is_published_of_the_whole(made: Path, parts: list[Path], tmp_path: Path) -> None:
    join(parts, tmp_path)
    found, whole = read_run(tmp_path), read_run(made / "whole")
    assert found.run.evaluation_id == whole.run.evaluation_id
    assert found.run.tasks == whole.run.tasks
    assert found.run.command == whole.run.command
    assert found.cells == whole.cells


def test_parts_that_share_what_prompts_begin_with_have_the_scores_of_the_whole(tmp_path: Path) -> None:
    evaluate(tmp_path / "whole", "--limit", "20", exact=False)
    for index in (1, 2):
        evaluate(tmp_path / f"part-{index}", "--limit", "20", shard=f"{index}/2", exact=False)
    join([tmp_path / "part-1", tmp_path / "part-2"], tmp_path / "joined")
    found, whole = read_run(tmp_path / "joined"), read_run(tmp_path / "whole")
    assert found.run.evaluation_id == whole.run.evaluation_id
    for one, other in zip(found.cells, whole.cells, strict=True):
        assert one.successes == other.successes
        assert [prompt.fingerprint for prompt in one.prompts] == [prompt.fingerprint for prompt in other.prompts]
        likelihoods = [[prompt.log_likelihood for prompt in cell.prompts if prompt.log_likelihood] for cell in (one, other)]
        assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-4)
    for own, theirs in zip(found.run.tasks, whole.run.tasks, strict=True):
        if own.metric == "exact":
            assert own.curve == theirs.curve


def test_a_part_says_which_it_is_and_is_no_run(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = json.loads(find_results(made / "part-2").read_text())["shard"]
    assert (said["index"], said["of"]) == (2, PARTS)
    samples = [json.loads(find_results(made / f"part-{index}").read_text())["shard"]["tasks"] for index in range(1, PARTS + 1)]
    for task in TASKS:
        assert sorted(sample for part in samples for sample in part[task]["here"]) == [0, 1, 2]
    assert main(["report", str(made / "part-2"), "--out", str(tmp_path)]) == 1
    assert main(["publish", str(made / "part-2"), "--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("parts of a run alone; join them first: harness-ext merge") == 2
    assert not list(tmp_path.iterdir())


def test_parts_beside_the_joined_run_are_passed_over(parts: list[Path], tmp_path: Path) -> None:
    joined = join(parts, tmp_path)
    assert find_outputs([tmp_path]) == [joined.file.resolve()]


def test_joining_again_writes_the_same_bytes(parts: list[Path], tmp_path: Path) -> None:
    files = [
        joined.file
        for joined in (join(parts, tmp_path / "one"), join(parts[::-1], tmp_path / "two"), join(parts, tmp_path / "one"))
    ]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
    assert len(list((tmp_path / "one").rglob("*.*"))) == 1 + len(TASKS)


def test_a_part_is_never_written_over(parts: list[Path], tmp_path: Path) -> None:
    together = tmp_path / "together"
    for part in parts:
        shutil.copytree(part, together, dirs_exist_ok=True)
    kept = {file: file.read_bytes() for file in together.rglob("*.*")}
    with pytest.raises(ShardError, match="name another folder"):
        join([together], together)
    assert {file: file.read_bytes() for file in together.rglob("*.*")} == kept
    assert join([together], tmp_path / "out").parts == PARTS


def test_a_missing_part_is_named_and_so_is_one_that_is_there_twice(parts: list[Path], tmp_path: Path) -> None:
    assert join([*parts, parts[0]], tmp_path / "out").parts == PARTS, "one folder named twice is one part"
    again = Path(shutil.copytree(parts[2], tmp_path / "again"))
    said = refuse([parts[0], parts[2], again], tmp_path)
    assert said[0] == "part 2/3 is missing: run it (--shard 2/3), or name the folder it is in"
    assert said[1].startswith("part 3/3 is there 2 times: ")
    assert len(said) == 2


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "weights": (lambda run: run["config"].update(weights_fingerprint="0" * 64), "config.weights_fingerprint"),
    "dtype": (lambda run: run["config"].update(model_dtype="torch.bfloat16"), "config.model_dtype"),
    "arguments": (lambda run: run["config"]["model_args"].update(chunk=64), "model_args.chunk"),
    "batch size": (lambda run: run["config"].update(batch_size=8), "config.batch_size"),
    "limit": (lambda run: run["config"].update(limit=4.0), "config.limit"),
    "override": (lambda run: run["config"]["override"].update(method="yarn"), "config.override.method"),
    "versions": (lambda run: run["config"]["packages"].update(torch="1.0"), "config.packages.torch"),
    "lm_eval": (lambda run: run.update(lm_eval_version="0.4.14"), "lm_eval_version"),
    "chat template": (lambda run: run.update(chat_template_sha="0" * 64), "chat_template_sha"),
    "seed": (lambda run: run["shard"]["tasks"][TASKS[0]].update(seed=1), f"tasks.{TASKS[0]}.seed"),
    "task": (lambda run: run["shard"]["tasks"].update(other=run["shard"]["tasks"].pop(TASKS[2])), "tasks.loss_extrapolate.version"),
    "prompts": (lambda run: run["shard"]["tasks"][TASKS[1]].update(records="0" * 32), f"tasks.{TASKS[1]}.records"),
    "haystack": (lambda run: run["shard"]["tasks"][TASKS[2]].update(haystack="0" * 64), f"tasks.{TASKS[2]}.haystack"),
    "number of parts": (lambda run: run["shard"].update(of=4), "--shard of"),
    "device": (lambda run: run["config"]["hardware"].update(device="cuda"), "device"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_part_of_another_run_is_refused_and_what_differs_is_named(name: str, parts: list[Path], tmp_path: Path) -> None:
    change, field = CHANGES[name]
    edit_results(find_results(parts[0]), change)
    [said] = refuse(parts, tmp_path)
    assert said.startswith(f"{find_results(parts[0]).resolve()} is part of another run than {tmp_path}")
    assert f"{field} is " in said


def test_where_and_when_a_part_ran_makes_no_other_run_of_it(parts: list[Path], tmp_path: Path) -> None:
    def move(run: dict[str, Any]) -> None:
        run["config"]["hardware"] |= {"name": "another processor", "count": 1}
        run["config"]["model_args"] |= {"cache_dir": "/scratch/elsewhere", "token": "secret"}
        run |= {"date": run["date"] - 100, "pretty_env_info": "other"}

    edit_results(find_results(parts[1]), move)
    before = json.loads(find_results(parts[0]).read_text())["config"]["hardware"]["name"]
    joined = join(parts, tmp_path / "out")
    assert "2 kinds of machines" in joined.notes[0]
    found = json.loads(joined.file.read_text())
    assert found["config"]["hardware"]["name"] == " + ".join(sorted([before, "another processor"]))
    assert found["config"]["hardware"]["count"] == 1
    assert [part["hardware"]["name"] for part in found["parts"]] == [before, "another processor", before]
    assert found["date"] == min(part["date"] for part in found["parts"])
    assert read_run(tmp_path / "out").run.hardware


def test_a_length_that_one_part_could_not_measure_is_not_measured_in_the_whole() -> None:
    measured = {"length": 8, "outcome": "measured"}
    lacking = {"length": 8, "outcome": "out_of_memory"}
    assert join_lengths([[measured], [lacking], [measured]]) == [lacking]


def test_attention_is_pooled_over_the_prompts_of_all_parts() -> None:
    cell = {
        "task": "why",
        "arm": "long",
        "length": 8,
        "asked": 1,
        "prompts": 1,
        "tokens": {"rest": 5.0},
        "rest": ["0.2000 1.0000", "0.0000 0.0000"],
    }
    other = {**cell, "asked": 3, "prompts": 3, "tokens": {"rest": 9.0}, "rest": ["0.6000 0.0000", "0.0000 1.0000"]}
    alone, none = {**cell, "length": 4}, {"task": "why", "arm": "long", "length": 16, "asked": 2, "prompts": 0}
    seen = {"outcome": "measured", "reason": "", "layers": [0, 1]}
    joined = join_attention([{**seen, "cells": [cell, none]}, {**seen, "cells": [other, alone, none]}])
    pooled = {**cell, "asked": 4, "prompts": 4, "tokens": {"rest": 8.0}, "rest": ["0.5000 0.2500", "0.0000 0.7500"]}
    assert joined == {**seen, "cells": [alone, pooled, {**none, "asked": 4}]}
    unseen = {"outcome": "not_seen", "reason": "windows"}
    assert join_attention([{**seen, "cells": [cell]}, unseen]) == unseen


def test_a_part_that_was_cut_off_is_named_and_passed_over_once_it_was_made_again(parts: list[Path], tmp_path: Path) -> None:
    whole = Path(shutil.copytree(parts[1], tmp_path / "again"))
    samples = find_samples(parts[1], TASKS[0])
    samples.write_bytes(samples.read_bytes()[:-100])
    [said] = refuse(parts, tmp_path)
    assert said.startswith("part 2/3 is not whole: ")
    assert str(samples.name) in said
    joined = join([*parts, whole], tmp_path / "out")
    assert joined.parts == PARTS
    assert "part 2/3 is there whole as well" in joined.notes[0]
    samples.unlink()
    assert refuse(parts, tmp_path)[0].startswith("part 2/3 is not whole: ")


def test_a_last_line_that_does_not_end_is_a_line(made: Path, parts: list[Path], tmp_path: Path) -> None:
    for part in parts:
        samples = find_samples(part, TASKS[0])
        samples.write_bytes(samples.read_bytes().rstrip(b"\n"))
    join(parts, tmp_path / "out")
    assert find_samples(tmp_path / "out", TASKS[0]).read_bytes() == find_samples(made / "whole", TASKS[0]).read_bytes()


def test_a_file_in_place_of_the_folder_is_named(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ShardError, match=r"--output_path: .* could not be written to"):
        join(parts, tmp_path / "file")


def test_an_argument_that_changes_answers_makes_another_run_of_a_part(parts: list[Path], tmp_path: Path) -> None:
    edit_results(find_outputs([parts[1]], parts=True)[0], lambda run: run["config"]["model_args"].update(think_end_token="1"))
    assert any("think_end_token" in line for line in refuse(parts, tmp_path))


def test_samples_that_were_changed_are_found_out(parts: list[Path], tmp_path: Path) -> None:
    samples = find_samples(parts[0], TASKS[0])
    rows = read_rows(samples)
    write_rows(samples, rows[:-1])
    assert "does not hold the samples" in refuse(parts, tmp_path)[0]
    edit_results(find_results(parts[0]), lambda run: run["task_hashes"].update({TASKS[0]: hash_rows(rows[:-1])}))
    [said] = refuse(parts, tmp_path)
    assert f"{TASKS[0]}: 1 of 12 prompts are missing, the first of them doc_id {rows[-1]['doc_id']}" in said
    write_rows(samples, [*rows, rows[0]])
    edit_results(find_results(parts[0]), lambda run: run["task_hashes"].update({TASKS[0]: hash_rows([*rows, rows[0]])}))
    [said] = refuse(parts, tmp_path)
    assert "1 of 12 prompts are there twice" in said
    assert str(samples) in said


def test_a_whole_run_trash_and_an_empty_folder_are_no_parts(made: Path, parts: list[Path], tmp_path: Path) -> None:
    assert "was made without --shard" in refuse([*parts, made / "whole"], tmp_path)[0]
    (tmp_path / "empty").mkdir()
    assert "holds no results of lm_eval" in refuse([tmp_path / "empty"], tmp_path)[0]
    file = find_results(parts[0])
    for trash in ("", "[]", "{", '{"shard": 3}', '{"shard": {"index": 1, "of": 3, "tasks": {}}}', '{"shard": {"index": "1"}}'):
        file.write_text(trash)
        [said] = refuse(parts, tmp_path)
        assert said.startswith(str(file.resolve()))


def test_an_interrupted_part_goes_on_and_ends_as_if_nothing_had_happened(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = journal.Journal.write, [3]

    def interrupt(self: journal.Journal, answers: dict[int, Any]) -> None:
        write(self, answers)
        left[0] -= len(answers)
        if left[0] <= 0:
            raise KeyboardInterrupt

    monkeypatch.setenv("HARNESS_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ledger, "FLUSH", 0)
    monkeypatch.setattr(side_by_side, "FLUSH", 0.01)
    monkeypatch.setattr(journal.Journal, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "part", shard=f"2/{PARTS}")
    assert not list((tmp_path / "part").rglob("results*"))
    monkeypatch.setattr(journal.Journal, "write", write)
    evaluate(tmp_path / "part", shard=f"2/{PARTS}")
    assert json.loads(find_results(tmp_path / "part").read_text())["config"]["reading"]["resumed"] >= 3
    for task in TASKS:
        files = list((made / "part-2").rglob(f"samples_{task}_2*"))
        assert [file.read_bytes() for file in files] == [
            file.read_bytes() for file in (tmp_path / "part").rglob(f"samples_{task}_2*")
        ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--output_path", "out"], "found no --log_samples"),
        ([], "found no --output_path and --log_samples"),
        (["--output_path", "out", "--log_samples", "--samples", '{"passkey_extrapolate": [0]}'], "found --samples"),
        (["--output_path", "out", "--predict_only"], "found --predict_only"),
    ],
)
def test_a_part_that_could_not_be_joined_is_refused_before_a_model_loads(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--shard", "1/2", "--tasks", TASKS[0], *more]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ShardError: --shard 1/2")
    assert said in error


def test_what_cannot_be_split_is_refused(load: Any) -> None:
    shard, ours = Shard(index=1, of=2), {TASKS[0]: load(TASKS[0], lengths=[256])}
    with pytest.raises(ShardError, match="arc_easy cannot be split"):
        check_tasks(shard, SimpleNamespace(world_size=1), {**ours, "arc_easy": object()}, {})
    with pytest.raises(ShardError, match="ask for 8 times as many parts"):
        check_tasks(shard, SimpleNamespace(world_size=8), ours, {})
    with pytest.raises(ShardError, match="the group mine has scores of its own"):
        check_tasks(shard, SimpleNamespace(world_size=1), ours, {"mine": SimpleNamespace(has_aggregation=True)})


SBATCH = """#!/usr/bin/env bash
# In Slurm's place: runs an array's jobs one after the other, or what --wrap says, and names the job.
while [[ $1 == --* ]]; do
    case $1 in --array=*) array=${1#--array=} ;; --wrap) exec bash -c "$2" ;; esac
    shift
done
for SLURM_ARRAY_TASK_ID in $(seq "${array%-*}" "${array#*-}"); do export SLURM_ARRAY_TASK_ID; bash "$@" >/dev/null 2>&1 || exit; done
echo "4711;cluster"
"""


def test_the_slurm_example_runs_each_part_and_joins_them(tmp_path: Path) -> None:
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(SBATCH)
    stand_in.chmod(0o755)
    path = os.pathsep.join([str(stand_in.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    asked = [
        "--model_args",
        "pretrained=reference/rope",
        "--model",
        "hf-extrapolate",
        "--tasks",
        TASKS[0],
        "--metadata",
        json.dumps(METADATA),
    ]
    command = ["bash", str(Path(__file__).parent.parent / "examples" / "slurm.sh"), "2", "my out", *asked]
    ran = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "2 parts, 12 prompts of 1 tasks" in ran.stdout
    assert len(read_run(tmp_path / "my out").cells) == 4


def test_without_a_shard_it_is_lm_eval(made: Path) -> None:
    results = json.loads(find_results(made / "whole").read_text())
    assert "shard" not in results
    assert results["n-samples"][TASKS[0]] == {"original": 12, "effective": 6}
    assert results["config"]["limit"] is None
