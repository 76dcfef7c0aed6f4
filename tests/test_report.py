"""The report: in the terminal, as figures, and what is said where charts cannot be made. Its page is tested in test_page.py."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
from made_outputs import write_output
from made_runs import LOSS, NIAH, PASSKEY, make_run

from harness_ext.cli import main
from harness_ext.publishing import prepare_run
from harness_ext.results.leaderboard import name_run
from harness_ext.results.paired import compare_runs
from harness_ext.results.publish import Submission
from harness_ext.results.report import Shown, make_page, write_report
from harness_ext.results.statistics import holm
from harness_ext.results.store import write_run
from harness_ext.results.terminal import Screen, show_runs


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    run = make_run("lab/rope", "yarn", controls=True, tasks=(PASSKEY, LOSS), multiples=[0.5, 1, 2, 4, 8, 16, 32, 64])
    lines = show_runs([run], Screen(width=width)).splitlines()
    drawn = [line for line in lines if "█" in line or "%  " in line]
    assert drawn
    assert max(map(len, drawn)) <= width


def test_numbers_of_the_curve_stand_beside_their_bars() -> None:
    run = make_run(reach=1.1, unmeasured={8: "out_of_memory"})
    lines = show_runs([run], Screen()).splitlines()
    for point in run.run.tasks[0].curve.points:
        (line,) = (line for line in lines if line.split()[:1] == [f"{point.length:,}"])
        if point.score_details:
            assert f"{100 * point.score_details.score:.1f} [" in line
        else:
            assert line.split() == ["2,048", "8×", "out_of_memory"]
    assert lines.index(next(line for line in lines if "past the trained length" in line)) == 5


def test_what_is_not_measurable_says_why_and_no_number() -> None:
    text = show_runs([make_run(reach=0.1)], Screen())
    assert "NoLiMa: not measurable, fails inside its own window" in " ".join(text.split())


def test_every_two_runs_on_the_same_prompts_are_tested_in_one_table_a_task() -> None:
    runs = [make_run("lab/rope", method, reach=reach) for method, reach in (("none", 1.1), ("linear", 2), ("yarn", 4))]
    lines = show_runs(runs, Screen()).splitlines()
    start = lines.index(f"{PASSKEY}, two runs on the same prompts")
    assert "over the 18 tests of this table" in " ".join(lines[start:])
    pairs = list(itertools.combinations(runs, 2))
    tests = [compare_runs(*pair) for pair in pairs]
    corrected = holm([test.p_haystacks or 0 for group in tests for test in group])
    for number, ((first, second), group) in enumerate(zip(pairs, tests, strict=True)):
        place = lines.index(f"  {name_run(first.run)} : {name_run(second.run)}", start)
        for row, test, p in zip(lines[place + 1 :], group, corrected[6 * number :], strict=False):
            assert f"{test.only_first} : {test.only_second}  p {p:.2g} " in row
        assert "past the trained length" in lines[place + 6]


def test_runs_of_other_prompts_are_named_in_a_line_and_nothing_else_is_lost() -> None:
    runs = [make_run("lab/a", tasks=(PASSKEY, LOSS)), make_run("lab/b", tasks=(PASSKEY, LOSS)), make_run("lab/c", seed=1)]
    text = " ".join(show_runs(runs, Screen()).split())
    assert "lab/a · none : lab/b · none 128" in text
    assert text.count("not compared: ") == 2
    assert "not compared: lab/a none and lab/c none were given different prompts" in text
    assert f"{LOSS}, two runs" not in text


def test_one_run_has_no_pairs_and_too_many_are_not_tested() -> None:
    assert "same prompts" not in show_runs([make_run()], Screen())
    many = [make_run(f"lab/{number}", multiples=[1, 2], depths=(0.5,)) for number in range(13)]
    assert f"{PASSKEY}: 13 runs; at most 12 are tested in pairs" in show_runs(many, Screen())


def test_colours_are_for_terminals_and_blocks_for_those_that_have_them() -> None:
    run = make_run(unmeasured={8: "hard_limit"})
    assert "\033[" in show_runs([run], Screen(colour=True))
    assert "\033" not in show_runs([run], Screen())
    drawn = [line for line in show_runs([run], Screen(blocks=False)).splitlines() if "#" in line]
    assert drawn
    assert all(set(line) <= set(" 0123456789,.[]×#+") for line in drawn)


def test_a_figure_a_task_and_a_heat_map_a_run_are_written(tmp_path: Path) -> None:
    runs = [make_run("lab/rope", method, tasks=(PASSKEY, NIAH, LOSS)) for method in ("none", "yarn")]
    files = write_report([Shown(published=run, source="out") for run in runs], tmp_path)
    assert {file.name for file in files} == {
        "report.html",
        *(f"{name}.{kind}" for name in (PASSKEY, NIAH, LOSS) for kind in ("png", "svg")),
        *(f"{name}-profile.{kind}" for name in (PASSKEY, NIAH) for kind in ("png", "svg")),
        *(f"{name}-depths-{number}.{kind}" for name in (PASSKEY, NIAH) for number in (1, 2) for kind in ("png", "svg")),
    }
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files if file.suffix == ".png")
    svg = (tmp_path / f"{PASSKEY}.svg").read_text()
    assert "lab/rope · none" in svg
    assert "lab/rope · yarn ×8" in svg


def far(length: int, depth: float, sample: int) -> bool:
    return length <= 256 or (length == 512 and sample % 2 == 0)


def write_why(folder: Path, **options: Any) -> Path:
    """A run with arms: positions take it all, and one arm was left out."""
    left_out = [{"arm": "other_text", "length": None, "outcome": "not_admitted", "reason": "no other text is at hand"}]
    arms = {"stretched": far, "packed": lambda *_: True, "emptied": far, "packed_emptied": lambda *_: True}
    return write_output(folder, right=far, arms=arms, left_out=left_out, samples=10, **options)


def test_why_a_score_falls_is_said_with_its_arms_and_effects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_why(tmp_path)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    said = " ".join(printed.split())
    assert "why: of the 50 points lost at 2×, 50 [" in said
    assert "] are due to unseen positions, 0 [" in said
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.strip()}
    assert rows["stretched"] == ["·", "100", "50", "0"]
    assert rows["packed"] == ["·", "·", "100", "100"]
    assert rows["other_text"] == ["·", "none", "none", "none"]
    assert "left out: other_text at 1×, 2×, 4×, not_admitted: no other text is at hand" in said
    assert "stretched 0 [" in said
    svg = (tmp_path / "report" / f"{PASSKEY}-why.svg").read_text()
    assert "long: the plain prompt" in svg
    assert "stretched: few tokens, far apart" in svg
    assert "other text" not in svg
    assert (tmp_path / "report" / f"{PASSKEY}.png").is_file()


def test_arms_alone_are_reported_without_a_curve_and_what_they_lose_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_output(tmp_path, arms={"stretched": far}, swept=False, multiples=(1, 2, 64))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert "why: at 64× not measurable: long: was not run; a short prompt loses 100 [" in " ".join(printed.split())
    assert any(line.split() == ["stretched", "100", "50", "0"] for line in printed.splitlines())
    assert {file.name for file in (tmp_path / "report").iterdir()} == {f"{PASSKEY}-why.svg", f"{PASSKEY}-why.png", "report.html"}


def test_what_is_predicted_stands_apart_from_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_output(tmp_path, right=far, arms={"stretched": far, "packed": lambda *_: True}, unmeasured={1024: "out_of_memory"})
    results = prepare_run(next(tmp_path.glob("results_*.json")), Submission(evidence="not said")).run.tasks[0].curve
    assert [point.outcome for point in results.points if point.length == 1024] == ["out_of_memory"]
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "predicted, not" not in said  # no arm was run at that length either
    write_output(tmp_path, right=far, arms={"stretched": far, "packed": lambda *_: True}, long_only_to=512)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "predicted, not measured, at 4×: 0 [" in said
    assert "from plain prompts of 512 tokens, stretched ones that far and packed ones of as many" in said
    assert "◇ predicted, not measured" in (tmp_path / "report" / f"{PASSKEY}-why.svg").read_text()
    assert "◇" not in (tmp_path / "report" / f"{PASSKEY}.svg").read_text()


def test_the_page_of_a_report_loads_nothing() -> None:
    page = make_page([Shown(published=make_run(), source="out")])
    assert "src=" not in page.partition("<script>")[0]
    assert page.count("<script>") == page.count("</script>") == 3
    assert "'unsafe-inline'" not in page.partition("style-src-attr")[0]


def test_records_in_a_file_and_in_a_folder_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, _ = write_run(tmp_path / "results", make_run("lab/rope"))
    for place in (written, tmp_path / "results"):
        assert main(["report", str(place), "--out", str(tmp_path / "out")]) == 0
        assert "lab/rope, none: rope, trained length 256" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").is_file()


def test_without_altair_the_numbers_are_printed_and_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written, _ = write_run(tmp_path / "results", make_run("lab/rope"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("altair", "vl_convert") else find(name))
    assert main(["report", str(written), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "lab/rope" in printed.out
    assert printed.err == "altair draws the charts and is not installed: pip install 'harness_ext[report]'\n"
    assert not (tmp_path / "out").exists()
    assert main(["leaderboard", str(tmp_path / "results"), "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'harness_ext[report]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_places_that_hold_no_run_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tmp_path, tmp_path / "none.jsonl", tmp_path / "none"):
        assert main(["report", str(place)]) == 1
        assert str(place) in capsys.readouterr().err
