"""A causal model run over a schedule: chunk by chunk, on what it has read already, with logits only where they are scored."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness_ext import placement
from harness_ext.model_view import first_line
from harness_ext.models import last_layer, memory
from harness_ext.models.prefix_tree import Read, Step
from harness_ext.models.state import State

log = logging.getLogger(__name__)

SCORES = 2**26
"""Logits held at a time, in float32: 256 MB."""
Found = TypeVar("Found")
SMALLEST_CHUNK = 64
"""Tokens; where a chunk of so many does not fit, none does."""


class Forward:
    """A model's forward, for a chunk of tokens, on a state."""

    def __init__(self, model: Any, device: torch.device, autocast: torch.dtype | None = None) -> None:
        self.model, self.device, self.autocast = model, device, autocast
        self._parameters = inspect.signature(model.forward).parameters
        try:
            self._head = model.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            self._head = None
        size = getattr(self._head, "weight", None)
        self.vocabulary = int(size.shape[0] if isinstance(size, Tensor) else getattr(self._head, "out_features", 2**16))
        floating = (weight.dtype for weight in model.parameters() if weight.is_floating_point())
        self.dtype = autocast or next(floating, torch.float32)
        """What it computes in."""
        self.takes_positions = "position_ids" in self._parameters
        self.picks: bool | None = None
        """Whether the output layer may be given the columns alone that are wanted; None, and it is, until that was tried (`self_check.check_output`)."""
        self._asked = _Asked()
        if self._head is not None:
            self._head.register_forward_pre_hook(self._pick)

    def __call__(self, tokens: Tensor, state: State | None, wanted: Sequence[int], positions: Tensor | None = None) -> Tensor:
        """Logits (rows, wanted, vocabulary) at the columns `wanted` of tokens (rows, columns), read on top of `state`.

        The output layer is given those columns only, unless `picks` is False. It is applied position by position, so the logits are the same; what is
        saved is tokens × vocabulary floats, most of the memory of a long prompt.
        """
        given: dict[str, Any] = state.arguments() if state is not None else {"use_cache": False}
        if "use_cache" not in self._parameters:
            given.pop("use_cache")
        if positions is not None:
            given["position_ids"] = positions.to(self.device)
            if state is None and "attention_mask" in self._parameters:  # or a jump would be taken for the end of a packed sequence
                given["attention_mask"] = torch.ones_like(tokens, device=self.device)
        rows, count = tokens.shape
        columns = torch.tensor(list(wanted) or [count - 1])
        self._asked.columns, self._asked.shape, self._asked.picked = columns, (rows, count), False
        last = state.attentions if state is not None else 0
        try:
            with (
                contextlib.nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast),
                last_layer.cut_short(last, count, min(wanted, default=count)),
            ):
                output = self.model(tokens.to(self.device, non_blocking=True), **given)
        except last_layer.ForwardEndedError:
            return torch.empty(rows, 0, self.vocabulary)
        finally:
            self._asked.columns = None
        if state is not None:
            state.take(output)
        logits: Tensor = output.logits
        if self._asked.picked:
            return logits
        before = logits.shape[1] - count  # the tokens that prompt tuning puts in front
        return logits[:, (columns + before).to(logits.device)]

    def _pick(self, _: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What the output layer is given in place of all columns. Nothing is changed where they are laid out in a way of their own."""
        columns = self._asked.columns
        if self.picks is False or columns is None or not args or tuple(args[0].shape[:2]) != self._asked.shape:
            return None
        self._asked.picked = True
        return (args[0][:, columns.to(args[0].device, non_blocking=True)], *args[1:])


class _Asked(threading.local):
    """What the forward that runs in a thread was asked for: its columns, and the shape of its tokens."""

    columns: Tensor | None = None
    shape: tuple[int, ...] = ()
    picked = False
    """Whether the output layer was given those columns alone."""


class Run:
    """The steps of a schedule, run in their order on one state, and what they score.

    `sequences`: the tokens of each request (`placement`: with their positions); the last one is scored, or generated from, and never read. `make`: a fresh state, or
    None for a model that can go on from nothing: then every step is read whole. `progress`: told (start, stop, rows) of each
    chunk that was read. `watch`: around each forward, given what of it is scored, (position, row, sequence, …), its first position and tokens.
    """

    def __init__(
        self,
        forward: Forward,
        sequences: Sequence[Sequence[int]],
        make: Callable[[], State] | None,
        chunk: int,
        progress: Callable[[int, int, int], None] = lambda start, stop, rows: None,
        watch: Callable[[np.ndarray, int, int], contextlib.AbstractContextManager[None]] | None = None,
    ) -> None:
        self.forward, self.make, self.chunk, self.progress = forward, make, chunk, progress
        self.watch = watch or (lambda places, start, tokens: contextlib.nullcontext())
        self.sequences: list[Any] = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        self.done = 0
        """Position up to which the last step was read."""
        self._limit = max(1, SCORES // forward.vocabulary)
        self._likelihoods = self._misses = torch.zeros(len(sequences))
        self.forget()

    def answers(self) -> list[tuple[float, bool]]:
        """(log-likelihood, whether every token is the most likely) of each sequence, as far as its steps have been run."""
        return list(zip(self._likelihoods.tolist(), (self._misses == 0).tolist(), strict=True))

    @torch.inference_mode()
    def branch(self) -> Run:
        """Another run of the same sequences, on a copy of what this one holds, to be run beside it in a thread of its own."""
        other = Run(self.forward, self.sequences, self.make, self.chunk, self.progress, self.watch)
        if self._state is not None:
            other._state, other._held = self._state.copied(), self._held
        return other

    def absorb(self, other: Run) -> None:
        """Adds what another run of the same sequences has scored."""
        self._likelihoods, self._misses = self._likelihoods + other._likelihoods, self._misses + other._misses
        self.chunk = min(self.chunk, other.chunk)

    def forget(self) -> None:
        """Drops everything that is held; a later step reads it again."""
        self._state: State | None = None
        self._held = np.empty(0, dtype=np.int64)
        self._kept = 0
        """Tokens of the row that is read, held although memory ran out while it was."""
        self._aside: dict[int, tuple[State, np.ndarray]] = {}

    def needs(self, rows: int) -> int:
        """Tokens, all rows together, that were to be held when the last step stopped."""
        return rows * (self.done + SMALLEST_CHUNK)

    @torch.inference_mode()
    def run(self, step: Step) -> None:
        """One step. Where memory runs out, in smaller chunks; raises what the allocator raises where the smallest does not fit."""
        if self.make is None or len(step.rows) > 1:
            self._run(step)
        else:
            self._in_chunks_that_fit(functools.partial(self._run, step))

    @torch.inference_mode()
    def hold(self, step: Step) -> State:
        """The state after all tokens of a step's rows but the last of each, for something else to go on from; then `leave` it."""
        return self._in_chunks_that_fit(functools.partial(self._hold, step))

    def _hold(self, step: Step) -> State:
        state = self._enter(step)
        self.done = stop = step.stop - 1
        if len(step.rows) == 1:
            self._read_row(step.rows[0], stop, ())
            assert self._state is not None
            return self._state
        several = (state.forked if stop - step.start <= self.chunk else state.copied)(len(step.rows))
        self._read(several, step.rows, step.start, stop, ())
        return several

    def leave(self) -> None:
        """What `hold` gave was gone on from: back to what was read, where that is possible."""
        if self._state is not None and self._state.cuts:
            self._state.keep(len(self._held))
        else:
            self._state, self._held = None, self._held[:0]

    def _in_chunks_that_fit(self, read: Callable[[], Found]) -> Found:
        self._kept = 0
        while True:
            try:
                return read()
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out(error) or self.chunk <= SMALLEST_CHUNK:
                    self.forget()
                    raise
                said = first_line(error)
            self.chunk = max(SMALLEST_CHUNK, self.chunk // 2)
            log.warning(
                "a chunk does not fit after token %d: %d tokens at a time from here on (%s)", len(self._held), self.chunk, said
            )
            if self._state is not None and self._state.cuts:
                self._state.keep(len(self._held))
                self._kept = len(self._held)
            else:
                self.forget()
            memory.free()

    def _run(self, step: Step) -> None:
        if self.make is None:
            self._read(None, step.rows, 0, step.stop, step.reads)
            return
        state = self._enter(step)
        if len(step.rows) == 1:
            self._read_row(step.rows[0], step.stop, step.reads)
        elif step.start:
            several = (state.forked if step.stop - step.start <= self.chunk else state.copied)(len(step.rows))
            self._read(several, step.rows, step.start, step.stop, step.reads)
        else:
            self._read(None if step.stop <= self.chunk else self.make(), step.rows, 0, step.stop, step.reads)

    def _enter(self, step: Step) -> State:
        """The state after the first `start` tokens of a step, which is all that it holds."""
        if step.resume and step.start in self._aside:
            self._state, self._held = self._aside.pop(step.start)
        self._go_back_to(self.sequences[step.rows[0]][: max(step.start, self._kept)])
        self._read_row(step.rows[0], step.start, ())
        assert self._state is not None
        if step.copy:
            self._aside[step.start] = (self._state, self._held)
            self._state = self._state.copied()
        return self._state

    def _go_back_to(self, prefix: np.ndarray) -> None:
        """Leaves in the state what it holds of `prefix`, verified token by token."""
        length = min(len(self._held), len(prefix))
        differ = self._held[:length] != prefix[:length]
        common = int(differ.argmax()) if differ.any() else length
        if self._state is not None and self._state.cuts:
            if common < len(self._held):
                self._state.keep(common)
            self._held = self._held[:common]
        elif self._state is None or common < len(self._held):
            assert self.make is not None
            self._state, self._held = self.make(), self._held[:0]

    def _read_row(self, sequence: int, stop: int, reads: Sequence[Read]) -> None:
        """Reads a sequence on, from what the state holds of it to `stop`."""
        if len(self._held) < stop:
            self._read(self._state, (sequence,), len(self._held), stop, reads, held=True)

    def _read(
        self, state: State | None, rows: Sequence[int], start: int, stop: int, reads: Sequence[Read], *, held: bool = False
    ) -> None:
        """Reads tokens [start, stop) of `rows`, padded on the right, where a causal model's tokens do not see it; scores `reads`.

        `held`: the state is the run's own; if memory runs out on the way, what was read until then is known.
        """
        places = np.concatenate([np.empty((0, 4), np.int64), *map(self._list_places, reads)])
        places = places[places[:, 0] >= self.done]
        places = places[places[:, 0].argsort(kind="stable")]
        scored = np.unique(places[:, 0])
        while start < stop:
            end = stop if state is None else self._end_chunk(start, stop, len(rows), scored)
            more = 0
            if state is not None and not state.alone:
                end = end_alone_nowhere(start, end, stop)
                more = int(end - start == 1)  # nothing goes on from it: the token after it is read, too
            part = places[slice(*places[:, 0].searchsorted([start, end]))]
            columns, which = np.unique(part[:, 0], return_inverse=True)
            tokens = np.zeros((len(rows), end - start + more), dtype=np.int64)
            for row, sequence in enumerate(rows):
                read = self.sequences[sequence][: None if more else -1][start : end + more]
                tokens[row, : len(read)] = read
            positions = placement.read_positions(tokens, start)
            with self.watch(part, start, tokens.shape[1]):
                logits = self.forward(
                    torch.from_numpy(placement.read_ids(tokens)),
                    state,
                    (columns - start).tolist(),
                    None if positions is None else torch.from_numpy(positions),
                )
            if len(part):
                self._score(logits, which, part)
            self.done = max(self.done, end)
            if held:
                self._held = self.sequences[rows[0]][: end + more]
            self.progress(start, end, len(rows))
            start = end

    def _end_chunk(self, start: int, stop: int, rows: int, scored: np.ndarray) -> int:
        """Where the chunk of [start, stop) ends that begins at `start`. `scored`: positions, in order, of whose logits no more than fit are held."""
        end = min(start + self.chunk, stop)
        first, after = scored.searchsorted([start, end])
        most = max(1, self._limit // rows)
        return end if after - first <= most else int(scored[first + most - 1]) + 1

    def _list_places(self, read: Read) -> np.ndarray:
        """(position, row, sequence, token that comes next) of each position to score."""
        places = np.arange(read.start, read.stop)
        same = np.ones_like(places)
        following = placement.read_ids(self.sequences[read.sequence][read.start + 1 : read.stop + 1])
        return np.stack([places, read.row * same, read.sequence * same, following], axis=1)

    def _score(self, logits: Tensor, columns: np.ndarray, places: np.ndarray) -> None:
        """Adds what `places` say of logits (rows, columns, vocabulary), in float32. Nothing is waited for: the sums stay on the device."""
        if self._likelihoods.device != logits.device:
            self._likelihoods, self._misses = self._likelihoods.to(logits.device), self._misses.to(logits.device)
        for start in range(0, len(places), self._limit):
            block = slice(start, start + self._limit)
            column, row, sequence, target = (
                torch.from_numpy(values[block]).to(logits.device, non_blocking=True)
                for values in (columns, *np.ascontiguousarray(places[:, 1:].T))
            )
            scores = F.log_softmax(logits[row, column].float(), dim=-1)
            self._likelihoods = self._likelihoods.index_add(0, sequence, scores.gather(1, target[:, None])[:, 0])
            self._misses = self._misses.index_add(0, sequence, (scores.argmax(-1) != target).float())


def end_alone_nowhere(start: int, end: int, stop: int) -> int:
    """`end`, moved so that neither [start, end) nor [end, stop) is one token, unless [start, stop) is.

    >>> end_alone_nowhere(0, 64, 65), end_alone_nowhere(0, 64, 66), end_alone_nowhere(0, 1, 3), end_alone_nowhere(0, 1, 1)
    (63, 64, 3, 1)
    """
    if stop - end == 1:
        end -= 1
    return end if end - start > 1 else min(stop, start + (3 if stop - start == 3 else 2))
