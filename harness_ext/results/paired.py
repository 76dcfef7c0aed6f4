"""Runs on the same prompts → a comparison: check that they are the same, score, test in pairs, correct.

McNemar's test takes prompts as independent. Prompts of one sample share their haystack, keys and values, across depths and
lengths, so its p-values, and those of pooled lengths most, are smaller than they should be by what such prompts have in common.
Beside them stand those of a test that takes haystacks as independent, and nothing else (`statistics.flip_signs`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from harness_ext.cells import Length, TrainedLength
from harness_ext.errors import ComparisonError, PairingError
from harness_ext.results.records import PublishedRun
from harness_ext.results.runs import Answer, Run
from harness_ext.results.statistics import flip_signs, holm, mcnemar

Key = tuple[str, int, float, int]
"""(task, tokens, depth, sample): one prompt. Not lm_eval's `doc_id`, which shifts where a method leaves a length out."""
Keyed = dict[str, dict[Key, Answer]]
"""Method → prompt → its answer."""
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One method on the prompts of one task and length."""

    task: str
    """lm_eval's name of it."""
    length: Length
    """With what became of it under this method."""
    method: str
    """The run's."""
    n: int
    """Prompts; 0 where the length was not measured, and where `--limit` left none."""
    exact: int
    """Of them, those answered exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """Two methods on the prompts that both were given."""

    task: str
    """lm_eval's name of it."""
    lengths: tuple[Length, ...]
    """One; or those that were pooled."""
    first: str
    """A method."""
    second: str
    """Another."""
    n: int
    """Prompts that both were given."""
    only_first: int
    """Of them, those that only the first answered exactly."""
    only_second: int
    """Of them, those that only the second answered exactly."""
    p: float | None
    """McNemar's, exact and two-sided; None where there is no prompt in common."""
    p_haystacks: float | None = None
    """By the exact test of haystacks instead of prompts (`statistics.flip_signs`); None likewise."""
    p_holm: float | None = None
    """`p` after Holm's correction over all tests of one table."""
    p_haystacks_holm: float | None = None
    """`p_haystacks` likewise."""
    reason: str = ""
    """Why there is no prompt in common."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came out. Without `by_length` and `pooled` it is still a table of scores."""

    model: str
    """As it was named."""
    trained_length: TrainedLength | None
    """None where it is unknown; then nothing is pooled."""
    runs: tuple[Run, ...]
    """Those that ran, in the order asked for."""
    refused: tuple[Run, ...]
    """Those that did not."""
    cells: tuple[Cell, ...]
    """By task, length, method."""
    by_length: tuple[PairedTest, ...]
    """By task, length, pair of methods; a table of its own for Holm's correction."""
    pooled: tuple[PairedTest, ...]
    """By task, pair of methods, over the lengths past the trained length; likewise."""


def compare(runs: Sequence[Run]) -> Comparison:
    """The comparison of two runs or more.

    Raises ComparisonError where fewer are left without the refused ones, or where they differ in more than the method, and
    PairingError where they were given different prompts.
    """
    finished = [run for run in runs if not run.refused]
    refused = [run for run in runs if run.refused]
    _check_number(finished, refused)
    _check_alike(finished)
    keyed = {run.method: _key(run) for run in finished}
    _check_prompts(finished, keyed)
    first = finished[0]
    by_task = [(task, [Length(tokens=one.tokens, multiple=one.multiple) for one in plan]) for task, plan in first.plan.items()]
    past = [(task, tuple(one for one in lengths if (one.multiple or 0) > 1)) for task, lengths in by_task]
    return Comparison(
        model=first.model,
        trained_length=first.trained_length,
        runs=tuple(finished),
        refused=tuple(refused),
        cells=tuple(_count(finished, keyed)),
        by_length=correct(_test(finished, keyed, ((task, (one,)) for task, lengths in by_task for one in lengths))),
        pooled=correct(_test(finished, keyed, ((task, lengths) for task, lengths in past if lengths))),
    )


