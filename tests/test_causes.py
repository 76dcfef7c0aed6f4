"""Why a score falls: planted causes are found with their shares, what cannot be told is not, and intervals hold the truth."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_outputs import write_output
from scipy.special import expit

from harness_ext.errors import PublishError
from harness_ext.publishing import prepare_run
from harness_ext.results.aggregate import make_cell, make_curve
from harness_ext.results.audit import audit_records
from harness_ext.results.causes import ARMS, BASES, choose_headline, explain, find_ends, find_losses, say_cause, share_out
from harness_ext.results.clusters import Answers, draw_scores
from harness_ext.results.export import to_every_eval_ever
from harness_ext.results.publish import Submission
from harness_ext.results.records import ArmPoint, Cause, Cell, Curve, Prompt

TRAINED = 256
DEPTHS = tuple(step / 9 for step in range(10))
losses = st.floats(-1, 1)
FIVE = ("long", "stretched", "packed", "emptied", "packed_emptied")


def answer(chance: Mapping[tuple[str, float], float], samples: int = 10, seed: int = 0, left_out: Sequence[Any] = ()) -> list[Cell]:
    """The cells of (arm, multiple) → share of right answers; `left_out`: arm, multiple, outcome."""
    draw = random.Random(seed)
    made = []
    for (arm, multiple), share in chance.items():
        for depth in DEPTHS:
            right = [draw.random() < share for _ in range(samples)]
            made.append(cell(arm, multiple, depth, right))
    made += [cell(arm, multiple, None, [], outcome) for arm, multiple, outcome in left_out]
    return made


def cell(arm: str, multiple: float, depth: float | None, right: Sequence[bool], outcome: Any = "measured") -> Cell:
    return make_cell(
        evaluation_result_id="0" * 16,
        evaluation_id="0" * 16,
        evaluation_name="planted",
        control=None if arm == "long" else arm,  # type: ignore[arg-type]
        length=round(multiple * TRAINED),
        multiple=multiple,
        depth=depth,
        outcome=outcome,
        prompts=[
            Prompt(
                sample=sample,
                verdict="exact" if exact else "missed",
                log_likelihood=-1.0,
                tokens=5,
                prompt_tokens=100,
                fingerprint="0" * 16,
            )
            for sample, exact in enumerate(right)
        ],
    )


def plant(model: Callable[[float, float, float], float], multiples: Sequence[float] = (1, 2, 4)) -> dict[tuple[str, float], float]:
    """(arm, multiple) → share of right answers of a model of (how far positions go, how many tokens, how many of them say something)."""
    found = {}
    for m in multiples:
        found |= {("long", m): model(m, m, m), ("stretched", m): model(m, 0, 0), ("emptied", m): model(m, m, 0)}
        if m > 1:
            found |= {("packed", m): model(1, m, m), ("packed_emptied", m): model(1, m, 0)}
    return found


def at(curve: Curve, multiple: float) -> Cause:
    return next(cause for cause in curve.causes if cause.multiple == multiple)


def effects(cause: Cause) -> dict[str, float]:
    return {effect.cause: effect.value for effect in cause.effects}


@given(st.tuples(*[losses] * 5))
def test_effects_sum_to_what_is_lost_and_follow_the_definition(values: tuple[float, ...]) -> None:
    long, s, p, e, q = values
    shares = {cause: float(parts.mean()) for cause, parts in share_out(dict(zip(FIVE, map(np.array, values), strict=True))).items()}  # type: ignore[arg-type]
    assert math.fsum(shares.values()) == pytest.approx(long, abs=1e-12)
    assert shares["positions"] == pytest.approx((s + (e - q) + (long - p)) / 3, abs=1e-12)
    assert shares["number"] == pytest.approx(((e - s) + 2 * q) / 3, abs=1e-12)
    assert shares["content"] == pytest.approx((2 * (long - e) + (p - q)) / 3, abs=1e-12)


@given(st.tuples(*[losses] * 3))
def test_without_emptied_prompts_number_and_content_are_one(values: tuple[float, ...]) -> None:
    long, s, p = values
    shares = {
        cause: float(parts.mean()) for cause, parts in share_out(dict(zip(FIVE, map(np.array, values), strict=False))).items()
    }  # type: ignore[arg-type]
    assert shares == pytest.approx({"positions": (s + long - p) / 2, "number_and_content": (p + long - s) / 2}, abs=1e-12)


@given(losses, losses)
def test_without_chosen_positions_what_the_filler_says_is_still_told_apart(long: float, e: float) -> None:
    shares = share_out({"long": np.array(long), "emptied": np.array(e)})
    assert {cause: float(parts.mean()) for cause, parts in shares.items()} == pytest.approx(
        {"positions_and_number": e, "content": long - e}, abs=1e-12
    )
    assert share_out({"long": np.array(long), "stretched": np.array(e)}) == {}


@pytest.mark.parametrize(
    ("cause", "model"),
    [
        ("positions", lambda far, many, says: 1.0 if far <= 1 else 0.0),
        ("number", lambda far, many, says: 1.0 if many <= 1 else 0.0),
        ("content", lambda far, many, says: 1.0 if says <= 1 else 0.0),
    ],
)
def test_a_single_planted_cause_gets_all_of_it(cause: str, model: Callable[[float, float, float], float]) -> None:
    curve = make_curve(answer(plant(model)))
    for multiple in (2, 4):
        found = effects(at(curve, multiple))
        assert found.pop(cause) == 1
        assert set(found.values()) == {0}
        told = next(effect for effect in at(curve, multiple).effects if effect.cause == cause)
        assert (told.least, told.most) == (1, 1)
        assert told.lower is not None
        assert told.lower > 0.85


def test_planted_shares_lie_inside_their_intervals_and_the_sentence_says_them() -> None:
    """Positions take 30 points, tokens 20, distraction 10, one added to the other: no order matters."""
    curve = make_curve(
        answer(plant(lambda far, many, says: 0.95 - 0.3 * (far > 1) - 0.2 * (many > 1) - 0.1 * (says > 1), (1, 4)), samples=40)
    )
    found = at(curve, 4)
    for effect, true in zip(found.effects, (0.3, 0.2, 0.1), strict=True):
        assert effect.lower is not None
        assert effect.upper is not None
        assert effect.lower <= true <= effect.upper
        assert effect.upper - effect.lower < 0.25
    sentence = say_cause(found)
    assert sentence.startswith("of the ")
    assert "points lost at 4×" in sentence
    assert "are due to unseen positions" in sentence
    assert "to the number of tokens attended to" in sentence
    assert "to what the filler says" in sentence


def test_causes_that_work_through_each_other_are_said_to_by_the_range_over_orders() -> None:
    """A model that fails only where both are new: many tokens at unseen positions."""
    found = at(make_curve(answer(plant(lambda far, many, says: 0.0 if far > 1 and many > 1 else 1.0))), 2)
    assert effects(found) == pytest.approx({"positions": 2 / 3, "number": 1 / 3, "content": 0}, abs=1e-12)
    assert [(effect.least, effect.most) for effect in found.effects] == [(0, 1), (0, 1), (0, 0)]


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_the_order_of_cells_makes_no_difference(seed: int) -> None:
    cells = answer(plant(lambda far, many, says: 0.9 / max(far, many)), samples=3)
    shuffled = random.Random(seed).sample(cells, len(cells))
    assert make_curve(shuffled) == make_curve(cells)


def test_where_positions_do_nothing_by_construction_they_take_nothing() -> None:
    chance = {
        place: share
        for place, share in plant(lambda far, many, says: 1.0 if many <= 2 else 0.2).items()
        if place[0] in ("long", "emptied")
    }
    left_out = [(arm, m, "no_positions") for arm in ("stretched", "packed", "packed_emptied") for m in (2, 4)]
    found = at(make_curve(answer(chance, left_out=left_out)), 4)
    shares = effects(found)
    assert shares["positions"] == 0
    assert "0 (by construction) are due to unseen positions" in say_cause(found)
    assert shares["number"] + shares["content"] == pytest.approx(next(loss.value for loss in found.losses if loss.arm == "long"))
    assert [loss.arm for loss in found.losses] == ["long", "emptied"]


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ((), ["positions", "number", "content"]),
        (("packed_emptied",), ["positions", "number_and_content"]),
        (("emptied", "packed_emptied"), ["positions", "number_and_content"]),
        (("stretched",), ["positions_and_number", "content"]),
        (("packed", "packed_emptied"), ["positions_and_number", "content"]),
        (("stretched", "emptied"), []),
        (("packed", "emptied"), []),
        (("long",), []),
    ],
)
def test_arms_that_are_missing_leave_as_much_told_apart_as_the_others_can(missing: Sequence[str], told: Sequence[str]) -> None:
    chance = {
        place: share for place, share in plant(lambda far, many, says: 0.9 / max(far, many)).items() if place[0] not in missing
    }
    found = at(make_curve(answer(chance)), 2)
    assert [effect.cause for effect in found.effects] == told
    assert bool(found.reason) == bool(missing)
    assert all(arm in found.reason for arm in missing if "long" not in missing)
    if not told:
        assert say_cause(found).startswith(f"at 2× not measurable: {found.reason}")


def test_what_an_arm_loses_is_there_where_the_plain_prompts_were_not_run() -> None:
    found = at(make_curve(answer({("stretched", 1): 1.0, ("stretched", 64): 0.0})), 64)
    (loss,) = found.losses
    assert (loss.arm, loss.value) == ("stretched", 1)
    assert found.reason == "long: was not run"
    assert "a short prompt loses 100 [" in say_cause(found)


def test_a_model_that_fails_in_its_window_has_no_causes_and_one_whose_short_prompt_fails_has_no_positions() -> None:
    chance = plant(lambda far, many, says: 0.9 / max(far, many))
    failing = at(make_curve(answer(chance | {("long", 1): 0.3})), 2)
    assert not failing.effects
    assert "right at the trained length already" in failing.reason
    no_short = at(make_curve(answer(chance | {("stretched", 1): 0.0})), 2)
    assert [effect.cause for effect in no_short.effects] == ["positions_and_number", "content"]
    assert "stretched: 0.00 of the answers are right at the trained length already" in no_short.reason


def test_one_word_over_and_over_that_does_harm_is_no_empty_filler() -> None:
    chance = plant(lambda far, many, says: 0.9 if many <= 1 else 0.7)
    harmed = at(make_curve(answer(chance | {("emptied", 2): 0.1}, samples=20)), 2)
    assert [effect.cause for effect in harmed.effects] == ["positions", "number_and_content"]
    assert "so it is no empty filler to this model" in harmed.reason
    assert [effect.cause for effect in at(make_curve(answer(chance, samples=20)), 2).effects] == ["positions", "number", "content"]


def test_a_loss_that_may_be_chance_is_no_loss_to_explain() -> None:
    assert "nothing is lost that could be told from chance" in say_cause(
        at(make_curve(answer(plant(lambda far, many, says: 0.9))), 2)
    )


def test_one_haystack_has_effects_and_no_intervals() -> None:
    curve = make_curve(answer(plant(lambda far, many, says: 1.0 if far <= 1 else 0.0), samples=1))
    assert {(effect.lower, effect.upper) for effect in at(curve, 2).effects} == {(None, None)}
    assert "1, 0" not in say_cause(at(curve, 2))


def test_the_sentence_is_said_of_the_length_at_which_half_is_lost() -> None:
    curve = make_curve(answer(plant(lambda far, many, says: {1: 1.0, 2: 0.9, 4: 0.4, 8: 0.0}[max(far, many, 1)], (1, 2, 4, 8))))
    headline = choose_headline(curve.causes)
    assert headline
    assert headline.multiple == 4
    assert choose_headline([]) is None


def test_arms_agree_at_the_trained_length_or_their_difference_is_said() -> None:
    curve = make_curve(answer(plant(lambda far, many, says: 1.0) | {("stretched", 1): 0.6}))
    assert [one.arm for one in curve.baselines] == ["stretched", "emptied"]
    assert curve.baselines[0].upper is not None
    assert curve.baselines[0].upper < 0
    assert curve.baselines[1].value == 0


def test_a_curve_without_arms_says_nothing_of_them_and_arms_leave_the_curve_as_it_is() -> None:
    chance = plant(lambda far, many, says: 0.9 / max(far, many))
    whole = make_curve(answer(chance))
    plain = make_curve([one for one in answer(chance) if one.control is None])
    assert (plain.arms, plain.baselines, plain.causes, plain.predictions) == ([], [], [], [])
    assert (whole.points, whole.effective_lengths, whole.half_length) == (plain.points, plain.effective_lengths, plain.half_length)
    assert whole.controls == []
    assert [(point.arm, point.multiple) for point in whole.arms if point.arm == "packed"] == [("packed", 2), ("packed", 4)]


# ---------------------------------------------------------------------- from lm_eval's files to records


def far(length: int, depth: float, sample: int) -> bool:
    return length <= 256 or (length == 512 and sample < 2)


def never(length: int, depth: float, sample: int) -> bool:
    return True


def test_a_run_with_arms_is_published_and_follows_from_its_prompts(tmp_path: Path) -> None:
    arms = {"stretched": far, "packed": never, "emptied": far, "packed_emptied": never, "shifted": never, "distractors": far}
    left_out = [{"arm": "other_text", "length": None, "outcome": "too_short", "reason": "no other text is at hand"}]
    file = write_output(tmp_path, right=far, arms=arms, left_out=left_out, kinds=("scored", "generated"))
    published = prepare_run(file, Submission(evidence="not said"))
    assert audit_records(published) == []
    curve = published.run.tasks[0].curve
    assert effects(at(curve, 4)) == {"positions": 1, "number": 0, "content": 0}
    other = [point for point in curve.arms if point.arm == "other_text"]
    assert [(point.multiple, point.outcome, point.reason) for point in other] == [
        (m, "too_short", "no other text is at hand") for m in (1, 2, 4)
    ]
    assert all(prompt.prompt_tokens == 180 for one in published.cells if one.control == "stretched" for prompt in one.prompts)
    aggregate = to_every_eval_ever(published)[0].content.decode()
    assert "passkey_extrapolate, other_text at 512 tokens: too_short" in aggregate


def test_arms_alone_are_published_without_points(tmp_path: Path) -> None:
    left_out = [{"arm": "packed", "length": None, "outcome": "not_admitted", "reason": "no position ids"}]
    file = write_output(tmp_path, arms={"stretched": far}, left_out=left_out, swept=False, multiples=(1, 2, 64))
    published = prepare_run(file, Submission(evidence="not said"))
    curve = published.run.tasks[0].curve
    assert curve.points == []
    assert [(point.arm, point.multiple, point.outcome) for point in curve.arms if point.arm == "packed"] == [
        ("packed", m, "not_admitted") for m in (2, 64)
    ]
    assert at(curve, 64).losses[0].value == 1


def test_an_arm_that_ran_out_of_memory_at_one_length_says_why_there_alone(tmp_path: Path) -> None:
    from made_outputs import TASKS, edit_rows

    left_out = [{"arm": "packed", "length": 1024, "outcome": "out_of_memory", "reason": "8 GiB were asked for"}]
    file = write_output(tmp_path, right=far, arms={"packed": never, "stretched": far}, left_out=left_out)

    def fail(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["doc"].get("control") == "packed" and row["doc"]["length"] == 1024:
                for metric in row["metrics"]:
                    del row[metric]
                row |= {"filtered_resps": ["out_of_memory"], "resps": [[["nan", "False"]]], "metrics": []}

    edit_rows(file, fail, task=TASKS["scored"], means_too=True)
    curve = prepare_run(file, Submission(evidence="not said")).run.tasks[0].curve
    packed = {point.multiple: (point.outcome, point.reason) for point in curve.arms if point.arm == "packed"}
    assert packed == {2: ("measured", ""), 4: ("out_of_memory", "8 GiB were asked for")}
    assert [effect.cause for effect in at(curve, 2).effects] == ["positions", "number_and_content"]
    assert at(curve, 4).reason == "packed_emptied, emptied: was not run; packed: out_of_memory"


def test_a_table_that_ends_has_packed_prompts_past_its_end_and_no_stretched_ones(tmp_path: Path) -> None:
    def write_arm(arm: str) -> Path:
        return write_output(tmp_path / arm, arms={arm: never}, swept=False, multiples=(1, 2), config={"hard_limit": 256}, right=far)

    packed = prepare_run(write_arm("packed"), Submission(evidence="not said"))
    assert [point.outcome for point in packed.run.tasks[0].curve.arms] == ["measured"]
    with pytest.raises(PublishError, match="the model ends at 256"):
        prepare_run(write_arm("stretched"), Submission(evidence="not said"))


def test_an_outcome_of_arms_is_refused_of_the_sweep(tmp_path: Path) -> None:
    import msgspec

    published = prepare_run(write_output(tmp_path, right=far, arms={"stretched": far}), Submission(evidence="not said"))
    first, *others = published.cells
    gone = msgspec.structs.replace(first, outcome="not_admitted", prompts=[])
    problems = audit_records(msgspec.structs.replace(published, cells=(gone, *others)))
    assert any("expected it of an arm alone" in problem for problem in problems)


# ---------------------------------------------------------------------- how often intervals hold a planted effect


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(61)
PLACES: tuple[tuple[Any, int], ...] = (
    *((arm, 1) for arm in ("long", "stretched", "emptied")),
    *((arm, 2) for arm in FIVE),
)


def draw_effects(rng: np.random.Generator, haystacks: int, spread: float, alike: float) -> list[bool]:
    """Of one model with planted causes, whether each effect's interval holds the true effect.

    `alike`: how far the answers of all arms to one prompt hang together, from 0 to 1.
    """
    top = rng.uniform(1, 6)
    positions, number, content = rng.exponential(2, 3) * rng.integers(0, 2, 3)
    taken = {
        "long": positions + number + content,
        "stretched": positions,
        "packed": number + content,
        "emptied": positions + number,
    }
    logits = np.array([top - (taken.get(arm, number) if length > 1 else 0) + 0.3 * ("emptied" in arm) for arm, length in PLACES])
    logits = logits[:, None] + np.linspace(-1, 1, 10) * rng.choice([0, 2])
    shape = len(PLACES), haystacks, 10
    shared, own = rng.standard_normal((1, haystacks, 1)), rng.standard_normal((*shape[:2], 1))
    chances = expit(logits[:, None] + spread * (math.sqrt(alike) * shared + math.sqrt(1 - alike) * own))
    right = np.where(rng.random(shape) < alike, rng.random((1, *shape[1:])), rng.random(shape)) < chances
    answers = Answers(right=right.astype(float), asked=np.ones(right.shape))
    truth = (expit(logits[..., None] + spread * NODES) @ (WEIGHTS / WEIGHTS.sum())).mean(1)
    drawn = np.column_stack([answers.scores, draw_scores(answers, own=1)])
    found = share_out(find_losses(dict(zip(PLACES, drawn, strict=True)), 2, 1))
    true = share_out(find_losses(dict(zip(PLACES, truth[:, None], strict=True)), 2, 1))
    ends = [find_ends(parts.mean(0)) for parts in found.values()]
    return [(low or 0) <= parts.mean(0)[0] <= (high or 0) for (low, high), parts in zip(ends, true.values(), strict=True)]


def test_effects_intervals_hold_the_planted_effect_whether_arms_answer_alike_or_not() -> None:
    rng = np.random.default_rng(21)
    held = {
        place: np.mean([draw_effects(rng, *place) for _ in range(100)])
        for place in itertools.product((5, 10, 20), (0.0, 1.0, 2.0), (0.0, 0.5, 1.0))
    }

    assert 0.94 <= np.mean(list(held.values())) <= 0.98
    assert min(held.values()) > 0.88


def test_arms_with_the_same_answers_differ_by_nothing_within_an_interval_that_has_a_width() -> None:
    same = [
        cell(arm, m, depth, [sample != 3 for sample in range(10)])
        for arm in ("long", "stretched")
        for m in (1, 2)
        for depth in DEPTHS
    ]
    (one,) = make_curve(same).baselines
    assert one.value == 0
    assert one.lower is not None
    assert one.upper is not None
    assert -0.06 < one.lower < -0.01
    assert 0.01 < one.upper < 0.06


def test_every_arm_has_a_base_that_is_run_at_the_trained_length() -> None:
    assert set(BASES) <= set(ARMS)
    assert not set(BASES.values()) & set(BASES)
    assert explain(
        {}, [ArmPoint(arm="packed", length=512, multiple=2, outcome="not_admitted", score_details=None)], {512: "measured"}, 256
    )
