"""What lm_eval 0.4.13 cannot do by itself, done to its modules as they are imported; each part stands aside where it can.

Every function takes the module it completes. None changes a run in which no task and no model of this package takes part.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import yaml

from harness_ext import credentials
from harness_ext.errors import HarnessExtError, ModelError, TaskFileError

log = logging.getLogger(__name__)

LAST_WITHOUT_PLUGINS = (0, 4, 13)
"""The last lm_eval that does not read the entry-point group `lm_eval.models` by itself."""
CLASSES = {"harness_ext.Task": "parse_spec", "harness_ext.LossTask": "parse_loss_spec"}
"""A task file's class → the function of `sweep.spec` that reads the file."""
OURS = re.compile(r"^(class|include):.*harness_ext", re.MULTILINE)
"""A task file of ours, even where it cannot be read as YAML."""
OUR_MODEL = re.compile("-extrapolate$")
"""A model of ours, by its name."""
KEEPS_NOTHING = re.compile("^(vllm|sglang)-")
"""A model of ours whose answers are not kept, by its name."""
CACHE: ContextVar[Path | None] = ContextVar("cache", default=None)
"""Where our model is to keep its answers. lm_eval's own cache knows an answer by its prompt alone: another override, dtype or model would be
given answers that are not its own, and what could not be measured would be kept as an answer."""
ASKED: ContextVar[tuple[Any, ...]] = ContextVar("asked", default=())
"""What is asked for by name, while it is looked up."""
DEFAULT_MODEL = ("hf-extrapolate", {"pretrained": "reference/rope"})


class _Unnamed(str):
    """lm_eval's default model, where the user named none; to everybody else it is the same string."""

    __slots__ = ()


def tasks_dir() -> Path:
    """The folder of this package's task files."""
    return Path(__file__).parent / "tasks"


def register_models(models: ModuleType) -> None:
    """Puts this package's `lm_eval.models` entry points into lm_eval's registry, by name: nothing is imported."""
    from lm_eval.api import registry

    version = tuple(int(part) for part in importlib.metadata.version("lm-eval").split(".")[:3] if part.isdecimal())
    if version > LAST_WITHOUT_PLUGINS or any("plugin" in name.lower() for name in dir(registry)):
        return
    for point in importlib.metadata.distribution("harness_ext").entry_points:
        if point.group == "lm_eval.models" and point.name not in registry.model_registry:
            registry.model_registry.register(point.name, target=point.value)


def find_tasks(manager: ModuleType) -> None:
    """Makes every TaskManager look into our folder too, before the user's, and name the user's task files that are broken.

    lm_eval's own folder of 14,000 files is left aside where tasks of ours alone are asked for (`ASKED`).
    """
    wrapped = manager.TaskManager.__init__
    signature = inspect.signature(wrapped)
    discovered = getattr(manager, "discover_plugin_task_paths", list)

    @functools.wraps(wrapped)
    def init(*args: Any, **kwargs: Any) -> None:
        """lm_eval's, with our folder among those that it looks into."""
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments.get("include_path") or []
        paths = list(given) if isinstance(given, (list, tuple)) else [given]
        for path in paths:
            check_task_files(Path(path))
        ours = tasks_dir().resolve()
        if ours not in [Path(path).resolve() for path in (*paths, *discovered())]:
            bound.arguments["include_path"] = [ours, *paths]
        if ASKED.get() and bound.arguments.get("include_defaults", "include_defaults" in signature.parameters):
            alone = signature.bind(*bound.args, **bound.kwargs)
            alone.arguments["include_defaults"] = False
            wrapped(*alone.args, **alone.kwargs)
            if all(_is_ours(name, alone.arguments["self"]) or _read_ours(name) for name in ASKED.get()):
                return
        wrapped(*bound.args, **bound.kwargs)

    manager.TaskManager.__init__ = init


