"""The command `harness-ext`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness_ext._bridge import tasks_dir
from harness_ext.errors import ComparisonError, HarnessExtError
from harness_ext.publishing import export, export_arguments, publish, publish_arguments, validate, validate_arguments
from harness_ext.sharding import merge, merge_arguments, run, run_arguments
from harness_ext.showing import leaderboard, leaderboard_arguments, report, report_arguments

if TYPE_CHECKING:
    from harness_ext.compare import Asked

PROBE = "from lm_eval.tasks import TaskManager as T; import lm_eval.models; from lm_eval.api.registry import model_registry as m; \
print('passkey_extrapolate' in T(include_defaults=False).all_tasks, 'hf-extrapolate' in m)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="harness-ext", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, add_arguments in COMMANDS:
        summary = (function.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=function is not run)
        command.set_defaults(function=function)
        add_arguments(command)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.function is not run:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        return int(options.function(options))
    except HarnessExtError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def no_arguments(_: argparse.ArgumentParser) -> None:
    """A command that takes none."""


def add_run_arguments(command: argparse.ArgumentParser) -> None:
    """What says which prompts are run and how; where lm_eval has the same, under lm_eval's name."""
    command.add_argument(
        "--tasks",
        type=_names,
        default=_names("passkey_extrapolate,niah_extrapolate"),
        metavar="T,…",
        help="tasks, groups or task files",
    )
    command.add_argument(
        "--metadata", type=_json_object, default={}, metavar="JSON", help="as lm_eval's: multiples, depths, samples, …"
    )
    command.add_argument("--limit", type=_count, metavar="N", help="prompts a task, balanced over lengths and depths")
    command.add_argument(
        "--model_args", default="", metavar="K=V,…", help="for hf-extrapolate; options of a method reach those that have them"
    )
    command.add_argument("--batch_size", type=_batch_size, default="auto", metavar="N", help="default: auto")
    command.add_argument("--include_path", metavar="FOLDER", help="task files of yours")


def compare_arguments(command: argparse.ArgumentParser) -> None:
    """What `compare` takes."""
    command.add_argument("model", nargs="?", metavar="MODEL", help="a folder, a name on the hub, or reference/rope")
    command.add_argument(
        "--methods", type=_names, default=_names("none,linear,ntk,yarn"), metavar="A,B,…", help="default: none,linear,ntk,yarn"
    )
    add_run_arguments(command)
    command.add_argument("--output_path", type=Path, metavar="FOLDER", help="write records, tables and a figure there")
    command.add_argument("--read", type=Path, metavar="FOLDER", help="compare what --output_path wrote before, and run nothing")


def compare(options: argparse.Namespace) -> int:
    """Run one model under several methods of extending it, on the same prompts, and test them in pairs."""
    from harness_ext.compare import compare_methods, publish  # scipy, a second to import
    from harness_ext.results import paired
    from harness_ext.results.runs import read_runs
    from harness_ext.results.tables import show_comparison

    if (options.model is None) == (options.read is None):
        raise ComparisonError("name either a model to run, or a folder to --read")
    folder = options.output_path or options.read
    comparison = paired.compare(read_runs(options.read)) if options.read else compare_methods(_asked(options), folder)
    if folder:
        publish(comparison, folder)
    print(show_comparison(comparison))
    return 0


def plan_arguments(command: argparse.ArgumentParser) -> None:
    """What `plan` takes."""
    command.add_argument("model", metavar="MODEL", help="a folder, a name on the hub, or reference/rope")
    add_run_arguments(command)
    command.add_argument("--json", action="store_true", help="for a program to read")
    command.set_defaults(methods=("none",))


def plan(options: argparse.Namespace) -> int:
    """Say what a run will need: lengths, tokens, memory and time, and what will not fit; nothing is scored."""
    from harness_ext.plan import plan_run
    from harness_ext.plan_text import to_json, to_text

    with contextlib.redirect_stdout(sys.stderr):  # lm_eval prints remarks, which are not what was asked
        found = plan_run(_asked(options))
    print(json.dumps(to_json(found), indent=2) if options.json else to_text(found))
    return 0


def inspect_arguments(command: argparse.ArgumentParser) -> None:
    """What `inspect` takes."""
    command.add_argument("model", metavar="MODEL", help="a folder, a name on the hub, or reference/rope")
    command.add_argument("--json", action="store_true", help="for a program to read")
    command.add_argument("--revision", help="branch, tag or commit on the hub")
    command.add_argument("--trust_remote_code", action="store_true", help="run the model's own code")


def inspect(options: argparse.Namespace) -> int:
    """Say how a model takes positions, where it ends, and what can extend it, without its weights."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its remarks on configs are not what was asked
    from harness_ext.models.inspection import inspect_model, to_json, to_text  # torch and transformers, seconds to import

    given = {name: getattr(options, name) for name in ("revision", "trust_remote_code") if getattr(options, name)}
    found = inspect_model(options.model, **given)
    print(json.dumps(to_json(found), indent=2) if options.json else to_text(found))
    return 0


def print_tasks_dir(_: argparse.Namespace) -> int:
    """Print the folder of the task files, for `lm_eval --include_path`."""
    print(tasks_dir())
    return 0


def doctor(_: argparse.Namespace) -> int:
    """Say whether lm_eval sees this plugin, and if not, what to type instead."""
    for package in ("harness_ext", "lm_eval", "transformers", "torch"):
        print(f"{package:<14} {_version(package)}")
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    tasks, models = (word == "True" for word in (found.stdout.split() or ["", ""])[-2:])
    print(f"{'lm_eval sees':<14} tasks: {'yes' if tasks else 'no'}, models: {'yes' if models else 'no'}")
    if tasks and models:
        return 0
    if found.returncode:
        print(found.stderr.strip().splitlines()[-1])
    print(
        "Python's start-up did not run harness_ext.pth: it is read from site-packages alone (not with pip --target, zipapps, Bazel, "
        "python -S), and not where HARNESS_EXT_DISABLE is set. Instead:\n"
        '  python -c "import harness_ext; harness_ext.install(); from lm_eval.__main__ import cli_evaluate; cli_evaluate()" '
        "--tasks passkey_extrapolate\n"
        "  in a script, before lm_eval.simple_evaluate: import harness_ext; harness_ext.install()\n"
        f"  tasks alone, with lm_eval's own models: lm_eval --include_path {tasks_dir()} …"
    )
    return 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _asked(options: argparse.Namespace) -> Asked:
    from lm_eval.utils import simple_parse_args_string

    from harness_ext.compare import Asked

    return Asked(
        model=options.model,
        methods=options.methods,
        tasks=options.tasks,
        metadata=options.metadata,
        limit=options.limit,
        model_args=simple_parse_args_string(options.model_args),
        batch_size=options.batch_size,
        include_path=options.include_path,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"found {text!r}, which is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected an object, as in '{{\"samples\": 50}}'")
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number from 1")
    return int(text)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else _count(text)


COMMANDS = (
    ("compare", compare, compare_arguments),
    ("doctor", doctor, no_arguments),
    ("export", export, export_arguments),
    ("inspect", inspect, inspect_arguments),
    ("leaderboard", leaderboard, leaderboard_arguments),
    ("merge", merge, merge_arguments),
    ("plan", plan, plan_arguments),
    ("publish", publish, publish_arguments),
    ("report", report, report_arguments),
    ("run", run, run_arguments),
    ("tasks-dir", print_tasks_dir, no_arguments),
    ("validate", validate, validate_arguments),
)
"""Name, function and arguments of each."""


if __name__ == "__main__":
    sys.exit(main())
