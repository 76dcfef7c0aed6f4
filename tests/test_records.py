"""Published records: their schema, and that what is written is what is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_outputs import write_output

from harness_ext.publishing import prepare_run
from harness_ext.results import schema
from harness_ext.results.identity import hash_json, identify_run
from harness_ext.results.publish import Submission
from harness_ext.results.records import LARGEST, Cell, Prompt, PublishedRun, to_plain
from harness_ext.results.store import decode_record, read_results, to_bytes, write_run


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedRun:
    file = write_output(tmp_path_factory.mktemp("out"), kinds=("scored", "loss"), unmeasured={1024: "hard_limit"}, controls=True)
    return prepare_run(file, Submission())


def test_the_schema_file_is_the_one_that_the_classes_make() -> None:
    assert schema.FILE.read_text(encoding="utf-8") == schema.to_text(schema.make_schema()), (
        "run python -m harness_ext.results.schema"
    )


def test_the_schema_is_one_and_describes_every_field() -> None:
    made = schema.make_schema()
    jsonschema.Draft202012Validator.check_schema(made)
    undescribed = [where for where, field in list_fields(made) if not field.get("description")]
    assert undescribed == []
    assert len(list(list_fields(made))) > 100


def list_fields(made: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, part in made["$defs"].items():
        assert part.get("description"), name
        for field, found in part.get("properties", {}).items():
            yield f"{name}.{field}", found
        for number, found in enumerate(part.get("prefixItems", [])):
            yield f"{name}[{number}]", found


def test_the_schema_takes_every_published_line_and_refuses_a_changed_one(published: PublishedRun) -> None:
    """jsonschema and msgspec read the same schema the same way."""
    validator = jsonschema.Draft202012Validator(schema.make_schema())
    lines = [json.loads(line) for line in to_bytes(published).splitlines()]
    for line in lines:
        validator.validate(line)
    for change in ({"n": -1}, {"outcome": "fine"}, {"n": LARGEST + 1}, {"evaluation_id": "ab" * 8 + "\n"}, {"more": 1}):
        broken = lines[1] | change
        assert not validator.is_valid(broken), change
        with pytest.raises(ValueError):
            decode_record(json.dumps(broken))


def test_what_is_written_is_what_is_read(published: PublishedRun, tmp_path: Path) -> None:
    write_run(tmp_path, published)
    assert read_results(tmp_path) == ([published], [])


prompts = st.builds(
    Prompt,
    sample=st.integers(0, LARGEST),
    verdict=st.sampled_from(["exact", "missed"]),
    log_likelihood=st.none() | st.floats(max_value=0, allow_nan=False, allow_infinity=False),
    tokens=st.integers(0, 100),
    prompt_tokens=st.integers(1, LARGEST),
    fingerprint=st.text("0123456789abcdef", min_size=16, max_size=16),
)


@given(prompts=st.lists(prompts, max_size=5), depth=st.none() | st.floats(0, 1), reason=st.text(max_size=50).map(to_plain))
def test_any_cell_is_read_as_it_was_written(prompts: list[Prompt], depth: float | None, reason: str) -> None:
    cell = Cell(
        evaluation_result_id="0" * 32,
        evaluation_id="1" * 32,
        evaluation_name="a task",
        length=128,
        multiple=0.1,
        depth=depth,
        outcome="measured",
        reason=reason,
        n=len(prompts),
        successes=None,
        mean_log_likelihood=None,
        score_details=None,
        prompts=prompts,
    )
    assert decode_record(msgspec.json.encode(cell, order="deterministic").decode()) == cell


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-LARGEST, LARGEST) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_a_hash_does_not_know_the_order_of_keys(value: Any) -> None:
    turned = {"b": value, "a": 1}
    assert hash_json(turned) == hash_json(dict(reversed(turned.items())))
    assert hash_json(turned) != hash_json({"b": [value], "a": 1})


def test_where_when_and_how_fast_are_no_part_of_what_a_run_is_and_what_was_asked_of_which_weights_is(
    published: PublishedRun,
) -> None:
    run = published.run
    same = {
        "evaluation_timestamp": "2026-01-01T00:00:00Z",
        "hardware": None,
        "wall_seconds": 1.0,
        "command": "another",
        "packages": {},
    }
    assert identify_run(msgspec.structs.replace(run, **same)) == run.evaluation_id
    model, task = run.model_info, run.tasks[0]
    for other in (
        {"model_info": msgspec.structs.replace(model, weights_fingerprint="cd" * 32)},
        {"model_info": msgspec.structs.replace(model, dtype="bfloat16")},
        {"model_info": msgspec.structs.replace(model, inference_platform="hf")},
        {"override": msgspec.structs.replace(run.override, fingerprint="cd" * 16)},
        {"trained_length": None},
        {"tasks": [msgspec.structs.replace(task, version="3")]},
        {"tasks": [msgspec.structs.replace(task, prompts_fingerprint="cd" * 16)]},
    ):
        assert identify_run(msgspec.structs.replace(run, **other)) != run.evaluation_id, other
    renamed = msgspec.structs.replace(model, id="another/name", revision="f" * 40)
    assert identify_run(msgspec.structs.replace(run, model_info=renamed)) == run.evaluation_id, "the same weights"
    unseen = [msgspec.structs.replace(found, weights_fingerprint="") for found in (model, renamed)]
    assert len({identify_run(msgspec.structs.replace(run, model_info=found)) for found in unseen}) == 2
