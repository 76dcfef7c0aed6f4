"""`harness-ext plan`: what a run will need, before it: its lengths, prompts and tokens, whether they fit into memory, and how long it takes.

load the tasks and the model → build the run's own prompts → rehearse them, which reads nothing → read some pieces, to know what reading
costs here → add it up, length by length and in all.

No prompt is scored, and nothing is written.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness_ext.cells import Length, TrainedLength
from harness_ext.compare import UNCHANGED, Asked, build_model, load_tasks
from harness_ext.errors import ComparisonError, HarnessExtError, ModelError
from harness_ext.model_view import first_line

if TYPE_CHECKING:
    from harness_ext.models.demand import Demand
    from harness_ext.models.rehearsal import Piece, Rehearsed

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLength:
    """One length of a task, and what it takes. Bytes are beside the weights."""

    length: Length
    """`measured` if it is to be run, or why not."""
    prompts: int
    """That end at this length or, where a text is read in parts, after the length before it."""
    state_bytes: int | None = None
    """What is kept of the tokens read, for all rows of a batch and for copies. None where no prompt is run."""
    reading_bytes: int | None = None
    """What the largest forward holds beside it."""
    least_bytes: int | None = None
    """Both, for one row in the smallest chunks, which is what the run goes down to before it gives up."""
    free_bytes: int | None = None
    """What is free once the model is loaded."""
    margin: float = 1.0
    """Times what is needed that has to be free; more than once where what does not fit is not refused, so that a run leaves it out."""

    @property
    def planned_bytes(self) -> int | None:
        """Of the batches and chunks that the run begins with."""
        return None if self.state_bytes is None or self.reading_bytes is None else self.state_bytes + self.reading_bytes

    @property
    def verdict(self) -> str:
        """
        >>> length = Length(tokens=64, multiple=None)
        >>> PlannedLength(length=length, prompts=1, state_bytes=8, reading_bytes=4, least_bytes=9, free_bytes=16).verdict
        'fits'
        >>> PlannedLength(length=length, prompts=1, state_bytes=8, reading_bytes=4, least_bytes=9, free_bytes=10).verdict
        'fits in smaller pieces'
        >>> PlannedLength(length=length, prompts=1, state_bytes=8 * GIB, reading_bytes=0, least_bytes=8 * GIB, free_bytes=4 * GIB).verdict
        'will not fit: needs 8.0 GiB, 4.0 GiB free'
        >>> PlannedLength(length=length, prompts=1, state_bytes=8 * GIB, reading_bytes=0, least_bytes=8 * GIB, free_bytes=9 * GIB, margin=1.25).verdict
        'will not fit: needs 8.0 GiB and 2.0 GiB to spare, 9.0 GiB free'

        The first needs `planned_bytes`, the others `least_bytes`, which is what the message names.
        """
        if self.length.outcome != "measured":
            return self.length.outcome
        if self.planned_bytes is None or self.least_bytes is None or self.free_bytes is None:
            return "no prompt"
        if self.margin * self.planned_bytes <= self.free_bytes:
            return "fits"
        if self.margin * self.least_bytes <= self.free_bytes:
            return "fits in smaller pieces"
        spare = f" and {show_bytes((self.margin - 1) * self.least_bytes)} to spare" if self.margin > 1 else ""
        return f"will not fit: needs {show_bytes(self.least_bytes)}{spare}, {show_bytes(self.free_bytes)} free"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is read, and how long that takes."""

    prompts: int
    asked: int
    """Tokens of all prompts."""
    computed: int
    """Those of them that are computed, each distinct one once where prompts share."""
    forwards: int
    generated: int
    """Tokens to generate, if no answer stops early."""
    seconds: float
    """Estimated; without loading and without building prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTask:
    """One task, as if it were run alone."""

    task: str
    lengths: tuple[PlannedLength, ...]
    """The longest prompt alone, for a task of lm_eval's own."""
    reading: Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will need."""

    model: str
    trained_length: TrainedLength | None
    device: str
    sharing: str
    """What prompts share by, or why they do not."""
    tasks: tuple[PlannedTask, ...]
    total: Reading
    """Together, tasks sharing with each other."""
    demand: Demand
    """What reading costs here."""
    free_bytes: int
    """With the model loaded."""
    preparing_seconds: float
    """That building, tokenising and scheduling the prompts took, as it will again."""

    @property
    def fits(self) -> bool:
        """Whether every length that is to be run will fit."""
        return not any(length.verdict.startswith("will not fit") for task in self.tasks for length in task.lengths)


def plan_run(asked: Asked) -> Plan:
    """What `hf-extrapolate` will need for what is asked. `asked.methods` is left aside: a method stands in the model arguments.

    Raises ComparisonError for tasks, and ModelError for a model, that cannot be run.
    """
    from harness_ext.models import foresight
    from harness_ext.models.rehearsal import rehearsing

    _, tasks = load_tasks(asked)
    lm = load_model(asked)
    began = time.monotonic()
    requests = {name: build_requests(name, task, lm, asked.limit) for name, task in tasks.items()}
    if not any(requests.values()):
        raise ComparisonError(f"--tasks: {', '.join(asked.tasks)} ask for no prompt")
    with rehearsing(lm) as rehearse:
        total = rehearse([request for some in requests.values() for request in some])
        preparing = time.monotonic() - began
        rehearsed = {name: rehearse(some) if len(requests) > 1 else total for name, some in requests.items() if some}
    demand, free = probe(lm, total)
    margin = foresight.MARGIN if lm._memory.foresees else 1.0
    return Plan(
        model=asked.model,
        trained_length=lm.trained_length,
        device=str(lm.device),
        sharing=f"{'prompts share what they have in common' if total.sharing.make else 'every prompt is read whole'}: {total.sharing.said}",
        tasks=tuple(
            PlannedTask(
                task=name,
                lengths=tuple(
                    plan_lengths(list_lengths(tasks[name], found, lm.trained_length), requests[name], found, demand, free, margin)
                ),
                reading=add_up(found, demand, len(requests[name])),
            )
            for name, found in rehearsed.items()
        ),
        total=add_up(total, demand, sum(map(len, requests.values()))),
        demand=demand,
        free_bytes=free,
        preparing_seconds=preparing,
    )


def load_model(asked: Asked) -> Any:
    """`hf-extrapolate` with its weights. Raises ModelError where they do not fit into memory, or for an encoder-decoder."""
    from harness_ext.models import demand, memory

    lacking = demand.find_lack(asked.model, asked.model_args)
    if lacking:
        needed, free, dtype = lacking
        raise ModelError(
            f"the weights of {asked.model} take {show_bytes(needed)} in {dtype}, and {show_bytes(free)} are free; "
            "use a lower precision (dtype=bfloat16) or another device"
        )
    try:
        lm = build_model(asked, UNCHANGED)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out(error):
            raise
        raise ModelError(f"the weights of {asked.model} do not fit into memory: {first_line(error)}") from error
    if lm.backend != "causal":
        raise ModelError(f"{asked.model} is an encoder-decoder, which lm_eval's own code runs; only causal models can be planned")
    return lm


def build_requests(name: str, task: Any, lm: Any, limit: int | None) -> list[Any]:
    """The requests of a task, as the run makes them. Raises ComparisonError where those of lm_eval's own task cannot be built."""
    from harness_ext.sweep.host import SweepTask

    if isinstance(task, SweepTask):
        task.bind(lm)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        return list(task.instances)
    try:
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    except HarnessExtError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ComparisonError(f"--tasks: the prompts of {name} cannot be built: {first_line(error)}") from error
    return list(task.instances)


