"""Lengths that will not fit are known before they are tried: Linux gives out memory that it has not got, and ends the process that uses it. And where
there is room for several prompts at once, they are read side by side.

Only on the CPU; other devices refuse, and a refusal can be lived with (`memory`). What a length takes is read off a model without weights
(`cards.find_need`), in a second, and only where it may be much.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence

import torch

from harness_ext.errors import ModelError
from harness_ext.models import machine
from harness_ext.models.cards import find_need, guess_token
from harness_ext.models.demand import find_slack
from harness_ext.models.forward import SCORES, SMALLEST_CHUNK
from harness_ext.models.inspection import build_without_weights
from harness_ext.models.reader import Reader

log = logging.getLogger(__name__)

PLENTY = 8
"""Times what the longest prompt takes at a guess; where so much is free, nothing is looked at."""
MARGIN = 1.3
"""Times the plan: what a process takes differs from run to run, and came out up to 28 % above it (`demand`: the plan up to 22 % below). One that takes more than there is would be ended."""
MOST_LANES = 8
"""Prompts side by side. All lanes run Python in turn, about a tenth of the time where a model is smallest."""


def look_ahead(reader: Reader, sizes: Sequence[int]) -> None:
    """Marks what will not fit of prompts of which `sizes` tokens are held, and lowers the chunk where only a smaller one fits.

    Where there is plenty for several of the longest, as many are read side by side as there are cores.
    """
    memory, model = reader.memory, reader.forward.model
    free = machine.read_free(refused=False)
    have = free.bytes // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    longest = max(sizes, default=0)
    guess = 4 * longest * guess_token(model) + 4 * SCORES
    if (
        memory.device.type == "cpu" and getattr(model, "hf_device_map", None) is None
    ):  # weights that are brought in are one forward's
        reader.lanes = max(1, min(torch.get_num_threads(), MOST_LANES, have // (PLENTY * guess)))
    if not memory.foresees or have > PLENTY * guess:
        return
    bare = _strip(reader)
    if bare is None:
        return
    whole = reader.sharing is not None and reader.sharing.make is None
    for size in sorted(set(sizes), reverse=True):
        smallest = size if whole else min(size, SMALLEST_CHUNK)
        needed = _weigh(bare, size, smallest)
        if needed > have:
            memory.too_large = min(size, memory.too_large or size)
            memory.foreseen = (
                f"{memory.too_large} tokens take {needed / 2**30:.2f} GiB by the plan, and {have / 2**30:.2f} GiB are free ({free.of}); "
                "try_all=True tries all the same"
            )
            log.warning("%s", memory.refuse(size).reason)
            continue
        while not whole and reader.chunk > SMALLEST_CHUNK and _weigh(bare, size, min(size, reader.chunk)) > have:
            reader.chunk = reader.smallest = max(SMALLEST_CHUNK, reader.chunk // 2)
            log.warning("%d tokens fit only in smaller pieces: %d tokens at a time", size, reader.chunk)
        return


def limit_rows(reader: Reader, tokens: int, rows: int) -> int:
    """`rows`, or as many as half of what a CPU has free holds, of a batch that is held at once; `tokens`: of the longest prompt and its answer."""
    if not reader.bounded:
        return rows
    have = machine.read_free(refused=False).bytes // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(rows, have // (2 * max(1, tokens * guess_token(reader.forward.model)))))


def _strip(reader: Reader) -> torch.nn.Module | None:
    """The model without its weights, in the type it computes in; None where none can be built of its config."""
    config = copy.deepcopy(reader.forward.model.config)
    config._attn_implementation = "sdpa" if "sdpa" in str(config._attn_implementation) else config._attn_implementation
    try:
        bare: torch.nn.Module = build_without_weights(config).to(reader.forward.dtype)
    except ModelError:
        return None
    return bare


def _weigh(bare: torch.nn.Module, size: int, chunk: int) -> int:
    """Bytes that a prompt may take beside the weights, read `chunk` at a time."""
    need, (times, more) = find_need(bare, size, chunk), find_slack(torch.device("cpu"), next(bare.parameters()).dtype)
    return int(MARGIN * (need.cache + times * need.reading + more))
