"""The split of an evaluation: complete, disjoint, balanced, and the same wherever it is made."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness_ext.errors import ShardError
from harness_ext.models.hf import HFExtrapolate
from harness_ext.models.prefix_tree import Batch, plan
from harness_ext.shards import Shard, Unit, deal, list_units, parse_shard, weigh

UNITS = st.lists(
    st.builds(
        Unit,
        task=st.sampled_from(["copy", "niah", "passkey"]),
        sample=st.integers(0, 50),
        docs=st.just((0,)),
        cost=st.integers(0, 10**14),
    ),
    min_size=1,
    max_size=60,
    unique_by=lambda unit: (unit.task, unit.sample),
)
DOCS = st.lists(
    st.builds(
        lambda length, depth, sample: {"length": length, "multiple": length / 256, "depth": depth, "sample": sample},
        st.sampled_from([128, 256, 2048]),
        st.none() | st.floats(0, 1),
        st.integers(0, 5),
    ),
    min_size=1,
)


@pytest.fixture(scope="module")
def embedded() -> HFExtrapolate:
    return HFExtrapolate(pretrained="reference/rope", device="cpu")


@given(UNITS, st.data())
def test_every_unit_is_in_one_part_and_no_part_is_empty(units: list[Unit], data: st.DataObject) -> None:
    dealt = deal(units, data.draw(st.integers(1, len(units))))
    assert Counter(unit for part in dealt for unit in part) == Counter(units)
    assert all(dealt)


@given(UNITS, st.data())
def test_parts_differ_by_no_more_than_the_costliest_unit(units: list[Unit], data: st.DataObject) -> None:
    loads = [sum(unit.cost for unit in part) for part in deal(units, data.draw(st.integers(1, len(units))))]
    assert max(loads) - min(loads) <= max(unit.cost for unit in units)


@given(UNITS, st.data(), st.randoms())
def test_the_split_does_not_depend_on_the_order_of_tasks(units: list[Unit], data: st.DataObject, rng: random.Random) -> None:
    parts = data.draw(st.integers(1, len(units)))
    shuffled = list(units)
    rng.shuffle(shuffled)
    assert deal(shuffled, parts) == deal(units, parts)


@given(DOCS)
def test_a_sample_is_never_split_and_every_prompt_is_in_a_unit(docs: list[dict[str, Any]]) -> None:
    units = list_units("passkey", docs)
    assert sorted(number for unit in units for number in unit.docs) == list(range(len(docs)))
    assert all({docs[number]["sample"] for number in unit.docs} == {unit.sample} for unit in units)


@given(DOCS)
def test_a_sample_costs_no_less_than_its_longest_prompt_and_no_more_than_all_read_one_by_one(docs: list[dict[str, Any]]) -> None:
    squares = [doc["length"] ** 2 for doc in docs]
    assert max(squares) <= weigh(docs) <= sum(squares) or len(docs) == 1


def test_what_samples_of_other_lengths_cost_is_known() -> None:
    short, long = ({"length": length, "multiple": 1, "depth": 0.5, "sample": 0} for length in (1000, 8000))
    assert weigh([long]) == 64 * weigh([short])
    cropped = {**long, "multiple": 8.0, "control": "cropped"}
    assert weigh([long, cropped]) == weigh([long]) + 1000**2
    sixteen = [{"length": 1000, "depth": number / 15, "sample": 0} for number in range(16)]
    assert weigh(sixteen, one_context=True) == 1000**2 < weigh(sixteen)


def test_the_tasks_of_the_embedded_model_are_dealt_evenly(load: Any) -> None:
    units = []
    for name in ("passkey_extrapolate", "niah_sweep_extrapolate", "loss_extrapolate"):
        task = load(name, pretrained="reference/rope", trained_length=256, max_length=2048)
        task.bind(None)
        units += list_units(name, task.eval_docs, one_context=getattr(task.spec, "every_depth", False))
    assert len(units) == 30
    for parts in (2, 5, 10):
        loads = [sum(unit.cost for unit in part) for part in deal(units, parts)]
        assert max(loads) == min(loads), "samples of a task cost the same, and ten of each go into so many parts"


@pytest.mark.parametrize(
    ("task", "metadata"),
    [
        ("passkey_extrapolate", {}),
        ("niah_multikey_extrapolate", {}),
        ("copy_extrapolate", {"controls": True}),
        ("loss_extrapolate", {}),
    ],
)
def test_what_a_sample_costs_is_told_from_its_records_as_from_its_prompts(
    task: str, metadata: dict[str, Any], load: Any, embedded: HFExtrapolate
) -> None:
    made = load(task, samples=1, lengths=[256, 512, 1024], trained_length=256, **metadata)
    made.bind(embedded)
    made.build_all_requests()
    pairs = [embedded._encode_pair(*request.args) for request in made.instances]
    steps = plan([[*context, *answer][:-1] for context, answer in pairs], [len(context) - 1 for context, _ in pairs], Batch()).steps
    read = sum(len(step.rows) * (step.stop**2 - step.start**2) for step in steps)
    assert weigh(made.eval_docs) == pytest.approx(read, rel=0.2)


def test_more_parts_than_samples_are_refused() -> None:
    with pytest.raises(ShardError, match="ask for at most"):
        deal([Unit(task="passkey", sample=0, docs=(0,), cost=1)], 2)


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "-1/3", "1/3/5", "1.5/3", ""])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ShardError, match="as in 3/16"):
        parse_shard(text)


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_a_shard_is_read_as_it_is_written(index: int, more: int) -> None:
    shard = Shard(index=index, of=index + more)
    assert parse_shard(str(shard)) == shard