def tell_tasks_their_model(evaluator: ModuleType) -> None:
    """Makes `evaluate` tell our tasks which model their prompts are for, of which lm_eval tells them only the name, and our models
    when an evaluation begins and ends."""
    wrapped = evaluator.evaluate
    signature = inspect.signature(wrapped)

    @functools.wraps(wrapped)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        for task in _leaves(arguments.get("task_dict")):
            task.bind(arguments["lm"])
        with getattr(arguments["lm"], "evaluating", contextlib.nullcontext)(CACHE.get()):
            return wrapped(*args, **kwargs)

    evaluator.evaluate = evaluate  # type: ignore[attr-defined]
    simple = evaluator.simple_evaluate
    asked = inspect.signature(simple)

    @functools.wraps(simple)
    def simple_evaluate(*args: Any, **kwargs: Any) -> Any:
        """lm_eval's, once an embedded model has not been asked for under another backend's name."""
        bound = asked.bind(*args, **kwargs)
        given, model = bound.arguments, bound.arguments.get("model")
        names = given.get("tasks") or []
        named = given.get("task_manager") is None and all(isinstance(name, str) for name in names)
        with _setting(ASKED, tuple(names) if named else ()):
            if not (OUR_MODEL.search(str(model)) or type(model).__module__.startswith("harness_ext.")):
                _refuse_embedded(model, given.get("model_args"))
                return simple(*args, **kwargs)
            credentials.refuse({name: given.get(name) for name in ("model_args", "metadata")})
            cache, given["use_cache"] = given.get("use_cache"), None
            with _setting(CACHE, _open_cache(cache, model) if cache else None):
                found = simple(*bound.args, **bound.kwargs)
        if found is not None:  # on the other processes it is
            found["config"]["use_cache"] = cache
        return found

    evaluator.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]


def _refuse_embedded(model: Any, arguments: Any) -> None:
    """Raises ModelError where a model of lm_eval's is given the name of an embedded one, which it would look for on the hub."""
    from harness_ext.model_view import REFERENCE

    given = arguments if isinstance(arguments, dict) else dict(re.findall(r"([^,=]+)=([^,]*)", arguments or ""))
    name = str(given.get("pretrained"))
    if name.startswith(REFERENCE) and not Path(name).exists():
        raise ModelError(f"{name} is embedded in harness_ext, and --model {model} knows none of those; add --model hf-extrapolate")


@contextlib.contextmanager
def _setting(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """`variable` has this value within."""
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)


def _open_cache(cache: str, model: Any) -> Path:
    """The folder in which a model is to keep its answers. Raises ModelError where it keeps none, or where there can be no such folder."""
    name = model if isinstance(model, str) else type(model).__name__
    if KEEPS_NOTHING.search(name) if isinstance(model, str) else not hasattr(model, "evaluating"):
        raise ModelError(f"use_cache={cache} was asked for, and the answers of {name} are not kept; leave it out")
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"use_cache={cache} was asked for, and there can be no folder of that name: {error}; name another"
        ) from error
    return Path(cache)


def prepare_command_line(module: ModuleType) -> None:
    """Makes the command line check our tasks before any weights load, and run the embedded model where none is named."""
    config = module.EvaluatorConfig
    from_cli, process_tasks = config.from_cli.__func__, config.process_tasks

    @classmethod  # type: ignore[misc]
    @functools.wraps(from_cli)
    def from_cli_here(cls: Any, namespace: Any) -> Any:
        given, file = {name: value for name, value in vars(namespace).items() if value}, getattr(namespace, "config", None)
        if file:  # then lm_eval prints all that it was given
            given = {**cls.load_yaml_config(file), **given}
        if OUR_MODEL.search(str(given.get("model"))):
            credentials.refuse(given if file else {name: given.get(name) for name in ("model_args", "metadata")})
        instance = from_cli(cls, namespace)
        if not any(getattr(namespace, name, None) for name in ("model", "model_args", "config")):
            instance.model = _Unnamed(instance.model)
        return instance

    @functools.wraps(process_tasks)
    def process_tasks_here(self: Any, metadata: dict[str, Any] | None = None) -> Any:
        """lm_eval's, with broken task files named first."""
        given = [self.tasks] if isinstance(self.tasks, str) else self.tasks or []
        asked = [name for task in given for name in (task.split(",") if isinstance(task, str) else [task])]
        for name in asked:
            if isinstance(name, str) and name.endswith((".yaml", ".yml")):
                check_task_files(Path(name))
        with _setting(ASKED, tuple(asked)):
            manager = process_tasks(self, metadata)
        ours = [task for task in self.tasks if _is_ours(task, manager)]
        if ours:
            credentials.refuse(self.metadata or {})  # which has the model's arguments too
        if len(ours) == len(self.tasks) and isinstance(self.model, _Unnamed):
            self.model, self.model_args = DEFAULT_MODEL[0], {**DEFAULT_MODEL[1], **(self.model_args or {})}
            log.warning(
                "No model was named: running the embedded %s (--model, --model_args name another)", self.model_args["pretrained"]
            )
        for task in ours:
            for loaded in manager.load([task])["tasks"].values():  # each checks its fields, its haystack and what --metadata says
                if str(self.model).startswith(("hf", "vllm-", "sglang-")) and not self.apply_chat_template:
                    loaded.check({**(self.model_args or {}), **(self.metadata or {})})
        return manager

    config.from_cli, config.process_tasks = from_cli_here, process_tasks_here


