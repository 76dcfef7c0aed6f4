"""Two published runs, compared in pairs: on runs that were published from planted files of lm_eval."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_outputs import CONFIG, TASKS, write_output

from harness_ext.errors import PairingError
from harness_ext.results.outputs import read_output
from harness_ext.results.paired import compare_runs
from harness_ext.results.publish import Submission, make_records
from harness_ext.results.records import PublishedRun
from harness_ext.results.statistics import flip_signs, holm, mcnemar

TASK = TASKS["scored"]
Make = Callable[..., PublishedRun]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """(method, **what is planted) → a published run."""

    def publish(method: str = "none", **planted: Any) -> PublishedRun:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        override = {**CONFIG["override"], "method": method}
        file = write_output(folder, **{"samples": 6, "config": {"override": override}, **planted})
        return make_records(read_output(file), Submission())

    return publish


def test_each_length_is_tested_and_the_lengths_past_the_trained_one_together(make: Make) -> None:
    first = make(right=lambda length, depth, sample: length <= 256)
    second = make("yarn", right=lambda length, depth, sample: length <= 512)
    tests = compare_runs(first, second)
    assert [(test.task, [length.tokens for length in test.lengths]) for test in tests] == [
        *((TASK, [tokens]) for tokens in (128, 256, 512, 1024)),
        (TASK, [512, 1024]),
    ]
    assert {(test.first, test.second) for test in tests} == {("lab/tiny none", "lab/tiny yarn")}
    assert [(test.n, test.only_first, test.only_second) for test in tests] == [(18, 0, 0)] * 2 + [
        (18, 0, 18),
        (18, 0, 0),
        (36, 0, 18),
    ]
    assert [test.p for test in tests] == [mcnemar(test.only_first, test.only_second) for test in tests]
    assert [test.p_holm for test in tests] == holm([test.p or 0 for test in tests])


def test_the_test_of_haystacks_sees_eighteen_prompts_of_six_haystacks_as_six(make: Make) -> None:
    first = make(right=lambda length, depth, sample: length <= 256)
    second = make("yarn", right=lambda length, depth, sample: length <= 512)
    at_512 = compare_runs(first, second)[2]
    assert at_512.p == pytest.approx(2 / 2**18)
    assert at_512.p_haystacks == flip_signs([3] * 6) == pytest.approx(2 / 2**6)
    tests = compare_runs(first, second)
    assert [test.p_haystacks_holm for test in tests] == holm([test.p_haystacks or 0 for test in tests])


def test_two_models_on_the_same_prompts_may_be_compared_and_one_run_with_itself_may_not(make: Make) -> None:
    first = make()
    other = msgspec.structs.replace(
        first, run=msgspec.structs.replace(first.run, model_info=msgspec.structs.replace(first.run.model_info, id="lab/other"))
    )
    assert {(test.first, test.second) for test in compare_runs(first, other)} == {("lab/tiny none", "lab/other none")}
    with pytest.raises(PairingError, match="is one run"):
        compare_runs(first, first)


def test_runs_of_different_prompts_are_refused_by_the_fingerprints_of_their_tokens(make: Make) -> None:
    first, second = make(), make("yarn")
    cells = list(second.cells)
    prompts = list(cells[3].prompts)
    prompts[2] = msgspec.structs.replace(prompts[2], fingerprint="f" * 16)
    cells[3] = msgspec.structs.replace(cells[3], prompts=prompts)
    with pytest.raises(PairingError, match="were given different prompts"):
        compare_runs(first, msgspec.structs.replace(second, cells=tuple(cells)))


def test_runs_of_more_and_fewer_prompts_at_the_same_lengths_are_refused(make: Make) -> None:
    with pytest.raises(PairingError, match="prompts were given to only one of them"):
        compare_runs(make(samples=6), make("yarn", samples=5))


def test_only_lengths_that_both_have_are_compared_and_runs_without_any_are_refused(make: Make) -> None:
    short = make(multiples=(0.5, 1, 2))
    tests = compare_runs(short, make("yarn", multiples=(1, 2, 4)))
    assert [[length.tokens for length in test.lengths] for test in tests] == [[256], [512], [512]]
    with pytest.raises(PairingError, match="no prompt in common"):
        compare_runs(short, make("yarn", multiples=(4, 8)))


def test_a_length_that_one_of_them_could_not_run_has_no_test_and_says_why(make: Make) -> None:
    tests = compare_runs(make(unmeasured={1024: "out_of_memory"}), make("yarn"))
    assert [(test.lengths[0].tokens, test.p, test.reason) for test in tests if test.p is None] == [
        (1024, None, "out_of_memory (lab/tiny none)")
    ]
    assert [length.tokens for length in tests[-1].lengths] == [512]


def test_controls_and_losses_are_no_pairs(make: Make) -> None:
    kinds = ("scored", "loss")
    tests = compare_runs(make(kinds=kinds, controls=True), make("yarn", kinds=kinds, controls=True))
    assert {test.task for test in tests} == {TASK}
    assert {test.n for test in tests[:-1]} == {18}
