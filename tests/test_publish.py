"""`harness-ext publish` and `validate`: what gets in, what does not, and that nothing is lost or doubled on the way."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_outputs import DATE, TASKS, edit_results, edit_rows, read_rows, write_output, write_rows

from harness_ext.cli import main
from harness_ext.errors import PublishError
from harness_ext.publishing import prepare_run
from harness_ext.results import audit, store
from harness_ext.results.publish import Submission, strip_paths
from harness_ext.results.records import PublishedRun
from harness_ext.results.store import read_results, to_bytes, write_run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_output(tmp_path / "out")


def prepare(file: Path, **said: Any) -> PublishedRun:
    return prepare_run(file, Submission(**said))


def publish(out: Path, results: Path, *more: str) -> int:
    return main(["publish", str(out), "--results", str(results), *more])


def list_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------- what a record says


def test_a_run_is_published_validated_and_read(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(out.parent, tmp_path / "results") == 0
    assert main(["validate", str(tmp_path / "results")]) == 0
    assert "1 runs, 12 cells, 0 problems" in capsys.readouterr().out
    ((run,), problems) = read_results(tmp_path / "results")
    assert problems == []
    assert [path.parent.name for path in (tmp_path / "results").rglob("*.jsonl")] == ["lab__tiny"]
    assert re.fullmatch(r"none-[0-9a-f]{16}\.jsonl", next((tmp_path / "results").rglob("*.jsonl")).name)
    scores = [point.score_details.score for point in run.run.tasks[0].curve.points if point.score_details]
    assert scores == [1.0, 1.0, 0.75, 0.0]
    assert [cell.successes for cell in run.cells] == [4] * 6 + [3] * 3 + [0] * 3
    assert (
        run.run.command
        == "lm_eval --model hf-extrapolate --model_args pretrained=lab/tiny --tasks passkey_extrapolate --output_path out --log_samples"
    )
    assert (run.run.tokens_asked, run.run.tokens_computed, run.run.compute_seconds, run.run.wall_seconds) == (
        39630,
        17830,
        1.012,
        60.5,
    )
    assert run.run.evaluation_timestamp == "2026-11-20T10:00:00Z"


def test_every_kind_of_task_is_published(tmp_path: Path) -> None:
    file = write_output(tmp_path, kinds=("scored", "generated", "loss"), controls=True, unmeasured={1024: "out_of_memory"})
    published = prepare(file)
    assert [task.metric for task in published.run.tasks] == ["loss", "exact", "exact"]
    controls = [cell for cell in published.cells if cell.control]
    assert {(cell.control, cell.successes) for cell in controls} == {("needle_absent", 0), ("no_haystack", 4)}
    missing = [cell for cell in published.cells if cell.length == 1024]
    assert {(cell.outcome, cell.n, cell.successes, cell.score_details, cell.reason) for cell in missing} == {
        ("out_of_memory", 0, None, None, "planted")
    }
    generated = next(cell for cell in published.cells if cell.evaluation_name == TASKS["generated"] and cell.successes == 3)
    assert generated.misses == {"wrong_value": 1}
    assert generated.prompts[0].log_likelihood is None
    lost = next(cell for cell in published.cells if cell.evaluation_name == TASKS["loss"] and cell.length == 256)
    assert lost.score_details is not None
    assert lost.score_details.score == pytest.approx(2.5 + 0.125 * 1.5)


def test_a_prompt_that_was_not_measured_leaves_its_cell_without_a_score(out: Path) -> None:
    def fail(rows: list[dict[str, Any]]) -> None:
        row = next(row for row in rows if row["doc"]["length"] == 1024)
        del row[row["metrics"].pop()]
        row["filtered_resps"], row["resps"] = ["out_of_memory"], [[["out_of_memory", "planted"]]]

    edit_rows(out, fail, means_too=True)
    edit_results(out, lambda run: run["configs"][TASKS["scored"]]["lengths"][3].update(outcome="out_of_memory", reason="no room"))
    cells = [cell for cell in prepare(out).cells if cell.length == 1024]
    assert [(cell.outcome, cell.reason, cell.n) for cell in cells] == [
        ("out_of_memory", "no room", 0),
        ("measured", "", 4),
        ("measured", "", 4),
    ]


def test_what_a_backend_does_not_say_is_unknown_and_nothing_is_guessed(out: Path) -> None:
    keep = {
        "model": "local-completions",
        "model_args": "model=lab/tiny,base_url=http://10.0.0.1:8000/v1/completions",
        "limit": None,
    }
    edit_results(out, lambda run: run.update(config=keep, transformers_version=None, total_evaluation_time_seconds=None))
    run = prepare(out).run
    model = run.model_info
    assert (model.id, model.weights_fingerprint, model.dtype, model.model_type, model.position_scheme) == (
        "lab/tiny",
        "",
        "",
        "",
        "unknown",
    )
    assert (model.num_parameters, model.hard_limit, run.hardware, run.compute_seconds, run.wall_seconds) == (None,) * 5
    assert (run.override.method, run.packages) == ("unknown", {"lm_eval": "0.4.13"})
    assert "10.0.0.1" not in msgspec.json.encode(run).decode()


def test_folders_and_secrets_stay_at_home(out: Path, tmp_path: Path) -> None:
    arguments = {
        "pretrained": "/home/ann/secret-project/models/tiny v2",
        "tokenizer": "/home/ann/secret-project/tok",
        "token": "hf_abcdefgh",
        "api_key": "sk-12345",
        "cache_dir": "/home/ann/cache",
        "extend": "yarn",
    }
    edit_results(out, lambda run: run["config"].update(model_args=arguments, model_sha=""))
    edit_results(out, lambda run: run["configs"][TASKS["scored"]]["metadata"].update(haystack="/home/ann/book.txt"))
    published = prepare(out)
    text = to_bytes(published).decode()
    assert not [word for word in ("ann", "secret-project", "hf_abcdefgh", "sk-12345", "/home", "cache") if word in text]
    model = published.run.model_info
    assert (model.id, model.name, model.developer, model.revision) == ("tiny-v2", "tiny v2", "", "")
    assert model.model_args == {"pretrained": "tiny v2", "tokenizer": "tok", "extend": "yarn"}
    path, _ = write_run(tmp_path / "results", published)
    assert path.parent.name == "local__tiny-v2"
    named = prepare(out, model_id="lab/tiny").run
    assert (named.model_info.id, named.model_info.developer) == ("lab/tiny", "lab")
    assert named.evaluation_id == published.run.evaluation_id, "the weights say which model it is"


def test_arguments_that_change_answers_tell_runs_of_the_same_weights_apart(out: Path) -> None:
    runs = []
    for argument in ("", "think_end_token", "num_beams_of_another"):
        edit_results(out, lambda run, name=argument: run["config"]["model_args"].update({name: "x"} if name else {}))
        runs.append(prepare(out).run)
        edit_results(out, lambda run, name=argument: run["config"]["model_args"].pop(name, None))
    plain, thinking, other = runs
    assert "think_end_token=x" in thinking.command
    assert thinking.evaluation_id != plain.evaluation_id
    assert other.evaluation_id == plain.evaluation_id, "weights stand for how they were loaded"


@pytest.mark.parametrize("bound", ["MAX_LINE", "MAX_LINES", "MAX_FILE"])
def test_what_a_reader_would_not_take_is_not_published(
    bound: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, bound, 3)
    assert publish(out.parent, tmp_path / "results") == 1
    assert "publish a part of the run" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_paths_are_known_by_their_look() -> None:
    for path in ("/a/b", "~/b", "./b", "../a/b", "C:\\a\\b", "a/c/b", "/a/b/"):
        assert strip_paths(path) == "b", path
    for text in ("org/name", "and/or", "either this/that or those/these", "b", ""):
        assert strip_paths(text) == text


def test_samples_beside_a_results_file_that_was_named_are_found(tmp_path: Path) -> None:
    """lm_eval's --output_path some.json writes some_<date>.json."""
    file = write_output(tmp_path)
    file.rename(tmp_path / f"mine_{DATE}.json")
    assert publish(tmp_path, tmp_path / "results") == 0


