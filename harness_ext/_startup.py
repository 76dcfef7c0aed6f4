"""How lm_eval finds us: an import hook that waits for a few of lm_eval's modules and completes them as they are imported.

`harness_ext.pth` calls `install` at Python's start, so this module imports only `sys` and `os` and does next to nothing: it
puts one finder on `sys.meta_path`. Nothing else happens until somebody imports lm_eval, and then `_bridge` does it.
HARNESS_EXT_DISABLE=1 switches it off. Why this way, and what was tried: docs/decisions.md.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

HOOKS = {
    "lm_eval.tasks.manager": "find_tasks",
    "lm_eval.models": "register_models",
    "lm_eval.evaluator": "tell_tasks_their_model",
    "lm_eval.config.evaluate_config": "prepare_command_line",
    "lm_eval._cli.harness": "quiet_errors",
}
"""Module of lm_eval → the function of `_bridge` that completes it."""


class _Loader:
    """The module's own loader, and then the bridge."""

    def __init__(self, loader: "Loader", function: str) -> None:
        self._loader, self._function = loader, function

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        return self._loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _complete(module, self._function)


class _Finder:
    """Finds nothing itself: asks the other finders, and wraps the loader of a module that is waited for."""

    def find_spec(self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None) -> "ModuleSpec | None":
        """What the other finders find of a module that is waited for; None of any other."""
        function = HOOKS.get(name)
        if function is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, function)  # type: ignore[assignment]
                return spec
        return None


def install() -> None:
    """Puts the hook in place, once; completes what is imported already. HARNESS_EXT_DISABLE=1 makes it do nothing."""
    if os.environ.get("HARNESS_EXT_DISABLE") or installed():
        return
    sys.meta_path.insert(0, _Finder())
    for name, function in HOOKS.items():
        if name in sys.modules:
            _complete(sys.modules[name], function)


def installed() -> bool:
    """Whether the hook is in place in this process."""
    return any(type(finder).__name__ == "_Finder" and type(finder).__module__ == __name__ for finder in sys.meta_path)


def _complete(module: "ModuleType", function: str) -> None:
    try:
        from harness_ext import _bridge

        getattr(_bridge, function)(module)
    except Exception as error:  # whatever it is, lm_eval's own runs must go on
        print(f"harness_ext: this lm_eval cannot be extended ({module.__name__}: {error!r})", file=sys.stderr)
