"""How much memory may still be taken is read from wherever it is limited."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from harness_ext.models import machine
from harness_ext.models.machine import Free, _list_groups, read_free

GIB = 2**30


def write_group(folder: Path, version: int, limit: str, used: int, idle: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit_file, used_file, idle_name = names if version == 1 else ("memory.max", "memory.current", "inactive_file")
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / used_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{idle_name} {idle}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_nearest_limit_of_all_groups_above_counts_with_idle_pages_as_free(version: int, tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    lines = {1: "5:cpu:/other\n4:memory:/jobs/one\n", 2: "0::/jobs/one\n"}
    (tmp_path / "proc/self/cgroup").write_text(lines[version])
    top = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    write_group(top, version, "9223372036854771712" if version == 1 else "max", GIB, 0)
    write_group(top / "jobs", version, str(4 * GIB), 3 * GIB, GIB // 2)
    write_group(top / "jobs/one", version, str(8 * GIB), GIB, 0)
    found = sorted(_list_groups(tmp_path))
    assert [free.bytes for free in found] == [GIB + GIB // 2, 7 * GIB]
    assert "jobs/memory" in found[0].of


def test_a_container_that_sees_its_own_group_as_the_root_is_read(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/docker/0123\n")
    write_group(tmp_path / "sys/fs/cgroup", 2, str(2 * GIB), GIB, 0)
    assert [free.bytes for free in _list_groups(tmp_path)] == [GIB]
    assert list(_list_groups(tmp_path / "nowhere")) == []


def test_the_address_space_counts_only_where_it_is_asked_for() -> None:
    code = (
        "import resource\nfrom harness_ext.models.machine import read_free\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({2 * GIB}, {2 * GIB}))\n"
        "print(*read_free(), sep=';')\nprint(*read_free(refused=False), sep=';')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0].endswith(";the address space, ulimit -v")
    assert 0 < int(said[0].split(";")[0]) < 2 * GIB
    assert "ulimit" not in said[1]
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_the_smallest_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_list_groups", lambda root: iter([Free(5, "the container's limit, here")]))
    assert read_free() == (5, "the container's limit, here")
