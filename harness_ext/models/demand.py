"""What reading costs on this device, in bytes and in seconds, from a few pieces that are read: some seconds of work.

Four pieces, a few tokens and a chunk, each on nothing and on a cache nearly as long as the longest prompt, are measured; the cost
of any other is read off the surface through them (`Surface`). A cache that long is not read but stretched, from a chunk that was:
what its keys and values are changes neither time nor memory. A state that cannot be stretched is read on for `PATIENCE` seconds.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from harness_ext.errors import ModelError
from harness_ext.model_view import first_line, resolve
from harness_ext.models import machine, memory, onednn
from harness_ext.models.forward import SCORES, Forward
from harness_ext.models.inspection import build_without_weights
from harness_ext.models.rounding import ERRORS
from harness_ext.models.side_by_side import run_threads
from harness_ext.models.state import BufferLayer, Copied, Cuttable, State

FEW = 8
"""Tokens of a small piece: an answer, or where prompts part."""
PATIENCE = 1.0
"""Seconds; a piece that takes so long is followed by no larger one, and none is measured again after so many in all."""
STEPS = 8
"""Tokens generated to measure a step."""
SLACK = {"cpu": (1.5, 8 * 2**20)}
"""Device → what the C library's allocator holds over what it was asked for: so many times as much, and so many bytes. On Linux, blocks below
32 MiB leave holes; how large they are was measured (`docs/decisions.md`). Torch's own allocator on other devices leaves a few per cent. See `find_slack`."""
ELSEWHERE = (
    *("quantization_config", "load_in_8bit", "load_in_4bit", "gguf_file", "autogptq", "gptqmodel"),
    *("device_map", "parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder"),
)
"""Model arguments under which the weights are not what the config says, or not in one place."""
Make = Callable[[int], State]
"""What makes a state with room for so many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """What a forward costs: fixed + rows × (n × token + m × held + n × m × pair), for n new tokens a row whose middle stands at token m."""

    fixed: float
    token: float
    held: float
    """For each token before, however many are new: a mask, keys and values that are read or repeated."""
    pair: float
    """For each two tokens, one of which sees the other: attention's scores."""

    def at(self, rows: int, start: int, stop: int) -> float:
        """
        >>> Surface(fixed=1, token=2, held=0, pair=0.5).at(rows=3, start=10, stop=12)
        46.0
        """
        return self.fixed + rows * float(np.dot(_features(start, stop)[1:], (self.token, self.held, self.pair)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """A piece that was measured."""

    start: int
    stop: int
    seconds: float
    bytes: int
    """The most that the forward held beside the model and the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What reading and generating cost."""

    weights: int
    """Bytes of parameters and buffers, tied ones once."""
    state_fixed: float
    """Bytes of a row's state, whatever its length."""
    state_token: float
    """Bytes of a row's state for each token in it."""
    bytes: Surface
    """Of all tensors beside the model and the states."""
    slack: tuple[float, int]
    """What `find_slack` found."""
    seconds: Surface
    scored_bytes: int
    """For each position that is scored, up to `most_scored` of them at once."""
    most_scored: int
    scored_seconds: float
    """For each position that is scored."""
    copy_seconds: float
    """For each token of a state that is copied to be gone on from."""
    step_seconds: float
    """For each token that is generated for a row, beside what the tokens before it cost; 0 where nothing was generated."""
    side_by_side: float
    """Of its seconds, what a piece takes that is read beside others, each on its share of the cores; 1 where none is."""
    probed: tuple[Probed, ...]
    stretched: int
    """Tokens that the longest of the states held without having been read."""

    def weigh_states(self, tokens: int, rows: int = 1) -> float:
        """Bytes of states: `tokens` in all `rows` of them."""
        return rows * self.state_fixed + tokens * self.state_token

    def weigh_reading(self, rows: int, start: int, stop: int, scored: int = 1) -> float:
        """The most bytes that a forward holds beside the model and the states."""
        times, more = self.slack
        return times * self.bytes.at(rows, start, stop) + more + self.scored_bytes * min(scored, self.most_scored)

    def time(self, rows: int, start: int, stop: int, scored: int = 1, budget: int = 0) -> float:
        """Seconds of a forward, and of generating `budget` tokens a row after it."""
        read, middle = self.seconds, stop + budget / 2
        step = self.step_seconds + (rows - 1) * read.token + rows * middle * (read.held + read.pair)
        return read.at(rows, start, stop) + self.scored_seconds * scored + step * max(0, budget - 1)


def find_slack(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """What is held over what a forward's tensors take: so many times as much, and so many bytes."""
    times, more = SLACK.get(device.type, (1.0, 0))
    return times, more + onednn.count_kept(device, dtype)


def count_weights(model: Any) -> int:
    """Bytes of parameters and buffers, tied ones once; on the meta device what they would take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in itertools.chain(model.parameters(), model.buffers()))


def read_free(model: Any) -> int:
    """Bytes that the devices of a model can still give, all of them together."""
    memory.free()
    found = {weight.device for weight in model.parameters()}
    devices = {torch.device("cpu") if device.type == "meta" else device for device in found}  # meta: offloaded
    return sum(read_free_of(device) for device in devices)


def read_free_of(device: torch.device) -> int:
    """Bytes that a device can still give.

    CUDA: what the driver says, and what torch keeps without using it. Any other device: what this process may take (`machine`).
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + kept)
    return machine.read_free().bytes


def find_lack(name: str, arguments: Mapping[str, Any]) -> tuple[int, int, str] | None:
    """The bytes of a model's weights, the bytes that are free, and the type, where the first are more; counted without loading them.

    Only for the CPU: Linux does not refuse memory that it has not got, but ends the process. Other devices say so by themselves.
    None, too, where the arguments (`hf-extrapolate`'s) put the weights elsewhere or change them.
    """
    elsewhere = str(arguments.get("device") or "cpu") != "cpu" or (not arguments.get("device") and torch.accelerator.is_available())
    if elsewhere or any(arguments.get(option) for option in ELSEWHERE):
        return None
    options = {option: arguments[option] for option in ("revision", "subfolder") if arguments.get(option)}
    options["trust_remote_code"] = bool(arguments.get("trust_remote_code"))
    try:
        config = AutoConfig.from_pretrained(resolve(name), **options)
    except (OSError, ValueError, KeyError):  # the model class says it, and better
        return None
    if getattr(config, "quantization_config", None) is not None:
        return None
    model, dtype = build_without_weights(config, **options), arguments.get("dtype", "auto")
    loaded = (getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, str(dtype), None)) or torch.float32
    needed = count_weights(model) * loaded.itemsize // next(model.parameters()).dtype.itemsize
    free = read_free_of(torch.device("cpu"))
    return (needed, free, str(loaded).removeprefix("torch.")) if needed > free else None


@torch.inference_mode()
def measure(forward: Forward, make: Make | None, *, chunk: int, longest: int, generates: bool, lanes: int = 1) -> Demand:
    """What reading costs, by reading some pieces.

    `chunk`: tokens read at a time; `longest`: tokens of the longest prompt and its answer; `make`: what makes a state, None where prompts are read
    whole; `lanes`: prompts that are read side by side. Bytes are counted where tensors are made, seconds are the best of three.

    What it leaves out: what kernels hold inside themselves (but on CUDA), what transformers' own cache takes to grow while an answer is
    generated, a second device's share, and the seconds of scheduling. One row was read: each more is taken to cost as much.
    With the allocator's holes (`SLACK`) added, twelve cases came out from 22 % below to 67 % above what a process took on the CPU, but for what is planned for oneDNN in half precision
    (`python benchmarks/plan_memory.py`; what a process takes differs from run to run by as much).

    Raises ModelError where not even these pieces fit into memory.
    """
    try:
        return _Probe(forward, make, chunk, longest).measure(generates, lanes)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out(error):
            raise
        raise ModelError(
            f"not even some chunks of {chunk} tokens fit into the memory of {forward.device}: {first_line(error)}; "
            "add chunk=N, or a lower precision"
        ) from error


class _Probe:
    def __init__(self, forward: Forward, make: Make | None, chunk: int, longest: int) -> None:
        self.forward, self.make, self.longest, self.chunk = forward, make, longest, chunk
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(min(forward.vocabulary, 4096), (1, max(2, longest)), generator=generator)
        self.probed: list[Probed] = []

    def measure(self, generates: bool, lanes: int) -> Demand:
        """As the function of this name."""
        few = max(1, min(FEW, self.longest // 4))
        self._read(self._open(few), 0, few)  # what is done once only
        sizes = self._read_ever_more(few)
        fixed, token, copy, stretched = (0.0, 0.0, 0.0, 0)
        if self.make is not None:
            fixed, token = self._weigh_state(self.make, sizes[0], sizes[-1])
            copy, stretched = self._read_late(self.make, sizes[0], sizes[-1], token)
        elif generates:
            with contextlib.suppress(*ERRORS):  # of a model that carries on nothing
                fixed, token = self._weigh_state(lambda _: Copied(self.forward.model), sizes[0], sizes[-1])
        wide = (self.forward.autocast or next(self.forward.model.parameters()).dtype).itemsize
        return Demand(
            weights=count_weights(self.forward.model),
            state_fixed=fixed,
            state_token=token,
            bytes=_fit(self.probed, [piece.bytes for piece in self.probed]),
            slack=find_slack(self.forward.device, self.forward.dtype),
            seconds=_fit(self.probed, [piece.seconds for piece in self.probed]),
            # the logits, those of the scored positions, and in float32 those and their logarithms
            scored_bytes=self.forward.vocabulary * (2 * wide + (4 if wide == 4 else 8)),
            most_scored=max(1, SCORES // self.forward.vocabulary),
            scored_seconds=self._time_scores(sizes[-1]),
            copy_seconds=copy,
            step_seconds=self._time_step(sizes[0]) if generates else 0.0,
            side_by_side=self._compare_lanes(sizes[-1], lanes) if lanes > 1 else 1.0,
            probed=tuple(self.probed),
            stretched=stretched,
        )

    def _read_ever_more(self, few: int) -> list[int]:
        """Pieces on nothing, each four times the one before, up to a chunk or, where prompts are read whole, the longest prompt."""
        most = max(few + 1, min(self.chunk, self.longest // 2) if self.make else self.longest)
        sizes = [few]
        while True:
            self._add(functools.partial(self._open, sizes[-1]), 0, sizes[-1])
            if sizes[-1] == most or (self.probed[-1].seconds > PATIENCE and len(sizes) > 1):
                return sizes
            sizes.append(min(4 * sizes[-1], most))

    def _open(self, room: int) -> State | None:
        return self.make(room) if self.make else None

    def _weigh_state(self, make: Make, few: int, chunk: int) -> tuple[float, float]:
        """Bytes of a state without tokens, and for each token: from two lengths, since buffers without room grow with what is in them."""
        state, sizes = make(0), []
        for start, stop in ((0, few), (few, chunk)):
            self._read(state, start, stop)
            sizes.append(count_bytes(state))
        token = (sizes[1] - sizes[0]) / (chunk - few)
        return max(0.0, sizes[0] - few * token), token

    def _read_late(self, make: Make, few: int, chunk: int, state_token: float) -> tuple[float, int]:
        """Pieces on a long state; the seconds of copying a token of it, and how many of its tokens were not read.

        The state is no longer than half of the free memory holds.
        """
        room = int(read_free(self.forward.model) / 2 / state_token) if state_token else self.longest
        start = min(self.longest, room) - chunk
        if start < chunk:
            return 0.0, 0
        state, stretched = make(start + chunk), 0
        self._read(state, 0, chunk)
        if isinstance(state, Cuttable) and all(isinstance(layer, BufferLayer) for layer in state.cache.layers):
            stretched = stretch(state, start) - chunk
        else:
            start = self._read_on(state, chunk, start)

        def resume() -> State:
            if not state.cuts:
                return state.copied()
            state.keep(start)
            return state

        for size in (few, chunk):
            self._add(resume, start, start + size)
        on_copy = self._time(resume, lambda held: self._read(held.copied(), start, start + few))
        return max(0.0, on_copy - self.probed[-2].seconds) / start, stretched

    def _read_on(self, state: State, start: int, stop: int) -> int:
        """Reads pieces as long as the first was, until it has taken long; returns where it stands."""
        size, began = start, time.monotonic()
        while start + size <= stop and time.monotonic() - began < PATIENCE:
            self._read(state, start, start + size)
            start += size
        return start

    def _read(self, state: State | None, start: int, stop: int, wanted: Sequence[int] = ()) -> Tensor:
        return self.forward(self.tokens[:, start:stop], state, wanted)

    def _add(self, resume: Callable[[], State | None], start: int, stop: int) -> None:
        """Measures a piece: memory the first time, where its last token is scored, then seconds, where none is, at the best of three."""
        state = resume()
        before = count_bytes(state)
        peak = find_peak(self.forward.device, lambda: self._read(state, start, stop, (stop - start - 1,)), list_tensors(state))
        grown = count_bytes(state) - before
        seconds = self._time(resume, lambda held: self._read(held, start, stop))
        self.probed.append(Probed(start=start, stop=stop, seconds=seconds, bytes=max(0, peak - grown)))

    def _time(self, resume: Callable[[], Any], run: Callable[[Any], Any]) -> float:
        """Seconds of `run` on what `resume` gives, at the best of three; of fewer where it takes long."""
        taken: list[float] = []
        while len(taken) < 3 and sum(taken) < PATIENCE / 3:
            held = resume()
            self._wait()
            started = time.perf_counter()
            run(held)
            self._wait()
            taken.append(time.perf_counter() - started)
        return min(taken)

    def _wait(self) -> None:
        if self.forward.device.type != "cpu":
            torch.accelerator.synchronize()

    def _compare_lanes(self, size: int, lanes: int) -> float:
        """Seconds of a piece that is read in each of some lanes at once, over those of as many in turn."""

        def read() -> None:
            with torch.inference_mode():  # which holds for a thread
                self._read(self._open(size), 0, size)

        alone = self._time(lambda: None, lambda _: read())
        return self._time(lambda: None, lambda _: run_threads([read] * lanes, lanes)) / (lanes * alone)

    def _time_scores(self, size: int) -> float:
        """Seconds for each position that is scored."""
        wanted = range(min(size, max(1, SCORES // self.forward.vocabulary)))

        def score(held: State | None) -> None:
            logits = self._read(held, 0, size, wanted)
            F.log_softmax(logits.float(), dim=-1).argmax(-1)

        first = next(piece.seconds for piece in self.probed if (piece.start, piece.stop) == (0, size))
        return max(0.0, self._time(functools.partial(self._open, size), score) - first) / len(wanted)

    def _time_step(self, count: int) -> float:
        """Seconds for a generated token, by generating."""
        tokens = self.tokens[:, :count].to(self.forward.device)

        def generate(steps: int) -> float:
            options = {"min_new_tokens": steps, "max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
            return self._time(
                lambda: torch.ones_like(tokens), lambda mask: self.forward.model.generate(tokens, attention_mask=mask, **options)
            )

        return max(0.0, generate(1 + STEPS) - generate(1)) / STEPS


def stretch(state: Cuttable, tokens: int) -> int:
    """Makes a state as long as one of `tokens` tokens, by repeating what is in it; returns its length."""
    for layer in state.cache.layers:
        held = layer.get_seq_length()
        for start in range(held, tokens, held):
            count = min(held, tokens - start)
            layer.update(layer.keys[..., :count, :].clone(), layer.values[..., :count, :].clone())
    return max((layer.get_seq_length() for layer in state.cache.layers), default=tokens)


def count_bytes(held: Any) -> int:
    """Bytes of all tensors in an object, whatever it is made of; storage that several share counts once, a model's not at all.

    >>> one = torch.zeros(4)
    >>> count_bytes({"a": [one, one[:2]], "b": torch.zeros(2)})
    24
    """
    return sum({_storage(tensor).data_ptr(): _storage(tensor).nbytes() for tensor in list_tensors(held)}.values())


def list_tensors(held: Any) -> list[Tensor]:
    """All tensors in an object, a model's left aside."""
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting = [held]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (torch.nn.Module, type)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif hasattr(value, "__dict__"):
            waiting += vars(value).values()
    return found


def find_peak(device: torch.device, run: Callable[[], Any], held: Sequence[Tensor] = ()) -> int:
    """The most bytes held at once while `run` runs, beside what was held before: on CUDA as torch counts, elsewhere all tensors' storage.

    `held`: what was held before and may be dropped while it runs.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _Watch(held) as watch:
        before = watch.now
        run()
    return int(watch.peak - before)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows each storage that is held, and that an operation makes, until nobody holds it."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._follow(held)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        given = {_storage(tensor)._cdata for tensor in _find_tensors((args, kwargs))}
        self._follow([tensor for tensor in _find_tensors(found) if _storage(tensor)._cdata not in given])
        return found

    def _follow(self, tensors: Sequence[Tensor]) -> None:
        for storage in map(_storage, tensors):
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._drop, storage._cdata)
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _find_tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _features(start: int, stop: int) -> tuple[float, float, float, float]:
    count, middle = stop - start, (start + stop) / 2
    return 1.0, count, middle, count * middle


def _fit(probed: Sequence[Probed], values: Sequence[float]) -> Surface:
    """The surface that misses least, relative to each value, with no term below zero."""
    known = [(piece, value) for piece, value in zip(probed, values, strict=True) if value > 0]
    rows = np.array([_features(piece.start, piece.stop) for piece, _ in known])
    if not any(piece.start for piece in probed):
        rows[:, 2] = 0  # where all is read at once, nothing is held before
    rows = rows / [[value] for _, value in known]
    scale = np.where(rows.any(axis=0), rows.max(axis=0), 1)
    found, _ = nnls(rows / scale, np.ones(len(known)))
    fixed, token, held, pair = (found / scale).tolist()
    return Surface(fixed=fixed, token=token, held=held, pair=pair)
