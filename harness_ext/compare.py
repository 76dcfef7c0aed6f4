"""`harness-ext compare`: one model, the same prompts, once per method of extending it; then the scores side by side, and paired tests.

check what was asked → run each method through lm_eval, and write what it gave → compare → print, write, draw.

McNemar's test takes prompts as independent; prompts of one sample share their haystack, so the p-values are too small by what
such prompts have in common (`results.paired`).
"""

from __future__ import annotations

import dataclasses
import difflib
import gc
import importlib.metadata
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness_ext import credentials
from harness_ext.cells import Length, TrainedLength, Unmeasured
from harness_ext.errors import ComparisonError, HarnessExtError, LengthError, ModelError, PromptTooLongError
from harness_ext.model_view import first_line
from harness_ext.results.charts import save_comparison
from harness_ext.results.paired import Comparison, compare
from harness_ext.results.runs import RUNS, Answer, Run, append_run
from harness_ext.results.tables import show_comparison

BACKEND = "hf-extrapolate"
UNCHANGED = "none"
"""The method that leaves the model as it is."""
REFUSALS = (ModelError, LengthError, PromptTooLongError)
"""What may hold for one method and not for another; anything else ends the comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be compared, on what."""

    model: str
    """A folder, a name on the hub, or `reference/NAME`."""
    methods: tuple[str, ...]
    """At least two, each once; `none` is the model as it is, any other is its `extend` argument."""
    tasks: tuple[str, ...]
    """Names of tasks, groups or task files."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """As `lm_eval --metadata`."""
    limit: int | None = None
    """Prompts a task; at least 1."""
    model_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """For the model class, under every method; a method's options (`factor`, …) for the methods that have them."""
    batch_size: int | str = "auto"
    """Rows a forward."""
    include_path: str | None = None
    """A folder of task files."""


BuildModel = Callable[[Asked, str], Any]
"""(what was asked, a method of it) → lm_eval's model object."""


def build_model(asked: Asked, method: str) -> Any:
    """`hf-extrapolate` under a method. Raises ModelError where the model class refuses it."""
    import lm_eval.models  # noqa: F401  which registers them
    from lm_eval.api.registry import get_model

    foreign = {name for other in asked.methods for name in list_options(other)} - set(list_options(method))
    arguments = {"pretrained": asked.model, **{name: value for name, value in asked.model_args.items() if name not in foreign}}
    if method != UNCHANGED:
        arguments["extend"] = method
    return get_model(BACKEND).create_from_arg_obj(arguments, {"batch_size": asked.batch_size})


def list_options(method: str) -> tuple[str, ...]:
    """The model arguments that concern this method alone. Raises ModelError for an unknown method.

    >>> list_options("none"), list_options("linear"), "beta_fast" in list_options("yarn")
    ((), ('factor',), True)
    """
    from harness_ext.models.extensions.extension import find_method

    return () if method == UNCHANGED else ("factor", *find_method(method).options)


def compare_methods(asked: Asked, folder: Path | None = None, build: BuildModel = build_model) -> Comparison:
    """Runs every method and compares them; in `folder`, each run is written as soon as it has ended.

    Raises ComparisonError where fewer than two methods run, and PairingError where they were given different prompts.
    """
    check(asked, folder)
    tasks = open_tasks(asked)
    runs = []
    for number, method in enumerate(asked.methods, start=1):
        started = time.monotonic()
        run = run_method(asked, method, tasks, build)
        said = f"refused: {run.refused}" if run.refused else f"{len(run.answers)} prompts in {time.monotonic() - started:.0f} s"
        print(f"{method} ({number} of {len(asked.methods)}): {said}", file=sys.stderr)
        if folder:
            append_run(folder, run)
        runs.append(run)
    return compare(runs)


def check(asked: Asked, folder: Path | None) -> None:
    """Raises ComparisonError, and ModelError for an unknown method, for what can be told before anything is loaded."""
    if len(asked.methods) < 2 or len(set(asked.methods)) < len(asked.methods):
        raise ComparisonError(f"--methods: found {','.join(asked.methods)!r}; expected at least two, each once, as in none,yarn")
    if "extend" in asked.model_args:
        raise ComparisonError("--model_args: found extend=…; name it in --methods, since it is what is compared")
    for method in asked.methods:
        list_options(method)
    if folder and (folder / RUNS).exists():
        raise ComparisonError(f"{folder} holds a comparison already; name another folder, or read that one with --read {folder}")


def open_tasks(asked: Asked) -> Any:
    """lm_eval's TaskManager for the asked tasks, each loaded and checked once.

    Raises ComparisonError for a task that is not there or has no exact matches, and what a task raises for what `metadata` says.
    """
    manager, loaded = load_tasks(asked)
    from harness_ext.sweep.loss import LossTask
    from harness_ext.sweep.tasks import ExtrapolateTask

    for name, task in loaded.items():
        if isinstance(task, LossTask):
            raise ComparisonError(
                f"--tasks: {name} has no exact matches, which are what is compared; run it once per method with lm_eval"
            )
        if not isinstance(task, ExtrapolateTask):
            ours = type(manager)(include_defaults=False, include_path=asked.include_path).all_tasks
            raise ComparisonError(f"--tasks: {name} has no lengths; expected tasks of this package ({', '.join(ours)})")
    return manager


