"""The site's files: which rows there are, what a row holds, and that data stays data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import LOSS, NIAH, PASSKEY, make_many, make_run

from harness_ext.errors import RecordError, ReportError
from harness_ext.results import figures, leaderboard
from harness_ext.results.leaderboard import Board, build_site, detail_run, list_scripts, to_script
from harness_ext.results.records import PublishedRun
from harness_ext.results.store import read_results, write_run


def tabulate(*runs: PublishedRun) -> dict[str, Any]:
    board = Board()
    for published in runs:
        board.add(published.run)
    return list_scripts(board)


def read_script(text: str) -> tuple[str, Any]:
    """Key and data of a script, as JavaScript reads them: its string literals here are Python's too, but for the quotes."""
    key, quoted = re.fullmatch(r"register\('([^']*)', '(.*)'\);\n", text, re.DOTALL).groups()
    return key, json.loads(re.sub(r"\\(.)", r"\1", quoted))


texts = st.text(st.characters(exclude_categories=("Cs",)))


@given(st.dictionaries(texts, texts | st.floats(allow_nan=False, allow_infinity=False) | st.none()))
def test_a_script_holds_its_data_and_nothing_that_ends_it(data: dict[str, Any]) -> None:
    script = to_script("index", msgspec.json.encode(data))
    assert read_script(script) == ("index", data)
    assert "<" not in script
    assert not {"\n", "\r", "\u2028", "\u2029"} & set(script[:-1])


def test_one_row_a_model_and_override() -> None:
    index = tabulate(make_run("lab/a"), make_run("lab/a", "yarn"), make_run("lab/b"))["index"]
    assert index["rows"]["model"] == ["lab/a", "lab/a", "lab/b"]
    overrides = index["rows"]["override"]
    assert [overrides["values"][row] for row in overrides["rows"]] == ["none", "yarn ×8", "none"]


def test_runs_of_different_tasks_share_a_row() -> None:
    first, second = make_run("lab/a", tasks=(PASSKEY,)), make_run("lab/a", tasks=(NIAH, LOSS))
    scripts = tabulate(first, second)
    assert scripts["index"]["rows"]["model"] == ["lab/a"]
    names = [task["name"] for task in scripts["index"]["tasks"]]
    assert names == [NIAH, PASSKEY, LOSS]
    ids = [scripts[f"task-{number}"]["run"][0] for number in range(3)]
    assert ids == [second.run.evaluation_id[:16], first.run.evaluation_id[:16], second.run.evaluation_id[:16]]


@pytest.mark.parametrize("newest_first", [True, False])
def test_of_runs_of_the_same_the_newest_is_shown(newest_first: bool) -> None:
    old, new = make_run(timestamp="2026-01-01T00:00:00Z", seed=1), make_run(timestamp="2026-02-01T00:00:00Z", seed=2)
    scripts = tabulate(*((new, old) if newest_first else (old, new)))
    assert scripts["task-0"]["run"] == [new.run.evaluation_id[:16]]


def test_a_run_that_claims_the_beginning_of_anothers_id_gets_a_key_of_its_own() -> None:
    first, second = make_run("lab/a"), make_run("lab/b")
    forged = msgspec.structs.replace(second.run, evaluation_id=first.run.evaluation_id[:16] + "0" * 48)
    scripts = tabulate(first, PublishedRun(run=forged, cells=second.cells))
    assert scripts["task-0"]["run"] == [first.run.evaluation_id[:16], forged.evaluation_id]


def test_what_was_not_measured_has_a_name_in_place_of_a_score() -> None:
    scores = tabulate(make_run(unmeasured={4: "hard_limit", 8: "out_of_memory"}))["task-0"]
    assert scores["columns"] == [0.5, 1, 2, 4, 8]
    assert scores["scores"][0][3:] == ["hard_limit", "out_of_memory"]
    assert all(0 <= score <= 1 for score in scores["scores"][0][:3])
    assert None not in scores["scores"][0]


def test_a_run_without_multiples_has_no_column_and_keeps_its_lengths() -> None:
    published = make_run(trained=None)
    scripts = tabulate(published)
    assert scripts["task-0"]["columns"] == []
    assert scripts["index"]["rows"]["trained"] == [None]
    assert detail_run(published)["tasks"][PASSKEY]["points"]["length"] == [128, 256, 512, 1024, 2048]


def test_many_multiples_leave_the_columns_to_the_most_common_and_to_octaves() -> None:
    runs = [make_run(f"lab/{n}", multiples=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16], depths=(0.5,)) for n in range(2)]
    assert tabulate(*runs)["task-0"]["columns"] == [1, 2, 3, 4, 5, 6, 8, 16]