def quiet_errors(_: ModuleType) -> None:
    """Makes a user's mistake print in one line, without a traceback, on lm_eval's command line."""
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, HarnessExtError):
            print(f"{kind.__name__}: {error}", file=sys.stderr)
        else:
            shown(kind, error, trace)

    sys.excepthook = show


def check_task_files(path: Path) -> None:
    """Raises TaskFileError for a task file of ours under `path` that lm_eval would drop without a word."""
    for file in sorted(path.rglob("*.yaml")) if path.is_dir() else [path]:
        if text := _read_ours(file):
            _check_task_file(file, text)


def _read_ours(file: Path | str) -> str:
    """The text of a task file of ours; empty for everything else."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, TypeError):  # a task may be a dictionary
        return ""
    return text if OURS.search(text) else ""


def _check_task_file(file: Path, text: str) -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    try:
        config = yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise TaskFileError(
            f"{file}: line {line} is not YAML: {error.problem}; quote a text that holds a colon or a brace"
        ) from None
    except yaml.YAMLError as error:
        raise TaskFileError(f"{file} is not YAML: {error}") from None
    if not isinstance(config, dict):
        raise TaskFileError(f"{file}: found {type(config).__name__}; expected fields, each `name: value`")
    if not isinstance(config.get("task"), str):
        raise TaskFileError(f"{file}: field 'task': found {config.get('task')!r}; expected the task's name")
    if "include" in config:
        return  # the rest of its fields stand elsewhere; it is checked when it is loaded
    if config.get("class") not in CLASSES:
        raise TaskFileError(f"{file}: field 'class': found {config.get('class')!r}; expected !function {' or '.join(CLASSES)}")
    from harness_ext.sweep import spec

    getattr(spec, CLASSES[config["class"]])(config, file=str(file), overrides={})


def _is_ours(task: Any, manager: Any, above: frozenset[str] = frozenset()) -> bool:
    """Whether a selected task, group or tag is made of our tasks alone. `above`: the names that it stands under."""
    config = task
    if isinstance(task, str):
        entry = manager.task_index.get(task)
        if entry is None or task in above:
            return False
        above |= {task}
        config = entry.cfg or {"task": sorted(entry.tags)}  # a tag has no file
    if "class" in config:
        kind = config["class"]
        return getattr(kind, "__module__", "").startswith("harness_ext.") or str(kind).endswith(tuple(CLASSES))
    members = config.get("task")
    if isinstance(members, str):  # a task's own name, or that of a group's member with fields of its own
        members = [members] if above else []
    return bool(members) and all(_is_ours(member, manager, above) for member in members)


def _leaves(tasks: Any) -> Iterator[Any]:
    """Our tasks in what `evaluate` is given: flat, or nested in groups."""
    ours = sys.modules.get("harness_ext.sweep.host")
    if isinstance(tasks, dict):
        for task in tasks.values():
            yield from _leaves(task)
    elif ours is not None and isinstance(tasks, ours.SweepTask):
        yield tasks
