"""The commands that run one part of an evaluation, and join the parts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness_ext.errors import ShardError
from harness_ext.shards import Shard, Unit, deal, list_units, parse_shard


def run_arguments(command: argparse.ArgumentParser) -> None:
    """What `run` takes beside lm_eval's own arguments, which are passed on."""
    command.add_argument("--shard", metavar="I/N", help="run part I of N; the other arguments are lm_eval's")
    command.usage = "harness-ext run [--shard I/N] <arguments of lm_eval run>"


def run(options: argparse.Namespace) -> int:
    """Run lm_eval with this package's tasks and models, or exactly one part of that: the parts, merged, are the whole."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from harness_ext import install

    install()
    shard = parse_shard(options.shard) if options.shard else None
    given, sys.argv = sys.argv, ["lm-eval", "run", *options.rest]
    try:
        setup_logging()
        command = HarnessCLI()
        asked = command.parse_args()
        if shard:
            check_arguments(shard, asked)
        with taking_part(shard) if shard else contextlib.nullcontext():
            command.execute(asked)
    finally:
        sys.argv = given
    return 0


def check_arguments(shard: Shard, asked: argparse.Namespace) -> None:
    """Raises ShardError for what a part cannot be run without, or with, before any model loads."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    config = EvaluatorConfig.from_cli(asked)
    if not (config.output_path and config.log_samples):
        lacking = " and ".join(
            name for name, value in (("--output_path", config.output_path), ("--log_samples", config.log_samples)) if not value
        )
        raise ShardError(
            f"--shard {shard}: found no {lacking}; parts are joined from the samples they write: add --output_path FOLDER --log_samples"
        )
    for name in ("samples", "predict_only"):
        if getattr(config, name):
            raise ShardError(f"--shard {shard}: found --{name}, which a part cannot have; leave it out")


@contextlib.contextmanager
def taking_part(shard: Shard) -> Iterator[None]:
    """Within it, lm_eval evaluates this part alone of whatever it is asked to, and says in its results which."""
    from lm_eval import evaluator

    whole = evaluator.evaluate

    @functools.wraps(whole)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(whole).bind(*args, **kwargs)
        said = take_part(shard, bound.arguments)
        results = whole(*bound.args, **bound.kwargs)
        return results and {**results, "shard": said}

    evaluator.evaluate = evaluate
    try:
        yield
    finally:
        evaluator.evaluate = whole


def take_part(shard: Shard, arguments: dict[str, Any]) -> dict[str, Any]:
    """Puts this part's samples in the place of all in the arguments of lm_eval's `evaluate`; what the results file is to say of it."""
    tasks = arguments["task_dict"].get("tasks", {})
    check_tasks(shard, arguments["lm"], tasks, arguments["task_dict"].get("groups", {}))
    asked = {name: plan(task, arguments) for name, task in sorted(tasks.items())}
    units = [
        unit
        for name, docs in asked.items()
        for unit in list_units(name, docs, one_context=getattr(tasks[name].spec, "every_depth", False))
    ]
    dealt = deal(units, shard.of)
    mine = dealt[shard.index - 1]
    chosen = {name: sorted(number for unit in mine if unit.task == name for number in unit.docs) for name in tasks}
    said = describe(shard, mine, asked, tasks)
    arguments["samples"], arguments["limit"] = {name: numbers for name, numbers in chosen.items() if numbers}, None
    arguments["task_dict"] = {**arguments["task_dict"], "tasks": {name: task for name, task in tasks.items() if chosen[name]}}
    loads = [sum(unit.cost for unit in part) for part in dealt]
    counts = [sum(map(len, docs.values())) for docs in (chosen, asked)]
    share, least, most = (f"{load / sum(loads):.1%}" for load in (loads[shard.index - 1], min(loads), max(loads)))
    print(
        f"part {shard}: {counts[0]} of {counts[1]} prompts, {share} of the work (the parts have {least} to {most})", file=sys.stderr
    )
    return said


def check_tasks(shard: Shard, lm: Any, tasks: Mapping[str, Any], groups: Mapping[str, Any]) -> None:
    """Raises ShardError for what cannot be split."""
    from harness_ext.sweep.host import SweepTask

    foreign = [name for name, task in tasks.items() if not isinstance(task, SweepTask)]
    if foreign or not tasks:
        raise ShardError(
            f"--shard {shard}: {', '.join(foreign) or 'what was asked for'} cannot be split, only tasks of this package; run it without --shard"
        )
    pooled = [name for name, group in groups.items() if group.has_aggregation]
    if pooled:
        raise ShardError(
            f"--shard {shard}: the group {pooled[0]} has scores of its own, which parts have not; name its tasks instead"
        )
    if lm.world_size > 1:
        raise ShardError(
            f"--shard {shard}: found {lm.world_size} processes; a part is run by one: ask for {lm.world_size} times as many parts instead"
        )


def plan(task: Any, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of all prompts that the whole run has of a task, the first of them built; the model is told how far they go.

    A task knows its lengths once it has built a prompt, and a model answers by the longest of them even where that is in another part.
    """
    from lm_eval.evaluator_utils import get_sample_size

    lm, template = arguments["lm"], bool(arguments.get("apply_chat_template"))
    task.bind(lm)
    limit = get_sample_size(task, arguments.get("limit"))
    task.build_all_requests(
        limit=1,
        rank=0,
        world_size=1,
        system_instruction=arguments.get("system_instruction"),
        apply_chat_template=template,
        chat_template=lm.apply_chat_template if template else None,
    )
    docs: list[dict[str, Any]] = task.eval_docs[:limit]
    task.lift(max(doc.get("length") or doc["edge"] for doc in docs))
    return docs


def describe(
    shard: Shard, units: Sequence[Unit], asked: Mapping[str, list[dict[str, Any]]], tasks: Mapping[str, Any]
) -> dict[str, Any]:
    """What the results file of a part says of it: which part, what all parts were planned from, and the samples that are here.

    A task that is in other parts alone is described too, so that parts of two runs are told apart by any of their tasks.
    """
    from harness_ext.results.identity import hash_json

    described = {}
    for name, docs in asked.items():
        config = tasks[name].dump_config()
        described[name] = {
            "version": tasks[name].VERSION,
            **{field: value for field, value in dataclasses.asdict(tasks[name].spec).items() if field != "haystack"},
            "haystack": config["haystack_sha256"] or config["haystack"],  # a file's text, wherever the file lies
            "generation_kwargs": config.get("generation_kwargs"),
            "trained_length": config["trained_length"],
            "prompts": len(docs),
            "records": hash_json(docs),  # the first of them with the fingerprint of its prompt
            "here": sorted(unit.sample for unit in units if unit.task == name),
        }
    return {"index": shard.index, "of": shard.of, "tasks": {name: described[name] for name in tasks}}


def merge_arguments(command: argparse.ArgumentParser) -> None:
    """What `merge` takes."""
    command.add_argument("parts", nargs="+", type=Path, metavar="OUT", help="folders that the --output_path of `run --shard` named")
    command.add_argument(
        "--output_path", required=True, type=Path, metavar="FOLDER", help="write the whole run there, as lm_eval would have"
    )


def merge(options: argparse.Namespace) -> int:
    """Join the parts of an evaluation into the files that it would have written in one piece."""
    from harness_ext.merging import join

    joined = join(options.parts, options.output_path)
    for note in joined.notes:
        print(note, file=sys.stderr)
    print(f"{joined.file}: {joined.parts} parts, {joined.prompts} prompts of {joined.tasks} tasks")
    return 0
