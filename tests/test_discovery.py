"""lm_eval, from outside: it finds us by itself, and nothing else changes."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def run(*command: str, env: dict[str, str] | None = None, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=folder, check=False)


def python(code: str, **env: str) -> str:
    done = run(sys.executable, "-c", code, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def rows(table: str) -> list[tuple[int, float]]:
    """(length, multiple) of each row of lm_eval's table."""
    return [(int(length), float(multiple)) for length, multiple in re.findall(r"\|exact@ *(\d+) \(([\d.]+)x\) *\|", table)]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The main use, as small as it goes: five prompts."""
    folder = tmp_path_factory.mktemp("bare")
    done = run(
        str(BIN / "lm_eval"),
        "--tasks",
        "passkey_extrapolate",
        "--limit",
        "10",
        "--output_path",
        "out",
        "--log_samples",
        folder=folder,
    )
    return folder, done


def test_the_bare_command_prints_a_row_for_each_length(bare: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = bare
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout) == [(128, 0.5), (256, 1), (512, 2), (1024, 4), (2048, 8)]
    assert "No model was named: running the embedded reference/rope" in done.stderr
    (samples,) = folder.glob("out/*/samples_passkey_extrapolate_*.jsonl")
    assert len(samples.read_text().splitlines()) == 10
    assert len(list(folder.glob("out/*/results_*.json"))) == 1


def test_an_embedded_model_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    named = ("--tasks", "passkey_extrapolate", "--limit", "1", "--model_args", "pretrained=reference/rope")
    done = run(str(BIN / "lm_eval"), *named)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModelError: reference/rope is embedded")
    assert "--model hf-extrapolate" in done.stderr.splitlines()[-1]
    code = "import lm_eval; lm_eval.simple_evaluate('hf', 'dtype=float32,pretrained=reference/rope', tasks=['passkey_extrapolate'])"
    assert "reference/rope is embedded" in run(sys.executable, "-c", code).stderr.splitlines()[-1]
    (tmp_path / "reference" / "rope").mkdir(parents=True)
    elsewhere = run(str(BIN / "lm_eval"), *named, folder=tmp_path)  # a folder of the user's own is theirs
    assert "is embedded" not in elsewhere.stderr


def test_a_mistake_on_the_command_line_is_one_line_before_any_weights() -> None:
    done = run(str(BIN / "lm-eval"), "run", "--tasks", "passkey_extrapolate", "--metadata", '{"depths": [2]}')
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Initializing" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("TaskFileError: metadata: field 'depths': found [2]; expected")


def test_python_m_lm_eval_validates_our_tasks() -> None:
    done = run(sys.executable, "-m", "lm_eval", "validate", "--tasks", "passkey_extrapolate,niah_extrapolate,copy_extrapolate")
    assert "All tasks found and valid" in done.stdout


def test_accelerate_launch_finds_us() -> None:
    done = run(
        str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", "-m", "lm_eval",
        "--model", "hf-extrapolate", "--model_args", "pretrained=reference/rope", "--tasks", "passkey_extrapolate", "--limit", "5",
    )  # fmt: skip
    assert len(rows(done.stdout)) == 5, done.stderr


def test_starting_python_imports_next_to_nothing() -> None:
    modules = python("import sys; print(*sorted(m for m in sys.modules if '.' not in m or m.startswith('harness_ext')))").split()
    assert [name for name in modules if name.startswith("harness_ext")] == ["harness_ext", "harness_ext._startup"]
    without = python(
        "import sys; print(*sorted(m for m in sys.modules if '.' not in m or m.startswith('harness_ext')))", HARNESS_EXT_DISABLE="1"
    ).split()
    assert set(modules) == set(without)


def test_lm_eval_without_our_tasks_imports_neither_torch_nor_our_code() -> None:
    code = "import sys, lm_eval.tasks, lm_eval.models; lm_eval.tasks.TaskManager(include_defaults=False); print('torch' in sys.modules, 'harness_ext.sweep.tasks' in sys.modules)"
    assert python(code) == "False False"


def test_the_switch_takes_us_out_altogether() -> None:
    code = (
        "import lm_eval.tasks, lm_eval.models, lm_eval.evaluator; from lm_eval.api.registry import model_registry as m;"
        "t = lm_eval.tasks.TaskManager(include_defaults=False); print(t.all_tasks, 'hf-extrapolate' in m, 'hf' in m, lm_eval.evaluator.evaluate.__module__)"
    )
    assert python(code, HARNESS_EXT_DISABLE="1") == "[] False True lm_eval.evaluator"


def test_what_lm_eval_discovers_by_itself_is_not_added_again() -> None:
    code = (
        "import sys, types, lm_eval.tasks.manager as m; from harness_ext import _bridge;"
        "seen = []; new = types.SimpleNamespace(discover_plugin_task_paths=lambda: [_bridge.tasks_dir()]);"
        "new.TaskManager = type('T', (), {'__init__': lambda self, include_path=None: seen.append(include_path)});"
        "_bridge.find_tasks(new); new.TaskManager(); new.discover_plugin_task_paths = list; print(seen)"
    )
    assert python(code) == "[None]"


@pytest.mark.parametrize(
    "newer",
    [
        "import importlib.metadata as d; v = d.version; d.version = lambda name: '0.4.14' if name == 'lm-eval' else v(name)",
        "import lm_eval.api.registry as r; r.discover_plugins = lambda: None",
    ],
)
def test_models_are_left_to_an_lm_eval_that_reads_entry_points(newer: str) -> None:
    code = f"{newer}; import lm_eval.models; from lm_eval.api.registry import model_registry as m; print('hf-extrapolate' in m, 'hf' in m)"
    assert python(code) == "False True"


def test_a_late_install_completes_what_is_imported_already() -> None:
    code = (
        "import lm_eval.tasks, lm_eval.models, os; from lm_eval.api.registry import model_registry as m; print('hf-extrapolate' in m, end=' ');"
        "del os.environ['HARNESS_EXT_DISABLE']; import harness_ext; harness_ext.install(); harness_ext.install();"
        "print('hf-extrapolate' in m, 'passkey_extrapolate' in lm_eval.tasks.TaskManager(include_defaults=False).all_tasks)"
    )
    assert python(code, HARNESS_EXT_DISABLE="1") == "False True True"


def test_the_doctor_says_whether_lm_eval_sees_us_and_what_to_type_if_not() -> None:
    well = run(str(BIN / "harness-ext"), "doctor")
    assert well.returncode == 0
    assert "tasks: yes, models: yes" in well.stdout
    ill = run(str(BIN / "harness-ext"), "doctor", env={"HARNESS_EXT_DISABLE": "1"})
    assert ill.returncode == 1
    assert "tasks: no, models: no" in ill.stdout
    assert "harness_ext.install()" in ill.stdout


def test_the_start_up_file_is_one_plain_line() -> None:
    (installed,) = (
        line
        for line in python("import site; print(*site.getsitepackages(), sep='\\n')").splitlines()
        if (Path(line) / "harness_ext.pth").is_file()
    )
    assert (Path(installed) / "harness_ext.pth").read_text() == "import harness_ext._startup; harness_ext._startup.install()\n"
    assert (Path(installed) / "harness_ext.start").read_text() == "harness_ext._startup:install\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--model", "hf-extrapolate", "--model_args", "pretrained=nowhere/at-all"),
            "ModelError: model 'nowhere/at-all' was asked for",
        ),
        (
            ("--metadata", '{"lengths": [20]}'),
            "LengthError: passkey_extrapolate: a prompt of 20 tokens was asked for, but this task's own text",
        ),
        (
            ("--metadata", '{"haystack": "nowhere.txt"}'),
            "HaystackError: haystack: asked for the file 'nowhere.txt', which is not there",
        ),
    ],
)
def test_what_can_be_known_before_the_weights_load_is_said_before(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = run(str(BIN / "lm_eval"), "--tasks", "passkey_extrapolate", "--output_path", "out", *arguments, folder=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Initializing" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    assert not (tmp_path / "out").exists()


def test_of_all_that_lm_eval_knows_only_our_own_is_taken_for_ours(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    from harness_ext._bridge import _is_ours

    nested = "[{task: niah_single_extrapolate, samples: 3}, {group: inner, task: [copy_extrapolate, {task: passkey_extrapolate}]}]"
    (tmp_path / "nested.yaml").write_text(f"group: nested\ntask: {nested}\n")
    (tmp_path / "mixed.yaml").write_text("group: mixed\ntask: [nested, {group: inner, task: [arc_easy]}]\n")
    (tmp_path / "circle.yaml").write_text("group: circle\ntask: [ring, nested]\n")
    (tmp_path / "ring.yaml").write_text("group: ring\ntask: [circle]\n")
    manager = TaskManager(include_path=str(tmp_path))
    assert {"arc_easy", "ai2_arc", "mmlu", "hellaswag"} < set(manager.all_tasks)
    found = {name for name in manager.all_tasks if _is_ours(name, manager)}
    assert {"passkey_extrapolate", "niah_extrapolate", "extrapolate", "nested"} < found
    assert {name for name in found if not name.endswith(("_extrapolate", "_extrapolate_generate"))} == {
        "extrapolate",
        "extrapolate_generate",
        "extrapolate_why",
        "nested",
    }


@pytest.mark.parametrize(
    ("tasks", "theirs"),
    [
        ("passkey_extrapolate", False),
        (["extrapolate", "niah_extrapolate,vault"], False),
        (["mine/vault.yaml", "vaults"], False),
        (["passkey_extrapolate,arc_easy"], True),
        (["mixed"], True),
        (["passkey_extra*"], True),
    ],
)
def test_the_files_of_lm_evals_own_tasks_are_read_only_where_one_may_be_meant(
    tasks: str | list[str], theirs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.config.evaluate_config import EvaluatorConfig

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "vault.yaml").write_text(
        "task: vault\nclass: !function harness_ext.Task\nneedle: The code is {value}.\nquestion: What is the code?\nsamples: 1\n"
    )
    (tmp_path / "mine" / "vaults.yaml").write_text("group: vaults\ntask: [vault, copy_extrapolate]\n")
    (tmp_path / "mine" / "mixed.yaml").write_text("group: mixed\ntask: [vault, arc_easy]\n")
    config = EvaluatorConfig(model="dummy", tasks=tasks, include_path="mine", metadata={"tokenizer": "reference/rope"})
    manager = config.process_tasks(config.metadata)
    assert ("arc_easy" in manager.all_tasks) == theirs
    assert {"vault", "passkey_extrapolate"} < set(manager.all_tasks)
    assert config.tasks


@pytest.mark.parametrize(("tasks", "theirs"), [(["passkey_extrapolate"], False), (["extrapolate", "no_such_task"], True)])
def test_from_python_too_they_are_read_only_where_one_may_be_meant(
    tasks: list[str], theirs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import evaluator

    made = []

    class Watched(evaluator.TaskManager):  # type: ignore[name-defined, misc]
        def __init__(self, *given: object, **options: object) -> None:
            super().__init__(*given, **options)
            made.append(self)

    monkeypatch.setattr(evaluator, "TaskManager", Watched)
    metadata = {"tokenizer": "reference/rope", "max_length": 300, "samples": 1}
    with contextlib.suppress(KeyError) if theirs else contextlib.nullcontext():
        found = evaluator.simple_evaluate(model="dummy", tasks=tasks, metadata=metadata, bootstrap_iters=0)
        assert set(found["results"]) == set(tasks)
    assert ["arc_easy" in manager.all_tasks for manager in made] == [theirs]


def test_a_task_file_named_on_the_command_line_runs_under_any_model(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "task: vault\nclass: !function harness_ext.Task\nneedle: The code is {value}.\nquestion: What is the code?\nsamples: 1\n"
    )
    metadata = '{"tokenizer": "reference/rope", "max_length": 300}'
    done = run(str(BIN / "lm_eval"), "--model", "dummy", "--tasks", "mine.yaml", "--metadata", metadata, folder=tmp_path)
    assert rows(done.stdout) == [(128, 0.5), (256, 1)], done.stderr
    assert "left out 512 (2x) tokens" in done.stderr
    (tmp_path / "mine.yaml").write_text((tmp_path / "mine.yaml").read_text().replace("question:", "qestion:"))
    done = run(str(BIN / "lm_eval"), "--model", "dummy", "--tasks", "mine.yaml", "--metadata", metadata, folder=tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("TaskFileError: mine.yaml: unknown field 'qestion', did you mean 'question'")
    )