def probe(lm: Any, rehearsed: Rehearsed) -> tuple[Demand, int]:
    """What reading costs, and the bytes that are free with the model loaded."""
    from harness_ext.models import demand

    longest = max(piece.stop + piece.budget for piece in rehearsed.pieces)
    free = demand.read_free(lm.model)
    found = demand.measure(
        lm._reader.forward,
        rehearsed.sharing.make,
        chunk=lm._reader.chunk,
        longest=longest,
        generates=any(piece.budget for piece in rehearsed.pieces),
        lanes=rehearsed.lanes,
    )
    return found, free


def plan_lengths(
    lengths: Sequence[Length], requests: Sequence[Any], rehearsed: Rehearsed, demand: Demand, free: int, margin: float
) -> list[PlannedLength]:
    """Each length of a task, with what everything that is read up to there takes."""
    planned, shorter = [], 0
    for length in lengths:
        if length.outcome != "measured":
            planned.append(PlannedLength(length=length, prompts=0))
            continue
        sizes = [request.doc.get("prompt_tokens", length.tokens) for request in requests]
        prompts, shorter = sum(shorter < size <= length.tokens for size in sizes), length.tokens
        pieces = list(list_pieces(rehearsed.pieces, length.tokens))
        whole = rehearsed.sharing.make is None
        needs = weigh(pieces, demand, whole=whole, lanes=rehearsed.lanes) if prompts and pieces else {}
        planned.append(PlannedLength(length=length, prompts=prompts, free_bytes=free, margin=margin, **needs))
    return planned