# ---------------------------------------------------------------------- what lm_eval itself writes


def test_a_run_of_lm_eval_is_published_as_it_is_with_what_could_not_be_run(tmp_path: Path) -> None:
    metadata = {"samples": 2, "multiples": [0.5, 1, 2], "depths": [0, 1], "controls": True}
    command = [sys.executable, "-m", "lm_eval", "--model", "hf-extrapolate", "--model_args", "pretrained=reference/learned"]
    command += ["--tasks", "passkey_extrapolate,passkey_extrapolate_generate", "--metadata", json.dumps(metadata)]
    subprocess.run([*command, "--output_path", str(tmp_path / "out"), "--log_samples"], check=True, capture_output=True)
    assert publish(tmp_path / "out", tmp_path / "results") == 0
    assert main(["validate", str(tmp_path / "results")]) == 0
    ((published,), _) = read_results(tmp_path / "results")
    run = published.run
    assert (run.model_info.id, run.model_info.hard_limit, run.override.method) == ("reference/learned", 256, "none")
    assert len(run.model_info.weights_fingerprint) == 64
    assert [task.evaluation_name for task in run.tasks] == ["passkey_extrapolate", "passkey_extrapolate_generate"]
    for task in run.tasks:
        assert [(point.length, point.outcome) for point in task.curve.points] == [
            (128, "measured"),
            (256, "measured"),
            (512, "hard_limit"),
        ]
        assert {control.control for control in task.curve.controls} == {"no_haystack", "needle_absent"}
    assert {cell.n for cell in published.cells if cell.length == 512} == {0}


