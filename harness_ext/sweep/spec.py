"""A task as its YAML file states it, checked field by field: the only place that knows what may stand in such a file."""

from __future__ import annotations

import dataclasses
import difflib
import math
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harness_ext.errors import TaskFileError
from harness_ext.sweep.values import parse_kind

HOST_FIELDS = frozenset({"task", "class", "tag", "task_alias", "metadata"})
"""Fields of the YAML file that lm_eval reads."""
RUN_FIELDS = ("multiples", "lengths", "depths", "buckets", "samples", "seed", "haystack", "controls", "arms", "attention")
"""Fields that `--metadata` may change for one run, in the tasks that have them."""
MODEL_FIELDS = ("trained_length", "tokenizer")
"""Others there, which say what is known of the model (`model_view`)."""
ARMS = ("long", "stretched", "packed", "shifted", "emptied", "packed_emptied", "other_text", "distractors")
"""Of an experiment on why a score falls; see `arms`."""
MULTIPLES = (0.5, 1, 2, 4, 8)
"""Of the trained length, where a task says nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """One task. Every field but `task`, `needle` and `question` has a default."""

    task: str
    """The name lm_eval knows it by."""
    needle: str
    """The sentence to hide: `{value}` and, where several keys are told apart, `{key}`."""
    question: str
    """Comes last. `{key}` becomes the key, or the keys, asked for."""
    answer_prefix: str = ""
    """The beginning of the answer, given to the model (not in a generated chat answer, where the model begins itself)."""
    description: str = ""
    """Comes first: what the model is told to do."""
    value: str = "digits:7"
    """What is hidden: `digits:N`, `words:N` or `uuid`."""
    keys: int = 1
    """Distinct keys in the document; those not asked for distract."""
    values: int = 1
    """Values for each key."""
    queries: int = 1
    """Keys asked for, at most `keys`."""
    every_depth: bool = False
    """A needle with a key of its own stands at each of `depths`, in every prompt; the prompt of a depth asks for the one there."""
    inline: bool = True
    """Needles stand inside the running text; false: each on a line of its own."""
    haystack: str | dict[str, Any] = "text"
    """`noise`, `text`, `needles`, a text file's path, or {"dataset": name, "column": name}."""
    multiples: tuple[float, ...] = MULTIPLES
    """Lengths as multiples of the model's trained length."""
    lengths: tuple[int, ...] = ()
    """Lengths in tokens; used instead of `multiples` where given."""
    depths: tuple[float, ...] = tuple(i / 9 for i in range(10))
    """Where the needle stands: 0 before all filler, 1 after it. A number N in YAML means N depths from 0 to 1."""
    samples: int = 10
    """Prompts for each length and depth."""
    seed: int = 0
    """Changes every draw."""
    output_type: Literal["loglikelihood", "generate_until"] = "loglikelihood"
    """`loglikelihood`: the answer's log-likelihood and greedy match from one forward. `generate_until`: free generation."""
    max_gen_toks: int = 32
    """Tokens kept free for a generated answer, and part of the prompt's length."""
    score: Literal["retrieval", "copy"] = "retrieval"
    """How a generated answer is compared; see `scoring`."""
    controls: bool = False
    """Whether prompts are run beside the sweep that its scores are to be held against; see `controls`."""
    arms: tuple[str, ...] = ()
    """Arms of the experiment on why the score falls, in place of the sweep, which is `long` among them; see `arms`."""
    attention: bool = False
    """Whether it is looked at what the question attends to, where the model can tell; see `arms.WATCHED`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """A task that scores running text. Every field but `task` has a default."""

    task: str
    """The name lm_eval knows it by."""
    haystack: str | dict[str, Any] = "text"
    """`noise`, `text`, a text file's path, or {"dataset": name, "column": name}."""
    multiples: tuple[float, ...] = MULTIPLES
    """Lengths as multiples of the model's trained length."""
    lengths: tuple[int, ...] = ()
    """Lengths in tokens; used instead of `multiples` where given."""
    buckets: int = 32
    """Parts of the longest length that are scored apart; fewer where they would be too short (`buckets.plan_edges`)."""
    samples: int = 10
    """Documents."""
    seed: int = 0
    """Changes every draw."""