def list_lengths(task: Any, rehearsed: Rehearsed, trained: TrainedLength | None) -> list[Length]:
    """The task's, or for one of lm_eval's own the longest prompt: its last token is scored or generated, and never read."""
    from harness_ext.sweep.host import SweepTask

    if isinstance(task, SweepTask):
        return list(task.lengths)
    longest = max(piece.stop + piece.budget for piece in rehearsed.pieces) + 1
    return [Length(tokens=longest, multiple=longest / trained.tokens if trained else None)]


def list_pieces(pieces: Sequence[Piece], tokens: int) -> Iterator[Piece]:
    """What is read of the first `tokens` tokens: a longer prompt's beginning counts, a batch of longer ones does not."""
    for piece in pieces:
        over = piece.stop + piece.budget - tokens
        if over <= 0:
            yield piece
        elif piece.rows == 1 and piece.start < tokens and not piece.budget:
            yield dataclasses.replace(piece, stop=tokens, held=piece.held - over, scored=min(piece.scored, tokens - piece.start))


def weigh(pieces: Sequence[Piece], demand: Demand, *, whole: bool, lanes: int) -> dict[str, int]:
    """The bytes of the largest of some pieces, as planned, in as many `lanes` where it is scored, and at the least."""
    from harness_ext.models.forward import SMALLEST_CHUNK

    parts = [
        (
            times * demand.weigh_states(piece.held, piece.states),
            times * demand.weigh_reading(piece.rows, piece.start, piece.stop, piece.scored),
        )
        for piece in pieces
        for times in [1 if piece.budget else lanes]
    ]
    state, reading = max(parts, key=sum)
    longest = max(pieces, key=lambda piece: piece.stop + piece.budget)
    start = 0 if whole else max(0, longest.stop - SMALLEST_CHUNK)
    held = longest.stop + longest.budget if not whole or longest.budget else 0
    least = demand.weigh_states(held) + demand.weigh_reading(1, start, longest.stop)
    return {"state_bytes": int(state), "reading_bytes": int(reading), "least_bytes": int(min(least, state + reading))}


def add_up(rehearsed: Rehearsed, demand: Demand, prompts: int) -> Reading:
    """Tokens and seconds of all pieces."""
    seconds = sum(
        demand.time(piece.rows, piece.start, piece.stop, piece.scored, piece.budget) * (1 if piece.budget else demand.side_by_side)
        for piece in rehearsed.pieces
    )
    return Reading(
        prompts=prompts,
        asked=rehearsed.asked,
        computed=rehearsed.computed,
        forwards=len(rehearsed.pieces),
        generated=sum(piece.rows * piece.budget for piece in rehearsed.pieces),
        seconds=seconds + demand.copy_seconds * rehearsed.copied,
    )


def show_bytes(count: float) -> str:
    """
    >>> show_bytes(3 * 2**20), show_bytes(0), show_bytes(8.5 * 2**40)
    ('3.0 MiB', '0 B', '8.5 TiB')
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"
