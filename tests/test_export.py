"""`harness-ext export`: every_eval_ever 0.3.0 and `.eval_results`, held to what their own packages read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import uuid
from pathlib import Path
from typing import Any

import hostile
import pytest
import yaml
from huggingface_hub import EvalResultEntry
from huggingface_hub._eval_results import parse_eval_result_entries
from made_outputs import edit_results, write_output

from harness_ext.cli import main
from harness_ext.publishing import prepare_run
from harness_ext.results.publish import Submission
from harness_ext.results.records import PublishedRun
from harness_ext.results.store import write_run

VALIDATOR = os.environ.get("EVERY_EVAL_EVER", "")
"""Their command, in an environment of its own: it needs Python 3.12 and another huggingface_hub."""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    out = write_output(tmp_path / "out", kinds=("scored", "generated", "loss"), unmeasured={1024: "hard_limit"}, controls=True)
    assert main(["publish", str(out.parent), "--results", str(tmp_path / "results")]) == 0
    return tmp_path / "results"


def export(results: Path, out: Path, *more: str) -> dict[str, bytes]:
    assert main(["export", str(results), "--out", str(out), "--format", *more]) == 0
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def split(files: dict[str, bytes]) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    (name,) = (name for name in files if name.endswith(".json"))
    samples = files[name.replace(".json", "_samples.jsonl")]
    return name, json.loads(files[name]), [json.loads(line) for line in samples.splitlines()]


def test_a_run_is_an_aggregate_file_and_its_samples_under_the_path_they_ask_for(results: Path, tmp_path: Path) -> None:
    files = export(results, tmp_path / "eee", "eee")
    name, aggregate, rows = split(files)
    stem = re.fullmatch(r"data/harness_ext/lab/tiny/([0-9a-f-]{36})\.json", name)
    assert stem
    assert (uuid.UUID(stem[1]).version, uuid.UUID(stem[1]).variant) == (4, uuid.RFC_4122)
    detail = aggregate["detailed_evaluation_results"]
    samples = files[detail["file_path"]]
    assert detail["checksum"] == hashlib.sha256(samples).hexdigest()
    assert detail["total_rows"] == len(rows) == 2 * (3 * 3 * 4 + 3 * 4 + 4), "two tasks of right and wrong; a loss is neither"
    assert {row["evaluation_id"] for row in rows} == {aggregate["evaluation_id"]}
    assert {row["model_id"] for row in rows} == {aggregate["model_info"]["id"]} == {"lab/tiny"}


def test_every_score_of_the_record_is_there_with_its_length_and_depth_and_what_was_not_measured_is_not(
    results: Path, tmp_path: Path
) -> None:
    _, aggregate, rows = split(export(results, tmp_path / "eee", "eee"))
    found = aggregate["evaluation_results"]
    scores = {
        (
            one["evaluation_name"],
            *(one["metric_config"]["metric_parameters"][name] for name in ("length", "depth", "control")),
        ): one["score_details"]["score"]
        for one in found
    }
    assert len(scores) == len(found)
    assert scores["passkey_extrapolate", 512, "all", None] == 0.75
    assert scores["passkey_extrapolate", 512, 0.5, None] == 0.75
    assert scores["passkey_extrapolate", 512, None, "needle_absent"] == 0.0
    assert scores["loss_extrapolate", 256, None, None] == pytest.approx(2.5 + 0.125 * 1.5)
    assert not [place for place in scores if place[1] == 1024]
    assert "passkey_extrapolate at 1024 tokens: hard_limit" in aggregate["source_metadata"]["additional_details"]["not_measured"]
    by_result = {row["evaluation_result_id"]: [] for row in rows}
    for row in rows:
        by_result[row["evaluation_result_id"]].append(row["evaluation"]["score"])
    for one in found:
        if one["evaluation_result_id"] in by_result:
            mean = sum(by_result[one["evaluation_result_id"]]) / len(by_result[one["evaluation_result_id"]])
            assert one["score_details"]["score"] == pytest.approx(mean)


def test_exporting_again_changes_nothing_and_a_run_made_again_is_exported_once(results: Path, tmp_path: Path) -> None:
    first = export(results, tmp_path / "eee", "eee")
    assert export(results, tmp_path / "eee", "eee") == first
    later = write_output(tmp_path / "later", kinds=("scored", "generated", "loss"), unmeasured={1024: "hard_limit"}, controls=True)
    edit_results(later, lambda run: run.update(date=run["date"] + 86400))
    write_run(results, prepare_run(later, Submission()))
    again = export(results, tmp_path / "again", "eee")
    assert len(again) == len(first)
    assert again.keys().isdisjoint(first)


def test_one_file_is_exported_as_a_folder_is(results: Path, tmp_path: Path) -> None:
    (file,) = results.rglob("*.jsonl")
    assert export(file, tmp_path / "one", "eee") == export(results, tmp_path / "all", "eee")


def test_a_file_is_exported_by_its_bare_name(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = results.rglob("*.jsonl")
    monkeypatch.chdir(file.parent)
    assert main(["export", file.name, "--out", str(tmp_path / "eee"), "--format", "eee"]) == 0


def test_a_record_that_does_not_hold_is_not_exported(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = results.rglob("*.jsonl")
    file.write_bytes(file.read_bytes().replace(b'"score":0.75', b'"score":0.95'))
    assert main(["export", str(results), "--out", str(tmp_path / "eee"), "--format", "eee"]) == 1
    assert "computed from the rest of the file, it is 0.75" in capsys.readouterr().err
    assert not (tmp_path / "eee").exists()


def test_names_that_mean_harm_stay_below_the_folder(tmp_path: Path) -> None:
    made: list[PublishedRun] = hostile.make_corpus(tmp_path / "results")
    files = export(tmp_path / "results", tmp_path / "eee", "eee")
    assert len(files) == 2 * len(made)
    assert all(
        re.fullmatch(r"data/harness_ext/[A-Za-z0-9._+-]+/tiny/[0-9a-f-]{36}(_samples\.jsonl|\.json)", name) for name in files
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eee", "results"]


@pytest.mark.skipif(not VALIDATOR, reason="EVERY_EVAL_EVER names no every_eval_ever command; see CONTRIBUTING.md")
def test_their_own_validator_takes_it(results: Path, tmp_path: Path) -> None:
    hostile.make_corpus(results)
    files = export(results, tmp_path / "eee", "eee")
    found = subprocess.run(
        [VALIDATOR, "validate", "--format", "json", *files], cwd=tmp_path / "eee", capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout
    assert [(one["valid"], one["errors"], one["warnings"]) for one in json.loads(found.stdout)] == [(True, [], [])] * len(files)
    assert subprocess.run([VALIDATOR, "check-duplicates", "data"], cwd=tmp_path / "eee", capture_output=True).returncode == 0


def test_a_model_page_gets_a_score_for_each_length_and_each_effective_length(results: Path, tmp_path: Path) -> None:
    files = export(results, tmp_path / "page", "eval_results", "--dataset", "lab/long")
    ((name, content),) = files.items()
    assert re.fullmatch(r"lab__tiny/\.eval_results/harness_ext-none-[0-9a-f]{8}\.yaml", name)
    entries = parse_eval_result_entries(yaml.safe_load(content))
    assert all(isinstance(entry, EvalResultEntry) and entry.dataset_id == "lab/long" for entry in entries)
    values = {entry.task_id: entry.value for entry in entries}
    assert len(values) == len(entries), "one score for a dataset and task"
    assert values["passkey_extrapolate_2x"] == 0.75
    assert values["passkey_extrapolate_effective_length_k_max"] == 512
    assert "passkey_extrapolate_4x" not in values, "was not measured"
    assert {entry.date for entry in entries} == {"2026-11-20T10:00:00Z"}


def test_a_model_page_without_a_benchmark_is_refused(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(results), "--out", str(tmp_path / "page"), "--format", "eval_results"]) == 1
    assert "--dataset ORG/NAME" in capsys.readouterr().err
