"""Shared: no hub, few threads, and the tasks as lm_eval loads them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def load() -> Callable[..., Any]:
    """(name, **metadata) → the task, as lm_eval loads it by name."""

    def load_task(name: str, include_path: Path | None = None, **metadata: Any) -> Any:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=False, include_path=include_path, metadata=metadata)
        return manager.load([name])["tasks"][name]

    return load_task


@pytest.fixture
def evaluate() -> Callable[..., Any]:
    """(model, tasks, **metadata) → lm_eval's results, with the samples."""

    def run(
        model: Any, tasks: list[str], *, limit: int | None = None, options: dict[str, Any] | None = None, **metadata: Any
    ) -> Any:
        import lm_eval
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=False, metadata=metadata)
        return lm_eval.simple_evaluate(
            model=model, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=100, **(options or {})
        )

    return run
