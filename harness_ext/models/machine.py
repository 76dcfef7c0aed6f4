"""The memory that this process may still take: what the machine has, what its container may, and what the process itself may."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

NONE = 2**60
"""Bytes; a limit above is what the kernel writes for no limit."""


class Free(NamedTuple):
    """Memory that can still be taken."""

    bytes: int
    of: str
    """Whose it is, in words."""


def read_free(*, refused: bool = True) -> Free:
    """The smallest of what is free: of the machine's memory without swapping (psutil), of each control group that the process is in, and,
    with `refused`, of its address space (`ulimit -v`).

    Past the last, an allocation is refused, which can be lived with; past the others, Linux ends the process.
    """
    found = [Free(int(psutil.virtual_memory().available), "the machine's memory"), *_list_groups(Path("/"))]
    return min([*found, *_list_refused()] if refused else found)


def _list_groups(root: Path) -> Iterator[Free]:
    """What each control group of this process still gives, versions 1 and 2 (the kernel's cgroup-v2.rst, "Memory Interface Files").

    Pages of files that were read and not used again are given up before the limit is, so they count as free. A container may see its own
    group as the root of the tree, and be told its path from outside: parents are looked at too, as their limits hold as well.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds not in ("", "memory"):
                continue
            top = root / "sys/fs/cgroup" / kinds
            limit, used, idle = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                if kinds
                else ("memory.max", "memory.current", "inactive_file")
            )
            for group in dict.fromkeys([top / path.lstrip("/"), *(top / path.lstrip("/")).parents]):
                if group.is_relative_to(top):
                    yield from _read_group(group, limit, used, idle)


def _read_group(group: Path, limit: str, used: str, idle: str) -> Iterator[Free]:
    with contextlib.suppress(OSError, ValueError):  # no such group, or `max`
        most, now = (int((group / name).read_text()) for name in (limit, used))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        if most < NONE:
            yield Free(max(0, most - now + int(counts.get(idle, 0))), f"the container's limit, {group / limit}")


def _list_refused() -> Iterator[Free]:
    """What the process's own limit on its address space leaves."""
    if sys.platform == "win32":
        return
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield Free(max(0, soft - psutil.Process().memory_info().vms), "the address space, ulimit -v")
