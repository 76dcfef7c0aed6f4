"""`harness-ext compare`: what is computed from planted verdicts, and the command on scripted models and on the embedded one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonlines
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Scripted

from harness_ext import compare as command
from harness_ext.cells import Length, Outcome, TrainedLength, Unmeasured
from harness_ext.cli import main
from harness_ext.compare import Asked, compare_methods, open_tasks, publish, run_method
from harness_ext.errors import ComparisonError, ModelError, PairingError
from harness_ext.model_view import load_tokenizer
from harness_ext.results.charts import draw_comparison, list_points
from harness_ext.results.paired import compare
from harness_ext.results.runs import Answer, Run, append_run, read_runs
from harness_ext.results.statistics import holm, mcnemar
from harness_ext.results.tables import show_comparison, show_scores

TRAINED = TrainedLength(tokens=256, source="user")
TASK = "passkey_extrapolate"
SMALL = {"samples": 1, "depths": 2, "multiples": [1, 2]}
Verdicts = Mapping[int, list[bool]]
"""Tokens → whether each sample was answered exactly."""


def make_run(method: str, verdicts: Verdicts, outcomes: Mapping[int, Outcome] | None = None, task: str = TASK) -> Run:
    outcomes = outcomes or {}
    return Run(
        model="a/model",
        method=method,
        trained_length=TRAINED,
        plan={
            task: tuple(
                Length(tokens=tokens, multiple=tokens / 256, outcome=outcomes.get(tokens, "measured"), reason="planted")
                for tokens in sorted({*verdicts, *outcomes})
            )
        },
        answers=tuple(
            Answer(
                method=method,
                task=task,
                length=tokens,
                multiple=tokens / 256,
                depth=0.5,
                sample=sample,
                verdict="exact" if right else "missed",
                prompt_hash=f"{tokens} {sample}",
                log_likelihood=-1.0,
            )
            for tokens, rights in verdicts.items()
            for sample, right in enumerate(rights)
        ),
    )


@st.composite
def several(draw: st.DrawFn, methods: int = 3) -> list[Verdicts]:
    """Verdicts of several methods on the same prompts at 128 to 1024 tokens."""
    prompts = {tokens: draw(st.integers(1, 12)) for tokens in (128, 256, 512, 1024)}
    return [
        {tokens: draw(st.lists(st.booleans(), min_size=n, max_size=n)) for tokens, n in prompts.items()} for _ in range(methods)
    ]


# ---------------------------------------------------------------------- what is computed


@given(several())
def test_each_pair_is_tested_on_its_discordant_prompts_and_corrected_over_its_table(verdicts: list[Verdicts]) -> None:
    runs = [make_run(method, found) for method, found in zip("abc", verdicts, strict=True)]
    found = compare(runs)
    by_name = dict(zip("abc", verdicts, strict=True))
    assert len(found.by_length) == 4 * 3
    assert len(found.pooled) == 3
    for test in (*found.by_length, *found.pooled):
        tokens = [length.tokens for length in test.lengths]
        pairs = [pair for length in tokens for pair in zip(by_name[test.first][length], by_name[test.second][length], strict=True)]
        assert test.n == len(pairs)
        assert (test.only_first, test.only_second) == (pairs.count((True, False)), pairs.count((False, True)))
        assert test.p == mcnemar(test.only_first, test.only_second)
    for table in (found.by_length, found.pooled):
        assert [test.p_holm for test in table] == holm([test.p or 0 for test in table])
    assert all([length.tokens for length in test.lengths] == [512, 1024] for test in found.pooled)


@given(several(1))
def test_methods_that_answer_alike_differ_with_p_one(verdicts: list[Verdicts]) -> None:
    found = compare([make_run("none", verdicts[0]), make_run("yarn", verdicts[0])])
    for test in (*found.by_length, *found.pooled):
        assert (test.only_first, test.only_second, test.p, test.p_holm) == (0, 0, 1.0, 1.0)


@given(several(2))
def test_the_order_of_methods_changes_sides_and_no_p(verdicts: list[Verdicts]) -> None:
    one, two = make_run("none", verdicts[0]), make_run("yarn", verdicts[1])
    forth, back = compare([one, two]), compare([two, one])
    for a, b in zip((*forth.by_length, *forth.pooled), (*back.by_length, *back.pooled), strict=True):
        assert (a.only_first, a.only_second, a.p, a.p_holm) == (b.only_second, b.only_first, b.p, b.p_holm)


@given(several(2), st.sampled_from(["hard_limit", "out_of_memory", "too_short"]), st.sampled_from([128, 512, 1024]))
def test_a_length_that_was_not_measured_is_said_in_words_and_never_a_zero(
    verdicts: list[Verdicts], outcome: Outcome, tokens: int
) -> None:
    """Even where some of its prompts were answered before memory ran out."""
    full = make_run("none", verdicts[0])
    short = make_run("yarn", {**verdicts[1], tokens: [False] * len(verdicts[1][tokens])}, {tokens: outcome})
    found = compare([full, short])
    (cell,) = (cell for cell in found.cells if cell.method == "yarn" and cell.length.tokens == tokens)
    assert (cell.n, cell.exact, cell.length.outcome) == (0, 0, outcome)
    row = next(line for line in show_scores(found).splitlines() if f" {tokens} (" in line)
    assert row.split("|")[-2].strip() == outcome
    assert f"- {outcome}, {TASK} under yarn: planted" in show_comparison(found)
    (test,) = (test for test in found.by_length if test.lengths[0].tokens == tokens)
    assert (test.n, test.p, test.p_holm, test.reason) == (0, None, None, f"{outcome} (yarn)")
    assert [t.p_holm for t in found.by_length if t.p is not None] == holm([t.p for t in found.by_length if t.p is not None])
    assert all(tokens not in [length.tokens for length in test.lengths] for test in found.pooled)
    assert {(point["method"], point["length"]) for point in list_points(found)} == {
        (method, length) for method in ("none", "yarn") for length in (128, 256, 512, 1024)
    } - {("yarn", tokens)}


def test_a_length_that_a_limit_left_no_prompt_of_is_said() -> None:
    found = compare([make_run(method, {256: [True], 512: []}) for method in ("none", "yarn")])
    assert "| no prompt" in show_scores(found)
    assert "no prompt: --limit left none at this length" in show_comparison(found)
    assert found.pooled[0].p is None


def test_prompts_are_paired_by_what_they_are_where_a_method_has_others_too() -> None:
    """Under --limit, a method that cannot run every length gets more prompts of each."""
    one = make_run("none", {512: [True, True, False]}, {1024: "hard_limit"})
    two = make_run("yarn", {512: [True, False], 1024: [True, True]})
    found = compare([one, two])
    assert [(cell.method, cell.length.tokens, cell.n) for cell in found.cells] == [
        ("none", 512, 3),
        ("yarn", 512, 2),
        ("none", 1024, 0),
        ("yarn", 1024, 2),
    ]
    assert (found.by_length[0].n, found.by_length[0].only_first, found.by_length[0].only_second) == (2, 1, 0)
    assert "| 3/2 |" in show_scores(found)


@given(several(2), st.data())
def test_different_prompts_are_refused(verdicts: list[Verdicts], data: st.DataObject) -> None:
    one, two = make_run("none", verdicts[0]), make_run("yarn", verdicts[1])
    index = data.draw(st.integers(0, len(two.answers) - 1))
    changed = dataclasses.replace(two.answers[index], prompt_hash="other")
    answers = (*two.answers[:index], changed, *two.answers[index + 1 :])
    with pytest.raises(PairingError, match="none and yarn were given different prompts") as raised:
        compare([one, dataclasses.replace(two, answers=answers)])
    assert f"{changed.length} tokens" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(PairingError, match="1 prompts were given to only one of them"):
        compare([one, dataclasses.replace(two, answers=(*two.answers[:index], *two.answers[index + 1 :]))])
    with pytest.raises(PairingError, match="yarn was given two prompts of one key"):
        compare([one, dataclasses.replace(two, answers=(*two.answers, changed))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "another"}, "different models: a/model and another"),
        ({"trained_length": TrainedLength(tokens=512, source="user")}, "different trained lengths: 256 and 512"),
        ({"plan": {}}, "different tasks and lengths"),
        ({"method": "none"}, "'none' was run twice"),
        ({"refused": "it has no rotary positions"}, "found 1 .none.; yarn was refused: it has no rotary positions"),
    ],
)
def test_runs_that_differ_in_more_than_the_method_are_refused(change: dict[str, Any], message: str) -> None:
    one, two = make_run("none", {512: [True]}), make_run("yarn", {512: [True]})
    with pytest.raises(ComparisonError, match=message):
        compare([one, dataclasses.replace(two, **change)])


def test_a_method_that_was_refused_is_left_out_with_its_reason() -> None:
    runs = [
        make_run("none", {512: [True]}),
        Run(model="a/model", method="yarn", refused="no rope"),
        make_run("ntk", {512: [False]}),
    ]
    found = compare(runs)
    assert [run.method for run in found.runs] == ["none", "ntk"]
    assert {cell.method for cell in found.cells} == {"none", "ntk"}
    assert "- yarn was left out: no rope" in show_comparison(found)


def test_the_text_says_what_the_tests_take_for_granted_and_over_what_they_are_corrected() -> None:
    text = show_comparison(compare([make_run(method, {128: [True], 512: [True], 1024: [False]}) for method in "abcd"]))
    assert "takes the prompts as independent" in text
    assert "correction over all pairs and rows of this table (6 tests)" in text
    assert "(18 tests)" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(line) < 200


@settings(max_examples=25)
@given(several(3), st.none() | st.floats(-1e9, 0), st.text(max_size=20))
def test_records_written_and_read_back_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, verdicts: list[Verdicts], likelihood: float | None, text: str
) -> None:
    folder = tmp_path_factory.mktemp("records")
    runs = [make_run(method, found) for method, found in zip(("none", "self-extend", "a/b"), verdicts, strict=True)]
    answers = tuple(dataclasses.replace(answer, log_likelihood=likelihood) for answer in runs[0].answers)
    runs[0] = dataclasses.replace(runs[0], answers=answers, override={"said": text}, settings={"tasks": [text], "limit": None})
    runs.append(Run(model="a/model", method="linear", refused=text or "no"))
    for run in runs:
        append_run(folder, run)
    assert read_runs(folder) == runs


@pytest.mark.parametrize("name", ["runs.jsonl", "samples_none.jsonl"])
def test_records_that_were_cut_off_changed_or_lost_are_named(name: str, tmp_path: Path) -> None:
    answer = Answer(
        method="none", task="t", length=8, multiple=1.0, depth=0.0, sample=0, verdict="exact", prompt_hash="0", log_likelihood=-1.0
    )
    append_run(tmp_path, Run(model="a/model", method="none", answers=(answer,)))
    file, content = tmp_path / name, (tmp_path / name).read_text()
    for broken in (content[:-20], "[1]\n", '{"x": 1}\n'):
        file.write_text(broken)
        with pytest.raises(ComparisonError, match=rf"{tmp_path}.*make the comparison again"):
            read_runs(tmp_path)
    file.write_bytes(content.encode("utf-16"))
    with pytest.raises(ComparisonError, match=rf"{name} was cut off or changed"):
        read_runs(tmp_path)
    file.unlink()
    with pytest.raises(ComparisonError, match=name):
        read_runs(tmp_path)


def test_each_line_has_a_colour_a_dash_and_a_mark_of_its_own() -> None:
    methods = ["none", "linear", "ntk", "dynamic", "yarn", "longrope", "sinks"]
    spec = draw_comparison(compare([make_run(method, {256: [True], 512: [False]}) for method in methods])).to_dict()
    scales = {
        channel: encoding["scale"]
        for layer in spec["spec"]["layer"]
        for channel, encoding in layer["encoding"].items()
        if channel in ("color", "strokeDash", "shape")
    }
    assert set(scales) == {"color", "strokeDash", "shape"}
    for scale in scales.values():
        assert scale["domain"] == methods
        assert len({json.dumps(style) for style in scale["range"]}) == len(methods)


# ---------------------------------------------------------------------- the command, on scripted models


class Planted(Scripted):
    """Counts with the embedded tokenizer, and answers prompts of up to `reach` characters."""

    def __init__(self, reach: int, max_length: int = 2048) -> None:
        super().__init__(lambda prompt, answer: len(prompt) <= reach, max_length)
        self.tok_encode = load_tokenizer("reference/rope", {}).encode


METADATA = {"tokenizer": "reference/rope", "trained_length": 256, **SMALL, "multiples": [1, 2, 4], "samples": 3}


def ask(*methods: str, **changes: Any) -> Asked:
    return Asked(**{"model": "reference/rope", "methods": methods, "tasks": (TASK,), "metadata": METADATA, **changes})


def test_a_planted_difference_is_found_where_it_was_planted(tmp_path: Path) -> None:
    found = compare_methods(ask("none", "yarn"), tmp_path, lambda _, method: Planted(1_000 if method == "none" else 100_000))
    scores = {(cell.method, cell.length.tokens): (cell.exact, cell.n) for cell in found.cells}
    assert scores["none", 256] == scores["yarn", 256] == (6, 6)
    assert (scores["none", 1024], scores["yarn", 1024]) == ((0, 6), (6, 6))
    (at_1024,) = (test for test in found.by_length if test.lengths[0].tokens == 1024)
    assert (at_1024.only_first, at_1024.only_second, at_1024.p) == (0, 6, 0.03125)
    assert compare(read_runs(tmp_path)) == found
    with jsonlines.open(tmp_path / "samples_yarn.jsonl") as rows:
        records = list(rows)
    assert len(records) == 18
    assert records[0].keys() == {field.name for field in dataclasses.fields(Answer)}
    with jsonlines.open(tmp_path / "runs.jsonl") as rows:
        run = next(iter(rows))
    assert run["settings"]["metadata"] == METADATA
    assert run["versions"]["lm_eval"].startswith("0.4")
    assert run["results"][TASK]["exact@    1024 (4x),none"] == 0


def test_a_tokenizer_that_differs_between_methods_is_refused() -> None:
    def build(_: Asked, method: str) -> Planted:
        model = Planted(1_000)
        if method == "yarn":
            encode = load_tokenizer("reference/rope", {}).encode
            model.tok_encode = lambda text, **options: [0, *encode(text, **options)]
            model._encode_pair = lambda *_: ()  # by which a model is known to tokenise for itself
        return model

    with pytest.raises(PairingError, match="different prompts"):
        compare_methods(ask("none", "yarn"), build=build)


@pytest.mark.parametrize("limit", [7, None])
def test_a_method_with_a_shorter_reach_is_compared_where_both_ran(limit: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare_methods(
        ask("none", "yarn", limit=limit), build=lambda _, method: Planted(10_000, 512 if method == "none" else 2048)
    )
    outcomes = {(cell.method, cell.length.tokens): cell.length.outcome for cell in found.cells}
    assert outcomes["none", 1024] == "backend_limit"
    assert [length.tokens for length in found.pooled[0].lengths] == [512]
    assert found.pooled[0].n > 0
    assert "| backend_limit" in show_scores(found)
    assert "none (1 of 2): " in capsys.readouterr().err


@pytest.mark.parametrize("task", [TASK, f"{TASK}_generate"])
def test_what_does_not_fit_into_memory_is_no_miss(task: str) -> None:
    class Small(Planted):
        def loglikelihood(self, requests: list[Any]) -> Any:
            return [self._measure(*pair) for pair in zip(requests, super().loglikelihood(requests), strict=True)]

        def generate_until(self, requests: list[Any]) -> Any:
            return [self._measure(*pair) for pair in zip(requests, super().generate_until(requests), strict=True)]

        def _measure(self, request: Any, answer: Any) -> Any:
            too_long = request.doc["length"] == 1024 and request.doc["depth"] == 1
            return Unmeasured(outcome="out_of_memory", reason="full") if too_long else answer

    found = compare_methods(ask("none", "yarn", tasks=(task,)), build=lambda *_: Small(100_000))
    assert [(cell.length.tokens, cell.n, cell.length.outcome) for cell in found.cells if cell.method == "none"] == [
        (256, 6, "measured"),
        (512, 6, "measured"),
        (1024, 0, "out_of_memory"),
    ]
    (run, _) = found.runs
    assert sum(answer.verdict == "out_of_memory" for answer in run.answers) == 3


def test_a_run_that_dies_loses_none_that_has_ended(tmp_path: Path) -> None:
    def build(_: Asked, method: str) -> Planted:
        if method == "yarn":
            raise RuntimeError("the power went")
        return Planted(1_000)

    with pytest.raises(RuntimeError, match="the power went"):
        compare_methods(ask("none", "linear", "yarn"), tmp_path, build)
    assert [run.method for run in read_runs(tmp_path)] == ["none", "linear"]
    assert compare(read_runs(tmp_path)).by_length


def test_a_refused_method_leaves_the_others_and_too_few_are_an_error(tmp_path: Path) -> None:
    def build(_: Asked, method: str) -> Planted:
        if method == "yarn":
            raise ModelError("it has no rotary positions")
        return Planted(1_000)

    found = compare_methods(ask("none", "yarn", "linear"), tmp_path, build)
    assert [run.method for run in found.runs] == ["none", "linear"]
    assert [(run.method, run.refused) for run in found.refused] == [("yarn", "it has no rotary positions")]
    assert compare(read_runs(tmp_path)) == found
    with pytest.raises(ComparisonError, match=r"needs two methods that ran, found 1 \(none\); yarn was refused: it has no rotary"):
        compare_methods(ask("none", "yarn"), build=build)


def test_options_reach_the_methods_that_have_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness_ext.models.hf import HFExtrapolate

    given: list[dict[str, Any]] = []
    monkeypatch.setattr(HFExtrapolate, "create_from_arg_obj", lambda arguments, _: given.append(arguments))
    asked = ask("none", "linear", "yarn", model_args={"factor": 4, "beta_fast": 16, "dtype": "float32"})
    for method in asked.methods:
        command.build_model(asked, method)
    base = {"pretrained": "reference/rope", "dtype": "float32"}
    assert given == [
        base,
        {**base, "factor": 4, "extend": "linear"},
        {**base, "factor": 4, "beta_fast": 16, "extend": "yarn"},
    ]


def test_without_altair_a_line_says_so_and_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare([make_run(method, {256: [True], 512: [False]}) for method in ("none", "yarn")])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("altair", "vl_convert") else find(name))
    publish(found, tmp_path)
    assert "pip install 'harness_ext[report]'" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["compare.md"]
    monkeypatch.undo()
    publish(found, tmp_path)
    assert capsys.readouterr().err == ""
    assert (tmp_path / "compare.svg").read_text().startswith("<svg")
    assert "compare.svg" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------- the command, on the embedded model


def test_a_run_keeps_what_lm_eval_found(evaluate: Any) -> None:
    from harness_ext.models.hf import HFExtrapolate

    asked = ask("none", "yarn", metadata=SMALL, model_args={"device": "cpu"})
    run = run_method(asked, "none", open_tasks(asked))
    assert run.trained_length == TrainedLength(tokens=256, source="config.max_position_embeddings")
    results = evaluate(HFExtrapolate(pretrained="reference/rope", device="cpu", batch_size="auto"), [TASK], **SMALL)
    assert [(answer.log_likelihood, answer.verdict == "exact") for answer in run.answers] == [
        (pytest.approx(sample["resps"][0][0][0], abs=1e-4), sample["resps"][0][0][1]) for sample in results["samples"][TASK]
    ]
    assert [(a.length, a.multiple, a.depth, a.sample) for a in run.answers] == [
        tuple(sample["doc"][name] for name in ("length", "multiple", "depth", "sample")) for sample in results["samples"][TASK]
    ]
    assert run.results[TASK] == pytest.approx(results["results"][TASK])


def test_the_command_prints_the_tables_and_reads_its_own_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "out")
    small = ["--tasks", TASK, "--metadata", json.dumps(SMALL), "--model_args", "device=cpu"]
    assert main(["compare", "reference/rope", "--methods", "none,yarn,table-tile", "--output_path", folder, *small]) == 0
    printed = capsys.readouterr().out
    assert "reference/rope, trained length 256" in printed
    assert 'Run with {"tasks": ["passkey_extrapolate"]' in printed
    assert "- table-tile was left out: " in printed
    assert len([line for line in printed.splitlines() if f"| {TASK} |" in line]) == 2 + 1 + 2
    assert (tmp_path / "out" / "compare.md").read_text().startswith(printed.strip())
    first, second = ((tmp_path / "out" / f"samples_{method}.jsonl").read_text() for method in ("none", "yarn"))
    assert first != second
    assert main(["compare", "--read", folder]) == 0
    assert capsys.readouterr().out == printed
    assert main(["compare", "reference/rope", "--methods", "none,yarn", "--output_path", folder, *small]) == 1
    assert "holds a comparison already" in capsys.readouterr().err


MISTAKES: list[tuple[list[str], str]] = [
    (["reference/rope", "--methods", "none"], "ComparisonError: --methods: found 'none'; expected at least two"),
    (["reference/rope", "--methods", "none,none"], "each once"),
    (["reference/rope", "--methods", "none,yarm"], "ModelError: extend=yarm was asked for; there is linear"),
    (["reference/rope", "--model_args", "extend=yarn"], "name it in --methods"),
    (["reference/rope", "--tasks", "passkey_extrapolat.yaml"], "did you mean passkey_extrapolate?"),
    (["reference/rope", "--tasks", f"{TASK},extrapolate"], "Duplicate task"),
    (["reference/rope", "--metadata", '{"multipels": [1]}'], "did you mean 'multiples'?"),
    (["nowhere/at-all"], "ModelError: model 'nowhere/at-all' was asked for, but its config cannot be read"),
    (["reference/rop"], "is not embedded here"),
    ([], "name either a model to run, or a folder to --read"),
    (["--read", "nowhere"], "nowhere holds no runs.jsonl"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_status_one(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metadata", "{"], "which is no JSON"),
        (["--metadata", "[1]"], "expected an object"),
        (["--limit", "0"], "a whole number from 1"),
        (["--batch_size", "many"], "a whole number from 1"),
    ],
)
def test_an_argument_that_cannot_be_read_is_a_usage_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["compare", "reference/rope", *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_task_without_lengths_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text(
        "task: plain\ndataset_path: json\ndataset_kwargs: {data_files: "
        + str(tmp_path / "rows.jsonl")
        + "}\ntest_split: train\ndoc_to_text: q\ndoc_to_target: a\noutput_type: loglikelihood\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"q": "one", "a": "two"}\n')
    with pytest.raises(ComparisonError, match=r"plain has no lengths; expected tasks of this package \(.*passkey_extrapolate"):
        open_tasks(ask("none", "yarn", tasks=("plain",), include_path=str(tmp_path)))