def test_effective_lengths_are_those_of_the_records() -> None:
    published = make_run()
    found = tabulate(published)
    for effective in published.run.tasks[0].curve.effective_lengths:
        column = found[f"task-0-{effective.rule}"]
        assert (column["tokens"], column["lower"], column["upper"]) == ([effective.tokens], [effective.lower], [effective.upper])
    broken = tabulate(make_run(reach=0.1))["task-0-nolima"]
    assert broken["tokens"] == [None]
    assert broken["outcome"]["values"] == ["not_measurable"]


def test_charts_name_their_data_and_take_it_from_whoever_draws_them() -> None:
    points = [{"series": "a", "length": 1, "multiple": 0.5, "score": 1.0, "low": 0.9, "high": 1.0, "n": 9, "outcome": "measured"}]
    for name, spec in figures.make_specs().items():
        text = json.dumps(spec)
        assert "http" not in text.replace(spec["$schema"], ""), name
        filled = figures.fill(spec, "dark", 400, points=points)
        assert filled["datasets"] == {"points": points}
        assert {param["name"]: param["value"] for param in filled["params"]}["series"] == ["a"]
        assert "datasets" not in spec


def test_the_trained_length_is_drawn_and_what_is_past_it_is_shaded() -> None:
    import vl_convert

    points = [{"series": "a", "length": 256 * m, "multiple": m, "score": 0.5, "low": 0.4, "high": 0.6, "n": 9} for m in (0.5, 1, 2)]
    specs = figures.make_specs()
    drawn = vl_convert.vegalite_to_svg(figures.fill(specs["exact-multiple"], width=300, points=points))
    past = {param["name"]: param["value"] for param in figures.THEMES["light"]["params"]}["past"]
    assert f'fill="{past}"' in drawn
    unknown = vl_convert.vegalite_to_svg(figures.fill(specs["exact-length"], width=300, points=points))
    assert f'fill="{past}"' not in unknown


def test_the_site_holds_the_records_it_shows_as_they_were_published(tmp_path: Path) -> None:
    published = make_run("lab/a", tasks=(PASSKEY, LOSS))
    written, _ = write_run(tmp_path / "results", published)
    site = build_site(tmp_path / "results", tmp_path / "site")
    assert (site.rows, site.runs, site.problems) == (1, 1, ())
    key = published.run.evaluation_id[:16]
    assert (tmp_path / "site" / "records" / f"{key}.jsonl").read_bytes() == written.read_bytes()
    name, detail = read_script((tmp_path / "site" / "data" / f"run-{key}.js").read_text())
    assert name == f"run-{key}"
    assert detail["records"] == f"records/{key}.jsonl"
    assert detail["run"]["command"] == published.run.command


def test_good_records_of_a_file_with_bad_lines_are_shown_and_the_bad_ones_are_named(tmp_path: Path) -> None:
    written, _ = write_run(tmp_path / "results", make_run())
    with written.open("a") as file:
        file.write("<script>\n")
    site = build_site(tmp_path / "results", tmp_path / "site")
    assert site.rows == 1
    assert [problem.line for problem in site.problems] == [57]
    (copied,) = (tmp_path / "site" / "records").iterdir()
    assert "<script>" not in copied.read_text()


@pytest.mark.parametrize("newest_first", [True, False])
def test_a_run_made_again_leaves_every_record_as_it_was(
    newest_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    written = {write_run(results, make_run(timestamp=f"2026-11-{day}T10:00:00Z"))[0]: day for day in (20, 21, 22)}
    before = {path: path.read_bytes() for path in written}
    paths = sorted(written, key=lambda path: written[path], reverse=newest_first)
    monkeypatch.setattr(leaderboard, "list_files", lambda folder, problems: paths)
    build_site(results, tmp_path / "site")
    assert {path: path.read_bytes() for path in written} == before
    (shown,) = (tmp_path / "site" / "records").iterdir()
    assert shown.read_bytes() == next(content for path, content in before.items() if written[path] == 22)


def test_a_site_is_never_built_over_the_records_it_is_made_of(tmp_path: Path) -> None:
    written, _ = write_run(tmp_path / "records", make_run())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "index.js").touch()  # of an earlier site
    (tmp_path / "elsewhere" / "records").mkdir(parents=True)
    (tmp_path / "elsewhere" / "records" / "mine.jsonl").write_text("{}")
    for folder in (tmp_path, tmp_path / "elsewhere"):
        with pytest.raises(ReportError, match="name another folder with --out"):
            build_site(tmp_path / "records", folder)
    assert written.is_file()
    assert (tmp_path / "elsewhere" / "records" / "mine.jsonl").is_file()


