"""Records as somebody might send them who means harm, or whose tools are broken.

`make_corpus` writes those that are valid, and harmless only to a reader who takes text for text; `BROKEN` are those that no reader takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from made_outputs import write_output

from harness_ext.publishing import prepare_run
from harness_ext.results.aggregate import make_curve
from harness_ext.results.identity import hash_prompts, identify_cell, identify_override, identify_run
from harness_ext.results.publish import Submission
from harness_ext.results.records import PublishedRun
from harness_ext.results.store import MAX_FILE, MAX_LINE, MAX_LINES, to_bytes, write_run

SCRIPTS = (
    "<script>window.hurt=1</script>",
    "</script><script>window.hurt=1</script>",
    "<img src=x onerror=window.hurt=1>",
    "<svg/onload=window.hurt=1>",
    "javascript:window.hurt=1",
    "\"><iframe src='javascript:window.hurt=1'></iframe>",
    "'-window.hurt=1-'",
    "${window.hurt=1}",
    "{{constructor.constructor('window.hurt=1')()}}",
    "[a](javascript:window.hurt=1)",
    "&lt;script&gt;window.hurt=1&lt;/script&gt;",
    "<!--<script>",
    "]]></script>",
    "../../../../etc/passwd",
    "=cmd|' /C calc'!A1",
    "__proto__",
    "constructor",
    "a" * 200,
)
"""What a page has to show as it stands."""


def make_corpus(folder: Path) -> list[PublishedRun]:
    """Writes a valid run for each hostile text, which stands wherever a record leaves the text to its publisher; returns them."""
    good = make_good()
    made = []
    for number, text in enumerate(SCRIPTS):
        model = msgspec.structs.replace(
            good.run.model_info,
            id=f"lab{number}/tiny",
            developer=f"lab{number}",
            name=text,
            revision=text,
            dtype=text,
            model_type=text,
            position_scheme=text,
            inference_platform=text,
            weights_fingerprint=text,
            model_args={text: text, "more": {"__proto__": {text: [text]}}},
        )
        run = msgspec.structs.replace(
            good.run,
            model_info=model,
            source_metadata=msgspec.structs.replace(good.run.source_metadata, source_organization_name=text),
            eval_library=msgspec.structs.replace(good.run.eval_library, name=text, version=text),
            packages={text: text},
            trained_length=msgspec.structs.replace(good.run.trained_length, source=text, evidence=text),
            override=msgspec.structs.replace(good.run.override, method=text, options={text: text}, before={text: text}),
            hardware=msgspec.structs.replace(good.run.hardware, device=text, name=text, platform=text),
            command=text,
            tasks=[
                msgspec.structs.replace(task, evaluation_name=text, version=text, settings={text: text}) for task in good.run.tasks
            ],
        )
        cells = [
            msgspec.structs.replace(cell, evaluation_name=text, reason=text if cell.outcome != "measured" else "")
            for cell in good.cells
        ]
        published = settle(PublishedRun(run=run, cells=tuple(cells)))
        write_run(folder, published)
        made.append(published)
    return made


def make_good() -> PublishedRun:
    """A run that nothing is wrong with, with a length that could not be run."""
    with tempfile.TemporaryDirectory() as folder:
        return prepare_run(write_output(Path(folder), samples=3, depths=(0.0, 1.0), unmeasured={1024: "hard_limit"}), Submission())


def settle(published: PublishedRun) -> PublishedRun:
    """The run with all that follows from its other fields computed again, as its publisher would."""
    run, cells = published.run, published.cells
    override = msgspec.structs.replace(run.override, fingerprint=identify_override(run.override))
    tasks = []
    for task in run.tasks:
        own = [cell for cell in cells if cell.evaluation_name == task.evaluation_name]
        tasks.append(msgspec.structs.replace(task, curve=make_curve(own), prompts_fingerprint=hash_prompts(own)))
    run = msgspec.structs.replace(run, override=override, tasks=tasks)
    run = msgspec.structs.replace(run, evaluation_id=identify_run(run))

    def name(cell: Any) -> Any:
        found = identify_cell(run.evaluation_id, cell.evaluation_name, cell.control, cell.length, cell.depth)
        return msgspec.structs.replace(cell, evaluation_id=run.evaluation_id, evaluation_result_id=found)

    return PublishedRun(run=run, cells=tuple(name(cell) for cell in cells))


# ---------------------------------------------------------------------- what no reader takes

Lines = list[bytes]
CELL = 2
"""The line (from 1) of the cell that is broken; the run is on line 1."""


def edit(line: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[Lines], Any]:
    """The record of a line, changed."""

    def apply(lines: Lines) -> None:
        record = json.loads(lines[line - 1])
        change(record)
        lines[line - 1] = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")

    return apply


def put(line: int, *path: Any, value: Any) -> Callable[[Lines], Any]:
    """The record of a line with another value at a place in it."""

    def change(record: Any) -> None:
        for step in path[:-1]:
            record = record[step]
        record[path[-1]] = value

    return edit(line, change)


def swap(line: int, old: bytes, new: bytes) -> Callable[[Lines], Any]:
    """The text of a line with `new` for the first `old`."""

    def apply(lines: Lines) -> None:
        assert old in lines[line - 1], old
        lines[line - 1] = lines[line - 1].replace(old, new, 1)

    return apply


BROKEN: dict[str, tuple[Callable[[Lines], Any], int | None, str]] = {
    # no JSON
    "an empty line": (lambda lines: lines.insert(1, b""), 2, "truncated"),
    "half a line": (lambda lines: lines.__setitem__(1, lines[1][:100]), 2, "truncated|malformed"),
    "text": (lambda lines: lines.__setitem__(1, b"hello"), 2, "malformed"),
    "a list": (lambda lines: lines.__setitem__(1, b"[]"), 2, "Expected `object`, got `array`"),
    "null": (lambda lines: lines.__setitem__(1, b"null"), 2, "Expected `object`, got `null`"),
    "two records on a line": (lambda lines: lines.__setitem__(1, lines[1] + lines[2]), 2, "trailing characters"),
    "NaN": (swap(CELL, b'"multiple":0.5', b'"multiple":NaN'), 2, "malformed"),
    "Infinity": (swap(CELL, b'"multiple":0.5', b'"multiple":Infinity'), 2, "malformed"),
    "a number without end": (swap(CELL, b'"multiple":0.5', b'"multiple":1e999'), 2, "out of range"),
    "a whole number of five thousand digits": (swap(CELL, b'"n":3', b'"n":' + b"9" * 5000), 2, "out of range"),
    "a whole number that no browser holds": (
        swap(CELL, b'"n":3', b'"n":9007199254740993'),
        2,
        "Expected `int` <= 9007199254740991",
    ),
    "a key twice": (swap(CELL, b'"n":3', b'"n":0,"n":3'), 2, "'n' stands there twice"),
    "a key twice, deep down": (swap(1, b'"pretrained":"lab/tiny"', b'"x":{"y":1,"y":2}'), 1, "'y' stands there twice"),
    "no UTF-8": (swap(CELL, b"passkey", b"pass\xffkey"), 2, "not valid utf-8|can't decode"),
    "half a surrogate pair": (swap(CELL, b"passkey", b"pass\\ud800key"), 2, "Input data was truncated|surrogate|Invalid"),
    "a byte order mark": (lambda lines: lines.__setitem__(0, b"\xef\xbb\xbf" + lines[0]), 1, "malformed"),
    "a zero byte": (swap(CELL, b"passkey", b"pass\0key"), 2, "malformed|invalid"),
    "UTF-16": (lambda lines: lines.__setitem__(1, lines[1].decode().encode("utf-16")), 2, "not valid utf-8|can't decode"),
    "a hundred thousand lists in one another": (
        lambda lines: lines.__setitem__(0, lines[0].replace(b'"lab/tiny"}', b"[" * 100_000 + b"]" * 100_000 + b"}", 1)),
        1,
        "inside one another without end|recursion",
    ),
    "fifty objects in one another": (
        lambda lines: lines.__setitem__(0, lines[0].replace(b'"lab/tiny"}', b'{"a":' * 50 + b"1" + b"}" * 51, 1)),
        1,
        "more than 16 deep",
    ),
    # not the schema
    "a field that is not there": (edit(CELL, lambda cell: cell.pop("n")), 2, "missing required field `n`"),
    "a field more": (put(CELL, "html", value="<b>"), 2, "unknown field `html`"),
    "no kind": (edit(CELL, lambda cell: cell.pop("kind")), 2, "kind"),
    "another kind": (put(CELL, "kind", value="payload"), 2, "Invalid value 'payload'"),
    "a text for a number": (put(CELL, "n", value="3"), 2, "Expected `int`, got `str`"),
    "a number for a text": (put(CELL, "evaluation_name", value=3), 2, "Expected `str`, got `int`"),
    "a truth for a number": (put(CELL, "n", value=True), 2, "Expected `int`, got `bool`"),
    "fewer than no prompts": (put(CELL, "n", value=-1), 2, "Expected `int` >= 0"),
    "a depth below the bottom": (put(CELL, "depth", value=1.5), 2, "Expected `float` <= 1"),
    "a length of nothing": (put(CELL, "length", value=0), 2, "Expected `int` >= 1"),
    "an outcome of its own": (put(CELL, "outcome", value="great"), 2, "Invalid enum value 'great'"),
    "a verdict of its own": (put(CELL, "prompts", 0, 1, value="great"), 2, "Invalid enum value 'great'"),
    "a prompt too short": (
        edit(CELL, lambda cell: cell["prompts"][0].pop()),
        2,
        "Expected `array` of at (least length|most length) 6",
    ),
    "a prompt too long": (
        edit(CELL, lambda cell: cell["prompts"][0].append(1)),
        2,
        "Expected `array` of at (least length|most length) 6",
    ),
    "an id that is a path": (put(1, "evaluation_id", value="../../../etc/passwd"), 1, "matching regex"),
    "a model that is a path": (put(1, "model_info", "id", value="../../etc"), 1, "matching regex"),
    "a model that is an address": (put(1, "model_info", "id", value="https://example.com/x"), 1, "matching regex"),
    "a model with markup for a name": (put(1, "model_info", "id", value="a/<script>"), 1, "matching regex"),
    "a name of two lines": (put(1, "model_info", "name", value="a\nb"), 1, "matching regex"),
    "a name that moves the cursor": (put(1, "model_info", "name", value="a\x1b[2Jb"), 1, "matching regex"),
    "a name that turns what stands after it": (put(1, "model_info", "name", value="a\u202eb"), 1, "matching regex"),
    "a name with what cannot be seen": (put(1, "model_info", "name", value="a\u200bb"), 1, "matching regex"),
    "text that turns, where a record is free": (put(1, "tasks", 0, "settings", value={"x": "a\u202eb"}), 1, "control character"),
    "a key that turns, where a record is free": (put(1, "model_info", "model_args", value={"a\u202eb": 1}), 1, "control character"),
    "a number too large, where a record is free": (
        put(1, "model_info", "model_args", value={"a": 2**60}),
        1,
        "a whole number above",
    ),
    "a name too long": (put(1, "model_info", "name", value="a" * 201), 1, "length <= 200"),
    "a command too long": (put(1, "command", value="a" * 4001), 1, "length <= 4000"),
    "a date that is none": (put(1, "evaluation_timestamp", value="yesterday"), 1, "matching regex"),
    "an interval that knows too much": (
        put(CELL, "score_details", "uncertainty", "confidence_interval", "confidence_level", value=2.0),
        2,
        "Expected `float` <= 1",
    ),
    "records of the next major version": (
        put(1, "schema_version", value="2.0.0"),
        1,
        "schema version 2.0.0; .* upgrade harness_ext",
    ),
    "records of a later minor version": (
        edit(1, lambda run: run.update(schema_version="1.7.0", colour="red")),
        1,
        "schema version 1.7.0; .* upgrade harness_ext",
    ),
    "records of an older major version": (
        put(1, "schema_version", value="0.3.0"),
        1,
        "schema version 0.3.0; .* publish the run again",
    ),
    "a version that is none": (put(1, "schema_version", value="<b>"), 1, "schema version <b>"),
    # not the file
    "no run": (lambda lines: lines.pop(0), 1, "no run; expected one on the first line; 8 cells without a run were left out"),
    "a second run": (lambda lines: lines.append(lines[0]), 10, "a second run"),
    "the run at the end": (lambda lines: lines.append(lines.pop(0)), 9, "a second run|expected one"),
    "a cell of another run": (put(CELL, "evaluation_id", value="ef" * 16), 2, "a cell of run efefefef"),
    "an empty file": (lambda lines: lines.clear(), 1, "no run"),
    "a line of two megabytes": (put(CELL, "reason", value="a" * 2 * MAX_LINE), 2, f"more than {MAX_LINE} bytes on a line"),
    "too many lines": (lambda lines: lines.extend([lines[1]] * MAX_LINES), MAX_LINES + 1, f"more than {MAX_LINES} lines"),
    "a million lines": (lambda lines: lines.extend([b""] * 1_000_000), 110, "100 bad lines; the rest was not read"),
    # not the arithmetic
    "more right answers than there are": (
        put(CELL, "successes", value=2),
        2,
        "successes: found 2; computed from the rest of the file, it is 3",
    ),
    "a better score": (
        put(7, "score_details", "score", value=1.0),
        7,
        "score_details.score: found 1.0; computed from the rest of the file, it is 0.66",
    ),
    "a count of its own": (put(CELL, "n", value=100), 2, "n: found 100; computed from the rest of the file, it is 3"),
    "a narrower interval": (
        put(CELL, "score_details", "uncertainty", "confidence_interval", "lower", value=0.99),
        2,
        "confidence_interval.lower: found 0.99",
    ),
    "kinds of miss that are none": (put(CELL, "misses", value={"<script>": 3}), 2, "misses"),
    "another mean": (put(CELL, "mean_log_likelihood", value=-0.0001), 2, "mean_log_likelihood: found -0.0001"),
    "another multiple": (put(CELL, "multiple", value=8.0), 2, "multiple: found 8.0; computed from the rest of the file, it is 0.5"),
    "a score of what was not measured": (
        put(8, "score_details", value={"score": 1.0, "uncertainty": {"confidence_interval": None, "num_samples": 3}}),
        8,
        "score_details",
    ),
    "prompts of what was not measured": (
        edit(CELL, lambda cell: cell.update(outcome="hard_limit")),
        2,
        "3 prompts of a cell that is hard_limit",
    ),
    "nothing, measured": (
        edit(CELL, lambda cell: cell.update(prompts=[], n=0, successes=None, mean_log_likelihood=None, score_details=None)),
        2,
        "measured without a prompt",
    ),
    "a prompt that was cut": (put(CELL, "prompts", 0, 4, value=64), 2, "a prompt of 64 tokens; expected 128"),
    "a prompt that is too long for its cell": (put(CELL, "prompts", 0, 4, value=640), 2, "a prompt of 640 tokens; expected 128"),
    "log-likelihoods without a sum": (
        edit(CELL, lambda cell: [prompt.insert(2, [prompt.pop(2), -1.7e308][1]) for prompt in cell["prompts"]]),
        2,
        "log-likelihoods of which no sum is finite",
    ),
    "a day that no calendar has": (put(1, "evaluation_timestamp", value="2025-99-99T10:00:00Z"), 1, "which no calendar has"),
    "a sample twice": (put(CELL, "prompts", 0, 0, value=1), 2, "a sample stands there twice"),
    "a cell twice": (lambda lines: lines.append(lines[1]), 10, "the same cell as on line 2"),
    "a cell of no task": (put(CELL, "evaluation_name", value="hellaswag"), 2, "a cell of hellaswag, which is no task of the run"),
    "a cell under another name": (put(CELL, "evaluation_result_id", value="ab" * 16), 2, "evaluation_result_id: found"),
    "a cell left out": (lambda lines: lines.pop(6), 1, "prompts_fingerprint: found"),
    "other prompts": (put(CELL, "prompts", 0, 5, value="ab" * 8), 1, "prompts_fingerprint: found"),
    "a better curve": (
        put(1, "tasks", 0, "curve", "points", 2, "score_details", "score", value=1.0),
        1,
        r"curve.points\[2\].score_details.score",
    ),
    "a longer effective length": (
        put(1, "tasks", 0, "curve", "effective_lengths", 0, "tokens", value=10**9),
        1,
        "effective_lengths",
    ),
    "another model's weights": (put(1, "model_info", "weights_fingerprint", value="cd" * 32), 1, "evaluation_id: found"),
    "another developer": (put(1, "model_info", "developer", value="openlab"), 1, "model_info.developer: found .openlab."),
    "another override": (put(1, "override", "method", value="magic"), 1, "override.fingerprint: found"),
    "a shorter trained length": (put(1, "trained_length", "tokens", value=64), 1, "64 .* and the config says 256"),
    "a run that is to come": (put(1, "evaluation_timestamp", value="2999-01-01T00:00:00Z"), 1, "which is to come"),
    "a task twice": (edit(1, lambda run: run["tasks"].append(run["tasks"][0])), 1, "expected each once"),
    "a certainty above 1": (put(CELL, "prompts", 0, 2, value=3.0), 2, "a log-likelihood of 3.0; expected at most 0"),
    "a table without end": (
        edit(CELL, lambda cell: cell.update(prompts=[[n, "exact", None, 5, 128, "ab" * 8] for n in range(10_000)])),
        2,
        "n: found 3",
    ),
}
"""What is wrong → (how the lines of a good file are changed, the line that is named, what is said of it)."""


def write_broken(folder: Path, name: str, *, lines: Sequence[bytes] | None = None) -> str:
    """Writes a good file broken as `BROKEN` says, under a name with the right hash; returns its name."""
    change = BROKEN[name][0]
    found = list(lines or to_bytes(make_good()).splitlines())
    change(found)
    content = b"".join(line + b"\n" for line in found)
    file = f"lab__tiny/none-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    (folder / "lab__tiny").mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content)
    return file


def write_sparse(file: Path, size: int) -> None:
    """A file of zeros that takes no room: a line without end."""
    with file.open("wb") as opened:
        os.truncate(opened.fileno(), size)


__all__ = ["BROKEN", "MAX_FILE", "SCRIPTS", "make_corpus", "make_good", "settle", "write_broken", "write_sparse"]
