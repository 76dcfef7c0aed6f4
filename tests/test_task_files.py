"""A task is one YAML file; a mistake in it is an error that names the file, the field and what was expected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from lm_eval.tasks import TaskManager
from scripted import Scripted, curve
from tokenizers_here import make_tokenizer

from harness_ext.errors import HarnessExtError, TaskFileError
from harness_ext.sweep.spec import parse_spec

GOOD = """
task: vault_code
class: !function harness_ext.Task
needle: The code of the {key} vault is {value}.
question: What is the code of the {key} vault?
answer_prefix: It is
value: digits:6
keys: 2
lengths: [400]
depths: [0.5]
samples: 2
"""


def load(folder: Path, text: str) -> Any:
    (folder / "mine.yaml").write_text(text)
    manager = TaskManager(include_defaults=False, include_path=str(folder), metadata={"tokenizer": make_tokenizer("bpe")})
    return manager.load(["vault_code"])["tasks"]["vault_code"]


def test_a_task_file_is_all_that_a_new_task_takes(tmp_path: Path) -> None:
    task = load(tmp_path, GOOD)
    task.bind(Scripted(lambda *_: True, 1000))
    task.build_all_requests()
    prompt, answer = task.instances[0].args
    assert re.search(rf"The code of the [a-z-]+ vault is {answer.strip()}\.", prompt)
    assert prompt.count("The code of the") == 2
    assert prompt.endswith("vault? It is")
    assert len(answer.strip()) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("needle:", "nedle:"), "unknown field 'nedle', did you mean 'needle'"),
        (("question: What", "qestion: What"), "unknown field 'qestion', did you mean 'question'"),
        (("question: What is the code of the {key} vault?\n", ""), "field 'question' is missing"),
        (("{value}", "{value:d}"), "field 'needle': found .* a sentence with {value}"),
        (("{value}", "{value!r}"), "field 'needle': found .* a sentence with {value}"),
        (("digits:6", "digits:5000"), "field 'value': found 'digits:5000'; expected one of digits:N"),
        (("{value}", "{valeu}"), "field 'needle': found .* a sentence with {value}"),
        (("vault is {value}", "vault is {value"), "field 'needle'|is not YAML"),
        (("of the {key} vault?", "of it?"), "field 'question': found no {key}"),
        (("digits:6", "digits"), "field 'value': found 'digits'; expected one of digits:N"),
        (("digits:6", "hex:6"), "field 'value': found 'hex:6'"),
        (("keys: 2", "keys: two"), "field 'keys': found 'two'; expected a whole number"),
        (("keys: 2", "keys: 2\nqueries: 3"), "field 'queries': found 3; expected at most keys, which is 2"),
        (("keys: 2", "keys: 2\nevery_depth: true"), "field 'keys': found 2; expected 1 beside every_depth"),
        (("keys: 2", "values: 3\nevery_depth: true"), "field 'values': found 3; expected 1 beside every_depth"),
        (("keys: 2", "every_depth: 16"), "field 'every_depth': found 16; expected true or false"),
        (("lengths: [400]", "lengths: [0]"), "field 'lengths'"),
        (("depths: [0.5]", "depths: [2]"), "field 'depths': found .* 0 to 1"),
        (("class: !function harness_ext.Task", "class: !function harness_ext.Tusk"), "field 'class': found 'harness_ext.Tusk'"),
        (("task: vault_code\n", ""), "field 'task': found None"),
        (("answer_prefix: It is", "answer_prefix: It: is: {}"), "is not YAML|field 'answer_prefix'"),
        (("samples: 2", "samples: 2\nscore: bleu"), "field 'score': found 'bleu'; expected retrieval or copy"),
        (("samples: 2", "samples: 2\noutput_type: multiple_choice"), "field 'output_type'"),
    ],
)
def test_a_mistake_names_the_file_the_field_and_what_was_expected(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(TaskFileError, match=message) as error:
        load(tmp_path, GOOD.replace(*change))
    assert "mine.yaml" in str(error.value)


def test_needles_that_distract_come_again_where_there_are_no_others(tmp_path: Path) -> None:
    task = load(tmp_path, GOOD.replace("digits:6", "words:1").replace("[400]", "[6000]") + "haystack: needles\n")
    task.bind(Scripted(lambda *_: True, 6000))
    task.build_all_requests()
    prompt, answer = task.instances[0].args
    assert prompt.count("The code of the") > 100
    assert prompt.count(f"vault is {answer.strip()}.") == 1


def test_needles_at_every_depth_are_told_apart_by_a_key() -> None:
    fields = {"task": "t", "needle": "It is {value}.", "question": "What is it?", "every_depth": True}
    with pytest.raises(TaskFileError, match=r"t\.yaml: field 'needle': found no {key}; expected one, since every_depth is true"):
        parse_spec(fields, file="t.yaml", overrides={})


def test_a_file_that_is_not_ours_is_left_to_lm_eval(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("task: [broken\n")
    assert load(tmp_path, GOOD).task_name == "vault_code"


def test_every_task_of_ours_loads_and_the_list_is_complete() -> None:
    grouped = ["passkey", "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "copy"]
    in_groups = {f"{name}_extrapolate{suffix}" for suffix in ("", "_generate") for name in grouped}
    groups = {f"{name}{suffix}" for suffix in ("", "_generate") for name in ("extrapolate", "niah_extrapolate")}
    alone = {"niah_sweep_extrapolate", "niah_sweep_extrapolate_generate", "loss_extrapolate", "extrapolate_why"}
    manager = TaskManager(include_defaults=False)
    assert set(manager.all_tasks) == in_groups | groups | alone
    assert set(manager.load(["extrapolate", "extrapolate_generate"])["tasks"]) == in_groups
    assert set(manager.load(sorted(alone))["tasks"]) == alone


def test_the_example_in_contributing_runs(tmp_path: Path, evaluate: Any) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.DOTALL)
    name = re.search(r"^task: (\w+)$", block, re.MULTILINE)
    assert name
    assert len(block.strip().splitlines()) <= 16
    (tmp_path / "example.yaml").write_text(block)
    import lm_eval

    manager = TaskManager(
        include_defaults=False, include_path=str(tmp_path), metadata={"tokenizer": make_tokenizer("bpe"), "trained_length": 500}
    )
    results = lm_eval.simple_evaluate(
        Scripted(lambda *_: True, 10_000), tasks=[name.group(1)], task_manager=manager, bootstrap_iters=0
    )
    assert results
    assert set(curve(results, name.group(1)).values()) == {1.0}


def test_errors_are_one_tree() -> None:
    import harness_ext.errors as errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) > 4
    assert all(issubclass(kind, HarnessExtError) for kind in kinds)
