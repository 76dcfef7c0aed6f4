"""The JSON Schema of published records, made from their classes: `python -m harness_ext.results.schema` writes the file anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from harness_ext.results.records import SCHEMA_VERSION, Cell, Prompt, Run

FILE = Path(__file__).with_name("record.schema.json")


def make_schema() -> dict[str, Any]:
    """Draft 2020-12, of one line of a file: a run or a cell."""
    made = msgspec.json.schema(Run | Cell)
    for name, kind in (("Run", "the first line of its file"), ("Cell", "every other line")):
        made["$defs"][name]["properties"]["kind"]["description"] = f"`{name.lower()}`: {kind}."
    for item, field in zip(made["$defs"]["Prompt"]["prefixItems"], msgspec.structs.fields(Prompt), strict=True):
        item["title"] = field.name  # an array's items have no names otherwise
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A record of a published run, version {SCHEMA_VERSION}",
        **made,
    }


def to_text(schema: dict[str, Any]) -> str:
    """As it stands in the file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(to_text(make_schema()), encoding="utf-8")
