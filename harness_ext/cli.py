"""The command `harness-ext`."""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence

from harness_ext._bridge import tasks_dir
from harness_ext.errors import HarnessExtError

PROBE = "from lm_eval.tasks import TaskManager as T; import lm_eval.models; from lm_eval.api.registry import model_registry as m; \
print('passkey_extrapolate' in T(include_defaults=False).all_tasks, 'hf-extrapolate' in m)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="harness-ext", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function in (("doctor", doctor), ("tasks-dir", print_tasks_dir)):
        commands.add_parser(name, help=(function.__doc__ or "").splitlines()[0]).set_defaults(function=function)
    try:
        return int(parser.parse_args(arguments).function())
    except HarnessExtError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def print_tasks_dir() -> int:
    """Print the folder of the task files, for `lm_eval --include_path`."""
    print(tasks_dir())
    return 0


def doctor() -> int:
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


if __name__ == "__main__":
    sys.exit(main())
