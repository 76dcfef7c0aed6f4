"""How lm_eval finds us: an import hook that waits for a few of lm_eval's modules and completes them as they are imported.

`harness_ext.pth` calls `install` at Python's start, so this module imports only `sys` and `os` and does next to nothing: it
puts one finder on `sys.meta_path`. Nothing else happens until somebody imports lm_eval, and then `_bridge` does it.
HARNESS_EXT_DISABLE=1 switches it off. Why this way, and what was tried: docs/decisions.md.
"""

import os
import sys

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

    def __init__(self, loader, function):  # type: ignore[no-untyped-def]
        self._loader, self._function = loader, function

    def __getattr__(self, name):  # type: ignore[no-untyped-def]
        return getattr(self._loader, name)

    def create_module(self, spec):  # type: ignore[no-untyped-def]
        return self._loader.create_module(spec)

    def exec_module(self, module):  # type: ignore[no-untyped-def]
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _complete(module, self._function)


class _Finder:
    """Finds nothing itself: asks the other finders, and wraps the loader of a module that is waited for."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        function = HOOKS.get(name)
        if function is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, function)
                return spec
        return None


def install():  # type: ignore[no-untyped-def]
    """Puts the hook in place, once; completes what is imported already. HARNESS_EXT_DISABLE=1 makes it do nothing."""
    if os.environ.get("HARNESS_EXT_DISABLE") or installed():
        return
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
    for name, function in HOOKS.items():
        if name in sys.modules:
            _complete(sys.modules[name], function)


def installed():  # type: ignore[no-untyped-def]
    """Whether the hook is in place in this process."""
    return any(type(finder).__name__ == "_Finder" and type(finder).__module__ == __name__ for finder in sys.meta_path)


def _complete(module, function):  # type: ignore[no-untyped-def]
    try:
        from harness_ext import _bridge

        getattr(_bridge, function)(module)
    except Exception as error:  # whatever it is, lm_eval's own runs must go on
        print(f"harness_ext: this lm_eval cannot be extended ({module.__name__}: {error!r})", file=sys.stderr)
