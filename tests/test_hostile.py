"""Records of strangers: each broken one is refused with its line named, and each that is taken is data and nothing else."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import time
from pathlib import Path

import hostile
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness_ext.cli import main
from harness_ext.results import store
from harness_ext.results.audit import audit_folder
from harness_ext.results.records import PublishedRun
from harness_ext.results.store import decode_record, read_results, to_bytes, write_run


@pytest.fixture(scope="module")
def good() -> PublishedRun:
    return hostile.make_good()


@pytest.fixture(scope="module")
def lines(good: PublishedRun) -> list[bytes]:
    return to_bytes(good).splitlines()


def test_the_corpus_is_as_large_as_was_asked() -> None:
    assert len(hostile.BROKEN) >= 50


@pytest.mark.parametrize("name", hostile.BROKEN)
def test_a_broken_record_is_refused_by_file_and_line(name: str, lines: list[bytes], tmp_path: Path) -> None:
    _, line, complaint = hostile.BROKEN[name]
    file = hostile.write_broken(tmp_path, name, lines=lines)
    start = time.process_time()
    problems = audit_folder(tmp_path).problems
    assert time.process_time() - start < 5
    said = [problem for problem in problems if problem.line == line and re.search(complaint, problem.message)]
    assert said, [str(problem)[:300] for problem in problems]
    assert {problem.file for problem in problems} == {file}
    assert all(len(str(problem)) <= 600 and str(problem).isprintable() for problem in problems)


@pytest.mark.parametrize("name", [name for name, (_, line, _) in hostile.BROKEN.items() if line == hostile.CELL])
def test_a_bad_cell_is_left_out_and_the_good_ones_are_kept(
    name: str, good: PublishedRun, lines: list[bytes], tmp_path: Path
) -> None:
    hostile.write_broken(tmp_path, name, lines=lines)
    runs, problems = read_results(tmp_path)
    assert all(problem.line == hostile.CELL for problem in problems)
    (found,) = runs
    assert found.run == good.run
    if "bytes on a line" not in hostile.BROKEN[name][2]:  # after which nothing is read
        assert [cell for cell in found.cells if cell in good.cells[1:]] == list(good.cells[1:])


def test_good_files_are_read_beside_all_the_broken_ones(
    good: PublishedRun, lines: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, good)
    for name in hostile.BROKEN:
        hostile.write_broken(tmp_path, name, lines=lines)
    runs, _ = read_results(tmp_path)
    assert good in runs
    assert main(["validate", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert len(shown.err.splitlines()) <= 201, "bounded"


def test_hostile_text_in_a_valid_record_is_data_and_comes_back_as_it_was(tmp_path: Path) -> None:
    made = hostile.make_corpus(tmp_path / "results")
    runs, problems = read_results(tmp_path / "results")
    assert problems == []
    found = {run.run.evaluation_id: run for run in runs}
    assert len(found) == len(made) == len(hostile.SCRIPTS)
    assert all(found[run.run.evaluation_id] == run for run in made)
    assert audit_folder(tmp_path / "results").problems == ()
    for path in tmp_path.rglob("*"):
        assert re.fullmatch(r"[A-Za-z0-9._+-]{1,120}", path.name), path
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "nothing outside the folder"


# ---------------------------------------------------------------------- what is no file of records


def test_links_pipes_devices_and_folders_are_named_and_not_opened(good: PublishedRun, tmp_path: Path) -> None:
    path, _ = write_run(tmp_path / "results", good)
    secret = tmp_path / "secret.jsonl"
    secret.write_bytes(to_bytes(good))
    folder = path.parent
    (folder / "link.jsonl").symlink_to(secret)
    (folder / "device.jsonl").symlink_to("/dev/zero")
    (folder / "dangling.jsonl").symlink_to("/nowhere")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "folder.jsonl").mkdir()
    (folder / "notes.txt").write_text("hello")
    (tmp_path / "results" / "away__link").symlink_to(tmp_path)
    (tmp_path / "results" / "loop__link").symlink_to(tmp_path / "results")
    found = audit_folder(tmp_path / "results")
    assert found.runs == 1
    assert sorted(problem.file for problem in found.problems) == [
        "away__link",
        *(
            f"lab__tiny/{name}"
            for name in ("dangling.jsonl", "device.jsonl", "folder.jsonl", "link.jsonl", "notes.txt", "pipe.jsonl")
        ),
        "loop__link",
    ]


def test_a_file_that_becomes_a_link_or_a_pipe_between_two_looks_is_not_followed(good: PublishedRun, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(to_bytes(good))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    assert store.read_file(tmp_path / "real", "real")[0]
    for name in ("link", "pipe"):
        file, problems = store.read_file(tmp_path / name, name)
        assert file is None
        assert len(problems) == 1


def test_a_line_of_a_gigabyte_is_refused_in_no_time_and_no_memory(good: PublishedRun, tmp_path: Path) -> None:
    write_run(tmp_path, good)
    hostile.write_sparse(tmp_path / "lab__tiny" / f"none-{'0' * 16}.jsonl", 2**30)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = audit_folder(tmp_path)
    assert [problem.message for problem in found.problems] == [f"{2**30} bytes; expected at most {store.MAX_FILE}; it was not read"]
    assert found.runs == 1
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"


def test_a_line_that_fills_the_largest_file_is_read_no_farther_than_a_line_may_be(good: PublishedRun, tmp_path: Path) -> None:
    path, _ = write_run(tmp_path, good)
    hostile.write_sparse(path, store.MAX_FILE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, problems = read_results(tmp_path)
    assert [problem.line for problem in problems] == [1, 1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "kilobytes"


def test_folders_of_others_in_the_same_place_are_left_alone(good: PublishedRun, tmp_path: Path) -> None:
    write_run(tmp_path, good)
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "runs.jsonl").write_text("something else")
    (tmp_path / "README.md").write_text("what this is")
    assert audit_folder(tmp_path).problems == ()


def test_a_file_name_with_control_characters_is_shown_without_them(
    good: PublishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write_run(tmp_path, good)
    (path.parent / "a\x1b[2J\nb.jsonl").write_text("{}")
    assert main(["validate", str(tmp_path)]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_a_file_in_the_folder_of_another_model_or_under_another_name_is_named(good: PublishedRun, tmp_path: Path) -> None:
    path, _ = write_run(tmp_path, good)
    for name in ("other__model/" + path.name, f"lab__tiny/none-{'0' * 16}.jsonl", f"lab__tiny/yarn-{path.name[-22:]}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(path.read_bytes())
    problems = {problem.file: problem.message for problem in audit_folder(tmp_path).problems}
    assert len(problems) == 3
    assert "another run's; expected lab__tiny/none-" in problems["other__model/" + path.name]


# ---------------------------------------------------------------------- anything at all


@given(st.binary(max_size=200))
def test_no_bytes_make_a_reader_fail_otherwise_than_by_naming_them(tmp_path_factory: pytest.TempPathFactory, found: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.jsonl"
    path.write_bytes(found)
    file, problems = store.read_file(path, "x.jsonl")
    assert file is None
    assert problems


@given(st.data())
def test_a_line_with_anything_put_in_anywhere_is_taken_as_it_stands_or_refused(good: PublishedRun, data: st.DataObject) -> None:
    line = to_bytes(good).splitlines()[data.draw(st.integers(0, 3))].decode()
    place = data.draw(st.integers(0, len(line)))
    changed = line[:place] + data.draw(st.text(max_size=5)) + line[place + data.draw(st.integers(0, 5)) :]
    with contextlib.suppress(ValueError):
        decode_record(changed)