def compare_runs(first: PublishedRun, second: PublishedRun) -> tuple[PairedTest, ...]:
    """Paired tests of two published runs: by task and length, then by task over the lengths past both trained lengths.

    Tasks and lengths that both have; a loss has no right answers to pair. Holm's correction is over all of them. They may be runs
    of two models. Raises PairingError where they were given different prompts (by the fingerprints of the tokens), or have none
    in common.
    """
    names = [f"{one.run.model_info.id} {one.run.override.method}" for one in (first, second)]
    if names[0] == names[1]:
        names = [f"{name} ({one.run.evaluation_id[:8]})" for name, one in zip(names, (first, second), strict=True)]
    if names[0] == names[1]:
        raise PairingError(f"{names[0]} is one run; name two")
    ours, theirs = (_open(one, name) for one, name in zip((first, second), names, strict=True))
    runs = (_keep_shared(ours, theirs), _keep_shared(theirs, ours))
    keyed = {run.method: _key(run) for run in runs}
    _check_prompts(runs, keyed)
    if not keyed[names[0]].keys() & keyed[names[1]].keys():
        raise PairingError(f"{names[0]} and {names[1]} have no prompt in common; compare runs of the same tasks and lengths")
    by_length = [(task, (one,)) for task, lengths in runs[0].plan.items() for one in lengths]
    past = {
        run.method: {(task, one.tokens) for task, plan in run.plan.items() for one in plan if (one.multiple or 0) > 1}
        for run in runs
    }
    pooled = [
        (task, tuple(one for one in lengths if all((task, one.tokens) in found for found in past.values())))
        for task, lengths in runs[0].plan.items()
    ]
    return correct(_test(runs, keyed, [*by_length, *((task, lengths) for task, lengths in pooled if lengths)]))


def _open(published: PublishedRun, name: str) -> Run:
    """A published run as one of a comparison: its tasks that have right answers, without controls."""
    run = published.run
    plan = {
        task.evaluation_name: tuple(
            Length(tokens=point.length, multiple=point.multiple, outcome=point.outcome, reason=point.reason)  # type: ignore[arg-type]  # no arm's
            for point in task.curve.points
        )
        for task in run.tasks
        if task.metric == "exact"
    }
    answers = tuple(
        Answer(
            method=name,
            task=cell.evaluation_name,
            length=cell.length,
            multiple=cell.multiple,
            depth=-1.0 if cell.depth is None else cell.depth,
            sample=prompt.sample,
            verdict=prompt.verdict,
            prompt_hash=prompt.fingerprint,
            log_likelihood=prompt.log_likelihood,
        )
        for cell in published.cells
        if cell.control is None and cell.evaluation_name in plan
        for prompt in cell.prompts
    )
    return Run(model=run.model_info.id, method=name, plan=plan, answers=answers)


def _keep_shared(run: Run, other: Run) -> Run:
    """The run's tasks and lengths that the other has too."""
    lengths = {task: {one.tokens for one in plan} for task, plan in other.plan.items()}
    plan = {task: tuple(one for one in own if one.tokens in lengths[task]) for task, own in run.plan.items() if task in lengths}
    return dataclasses.replace(run, plan=plan)


def _check_number(finished: Sequence[Run], refused: Sequence[Run]) -> None:
    if len(finished) < 2:
        why = "".join(f"; {run.method} was refused: {run.refused}" for run in refused)
        ran = f"found {len(finished)} ({finished[0].method})" if finished else "found none"
        raise ComparisonError(f"a comparison needs two methods that ran, {ran}{why}")


def _check_alike(runs: Sequence[Run]) -> None:
    """Everything but the method has to be the same."""
    aspects: dict[str, Callable[[Run], object]] = {
        "models": lambda run: run.model,
        "trained lengths": lambda run: run.trained_length and run.trained_length.tokens,
        "tasks and lengths": lambda run: {task: [length.tokens for length in plan] for task, plan in run.plan.items()},
    }
    for other, (name, read) in itertools.product(runs[1:], aspects.items()):
        if read(other) != read(runs[0]):
            raise ComparisonError(
                f"{runs[0].method} and {other.method} were run with different {name}: {read(runs[0])} and {read(other)}; "
                "compare runs that differ in the method alone"
            )
    repeated = _repeated(run.method for run in runs)
    if repeated:
        raise ComparisonError(f"method {repeated!r} was run twice; each can stand in a comparison once")


def _check_prompts(runs: Sequence[Run], keyed: Keyed) -> None:
    """Same tokens under same keys; and the same keys, where the same lengths were measured."""
    for first, second in itertools.combinations(runs, 2):
        ours, theirs = keyed[first.method], keyed[second.method]
        for key in sorted(ours.keys() & theirs.keys()):
            if ours[key].prompt_hash != theirs[key].prompt_hash:
                raise PairingError(
                    f"{first.method} and {second.method} were given different prompts ({_name(key)}), so their answers are no "
                    "pairs; run both with one tokenizer, one seed and one version of the tasks"
                )
        alone = {key for key in ours.keys() ^ theirs.keys() if _measured(first, key[0]) == _measured(second, key[0])}
        if alone:
            raise PairingError(
                f"{first.method} and {second.method} measured the same lengths, but {len(alone)} prompts were given to only one of "
                f"them (first: {_name(min(alone))}); run both with the same --limit and --metadata"
            )


