"""How much attention the last token of a prompt, from which the answer's first is predicted, pays to the needle and to what else there is.

One row of attention a layer, softmax(q·Kᵀ) for that one query, is computed beside the model's own attention and from what that is given,
so that nothing as large as tokens × tokens is ever held, and no answer changes. Each row is checked: it times the values has to be what
the model's attention put out for that token. Where it is not (a mask, a bias or an extension that is not known here), or where a family
does not call transformers' attention interface, nothing is said of the model but why.

Spans (Xiao et al., arXiv 2309.17453, for the first few tokens, "attention sinks"): the needle, the first `SINKS` tokens, the question up to
that token, and the rest. The entropy of the row says over how many tokens it is spread (their effective number is its exponential).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from harness_ext.models.pieces import SHARED
from harness_ext.positions import read_schemes

SINKS = 4
"""Tokens at the beginning (arXiv 2309.17453, §3)."""
SPANS = ("sinks", "needle", "question", "rest")
"""Each token of a prompt is in one of them."""
KEYS = 2**16
"""Keys that are held in float32 at a time."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far a row times the values may be from what the attention put out, times the largest of that; COARSE in lower precision."""
COARSE = 0.05
DIGITS = 4

Reading = Callable[[np.ndarray, int, int], contextlib.AbstractContextManager[None]]
"""Around a forward, that reads `(position, row, sequence, …)` of what is scored, from a first token on, so many tokens."""


class UnseenError(Exception):
    """What a row of attention is made of is not known here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be watched in a prompt."""

    task: str
    arm: str
    length: int
    needle: tuple[tuple[int, int], ...]
    """Its tokens: first, and the one after the last; of each, where there are several."""
    question: int
    """Its first token."""

    @property
    def place(self) -> tuple[str, str, int]:
        return self.task, self.arm, self.length


@dataclass(slots=True)
class Cell:
    """The prompts of one task, arm and length."""

    asked: int = 0
    """Prompts that were to be watched."""
    prompts: int = 0
    """Those that were: answers that an interrupted run had left are not computed again."""
    tokens: Tensor = field(default_factory=lambda: torch.zeros(len(SPANS), dtype=torch.float64))
    """In each span, summed over prompts."""
    layers: list[Tensor] = field(default_factory=list)
    """Of each layer (heads, spans and entropy), summed over prompts."""

    def add(self, other: Cell) -> None:
        """Adds the prompts of another."""
        self.asked, self.prompts, self.tokens = self.asked + other.asked, self.prompts + other.prompts, self.tokens + other.tokens
        if other.layers:
            own = self.layers or [torch.zeros_like(layer) for layer in other.layers]
            self.layers = [one + two for one, two in zip(own, other.layers, strict=True)]


@dataclass(slots=True)
class Seen:
    """What one process saw."""

    why_not: str = ""
    """Why nothing can be said; empty where something can."""
    layers: list[int] = field(default_factory=list)
    """Their numbers in the model."""
    cells: dict[tuple[str, str, int], Cell] = field(default_factory=dict)


@dataclass(slots=True)
class Point:
    """A token whose rows are read."""

    row: int
    """Of the batch."""
    index: int
    """In its prompt."""
    rows: list[tuple[Tensor, int]] = field(default_factory=list)
    """Of each layer so far: (heads, keys), and the index of the first key."""


