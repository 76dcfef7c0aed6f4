"""Scripted models with a planted cause, run as any model is: the cause is found, its share inside the interval."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.loggers import EvaluationTracker
from test_arms import Placed
from tokenizers_here import make_tokenizer

from harness_ext.placement import list_positions
from harness_ext.results.outputs import find_outputs, read_output
from harness_ext.results.publish import Submission, make_records
from harness_ext.results.records import Cause

TRAINED = 400
NEEDLE = re.compile(r"One of the special magic numbers for [a-z-]+ is: \d+\.")
TOLD_APART = ["long", "stretched", "packed", "emptied", "packed_emptied"]
Sees = Callable[[str, int, int, int], bool]
"""(prompt, tokens, largest position + 1, positions between needle and question) → whether the answer is known."""


def chance(prompt: str, purpose: str) -> float:
    """From 0 to 1, by nothing but the prompt."""
    return int.from_bytes(hashlib.sha256((purpose + prompt).encode()).digest()[:4], "big") / 2**32


def script(sees: Sees) -> Placed:
    tokenizer = make_tokenizer("bpe")

    def knows(prompt: str, answer: str, runs: Any) -> bool:
        ids = tokenizer.encode(prompt + answer)
        positions = list_positions(runs or [(0, 0, 0, 1, 1)], len(ids))
        needle = len(tokenizer.encode(prompt[: prompt.index(f"is: {answer.strip()}.")]))
        return sees(f"{prompt}{runs}", len(ids), int(positions[-1]) + 1, int(positions[-1] - positions[needle]))

    return Placed(knows)


def explain(evaluate: Any, folder: Path, sees: Sees, **changes: Any) -> dict[float, Cause]:
    """Multiple → what was found, by the way from lm_eval's files to a record."""
    settings = {
        "trained_length": TRAINED,
        "multiples": [1, 3],
        "depths": 5,
        "samples": 12,
        "arms": TOLD_APART,
        "tokenizer": make_tokenizer("bpe"),
    }
    results = evaluate(script(sees), ["extrapolate_why"], **settings | changes)
    samples = results.pop("samples")
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.model_name = "planted"
    results["config"] |= {"model_name": "planted"}
    tracker.save_results_aggregated(results, samples)
    for name, rows in samples.items():
        tracker.save_results_samples(name, rows)
    (found,) = find_outputs([folder])
    (task,) = make_records(read_output(found), Submission(model_id="tests/planted")).run.tasks
    return {cause.multiple: cause for cause in task.curve.causes}


def check(cause: Cause, planted: dict[str, float]) -> None:
    """Each planted share lies in its interval, and the shares sum to what is lost."""
    found = {effect.cause: effect for effect in cause.effects}
    assert found.keys() == planted.keys(), cause.reason
    for name, share in planted.items():
        effect = found[name]  # type: ignore[index]
        assert effect.lower is not None
        assert effect.upper is not None
        assert effect.lower - 1e-9 <= share <= effect.upper + 1e-9, (name, share, effect)
    lost = next(loss for loss in cause.losses if loss.arm == "long")
    assert sum(effect.value for effect in cause.effects) == pytest.approx(lost.value)


def test_a_model_that_is_blind_past_a_distance_loses_by_positions_alone(evaluate: Any, tmp_path: Path) -> None:
    causes = explain(evaluate, tmp_path, lambda prompt, tokens, span, distance: distance < TRAINED)
    for cause in causes.values():
        lost = next(loss.value for loss in cause.losses if loss.arm == "long")
        assert lost > 0.3
        check(cause, {"positions": lost, "number": 0.0, "content": 0.0})


def test_a_model_that_fails_as_tokens_grow_more_loses_by_their_number_alone(evaluate: Any, tmp_path: Path) -> None:
    causes = explain(
        evaluate, tmp_path, lambda prompt, tokens, span, distance: chance(prompt, "number") < (TRAINED / tokens) ** 0.5
    )
    for multiple, cause in causes.items():
        check(cause, {"positions": 0.0, "number": 1 - multiple**-0.5, "content": 0.0})


def test_a_model_that_distractors_confuse_loses_by_what_the_filler_says_alone(evaluate: Any, tmp_path: Path) -> None:
    most = 15

    def sees(prompt: str, tokens: int, span: int, distance: int) -> bool:
        return len(NEEDLE.findall(prompt)) < most or chance(prompt, "content") < 0.4

    causes = explain(evaluate, tmp_path, sees, haystack="needles")
    assert set(causes) == {3}
    for cause in causes.values():
        check(cause, {"positions": 0.0, "number": 0.0, "content": 0.6})


def test_two_planted_causes_share_what_is_lost_as_the_definition_says(evaluate: Any, tmp_path: Path) -> None:
    new, many = 0.5, 0.3

    def sees(prompt: str, tokens: int, span: int, distance: int) -> bool:
        by_position = span <= TRAINED or chance(prompt, "new") >= new
        return by_position and (tokens <= TRAINED or chance(prompt, "many") >= many)

    for cause in explain(evaluate, tmp_path, sees).values():
        both = new * many  # of which positions come first in one order of three, and number in two
        check(cause, {"positions": new - 2 / 3 * both, "number": many - 1 / 3 * both, "content": 0.0})


def test_a_word_over_and_over_that_does_harm_of_its_own_is_no_empty_filler(evaluate: Any, tmp_path: Path) -> None:
    def sees(prompt: str, tokens: int, span: int, distance: int) -> bool:
        lost = 0.2 if tokens > TRAINED else 0.0
        return chance(prompt, "number") >= (0.8 if "and and and" in prompt and tokens > TRAINED else lost)

    for cause in explain(evaluate, tmp_path, sees).values():
        check(cause, {"positions": 0.0, "number_and_content": 0.2})
        assert "no empty filler" in cause.reason