def _key(run: Run) -> dict[Key, Answer]:
    """Each scored prompt's answer. Raises PairingError where two prompts have one key.

    Where memory ran out at a length, it has no score, though some prompts of it may have been answered.
    """
    answers = [answer for answer in run.answers if answer.length in _measured(run, answer.task)]
    keys = [(answer.task, answer.length, answer.depth, answer.sample) for answer in answers]
    repeated = _repeated(keys)
    if repeated:
        raise PairingError(f"{run.method} was given two prompts of one key ({_name(repeated)}), so neither has a partner")
    return dict(zip(keys, answers, strict=True))


def _count(runs: Sequence[Run], keyed: Keyed) -> Iterator[Cell]:
    counts = Counter(
        (task, tokens, run.method, _exact(answer)) for run in runs for (task, tokens, *_), answer in keyed[run.method].items()
    )
    for task, plan in runs[0].plan.items():
        for index, run in itertools.product(range(len(plan)), runs):
            length = run.plan[task][index]
            missed, exact = (counts[task, length.tokens, run.method, right] for right in (False, True))
            yield Cell(task=task, length=length, method=run.method, n=missed + exact, exact=exact)


def _test(runs: Sequence[Run], keyed: Keyed, rows: Iterable[tuple[str, tuple[Length, ...]]]) -> Iterator[PairedTest]:
    for (task, lengths), (first, second) in itertools.product(rows, itertools.combinations(runs, 2)):
        tokens = {length.tokens for length in lengths}
        ours, theirs = keyed[first.method], keyed[second.method]
        shared = [key for key in ours if key in theirs and key[0] == task and key[1] in tokens]
        verdicts = [(_exact(ours[key]), _exact(theirs[key])) for key in shared]
        only_first, only_second = verdicts.count((True, False)), verdicts.count((False, True))
        used = {key[1] for key in shared}
        by_haystack = Counter[int]()
        for (*_, sample), (our_verdict, their_verdict) in zip(shared, verdicts, strict=True):
            by_haystack[sample] += our_verdict - their_verdict
        yield PairedTest(
            task=task,
            lengths=tuple(length for length in lengths if length.tokens in used) or lengths,
            first=first.method,
            second=second.method,
            n=len(shared),
            only_first=only_first,
            only_second=only_second,
            p=mcnemar(only_first, only_second) if shared else None,
            p_haystacks=flip_signs(list(by_haystack.values())) if shared else None,
            reason="" if shared else _why_not((first, second), task, tokens),
        )


def correct(tests: Iterable[PairedTest]) -> tuple[PairedTest, ...]:
    """The tests of one table with Holm's correction; one without a p-value is no part of the family."""
    tests = list(tests)
    by_prompt = iter(holm([test.p for test in tests if test.p is not None]))
    by_haystack = iter(holm([test.p_haystacks for test in tests if test.p_haystacks is not None]))
    return tuple(
        test if test.p is None else dataclasses.replace(test, p_holm=next(by_prompt), p_haystacks_holm=next(by_haystack))
        for test in tests
    )


def _why_not(pair: Sequence[Run], task: str, tokens: set[int]) -> str:
    """Outcomes, each with the methods that it befell unless both."""
    found = [
        (run.method, one.outcome) for run in pair for one in run.plan[task] if one.tokens in tokens and one.outcome != "measured"
    ]
    said = []
    for outcome in dict.fromkeys(outcome for _, outcome in found):
        methods = [*dict.fromkeys(method for method, other in found if other == outcome)]
        said.append(outcome if len(methods) == len(pair) else f"{outcome} ({methods[0]})")
    return ", ".join(said) or "no prompt"


def _exact(answer: Answer) -> bool:
    return answer.verdict == "exact"


def _measured(run: Run, task: str) -> set[int]:
    return {length.tokens for length in run.plan.get(task, ()) if length.outcome == "measured"}


def _repeated(values: Iterable[_Value]) -> _Value | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)


def _name(key: Key) -> str:
    task, tokens, depth, sample = key
    return f"{task}, {tokens} tokens, depth {depth:.2g}, sample {sample}"