def test_a_build_that_fails_leaves_the_site_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "results", make_run())
    build_site(tmp_path / "results", tmp_path / "site")
    before = {path: path.read_bytes() for path in (tmp_path / "site").rglob("*") if path.is_file()}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="publish one first"):
        build_site(tmp_path / "empty", tmp_path / "site")
    monkeypatch.setattr(leaderboard, "list_scripts", lambda board: {}["broken"])
    with pytest.raises(KeyError):
        build_site(tmp_path / "results", tmp_path / "site")
    assert {path: path.read_bytes() for path in (tmp_path / "site").rglob("*") if path.is_file()} == before


def test_a_record_that_was_changed_or_asks_for_more_than_there_is_gets_no_row_and_the_others_do(tmp_path: Path) -> None:
    write_run(tmp_path / "results", make_run("lab/good"))
    changed, _ = write_run(tmp_path / "results", make_run("lab/changed"))
    changed.write_bytes(b"".join(changed.read_bytes().splitlines(keepends=True)[:-1]))
    huge = make_run("lab/huge", depths=tuple(step / 3000 for step in range(3001)), multiples=(1, 2), n=1)
    many = [msgspec.structs.replace(prompt, sample=sample) for prompt in huge.cells[0].prompts for sample in range(3000)]
    cells = (msgspec.structs.replace(huge.cells[0], prompts=many), *huge.cells[1:])
    write_run(tmp_path / "results", PublishedRun(run=huge.run, cells=cells))
    site = build_site(tmp_path / "results", tmp_path / "site")
    assert site.rows == 1
    said = {problem.file.split("/")[0]: problem.message for problem in site.problems}
    assert "it was changed" in said["lab__changed"]
    assert "places of lengths, depths and samples" in said["lab__huge"]


def test_a_loss_that_is_called_like_another_task_does_not_take_its_place() -> None:
    honest, other = make_run("lab/a", tasks=(PASSKEY,)), make_run("lab/b", tasks=(LOSS,))
    named = [msgspec.structs.replace(task, evaluation_name=PASSKEY) for task in other.run.tasks]
    other = PublishedRun(run=msgspec.structs.replace(other.run, tasks=named), cells=())
    for order in ((honest, other), (other, honest)):
        tasks = tabulate(*order)["index"]["tasks"]
        assert [(task["name"], task["metric"], task["rows"]) for task in tasks] == [(PASSKEY, "exact", 1), (PASSKEY, "loss", 1)]


def test_a_second_build_replaces_the_first_and_leaves_other_files(tmp_path: Path) -> None:
    results, site = tmp_path / "results", tmp_path / "site"
    first, _ = write_run(results, make_run("lab/a"))
    build_site(results, site)
    (site / "README.md").write_text("kept")
    before = {path.name for path in (site / "data").iterdir()}
    first.unlink()
    write_run(results, make_run("lab/b"))
    build_site(results, site)
    after = {path.name for path in (site / "data").iterdir()}
    assert (site / "README.md").read_text() == "kept"
    assert len([name for name in after - before if name.startswith("run-")]) == 1
    assert len([name for name in after if name.startswith("run-")]) == 1


def test_the_same_records_make_the_same_site(tmp_path: Path) -> None:
    for run in make_many(3, cells=20):
        write_run(tmp_path / "results", run)
    for name in ("one", "two"):
        build_site(tmp_path / "results", tmp_path / name)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_several_processes_make_what_one_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard, "SHARE", 2)
    for run in make_many(5, cells=20):
        write_run(tmp_path / "results", run)
    for name, processes in (("one", 1), ("two", 2)):
        build_site(tmp_path / "results", tmp_path / name, processes)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_folders_that_are_no_results_or_no_site_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read"):
        build_site(tmp_path / "nothing", tmp_path / "site")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="publish one first"):
        build_site(tmp_path / "empty", tmp_path / "site")
    write_run(tmp_path / "results", make_run())
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "thesis.csv").write_text("1")
    with pytest.raises(ReportError, match="holds other things"):
        build_site(tmp_path / "results", tmp_path / "mine")
    assert (tmp_path / "mine" / "data" / "thesis.csv").read_text() == "1"


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "results", make_run())
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ReportError, match=r"could not be written to: .*; name another folder with --out"):
        build_site(tmp_path / "results", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_the_command_makes_a_site_and_says_where(tmp_path: Path) -> None:
    write_run(tmp_path / "results", make_run())
    command = [sys.executable, "-m", "harness_ext.cli", "leaderboard", str(tmp_path / "results"), "--out", str(tmp_path / "site")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"{tmp_path / 'site' / 'index.html'}: 1 rows of 1 runs\n"
    assert read_results(tmp_path / "results")[1] == []
