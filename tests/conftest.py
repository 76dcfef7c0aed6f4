"""Shared: no hub, few threads, and the tasks as lm_eval loads them."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import settings

settings.register_profile("unhurried", deadline=None)  # a slow moment of a machine is no failure
settings.load_profile("unhurried")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # each of several test processes has a core
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HARNESS_EXT_CACHE"] = tempfile.mkdtemp(prefix="harness_ext-")
sys.path.insert(0, str(Path(__file__).parent))

MEMORY = 4 * 2**30
"""Bytes that a test process takes at most, with the runs it starts."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `pytest -n auto`: a process for each core that there is memory for."""
    return max(1, min(os.cpu_count() or 1, psutil.virtual_memory().available // MEMORY))


def pytest_configure(config: pytest.Config) -> None:
    """With `-n`, a file's tests run in one process, since they share what was made for them; in the order of the files, so that the longest is not the last."""
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist, config.option.loadscopereorder = "loadfile", False


REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family of `families.FAMILIES`, **changes of its config) → a folder with a random model of it and the BPE tokenizer."""
    root = tmp_path_factory.mktemp("models")

    def save(family: str, **changes: Any) -> Path:
        folder = root / "-".join([family, *(f"{name}={str(value)[:20]}" for name, value in changes.items())]).replace("/", "_")
        if not folder.exists():
            build(family, **changes).save_pretrained(folder)
            from tokenizers_here import make_tokenizer

            make_tokenizer("bpe").save_pretrained(folder)
        return folder

    return save


def build(family: str, **changes: Any) -> Any:
    """A random model of a family, its weights wide enough that no two tokens are near-ties."""
    import torch
    from families import FAMILIES
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    known = FAMILIES[family]
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if known.seq2seq else AutoModelForCausalLM
    model = kind.from_config(AutoConfig.for_model(known.model_type, **{**copy.deepcopy(known.config), **changes})).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def load() -> Callable[..., Any]:
    """(name, **metadata) → the task, as lm_eval loads it by name."""

    def load_task(name: str, include_path: Path | None = None, **metadata: Any) -> Any:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=False, include_path=include_path, metadata=metadata)
        return manager.load([name])["tasks"][name]

    return load_task


def build_long(family: str) -> Any:
    """`build`'s, which reads 400 tokens where its table would end at `families.LENGTH`."""
    from families import FAMILIES

    known = FAMILIES[family]
    return build(family, **({known.length_field: 400} if known.hard and known.length_field else {}))


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
