"""Published runs with planted curves, for the page and the report: no model is run."""

from __future__ import annotations

import functools
import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from harness_ext.cells import Outcome
from harness_ext.results.records import (
    SCHEMA_VERSION,
    Cell,
    ConfidenceInterval,
    ControlPoint,
    Curve,
    Derived,
    EffectiveLength,
    EvalLibrary,
    Hardware,
    ModelInfo,
    Override,
    Point,
    Prompt,
    PublishedRun,
    Run,
    ScoreDetails,
    SourceMetadata,
    Task,
    TrainedLengthRecord,
    Uncertainty,
)
from harness_ext.results.statistics import wilson

PASSKEY, NIAH, LOSS = "passkey_extrapolate", "niah_single_extrapolate", "loss_extrapolate"
DEPTHS = tuple(step / 10 for step in range(11))
RULES = {"ruler_llama2_chat": 0.856, "ruler_llama2_base": 0.794, "nolima": 0.85, "k_max": 0.2, "yarn": 0.8}
wilson = functools.cache(wilson)


def fingerprint(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def score_of(successes: float, n: int) -> ScoreDetails:
    low, high = wilson(round(successes), n)
    interval = ConfidenceInterval(lower=low, upper=high, method="wilson")
    return ScoreDetails(score=successes / n, uncertainty=Uncertainty(confidence_interval=interval, num_samples=n))


def loss_of(value: float, n: int) -> ScoreDetails:
    interval = ConfidenceInterval(lower=value - 0.05, upper=value + 0.05, method="t")
    return ScoreDetails(score=value, uncertainty=Uncertainty(confidence_interval=interval, num_samples=n))


def make_run(
    model: str = "lab/model",
    method: str = "none",
    *,
    scheme: str = "rope",
    trained: int | None = 256,
    stated: bool = False,
    reach: float = 1.5,
    tasks: Sequence[str] = (PASSKEY,),
    multiples: Sequence[float] = (0.5, 1, 2, 4, 8),
    depths: Sequence[float] = DEPTHS,
    unmeasured: dict[float, Outcome] | None = None,
    n: int = 10,
    parameters: int | None = 135_000_000,
    timestamp: str = "2026-11-20T10:00:00Z",
    controls: bool = False,
    seed: int = 0,
    **changed: Any,
) -> PublishedRun:
    """A run whose score falls off around `reach` × the trained length; `changed` are fields of the run."""
    identity = fingerprint(model, method, trained, tasks, multiples, seed)
    cells: list[Cell] = []
    made: list[Task] = []
    for name in tasks:
        of_task = list(_cells(identity, name, trained, reach, multiples, depths, unmeasured or {}, n, seed))
        cells += of_task
        curve = _curve(of_task, trained, controls) if name != LOSS else _loss_curve(of_task)
        made.append(
            Task(
                evaluation_name=name,
                version="2",
                metric="loss" if name == LOSS else "exact",
                output_type="loglikelihood",
                seed=seed,
                samples=n,
                prompts_fingerprint=fingerprint(name, multiples, n),
                settings={"depths": len(depths)},
                curve=curve,
            )
        )
    factor = float(max(multiples)) if method != "none" else None
    run = Run(
        schema_version=SCHEMA_VERSION,
        evaluation_id=identity,
        evaluation_timestamp=timestamp,
        source_metadata=SourceMetadata(source_organization_name="a lab", evaluator_relationship="third_party"),
        eval_library=EvalLibrary(name="lm_eval", version="0.4.13"),
        packages={"harness_ext": "0.1.0", "transformers": "5.23.0", "torch": "2.13.0"},
        model_info=ModelInfo(
            id=model,
            name=model,
            developer=model.partition("/")[0],
            revision="0" * 40,
            weights_fingerprint=fingerprint(model, "weights"),
            dtype="float32",
            num_parameters=parameters,
            model_type="llama",
            position_scheme=scheme,
            hard_limit=None,
            inference_platform="hf-extrapolate",
            model_args={"pretrained": model},
        ),
        trained_length=None
        if trained is None
        else TrainedLengthRecord(
            tokens=trained,
            source="user" if stated else "config.max_position_embeddings",
            config_tokens=2 * trained if stated else trained,
            evidence="arXiv 0000.00000, section 3" if stated else "",
        ),
        override=Override(method=method, factor=factor, fingerprint=fingerprint(method, factor)),
        hardware=Hardware(device="cpu", name="a processor", count=1, memory_bytes=None, platform="Linux-x86_64"),
        wall_seconds=60.0,
        compute_seconds=40.0,
        tokens_asked=100_000,
        tokens_computed=50_000,
        command=f"lm_eval --model hf-extrapolate --model_args pretrained={model},method={method} --tasks {','.join(tasks)}",
        tasks=made,
    )
    for field, value in changed.items():
        run = run.__class__(**{**{name: getattr(run, name) for name in run.__struct_fields__}, field: value})
    return PublishedRun(run=run, cells=tuple(cells))


def _cells(
    identity: str,
    task: str,
    trained: int | None,
    reach: float,
    multiples: Sequence[float],
    depths: Sequence[float],
    unmeasured: dict[float, Outcome],
    n: int,
    seed: int,
) -> Iterator[Cell]:
    draw = random.Random(f"{identity} {task} {seed}")
    for multiple in multiples:
        length = round(multiple * (trained or 256))
        for depth in depths if task != LOSS else (None,):
            outcome = unmeasured.get(multiple, "measured")
            measured = outcome == "measured"
            common = {
                "evaluation_result_id": fingerprint(identity, task, length, depth),
                "evaluation_id": identity,
                "evaluation_name": task,
                "length": length,
                "multiple": multiple if trained else None,
                "depth": depth,
                "outcome": outcome,
                "reason": "" if measured else f"planted: {outcome}",
            }
            if not measured:
                yield Cell(**common, n=0, successes=None, mean_log_likelihood=None, score_details=None, prompts=[])
            elif task == LOSS:
                loss = 3.2 - 0.2 * math.log2(multiple * 4) + max(0, math.log2(multiple / reach)) * 1.5
                yield Cell(**common, n=n, successes=None, mean_log_likelihood=-loss, score_details=loss_of(loss, n), prompts=[])
            else:
                p = 0.99 / (1 + (multiple / reach / (1 + (depth or 0) / 4)) ** 4)
                answers = [draw.random() < p for _ in range(n)]
                prompts = [
                    Prompt(
                        sample=index,
                        verdict="exact" if right else "wrong_value",
                        log_likelihood=-0.5 if right else -9.5,
                        tokens=5,
                        prompt_tokens=length,
                        fingerprint=f"{seed:08x}{index:08x}",
                    )
                    for index, right in enumerate(answers)
                ]
                right = sum(answers)
                misses = {"wrong_value": n - right} if right < n else {}
                details = score_of(right, n)
                yield Cell(
                    **common, n=n, successes=right, misses=misses, mean_log_likelihood=-3.0, score_details=details, prompts=prompts
                )


def _curve(cells: Sequence[Cell], trained: int | None, controls: bool) -> Curve:
    points: list[Point] = []
    for length in dict.fromkeys(cell.length for cell in cells):
        group = [cell for cell in cells if cell.length == length]
        first, n = group[0], sum(cell.n for cell in group)
        details = score_of(sum(cell.successes or 0 for cell in group), n) if n else None
        points.append(
            Point(length=length, multiple=first.multiple, outcome=first.outcome, reason=first.reason, score_details=details)
        )
    measured = [point for point in points if point.score_details]
    base = measured[0].score_details.score if measured else 0.0
    passing = [point.length for point in measured if point.score_details.score >= 0.85 * base]
    lengths = [point.length for point in measured]
    effective = [
        EffectiveLength(
            rule=rule,
            threshold=threshold,
            outcome="not_measurable" if base < 0.5 else "at_least" if passing[-1] == lengths[-1] else "measured",
            reason="fails inside its own window" if base < 0.5 else "",
            tokens=None if base < 0.5 else passing[-1],
            lower=None if base < 0.5 else max([length for length in lengths if length < passing[-1]], default=0),
            upper=None if base < 0.5 else min([length for length in lengths if length > passing[-1]], default=passing[-1]),
        )
        for rule, threshold in RULES.items()
    ]
    beside = [
        ControlPoint(control=name, length=length, score_details=score_of(share * 50, 50))
        for name, share in (("no_haystack", 1.0), ("needle_absent", 0.0), ("cropped", 0.5), ("short", 0.96))
        for length in ([None] if name == "no_haystack" else lengths)
        if controls and (name != "cropped" or (trained and length > trained))
    ]
    derived = Derived(value=1.7, lower=1.4, upper=2.1)
    return Curve(points=points, controls=beside, effective_lengths=effective, half_length=derived, area_past=derived)


def _loss_curve(cells: Sequence[Cell]) -> Curve:
    none = Derived(value=None, lower=None, upper=None, reason="a loss has none")
    points = [
        Point(
            length=cell.length, multiple=cell.multiple, outcome=cell.outcome, reason=cell.reason, score_details=cell.score_details
        )
        for cell in cells
    ]
    return Curve(points=points, effective_lengths=[], half_length=none, area_past=none)


SCHEMES = ("rope", "alibi", "learned", "nope", "sinusoidal", "t5_bias")
METHODS = ("none", "linear", "ntk", "yarn")


def make_many(count: int, cells: int = 100, n: int = 10) -> Iterator[PublishedRun]:
    """`count` models of `cells` cells each, all schemes, methods and sizes among them; some could not run far, some fail at once."""
    lengths = max(1, cells // 10)
    multiples = [2.0 ** (step - 2) for step in range(lengths)] if lengths <= 12 else [(step + 1) / 2 for step in range(lengths)]
    for index in range(count):
        draw = random.Random(index)
        scheme = SCHEMES[index % len(SCHEMES)]
        ended = {m: "hard_limit" for m in multiples if m > 1} if scheme == "learned" else {}
        if index % 17 == 0:
            ended = {multiples[-1]: "out_of_memory"}
        yield make_run(
            f"lab-{index % 97}/model-{index:05d}-{draw.choice(['base', 'chat', 'instruct'])}",
            METHODS[index // len(SCHEMES) % len(METHODS)] if scheme == "rope" else "none",
            scheme=scheme,
            trained=2 ** draw.randrange(8, 14),
            stated=index % 13 == 0,
            reach=0.1 if index % 29 == 0 else 2 ** draw.uniform(0, 3.5),
            multiples=multiples,
            depths=DEPTHS[:10],
            unmeasured=ended,
            n=n,
            parameters=draw.choice([None, 135_000_000, 360_000_000, 1_700_000_000, 7_000_000_000, 70_000_000_000]),
            timestamp=f"2026-11-{draw.randrange(1, 22):02d}T10:00:00Z",
            seed=index,
        )