def parse_spec(config: Mapping[str, Any], *, file: str, overrides: Mapping[str, Any]) -> TaskSpec:
    """The task that `config` states, with `overrides` (from `--metadata`) laid over it.

    Raises TaskFileError that names the file, the field, what was found and what was expected.
    """
    spec = TaskSpec(**_read_fields(TaskSpec, ("task", "needle", "question"), config, file, overrides))
    _check_together(spec, file)
    return spec


def parse_loss_spec(config: Mapping[str, Any], *, file: str, overrides: Mapping[str, Any]) -> LossSpec:
    """As `parse_spec`, of a task that scores running text."""
    spec = LossSpec(**_read_fields(LossSpec, ("task",), config, file, overrides))
    for field in ("controls", "arms", "attention"):
        if overrides.get(field):
            raise TaskFileError(
                f"metadata: field {field!r}: found {overrides[field]!r}, but {spec.task} hides nothing; leave it out"
            )
    if spec.haystack == "needles":
        where = "metadata" if "haystack" in overrides else file
        raise TaskFileError(
            f"{where}: field 'haystack': found 'needles', which this task has none of; expected text, noise or a text"
        )
    return spec


def _read_fields(
    kind: type[Any], required: tuple[str, ...], config: Mapping[str, Any], file: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a `kind` of task, read and checked."""
    known = {field.name for field in dataclasses.fields(kind)}
    fields = {key: value for key, value in config.items() if key not in HOST_FIELDS - {"task"}}
    for key in fields:
        if key not in known:
            raise TaskFileError(f"{file}: unknown field {key!r}{_meant(key, known | HOST_FIELDS)}; known: {_list(known)}")
    for key in required:
        if key not in fields:
            raise TaskFileError(f"{file}: field {key!r} is missing; expected {_EXPECTED[key]}")
    chosen = {key: overrides[key] for key in RUN_FIELDS if key in overrides and key in known}
    for key in overrides:
        meant = difflib.get_close_matches(key, (*RUN_FIELDS, *MODEL_FIELDS), n=1, cutoff=0.85)
        if key not in (*RUN_FIELDS, *MODEL_FIELDS) and meant:
            raise TaskFileError(f"metadata: unknown field {key!r}; did you mean {meant[0]!r}?")
    if {"multiples", "lengths"} <= chosen.keys():
        raise TaskFileError("metadata: found both 'multiples' and 'lengths'; give one of them")
    if "multiples" in chosen:
        fields.pop("lengths", None)
    checked = {key: _check(key, value, file) for key, value in fields.items()}
    return checked | {key: _check(key, value, "metadata") for key, value in chosen.items()}


def _check(field: str, value: Any, where: str) -> Any:
    try:
        return _READ[field](value)
    except (ValueError, TypeError):
        raise TaskFileError(f"{where}: field {field!r}: found {value!r}; expected {_EXPECTED[field]}") from None


def _check_together(spec: TaskSpec, file: str) -> None:
    if spec.queries > spec.keys:
        raise TaskFileError(f"{file}: field 'queries': found {spec.queries}; expected at most keys, which is {spec.keys}")
    if spec.every_depth and (spec.keys, spec.values, spec.queries) != (1, 1, 1):
        field = next(name for name in ("keys", "values", "queries") if getattr(spec, name) != 1)
        raise TaskFileError(
            f"{file}: field {field!r}: found {getattr(spec, field)}; expected 1 beside every_depth, which gives each depth one key "
            "with one value"
        )
    if spec.every_depth and "{key}" not in spec.needle:
        raise TaskFileError(f"{file}: field 'needle': found no {{key}}; expected one, since every_depth is true")
    if spec.keys > 1 and "{key}" not in spec.needle:
        raise TaskFileError(f"{file}: field 'needle': found no {{key}}; expected one, since keys is {spec.keys}")
    for field, found in (("arms", list(spec.arms)), ("attention", spec.attention)):
        if found and spec.output_type != "loglikelihood":
            raise TaskFileError(
                f"{file}: field {field!r}: found {found} where answers are generated; expected a task that is scored"
            )
    if "{key}" in spec.needle and "{key}" not in spec.question:
        raise TaskFileError(f"{file}: field 'question': found no {{key}}; expected one, since the needle has one")


def _text(*, allowed: frozenset[str] = frozenset(), required: str = "", empty: bool = False) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not (value.strip() or empty):
            raise ValueError
        fields = [field for field in string.Formatter().parse(value) if field[1] is not None] if allowed else []
        names = {name for _, name, _, _ in fields}
        if names - allowed or (required and required not in names) or any(how or conversion for _, _, how, conversion in fields):
            raise ValueError
        return value.strip()

    return read


def _number(low: float, *, whole: bool = True) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ValueError
        if not math.isfinite(value) or value < low or (value == low and not whole):
            raise ValueError
        return value

    return read


def _several(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read_all(value: Any) -> tuple[Any, ...]:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if not items:
            raise ValueError
        return tuple(sorted({read(item) for item in items}))

    return read_all


def _arms(value: Any) -> tuple[str, ...]:
    asked = set(ARMS if value is True else () if value is False else [value] if isinstance(value, str) else value)
    if asked - set(ARMS):
        raise ValueError
    return tuple(arm for arm in ARMS if arm in asked)


def _depths(value: Any) -> tuple[float, ...]:
    if isinstance(value, int) and not isinstance(value, bool) and value > 1:
        return tuple(i / (value - 1) for i in range(value))

    def read(item: Any) -> float:
        if isinstance(item, bool) or not isinstance(item, (int, float)) or not 0 <= item <= 1:
            raise ValueError
        return float(item)

    return _several(read)(value)


def _one_of(*options: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in options:
            raise ValueError
        return str(value)

    return read


def _kind(value: Any) -> str:
    parse_kind(value if isinstance(value, str) else "")
    return str(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _haystack(value: Any) -> str | dict[str, Any]:
    if not isinstance(value, (str, dict)) or not value:
        raise ValueError
    return value


_READ: dict[str, Callable[[Any], Any]] = {
    "task": _text(),
    "needle": _text(allowed=frozenset({"key", "value"}), required="value"),
    "question": _text(allowed=frozenset({"key"})),
    "answer_prefix": _text(allowed=frozenset({"key"}), empty=True),
    "description": _text(empty=True),
    "value": _kind,
    "keys": _number(1),
    "values": _number(1),
    "queries": _number(1),
    "every_depth": _boolean,
    "inline": _boolean,
    "haystack": _haystack,
    "multiples": _several(_number(0, whole=False)),
    "lengths": _several(_number(1)),
    "depths": _depths,
    "buckets": _number(1),
    "samples": _number(1),
    "seed": _number(0),
    "output_type": _one_of("loglikelihood", "generate_until"),
    "max_gen_toks": _number(1),
    "score": _one_of("retrieval", "copy"),
    "controls": _boolean,
    "arms": _arms,
    "attention": _boolean,
}
_EXPECTED = {
    "task": "the task's name",
    "needle": "a sentence with {value} and, to tell several apart, {key}",
    "question": "text, with {key} where the needle has one",
    "answer_prefix": "text, with {key} where the needle has one",
    "description": "text",
    "value": "one of digits:N (N digits), words:N (N words), uuid",
    "keys": "a whole number from 1",
    "values": "a whole number from 1",
    "queries": "a whole number from 1",
    "every_depth": "true or false",
    "inline": "true or false",
    "haystack": 'noise, text, needles, the path of a text file, or {"dataset": name, "column": column}',
    "multiples": "numbers above 0, such as [0.5, 1, 2]",
    "lengths": "whole numbers of tokens from 1, such as [512, 1024]",
    "depths": "numbers from 0 to 1, such as [0, 0.5, 1], or how many of them, at least 2",
    "buckets": "a whole number from 1",
    "samples": "a whole number from 1",
    "seed": "a whole number from 0",
    "output_type": "loglikelihood or generate_until",
    "max_gen_toks": "a whole number from 1",
    "score": "retrieval or copy",
    "controls": "true or false",
    "arms": f"true for all, or some of {', '.join(ARMS)}",
    "attention": "true or false",
}


def _meant(key: str, known: set[str] | frozenset[str]) -> str:
    close = difflib.get_close_matches(key, sorted(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names))