def load_tasks(asked: Asked) -> tuple[Any, dict[str, Any]]:
    """lm_eval's TaskManager for the asked tasks, and each of them by name; those of this package are checked.

    lm_eval's own 14,000 tasks take it many seconds to find, so it looks among them only for a name that is none of ours.
    Raises ComparisonError for a task that is not there, and what a task raises for what `metadata` says.
    """
    import harness_ext

    credentials.refuse({**asked.model_args, **asked.metadata})
    harness_ext.install()
    from lm_eval.tasks import TaskManager

    from harness_ext.sweep.host import SweepTask

    options = {"include_path": asked.include_path, "metadata": dict(asked.metadata)}
    manager = TaskManager(include_defaults=False, **options)
    ours = manager.all_tasks
    if any(name not in ours and not name.endswith((".yaml", ".yml")) for name in asked.tasks):
        manager = TaskManager(**options)
    try:
        loaded = manager.load(list(asked.tasks))["tasks"]
    except HarnessExtError:
        raise
    except (KeyError, ValueError) as error:  # lm_eval's words for a name it does not know, or that comes twice
        raise ComparisonError(f"--tasks: {error.args[0]}{_meant(asked.tasks, ours)}") from None
    except OSError as error:  # data that is not here
        raise ComparisonError(f"--tasks: {', '.join(asked.tasks)} cannot be loaded: {first_line(error)}") from error
    for task in loaded.values():
        if isinstance(task, SweepTask):
            task.check({"pretrained": asked.model, **asked.model_args, **asked.metadata})
    return manager, loaded


def run_method(asked: Asked, method: str, tasks: Any, build: BuildModel = build_model) -> Run:
    """All prompts under one method, or why the model refuses it. `tasks`: lm_eval's TaskManager."""
    import lm_eval

    gc.collect()  # a model's modules refer to each other, and this one needs the memory of the one before
    try:
        lm = build(asked, method)
        results = lm_eval.simple_evaluate(model=lm, tasks=list(asked.tasks), task_manager=tasks, limit=asked.limit)
    except REFUSALS as error:
        return Run(model=asked.model, method=method, refused=str(error))
    if results is None:
        raise ComparisonError("a comparison runs in one process; start it without a launcher")
    return read_results(asked, method, results)


def read_results(asked: Asked, method: str, results: Mapping[str, Any]) -> Run:
    """What is kept of lm_eval's results."""
    configs = {task: results["configs"][task] for task in results["samples"]}
    trained = next((config["trained_length"] for config in configs.values()), None)
    return Run(
        model=asked.model,
        method=method,
        override=results["config"].get("override"),
        trained_length=TrainedLength(**trained) if trained else None,
        plan={task: tuple(_read_length(length) for length in config["lengths"]) for task, config in configs.items()},
        settings={
            "tasks": list(asked.tasks),
            "metadata": dict(asked.metadata),
            "limit": asked.limit,
            "model_args": dict(asked.model_args),
            "batch_size": asked.batch_size,
        },
        results=results["results"],
        versions={name: importlib.metadata.version(name) for name in ("harness_ext", "lm_eval", "transformers", "torch")},
        answers=tuple(
            _read_answer(method, task, sample)
            for task, samples in results["samples"].items()
            for sample in samples
            if "control" not in sample["doc"]
        ),
    )


def publish(comparison: Comparison, folder: Path) -> None:
    """Writes `compare.md` and the figure; without altair, a line on stderr says how to get one."""
    text = show_comparison(comparison)
    try:
        figure = next(file.name for file in save_comparison(comparison, folder) if file.suffix == ".svg")
        text += f"\n![Exact matches against length, one line a method]({figure})\n"
    except ComparisonError as error:
        print(f"no figure: {error}", file=sys.stderr)
    (folder / "compare.md").write_text(text, encoding="utf-8")


def _read_length(planned: Mapping[str, Any]) -> Length:
    return Length(tokens=planned["length"], multiple=planned["multiple"], outcome=planned["outcome"], reason=planned["reason"])


def _read_answer(method: str, task: str, sample: Mapping[str, Any]) -> Answer:
    doc, response = sample["doc"], sample["resps"][0][0]
    return Answer(
        method=method,
        task=task,
        length=doc["length"],
        multiple=doc["multiple"],
        depth=doc["depth"],
        sample=doc["sample"],
        verdict=sample["filtered_resps"][0],
        prompt_hash=doc["prompt_fingerprint"],
        log_likelihood=None if isinstance(response, (str, Unmeasured)) else _finite(response[0]),
    )


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return float(value) if math.isfinite(value) else None


def _meant(names: Sequence[str], known: Sequence[str]) -> str:
    found = [close for name in names if name not in known for close in difflib.get_close_matches(name, known, n=1)]
    return f"; did you mean {', '.join(found)}?" if found else f"; known here: {', '.join(known)}"