class Watcher:
    """What a model's questions attend to, prompt after prompt."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.asked: list[Asked | None] = []
        """Of the prompts that are being scored, what is to be watched."""
        self._own: Callable[..., Any] | None = None
        self._standing: dict[int, Callable[..., Any]] = {}
        """What threads have standing before the model's own attention function."""
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Drops what was seen, for an evaluation to begin."""
        self.seen = Seen()
        schemes = read_schemes(self.model.config, self.model)
        if "memory" in schemes:
            self.seen.why_not = "it attends to slots of a memory, which are no tokens"
        if schemes == ("recurrent",):
            self.seen.why_not = "it has no attention"

    @contextlib.contextmanager
    def asking(self, requests: Sequence[Any]) -> Iterator[None]:
        """Around the scoring of lm_eval's `requests`: those whose record says what to `watch`, each once."""
        known: set[int] = set()
        for request in requests:
            given = None if id(request) in known else (request.doc or {}).get("watch")
            known.add(id(request))  # to have as many as others, a process may be given its last one again
            self.asked.append(_read_asked(request.task_name, given) if given else None)
        try:
            yield
        finally:
            self.asked = []

    def watch(self, asked: Sequence[Asked | None], indices: Sequence[int], starts: Sequence[int]) -> Reading | None:
        """What goes around the forwards that read prompts `indices`, which become sequences 0, 1, …; `starts`: of each prompt's answer."""
        wanted = {sequence: (starts[index] - 1, one) for sequence, index in enumerate(indices) if asked and (one := asked[index])}
        for _, one in wanted.values():
            self.seen.cells.setdefault(one.place, Cell()).asked += 1
        return functools.partial(self._around, wanted) if wanted else None

    @contextlib.contextmanager
    def _around(self, wanted: dict[int, tuple[int, Asked]], places: np.ndarray, start: int, tokens: int) -> Iterator[None]:
        """Around one forward over `tokens` tokens from index `start` on; what fails is not counted, and what is counted no longer wanted."""
        points: dict[tuple[int, int], Point] = {}
        sequences = {}
        for index, row, sequence in places[:, :3].tolist():
            if sequence in wanted and wanted[sequence][0] == index:
                sequences[sequence] = points.setdefault((row, index), Point(row, index))
        if not points or self.seen.why_not:
            yield
            return
        with self._standing_in(functools.partial(self._stand_before, points=[*points.values()], start=start, tokens=tokens)):
            yield
        with self._lock:
            for sequence, point in sequences.items():
                self._count(wanted.pop(sequence)[1], point)

    @contextlib.contextmanager
    def _standing_in(self, stand_before: Callable[[Callable[..., Any] | None], Callable[..., Any]]) -> Iterator[None]:
        """Within it, this thread's forwards attend by what `stand_before` makes of the model's attention function; other threads' as ever."""
        name = getattr(self.model, "_harness_ext_attention", None) or self.model.config._attn_implementation  # under an extension
        thread = threading.get_ident()
        with self._lock:
            if not self._standing:
                self._own = ALL_ATTENTION_FUNCTIONS.get(name)
                ALL_ATTENTION_FUNCTIONS[name] = self._attend
            self._standing[thread] = stand_before(self._own)
        try:
            yield
        finally:
            with self._lock:
                del self._standing[thread]
                if not self._standing:
                    del ALL_ATTENTION_FUNCTIONS[name]

    def _attend(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The attention of whoever's forward it is; the model's own, eager where it has none."""
        given = self._standing.get(threading.get_ident()) or self._own or inspect.getmodule(type(module)).eager_attention_forward  # type: ignore[union-attr]
        return given(module, *args, **kwargs)

    def _stand_before(
        self, own: Callable[..., Any] | None, *, points: Sequence[Point], start: int, tokens: int
    ) -> Callable[..., tuple[Tensor, Any]]:
        """The attention function `own`, eager where there is none, that reads rows of `points` beside what it does."""
        read: dict[int, int] = {}
        layers: list[int] = []

        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Any]:
            """`own`'s answer, whose rows at the points are kept."""
            given: Any = own or inspect.getmodule(type(module)).eager_attention_forward  # type: ignore[union-attr]
            answer: tuple[Tensor, Any] = given(module, query, key, value, mask, *args, **kwargs)
            if self.seen.why_not:
                return answer
            # Queries may come in blocks, and a layer's module may serve several layers.
            before = read.get(id(module), 0) % tokens
            read[id(module)] = before + query.shape[2]
            if before == 0:
                layers.append(getattr(module, "layer_idx", len(layers)))
                self.seen.layers = layers if len(set(layers)) == len(layers) else [*range(len(layers))]
            for point in points:
                column = point.index - start - before
                if 0 <= column < query.shape[2]:
                    end = start + before + query.shape[2]
                    try:
                        with torch.autocast(query.device.type, enabled=False):
                            point.rows.append(read_row(point.row, column, end, query, key, value, mask, answer[0], *args, **kwargs))
                    except UnseenError as error:
                        self.seen.why_not = f"{type(module).__name__}: {error}"
            return answer

        return attend

    def _count(self, asked: Asked, point: Point) -> None:
        """Adds the rows of a prompt's last token, one a layer, to its cell's."""
        cell = self.seen.cells[asked.place]
        if not self.seen.why_not and not point.rows:
            self.seen.why_not = (
                "its attention, as it is now, is not called through transformers' attention interface, where it is looked at"
            )
        if not self.seen.why_not and cell.layers and len(cell.layers) != len(point.rows):
            self.seen.why_not = f"{len(point.rows)} layers attended, and {len(cell.layers)} did for another prompt"
        if self.seen.why_not:
            return
        which = assign(point.index + 1, asked.needle, asked.question)
        layers = []
        for weights, first in point.rows:
            own = which[first : first + weights.shape[1]].to(weights.device)
            shares = weights.new_zeros(len(weights), len(SPANS)).index_add_(1, own, weights[:, : len(own)])
            layers.append(torch.cat([shares, torch.special.entr(weights).sum(-1, keepdim=True)], dim=-1).cpu().double())
        cell.add(Cell(prompts=1, tokens=torch.bincount(which, minlength=len(SPANS)).double(), layers=layers))


def assign(tokens: int, needle: Sequence[Sequence[int]], question: int) -> Tensor:
    """(tokens,): which of `SPANS` each token is in. A needle among the first tokens is the needle.

    >>> assign(9, [[2, 4]], 7).tolist()
    [0, 0, 1, 1, 3, 3, 3, 2, 2]
    """
    which = torch.full((tokens,), SPANS.index("rest"))
    which[question:] = SPANS.index("question")
    which[:SINKS] = SPANS.index("sinks")
    for start, stop in needle:
        which[start:stop] = SPANS.index("needle")
    return which


def read_row(
    row: int,
    column: int,
    end: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    output: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_bias: Any = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, int]:
    """The attention weights (heads, keys), in float32, of one query of an attention function's arguments, and the index of the first key.

    `end`: the index after the last query's, which is the last key's too. `output` (rows, tokens, heads, head_dim): what the function
    put out. Raises UnseenError where the weights do not give that.
    """
    keys, values = (_list_blocks(states, row) for states in (key, value))
    heads, width, count = query.shape[1], query.shape[-1], sum(block.shape[1] for block in keys)
    if heads % len(keys[0]):
        raise UnseenError(f"{heads} heads of queries, and {len(keys[0])} of keys")
    groups = query[row, :, column].float().reshape(len(keys[0]), -1, width)
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.cat([groups @ block.float().mT for block in keys], dim=-1).reshape(heads, count) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(count - 1, -1, -1, device=scores.device) - (query.shape[2] - 1 - column)
    allowed = distance >= 0
    if mask is None and sliding_window:
        allowed = allowed & (distance < sliding_window)
    for given in (mask, position_bias):
        if given is not None:
            part = _take(given, row, column, count)
            scores, allowed = (scores, allowed & part) if part.dtype == torch.bool else (scores + part.float(), allowed)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if s_aux is not None:  # a learned sink, which is no token
        scores = torch.cat([scores, s_aux.float().reshape(heads, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[:, :count]
    places = itertools.pairwise([0, *itertools.accumulate(block.shape[1] for block in values)])
    shares = weights.reshape(len(values[0]), -1, count)
    seen = torch.stack([shares[..., slice(*place)] @ block.float() for place, block in zip(places, values, strict=True)]).sum(0)
    off = float((seen.flatten(0, 1) - output[row, column].float()).abs().max() / output[row].float().abs().max().clamp(min=1e-30))
    if not off <= TOLERANCE.get(output.dtype, COARSE):
        raise UnseenError(f"what it puts out is not what softmax(q·Kᵀ) gives, by {off:.2g} of the largest value")
    return weights, end - count


def _list_blocks(states: Tensor, row: int) -> list[Tensor]:
    """Keys or values of a row, (key heads, tokens, head_dim) each, in their order; what rows begin with is held once for all."""
    shared = getattr(states, SHARED, None)
    parts = [*([shared[0]] if shared is not None else []), states[row]]
    return [part[:, start : start + KEYS] for part in parts for start in range(0, part.shape[1], KEYS)]


def _take(given: Any, row: int, column: int, keys: int) -> Tensor:
    """What a mask or bias (rows or 1, heads or 1, queries or 1, keys) says of a query: (heads or 1, keys)."""
    if not isinstance(given, Tensor) or given.ndim != 4 or given.shape[-1] < keys:
        raise UnseenError(f"its mask is a {type(given).__name__} of shape {list(getattr(given, 'shape', []))}")
    return given[row if len(given) > 1 else 0, :, column if given.shape[2] > 1 else 0, :keys]


def describe(parts: Sequence[Seen]) -> dict[str, Any]:
    """For the results file, of what each process saw: means over prompts, by task, arm, length, layer and head; nothing where nothing was asked.

    The heads of a layer are one string, since lm_eval gives each number of a list a line of its file.
    """
    if not any(part.cells for part in parts):
        return {}
    why_not = next((part.why_not for part in parts if part.why_not), "")
    found: dict[str, Any] = {"outcome": "not_seen" if why_not else "measured", "reason": why_not}
    if not why_not:
        cells: dict[tuple[str, str, int], Cell] = {}
        for place, cell in sorted((item for part in parts for item in part.cells.items()), key=lambda item: item[0]):
            cells.setdefault(place, Cell()).add(cell)
        found |= {"first_tokens": SINKS, "layers": next((part.layers for part in parts if part.layers), [])}
        found["cells"] = [_describe_cell(*place, cell) for place, cell in cells.items()]
    return {"attention": found}


def _describe_cell(task: str, arm: str, length: int, cell: Cell) -> dict[str, Any]:
    place = {"task": task, "arm": arm, "length": length, "asked": cell.asked, "prompts": cell.prompts}
    if not cell.prompts:
        return place
    by_span = {
        name: [" ".join(f"{share:.{DIGITS}f}" for share in (layer[:, number] / cell.prompts).tolist()) for layer in cell.layers]
        for number, name in enumerate((*SPANS, "entropy"))
    }
    tokens = dict(zip(SPANS, (round(count, 1) for count in (cell.tokens / cell.prompts).tolist()), strict=True))
    return {**place, "tokens": tokens, **by_span}


def _read_asked(task: str | None, given: Mapping[str, Any]) -> Asked:
    needle = tuple((start, stop) for start, stop in given["needle"])
    return Asked(task=task or "", arm=given["arm"], length=given["length"], needle=needle, question=given["question"])