def test_a_run_of_a_backend_that_we_know_nothing_of_is_published(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    from lm_eval.loggers import EvaluationTracker
    from scripted import Scripted

    model = Scripted(lambda _prompt, answer: "7" in answer)
    options = {"pretrained": "reference/rope", "samples": 3, "lengths": [128, 256], "depths": [0, 1]}
    results = evaluate(model, ["passkey_extrapolate"], **options)
    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples)
    tracker.save_results_samples("passkey_extrapolate", samples["passkey_extrapolate"])
    edit_results(next((tmp_path / "out").rglob("results_*.json")), lambda run: run.setdefault("date", 1795168800.0))
    assert publish(tmp_path / "out", tmp_path / "results") == 0
    ((published,), _) = read_results(tmp_path / "results")
    assert (published.run.override.method, published.run.model_info.weights_fingerprint, published.run.hardware) == (
        "unknown",
        "",
        None,
    )
    assert sum(cell.n for cell in published.cells) == 12


# ---------------------------------------------------------------------- what is refused

SCORED = TASKS["scored"]


def with_rows(change: Callable[[list[dict[str, Any]]], Any], **options: Any) -> Callable[[Path], Any]:
    return lambda file: edit_rows(file, change, **options)


def with_results(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda file: edit_results(file, change)


def edit_samples_alone(file: Path) -> None:
    samples = file.with_name(f"samples_{SCORED}_{DATE}.jsonl")
    write_rows(samples, read_rows(samples)[:-1])


def recode_samples(file: Path) -> None:
    samples = file.with_name(f"samples_{SCORED}_{DATE}.jsonl")
    samples.write_bytes(samples.read_text().encode("utf-16"))


def cut_samples_off(file: Path) -> None:
    samples = file.with_name(f"samples_{SCORED}_{DATE}.jsonl")
    samples.write_bytes(samples.read_bytes()[:-40])


LIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a sample left out": (edit_samples_alone, r"samples are not those of results_.*task_hashes"),
    "a sample left out, and the hash made to match": (
        with_rows(lambda rows: rows.pop(), means_too=True),
        r"47 samples; expected 48",
    ),
    "a samples file that was cut off": (cut_samples_off, r"line 48: line contains invalid json"),
    "no samples file": (lambda file: file.with_name(f"samples_{SCORED}_{DATE}.jsonl").unlink(), r"is missing.*--log_samples"),
    "a mean that is not the samples'": (
        with_results(lambda run: run["results"][SCORED].update({"exact@    1024,none": 0.5})),
        r"passkey_extrapolate exact@ 1024 is 0.5; the mean of its samples is 0.0",
    ),
    "a mean of nothing": (
        with_results(lambda run: run["results"][SCORED].update({"exact@    4096,none": 0.5})),
        r"exact@ 4096 is 0.5; the mean of its samples is None",
    ),
    "a mean left out": (with_results(lambda run: run["results"][SCORED].pop("exact@    1024,none")), r"exact@ 1024 is None"),
    "a verdict that is not the answer's": (
        with_rows(lambda rows: rows[-1].update(filtered_resps=["exact"])),
        r"line 48: the verdict is 'exact', and the answer is 'missed'",
    ),
    "a score that is not the verdict's": (
        with_rows(lambda rows: rows[-1].update({"exact@    1024": 1.0}), means_too=True),
        r"line 48: exact@    1024 is 1.0, and the answer is 'missed'; expected 0.0",
    ),
    "a prompt that was cut": (
        with_rows(lambda rows: rows[3]["doc"].update(prompt_tokens=512)),
        r"line 4: the prompt has 512 tokens, and was to have 1024: that length was never measured",
    ),
    "a prompt that is too long": (
        with_rows(lambda rows: rows[0]["doc"].update(prompt_tokens=129)),
        r"line 1: the prompt has 129 tokens, and was to have 128: it was cut, or counted wrongly",
    ),
    "a length that nobody asked for": (
        with_rows(lambda rows: rows[3]["doc"].update(length=999, prompt_tokens=999)),
        r"line 4: a prompt of 999 tokens; expected one of 128, 256, 512, 1024",
    ),
    "a length that was never measured": (
        with_results(
            lambda run: run["configs"][SCORED]["lengths"].append(
                {"length": 2048, "multiple": 8, "outcome": "measured", "reason": ""}
            )
        ),
        r"says that 2048 tokens were measured, and no sample is of them",
    ),
    "a length that is said not to have been measured, and was": (
        with_results(lambda run: run["configs"][SCORED]["lengths"][3].update(outcome="hard_limit")),
        r"says hard_limit of 1024 tokens, and all its samples were measured",
    ),
    "a prompt twice": (
        with_rows(lambda rows: rows.__setitem__(5, rows[1]), means_too=True),
        r"line 6: the same prompt as on line 2 \(length 256, sample 0\)",
    ),
    "another seed": (
        with_rows(lambda rows: rows[2]["doc"].update(seed=7)),
        r"line 3: sample 0 of seed 7; expected one of 4 of seed 0",
    ),
    "a sample that was not drawn": (with_rows(lambda rows: rows[2]["doc"].update(sample=77)), r"line 3: sample 77"),
    "multiples of another length": (
        with_results(lambda run: run["configs"][SCORED]["lengths"][0].update(multiple=0.25)),
        r"128 tokens are 0.25 times the trained length, which is 256",
    ),
    "a trained length that the config contradicts": (
        with_results(lambda run: run["config"].update(config_trained_length={"tokens": 512, "source": "config.x"})),
        r"trained length 256 \(config.max_position_embeddings\), and the model's config says 512 \(config.x\); the file was changed",
    ),
    "a trained length that a user says without a source": (
        with_results(
            lambda run: (
                run["configs"][SCORED]["trained_length"].update(source="user"),
                run["config"].update(config_trained_length={"tokens": 512, "source": "config.x"}),
            )
        ),
        r"256 as the user says, and the model's config says 512 .* say with --evidence",
    ),
    "two versions of a task": (
        with_results(lambda run: run["versions"].update({SCORED: 1})),
        r"version 1 under versions and 2 in its config",
    ),
    "a server that cuts prompts": (
        with_results(lambda run: (run.update(max_length=512), run["config"].update(model="local-completions"))),
        r"the prompt has 1024 tokens, and local-completions takes 512: it was cut",
    ),
    "a model measured past its end": (with_results(lambda run: run["config"].update(hard_limit=512)), r"the model ends at 512"),
    "a probability above 1": (
        with_rows(lambda rows: rows[0].update(resps=[[["0.5", "True"]]])),
        r"record 2: sample 0: a log-likelihood of 0.5; expected at most 0",
    ),
    "a prompt without its fingerprint": (
        with_rows(lambda rows: rows[4]["doc"].pop("prompt_fingerprint")),
        r"line 5: expected a sample of lm_eval and its fields, found KeyError: 'prompt_fingerprint'",
    ),
    "a fingerprint that is none": (
        with_rows(lambda rows: rows[0]["doc"].update(prompt_fingerprint="../../x")),
        r"record 2: Expected `str` matching regex",
    ),
    "no lm_eval results": (lambda file: file.write_text("[]"), r"expected lm_eval's results"),
    "a results file that was cut off": (
        lambda file: file.write_text(file.read_text()[:500]),
        r"expected lm_eval's results, found JSONDecodeError",
    ),
    "samples in another encoding": (
        recode_samples,
        r"expected a sample of lm_eval and its fields, found UnicodeDecodeError",
    ),
    "tasks of others": (
        with_results(lambda run: run.update(configs={"hellaswag": {"task": "hellaswag"}})),
        r"found the tasks hellaswag; none of them has lengths",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_refused_in_one_line_that_says_where_and_nothing_is_written(
    lie: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, complaint = LIES[lie]
    change(out)
    assert publish(out.parent, tmp_path / "results") == 1
    shown = capsys.readouterr().err
    found = [line for line in shown.splitlines() if re.search(complaint, line)]
    assert found, shown
    assert found[0].startswith(str(out.parent)), "the file is named"
    assert "Traceback" not in shown
    assert not (tmp_path / "results").exists()


def test_a_loss_that_its_log_likelihood_does_not_give_is_refused(tmp_path: Path) -> None:
    file = write_output(tmp_path, kinds=("loss",))
    edit_rows(file, lambda rows: rows[2].update(filtered_resps=["0.1"]), task=TASKS["loss"])
    with pytest.raises(
        PublishError, match=r"line 3: the loss is 0.1 nats per token; the log-likelihood over 256 tokens gives 2.75"
    ):
        prepare(file)


def test_a_verdict_on_a_generated_answer_is_computed_again(tmp_path: Path) -> None:
    file = write_output(tmp_path, kinds=("generated",))
    edit_rows(file, lambda rows: rows[0].update(resps=[["99999, no, 84402"]]), task=TASKS["generated"])
    with pytest.raises(PublishError, match=r"line 1: the verdict is 'exact', and the answer is 'lenient'"):
        prepare(file)


def test_a_trained_length_that_the_config_contradicts_is_published_with_its_source(out: Path) -> None:
    LIES["a trained length that a user says without a source"][0](out)
    trained = prepare(out, evidence="arXiv 0000.00000, section 2").run.trained_length
    assert trained is not None
    assert (trained.tokens, trained.config_tokens, trained.evidence) == (256, 512, "arXiv 0000.00000, section 2")


def test_a_run_that_is_refused_does_not_keep_others_out(tmp_path: Path) -> None:
    write_output(tmp_path / "out", date="2026-11-20T10-00-00.000000")
    other = write_output(tmp_path / "out", date="2026-11-21T10-00-00.000000", right=lambda *_: True)
    edit_results(other, lambda run: run["versions"].update({SCORED: 1}))
    assert publish(tmp_path / "out", tmp_path / "results") == 1
    assert len(read_results(tmp_path / "results")[0]) == 1


@pytest.mark.parametrize(("arguments", "message"), [(["nowhere"], "holds no results of lm_eval"), (["."], "name where to publish")])
def test_a_mistake_on_the_command_line_is_named(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["--results", "results"] if arguments != ["."] else []
    assert main(["publish", *arguments, *more]) == 1
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------- nothing lost, nothing doubled


def test_publishing_twice_changes_nothing(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(out.parent, tmp_path / "results")
    first = list_all(tmp_path / "results")
    capsys.readouterr()
    assert publish(out.parent, tmp_path / "results") == 0
    assert "was published before, unchanged" in capsys.readouterr().out
    assert list_all(tmp_path / "results") == first


def test_the_same_run_on_another_day_is_kept_beside_the_first_and_both_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_output(tmp_path / "out")
    write_output(tmp_path / "out", date="2026-11-21T10-00-00.000000", total_evaluation_time_seconds="61.0")
    later = next(path for path in (tmp_path / "out").glob("results_2026-11-21*"))
    edit_results(later, lambda run: run.update(date=run["date"] + 86400))
    assert publish(tmp_path / "out", tmp_path / "results") == 0
    runs, _ = read_results(tmp_path / "results")
    assert len(runs) == 2
    assert len({run.run.evaluation_id for run in runs}) == 1
    capsys.readouterr()
    assert main(["validate", str(tmp_path / "results")]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"note: .*\.jsonl: the same run was made before: .*\.jsonl; the newest, of 2026-11-21T10:00:00Z, is shown", shown
    )


def test_two_publishers_at_once_are_both_kept(tmp_path: Path) -> None:
    outs = [
        write_output(tmp_path / f"out{number}", right=lambda _length, _depth, sample, n=number: sample < n).parent
        for number in range(1, 4)
    ]
    command = [sys.executable, "-m", "harness_ext.cli", "publish"]
    started = [
        subprocess.Popen([*command, str(out), str(outs[0]), "--results", str(tmp_path / "results")], stdout=subprocess.DEVNULL)
        for out in outs
    ]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    runs, problems = read_results(tmp_path / "results")
    assert (len(runs), problems) == (3, [])
    assert not list((tmp_path / "results").rglob(".*"))


KILLED = """
import os, signal, sys
from pathlib import Path
left = int(sys.argv[1])

def step(name):
    real = getattr(os, name)
    def counted(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(os, name, counted)

from harness_ext.publishing import prepare_run
from harness_ext.results.publish import Submission
from harness_ext.results import store
published = prepare_run(Path(sys.argv[2]), Submission())
for name in ("mkdir", "open", "fsync", "write", "replace", "rename", "unlink", "close"):
    step(name)
import io
class Slow(io.FileIO):
    def write(self, data):
        global left
        left -= 1
        if left < 0:
            super().write(bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(data)
Path.open = lambda self, mode: Slow(self, mode.replace("b", ""))
store.write_run(Path(sys.argv[3]), published)
"""


def test_a_publisher_killed_at_any_step_leaves_the_old_state_or_the_new_and_the_next_one_finishes(tmp_path: Path) -> None:
    old = write_output(tmp_path / "old", right=lambda *_: True)
    new = write_output(tmp_path / "new", config={"model_args": {"pretrained": "lab/another"}})  # whose folder is made too
    states, steps = [], 0
    while True:
        results = tmp_path / f"results{steps}"
        write_run(results, prepare(old))
        before = list_all(results)
        process = subprocess.run(
            [sys.executable, "-c", KILLED, str(steps), str(new), str(results)], capture_output=True, timeout=60
        )
        assert process.returncode in (0, -9), process.stderr.decode()
        runs, problems = read_results(results)
        assert problems == []
        assert len(runs) in (1, 2)
        assert before.items() <= list_all(results).items(), "what was there is there"
        states.append(len(runs))
        write_run(results, prepare(new))
        assert len(read_results(results)[0]) == 2
        assert audit.audit_folder(results).problems == ()
        if process.returncode == 0:
            break
        steps += 1
    assert steps >= 8
    assert states == sorted(states), "the old state up to one step, and the new one from it on"
    assert states[0] == 1
    assert states[-2] == 2, "also before the last step"


def test_a_full_disk_is_an_error_that_names_it_and_leaves_nothing(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "fsync", full)
    (tmp_path / "results" / "lab__tiny").mkdir(parents=True)
    assert publish(out.parent, tmp_path / "results") == 1
    shown = capsys.readouterr().err
    assert re.search(r"results/lab__tiny/none-\w+\.jsonl could not be written: No space left on device", shown)
    assert "Traceback" not in shown
    assert not list_all(tmp_path / "results")


def test_a_folder_that_may_not_be_written_is_named(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").write_text("a file")
    assert publish(out.parent, tmp_path / "results") == 1
    assert "could not be written" in capsys.readouterr().err


def test_what_a_killed_publisher_left_is_no_record(out: Path, tmp_path: Path) -> None:
    path, _ = write_run(tmp_path, prepare(out))
    path.with_name(f".{path.name}.123-abcd").write_text("half a rec")
    assert audit.audit_folder(tmp_path).problems == ()


# ---------------------------------------------------------------------- validate


def test_a_record_that_was_changed_after_it_was_published_is_found_by_line(out: Path, tmp_path: Path) -> None:
    path, _ = write_run(tmp_path, prepare(out))
    lines = path.read_text().splitlines()
    cell = json.loads(lines[-1])
    cell["successes"] = 4
    path.write_text("\n".join([*lines[:-1], json.dumps(cell)]) + "\n")
    found = [str(problem) for problem in audit.audit_folder(tmp_path).problems]
    assert any(re.search(r"does not hold the hash of what is in it", problem) for problem in found)
    assert any(re.search(r"line 13: successes: found 4; computed from the rest of the file, it is 0", problem) for problem in found)


def test_ten_thousand_files_are_validated_in_minutes(out: Path, tmp_path: Path) -> None:
    """A tenth of a percent of it here, which has to take as small a part of the time."""
    published = prepare(out)
    for number in range(10):
        moment = f"2026-11-{number + 1:02d}T00:00:00Z"
        write_run(
            tmp_path, PublishedRun(run=msgspec.structs.replace(published.run, evaluation_timestamp=moment), cells=published.cells)
        )
    start = time.process_time()
    found = audit.audit_folder(tmp_path)
    assert (found.runs, found.problems) == (10, ())
    assert time.process_time() - start < 3
